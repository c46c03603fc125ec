"""Which choice of the head and its training earns its place: `python -m eval.ablation --base runs/base/final`.

Trains one small head per choice with the same seed on equally many prompts, everything else at the defaults of
`training.head.HeadRun` but for what the command line says, and measures each on held-out requests. The defaults are
trained with several seeds, so that their spread says which differences mean something. A finished head is not trained
again, and one of other options is refused.
"""

import argparse
import json
import re
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from eval.decoding_ablation import SHUT
from eval.resumable import versions
from repo_package import ROOT, load_repo_module
from training.distill import DistillRun, claim, fit_to_base
from training.head import GoldExamples, HeadRun, fit_head, fresh_model, generation_defaults, train_head

heads = load_repo_module("diffusion_head")
grammar = load_repo_module("slot_grammar")

VARIANTS: dict[str, dict[str, Any]] = {
    "loss_weighting schedule (1/t)": {"loss_weighting": "schedule"},
    "loss_weighting count (N/n)": {"loss_weighting": "count"},
    "noise_schedule cosine": {"noise_schedule": "cosine"},
    "noise_schedule linear": {"noise_schedule": "linear"},
    "null_loss_weight 1": {"null_loss_weight": 1.0},
    "null_loss_weight 0.03": {"null_loss_weight": 0.03},
    "null_prediction_penalty 0.3": {"null_prediction_penalty": 0.3},
    "label_smoothing 0.1": {"label_smoothing": 0.1},
    "constraint_loss_weight 0.1": {"constraint_loss_weight": 0.1},
    "own_draft_share 0.5": {"own_draft_share": 0.5},
    "tail_share 1": {"tail_share": 1.0},
    "budgets fixed": {"budgets": "fixed"},
    "targets of the base": {"distill_weight": 0.0},
    "targets of the base, distill_weight 0.5": {"distill_weight": 0.5},
    "noise_samples 1": {"noise_samples": 1},
    "noise_samples 6": {"noise_samples": 6},
    "field_mask block_causal": {"field_mask": "block_causal"},
    "field_mask isolated": {"field_mask": "isolated"},
    "scaffold_features base": {"scaffold_features": "base"},
    "feature_layers last": {"feature_layers": "last"},
    "copy head off": {"copy_head": "off"},
    "head_num_layers 2": {"head_num_layers": 2},
    "head_num_layers 4": {"head_num_layers": 4},
    "rows_per_batch half": {"rows_per_batch": 0.5},
    "rows_per_batch double": {"rows_per_batch": 2},
    "lr 0.005": {"lr": 0.005},
    "lr 0.02": {"lr": 0.02},
    "optimizer adamw": {"optimizer": "adamw"},
    "schedule cosine": {"schedule": "cosine"},
    "schedule one_cycle": {"schedule": "one_cycle"},
}
"""Name of a choice -> what it changes of the defaults; `rows_per_batch` is a factor of the rows that are asked for.
`distill_weight` is an option of distillation: the head learns what the base writes for prompts of the same number, not
the gold calls. `feature_layers` and `copy_head` are no options of training: they change the model that is trained."""

MODEL_OPTIONS = ("feature_layers", "copy_head")

DEFAULTS = "defaults"
COLUMNS = ("acceptance", "slots_right", "calls_right")
"""Measures of the table: share of drafted slots that the base lets stand, and one-step drafts against gold."""


def names_of(asked: Sequence[str]) -> list[str]:
    """Choices to run, in the order of the table.

    Raises:
        ValueError: a name is unknown.
    """
    unknown = set(asked) - set(VARIANTS)
    if unknown:
        raise ValueError(f"Unknown choices: {', '.join(sorted(unknown))}. There are: {', '.join(VARIANTS)}.")
    return [name for name in VARIANTS if not asked or name in asked]


