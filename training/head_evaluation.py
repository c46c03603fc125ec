"""What a head does on held-out requests while it is trained: loss, one-step drafts, and what the base accepts of them.

Takes a model and rows; gives numbers by name. Noise, budgets and rows are fixed, so that evaluations compare.
"""

import json
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from eval.load_metrics import load_metric
from repo_package import load_repo_module

from .data import Row, dev_records, evaluation_rows, held_out_records, is_simple, single_call

objective = load_repo_module("denoising_loss")
decoding = load_repo_module("call_decoding")
drafting = load_repo_module("drafting")
scaffolds = load_repo_module("schema_scaffold")

logger = logging.getLogger(__name__)

BATCH_ROWS = 8


@dataclass(frozen=True, eq=False)
class HeldOutCall:
    """One request whose call is drafted.

    Args:
        row: prompt and tools.
        name: the tool.
        arguments: gold arguments.
        task: the call as a drafter is asked for it, in one step.
        canvas: as the head drafts it, with the budgets of the model's config.
        texts: gold text of each slot; None where it is not alive.
    """

    row: Row
    name: str
    arguments: dict[str, Any]
    task: Any
    canvas: Any
    texts: Sequence[str | None]


@dataclass(frozen=True, eq=False)
class OneStep:
    """What the head says of a call in one step, every slot masked.

    Args:
        draft: `drafting.Draft` that came of it.
        positions: int64 [n], the slots' positions on the canvas.
        predicted: int64 [n], the likeliest token of each.
        confidence: float32 [n], its probability.
    """

    draft: Any
    positions: Tensor
    predicted: Tensor
    confidence: Tensor


