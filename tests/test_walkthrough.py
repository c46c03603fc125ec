"""docs/walkthrough.md, run as it stands in a copy of the repository: from nothing to a released model and back.

`PYTHONPATH=. python tests/test_walkthrough.py` runs it too, and writes the times into the page.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from loopback_hub import loopback_hub
from repo_package import ROOT

PAGE = ROOT / "docs" / "walkthrough.md"
PORT = "8000"
NOT_COPIED = shutil.ignore_patterns(".git", ".venv", ".*_cache", ".hypothesis", "runs", "__pycache__", "*.egg-info")
INSTALLED = {
    "make demo": "python demo.py",
    "source .venv/bin/activate": "true",
    'pip install -e ".[serving,agents]" -c constraints.txt': "true",
    'pip install -e ".[training]" -c constraints.txt': "true",
}
"""What only fills the environment, which the tests have already, and what to run in its place."""

# Runs Python blocks in one namespace: reads the paths of files, runs each, and prints a line behind what it prints.
PYTHON = """
import sys, traceback
names = {}
for path in sys.stdin:
    try:
        exec(compile(open(path.strip()).read(), "docs/walkthrough.md", "exec"), names)
    except BaseException:
        traceback.print_exc(file=sys.stdout)
        print("FAILED")
    print("DONE", flush=True)
"""


def sections(text: str) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Title and blocks (language, code) of each section that has blocks."""
    for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        yield part.partition("\n")[0], re.findall(r"^```(bash|python)\n(.*?)^```", part, re.MULTILINE | re.DOTALL)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


class Machine:
    """A copy of the repository with an environment, as a user has it.

    Args:
        folder: of the copy.
        endpoint: of the Hub.
    """

    def __init__(self, folder: Path, endpoint: str) -> None:
        self.folder, self.port = folder, free_port()
        shutil.copytree(ROOT, folder / "repository", ignore=NOT_COPIED)
        (folder / "repository" / ".venv").symlink_to(sys.prefix)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTEST"))}
        hub = {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "home"), "HF_TOKEN": "dummy"}
        path = f"{sys.prefix}/bin:{os.environ['PATH']}"
        self.environment = {**kept, **hub, "HF_HUB_DISABLE_XET": "1", "PATH": path}
        self.python = self.start([sys.executable, "-c", PYTHON], stdin=subprocess.PIPE)

    def start(self, command: list[str], stdin: int | None = None) -> "subprocess.Popen[str]":
        """A process in the copy."""
        return subprocess.Popen(
            command,
            cwd=self.folder / "repository",
            env=self.environment,
            text=True,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def run(self, language: str, code: str) -> str:
        """Run a block; what it printed."""
        return self.run_bash(code) if language == "bash" else self.run_python(code)

    def run_bash(self, code: str) -> str:
        for command, instead in INSTALLED.items():
            code = code.replace(f"{command}\n", f"{instead}\n")
        code = code.replace(f":{PORT}", f":{self.port}").replace(f"--port {PORT}", f"--port {self.port}")
        shell = self.start(["bash", "-e", "-c", code])
        printed, _ = shell.communicate(timeout=500)
        assert shell.returncode == 0, f"{code}\n{printed}"
        return printed

    def run_python(self, code: str) -> str:
        path = self.folder / "block.py"
        path.write_text(code, encoding="utf-8")
        assert self.python.stdin is not None
        assert self.python.stdout is not None
        self.python.stdin.write(f"{path}\n")
        self.python.stdin.flush()
        lines = list(iter(self.python.stdout.readline, "DONE\n"))
        assert "FAILED\n" not in lines, f"{code}\n{''.join(lines)}"
        return "".join(lines)


@contextmanager
def machine(folder: Path) -> Iterator[Machine]:
    with loopback_hub({}) as (endpoint, _):
        made = Machine(folder, endpoint)
        try:
            yield made
        finally:
            made.python.kill()


def walk(folder: Path) -> tuple[dict[str, str], dict[str, float]]:
    """Run the page; what each section printed, and how many seconds it took."""
    printed, seconds = {}, {}
    with machine(folder) as user:
        for title, blocks in sections(PAGE.read_text(encoding="utf-8")):
            start = time.perf_counter()
            printed[title] = "".join(user.run(language, code) for language, code in blocks)
            seconds[title] = time.perf_counter() - start
    return printed, seconds


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_new_user_gets_from_nothing_to_a_released_model_and_back(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the walk-through needs the server's packages")
    printed, _ = walk(tmp_path)
    terminal, client, trained, released = printed.values()
    assert '"name": "set_alarm"' in terminal
    assert "get_weather" in client
    before, after = re.findall(r"step 1 +(\{.*)", trained)
    assert '+"amount": 6' not in before
    assert '+"amount": 6' in after
    asked = "'arguments': {'item': 'eggs', 'amount': 6}"
    assert asked in trained
    assert "v1" in released
    assert asked in released


def main() -> None:
    """Write the times into the page."""
    with tempfile.TemporaryDirectory() as folder:
        printed, seconds = walk(Path(folder))
    print("\n".join(printed.values()))
    rows = "".join(f"| {title} | {taken:.0f} |\n" for title, taken in seconds.items())
    table = f"<!-- times -->\n| path | seconds |\n|---|---|\n{rows}<!-- end of times -->"
    text = re.sub(r"<!-- times -->.*<!-- end of times -->", table, PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
