"""The moving picture: its scenes follow the trace, size and duration are as promised, it shows the shipped model."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("matplotlib")
from PIL import Image, ImageSequence

from eval import animation
from eval.animation import Run, cells_of, checked, description, record, save, scenes
from eval.widget import BOOKING
from repo_package import ROOT, load_repo_module
from test_generation import tiny_model
from tiny_tokenizer import tiny_tokenizer

SlotView = load_repo_module("slot_grammar").SlotView
PICTURE = ROOT / "docs" / "denoising.gif"


def event(kind: str, **data: Any) -> Any:
    return SimpleNamespace(kind=kind, data=data)


def canvas(restaurant: tuple[str | None, ...], people: tuple[str | None, ...]) -> list[Any]:
    opening = '\n{"name": "book_table", "arguments": {"restaurant": "'
    slots = [SlotView("/restaurant", "value", restaurant), SlotView("/people", "value", people)]
    return [opening, slots[0], '", "people": ', slots[1], "}}\n"]


def made_up() -> Run:
    """Two steps, a check that replaces a blank, a step, a check that keeps the rest."""
    trace = [
        event("route", mode="tool", probability=0.75, forced=False),
        event("draft", call=0, canvas=canvas(("No", None, None, None), ("4", None))),
        event("draft", call=0, canvas=canvas(("No", "bu", " ", "for"), ("4", ""))),
        event("verify", accepted="Nobu", drafted=" ", chosen='", "'),
        event("draft", call=0, canvas=canvas(("No", "bu", "", ""), ("4", ""))),
        event("verify", accepted="4}}\n</tool_call>", drafted="", chosen=""),
    ]
    function = {"name": "book_table", "arguments": {"restaurant": "Nobu", "people": 4}}
    stats = SimpleNamespace(base_forwards=3, head_forwards=3)
    return Run(SimpleNamespace(trace=trace, stats=stats, message={"tool_calls": [{"function": function}]}), 7, 10**7)


def text_of(cells: Any, style: str) -> str:
    return "".join(cell.text for cell in cells if cell.style == style and cell.written)


def durations(path: Path) -> list[int]:
    with Image.open(path) as picture:
        return [frame.info["duration"] for frame in ImageSequence.Iterator(picture)]


def test_the_scenes_tell_the_trace_in_its_order() -> None:
    assert description(scenes(made_up())).splitlines() == [
        f"request: {animation.REQUEST}",
        "asked (base 0, head 0): which tool, and with which values?",
        "base: route (base 1, head 0): P(call) = 0.750, so it calls book_table; its schema gives the JSON",
        '{"name": "book_table", "arguments": {',
        '  "restaurant": "████", ',
        '  "people": ██}}',
        "head: denoise (base 1, head 1): step 1: what is sure stays, 4 tokens are still masked",
        '{"name": "book_table", "arguments": {',
        '  "restaurant": "No███", ',
        '  "people": 4█}}',
        "head: denoise (base 1, head 2): step 2: all filled in; · stands for no token",
        '{"name": "book_table", "arguments": {',
        '  "restaurant": "Nobu for", ',
        '  "people": 4·}}',
        'base: check (base 2, head 2): the base keeps Nobu, replaces ␣ by ", "',
        '{"name": "book_table", "arguments": {',
        '  "restaurant": "Nobu for", ',
        '  "people": 4}}',
        "head: denoise (base 2, head 3): step 1: all filled in; · stands for no token",
        '{"name": "book_table", "arguments": {',
        '  "restaurant": "Nobu··", ',
        '  "people": 4·}}',
        "base: check (base 3, head 3): the base keeps all of it",
        '{"name": "book_table", "arguments": {',
        '  "restaurant": "Nobu", ',
        '  "people": 4}}',
        "call (base 3, head 3, without drafts 7): 3 forwards of the base; without drafts the same tokens take 7",
        '{"name": "book_table", "arguments": {',
        '  "restaurant": "Nobu", ',
        '  "people": 4}}',
    ]


def test_a_check_colours_what_is_kept_replaced_and_dropped() -> None:
    cells = cells_of(canvas(("No", "bu", " ", "for"), ("4",)))
    shown, known = checked(cells, 0, event("verify", accepted="Nobu", drafted=" ", chosen='", "'))
    styles = {style: text_of(shown, style) for style in ("fixed", "kept", "replaced", "dropped")}
    opening = '{"name": "book_table", "arguments": {"restaurant": "'
    assert styles == {"fixed": opening, "kept": "Nobu", "replaced": " ", "dropped": 'for", "people": 4}}'}
    assert known == len(opening) + len('Nobu", "')


def test_a_check_looks_behind_what_is_settled() -> None:
    cells = cells_of(canvas(("4", " ", "4"), ("4",)))
    shown, _ = checked(cells, 56, event("verify", accepted="4}}\n</tool_call>", drafted="", chosen=""))
    assert text_of(shown, "kept") == "4}}"


def test_a_check_of_another_draft_is_refused() -> None:
    with pytest.raises(ValueError, match="'Rome', which is not in the draft"):
        checked(cells_of(canvas(("Nobu",), ("4",))), 0, event("verify", accepted="Rome", drafted="", chosen=""))


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the size, which is drawn four times as fast."""
    monkeypatch.setattr(animation, "SCALE", 1)


