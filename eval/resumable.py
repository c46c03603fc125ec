"""What the evaluation commands share: their options, and results that an interrupted run keeps.

Each request's result is appended to `NAME.partial.jsonl` beside the result file as soon as it is known. The same
command goes on from there, one with other options is refused, and the partial file is removed once the whole result is
written.
"""

import argparse
import json
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from repo_package import ROOT
from training.data import DEFAULT_DATA

RESULTS = ROOT / "eval" / "results"


def evaluation_parser(name: str, description: str | None, limit: int) -> argparse.ArgumentParser:
    """A command line with the options that all evaluation commands have.

    Args:
        name: of the command, which its result file has too.
        description: the help's first lines.
        limit: default of `--limit`.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m eval.{name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(ROOT), help="folder or repo of the model")
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder with dev/, text/ and bfcl_open/")
    parser.add_argument("--limit", type=int, default=limit, help="most requests of each set; 0 = all")
    parser.add_argument("--seed", type=int, default=0, help="of every order and draw")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 = torch's choice")
    parser.add_argument("--device", default="cpu", help="where the model runs")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}.json", help="the result file")
    return parser


def versions() -> dict[str, str]:
    """What a result was measured with."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


class PartialResults:
    """Results of a run's parts, on disk as soon as each is known.

    Args:
        out: the result file.
        options: what decides the results; a partial file of other options is refused.

    Raises:
        ValueError: the partial file belongs to other options, or a line before its last is broken.
    """

    def __init__(self, out: Path, options: Mapping[str, Any]) -> None:
        self.out = out
        self.path = out.with_suffix(".partial.jsonl")
        self._options = json.loads(json.dumps(options, default=str))
        self._found: dict[str, Any] = {}
        out.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self._read()
        if not self.path.exists():
            self._append({"options": self._options})

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, key: str) -> bool:
        return key in self._found

    def __getitem__(self, key: str) -> Any:
        return self._found[key]

    @contextmanager
    def kept_when_interrupted(self, what: str = "results") -> Iterator[None]:
        """End the command with one message where the block is interrupted.

        Args:
            what: is kept, in the plural.
        """
        try:
            yield
        except KeyboardInterrupt:
            raise SystemExit(
                f"\nInterrupted: {len(self)} {what} are kept in {self.path}; the same command goes on from there."
            ) from None

    def put(self, key: str, value: Any) -> None:
        """Keep the result of one part; `value` is JSON."""
        self._append({"key": key, "value": value})
        self._found[key] = value

    def finish(self, report: Mapping[str, Any]) -> None:
        """Write the whole result, at once or not at all, and remove the partial file."""
        whole = self.out.with_suffix(".writing.json")
        whole.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(whole, self.out)
        self.path.unlink()

    def _append(self, line: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _read(self) -> None:
        """Take what is there; a last line that was cut off by an interruption is dropped from the file."""
        lines = self.path.read_text(encoding="utf-8").split("\n")
        whole, rest = lines[:-1], lines[-1]
        if rest:
            self.path.write_text("".join(f"{line}\n" for line in whole), encoding="utf-8")
        if not whole:
            self.path.unlink()
            return
        try:
            first, *parts = map(json.loads, whole)
            options, found = first["options"], {part["key"]: part["value"] for part in parts}
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is broken ({error}); remove it to start afresh.") from error
        if options != self._options:
            names = options.keys() | self._options.keys()
            changed = sorted(name for name in names if options.get(name) != self._options.get(name))
            raise ValueError(
                f"{self.path} is of an unfinished run with another {', '.join(changed)}. Finish that run with its own "
                f"options, name another --out, or remove the file."
            )
        self._found = found
