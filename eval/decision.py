"""How well models decide between calling and talking: `python -m eval.decision --models . runs/decision/final`.

Three sets that choose no threshold and fit no probe: `seen` (tools of the training data, held-out requests), `unseen`
(tools that occur nowhere in training) and `bfcl` (irrelevance against simple_python). Each holds as many prompts that
want a call as prompts that want none, since calibration depends on how frequent both are; of `seen`, the latter are the
former with the called tool taken away. For each model: the base's own choice, the threshold 0.5 on the base's
probability, and what the model ships with.
"""

import argparse
import hashlib
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from eval.load_metrics import load_metric
from eval.resumable import versions
from repo_package import ROOT
from training.augmentation import without_called_tools
from training.data import DEFAULT_DATA, Row, dev_records, evaluation_rows, held_out_records
from training.decision import DecisionScores, decision_scores, measured
from training.records import Record, read_records

SETS = ("seen", "unseen", "bfcl")
ROC_POINTS = 21
BINS = 10
"""Of P(call), in the reliability curve."""
BFCL_FILES = ("irrelevance", "simple_python")


def decision_records(name: str, data: Path) -> list[Record]:
    """Records of a set that show tools, in the order of a hash of their ids.

    Args:
        name: of `SETS`.
        data: folder with `train/`, `dev/` and `bfcl_open/`.
    """
    if name == "seen":
        calls = held_out_records(data)
        found = [*calls, *filter(None, map(without_called_tools, calls))]
    elif name == "unseen":
        found = dev_records(data)
    else:
        folder = data / "bfcl_open" / "normalised"
        found = [record for file in BFCL_FILES for record in read_records(folder / f"{file}.jsonl.gz")]
    shown = [record for record in found if record["tools"]]
    return sorted(shown, key=lambda record: hashlib.sha256(record["id"].encode()).hexdigest())


def decision_rows(name: str, data: Path, tokenizer: PreTrainedTokenizerFast, limit: int) -> list[Row]:
    """Prompts of a set, as many that want a call as prompts that want none.

    Args:
        name: of `SETS`.
        data: folder with `train/`, `dev/` and `bfcl_open/`.
        tokenizer: the model's tokenizer.
        limit: most prompts of each kind.

    Returns:
        The rows; those that want a call come first.

    Raises:
        ValueError: the set lacks one kind.
    """
    records = decision_records(name, data)
    kinds = []
    for wanted in (True, False):
        chosen = [record for record in records if bool(record["calls"]) == wanted]
        # Some are too long for the style; a tenth more is built than is needed.
        kinds.append(evaluation_rows(chosen[: limit + limit // 10 + 10], tokenizer)[:limit])
    count = min(map(len, kinds))
    if count == 0:
        raise ValueError(f"The set {name!r} in {data} lacks prompts that want a call, or prompts that want none.")
    return [row for rows in kinds for row in rows[:count]]


def report(scores: DecisionScores, threshold: float | None) -> dict[str, Any]:
    """What a model decides on a set, in three ways.

    Args:
        scores: of the set.
        threshold: what the model ships with; None is the base's own choice.

    Returns:
        By way, what `measured` gives, the ROC curve at evenly spread points and the reliability curve. The area and the
        curves do not depend on a threshold.
    """
    base, own = scores.base_probabilities, scores.probabilities
    ways = {"base": (base, scores.base_calls), "0.5": (base, base >= 0.5)}
    if threshold is not None:
        ways["shipped"] = (own, own >= threshold)
    return {
        name: measured(probabilities, calls, scores.wanted)
        | {"roc": roc_points(probabilities, scores.wanted), "bins": reliability(probabilities, scores.wanted)}
        for name, (probabilities, calls) in ways.items()
    }


def reliability(probabilities: torch.Tensor, wanted: torch.Tensor) -> list[dict[str, float]]:
    """Bins of P(call) with prompts: `low`, `high`, `count`, mean `confidence`, share that wants a call (`accuracy`)."""
    found = load_metric("expected_calibration_error").compute(
        predictions=probabilities.tolist(), references=wanted.long().tolist(), bins=BINS
    )
    return [{name: round(value, 4) for name, value in one.items()} for one in found["bins"]]


def roc_points(probabilities: torch.Tensor, wanted: torch.Tensor) -> list[list[float]]:
    """[false positive rate, true positive rate] at evenly spread points of the ROC curve, both ends included."""
    roc = load_metric("decision_roc").compute(
        predictions=probabilities.tolist(), references=wanted.long().tolist(), threshold=0.5
    )["roc"]
    places = sorted({round(index * (len(roc) - 1) / (ROC_POINTS - 1)) for index in range(ROC_POINTS)})
    return [[round(roc[place][f"{kind}_positive_rate"], 4) for kind in ("false", "true")] for place in places]


def model_report(source: str, sets: dict[str, list[Row]], rows_per_batch: int) -> dict[str, Any]:
    """Score one model on all sets.

    Args:
        source: folder or repo of the model.
        sets: the prompts by set.
        rows_per_batch: prompts of one forward.
    """
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True, dtype=torch.float32)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    threshold = getattr(model.generation_config, "tool_call_threshold", None)
    result: dict[str, Any] = {"threshold": threshold, "probe": model.decision_head is not None, "sets": {}}
    print(f"\n{source}: threshold {threshold}, {'probe' if result['probe'] else 'no probe'}")
    for name, rows in sets.items():
        found = report(decision_scores(model, rows, tokenizer, rows_per_batch), threshold)
        result["sets"][name] = {"prompts": len(rows), **found}
        for way, values in found.items():
            shown = "  ".join(f"{key} {value:.3f}" for key, value in values.items() if key not in ("roc", "bins"))
            print(f"  {name:6} {way:7} {shown}")
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[str(ROOT)], help="folders or repos that share a tokenizer")
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder with train/, dev/ and bfcl_open/")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--limit", type=int, default=150, help="most prompts of each kind in a set")
    parser.add_argument("--rows-per-batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=ROOT / "eval" / "results" / "decision.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(options.models[0], trust_remote_code=False)
    sets = {name: decision_rows(name, options.data, tokenizer, options.limit) for name in options.sets}
    results = {
        "command": shlex.join(["python", "-m", "eval.decision", *(sys.argv[1:] if arguments is None else arguments)]),
        "versions": versions(),
        "threads": options.threads,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "limit": options.limit,
        "models": {source: model_report(source, sets, options.rows_per_batch) for source in options.models},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
