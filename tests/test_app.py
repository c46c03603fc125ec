"""The Space without a browser: reading tools, asking, drawing, and what visitors are told when something is wrong."""

import inspect
import json
import logging
import re
import time
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Literal, Optional, Union

import pytest
import torch
from huggingface_hub import metadata_load
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import get_json_schema

from demo import ALARM, WEATHER
from repo_package import ROOT, load_repo_module
from space import rendering
from space.asking import Answer, Options, Run, ask
from space.rendering import frames
from space.tools import MAX_TEXT, MAX_TOOLS, read_tools, signature

TraceEvent = load_repo_module("call_decoding").TraceEvent
SlotView = load_repo_module("slot_grammar").SlotView

HOSTILE = "</span><script>alert('x')</script>\"'&<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any]:
    """The model in this repository and its tokenizer."""
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(ROOT, trust_remote_code=False)
    return AutoModelForCausalLM.from_pretrained(ROOT, trust_remote_code=True, dtype=torch.float32).eval(), tokenizer


# ---------------------------------------------------------------- tools


def play(
    artist: str,
    songs: list[str],
    room: Literal["kitchen", "bedroom"] = "kitchen",
    volume: int | None = None,
    mood: Optional[str] = None,  # noqa: UP045
    length: Union[int, float] = 3,  # noqa: UP007
    labels: dict[str, int] | None = None,
    *,
    shuffle: "bool" = False,
    anything: Any = None,
):
    """
    Play music.

    Args:
        artist: Who plays
        songs: Which songs
        room: Where to play
        volume: How loud,
            from 0 to 10
        mood: The mood (choices: ["calm", "wild"])
        length: Minutes
        labels: Numbers by label
        shuffle: Whether to shuffle
        anything: Whatever
    """


def test_a_function_read_gives_the_schema_of_the_function_run() -> None:
    assert read_tools(inspect.getsource(play)) == [get_json_schema(play)]


def test_all_functions_of_a_source_are_tools_and_whatever_else_is_in_it_is_not() -> None:
    source = '"""Notes."""\nimport os\n\nasync def a(x: int):\n    """A.\n\n    Args:\n        x: X\n    """\n\n'
    source += "LIMIT = 3\n\nclass B:\n    def c(self): ...\n\n@cache\ndef d():\n    '''D.'''\n    return os.getcwd()\n"
    assert [signature(tool) for tool in read_tools(source)] == ["a(x)", "d()"]


@pytest.mark.parametrize(
    "source",
    [
        "open({path!r}, 'w')\ndef f():\n    '''F.'''\n",
        "@open({path!r}, 'w').close\ndef f():\n    '''F.'''\n",
        "def f(x: str = open({path!r}, 'w')):\n    '''F.\n\n    Args:\n        x: X\n    '''\n",
        "def f(x: open({path!r}, 'w')):\n    '''F.\n\n    Args:\n        x: X\n    '''\n",
        "def f(x: 'open({path!r})'):\n    '''F.\n\n    Args:\n        x: X\n    '''\n",
        "def f(x: Literal[open({path!r}, 'w')]):\n    '''F.\n\n    Args:\n        x: X\n    '''\n",
        "def f():\n    '''F.'''\n    open({path!r}, 'w')\n",
    ],
)
def test_nothing_of_a_source_is_run(source: str, tmp_path: Path) -> None:
    path = tmp_path / "made"
    with suppress(ValueError):
        read_tools(source.format(path=str(path)))
    assert not path.exists()


