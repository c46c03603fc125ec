"""What a head does on held-out requests while it is trained: loss, one-step drafts, and what the base accepts of them.

Takes a model and rows; gives numbers by name. Noise, budgets and rows are fixed, so that evaluations compare.
"""

import logging
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from repo_package import load_repo_module

from .data import Row, dev_records, evaluation_rows, held_out_records, is_simple, single_call

objective = load_repo_module("denoising_loss")
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


def evaluation_sets(data: Sequence[Path], tokenizer: PreTrainedTokenizerFast, limit: int) -> dict[str, list[Row]]:
    """Rows of `seen` (tools of the training data, requests held out) and `unseen` tools.

    Args:
        data: folders with `train/` and `dev/`; the first one is read.
        tokenizer: the model's tokenizer.
        limit: most rows of a set.

    Returns:
        The sets that have rows.
    """
    simple = [record for record in dev_records(data[0]) if is_simple(record)]
    records = {"seen": held_out_records(data[0])[:limit], "unseen": simple[:: max(1, len(simple) // max(1, limit))]}
    sets = {name: evaluation_rows(found[:limit], tokenizer) for name, found in records.items()}
    return {name: rows for name, rows in sets.items() if rows}


def slot_kind(slot: Any) -> str:
    """What kind of slot a `CanvasSlot` is, in the words of reports: its role, or for values what they hold."""
    if slot.slot.role != "value":
        return str(slot.slot.role)
    if slot.slot.leaf.kind != "choice":
        return str(slot.slot.leaf.kind)
    return "boolean" if set(slot.slot.leaf.choices) <= {"true", "false"} else "enum"


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
        """What the best checkpoint is chosen by: acceptance by the base, which is what drafts are for, or the loss
        where nothing is generated. Of the first set, so that the unseen tools behind it choose nothing."""
        name = next(iter(self.sets), "")
        return f"{name}_acceptance" if self.acceptance_rows else f"-{name}_loss"

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

        `loss` and what `denoising_loss.summary` gives; `slots_right` (also by kind) and `calls_right` of drafts in one
        step, full strings compared; `acceptance`, the share of first drafts' slots that the base lets stand, and
        forwards of the base and the head per call.
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
        right: dict[str, list[bool]] = defaultdict(list)
        for start in range(0, len(calls), BATCH_ROWS):
            part = calls[start : start + BATCH_ROWS]
            for call, draft in zip(part, self.drafts(part), strict=True):
                for slot, gold, text in zip(call.canvas.slots, call.texts, draft.texts, strict=True):
                    if gold is not None:
                        right[f"slots_right_{slot_kind(slot)}"].append(text == gold)
                        right["slots_right"].append(text == gold)
                right["calls_right"].append(draft.arguments == call.arguments)
        return {name: sum(hits) / len(hits) for name, hits in right.items()}

    def drafts(self, calls: Sequence[HeldOutCall]) -> list[Any]:
        """The head's drafts of calls in one step: a `drafting.Draft` of each."""
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
        drafts = []
        for drafter, request, rows in zip(drafters, requests, log_probs, strict=True):
            try:
                drafter.send(rows[: len(request.positions)])
            except StopIteration as end:
                drafts.append(end.value)
        assert len(drafts) == len(calls), "a draft in one step takes one forward"
        return drafts

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