def evaluation_sets(data: Sequence[Path], tokenizer: PreTrainedTokenizerFast, limit: int) -> dict[str, list[Row]]:
    """Rows of `seen` (tools of the training data, requests held out) and `unseen` tools.

    Args:
        data: folders with `train/` and `dev/`; the first one is read.
        tokenizer: the model's tokenizer.
        limit: most rows of a set; 0 = nothing is read.

    Returns:
        The sets that have rows.
    """
    if limit == 0:
        return {}
    simple = [record for record in dev_records(data[0]) if is_simple(record)]
    records = {"seen": held_out_records(data[0])[:limit], "unseen": simple[:: max(1, len(simple) // max(1, limit))]}
    sets = {name: evaluation_rows(found[:limit], tokenizer) for name, found in records.items()}
    return {name: rows for name, rows in sets.items() if rows}


class HeadEvaluation:
    """Measures a model; called between steps.

    Args:
        model: in any mode; it is measured as it stands.
        tokenizer: its tokenizer.
        vocabulary: `slot_grammar.Vocabulary` of the tokenizer.
        collate: makes a batch of examples, with fixed noise.
        sets: rows by name of the set.
        acceptance_rows: rows of each set that are generated.
        example_of: makes an example of prompt, canvas, texts, config and randomness.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerFast,
        vocabulary: Any,
        collate: Callable[[list[Any]], dict[str, Any]],
        sets: dict[str, list[Row]],
        acceptance_rows: int,
        example_of: Callable[..., Any],
    ) -> None:
        self.model, self.tokenizer, self.vocabulary, self.collate = model, tokenizer, vocabulary, collate
        self.acceptance_rows, self.example_of = acceptance_rows, example_of
        calls = {name: [call for row in rows if (call := self._call(row)) is not None] for name, rows in sets.items()}
        self.sets = {name: found for name, found in calls.items() if found}

    @property
    def best_metric(self) -> str:
        """What the best checkpoint is chosen by: the loss, since the acceptance of a few requests is mostly noise. Of
        the first set: unseen tools choose nothing unless they are all there is."""
        return f"-{next(iter(self.sets), '')}_loss"

    def _call(self, row: Row) -> HeldOutCall | None:
        """The row's call on a canvas, or None where its tools or arguments are not supported."""
        call = single_call(row)
        if call is None:
            return None
        try:
            compiled = {tool["function"]["name"]: scaffolds.compile_scaffold(tool) for tool in row.tools}
            task = drafting.DraftTask(compiled[call.name], "", row.prompt_ids, 0, 1)
            laid_out = drafting.lay_out(task, self.vocabulary, self.model.config, self.model.config.array_budget, {})
            if laid_out is None or not laid_out[0].slots:
                return None
            texts = laid_out[0].layout.texts(call.arguments)
        except ValueError:
            return None
        return HeldOutCall(row, call.name, call.arguments, task, laid_out[0], texts)

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """All measures, each with the name of its set in front, and the mean over the sets of some.

        `loss` and what `denoising_loss.summary` gives; what `_slots`, `_nulls` and `_calibration` say of drafts in one
        step, and `calls_right`; `acceptance`, the share of first drafts' slots that the base lets stand, and forwards
        of the base and the head per call.
        """
        found: dict[str, float] = {}
        for name, calls in self.sets.items():
            scores = self._losses(calls) | self._one_step(calls) | self._acceptance(calls[: self.acceptance_rows])
            found |= {f"{name}_{key}": value for key, value in scores.items()}
        for key in ("loss", "slots_right", "calls_right", "acceptance"):
            values = [found[f"{name}_{key}"] for name in self.sets if f"{name}_{key}" in found]
            if values:
                found[key] = sum(values) / len(values)
        return found

    def _losses(self, calls: list[HeldOutCall]) -> dict[str, float]:
        sums: dict[str, Tensor] = {}
        for start in range(0, len(calls), BATCH_ROWS):
            examples = [
                self.example_of(
                    call.row.prompt_ids, call.canvas, call.texts, self.model.config, random.Random(start + index)
                )
                for index, call in enumerate(calls[start : start + BATCH_ROWS])
            ]
            batch = self.collate(examples)
            inputs = {
                name: part.to(self.model.device) if isinstance(part, Tensor) else part for name, part in batch.items()
            }
            sums = objective.add_sums(sums, self.model(**inputs).sums)
        return objective.summary(sums) if sums else {}

    def _one_step(self, calls: list[HeldOutCall]) -> dict[str, float]:
        steps: list[OneStep] = []
        for start in range(0, len(calls), BATCH_ROWS):
            steps += self.one_step(calls[start : start + BATCH_ROWS])
        right = [step.draft.arguments == call.arguments for call, step in zip(calls, steps, strict=True)]
        gold = [_clean_ids(call) for call in calls]
        measures = _slots(calls, steps) | _nulls(calls, steps, gold) | _calibration(steps, gold)
        return {"calls_right": sum(right) / len(right), **measures}

    def one_step(self, calls: Sequence[HeldOutCall]) -> list[OneStep]:
        """What the head says of calls in one step, in one batch."""
        device = self.model.device
        prompts = [torch.tensor(call.row.prompt_ids) for call in calls]
        ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
        lengths = torch.tensor([[len(prompt)] for prompt in prompts])
        mask = torch.arange(ids.shape[1]) < lengths
        features = self.model.base_features(ids.to(device), mask.to(device))
        memory = self.model.diffusion_head.encode_prompt(features, ids.to(device), mask.to(device))
        drafters = [drafting.HeadDrafter(self.vocabulary, self.model.config).draft(call.task) for call in calls]
        requests = [next(drafter) for drafter in drafters]
        log_probs = self.model.draft_log_probs(memory, *drafting.head_inputs(requests, device))
        found = []
        for drafter, request, rows in zip(drafters, requests, log_probs, strict=True):
            said = rows[: len(request.positions)]
            best = said.max(-1)
            try:
                drafter.send(said)
            except StopIteration as end:
                found.append(OneStep(end.value, request.positions, best.indices.cpu(), best.values.exp().cpu()))
        assert len(found) == len(calls), "a draft in one step takes one forward"
        return found

    def _acceptance(self, calls: list[HeldOutCall]) -> dict[str, float]:
        drafted = accepted = base = head = 0
        for call in calls:
            stats = self.model.generate(
                torch.tensor([call.row.prompt_ids], device=self.model.device),
                tools=call.row.tools,
                tokenizer=self.tokenizer,
                decoding="verified",
                drafter="head",
                tool_choice={"type": "function", "function": {"name": call.name}},
                max_tool_calls=1,
                return_dict_in_generate=True,
            ).stats[0]
            drafted, accepted = drafted + stats.drafted_slots, accepted + stats.accepted_slots
            base, head = base + stats.base_forwards, head + stats.head_forwards
        if not calls:
            return {}
        per_call = {"base_forwards": base / len(calls), "head_forwards": head / len(calls)}
        return {"acceptance": accepted / max(drafted, 1), **per_call}


def _clean_ids(call: HeldOutCall) -> Tensor:
    """int64 [positions]: the canvas with the gold values in it."""
    ids: Tensor = call.canvas.token_ids.clone()
    for slot, text in zip(call.canvas.slots, call.texts, strict=True):
        ids[slot.positions] = call.canvas.tokens_of(slot, text)
    return ids


def _slots(calls: Sequence[HeldOutCall], steps: Sequence[OneStep]) -> dict[str, float]:
    """`slots_right` and `slots_right_<kind>`: share of the slots with a gold value whose draft is that value, full
    texts compared."""
    slots = [
        (draft, gold, decoding.slot_kind(slot.slot))
        for call, step in zip(calls, steps, strict=True)
        for slot, gold, draft in zip(call.canvas.slots, call.texts, step.draft.texts, strict=True)
        if gold is not None
    ]
    found = load_metric("slot_match").compute(
        predictions=["" if draft is None else json.dumps(draft) for draft, _, _ in slots],
        references=[json.dumps(gold) for _, gold, _ in slots],
        kinds=[kind for _, _, kind in slots],
    )
    by_kind = {f"slots_right_{kind}": rates["exact_match"] for kind, rates in found["by_kind"].items()}
    return {"slots_right": found["exact_match"], **by_kind}


def _nulls(calls: Sequence[HeldOutCall], steps: Sequence[OneStep], gold: Sequence[Tensor]) -> dict[str, float]:
    """`draft_null_precision`, `draft_null_recall`, both also by the true length of the value: how well the head knows
    in one step where values end. Where a rate is one over nothing, it is left out."""
    rows: dict[str, list[list[int]]] = {"predictions": [], "references": [], "slots": [], "masked": []}
    for call, step, ids in zip(calls, steps, gold, strict=True):
        predicted, masked, fields = ids.clone(), torch.zeros_like(ids), torch.full_like(ids, -1)
        predicted[step.positions], masked[step.positions] = step.predicted, 1
        for index, slot in enumerate(call.canvas.slots):
            fields[slot.positions] = index
        for name, part in zip(rows, (predicted, ids, fields, masked), strict=True):
            rows[name].append(part.tolist())
    found = load_metric("null_tokens").compute(**rows, null_id=calls[0].canvas.null_id)
    lengths = {"": found} | {f"_length_{length}": rates for length, rates in found["by_length"].items()}
    names = ("null_precision", "null_recall")
    shown = {f"draft_{name}{length}": rates[name] for length, rates in lengths.items() for name in names}
    return {name: value for name, value in shown.items() if value is not None}


def _calibration(steps: Sequence[OneStep], gold: Sequence[Tensor]) -> dict[str, float]:
    """`draft_calibration_error`, `draft_confidence` and `draft_accuracy` of the tokens of one step."""
    right = torch.cat([step.predicted == ids[step.positions] for step, ids in zip(steps, gold, strict=True)])
    found = load_metric("expected_calibration_error").compute(
        predictions=torch.cat([step.confidence for step in steps]).clamp(0, 1).tolist(),
        references=right.long().tolist(),
        bins=objective.CONFIDENCE_BINS,
    )
    return {
        "draft_calibration_error": found["expected_calibration_error"],
        "draft_confidence": found["mean_confidence"],
        "draft_accuracy": found["accuracy"],
    }
