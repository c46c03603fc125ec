"""The decision between calling and talking: a calibrated threshold on P(call), and a probe that says P(call) better.

Takes a model and prompts that want a call or none, of which the latter are made by taking the called tools away
(MediaTek, arXiv 2412.01130); gives the model with a threshold and, when asked, a probe. The base is run once per prompt
and never changed.
"""

import hashlib
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from eval.load_metrics import load_metric
from repo_package import load_repo_module

from .augmentation import Augmentation
from .data import DEFAULT_DATA, EVALUATION_STYLE, Row, RowStream
from .records import OnError
from .stage_model import check_quantization, left_padded, loading_arguments, on_device, rates
from .trainer import Throughput, world_size

modeling = load_repo_module("modeling_smollm_diffusion")
configuration = load_repo_module("configuration_smollm_diffusion")
tokenization = load_repo_module("tokenization_utils")

logger = logging.getLogger(__name__)

FOLDS = 5
WEIGHT_DECAYS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Of the probe, on standardised hidden states; the best is chosen on tools that it was not fitted on."""
BINS = (10, 15)
"""Bins of the expected calibration error."""
TALK_WEIGHT = 3.0
"""Makes about half of the prompts without a call natural ones, the others by removal."""
MAX_DRAWS = 100
"""Rows drawn per row wanted, after which the data are taken to lack one of the two kinds."""


@dataclass(frozen=True)
class DecisionRun:
    """Options of one run; each is an argument of `train_hf.py --stage decision`.

    Args:
        output: folder of the result, `output/final`.
        model: folder or repo of the model.
        data: folders with `train/`; empty = the one beside the repository.
        leave_out: file of records that are not drawn, as `python -m training.audit overlap --drop` writes it.
        on_error: what to do with lines of record files that are no records: "refuse" or "skip".
        quantization: "4bit" or "8bit" scores the prompts on a base loaded so, with bitsandbytes; "none" in float32.
            What is saved stays as it was found.
        probe: fit a `decision_head`; otherwise P(call) is the base's probability of a call's first token.
        calls: prompts that want a call; as many want none.
        min_relevance, min_irrelevance: part of the wanted calls that must be made, and of the other requests that must
            be left alone; among the thresholds that do both, the one with the best balanced accuracy is chosen.
        rows_per_batch: prompts of one forward of the base.
        seed: of the drawn prompts.
        threads: CPU threads; 0 = torch's choice.
        push_to_hub: repo that the result is uploaded to; its README.md is never overwritten.
    """

    output: Path
    model: str
    data: list[Path] = field(default_factory=list)
    leave_out: Path | None = None
    on_error: OnError = "refuse"
    quantization: str = "none"
    probe: bool = False
    calls: int = 600
    min_relevance: float = 0.0
    min_irrelevance: float = 0.0
    rows_per_batch: int = 16
    seed: int = 0
    threads: int = 0
    push_to_hub: str | None = None

    def __post_init__(self) -> None:
        check_quantization(self.quantization)
        if world_size() > 1:
            raise ValueError("The decision is one process's work: start this command without torchrun.")
        for name in ("calls", "rows_per_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("min_relevance", "min_irrelevance"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}.")


@dataclass(frozen=True, eq=False)
class DecisionScores:
    """What model and base think of prompts.

    Args:
        probabilities: float32 [rows], P(call) as the model routes by it: the probe's where it has one.
        base_probabilities: float32 [rows], the base's probability of a call's first token.
        base_calls: bool [rows], whether that token is the base's argmax.
        wanted: bool [rows], whether a call is wanted.
        hidden: float32 [rows, base_width], the base's last hidden states at the ends of the prompts.
    """

    probabilities: Tensor
    base_probabilities: Tensor
    base_calls: Tensor
    wanted: Tensor
    hidden: Tensor


# ---------------------------------------------------------------------------------------------------------------------
# Prompts and scores
# ---------------------------------------------------------------------------------------------------------------------


def poses_decision(record: Mapping[str, Any]) -> bool:
    """Whether a record shows tools, and one more than it calls, so that the called one can be taken away."""
    return len(record["tools"]) > bool(record["calls"])


def draw_decisions(stream: RowStream, calls: int, rng: random.Random) -> list[Row]:
    """Draw prompts, half of which want a call.

    Args:
        stream: the rows.
        calls: how many want a call.
        rng: decides what is drawn.

    Returns:
        Twice as many rows, no prompt twice, in the order in which they were drawn.

    Raises:
        ValueError: the data hold too few of one kind.
    """
    found: dict[tuple[int, ...], Row] = {}
    missing = {True: calls, False: calls}
    for _ in range(MAX_DRAWS * calls):
        if not any(missing.values()):
            return list(found.values())
        row = stream.draw(EVALUATION_STYLE, rng)
        kind, key = bool(row.calls), tuple(row.prompt_ids)
        if missing[kind] and key not in found:
            found[key] = row
            missing[kind] -= 1
    raise ValueError(
        f"The data hold too few different prompts: {missing[True]} that want a call and {missing[False]} that want "
        f"none are missing of {calls} each. Lower --calls or add data."
    )


@torch.no_grad()
def decision_scores(
    model: Any, rows: Sequence[Row], tokenizer: PreTrainedTokenizerFast, rows_per_batch: int = 16
) -> DecisionScores:
    """Score prompts, one forward of the base each, prompts of similar length side by side.

    Args:
        model: the model.
        rows: the prompts; calls are wanted where a row has some.
        tokenizer: the model's tokenizer.
        rows_per_batch: prompts of one forward.

    Returns:
        The scores, on the CPU, in the order of the rows.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("There are no prompts to score.")
    call, pad = tokenizer.convert_tokens_to_ids(tokenization.TOOL_CALL_TOKEN), tokenizer.pad_token_id
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].prompt_ids))
    parts: list[list[Tensor]] = []
    throughput = Throughput()
    with tqdm(total=len(rows), desc="decisions", unit="prompt") as progress:
        for start in range(0, len(order), rows_per_batch):
            prompts = [rows[index].prompt_ids for index in order[start : start + rows_per_batch]]
            logits, hidden = _ends(model, prompts, pad)
            chance = model.call_probability(logits, hidden, call)
            base = model.call_probability(logits, None, call)
            parts.append([part.cpu() for part in (chance, base, logits.argmax(-1) == call, hidden.float())])
            progress.update(len(prompts))
            throughput.count(rows=len(prompts), tokens=sum(map(len, prompts)))
    logger.info("prompts scored: %s", rates(throughput))
    back = torch.tensor(order).argsort()
    chances, bases, base_calls, hidden = (torch.cat(part)[back] for part in zip(*parts, strict=True))
    return DecisionScores(chances, bases, base_calls, torch.tensor([bool(row.calls) for row in rows]), hidden)


