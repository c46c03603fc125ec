"""The training command: `python train_hf.py --stage tokenizer|base ...`. Parses arguments and calls `training/`."""

import argparse
import logging
import sys
from dataclasses import fields
from pathlib import Path

from transformers import AutoTokenizer

from repo_package import ROOT, load_repo_module
from training.base import BaseRun, BaseTrainer
from training.data import tokenizer_texts

logger = logging.getLogger("train_hf")


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Read the command line; see `python train_hf.py --help`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--stage", choices=["tokenizer", "base"], required=True, help="what to train")
    parser.add_argument(
        "--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder with train/, text/ and dev/"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the result")
    parser.add_argument("--seed", type=int, default=0)
    tokenizer = parser.add_argument_group("tokenizer")
    tokenizer.add_argument("--vocab_size", type=int, default=8192)
    base = parser.add_argument_group("base", "options of the pre-training run, explained in training/base.py")
    for option in fields(BaseRun):
        if option.name not in ("data", "output", "seed"):
            base.add_argument(f"--{option.name}", type=type(option.default), default=option.default)
    base.add_argument("--tokenizer", default=str(ROOT), help="tokenizer of the base")
    return parser.parse_args(arguments)


def train_tokenizer(options: argparse.Namespace) -> None:
    """Train the default tokenizer and save it."""
    tokenization = load_repo_module("tokenization_utils")
    tokenizer = tokenization.train_tokenizer(tokenizer_texts(options.data, seed=options.seed), options.vocab_size)
    tokenizer.save_pretrained(options.output)
    logger.info("tokenizer of %d tokens saved to %s", len(tokenizer), options.output)


def train_base(options: argparse.Namespace) -> None:
    """Pre-train the default base; an interrupted run in the same output folder is resumed."""
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    run = BaseRun(**{option.name: getattr(options, option.name) for option in fields(BaseRun)})
    BaseTrainer(run, tokenizer).run()


def main(arguments: list[str]) -> None:
    """Run one stage."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    options = parse_arguments(arguments)
    {"tokenizer": train_tokenizer, "base": train_base}[options.stage](options)


if __name__ == "__main__":
    main(sys.argv[1:])
