"""A small training run from end to end: `python -m training.smoke`, about two minutes on two idle CPU cores.

Makes its own data, trains a fresh head and the decision on the repository's base by `train_hf.py`'s own options, and
checks what must hold of any run. Prints a PASS or FAIL line for each check; the exit code is 1 where one failed.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer

from repo_package import ROOT, load_repo_module
from train_hf import main as train

from .data import HELD_OUT_SOURCES, Record, is_simple
from .head import HeadCollator, HeadRun, canvas_example, fresh_model
from .head_evaluation import HeadEvaluation, evaluation_sets
from .records import write_records
from .synthetic_calls import generate
from .trainer import WEIGHTS_FILE

modeling = load_repo_module("modeling_smollm_diffusion")
grammar = load_repo_module("slot_grammar")

HALF = 20
"""Steps until the checkpoint in the middle, and from there to the end."""

ROWS = 20
"""Requests of each evaluation set, `seen` and `unseen` tools, that are drafted before and after."""

LONGEST_REQUEST, LONGEST_CALL = 250, 100
"""Characters; longer ones teach as much and cost more."""

ANSWER = """
import hashlib, json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tool = {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
reply = model.respond([{"role": "user", "content": "weather in Lisbon"}], tools=[tool], tokenizer=tokenizer,
                      tool_choice="required", max_tool_calls=1)
calls = [call["function"]["name"] for call in reply.message["tool_calls"]]
print(json.dumps({"calls": calls, "threshold": model.generation_config.tool_call_threshold}))
"""
"""What a user does with a trained model."""


@dataclass(frozen=True)
class Check:
    """Something that must hold.

    Args:
        claim: what.
        holds: whether it does.
        seen: what was measured.
    """

    claim: str
    holds: bool
    seen: str

    def __str__(self) -> str:
        return f"{'PASS' if self.holds else 'FAIL'}  {self.claim}: {self.seen}"


def make_data(folder: Path, train_records: int = 600, dev_records: int = 60) -> None:
    """Write synthetic records as `train/` and `dev/`; the tools of `dev/` have other names, as they have in real data.

    The single calls among the first `dev_records` of the training data stand in a file of a source out of which the
    evaluation of seen tools is chosen: they choose the best checkpoint, and no row of them is trained on.

    Args:
        folder: of the data.
        train_records, dev_records: how many.
    """

    def short(count: int, **which: Any) -> Iterator[Record]:
        fitting = (record for record in generate(20 * count, seed=0, **which) if is_short(record))
        return islice(fitting, count)

    simple_dev = (record for record in short(dev_records, names="dev") if is_simple(record))
    made = list(short(dev_records + train_records))
    seen = [record for record in made[:dev_records] if is_simple(record)]
    parts = {f"train/{HELD_OUT_SOURCES[0]}": seen, "train/synthetic_calls": made[dev_records:], "dev/dev": simple_dev}
    for part, records in parts.items():
        path = folder / f"{part}.jsonl.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_records(path, records)


def is_short(record: Record) -> bool:
    """Whether request and calls are cheap to train on and to write."""
    return len(record["messages"][0]["content"]) < LONGEST_REQUEST and len(json.dumps(record["calls"])) < LONGEST_CALL


def save_base(folder: Path) -> None:
    """Write the base of the repository's model as a plain checkpoint with its tokenizer."""
    modeling.SmolLMDiffusionForCausalLM.from_pretrained(ROOT).base.save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT, trust_remote_code=False).save_pretrained(folder)


def base_hash(model: Any) -> str:
    """SHA-256 of the base's weights in bfloat16."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.base.state_dict().items()):
        digest.update(name.encode() + tensor.bfloat16().contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def head_options(folder: Path, output: Path) -> dict[str, Any]:
    """The options of the head's run."""
    return {
        "output": output,
        "base": folder / "base",
        "data": folder / "data",
        "max_steps": 2 * HALF,
        "rows_per_batch": 12,
        "noise_samples": 2,
        "head_hidden_size": 128,
        "head_num_layers": 2,
        "head_num_heads": 4,
        "max_value_tokens": 64,
        "max_call_tokens": 256,
        "adam_lr": 0.003,
        "logging_steps": 5,
        "eval_steps": HALF,
        "eval_rows": 4,
        "acceptance_rows": 0,
        "save_total_limit": 3,
    }


def arguments(stage: str, options: dict[str, Any]) -> list[str]:
    """The options of a stage as its command takes them."""
    return ["--stage", stage, *(part for name, value in options.items() for part in (f"--{name}", str(value)))]


