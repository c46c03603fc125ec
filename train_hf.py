"""The training command: `python train_hf.py --stage tokenizer|base|head ...`; the work is in `training/`.

Options of a stage are the fields of its dataclass: `python train_hf.py --stage head --help` lists them.
"""

import argparse
import logging
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, HfArgumentParser

from repo_package import ROOT, load_repo_module
from training.base import BaseRun, BaseTrainer
from training.data import DEFAULT_DATA, tokenizer_texts
from training.head import HeadRun, train_head

logger = logging.getLogger("train_hf")

MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors")


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
    """Train the default tokenizer and save it."""
    tokenization = load_repo_module("tokenization_utils")
    tokenizer = tokenization.train_tokenizer(tokenizer_texts(run.data, seed=run.seed), run.vocab_size)
    tokenizer.save_pretrained(run.output)
    logger.info("tokenizer of %d tokens saved to %s", len(tokenizer), run.output)


def train_base(run: BaseRun) -> None:
    """Pre-train the default base; an interrupted run in the same output folder is resumed."""
    BaseTrainer(run, AutoTokenizer.from_pretrained(run.tokenizer, trust_remote_code=False)).run()


def train_default_head(run: HeadRun) -> None:
    """Train the head on a frozen base; with `--install` the result becomes the repository's own model."""
    train_head(run, AutoTokenizer.from_pretrained(run.base))
    if run.install:
        for name in MODEL_FILES:
            shutil.copyfile(run.output / "final" / name, ROOT / name)
        logger.info("%s copied into %s", ", ".join(MODEL_FILES), ROOT)


STAGES = {
    "tokenizer": (TokenizerRun, train_tokenizer),
    "base": (BaseRun, train_base),
    "head": (HeadRun, train_default_head),
}


def main(arguments: list[str]) -> None:
    """Run one stage."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    first = argparse.ArgumentParser(description=__doc__, add_help=False)
    first.add_argument("--stage", choices=list(STAGES), required=True)
    stage, rest = first.parse_known_args(arguments)
    options, run_stage = STAGES[stage.stage]
    parser = HfArgumentParser(options, prog=f"train_hf.py --stage {stage.stage}")
    (run,) = parser.parse_args_into_dataclasses(rest)
    run_stage(run)  # type: ignore[operator]


if __name__ == "__main__":
    main(sys.argv[1:])
