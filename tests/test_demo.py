"""The terminal demo: what it prints of a call, a chat turn and the user's own tools, and what it says of bad input."""

import json
import sys
from pathlib import Path

import pytest

import demo

TOOL = {
    "name": "set_alarm",
    "parameters": {"type": "object", "properties": {"time": {"type": "string"}}, "required": ["time"]},
}


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["demo.py", *arguments])
    demo.main()
    return capsys.readouterr().out


def test_the_demo_shows_every_stage(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    printed = run(monkeypatch, capsys)
    assert [title in printed for title, _, _ in demo.REQUESTS] == [True] * 3
    call, _, chat = printed.split("\n\n")[1:]
    for stage in ("route     tool", "scaffold", "step 1", "check     accepted", "base forwards", "(same tokens)"):
        assert stage in call
    line = next(line for line in call.splitlines() if line.startswith("  call"))
    assert json.loads(line.removeprefix("  call"))[0]["name"] == "get_weather"
    assert "route     chat" in chat
    assert "answer" in chat


def test_the_demo_takes_the_users_own_tools(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps(TOOL))
    printed = run(monkeypatch, capsys, "wake me at seven", "--tools", str(tools))
    assert "your request: wake me at seven" in printed


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is not JSON"),
        ('[{"name": ""}]', "has no name"),
        ('[{"name": "f", "parameters": {"type": "object", "properties": {"a": {"anyOf": []}}}}]', "anyOf"),
    ],
)
def test_faulty_tools_end_in_one_readable_line(
    content: str, says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tools = tmp_path / "tools.json"
    tools.write_text(content)
    monkeypatch.setattr(sys, "argv", ["demo.py", "hello", "--tools", str(tools)])
    with pytest.raises(SystemExit, match=says):
        demo.main()
