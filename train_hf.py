"""The training command: `python train_hf.py --stage base|head|decision|adapter|distill --config FILE ...`.

The work is in `training/`. Options of a stage are the fields of its dataclass: `--stage head --help` lists them. A
YAML file holds one mapping of options per stage; what stands on the command line wins. The same command again goes on
from the newest whole checkpoint.
"""

import argparse
import difflib
import inspect
import logging
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml  # type: ignore[import-untyped]
from safetensors import SafetensorError
from transformers import AutoTokenizer, HfArgumentParser

from repo_package import ROOT, load_repo_module
from training.adapter import AdapterRun, train_adapter
from training.base import BaseRun, train_base
from training.data import DEFAULT_DATA, tokenizer_texts
from training.decision import DecisionRun, train_decision
from training.distill import DistillRun, distill
from training.head import HeadRun, train_head
from training.release import check_complete, release
from training.trainer import TrainingError, is_disk_full, is_out_of_memory

logger = logging.getLogger("train_hf")

MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja")
"""What `--install` copies. Not `tokenizer_config.json`: it differs only in where the tokenizer was loaded from."""
WITHOUT_HEAD = ("tokenizer", "base")
"""Stages whose result is no model of the repository's kind."""


@dataclass(frozen=True)
class TokenizerRun:
    """Options of the tokenizer stage.

    Args:
        output: folder of the result.
        data: folder with `train/` and `text/`.
        vocab_size: number of tokens.
        seed: of the sample of texts.
    """

    output: Path
    data: Path = DEFAULT_DATA
    vocab_size: int = 8192
    seed: int = 0


def train_tokenizer(run: TokenizerRun) -> None:
    """Train the default tokenizer and save it in `output/final`."""
    tokenization = load_repo_module("tokenization_utils")
    tokenizer = tokenization.train_tokenizer(tokenizer_texts(run.data, seed=run.seed), run.vocab_size)
    tokenizer.save_pretrained(run.output / "final")
    logger.info("tokenizer of %d tokens saved to %s", len(tokenizer), run.output / "final")


def with_tokenizer(train: Callable[[Any, Any], Any], *sources: str) -> Callable[[Any], None]:
    """A stage that also needs the tokenizer of the model that one of its options names."""

    def start(run: Any) -> None:
        source = next((getattr(run, name) for name in sources if getattr(run, name)), None)
        if source is None:
            names = " or ".join(f"--{name}" for name in sources)
            raise ValueError(f"{names} is missing: the folder or repo to start from, whose tokenizer is used.")
        train(run, AutoTokenizer.from_pretrained(source, trust_remote_code=False))

    return start


STAGES: dict[str, tuple[Any, Callable[[Any], None]]] = {
    "tokenizer": (TokenizerRun, train_tokenizer),
    "base": (BaseRun, with_tokenizer(train_base, "tokenizer")),
    "head": (HeadRun, with_tokenizer(train_head, "base", "head_from")),
    "decision": (DecisionRun, with_tokenizer(train_decision, "model")),
    "adapter": (AdapterRun, with_tokenizer(train_adapter, "model")),
    "distill": (DistillRun, with_tokenizer(distill, "model")),
}


# ---------------------------------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------------------------------


def explanations(options: type) -> dict[str, str]:
    """What the docstrings of a dataclass and its parents say about its fields, the nearest class first.

    Args:
        options: a class whose `Args:` hold lines `name, other: text`, in the order of its fields or not.

    Returns:
        One line of text for each name.
    """
    found: dict[str, str] = {}
    for kind in reversed(options.__mro__):
        section = inspect.cleandoc(kind.__doc__ or "").partition("\nArgs:\n")[2]
        for names, text in re.findall(r"^((?:\w+,\s+)*\w+): (.*(?:\n +.*)*)", inspect.cleandoc(section), re.MULTILINE):
            found |= dict.fromkeys(re.split(r",\s+", names), " ".join(text.split()))
    return found