def test_json_may_be_a_list_or_one_tool_and_empty_text_is_no_tools() -> None:
    assert read_tools(json.dumps([WEATHER, ALARM])) == [WEATHER, ALARM]
    assert read_tools("\n " + json.dumps(WEATHER["function"])) == [WEATHER["function"]]
    assert read_tools(" \n") == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[{"name": "f",]', r"not valid JSON: line 1, column 15"),
        ('[\n  {"name": }\n]', r"not valid JSON: line 2, column 12"),
        ("[3]", r"Tool 1 is 3, not an object"),
        ("def f(:\n", r"neither a JSON list nor Python functions: line 1, column 7"),
        ("get_weather", "hold no function"),
        ("hello there, friend", "line 1, column"),
        ("def f(x: int):\n    pass", r"Line 1, function 'f': .*no docstring"),
        (
            "\n\ndef f(x):\n    '''F.\n\n    Args:\n        x: X\n    '''",
            r"Line 3, function 'f': .*x is missing a type",
        ),
        ("def f(x: int):\n    '''F.'''", "no description for the argument 'x'"),
        ("def f(x: datetime):\n    '''F.'''", r"type `datetime` has no schema here: use str, int"),
        ("def f(x: list[Path]):\n    '''F.'''", r"type `Path` has no schema"),
        ("def f(x: Literal[open]):\n    '''F.'''", r"`Literal\[open\]` may list texts, numbers"),
        ("def f(*names: str):\n    '''F.'''", "name every argument"),
        ("def f():\n    '''F.\x00'''", "null byte"),
        ("[" * 5000, "nested too deeply"),
        ("def f(x: " + "list[" * 1000 + "]" * 1000 + "): ...", "nest|parenthes"),
        ("def f(x: int" + " | int" * 2000 + "): ...", "nested too deeply|docstring"),
        ("x = " + "-" * 15_000 + "1", "nested too deeply|hold no function|neither"),
        ("[" + "1" * 5000 + "]", "5000|digits|Tool 1 is"),
        (" " * (MAX_TEXT + 1), "at most 16,000"),
        (json.dumps([{"name": f"f{i}"} for i in range(MAX_TOOLS + 1)]), "There are 17 tools"),
    ],
)
def test_tools_that_cannot_be_read_say_why(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as raised:
        read_tools(text)
    assert len(str(raised.value)) < 700


@pytest.mark.parametrize(
    "inner", ["\\n" * 8000, "\n" * 15_000, "\nArgs:\n" + " a" * 7000, "Args:\n\n" * 2000, " \n" * 7000]
)
def test_a_docstring_made_to_be_slow_is_read_soon(inner: str) -> None:
    text = f"def f(x: int):\n    '''{inner}'''\n"[:MAX_TEXT]
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"line|Line"):
        read_tools(text)
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize(
    ("tool", "shown"),
    [
        (WEATHER, "get_weather(city, date?)"),
        ({"name": "f", "input_schema": {"properties": {"a": {}}, "required": ["a"]}}, "f(a)"),
        ({"name": "f", "parameters": {"properties": [], "required": 3}}, "f()"),
        ({"function": 3}, "unnamed()"),
        ({}, "unnamed()"),
    ],
)
def test_a_tool_of_any_shape_has_a_signature(tool: dict[str, Any], shown: str) -> None:
    assert signature(tool) == shown


# ---------------------------------------------------------------- pictures


def canvas(city: tuple[str | None, ...], present: str | None, date: tuple[str | None, ...]) -> list[Any]:
    return [
        '\n{"name": "get_weather", "arguments": {"city": "',
        SlotView("/city", "value", city),
        '", ',
        SlotView("/date", "presence", (present,)),
        '"date": "',
        SlotView("/date", "value", date),
        '"}}\n',
    ]


def draft(*values: Any, call: int = 0) -> Any:
    return TraceEvent("draft", {"call": call, "canvas": canvas(*values)})


def check(accepted: str, drafted: str = "", chosen: str = "") -> Any:
    return TraceEvent("verify", {"accepted": accepted, "drafted": drafted, "chosen": chosen})


CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Berlin", "date": "tomorrow"}}\n</tool_call>'
TRACE = [
    draft(("Berlin", None, None), "false", ("", "")),
    draft(("Berlin", " ", "tomorrow"), "false", ("", "")),
    check("Berlin", " ", '", "'),
    draft(("Berlin", "", ""), "true", ("tomorrow", "")),
    check('tomorrow"}}\n</tool_call>'),
]


def looks(frame: Any, look: str) -> list[str]:
    return [span.text.strip() for span in frame.spans if span.look == look]