def options_of(name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Options of one head, of `HeadRun` or `MODEL_OPTIONS`; where `distill_weight` is among them, also of `DistillRun`.

    Args:
        name: of the choice, or `DEFAULTS`.
        seed: of weights, draws and noise.
        args: of the command line.
    """
    changes = dict(VARIANTS.get(name, {}))
    return {
        "base": str(args.base),
        "data": args.data or [],
        "max_steps": args.steps,
        "eval_steps": args.steps,
        "rows_per_batch": round(args.rows * changes.pop("rows_per_batch", 1)),
        "eval_rows": args.eval_rows,
        "acceptance_rows": args.acceptance_rows,
        "max_value_tokens": 64,  # as the default model; runaway values of a small base cost time and say nothing
        "max_call_tokens": 256,
        "feature_cache": args.work / f"features-{seed}",
        "cached_prompts": args.prompts,
        "seed": seed,
        **changes,
    }


def trial(name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train one head and measure it; a finished one is read back.

    Args:
        name: of the choice, or `DEFAULTS`.
        seed: of weights, draws and noise.
        args: of the command line.

    Returns:
        Name, seed, options that decide the result, seconds and measures.

    Raises:
        ValueError: the folder of this head is of one with other options.
    """
    folder = args.work / f"{re.sub(r'[^a-zA-Z0-9_.]+', '_', name)}-{seed}"
    options = options_of(name, seed, args)
    shown = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
    shown["data"] = [str(path) for path in options["data"]]
    claim(folder, shown)
    result = folder / "result.json"
    if result.exists():
        return dict(json.loads(result.read_text(encoding="utf-8")))
    start = time.monotonic()
    train(options | {"output": folder}, args.work / f"targets-{seed}")
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    last = next(entry for entry in reversed(history) if "eval_loss" in entry)
    measures = {key.removeprefix("eval_"): value for key, value in last.items() if key.startswith("eval_")}
    seconds = round(time.monotonic() - start, 1)
    found = {"name": name, "seed": seed, "options": shown, "seconds": seconds, "measures": measures}
    result.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return found


def train(options: dict[str, Any], targets: Path) -> None:
    """Train one head.

    Args:
        options: from `options_of`, and the output.
        targets: folder of the base's calls, filled where it is not; read where the head learns from them.
    """
    tokenizer = AutoTokenizer.from_pretrained(options["base"], trust_remote_code=False)
    run = HeadRun(**{name: value for name, value in options.items() if name in HeadRun.__dataclass_fields__})
    if "distill_weight" in options:
        model = fresh_model(run)
        model.generation_config = generation_defaults(tokenizer)
        own = {name: value for name, value in options.items() if name in DistillRun.__dataclass_fields__}
        fit_to_base(model, DistillRun(**own, targets=targets, target_rows=run.cached_prompts), tokenizer)
    elif options.keys() & set(MODEL_OPTIONS):
        model = changed_model(run, options)
        model.generation_config = generation_defaults(tokenizer)
        vocabulary = grammar.Vocabulary(tokenizer, model.config.get_text_config().vocab_size)
        # The same prompts as with a cache of features; the base is run in every step, since a cache would not pay here.
        gold = GoldExamples(run, tokenizer, vocabulary, model.config, fixed=run.cached_prompts)
        fit_head(model, run, tokenizer, gold)
    else:
        train_head(run, tokenizer)


def changed_model(run: HeadRun, options: Mapping[str, Any]) -> Any:
    """The head to train, changed by `MODEL_OPTIONS`.

    Args:
        run: of the head.
        options: `feature_layers` "last" gives a head that reads the base's last layer only; `copy_head` "off" one whose
            gate is shut and stays so, in training and drafting. What its pointer reads still informs the last block.
    """
    model = fresh_model(run)
    if options.get("feature_layers") == "last":
        model.config.feature_layers = (model.config.get_text_config().num_hidden_layers,)
        torch.manual_seed(run.seed)
        model.diffusion_head = heads.SchemaDiffusionHead(model.config)
        model.diffusion_head.apply(partial(heads.init_head_weights, std=model.config.initializer_range))
    if options.get("copy_head") == "off":
        gate = model.diffusion_head.copy_gate
        torch.nn.init.zeros_(gate.weight)
        torch.nn.init.constant_(gate.bias, SHUT)
        gate.requires_grad_(False)
    return model


def table(defaults: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> str:
    """A Markdown table: the defaults with their range over the seeds, then each choice with its difference."""
    names = [f"{place} {column}" for place in ("seen", "unseen") for column in COLUMNS]
    keys = [name.replace(" ", "_", 1) for name in names]
    lines = ["| choice | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]

    def values(key: str) -> list[float]:
        return [100 * found["measures"][key] for found in defaults if key in found["measures"]]

    cells = [f"{mean(v):.1f} ({min(v):.1f} to {max(v):.1f})" if (v := values(key)) else "-" for key in keys]
    lines.append(f"| {DEFAULTS}, {len(defaults)} seeds | " + " | ".join(cells) + " |")
    for found in others:
        cells = [
            f"{100 * found['measures'][key] - mean(v):+.1f}" if key in found["measures"] and (v := values(key)) else "-"
            for key in keys
        ]
        lines.append(f"| {found['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--base", default=str(ROOT / "runs" / "base" / "final"), help="folder or repo of the frozen base"
    )
    parser.add_argument("--data", type=Path, nargs="*", help="folders with train/ and dev/")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "ablation", help="where heads are kept")
    parser.add_argument("--steps", type=int, default=90, help="optimizer steps of each head")
    parser.add_argument("--rows", type=int, default=8, help="prompts of one step")
    parser.add_argument("--prompts", type=int, default=1024, help="size of the set of prompts")
    parser.add_argument("--eval-rows", type=int, default=100, help="held-out requests of each set, drafted in one step")
    parser.add_argument("--acceptance-rows", type=int, default=24, help="those of them that are decoded and checked")
    parser.add_argument("--seeds", type=int, default=3, help="heads at the defaults")
    parser.add_argument("--variants", nargs="*", default=[], help="only these choices")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 = torch's choice")
    parser.add_argument("--out", type=Path, default=ROOT / "eval" / "results" / "ablation.json")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is not there yet, print the table, write the results."""
    args = parse_arguments(arguments)
    names = names_of(args.variants)
    if args.threads:
        torch.set_num_threads(args.threads)
    trials = [(DEFAULTS, seed) for seed in range(args.seeds)] + [(name, 0) for name in names]
    found = [trial(name, seed, args) for name, seed in tqdm(trials, desc="heads", unit="head")]
    defaults, others = found[: args.seeds], found[args.seeds :]
    print(table(defaults, others))
    for head in found:  # where folders lie on this machine decides nothing
        options = head["options"]
        options["data"] = [Path(folder).name for folder in options["data"]]
        del options["feature_cache"]
    report = {
        "command": f"python -m eval.ablation --steps {args.steps} --rows {args.rows} --prompts {args.prompts} "
        f"--eval-rows {args.eval_rows} --acceptance-rows {args.acceptance_rows} --seeds {args.seeds}",
        "versions": versions(),
        "changes": {name: VARIANTS[name] for name in names},
        "heads": found,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
