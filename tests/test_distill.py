"""Targets out of the base: calls that it writes, distributions over what the grammar allows, and training on them."""

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from repo_package import ROOT, load_repo_module
from tiny_models import tiny_text_config
from tiny_tokenizer import tiny_tokenizer
from training import distill as distillation
from training import head as head_training
from training.data import PromptStyle, Record, Row, build_row, read_records
from training.distill import BaseTeacher, DistillRun, TargetExamples, distill, soft_targets, value_spans, write_targets
from training.records import RecordError

modeling = load_repo_module("modeling_smollm_diffusion")
grammars = load_repo_module("reply_grammar")
layouts = load_repo_module("scaffold_layout")
scaffolds = load_repo_module("schema_scaffold")
slot_grammar = load_repo_module("slot_grammar")
tokenization = load_repo_module("tokenization_utils")

STRING = {"type": "string"}
PARAMETERS = {
    "type": "object",
    "properties": {
        "city": STRING,
        "unit": {"enum": ["celsius", "fahrenheit", "fahr"]},
        "days": {"type": "integer"},
        "again": {"type": "boolean"},
        "tags": {"type": "array", "items": STRING, "maxItems": 2},
    },
    "required": ["city", "unit", "days", "again"],
}
WEATHER: Record = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}
TIME: Record = {
    "type": "function",
    "function": {"name": "get_time", "parameters": {"type": "object", "properties": {"zone": STRING}}},
}
REQUESTS = (
    "What is the weather in Lisbon for 3 days, in celsius?",
    "weather in New York, 12 days, in fahrenheit, please",
    "Will it rain in São Paulo?",
)
GOLD = {"city": "Lisbon", "unit": "celsius", "days": 3, "again": False}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(ROOT, trust_remote_code=False)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.set_num_threads(1)
    return modeling.SmolLMDiffusionForCausalLM.from_pretrained(ROOT, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def teacher(model: Any, tokenizer: Any) -> BaseTeacher:
    return BaseTeacher(model, tokenizer)


def row_of(tokenizer: Any, text: str, **fields: Any) -> Row:
    record = {
        "id": text,
        "source": "tiny",
        "messages": [{"role": "user", "content": text}],
        "tools": [TIME, WEATHER],
        "calls": [{"name": "get_weather", "arguments": GOLD}],
        **fields,
    }
    row = build_row(record, tokenizer, PromptStyle(max_tools=2), random.Random(text))
    assert row is not None
    return row


@pytest.fixture(scope="module")
def rows(tokenizer: Any) -> list[Row]:
    return [row_of(tokenizer, text) for text in REQUESTS]


@pytest.fixture(scope="module")
def targets(teacher: BaseTeacher, rows: list[Row]) -> list[Record]:
    """What the base writes; its weights may be any, but it is to write something for some of the requests."""
    found = [target for target in teacher.targets(rows) if not isinstance(target, str)]
    assert len(found) >= 2
    return found


def canvas_of(teacher: BaseTeacher, arguments: Record) -> tuple[Any, Tensor, Tensor]:
    """Canvas of a call with wide slots, its clean ids, and the slot of each position."""
    scaffold, config = scaffolds.compile_scaffold(WEATHER), teacher.model.config
    layout = layouts.draft_layout(scaffold, 4)
    budgets = {"string": 40, "integer": 8, "number": 8}
    canvas = slot_grammar.build_canvas(teacher.vocabulary, layout, budgets, config.mask_token_id, config.null_token_id)
    ids, fields = canvas.token_ids.clone(), torch.full_like(canvas.token_ids, -1)
    for index, (slot, text) in enumerate(zip(canvas.slots, layout.texts(arguments), strict=True)):
        ids[slot.positions], fields[slot.positions] = canvas.tokens_of(slot, text), index
    return canvas, ids, fields


# ---------------------------------------------------------------------------------------------------------------------
# The base's calls
# ---------------------------------------------------------------------------------------------------------------------


def test_a_target_is_the_bases_own_constrained_call(
    teacher: BaseTeacher, rows: list[Row], targets: list[Record]
) -> None:
    for target in targets:
        row = next(row for row in rows if row.id == target["id"])
        forced = {"type": "function", "function": {"name": "get_weather"}}
        ids = torch.tensor([row.prompt_ids])
        sequence = teacher.model.generate(
            ids, tools=row.tools, tool_choice=forced, tokenizer=teacher.tokenizer, decoding="ar", max_tool_calls=1
        )
        reply = teacher.tokenizer.decode(sequence[0, ids.shape[1] :])
        call = json.loads(reply.partition("<tool_call>")[2].partition("</tool_call>")[0])
        assert target["calls"] == [call]
        assert target["gold"] == row.calls


def test_a_target_rebuilds_the_prompt_that_the_base_saw(tokenizer: Any, rows: list[Row], targets: list[Record]) -> None:
    for target in json.loads(json.dumps(targets)):
        row = next(row for row in rows if row.id == target["id"])
        assert distillation.shown_prompt(tokenizer, target["messages"], target["tools"]) == row.prompt_ids


def test_a_batch_gives_what_its_rows_give_alone(teacher: BaseTeacher, rows: list[Row]) -> None:
    for row, together in zip(rows[:2], teacher.targets(rows[:2]), strict=True):
        (alone,) = teacher.targets([row])
        if isinstance(together, str) or isinstance(alone, str):
            assert together == alone
        else:
            assert together["calls"] == alone["calls"]


def test_rows_without_a_target_say_why(teacher: BaseTeacher, tokenizer: Any) -> None:
    call = {"name": "get_weather", "arguments": GOLD}
    refusal = row_of(tokenizer, "tell me a joke", calls=[])
    thinking = row_of(tokenizer, REQUESTS[0], think="They ask for Lisbon.")
    pattern = {"type": "object", "properties": {"city": {"type": "string", "pattern": "(?=a)b"}}, "required": ["city"]}
    unsupported = row_of(
        tokenizer,
        REQUESTS[0],
        tools=[{"type": "function", "function": {"name": "get_weather", "parameters": pattern}}],
        calls=[{**call, "arguments": {"city": "b"}}],
    )
    assert teacher.targets([refusal, thinking, unsupported]) == [
        "no call with arguments",
        "prompt differs",
        "unsupported schema",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Calls that are given
# ---------------------------------------------------------------------------------------------------------------------


class Writer:
    """Stands for `generate`: writes a given call.

    Args:
        tokens: the reply.
        cut: values that were cut.
    """

    def __init__(self, tokens: Sequence[int], cut: Sequence[str] = ()) -> None:
        self.tokens, self.cut = list(tokens), tuple(cut)

    def __call__(self, ids: Tensor, **_: Any) -> Any:
        reply = torch.tensor([self.tokens]).expand(len(ids), -1)
        stats = [type("Stats", (), {"cut": self.cut})() for _ in ids]
        return type("Output", (), {"sequences": torch.cat([ids, reply], dim=1), "stats": stats})()


def written(teacher: BaseTeacher, arguments: Record) -> list[int]:
    tokens = grammars.call_continuation(teacher.vocabulary, scaffolds.compile_scaffold(WEATHER), arguments, b"")
    return [teacher.vocabulary.call_start, *tokens, teacher.vocabulary.im_end]


def target_of(teacher: BaseTeacher, row: Row, writer: Writer, monkeypatch: pytest.MonkeyPatch) -> Record | str:
    monkeypatch.setattr(teacher.model, "generate", writer)
    (found,) = teacher.targets([row])
    return found


def test_values_that_were_cut_are_no_targets(
    teacher: BaseTeacher, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Writer(written(teacher, GOLD), cut=["/properties/city"])
    assert target_of(teacher, rows[0], writer, monkeypatch) == "cut at a limit"


def test_a_call_that_no_draft_can_equal_is_no_target(
    teacher: BaseTeacher, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary, text = teacher.vocabulary, json.dumps({"name": "get_weather", "arguments": GOLD})
    letters = [token for letter in f"\n{text}\n" for token in vocabulary.encode_bytes(letter.encode())]
    writer = Writer([vocabulary.call_start, *letters, vocabulary.call_end, vocabulary.im_end])
    assert target_of(teacher, rows[0], writer, monkeypatch) == "spelled otherwise"


def test_an_escaped_value_has_no_distribution_and_the_others_have(
    teacher: BaseTeacher, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Most distributions of a call that the base would not write do not have its tokens on top.
    monkeypatch.setattr(BaseTeacher, "_agrees", staticmethod(lambda *_: True))
    arguments = {**GOLD, "city": 'the "city"\n', "tags": ["a", ""]}
    target = target_of(teacher, rows[0], Writer(written(teacher, arguments)), monkeypatch)
    assert not isinstance(target, str)
    assert set(target["soft"]) == {"/unit", "/days", "/again", "/tags/0", "/tags/1"}
    assert [len(target["soft"][name]) for name in ("/tags/1", "/days")] == [1, 2]


def test_a_value_that_the_base_would_not_go_on_with_has_no_distribution(
    teacher: BaseTeacher, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {**GOLD, "city": "Lisbon Oslo Lisbon xyz"}
    target = target_of(teacher, rows[0], Writer(written(teacher, arguments)), monkeypatch)
    assert not isinstance(target, str)
    assert "/city" not in target["soft"]


def test_spans_are_the_places_of_values_in_the_json_text() -> None:
    arguments = {"a/b": [1, "é", {"c": [], "d": {}}], "e": True, "": None}
    text = json.dumps(arguments, ensure_ascii=False).encode()
    spans = value_spans(arguments)
    assert set(spans) == {"", "/a~1b", "/a~1b/0", "/a~1b/1", "/a~1b/2", "/a~1b/2/c", "/a~1b/2/d", "/e", "/"}
    for span in spans.values():
        assert text[span.start : span.end].decode() == span.text
    assert spans["/a~1b/1"].text == '"é"'


# ---------------------------------------------------------------------------------------------------------------------
# Distributions
# ---------------------------------------------------------------------------------------------------------------------


def test_the_likeliest_token_is_the_greedy_one_at_every_value_position(
    teacher: BaseTeacher, targets: list[Record]
) -> None:
    known = 0.0
    for target in targets:
        arguments = target["calls"][0]["arguments"]
        canvas, ids, fields = canvas_of(teacher, arguments)
        soft_ids, soft_probs = soft_targets(ids, fields, canvas.layout, target["soft"], canvas.null_id)
        given = soft_probs.sum(-1) > 0
        best = soft_ids.gather(1, soft_probs.argmax(-1, keepdim=True))[:, 0]
        assert torch.equal(best[given], ids[given])
        # Whole slots are given, tails of NULL included, and those of values only.
        for index, slot in enumerate(canvas.slots):
            filled = given[slot.positions]
            assert filled.all() or not filled.any()
            assert slot.slot.role == "value" or not filled.any(), index
        assert not given[fields < 0].any()
        alive = [slot for slot, text in zip(canvas.slots, canvas.layout.texts(arguments), strict=True) if text]
        values = [slot for slot in alive if slot.slot.role == "value"]
        known += sum(bool(given[slot.positions].any()) for slot in values) / len(values)
    assert known / len(targets) > 0.7


def test_distributions_sum_to_one_over_tokens_that_the_slot_allows(teacher: BaseTeacher, targets: list[Record]) -> None:
    vocabulary = teacher.vocabulary
    for target in targets:
        canvas, ids, fields = canvas_of(teacher, target["calls"][0]["arguments"])
        soft_ids, soft_probs = soft_targets(ids, fields, canvas.layout, target["soft"], canvas.null_id)
        totals = soft_probs.sum(-1)
        assert ((totals == 0) | ((totals - 1).abs() < 1e-5)).all()
        for slot in canvas.slots:
            leaf = slot.slot.leaf
            for place in range(slot.start, slot.start + slot.length):
                before = vocabulary.spell(ids[slot.start : place].tolist())
                ended = place > slot.start and int(ids[place - 1]) == canvas.null_id
                for token in soft_ids[place][soft_probs[place] > 0].tolist():
                    text = before + vocabulary.spell([token])
                    ends = token == canvas.null_id
                    assert ends or not ended
                    if leaf.kind == "choice":
                        choices = [choice.encode() for choice in leaf.choices]
                        assert text in choices if ends else any(choice.startswith(text) for choice in choices)
                    else:
                        assert leaf.automaton.viable(text, ends)


def test_shares_are_the_bases_probabilities_and_null_is_all_that_ends_the_value(
    teacher: BaseTeacher, rows: list[Row], targets: list[Record]
) -> None:
    """The same by another way: token by token, the base run anew on every beginning of the reply."""
    vocabulary, model = teacher.vocabulary, teacher.model
    target = next(target for target in targets if "/city" in target["soft"])
    row = next(row for row in rows if row.id == target["id"])
    reply = written(teacher, target["calls"][0]["arguments"])
    city = vocabulary.encode(target["calls"][0]["arguments"]["city"])
    opening = len(grammars.ReplyGrammar(vocabulary, [scaffolds.compile_scaffold(WEATHER)], 1, 64, 256).opening())
    first = next(place for place in range(opening, len(reply)) if tuple(reply[place : place + len(city)]) == city)
    cursor = grammars.ReplyGrammar(vocabulary, [scaffolds.compile_scaffold(WEATHER)], 1, 64, 256).start()
    for token in reply[opening:first]:
        cursor = cursor.advance(token)
    for place, (tokens, shares) in enumerate(target["soft"]["/city"], start=first):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row.prompt_ids + reply[:place]])).logits[0, -1]
        probs = logits.masked_fill(~cursor.mask(), float("-inf")).softmax(-1)
        spelled = [vocabulary.spell([token]) for token in range(vocabulary.size)]
        ends = float(sum(probs[token] for token in cursor.mask().nonzero()[:, 0] if spelled[token][:1] == b'"'))
        expected = {token: ends if token == distillation.ENDS else float(probs[token]) for token in tokens}
        total = sum(expected.values())
        for token, share in zip(tokens, shares, strict=True):
            assert share / 10_000 == pytest.approx(expected[token] / total, abs=2e-4)
        cursor = cursor.advance(reply[place])


def test_a_branch_that_is_not_alive_gets_no_distribution(teacher: BaseTeacher) -> None:
    union = {"anyOf": [{"type": "integer"}, STRING]}
    tool = {"function": {"name": "f", "parameters": {"type": "object", "properties": {"x": union}, "required": ["x"]}}}
    layout = layouts.draft_layout(scaffolds.compile_scaffold(tool), 2)
    budgets, null_id = {"string": 4, "integer": 4}, teacher.vocabulary.size + 1
    canvas = slot_grammar.build_canvas(teacher.vocabulary, layout, budgets, teacher.vocabulary.size, null_id)
    ids, fields = canvas.token_ids.clone(), torch.full_like(canvas.token_ids, -1)
    for index, (slot, text) in enumerate(zip(canvas.slots, layout.texts({"x": 7}), strict=True)):
        ids[slot.positions], fields[slot.positions] = canvas.tokens_of(slot, text), index
    (seven,) = teacher.vocabulary.encode("7")
    soft = {"/x": [[[seven], [10_000]], [[distillation.ENDS, seven], [9_000, 1_000]]]}
    _, probs = soft_targets(ids, fields, layout, soft, null_id)
    filled = [bool((probs[slot.positions].sum(-1) > 0).all()) for slot in canvas.slots]
    texts = layout.texts({"x": 7})
    assert filled == [text == "7" for text in texts]


def test_a_slot_narrower_than_its_value_gets_what_it_holds(teacher: BaseTeacher) -> None:
    scaffold = scaffolds.compile_scaffold(TIME)
    layout, null_id = layouts.draft_layout(scaffold, 2), teacher.vocabulary.size + 1
    canvas = slot_grammar.build_canvas(teacher.vocabulary, layout, {"string": 2}, teacher.vocabulary.size, null_id)
    tokens = teacher.vocabulary.encode("one two three")
    assert len(tokens) > 2
    ids, fields = canvas.token_ids.clone(), torch.full_like(canvas.token_ids, -1)
    for index, (slot, text) in enumerate(zip(canvas.slots, layout.texts({"zone": "one two three"}), strict=True)):
        ids[slot.positions], fields[slot.positions] = canvas.tokens_of(slot, text), index
    soft = {"/zone": [[[token], [10_000]] for token in [*tokens, distillation.ENDS]]}
    soft_ids, probs = soft_targets(ids, fields, layout, soft, null_id)
    zone = next(slot for slot in canvas.slots if slot.slot.role == "value")
    assert soft_ids[zone.positions, 0].tolist() == list(tokens[:2])
    assert probs[zone.positions, 0].tolist() == [1.0, 1.0]


# ---------------------------------------------------------------------------------------------------------------------
# A folder of targets
# ---------------------------------------------------------------------------------------------------------------------


class Parrot:
    """A teacher that repeats the gold call, and has no target for every fourth row.

    Args:
        breaks_at: batch at which it is interrupted.
    """

    def __init__(self, breaks_at: int = 1_000, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = type("Model", (), {"base": torch.nn.Linear(2, 2)})()
        self.breaks_at, self.batches = breaks_at, 0

    def targets(self, rows: Sequence[Row]) -> list[Record | str]:
        self.batches += 1
        if self.batches > self.breaks_at:
            raise KeyboardInterrupt
        return [
            "cut at a limit"
            if row.id.endswith("3")
            else {"id": row.id, "calls": row.calls, "gold": row.calls, "messages": row.messages, "tools": row.tools}
            for row in rows
        ]


def draw(rng: random.Random) -> Row:
    number = rng.randrange(10)
    call = {"name": "get_weather", "arguments": {**GOLD, "days": number}}
    return Row(str(number), "tiny", [1] * (number + 1), [], [WEATHER], [call], [{"role": "user", "content": "hi"}])


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "PART_ROWS", 8)


@pytest.mark.usefixtures("small_parts")
def test_an_interrupted_run_goes_on_and_gives_the_same_file(tmp_path: Path) -> None:
    whole = write_targets(Parrot(), draw, tmp_path / "whole", count=30, rows_per_batch=4)  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        write_targets(Parrot(breaks_at=5), draw, tmp_path / "torn", count=30, rows_per_batch=4)  # type: ignore[arg-type]
    assert not (tmp_path / "torn" / distillation.TARGETS_FILE).exists()
    later = Parrot()
    torn = write_targets(later, draw, tmp_path / "torn", count=30, rows_per_batch=4)  # type: ignore[arg-type]
    assert later.batches == 4  # two parts of 8 rows were there; 8 and 6 rows were left
    assert torn == whole
    files = [(tmp_path / name / distillation.TARGETS_FILE).read_bytes() for name in ("whole", "torn")]
    assert files[0] == files[1]
    assert whole["kept"] + whole["cut at a limit"] == 30
    assert whole["as gold"] == whole["kept"]


@pytest.mark.usefixtures("small_parts")
def test_a_full_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    first = write_targets(Parrot(), draw, tmp_path, count=10, rows_per_batch=4)  # type: ignore[arg-type]
    idle = Parrot(breaks_at=0)
    assert write_targets(idle, draw, tmp_path, count=10, rows_per_batch=4) == first  # type: ignore[arg-type]


@pytest.mark.parametrize(("count", "seed"), [(11, 0), (10, 1)])
def test_calls_of_another_run_are_not_mixed_in(tmp_path: Path, count: int, seed: int) -> None:
    write_targets(Parrot(), draw, tmp_path, count=10, rows_per_batch=4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="use another folder"):
        write_targets(Parrot(seed=seed), draw, tmp_path, count=count, rows_per_batch=4)  # type: ignore[arg-type]


def test_calls_for_rows_of_another_origin_are_not_taken(tmp_path: Path) -> None:
    write_targets(Parrot(), draw, tmp_path, 10, 4, {"data": "one"})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="data 'one', not 'other'"):
        write_targets(Parrot(), draw, tmp_path, 10, 4, {"data": "other"})  # type: ignore[arg-type]


def test_calls_that_do_not_say_whose_they_are_are_not_taken(tmp_path: Path) -> None:
    write_targets(Parrot(), draw, tmp_path, count=10, rows_per_batch=4)  # type: ignore[arg-type]
    shutil.rmtree(tmp_path / distillation.PARTS)
    with pytest.raises(ValueError, match="nothing says which base"):
        write_targets(Parrot(), draw, tmp_path, count=10, rows_per_batch=4)  # type: ignore[arg-type]


def test_the_origin_of_rows_names_the_data_and_what_is_left_out(options: dict[str, Any], tmp_path: Path) -> None:
    for name, text in (("a", "one"), ("b", "one"), ("c", "three")):
        (tmp_path / name / "train").mkdir(parents=True)
        (tmp_path / name / "train" / "calls.jsonl").write_text(text)
    (tmp_path / "out.txt").write_text("r1")

    def origin(**change: Any) -> dict[str, Any]:
        return distillation._Rows(DistillRun(**{**options, **change}), tiny_tokenizer()).origin()

    first = origin(data=[tmp_path / "a"])
    assert origin(data=[tmp_path / "b"]) == first  # the same data elsewhere
    for change in ({"data": [tmp_path / "c"]}, {"leave_out": tmp_path / "out.txt"}, {"on_error": "skip"}):
        assert origin(**{"data": [tmp_path / "a"], **change}) != first


def test_writing_calls_says_how_fast_it_was(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "training.distill")
    write_targets(Parrot(), draw, tmp_path, count=10, rows_per_batch=4)  # type: ignore[arg-type]
    assert "rows_per_second" in caplog.text
    assert "peak_mib" in caplog.text


def test_a_run_without_any_target_says_so(tmp_path: Path) -> None:
    def only_threes(rng: random.Random) -> Row:
        return Row("3", "tiny", [1], [], [WEATHER], [], [])

    with pytest.raises(ValueError, match="None of 4 rows"):
        write_targets(Parrot(), only_threes, tmp_path, count=4, rows_per_batch=4)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------------------
# Training on them
# ---------------------------------------------------------------------------------------------------------------------


def run_on(targets: Path) -> DistillRun:
    return DistillRun(targets / "unused", targets=targets)


@pytest.fixture(scope="module")
def filled(teacher: BaseTeacher, rows: list[Row], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the base's calls for a few drawn rows."""
    folder = tmp_path_factory.mktemp("targets")
    write_targets(teacher, lambda rng: rng.choice(rows), folder, count=3, rows_per_batch=3)
    return folder


def test_an_example_is_the_bases_call_behind_the_prompt_that_it_saw(
    teacher: BaseTeacher, tokenizer: Any, rows: list[Row], filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher.model.config, "distill_weight", 0.5)
    examples = TargetExamples(run_on(filled), teacher.vocabulary, teacher.model.config, tokenizer)
    records = list(read_records(filled / distillation.TARGETS_FILE))
    prompts = {tuple(row.prompt_ids) for row in rows}
    for seed in range(8):
        example = examples(random.Random(seed), 0.0)
        assert example.soft_probs is not None
        assert tuple(example.prompt_ids.tolist()) in prompts
        shown = teacher.vocabulary.spell(example.scaffold_ids[example.slot_mask].tolist()).decode()
        assert any(record["calls"][0]["arguments"]["unit"] in shown for record in records)
        assert example.soft_probs.shape == (len(example.scaffold_ids), distillation.SOFT_TOKENS)
        assert (example.soft_probs.sum(-1) > 0).any()
        again = examples(random.Random(seed), 0.9)
        assert torch.equal(again.scaffold_ids, example.scaffold_ids)


def test_without_weight_the_distributions_are_left_out(
    teacher: BaseTeacher, tokenizer: Any, rows: list[Row], filled: Path
) -> None:
    assert teacher.model.config.distill_weight == 0
    examples = TargetExamples(run_on(filled), teacher.vocabulary, teacher.model.config, tokenizer)
    assert examples(random.Random(0), 0.0).soft_ids is None


def test_calls_of_which_none_fits_a_canvas_end_the_run_instead_of_halting_it(
    teacher: BaseTeacher, tokenizer: Any, filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation, "MAX_SCAFFOLD", 10)
    monkeypatch.setattr(head_training, "MAX_MISSES", 3)
    with pytest.raises(RecordError, match="of 3 drawn calls"):
        TargetExamples(run_on(filled), teacher.vocabulary, teacher.model.config, tokenizer)(random.Random(0), 0.0)


class OneRow:
    """Stands in for the stream of rows: the same request every time, with a gold call that the base does not write."""

    row: Row
    skipped: dict[str, int] = {}

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def draw(self, style: Any, rng: random.Random) -> Row:
        return self.row


def told(self: BaseTeacher, rows: Sequence[Row]) -> list[Record | str]:
    """What a base writes that always asks for Rome and is not quite sure of it."""
    letters = self.vocabulary.encode("Rome")
    soft = {"/zone": [[[token, letters[0]], [9_000, 1_000]] for token in [*letters, distillation.ENDS]]}
    call = {"name": "get_time", "arguments": {"zone": "Rome"}}
    shown = {"messages": rows[0].messages, "tools": rows[0].tools, "gold": rows[0].calls}
    return [{"id": row.id, "calls": [call], "soft": soft, **shown} for row in rows]


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Options of a short run on a tiny model with an untrained head."""
    tokenizer = tiny_tokenizer()
    text_config = tiny_text_config()
    text_config.vocab_size, text_config.max_position_embeddings = len(tokenizer) + 3, 1024
    config = modeling.SmolLMDiffusionConfig(
        text_config=text_config, head_hidden_size=32, head_num_layers=1, head_num_heads=2, loss_weighting="count"
    )
    modeling.SmolLMDiffusionForCausalLM(config).save_pretrained(tmp_path / "model")
    messages = [{"role": "user", "content": "time in Oslo"}]
    prompt = distillation.shown_prompt(tokenizer, messages, [TIME])
    call = {"name": "get_time", "arguments": {"zone": "Oslo"}}
    monkeypatch.setattr(OneRow, "row", Row("r", "tiny", prompt, [], [TIME], [call], messages), raising=False)
    monkeypatch.setattr(head_training, "RowStream", OneRow)
    monkeypatch.setattr(head_training, "evaluation_sets", lambda *_: {})
    monkeypatch.setattr(BaseTeacher, "targets", told)
    return {
        "output": tmp_path / "out",
        "model": str(tmp_path / "model"),
        "target_rows": 2,
        "rows_per_batch": 2,
        "max_steps": 40,
        "logging_steps": 10,
        "eval_steps": 100,
        "threads": 1,
    }


def test_a_run_teaches_the_head_what_the_base_writes_and_leaves_the_base(options: dict[str, Any]) -> None:
    run = DistillRun(**options)
    before = modeling.SmolLMDiffusionForCausalLM.from_pretrained(run.model)
    model = distill(run, tiny_tokenizer())
    after = {name: weight.float() for name, weight in model.base.state_dict().items()}
    assert all(torch.equal(weight.bfloat16().float(), after[name]) for name, weight in before.base.state_dict().items())
    history = json.loads((run.output / "trainer_state.json").read_text())["log_history"]
    logged = [entry for entry in history if "diffusion_loss" in entry]
    assert logged[-1]["diffusion_loss"] < logged[0]["diffusion_loss"] * 0.7
    assert logged[-1]["real_token_accuracy"] > logged[0]["real_token_accuracy"] + 0.3
    loaded = modeling.SmolLMDiffusionForCausalLM.from_pretrained(run.output / "final")
    assert loaded.config.distill_weight == run.distill_weight
    vocabulary = slot_grammar.Vocabulary(tiny_tokenizer(), loaded.config.text_config.vocab_size)
    example = TargetExamples(run, vocabulary, loaded.config, tiny_tokenizer())(random.Random(0), 0.0)
    assert vocabulary.spell(example.scaffold_ids[example.slot_mask].tolist()) == b"trueRome"  # and not Oslo


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_rows": 0}, "target_rows"),
        ({"target_batch": 0}, "target_batch"),
        ({"distill_weight": 1.5}, "distill_weight"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distill(DistillRun(**{**options, **change}), tiny_tokenizer())


def test_a_run_without_a_model_says_what_is_missing(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="--model"):
        distill(DistillRun(**{**options, "model": ""}), tiny_tokenizer())


def test_several_processes_need_the_calls_to_be_there(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="without torchrun"):
        DistillRun(**options)