def test_the_frames_show_what_happened_in_order() -> None:
    shown = frames(TRACE, (CALL,))
    assert [frame.title for frame in shown] == ["Scaffold", "Step 1", "Step 2", "Check 1", "Step 3", "Check 2", "Done"]
    scaffold, first, second, corrected, redraft, kept, done = shown
    assert len(looks(scaffold, "mask")) == 5
    assert looks(scaffold, "chip") == ["in or out?"]
    assert looks(first, "new") == ["Berlin"]
    assert len(looks(first, "mask")) == 2
    assert looks(first, "chip") == ["left out"]
    assert looks(second, "kept") == ["Berlin"]
    assert looks(second, "new") == ["", "tomorrow"]
    assert (looks(corrected, "accepted"), looks(corrected, "drafted")) == (["Berlin"], ["␣"])
    assert [text.split() for text in looks(corrected, "chosen")] == [['",', '"']]
    assert "Berlin" in looks(redraft, "sure"), "what the base has settled is no draft any more"
    assert looks(redraft, "new") == ["tomorrow"]
    assert looks(kept, "accepted") == ['tomorrow"}}']
    assert json.loads("".join(span.text for span in done.spans))["arguments"] == {"city": "Berlin", "date": "tomorrow"}


def test_the_text_of_a_check_is_what_stood_before_it_and_what_was_kept() -> None:
    kept = frames(TRACE, (CALL,))[-2]
    written = "".join(span.text for span in kept.spans)
    assert re.sub(r"\s", "", written) == re.sub(r"\s|</?tool_call>", "", CALL)


def test_each_call_of_a_reply_has_its_own_scaffold() -> None:
    trace = [
        draft(("Berlin",), "false", ("",)),
        check('Berlin"}}\n</tool_call>\n<tool_call>\n{"name": "'),
        draft(("Oslo",), "false", ("",), call=1),
        check('Oslo"}}\n</tool_call>'),
    ]
    one, two = (CALL.replace("Berlin", city).replace(', "date": "tomorrow"', "") for city in ("Berlin", "Oslo"))
    shown = frames(trace, (one + "\n", two))
    assert [frame.title for frame in shown if "Scaffold" in frame.title] == ["Scaffold", "Scaffold of call 2"]
    last = "".join(span.text for span in shown[-2].spans)
    assert "Oslo" in last
    assert "Berlin" not in last


def test_a_check_whose_text_is_half_a_character_is_shown_all_the_same() -> None:
    shown = frames([*TRACE[:2], check("\ufffd", "x", "y"), *TRACE[3:]], (CALL,))
    assert [frame.title for frame in shown][-3:] == ["Step 3", "Check 2", "Done"]


def test_where_nothing_is_drafted_there_is_no_picture() -> None:
    assert (
        frames([TraceEvent("route", {"mode": "tool", "probability": 0.5, "forced": False}), check("")], (CALL,)) == []
    )


def test_length_and_branch_decisions_are_shown_as_words() -> None:
    pieces = [
        '{"days": [',
        SlotView("/days", "length", ("2",)),
        SlotView("/days/0", "value", ("", "")),
        SlotView("/x", "branch", (None,)),
        "]}",
    ]
    [_, step, _] = frames([TraceEvent("draft", {"call": 0, "canvas": pieces})], (CALL,))
    assert looks(step, "chip") == ["2 ×", "empty", "which?"]