def command_line() -> argparse.ArgumentParser:
    """The options that every stage has beside its own."""
    parser = argparse.ArgumentParser(
        prog="train_hf.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("--stage", choices=list(STAGES), required=True, help="what is trained")
    parser.add_argument("--config", type=Path, help="YAML file with options per stage")
    parser.add_argument("--install", action="store_true", help="copy the result into the repository root")
    return parser


class StageParser(HfArgumentParser):
    """The options of one stage, explained by the docstring of its dataclass.

    Args:
        stage: the stage.
    """

    def __init__(self, stage: str) -> None:
        self.stage, self.options = stage, STAGES[stage][0]
        super().__init__(
            self.options,
            prog=f"train_hf.py --stage {stage}",
            usage="%(prog)s --output OUTPUT [--config FILE] [--install] [--option VALUE ...]",
            description=inspect.cleandoc(self.options.__doc__).partition("\nArgs:\n")[0],
            parents=[command_line()],
            allow_abbrev=False,
        )
        self.named = {option.removeprefix("--"): action for action in self._actions for option in action.option_strings}
        for name, text in explanations(self.options).items():
            if name in self.named:
                self.named[name].help = text.replace("%", "%%")

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print below the usage of every option."""
        raise ValueError(f"{message}. `{self.prog} --help` explains the options.")

    def take_file(self, path: Path) -> None:
        """Let a YAML file give the defaults: stage -> option -> value; null leaves an option as it is.

        Raises:
            ValueError: the file is no mapping of stages, lacks this one, names an option that the stage does not
                have, or has a value of another type.
        """
        try:
            stages = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is no YAML: {error}") from error
        if not isinstance(stages, dict) or not isinstance(stages.get(self.stage), dict):
            has = f"has {', '.join(map(str, stages))}" if isinstance(stages, dict) else "is no mapping"
            raise ValueError(
                f"{path} has no options for stage {self.stage!r}: it {has}, and needs `{self.stage}:` with one option "
                "a line below."
            )
        for name, value in stages[self.stage].items():
            if name not in self.options.__dataclass_fields__:
                raise ValueError(f"{path}: stage {self.stage!r} has no option {name!r}. {self._known(str(name))}")
            if value is not None:
                self.named[name].required = False
                self.set_defaults(**{name: self._typed(name, value, path)})

    def _typed(self, name: str, value: Any, path: Path) -> Any:
        """A value of a file as what the option wants."""
        action = self.named[name]
        convert, many = action.type or str, action.nargs == "+"
        try:
            if isinstance(value, dict) or (isinstance(value, list) and not many):
                raise ValueError
            parts = [convert(str(part)) for part in (value if isinstance(value, list) else [value])]
        except (ValueError, TypeError, argparse.ArgumentTypeError):
            kind = self.options.__dataclass_fields__[name].type
            wanted = kind.__name__ if isinstance(kind, type) else str(kind)
            raise ValueError(
                f"{path}: option {name!r} of stage {self.stage!r} is {value!r}, but must be of type {wanted}."
            ) from None
        return parts if many else parts[0]

    def _known(self, name: str) -> str:
        """The options that a wrong name may have meant, or else all of them."""
        fields = list(self.options.__dataclass_fields__)
        near = difflib.get_close_matches(name.strip("-").partition("=")[0], fields, n=3)
        return f"Did you mean {' or '.join(near)}?" if near else f"It has: {', '.join(sorted(fields))}."

    def read(self, arguments: list[str], config: Path | None) -> tuple[Any, argparse.Namespace]:
        """The options of the run, and those that every stage has.

        Raises:
            ValueError: an option is unknown, missing or of the wrong type, on the command line or in the file.
        """
        if config is not None:
            self.take_file(config)
        run, chosen, unknown = self.parse_args_into_dataclasses(
            arguments, look_for_args_file=False, return_remaining_strings=True
        )
        if unknown:
            raise ValueError(f"stage {self.stage!r} has no option {unknown[0]!r}. {self._known(unknown[0])}")
        return run, chosen


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


def install(final: Path, root: Path = ROOT) -> None:
    """Make a trained model the repository's own.

    Args:
        final: folder of the trained model.
        root: the repository.

    Raises:
        FileNotFoundError: the folder does not hold one whole model.
        ValueError: it holds a head alone, on a base that is a folder of this machine.
    """
    missing = [name for name in MODEL_FILES if not (final / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{final} lacks {', '.join(missing)}, so nothing was installed.")
    check_complete(final)
    adapters = load_repo_module("draft_adapter")
    for name in MODEL_FILES:
        shutil.copyfile(final / name, root / name)
    adapters.remove_saved(root)
    if (final / adapters.ADAPTER_FOLDER).is_dir():
        shutil.copytree(final / adapters.ADAPTER_FOLDER, root / adapters.ADAPTER_FOLDER, dirs_exist_ok=True)
    logger.info("%s installed into %s", final, root)


def run_command(arguments: list[str]) -> None:
    """Read the options, run the stage, install and upload its result where that is wanted.

    Raises:
        TrainingError, ValueError, OSError, ImportError: options, data or machine do not allow the run.
    """
    common = command_line()
    if not any(argument.partition("=")[0] == "--stage" for argument in arguments):
        common.print_help()
        if {"-h", "--help"} & set(arguments):
            return
        raise ValueError(f"--stage is missing: one of {', '.join(STAGES)}.")
    first, _ = common.parse_known_args(arguments)
    run, chosen = StageParser(first.stage).read(arguments, first.config)
    if chosen.install and first.stage in WITHOUT_HEAD:
        raise ValueError(f"stage {first.stage!r} makes no model with a head, which is what --install is for.")
    STAGES[first.stage][1](run)
    if os.environ.get("RANK", "0") != "0":  # of several processes the first one saved the result
        return
    if chosen.install:
        install(run.output / "final")
    if getattr(run, "push_to_hub", None):
        release(run.output / "final", run.push_to_hub)


@contextmanager
def terminable() -> Iterator[None]:
    """Let a run that is told to terminate end as one that is interrupted: it says what is safe."""

    def interrupt(number: int, frame: Any) -> NoReturn:
        raise KeyboardInterrupt(number)

    usual = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, usual)


def explained(error: BaseException) -> str:
    """An error as one line."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if not isinstance(error, TrainingError) and is_disk_full(error):
        return f"No space left on the disk ({text}): free some, and the same command goes on from the last checkpoint."
    return text


def main(arguments: list[str]) -> None:
    """Run one stage.

    Raises:
        SystemExit: options, data or machine do not allow the run, and the message says why in one line; or the run
            was interrupted, and the code is that of the signal.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        with terminable():
            run_command(arguments)
    except KeyboardInterrupt as signalled:
        raise SystemExit(128 + (signalled.args or [signal.SIGINT])[0]) from signalled
    except (TrainingError, ValueError, OSError, ImportError, SafetensorError, MemoryError, RuntimeError) as error:
        named = isinstance(error, (TrainingError, ValueError, OSError, ImportError))
        if not named and not is_disk_full(error) and not is_out_of_memory(error):
            raise
        logger.debug("the run ended with an error", exc_info=True)
        raise SystemExit(explained(error)) from error


if __name__ == "__main__":
    main(sys.argv[1:])