def measure(model: Any, folder: Path) -> dict[str, float]:
    """What a model does on the evaluation sets, on average; the same requests, budgets and noise for every model."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "base", trust_remote_code=False)
    vocabulary = grammar.Vocabulary(tokenizer, model.config.get_text_config().vocab_size)
    collate = HeadCollator(model.config, tokenizer.pad_token_id, noise_samples=2)
    sets = evaluation_sets([folder / "data"], tokenizer, ROWS)
    found = HeadEvaluation(model.eval(), tokenizer, vocabulary, collate, sets, ROWS, canvas_example)()
    return {name: found[name] for name in ("loss", "slots_right", "acceptance")}


def check_head(folder: Path) -> tuple[list[Check], Path]:
    """Train a head, twice the second half.

    Returns:
        What was found, and the folder of the trained model.
    """
    whole, resumed = folder / "head", folder / "head-resumed"
    options = head_options(folder, whole)
    fresh = fresh_model(HeadRun(**{**options, "base": str(options["base"]), "data": [options["data"]]}))
    untrained, hash_before = measure(fresh, folder), base_hash(fresh)
    train(arguments("head", options))
    shutil.copytree(whole / f"checkpoint-{HALF}", resumed / f"checkpoint-{HALF}")
    train(arguments("head", options | {"output": resumed}))
    model = modeling.SmolLMDiffusionForCausalLM.from_pretrained(whole / "final", dtype=torch.float32)
    trained = measure(model, folder)
    ends = [load_file(run / f"checkpoint-{2 * HALF}" / WEIGHTS_FILE) for run in (whole, resumed)]
    equal = [name for name, tensor in ends[0].items() if torch.equal(tensor, ends[1][name])]
    changes = {name: f"{untrained[name]:.3f} before, {trained[name]:.3f} after" for name in untrained}
    return [
        Check("the loss falls", trained["loss"] < 0.8 * untrained["loss"], changes["loss"]),
        Check(
            "the base accepts more of the drafts",
            trained["acceptance"] > untrained["acceptance"] + 0.02,
            changes["acceptance"],
        ),
        Check(
            "resuming from the middle equals going through, bit for bit",
            len(equal) == len(ends[0]) == len(ends[1]),
            f"{len(equal)} of {len(ends[0])} tensors",
        ),
        Check(
            "checkpoints hold the head alone",
            all(name.startswith("diffusion_head.") for name in ends[0]),
            f"{len(ends[0])} tensors, {parameters(fresh.diffusion_head)} parameters",
        ),
        Check("the base's weights stay", base_hash(model) == hash_before, hash_before[:12]),
    ], whole / "final"


def parameters(module: nn.Module) -> int:
    """How many trainable numbers a module has."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def check_decision(folder: Path, model: Path) -> list[Check]:
    """Calibrate the decision of a trained model, and use the result as a user would."""
    output = folder / "decision"
    train(arguments("decision", {"output": output, "model": model, "data": folder / "data", "calls": 40}))
    chosen = json.loads((output / "final" / "generation_config.json").read_text())["tool_call_threshold"]
    calibrated = modeling.SmolLMDiffusionForCausalLM.from_pretrained(output / "final")
    before = modeling.SmolLMDiffusionForCausalLM.from_pretrained(model)
    pairs = zip(calibrated.parameters(), before.parameters(), strict=True)
    same = all(torch.equal(first, second) for first, second in pairs)
    answer = answer_of(output / "final", folder / "cache")
    return [
        Check("the decision has a threshold", 0 < chosen < 1, str(chosen)),
        Check("the decision leaves base and head as they were", same, "all weights compared"),
        Check(
            "a fresh process loads the result by trust_remote_code and makes a call",
            answer == {"calls": ["get_weather"], "threshold": chosen},
            json.dumps(answer),
        ),
    ]


def answer_of(final: Path, cache: Path) -> dict[str, Any]:
    """Load a model in a fresh process with `AutoModelForCausalLM` and let it answer; the error, where it fails."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cache)}
    command = [sys.executable, "-c", ANSWER, str(final)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=final, check=False)
    if done.returncode:
        return {"error": " ".join(done.stderr.split())[-500:]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def smoke(folder: Path) -> Iterator[Check]:
    """Train in an empty folder and check.

    Args:
        folder: for data, base and results.

    Yields:
        Each check as soon as it is known.
    """
    make_data(folder / "data")
    save_base(folder / "base")
    checks, final = check_head(folder)
    yield from checks
    yield from check_decision(folder, final)


def main(command: list[str] | None = None) -> int:
    """Run the command.

    Returns:
        Its exit code.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="empty folder to work in, which is kept; otherwise a temporary one")
    kept = parser.parse_args(command).output
    if kept is not None and kept.exists() and any(kept.iterdir()):
        parser.error(f"{kept} is not empty: name a new folder.")
    start, held = time.monotonic(), []
    with tempfile.TemporaryDirectory() as temporary:
        for check in smoke((kept or Path(temporary)).resolve()):
            print(check, flush=True)
            held.append(check.holds)
    print(f"{sum(held)} of {len(held)} hold, {time.monotonic() - start:.0f} s")
    return int(not all(held))


if __name__ == "__main__":
    sys.exit(main())