@pytest.mark.usefixtures("_small")
def test_the_picture_has_the_size_and_the_durations_of_its_scenes(tmp_path: Path) -> None:
    for name in ("one.gif", "two.gif"):
        save(made_up(), tmp_path / name)
    assert (tmp_path / "one.gif").read_bytes() == (tmp_path / "two.gif").read_bytes()
    steps, checks = [animation.STEP_MS], [animation.CHECK_MS]
    beginning = [animation.ASK_MS, animation.ROUTE_MS]
    assert durations(tmp_path / "one.gif") == [*beginning, *steps * 2, *checks, *steps, *checks, animation.CALL_MS]
    with Image.open(tmp_path / "one.gif") as picture:
        assert picture.size == (animation.WIDTH, animation.HEIGHT)
        assert picture.info["loop"] == 0
        assert picture.info["comment"].decode() == description(scenes(made_up()))


def test_frames_show_every_colour_of_the_story_on_an_opaque_ground() -> None:
    shown = scenes(made_up())
    check, call = (animation.frame(shown[number], made_up()) for number in (4, -1))

    def has(picture: Image.Image, style: str) -> bool:
        colours = picture.getcolors(picture.width * picture.height)
        assert colours is not None
        wanted = tuple(int(animation.COLOURS[style][place : place + 2], 16) for place in (1, 3, 5))
        return wanted in {colour for _, colour in colours}

    assert check.mode == "RGB"
    assert all(has(check, style) for style in ("kept", "dropped", "chosen", "base", "head"))
    assert not has(check, "alone")
    assert has(call, "alone")


@pytest.mark.usefixtures("_small")
def test_a_random_model_is_recorded_and_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(animation, "TOOLS", [BOOKING])
    model = tiny_model()
    model.generation_config.tool_call_threshold = 0.0
    model.generation_config.max_tool_calls = 1
    run = record(model, tiny_tokenizer())
    assert run.reply.stats.base_forwards <= run.reference
    save(run, tmp_path / "random.gif")
    shown, steps = scenes(run), sum(event.kind == "draft" for event in run.reply.trace)
    assert [scene.title for scene in shown].count("head: denoise") == steps
    assert sum(durations(tmp_path / "random.gif")) == sum(scene.ms for scene in shown)


def test_a_model_that_does_not_call_has_nothing_to_show() -> None:
    model = tiny_model()
    model.generation_config.tool_call_threshold = 1.0
    model.generation_config.max_new_tokens = 1
    with pytest.raises(ValueError, match="without a call"):
        record(model, tiny_tokenizer())


def test_the_picture_in_the_repository_is_small_and_ends_within_ten_seconds() -> None:
    assert PICTURE.stat().st_size < 400_000
    with Image.open(PICTURE) as picture:
        assert picture.size == (animation.WIDTH * animation.SCALE, animation.HEIGHT * animation.SCALE)
    assert sum(durations(PICTURE)) <= 10_000
    assert durations(PICTURE)[-1] == animation.CALL_MS


def test_the_picture_in_the_repository_shows_the_model_in_it() -> None:
    """`python -m eval.animation` makes it anew."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(ROOT, trust_remote_code=True, dtype=torch.float32).eval()
    run = record(model, tokenizer)
    call, shown = scenes(run)[-1], description(scenes(run))
    assert (call.base, call.head) == (run.reply.stats.base_forwards, run.reply.stats.head_forwards)
    assert run.reply.message["tool_calls"][0]["function"]["arguments"] == {"restaurant": "Olive Garden", "people": 4}
    with Image.open(PICTURE) as picture:
        assert picture.info["comment"].decode() == shown