class Tags(HTMLParser):
    """Every tag and attribute of a text, and the text itself."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


def hostile_answer() -> Answer:
    message = {"content": HOSTILE, "tool_calls": [{"function": {"name": HOSTILE, "arguments": {HOSTILE: HOSTILE}}}]}
    pieces = [HOSTILE, SlotView("/a", "presence", ("false",)), HOSTILE, SlotView("/a", "value", (HOSTILE,))]
    pieces += [SlotView("/b", "branch", (HOSTILE,)), SlotView("/c", "value", (HOSTILE, None)), HOSTILE]
    trace = [
        TraceEvent("route", {"mode": "tool", "probability": 0.5, "forced": False}),
        TraceEvent("draft", {"call": 0, "canvas": pieces}),
        check(HOSTILE, HOSTILE, HOSTILE),
    ]
    runs = (Run("verified", 2, 1, 0.1), Run("ar", 4, 0, 0.2))
    return Answer(HOSTILE, message, trace, ("<tool_call>\n" + HOSTILE,), (HOSTILE,), runs, True)


def test_texts_of_model_and_visitor_are_escaped() -> None:
    shown = Tags(rendering.answer_html(hostile_answer()))
    known = "div section h2 p code span i b ol ul li pre meter table thead tbody tr th td button input output"
    assert shown.tags <= set(known.split())
    assert not {name for name in shown.attributes if name.startswith("on") or name in ("src", "href")}
    assert "alert('x')" in shown.text
    assert Tags(rendering.alert(HOSTILE)).tags <= {"div", "p"}


def test_a_text_answer_is_shown_as_text() -> None:
    answer = Answer("hi", {"content": "<b>Hello</b>"}, [], ("Hello",), (), (Run("verified", 3, 0, 0.1),), None)
    shown = Tags(rendering.answer_html(answer))
    assert "The base talks" in shown.text
    assert "<b>Hello</b>" in shown.text
    assert rendering.summary(answer) == "The model answers in text: <b>Hello</b>"


# ---------------------------------------------------------------- asking


def test_a_call_is_traced_and_timed_beside_the_reference(shipped: tuple[Any, Any]) -> None:
    answer = ask(*shipped, "Will it rain in Berlin tomorrow?", [WEATHER], Options())
    assert [run.decoding for run in answer.runs] == ["verified", "ar"]
    assert answer.same_tokens
    assert answer.runs[0].base_forwards < answer.runs[1].base_forwards
    shown = Tags(rendering.answer_html(answer)).text
    for words in (
        "The base calls get_weather",
        "P(call) = 0.",
        "Scaffold",
        "Step 1",
        "Check 1",
        "Berlin",
        "The same tokens",
    ):
        assert words in shown


@pytest.mark.parametrize(
    ("options", "decodings"),
    [
        (Options(decoding="diffusion", steps=8, remasking="entropy_bounded"), ["diffusion", "ar"]),
        (Options(drafter="lookup"), ["verified", "ar"]),
        (Options(drafter="mixed", remasking="random"), ["verified", "ar"]),
        (Options(decoding="ar"), ["ar"]),
    ],
)
def test_every_option_gives_a_page(options: Options, decodings: list[str], shipped: tuple[Any, Any]) -> None:
    answer = ask(*shipped, "wake me up at 7 am on monday", [WEATHER, ALARM], options)
    assert [run.decoding for run in answer.runs] == decodings
    assert "set_alarm" in rendering.answer_html(answer)


def test_talking_is_not_compared_with_itself(shipped: tuple[Any, Any]) -> None:
    for tools in ([WEATHER, ALARM], []):
        answer = ask(*shipped, "what can you do", tools, Options())
        assert len(answer.runs) == 1
        assert "tool_calls" not in answer.message
        assert answer.same_tokens is None


def test_what_takes_too_long_is_stopped(shipped: tuple[Any, Any]) -> None:
    for decoding in ("verified", "ar"):
        with pytest.raises(TimeoutError, match="longer than 0 seconds"):
            ask(*shipped, "Will it rain?", [WEATHER], Options(decoding=decoding), max_seconds=0)
    with pytest.raises(TimeoutError):
        ask(*shipped, "what can you do", [], Options(), max_seconds=0)


# ---------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def app(shipped: tuple[Any, Any]) -> Any:
    pytest.importorskip("gradio")
    import app

    return app


@pytest.mark.parametrize(
    ("request_text", "tools", "steps", "says"),
    [
        ("  ", "[]", 4, "The request is empty"),
        ("word " * 500, "[]", 4, "2,499 characters; this page takes at most 2,000"),
        ("hello", '[{"name": ]', 4, "line 1, column 11"),
        ("hello", '[{"name": ""}]', 4, "has no name"),
        ("hello", '[{"name": "f"}, {"name": "f"}]', 4, "both named"),
        (
            "hello",
            '[{"name": "f", "parameters": {"type": "object", "properties": {"a": {"anyOf": []}}}}]',
            4,
            "/properties/a",
        ),
        ("hello", json.dumps([{"name": "f", "description": "x y " * 3900}]), 4, "context"),
        ("hello", "[]", 99, "1 to 8"),
    ],
)
def test_faults_are_readable_messages_in_the_page(
    request_text: str, tools: str, steps: float, says: str, app: Any
) -> None:
    shown, heard = app.answer(str(ROOT), request_text, tools, "verified", "head", steps, "confidence")
    assert says in Tags(shown).text
    assert says in Tags(heard).text
    assert "Traceback" not in shown


def test_an_unforeseen_fault_tells_visitor_and_log_nothing_of_the_request(
    app: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("at /secret/path")

    monkeypatch.setattr(app, "ask", fail)
    with caplog.at_level(logging.INFO):
        shown, _ = app.answer(str(ROOT), "my private words", "[]", "verified", "head", 4, "confidence")
    assert "Something went wrong on this side" in shown
    assert "secret" not in shown
    assert "RuntimeError" in caplog.text
    assert "my private words" not in caplog.text


def test_the_options_are_those_of_the_model(app: Any) -> None:
    assert tuple(rendering.DECODINGS) == load_repo_module("generation_smollm_diffusion").DECODINGS
    assert set(load_repo_module("mixed_drafter").DRAFTERS) == set(app.DRAFTERS)
    assert set(load_repo_module("draft_policies").REMASKING_POLICIES) == set(app.POLICIES)


def test_the_examples_can_be_read(app: Any) -> None:
    for _, request, tools in app.EXAMPLES:
        assert request
        assert read_tools(tools)
        assert 'class="sd-good"' in app.tools_status(tools)
    assert "No tools" in app.tools_status("")
    assert "sd-bad" in app.tools_status("[{]")


def test_the_page_asks_no_other_site_for_anything(app: Any) -> None:
    assert app.demo.analytics_enabled is False
    assert app.THEME._stylesheets == []
    files = [ROOT / "space" / name for name in ("page.css", "page.js")]
    assert not [path for path in files if re.search(r"https?://|@import", path.read_text(encoding="utf-8"))]


def test_requests_to_the_model_wait_in_one_short_queue(app: Any) -> None:
    assert app.demo._queue.max_size == app.MAX_WAITING
    asking_model = [fn for fn in app.demo.fns.values() if fn.concurrency_id == "model"]
    assert len(asking_model) == 1 + len(app.EXAMPLES)
    assert {fn.concurrency_limit for fn in asking_model} == {1}
    assert {fn.api_visibility for fn in app.demo.fns.values()} == {"private"}


@pytest.mark.parametrize(
    ("arguments", "says"), [(["--model", "/no/such/folder"], "no model at"), (["--port", "x"], "2")]
)
def test_a_faulty_command_line_ends_in_one_line(
    arguments: list[str], says: str, app: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["app.py", *arguments])
    with pytest.raises(SystemExit, match=says):
        app.main()


@pytest.mark.parametrize("in_space", [False, True])
def test_it_listens_to_this_machine_only_unless_it_is_a_space(
    in_space: bool, app: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if in_space:
        monkeypatch.setenv("GRADIO_SERVER_NAME", "0.0.0.0")
    else:
        monkeypatch.delenv("GRADIO_SERVER_NAME", raising=False)
    launched: dict[str, Any] = {}
    monkeypatch.setattr("sys.argv", ["app.py"])
    monkeypatch.setattr(app.demo, "launch", lambda **options: launched.update(options))
    app.main()
    assert launched["server_name"] == ("0.0.0.0" if in_space else "127.0.0.1")
    assert launched["share"] is False


def test_the_card_of_the_space_names_what_is_there() -> None:
    card = metadata_load(ROOT / "space" / "README.md")
    assert card is not None
    assert (card["sdk"], card["license"]) == ("gradio", "apache-2.0")
    assert (ROOT / card["app_file"]).is_file()
    assert int(card["sdk_version"].split(".")[0]) >= 6
