"""Calibration of the call decision: the threshold on the base's own P(call) that tells calls from refusals best.

Takes a model folder and training rows; writes `tool_call_threshold` into the folder's generation config. Trains
nothing. Source of the idea that the decision deserves data of its own: arXiv 2412.01130.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from repo_package import ROOT, load_repo_module

from .data import DEFAULT_DATA, PromptStyle, RowStream, source_weights

tokenization = load_repo_module("tokenization_utils")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DecisionRun:
    """Options of one calibration; each is an argument of `train_hf.py --stage decision`.

    Args:
        model: folder of the model; its generation_config.json is rewritten.
        data: folder with `train/` and `text/`.
        rows: rows that want a call, and as many that want none.
        seed: of the draw.
        threads: CPU threads.
    """

    model: str = str(ROOT)
    data: Path = DEFAULT_DATA
    rows: int = 300
    seed: int = 1
    threads: int = 2


def best_threshold(wanted: Sequence[float], unwanted: Sequence[float]) -> tuple[float, float, float]:
    """The threshold with the best mean of both recalls.

    Args:
        wanted: P(call) of rows that want a call.
        unwanted: P(call) of rows that want none.

    Returns:
        Threshold (calls are at or above it, and it lies in the middle of the gap it falls into), recall of calls,
        recall of refusals.
    """
    values = sorted({*wanted, *unwanted})
    middles = [(low + high) / 2 for low, high in zip([0.0, *values], [*values, 1.0], strict=True)]

    def recalls(threshold: float) -> tuple[float, float]:
        called = sum(value >= threshold for value in wanted) / len(wanted)
        return called, sum(value < threshold for value in unwanted) / len(unwanted)

    best = max(middles, key=lambda threshold: sum(recalls(threshold)))
    return best, *recalls(best)


@torch.no_grad()
def calibrate(run: DecisionRun) -> float:
    """Measure P(call) on training rows, choose the threshold and save it.

    Args:
        run: the options.

    Returns:
        The threshold.
    """
    torch.set_num_threads(run.threads)
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    model = AutoModelForCausalLM.from_pretrained(run.model, trust_remote_code=True, dtype=torch.float32).eval()
    # Chat without tools never reaches the decision.
    files = {name: weight for name, weight in source_weights(talk_weight=4.0).items() if name.startswith("train/")}
    stream = RowStream(run.data, tokenizer, seed=run.seed, max_messages=1, weights=files)
    call = tokenizer.convert_tokens_to_ids(tokenization.TOOL_CALL_TOKEN)
    found: dict[bool, list[float]] = {True: [], False: []}
    with tqdm(total=2 * run.rows, unit="row") as bar:
        while min(map(len, found.values())) < run.rows:
            row = stream.draw(PromptStyle())
            if len(found[bool(row.calls)]) < run.rows:
                logits = model(torch.tensor([row.prompt_ids]), logits_to_keep=1).logits[0, -1]
                found[bool(row.calls)].append(float(logits.float().softmax(-1)[call]))
                bar.update()
    threshold, called, refused = best_threshold(found[True], found[False])
    logger.info("threshold %.3f: %.1f%% of calls, %.1f%% of refusals", threshold, 100 * called, 100 * refused)
    path = Path(run.model) / "generation_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"tool_call_threshold": round(threshold, 3)}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return threshold