def _ends(model: Any, prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Logits [rows, vocab] and last hidden states [rows, width] of the base behind prompts."""
    ids, mask = left_padded(prompts, pad, model.device)
    output = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp_min(0),
        use_cache=False,
        output_hidden_states=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1], output.hidden_states[-1][:, -1]


# ---------------------------------------------------------------------------------------------------------------------
# The threshold
# ---------------------------------------------------------------------------------------------------------------------


def choose_threshold(
    probabilities: Tensor, wanted: Tensor, min_relevance: float = 0.0, min_irrelevance: float = 0.0
) -> float:
    """The threshold with the best balanced accuracy among those that call and stay silent often enough.

    Args:
        probabilities: float [rows], P(call).
        wanted: bool [rows], whether a call is wanted; both kinds must be there.
        min_relevance: part of the wanted calls that must be made.
        min_irrelevance: part of the other prompts that must not call.

    Returns:
        The threshold, in the middle between two neighbouring scores or their ends 0 and 1; of equals the one nearest to
        one half.

    Raises:
        ValueError: no threshold reaches both minima; the message says what can be reached.
    """
    scores = probabilities.double().unique()
    ends = torch.tensor([0.0, 1.0], dtype=torch.double)
    candidates = torch.cat([ends, (scores[1:] + scores[:-1]) / 2])
    relevance = _share_reaching(probabilities[wanted].double(), candidates)
    irrelevance = 1 - _share_reaching(probabilities[~wanted].double(), candidates)
    allowed = (relevance >= min_relevance) & (irrelevance >= min_irrelevance)
    if not bool(allowed.any()):
        reached = float(irrelevance[relevance >= min_relevance].max())
        raise ValueError(
            f"No threshold has a relevance of {min_relevance} and an irrelevance of {min_irrelevance}: at that "
            f"relevance, irrelevance is at most {reached:.3f}. Ask for less of one, or fit a probe."
        )
    balanced = torch.where(allowed, relevance + irrelevance, -1.0)
    best = candidates[balanced >= balanced.max() - 1e-9]
    return float(best[(best - 0.5).abs().argmin()])


def _share_reaching(scores: Tensor, thresholds: Tensor) -> Tensor:
    """Part of the scores that is at least each threshold."""
    below = torch.searchsorted(scores.sort().values, thresholds)
    return 1 - below / len(scores)


def measured(probabilities: Tensor, calls: Tensor, wanted: Tensor) -> dict[str, float]:
    """Quality of a decision and of the probabilities behind it.

    Args:
        probabilities: float [rows], P(call).
        calls: bool [rows], what was decided.
        wanted: bool [rows], whether a call is wanted.

    Returns:
        `auc`, `relevance`, `irrelevance`, `balanced_accuracy`, `accuracy`, and for each number in `BINS` the expected
        calibration error `ece_<bins>`.
    """
    roc, calibration = load_metric("decision_roc"), load_metric("expected_calibration_error")
    scores, references = probabilities.tolist(), wanted.long().tolist()
    decided = roc.compute(predictions=calls.double().tolist(), references=references, threshold=0.5)
    result = {"auc": roc.compute(predictions=scores, references=references)["auc"]}
    result |= {name: decided[name] for name in ("relevance", "irrelevance", "balanced_accuracy")}
    result["accuracy"] = float((calls == wanted).double().mean())
    for bins in BINS:
        found = calibration.compute(predictions=scores, references=references, bins=bins)
        result[f"ece_{bins}"] = found["expected_calibration_error"]
    return {name: round(value, 4) for name, value in result.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The probe
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Probe:
    """Logistic regression on a hidden state.

    Args:
        weight: float64 [width].
        bias: added to the product.
    """

    weight: Tensor
    bias: float

    def log_odds(self, hidden: Tensor) -> Tensor:
        """Log-odds of a call, float64 [rows], of hidden states [rows, width]."""
        return hidden.double() @ self.weight + self.bias


def fit_probe(hidden: Tensor, wanted: Tensor, weight_decay: float) -> Probe:
    """Fit a probe; the problem is convex, so nothing is drawn.

    Args:
        hidden: float [rows, width].
        wanted: bool [rows].
        weight_decay: half of it times the squared weights, on standardised hidden states, is added to the mean loss.

    Returns:
        The probe of hidden states as they are.
    """
    mean, scale = hidden.double().mean(0), hidden.double().std(0, correction=0).clamp_min(1e-6)
    inputs, targets = (hidden.double() - mean) / scale, wanted.double()
    weight = torch.zeros(hidden.shape[1], dtype=torch.double, requires_grad=True)
    bias = torch.zeros((), dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.binary_cross_entropy_with_logits(inputs @ weight + bias, targets)
        value = value + weight_decay / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    plain = weight.detach() / scale
    return Probe(plain, float(bias.detach() - plain @ mean))


def fold_of(name: str) -> int:
    """The fold of a tool, by a hash of its name."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % FOLDS


def cross_fitted(hidden: Tensor, rows: Sequence[Row], weight_decay: float) -> Tensor:
    """Log-odds of each prompt by a probe that was fitted on prompts which show none of the tools of its fold.

    A prompt belongs to the fold of the tool that it calls, or else of the first one that it shows.

    Args:
        hidden: float [rows, width].
        rows: the prompts.
        weight_decay: as in `fit_probe`.

    Returns:
        Float64 [rows].

    Raises:
        ValueError: what is left to fit on, beside one fold, is of one kind only.
    """
    wanted = torch.tensor([bool(row.calls) for row in rows])
    names = [sorted(tool["function"]["name"] for tool in row.tools) for row in rows]
    own = torch.tensor(
        [fold_of(row.calls[0]["name"] if row.calls else shown[0]) for row, shown in zip(rows, names, strict=True)]
    )
    shows = torch.tensor([[fold in map(fold_of, shown) for fold in range(FOLDS)] for shown in names])
    found = torch.zeros(len(rows), dtype=torch.double)
    for fold in own.unique().tolist():
        rest = ~shows[:, fold]
        if wanted[rest].unique().numel() < 2:
            raise ValueError(
                f"Too few prompts for a probe: {int(rest.sum())} of {len(rows)} show no tool of fold {fold}, and they "
                "do not hold both kinds. Raise --calls, or use data with more different tools."
            )
        found[own == fold] = fit_probe(hidden[rest], wanted[rest], weight_decay).log_odds(hidden[own == fold])
    return found


def choose_probe(hidden: Tensor, rows: Sequence[Row]) -> tuple[Probe, Tensor]:
    """Fit a probe with the weight decay that predicts best for tools it was not fitted on.

    Args:
        hidden: float [rows, width].
        rows: the prompts.

    Returns:
        The probe fitted on all prompts, and P(call), float64 [rows], as `cross_fitted` has it.
    """
    wanted = torch.tensor([bool(row.calls) for row in rows])
    held_out = {decay: cross_fitted(hidden, rows, decay) for decay in tqdm(WEIGHT_DECAYS, desc="probe", unit="fit")}
    losses = {
        decay: float(F.binary_cross_entropy_with_logits(odds, wanted.double())) for decay, odds in held_out.items()
    }
    best = min(losses, key=lambda decay: losses[decay])
    logger.info("loss on unseen tools by weight decay: %s", {decay: round(loss, 4) for decay, loss in losses.items()})
    return fit_probe(hidden, wanted, best), held_out[best].sigmoid()


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


def train_decision(run: DecisionRun, tokenizer: PreTrainedTokenizerFast) -> Any:
    """Choose the threshold of a model, fit its probe when asked, and save the model in `output/final`.

    The weights of base and head are saved as they were found, and a head-only checkpoint stays one. Without `probe`, a
    probe that the model has is left out, since the threshold is one for the base's own probability.

    Args:
        run: the options.
        tokenizer: the model's tokenizer.

    Returns:
        The model as it was saved.

    Raises:
        ValueError: the data hold too few prompts, or the wanted minima cannot be reached.
    """
    if run.threads:
        torch.set_num_threads(run.threads)
    rows = draw_decisions(decision_stream(run, tokenizer), run.calls, random.Random(run.seed))
    scored = modeling.SmolLMDiffusionForCausalLM.from_pretrained(run.model, **loading_arguments(run.quantization))
    on_device(scored).eval()
    scores = decision_scores(scored, rows, tokenizer, run.rows_per_batch)
    probe, chances = None, scores.base_probabilities
    if run.probe:
        probe, chances = choose_probe(scores.hidden, rows)
    threshold = round(choose_threshold(chances, scores.wanted, run.min_relevance, run.min_irrelevance), 4)
    print_table(scores, chances, threshold, run.probe)
    # Loaded again, so that what is saved was never converted to another dtype.
    model = modeling.SmolLMDiffusionForCausalLM.from_pretrained(run.model)
    if probe is None:
        model.set_decision_head(None)
    else:
        model.set_decision_head(probe.weight, probe.bias)
    model.generation_config.tool_call_threshold = threshold
    final = run.output / "final"
    model.save_pretrained(final, head_only=_is_head_only(run.model))
    tokenizer.save_pretrained(final)
    logger.info("model with tool_call_threshold %s saved to %s", threshold, final)
    return model


def _is_head_only(source: str) -> bool:
    fields, _ = configuration.SmolLMDiffusionConfig.get_config_dict(source)
    return bool(fields.get("head_only_checkpoint"))


def decision_stream(run: DecisionRun, tokenizer: PreTrainedTokenizerFast) -> RowStream:
    """Rows that decide. Half of the others' calls are taken away, so that source and wording do not give the answer."""
    return RowStream(
        run.data or DEFAULT_DATA,
        tokenizer,
        keep=poses_decision,
        leave_out=run.leave_out,
        on_error=run.on_error,
        talk_weight=TALK_WEIGHT,
        augmentation=Augmentation.none(),
        negative_share=0.5,
    )


def print_table(scores: DecisionScores, chances: Tensor, threshold: float, probe: bool) -> None:
    """Print relevance, irrelevance and calibration before and after; a probe is measured on tools it has not seen."""
    base = scores.base_probabilities
    lines = {
        "the base's own choice": (base, scores.base_calls),
        "threshold 0.5": (base, base >= 0.5),
        f"{'probe, ' if probe else ''}threshold {threshold}": (chances, chances >= threshold),
    }
    print(f"{len(scores.wanted)} prompts, {int(scores.wanted.sum())} of which want a call")
    for name, (probabilities, calls) in lines.items():
        values = measured(probabilities, calls, scores.wanted)
        print(f"  {name:26}", "  ".join(f"{key} {value:.3f}" for key, value in values.items()))
