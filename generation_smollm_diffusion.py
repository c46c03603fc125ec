"""Generation: routing, drafting, verification and the autoregressive reference, as a mixin of the model.

Takes prompt ids and tools; gives ids as any `generate` does, or an OpenAI-style message. One loop serves `verified`
and `ar`: a forward of the base over what is pending and a draft, then the constrained argmax decides token by token;
`ar` is the loop without a draft. Batches run row by row.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache, GenerationConfig, PreTrainedTokenizerFast
from transformers.utils import ModelOutput, logging

from .diffusion_head import PromptMemory
from .reply_grammar import ReplyGrammar, call_continuation
from .scaffold_layout import Observed, draft_layout
from .schema_scaffold import Scaffold, compile_scaffold
from .slot_grammar import Canvas, CanvasSlot, Vocabulary, build_canvas, commit_slot, commit_slots, slot_budget
from .tokenization_utils import THINK_END_TOKEN, THINK_TOKEN, normalise_tools, tools_from_prompt_ids

logger = logging.get_logger(__name__)

DECODINGS = ("verified", "diffusion", "ar")
MAX_DIFFUSION_STEPS = 8
# A canvas beyond this many positions is not drafted: `verified` falls back to the reference, `diffusion` refuses.
MAX_CANVAS_POSITIONS = 4096
# Drafts in a row that saved nothing, after which the base writes the rest of the call by itself.
MAX_VAIN_DRAFTS = 3
# A head that wants still longer arrays is not followed: the base writes the call.
MAX_ARRAY_BUDGET = 64


@dataclass
class GenerationStats:
    """What one request cost; forwards are counted by hooks on the modules.

    Args:
        base_forwards, head_forwards: forwards of the base and of the head.
        calls: calls that the grammar made; what looks like a call in free text is text.
        drafted_slots: values in the first draft of each call.
        accepted_slots: those of them that stand unchanged in the final call.
        cut: JSON pointers (in the tool's schema) of values that were ended by the limit of their length; an empty
            pointer for a call.
        seconds: wall time per stage: prefill, scaffold, draft, verify, chat.
    """

    base_forwards: int = 0
    head_forwards: int = 0
    calls: int = 0
    drafted_slots: int = 0
    accepted_slots: int = 0
    cut: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the block's wall time to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class TraceEvent:
    """One thing that happened, for viewers.

    Args:
        kind: `"route"`, `"draft"` (one denoising step), `"verify"` (one forward of the base).
        data: what a viewer shows. `route`: mode, P(call), whether a call was forced. `draft`: number of the call, and
            the canvas as texts and `SlotView`s. `verify`: the texts accepted, drafted behind them (empty if all was
            accepted) and chosen instead.
    """

    kind: str
    data: dict[str, Any]


@dataclass
class SchemaGenerateOutput(ModelOutput):
    """What `generate(..., return_dict_in_generate=True)` gives.

    Args:
        sequences: long [batch, prompt + reply], padded on the right.
        stats: one a row.
        trace: events of each row, when `output_trace=True`.
    """

    sequences: Tensor | None = None
    stats: list[GenerationStats] | None = None
    trace: list[list[TraceEvent]] | None = None


@dataclass(frozen=True)
class Reply:
    """What `respond` gives.

    Args:
        mode: `"tool"`, `"chat"` or `"think"` (a chat reply that reasons first).
        message: OpenAI-style assistant message; the arguments of tool calls are dicts.
        stats: what it cost.
        token_ids: the reply's tokens.
        trace: what happened, when asked for.
    """

    mode: str
    message: dict[str, Any]
    stats: GenerationStats
    token_ids: list[int]
    trace: list[TraceEvent]


@dataclass(frozen=True)
class CallOptions:
    """The generation options that are ours; each may also stand in the generation config.

    Args:
        decoding: `"verified"`, `"diffusion"` or `"ar"`.
        tool_choice: `"auto"`, `"none"`, `"required"` or `{"type": "function", "function": {"name": ...}}`.
        num_diffusion_steps: denoising steps of a draft, 1 to 8.
        tool_call_threshold: calls when P(call) is at least this; None calls when it is the base's argmax.
        max_tool_calls: most calls in one reply.
        on_unsupported: what becomes of a value whose schema cannot be guaranteed: `"error"` raises
            `UnsupportedSchemaError`, `"ar"` lets the base write it under the guidance of llguidance.
        output_trace: keep a trace of what happened.
    """

    decoding: str = "verified"
    tool_choice: Any = "auto"
    num_diffusion_steps: int = 4
    tool_call_threshold: float | None = None
    max_tool_calls: int = 8
    on_unsupported: str = "error"
    output_trace: bool = False

    def __post_init__(self) -> None:
        if self.decoding not in DECODINGS:
            raise ValueError(f"decoding={self.decoding!r} is unknown: use one of {', '.join(DECODINGS)}.")
        if self.on_unsupported not in ("error", "ar"):
            raise ValueError(f'on_unsupported={self.on_unsupported!r} is unknown: use "error" or "ar".')
        for name, high in (("num_diffusion_steps", MAX_DIFFUSION_STEPS), ("max_tool_calls", None)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (high and value > high):
                raise ValueError(
                    f"{name}={value!r} is out of range: use a whole number from 1{f' to {high}' if high else ''}."
                )
        threshold = self.tool_call_threshold
        if threshold is not None and not (isinstance(threshold, (int, float)) and 0 <= threshold <= 1):
            raise ValueError(f"tool_call_threshold={threshold!r} is no probability: use a number from 0 to 1, or None.")


def context_of(config: Any) -> int | None:
    """The length of the base's context in tokens, where its config states one."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def choose_tools(tools: Sequence[dict[str, Any]], tool_choice: Any) -> tuple[list[dict[str, Any]], bool]:
    """Apply `tool_choice` to the tools.

    Args:
        tools: normalised tools.
        tool_choice: as in the OpenAI API.

    Returns:
        The tools that may be called, and whether one must be.

    Raises:
        ValueError: an unknown `tool_choice`, one that names no given tool, or `"required"` without tools.
    """
    names = [tool["function"]["name"] for tool in tools]
    if tool_choice in (None, "auto"):
        return list(tools), False
    if tool_choice == "none":
        return [], False
    if tool_choice == "required":
        if not tools:
            raise ValueError('tool_choice="required" needs at least one tool: pass tools=[...].')
        return list(tools), True
    wanted = (
        tool_choice.get("function") if isinstance(tool_choice, dict) and tool_choice.get("type") == "function" else None
    )
    if not isinstance(wanted, dict) or not isinstance(wanted.get("name"), str):
        raise ValueError(
            f'tool_choice={tool_choice!r} is unknown: use "auto", "none", "required" or '
            '{"type": "function", "function": {"name": ...}}.'
        )
    if wanted["name"] not in names:
        raise ValueError(
            f"tool_choice names {wanted['name']!r}, which is not among the tools: {', '.join(names) or 'none given'}."
        )
    return [tools[names.index(wanted["name"])]], True


# ---------------------------------------------------------------------------------------------------------------------
# Drafting
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Draft:
    """A drafted call.

    Args:
        arguments: the arguments it stands for.
        texts: text of each slot of the layout; None where the slot is not alive.
        overflowing: indices of slots whose value may go on behind the slot, and of arrays at their budget.
    """

    arguments: dict[str, Any]
    texts: list[str | None]
    overflowing: list[int]


# Canvas ids [positions], slot positions [n] and the fraction still masked -> log-probabilities [n, vocab + 2].
Predictor = Callable[[Tensor, Tensor, float], Tensor]


def denoise(
    canvas: Canvas,
    observed: Sequence[Observed | None],
    predict: Predictor,
    steps: int,
    on_step: Callable[[Tensor], None] | None = None,
) -> Draft | None:
    """Fill a canvas in a few S3 remasking steps. Source: arXiv 2507.04504, with joint commits instead of per-position
    ones.

    The first step decides structure (presence, lengths); every step then proposes the best string of each slot given
    what is committed, and commits the most confident `ceil(masked / steps left)` positions. A NULL is never more
    confident than the content before it.

    Args:
        canvas: the call laid out; its slots are masked.
        observed: per slot what is known of its text already, or None.
        predict: the drafter.
        steps: denoising steps.
        on_step: sees the canvas ids after each step.

    Returns:
        The draft, or None where what is observed fits no string of its slot.
    """
    state = _CanvasState(canvas, observed)
    positions = torch.cat(
        [torch.arange(slot.start, slot.start + slot.length) for slot in canvas.slots] or [torch.arange(0)]
    )
    for step in range(steps):
        masked = int((state.ids[positions] == canvas.mask_id).sum())
        if masked == 0:
            break
        log_probs = predict(state.ids, positions.to(state.ids.device), masked / len(positions))
        if step == 0 and not state.commit_structure(log_probs):
            return None
        if not state.commit_values(log_probs, steps - step):
            return None
        if on_step is not None:
            on_step(state.ids)
    return state.draft()


class _CanvasState:
    """The canvas while it is filled. `ids` holds committed tokens, MASK elsewhere."""

    def __init__(self, canvas: Canvas, observed: Sequence[Observed | None]) -> None:
        self.canvas = canvas
        self.ids = canvas.token_ids.clone()
        self.decided: dict[int, int] = {}
        self.alive = [True] * len(canvas.slots)
        self.offsets: list[int] = []  # of each slot among all slot positions
        total = 0
        for slot, known in zip(canvas.slots, observed, strict=True):
            self.offsets.append(total)
            total += slot.length
            if known is not None:
                tokens = canvas.tokens_of(slot, known.text).to(self.ids.device)
                count = slot.length if known.complete else int((tokens != canvas.null_id).sum())
                self.ids[slot.start : slot.start + count] = tokens[:count]

    def fixed(self, slot: CanvasSlot) -> Tensor:
        """int64 [length]: committed tokens of a slot, -1 where it is free."""
        ids = self.ids[slot.positions]
        return ids.masked_fill(ids == self.canvas.mask_id, -1)

    def rows(self, index: int, log_probs: Tensor) -> Tensor:
        """The slot's part of [slot positions, vocab + 2]."""
        return log_probs[self.offsets[index] : self.offsets[index] + self.canvas.slots[index].length]

    def commit_structure(self, log_probs: Tensor) -> bool:
        """Decide presence and lengths, outer before inner; dead slots become NULL. False: contradiction."""
        for index, slot in enumerate(self.canvas.slots):
            conditions = slot.slot.alive_if
            self.alive[index] = all(low <= self.decided[control] <= high for control, low, high in conditions)
            if not self.alive[index]:
                self.ids[slot.positions] = self.canvas.null_id
                self.decided[index] = -1  # in no range, so what depends on it is not alive either
            elif slot.slot.role not in ("value", "key"):
                commit = commit_slot(slot, self.rows(index, log_probs), self.fixed(slot), self.canvas.null_id)
                if commit is None:
                    return False
                self.ids[slot.positions] = commit.tokens
                self.decided[index] = slot.slot.decision(self.canvas.text(slot, commit.tokens))
        return True

    def commit_values(self, log_probs: Tensor, steps_left: int) -> bool:
        """Commit the most confident share of the masked positions. False: what is committed fits no string."""
        places, tokens, confidences = [], [], []
        fixed = [self.fixed(slot) for slot in self.canvas.slots]
        indices = [index for index, known in enumerate(fixed) if bool((known < 0).any())]
        slots = [self.canvas.slots[index] for index in indices]
        rows = [self.rows(index, log_probs) for index in indices]
        commits = commit_slots(slots, rows, [fixed[index] for index in indices], self.canvas.null_id)
        for index, slot, commit in zip(indices, slots, commits, strict=True):
            if commit is None:
                return False
            free = fixed[index] < 0
            confidence = torch.where(free, commit.confidence, 1.0)
            # A NULL ends the value, so it can be no surer than everything in front of it.
            so_far = confidence.cummin(0).values
            confidence = torch.where(commit.tokens == self.canvas.null_id, so_far, confidence)
            places.append(torch.arange(slot.start, slot.start + slot.length, device=free.device)[free])
            tokens.append(commit.tokens[free])
            confidences.append(confidence[free])
        if places:
            place, token, confidence = torch.cat(places), torch.cat(tokens), torch.cat(confidences)
            keep = confidence.argsort(descending=True, stable=True)[: math.ceil(len(place) / steps_left)]
            self.ids[place[keep]] = token[keep]
        return True

    def text(self, slot: CanvasSlot) -> str:
        """The text of a slot; one that goes on behind it is brought to an end on the shortest way."""
        tokens = self.ids[slot.positions]
        if slot.slot.leaf.automaton is None:
            return self.canvas.text(slot, tokens)
        return slot.slot.leaf.automaton.completed(self.canvas.vocabulary.spell(tokens.tolist())).decode()

    def draft(self) -> Draft:
        texts: list[str | None] = []
        overflowing = []
        for index, slot in enumerate(self.canvas.slots):
            text = self.text(slot) if self.alive[index] else None
            texts.append(text)
            at_budget = slot.slot.open_ended and text == slot.slot.leaf.choices[-1]
            if self.alive[index] and (at_budget or self.canvas.overflows(slot, self.ids[slot.positions])):
                overflowing.append(index)
        arguments = self.canvas.layout.assemble([text if text is not None else "" for text in texts])
        return Draft(arguments, texts, overflowing)


@dataclass(frozen=True)
class HeadDrafter:
    """Drafts calls with the diffusion head over one prompt.

    Args:
        predict_with: the model's `draft_log_probs` bound to the prompt's memory.
        vocabulary: the tokens.
        config: budgets of slots and arrays, ids of MASK and NULL.
    """

    predict_with: Predictor
    vocabulary: Vocabulary
    config: Any

    def draft(
        self,
        scaffold: Scaffold,
        written: str,
        steps: int,
        widen: bool = False,
        on_step: Callable[[Canvas, Tensor], None] | None = None,
    ) -> Draft | None:
        """Draft the arguments of a call that may be partly written.

        Args:
            scaffold: the tool.
            written: JSON text of the arguments so far.
            steps: denoising steps.
            widen: draft again with wider slots and arrays while something overflows.
            on_step: sees canvas and ids after each step.

        Returns:
            The draft, or None where the call is too large to lay out or what is written fits no slot.
        """
        array_budget, widths = self.config.array_budget, dict[int, int]()
        while array_budget <= MAX_ARRAY_BUDGET:
            canvas, observed = self._canvas(scaffold, written, array_budget, widths)
            if canvas is None:
                break
            step = None if on_step is None else partial(on_step, canvas)
            draft = denoise(canvas, observed, self.predict_with, steps, step)
            if draft is None or not (widen and draft.overflowing):
                return draft
            overflowing = [canvas.slots[index] for index in draft.overflowing]
            if any(slot.slot.role == "length" for slot in overflowing):
                # Wider arrays renumber the slots, so their widths start over.
                array_budget, widths = array_budget * 2, {}
                continue
            grown = {
                index: min(slot.length * 2, self.config.max_value_tokens)
                for index, slot in zip(draft.overflowing, overflowing, strict=True)
            }
            if all(slot.length >= self.config.max_value_tokens for slot in overflowing):
                return draft
            widths |= grown
        return None

    def _canvas(
        self, scaffold: Scaffold, written: str, array_budget: int, widths: dict[int, int]
    ) -> tuple[Canvas | None, list[Observed | None]]:
        """The canvas with room for what is written and at least `widths`; None when it would be too large."""
        layout, beyond = None, True
        while beyond and array_budget <= MAX_ARRAY_BUDGET:
            layout = draft_layout(scaffold, array_budget)
            if layout is None:
                return None, []
            observed, beyond = layout.observe(written)
            array_budget *= 2
        if layout is None or beyond:
            return None, []
        budgets = []
        for index, (slot, known) in enumerate(zip(layout.slots, observed, strict=True)):
            default = self.config.string_budget if slot.leaf.kind == "string" else self.config.number_budget
            budget = default if slot.leaf.automaton is None else slot_budget(slot.leaf, default)
            while known is not None and len(self.vocabulary.encode(known.text)) >= budget:
                budget *= 2
            budgets.append(max(budget, widths.get(index, 0)))
        if sum(budgets) > MAX_CANVAS_POSITIONS:
            return None, []
        canvas = build_canvas(self.vocabulary, layout, budgets, self.config.mask_token_id, self.config.null_token_id)
        # Fixed text and long choices count too: the head attends over all of it.
        return (canvas, observed) if len(canvas.token_ids) <= MAX_CANVAS_POSITIONS else (None, [])


# ---------------------------------------------------------------------------------------------------------------------
# One row
# ---------------------------------------------------------------------------------------------------------------------


class _CallRun:
    """Decodes the calls of one row; lives for one request.

    Args:
        model: the model, for forwards of base and head.
        options: decoding options.
        grammar: the calls that are possible.
        prompt_ids: long [prompt], without padding.
        stats: where stages are timed.
    """

    def __init__(
        self, model: Any, options: CallOptions, grammar: ReplyGrammar, prompt_ids: Tensor, stats: GenerationStats
    ):
        self.model = model
        self.options = options
        self.grammar = grammar
        self.vocabulary = grammar.vocabulary
        self.prompt_ids = prompt_ids
        self.stats = stats
        self.trace: list[TraceEvent] = []
        self.cache = DynamicCache(config=model.config.get_text_config())
        self.opening = grammar.opening()
        self.cursor = grammar.start()
        self.reply: list[int] = list(self.opening)
        self.cached = 0  # reply tokens whose keys and values are in the cache
        self.first_drafts: dict[int, Draft | None] = {}  # by the number of the call
        self.vain_drafts: dict[int, int] = {}  # in a row, by the number of the call
        self.drafter: HeadDrafter | None = None
        self.name_logits: Tensor | None = None

    # --------------------------------------------------------------- forwards

    def prefill(self) -> Tensor:
        """Base forward 1: prompt and forced opening.

        Returns:
            float [vocab], the logits behind the prompt, which route; those behind the opening are kept for the name.
        """
        self.require_room()
        with self.stats.timed("prefill"):
            ids = torch.cat([self.prompt_ids, self.prompt_ids.new_tensor(self.opening)])
            length = len(self.prompt_ids)
            drafts = self.options.decoding != "ar"
            keep = torch.tensor([length - 1, len(ids) - 1], device=ids.device)
            output = self.model.base(
                input_ids=ids[None],
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=keep,
                output_hidden_states=drafts,
            )
            if drafts:
                states = tuple(layer[:, :length] for layer in output.hidden_states)
                prompt = self.prompt_ids[None]
                memory = self.model.prompt_memory(states, prompt, torch.ones_like(prompt))
                self.drafter = HeadDrafter(self._predictor(memory), self.vocabulary, self.model.config)
            self.cached = len(self.opening)
            self.name_logits = output.logits[0, 1]
            return output.logits[0, 0]

    def route(self, must_call: bool) -> bool:
        """Run the prompt and decide between calling and talking.

        Args:
            must_call: a call is asked for, whatever the base prefers.
        """
        logits = self.prefill().float()
        probability = float(logits.softmax(-1)[self.vocabulary.call_start])
        if self.options.tool_call_threshold is None:
            prefers = int(logits.argmax()) == self.vocabulary.call_start
        else:
            prefers = probability >= self.options.tool_call_threshold
        calls = must_call or prefers
        data = {"mode": "tool" if calls else "chat", "probability": probability, "forced": must_call}
        self.trace.append(TraceEvent("route", data))
        return calls

    def _predictor(self, memory: PromptMemory) -> Predictor:
        def predict(ids: Tensor, positions: Tensor, masked: float) -> Tensor:
            return self.model.draft_log_probs(
                memory,
                ids[None],
                torch.ones_like(ids, dtype=torch.bool)[None],
                positions[None],
                torch.tensor([masked], dtype=torch.float32, device=ids.device),
            )[0]

        return predict

    def forward(self, tokens: Sequence[int]) -> Tensor:
        """One cached forward of the base over reply tokens: logits [len(tokens), vocab]."""
        ids = self.prompt_ids.new_tensor(tokens)[None]
        return self.model.base(input_ids=ids, past_key_values=self.cache, use_cache=True).logits[0]

    # --------------------------------------------------------------- decoding

    def decode(self) -> list[int]:
        """Decode until the reply is complete.

        Returns:
            The reply's tokens, `<tool_call>` to `<|im_end|>`.
        """
        assert self.name_logits is not None
        self.commit_forced()
        if not self.cursor.finished and self.cached == len(self.reply):
            self.commit(self.cursor.choose(self.name_logits))
            self.commit_forced()
        while not self.cursor.finished:
            if self.options.decoding == "diffusion" and self.cursor.tool and self.cursor.calls not in self.first_drafts:
                self.accept_draft()
            else:
                self.verify(self.draft() if self.options.decoding == "verified" else [])
        self.stats.calls, self.stats.cut = self.cursor.calls, self.cursor.cut
        if self.stats.cut:
            logger.warning(
                f"Values reached their limit of length and were ended there: {', '.join(map(repr, self.stats.cut))}."
            )
        self.count_slots()
        return self.reply

    def commit(self, token: int) -> None:
        """Append one token that the grammar allows."""
        cursor = self.cursor.advance(token)
        assert cursor is not None, "only tokens of the grammar are committed"
        self.cursor = cursor
        self.reply.append(token)

    def commit_forced(self) -> None:
        """Append tokens while the grammar leaves no choice (jump-forward)."""
        while not self.cursor.finished and (token := self.cursor.forced()) is not None:
            self.commit(token)

    def verify(self, draft: Sequence[int]) -> None:
        """One forward of the base over what is pending and a draft; keeps the draft up to the first token the base
        would not choose.

        At least one choice is made, the same as without a draft, so drafts can only save forwards.
        """
        self.require_room()
        with self.stats.timed("verify"):
            pending = self.reply[self.cached :]
            logits = self.forward([*pending, *draft])
            call, accepted, saved = self.cursor.calls, 0, 0
            while not self.cursor.finished:
                forced = self.cursor.forced()
                token = self.cursor.choose(logits[len(pending) - 1 + accepted]) if forced is None else forced
                self.commit(token)
                if accepted == len(draft) or token != draft[accepted]:
                    break
                accepted += 1
                saved += forced is None
            if draft:
                self.vain_drafts[call] = 0 if saved else self.vain_drafts.get(call, 0) + 1
            drop = len(draft) - accepted
            if drop:
                self.cache.crop(-drop)
            self.cached += len(pending) + accepted
            self.commit_forced()
        if self.options.output_trace:
            decode = self.vocabulary.tokenizer.decode
            chosen = self.reply[self.cached : self.cached + 1] if drop else []
            texts = {"accepted": draft[:accepted], "drafted": draft[accepted : accepted + 1], "chosen": chosen}
            self.trace.append(TraceEvent("verify", {name: decode(tokens) for name, tokens in texts.items()}))

    def draft(self) -> list[int]:
        """Tokens that may complete the current call; empty while its tool is open or where drafting does not pay."""
        tool = self.cursor.tool
        if tool is None or self.drafter is None or self.vain_drafts.get(self.cursor.calls, 0) >= MAX_VAIN_DRAFTS:
            return []
        with self.stats.timed("draft"):
            written = self.current_call()
            first = self.cursor.calls not in self.first_drafts
            # A redraft behind a correction only fills in what is left; one step is enough for it.
            steps = self.options.num_diffusion_steps if first else 1
            draft = self.drafter.draft(tool, self.arguments_text(written), steps, on_step=self.on_step)
            self.first_drafts.setdefault(self.cursor.calls, draft)
            if draft is None:
                return []
            tokens = call_continuation(self.vocabulary, tool, draft.arguments, written)
            return self.cursor.follow(tokens[: self.room()])

    def room(self) -> int | None:
        """How many tokens fit into the base's context behind the reply so far; None where it has no limit."""
        context = context_of(self.model.config)
        return None if context is None else max(0, context - len(self.prompt_ids) - len(self.reply))

    def require_room(self) -> None:
        """Refuse to run the base past its context, which some bases cannot do at all."""
        if self.room() == 0:
            raise ValueError(
                f"The prompt of {len(self.prompt_ids)} tokens leaves too little of the context of "
                f"{context_of(self.model.config)} for the call: shorten it, drop tools, or allow fewer calls."
            )

    def accept_draft(self) -> None:
        """Write the rest of the current call from a draft, unchecked; what cannot be drafted is left to the base.

        That is a call too large to lay out, and what lies behind a value or a call that reaches its limit of length.
        """
        tool = self.cursor.tool
        assert tool is not None
        assert self.drafter is not None
        with self.stats.timed("draft"):
            written, calls = self.current_call(), self.cursor.calls
            draft = self.drafter.draft(
                tool, self.arguments_text(written), self.options.num_diffusion_steps, widen=True, on_step=self.on_step
            )
            self.first_drafts[calls] = draft
            if draft is None:
                logger.warning(
                    f"Tool {tool.tool!r} is too large to be drafted at once; the base writes this call by itself."
                )
                return
            for token in self.cursor.follow(call_continuation(self.vocabulary, tool, draft.arguments, written)):
                self.commit(token)
            self.commit_forced()

    def on_step(self, canvas: Canvas, ids: Tensor) -> None:
        """Keep a denoising step for viewers."""
        if self.options.output_trace:
            self.trace.append(TraceEvent("draft", {"call": self.cursor.calls, "canvas": canvas.view(ids)}))

    def current_call(self) -> bytes:
        """Bytes of the call being written, from behind `<tool_call>`."""
        start = len(self.reply) - 1 - self.reply[::-1].index(self.vocabulary.call_start)
        return self.vocabulary.spell(self.reply[start + 1 :])

    def arguments_text(self, written: bytes) -> str:
        """The arguments' part of a partly written call; a character cut in the middle is left out."""
        opening = written.find(b'", "arguments": ')
        return "" if opening < 0 else written[opening + len(b'", "arguments": ') :].decode(errors="ignore")

    def count_slots(self) -> None:
        """Compare the first draft of each call with what became of it."""
        for index, call in enumerate(parse_calls(self.vocabulary, self.reply)):
            draft = self.first_drafts.get(index)
            scaffold = next(scaffold for scaffold in self.grammar.scaffolds if scaffold.tool == call["name"])
            layout = draft_layout(scaffold, self.model.config.array_budget)
            if draft is None or layout is None:
                continue
            values = [number for number, slot in enumerate(layout.slots) if slot.role in ("value", "key")]
            try:
                final, drafted = layout.texts(call["arguments"]), layout.texts(draft.arguments)
            except ValueError:
                continue  # it went beyond what is laid out for a drafter
            alive = [number for number in values if drafted[number] is not None]
            self.stats.drafted_slots += len(alive)
            self.stats.accepted_slots += sum(drafted[number] == final[number] for number in alive)


def parse_calls(vocabulary: Vocabulary, reply: Sequence[int]) -> list[dict[str, Any]]:
    """The calls of a reply, found by the ids of their special tokens.

    Args:
        vocabulary: the tokens.
        reply: token ids.

    Returns:
        `{"name": ..., "arguments": {...}}` of each complete call.
    """
    calls = []
    start = None
    for index, token in enumerate(reply):
        if token == vocabulary.call_start:
            start = index + 1
        elif token == vocabulary.call_end and start is not None:
            calls.append(json.loads(vocabulary.spell(reply[start:index])))
            start = None
    return calls


# ---------------------------------------------------------------------------------------------------------------------
# The mixin
# ---------------------------------------------------------------------------------------------------------------------


class SchemaGenerationMixin:
    """`generate` and `respond` of the model, which brings `base`, `diffusion_head` and their calls."""

    config: Any
    generation_config: Any
    device: torch.device
    base: torch.nn.Module
    diffusion_head: torch.nn.Module

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        tools: Sequence[Any] | None = None,
        tokenizer: PreTrainedTokenizerFast | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate a reply: tool calls by scaffold, draft and verification, everything else as the base alone.

        Args:
            inputs: long [batch, prompt], or `input_ids` among the keyword arguments.
            generation_config: as in transformers; may hold our options as fields.
            tools: tools of all rows, or a list of lists, one a row; None reads them out of the prompt's `<tools>`
                block.
            tokenizer: the tokenizer that made the prompt; None loads the one that lies beside the model.
            kwargs: our options (see `CallOptions`) and whatever transformers' `generate` takes, which applies to text
                replies.

        Returns:
            Long [batch, prompt + reply], shorter rows padded on the right; with `return_dict_in_generate=True` a
            `SchemaGenerateOutput`.

        Raises:
            ValueError: an unknown option, faulty tools, or a prompt longer than the context.
            UnsupportedSchemaError: a tool's schema asks for what cannot be guaranteed.
        """
        options = self._call_options(generation_config, kwargs)
        input_ids = inputs if inputs is not None else kwargs.get("input_ids")
        tokenizer = tokenizer if tokenizer is not None else self._own_tokenizer()
        if kwargs.get("stop_strings") is not None:
            kwargs["tokenizer"] = tokenizer
        rows = None if input_ids is None else self._tools_of_rows(tools, tokenizer, input_ids)
        if input_ids is None or tokenizer is None or rows is None or not any(rows):
            choose_tools([], options.tool_choice)
            return super().generate(inputs, generation_config, **kwargs)  # type: ignore[misc]
        kwargs.pop("input_ids", None)
        return self._generate_rows(input_ids, rows, tokenizer, options, generation_config, kwargs)

    def respond(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tokenizer: PreTrainedTokenizerFast,
        tools: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> Reply:
        """Answer a conversation: template, `generate` and parsing in one call.

        Args:
            messages: the conversation, OpenAI style; at least one message.
            tokenizer: this model's tokenizer.
            tools: tools as in `generate`.
            kwargs: as in `generate`; `enable_thinking` and `date` go to the chat template.

        Returns:
            The reply.

        Raises:
            ValueError: as `generate`; also an empty list of messages.
        """
        if not messages:
            raise ValueError("The list of messages is empty: pass at least one message.")
        template = {name: kwargs.pop(name) for name in ("enable_thinking", "date") if name in kwargs}
        normalised = normalise_tools(tools)
        encoded = tokenizer.apply_chat_template(
            list(messages),
            tools=normalised or None,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            **template,
        ).to(self.device)
        kwargs["return_dict_in_generate"] = True
        stats = GenerationStats()
        with self._counted(stats):
            output = self.generate(**encoded, tools=normalised, tokenizer=tokenizer, **kwargs)
        prompt_length = encoded["input_ids"].shape[1]
        ids = output.sequences[0, prompt_length:].tolist()
        row_stats = getattr(output, "stats", None)
        trace = getattr(output, "trace", None)
        return _reply(ids, self._vocabulary(tokenizer), row_stats[0] if row_stats else stats, trace[0] if trace else [])

    # --------------------------------------------------------------- parts

    def _call_options(self, generation_config: GenerationConfig | None, kwargs: dict[str, Any]) -> CallOptions:
        """Take our options out of the keyword arguments; what is not given comes from the generation configs."""
        configs = (generation_config, getattr(self, "generation_config", None))
        values = {}
        for name in CallOptions.__dataclass_fields__:
            given = [kwargs.pop(name, None), *(getattr(config, name, None) for config in configs)]
            value = next((value for value in given if value is not None), None)
            if value is not None:
                values[name] = value
        return CallOptions(**values)

    def _own_tokenizer(self) -> PreTrainedTokenizerFast | None:
        """The tokenizer in the model's own folder or repo, if there is one; looked for once."""
        if not hasattr(self, "_tokenizer_beside"):
            source = self.config.name_or_path
            try:
                found = AutoTokenizer.from_pretrained(source, trust_remote_code=False) if source else None
            except (OSError, ValueError):
                found = None
            self._tokenizer_beside = found
        return self._tokenizer_beside

    def _tools_of_rows(
        self, tools: Sequence[Any] | None, tokenizer: PreTrainedTokenizerFast | None, input_ids: Tensor
    ) -> list[list[dict[str, Any]]] | None:
        """Normalised tools of every row; None where there can be none because no tokenizer is known."""
        if tokenizer is None:
            if tools:
                raise ValueError("Tool calls need the tokenizer that made the prompt: pass tokenizer=...")
            return None
        if tools is None:
            return [tools_from_prompt_ids(tokenizer, row) or [] for row in input_ids.tolist()]
        if isinstance(tools, (list, tuple)) and tools and all(isinstance(row, (list, tuple)) for row in tools):
            if len(tools) != len(input_ids):
                raise ValueError(f"{len(tools)} lists of tools for {len(input_ids)} prompts: give one list a prompt.")
            return [normalise_tools(row) for row in tools]
        return [normalise_tools(tools)] * len(input_ids)

    def _generate_rows(
        self,
        input_ids: Tensor,
        rows: list[list[dict[str, Any]]],
        tokenizer: PreTrainedTokenizerFast,
        options: CallOptions,
        generation_config: GenerationConfig | None,
        kwargs: dict[str, Any],
    ) -> Any:
        attention_mask = kwargs.pop("attention_mask", None)
        streamer = kwargs.pop("streamer", None)
        if streamer is not None and len(rows) > 1:
            raise ValueError("A streamer follows one reply: generate one row at a time, or leave the streamer out.")
        as_dict = kwargs.pop("return_dict_in_generate", None)
        if as_dict is None:
            as_dict = bool(getattr(generation_config or self.generation_config, "return_dict_in_generate", False))
        replies, all_stats, traces = [], [], []
        for index, row in enumerate(input_ids):
            prompt = row if attention_mask is None else row[attention_mask[index].bool()]
            stats = GenerationStats()
            with self._counted(stats):
                reply, trace = self._generate_row(
                    prompt, rows[index], tokenizer, options, stats, generation_config, {**kwargs, "streamer": streamer}
                )
            replies.append(reply)
            all_stats.append(stats)
            traces.append(trace)
        longest = max(map(len, replies))
        pad = tokenizer.pad_token_id
        padded = input_ids.new_tensor([reply + [pad] * (longest - len(reply)) for reply in replies])
        sequences = torch.cat([input_ids, padded], dim=1)
        if not as_dict:
            return sequences
        return SchemaGenerateOutput(
            sequences=sequences, stats=all_stats, trace=traces if options.output_trace else None
        )

    def _generate_row(
        self,
        prompt: Tensor,
        tools: list[dict[str, Any]],
        tokenizer: PreTrainedTokenizerFast,
        options: CallOptions,
        stats: GenerationStats,
        generation_config: GenerationConfig | None,
        kwargs: dict[str, Any],
    ) -> tuple[list[int], list[TraceEvent]]:
        """One row, without padding: its reply and trace."""
        callable_tools, must_call = choose_tools(tools, options.tool_choice)
        # Whoever decides against a call for the base must also keep it from writing one as free text.
        forbids = options.tool_choice == "none" or options.tool_call_threshold is not None
        if tools and forbids:
            config = generation_config or self.generation_config
            suppressed = kwargs.get("suppress_tokens") or getattr(config, "suppress_tokens", None) or []
            kwargs["suppress_tokens"] = [*suppressed, self._vocabulary(tokenizer).call_start]
        if not callable_tools:
            return self._chat(prompt, None, stats, generation_config, kwargs), []
        with stats.timed("scaffold"):
            grammar = self._reply_grammar(len(prompt), callable_tools, tokenizer, options)
        run = _CallRun(self, options, grammar, prompt, stats)
        if not run.route(must_call):
            # The last prompt token is run again, so that generation starts from its logits.
            run.cache.crop(-(len(run.opening) + 1))
            return self._chat(prompt, run.cache, stats, generation_config, kwargs), run.trace
        reply = run.decode()
        if (streamer := kwargs.get("streamer")) is not None:
            streamer.put(prompt[None].cpu())
            streamer.put(torch.tensor(reply))
            streamer.end()
        return reply, run.trace

    def _reply_grammar(
        self, prompt_length: int, tools: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast, options: CallOptions
    ) -> ReplyGrammar:
        """The calls that are possible behind a prompt."""
        limit, reply_limit = self.config.max_call_tokens, None
        context = context_of(self.config)
        if context is not None:
            if prompt_length >= context:
                raise ValueError(
                    f"The prompt has {prompt_length} tokens, the model's context {context}: shorten it or drop tools."
                )
            # The last call may begin in the middle of what is left, and what its schema requires comes on top.
            reply_limit = (context - prompt_length) // 2
            limit = min(limit, max(1, reply_limit // 2))
        scaffolds = [compile_scaffold(tool, options.on_unsupported) for tool in tools]
        return ReplyGrammar(
            self._vocabulary(tokenizer),
            scaffolds,
            options.max_tool_calls,
            self.config.max_value_tokens,
            limit,
            reply_limit,
        )

    def _chat(
        self,
        prompt: Tensor,
        cache: DynamicCache | None,
        stats: GenerationStats,
        generation_config: GenerationConfig | None,
        kwargs: dict[str, Any],
    ) -> list[int]:
        """Ordinary generation of one row, on what is cached of its prompt."""
        with stats.timed("chat"):
            output = super().generate(  # type: ignore[misc]
                prompt[None],
                generation_config,
                attention_mask=torch.ones_like(prompt)[None],
                past_key_values=cache,
                return_dict_in_generate=False,
                **kwargs,
            )
        return output[0, len(prompt) :].tolist()

    def _vocabulary(self, tokenizer: PreTrainedTokenizerFast) -> Vocabulary:
        """The tokenizer seen as bytes, with what is compiled for it; the last one is kept."""
        device, size = self.device, self.config.get_text_config().vocab_size
        known: Vocabulary | None = getattr(self, "_last_vocabulary", None)
        if known is None or known.tokenizer is not tokenizer or known.size != size or known.device != device:
            known = self._last_vocabulary = Vocabulary(tokenizer, size, device)
        return known

    @contextmanager
    def _counted(self, stats: GenerationStats) -> Iterator[None]:
        """Count forwards of base and head while the block runs, by hooks on the modules."""

        def count_base(*_: Any) -> None:
            stats.base_forwards += 1

        def count_head(*_: Any) -> None:
            stats.head_forwards += 1

        hooks = [
            self.base.register_forward_hook(count_base),
            self.diffusion_head.register_forward_hook(count_head),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _reply(ids: list[int], vocabulary: Vocabulary, stats: GenerationStats, trace: list[TraceEvent]) -> Reply:
    """Turn reply tokens into a message."""
    tokenizer = vocabulary.tokenizer
    calls = parse_calls(vocabulary, ids) if stats.calls else []
    text = tokenizer.decode(ids[: ids.index(vocabulary.call_start)] if calls else ids, skip_special_tokens=True)
    message: dict[str, Any] = {"role": "assistant", "content": text.strip()}
    mode = "chat"
    if THINK_END_TOKEN in text:
        thought, _, rest = text.partition(THINK_END_TOKEN)
        message["reasoning_content"] = thought.replace(THINK_TOKEN, "").strip()
        message["content"] = rest.strip()
        mode = "think"
    if calls:
        message["tool_calls"] = [{"type": "function", "function": call} for call in calls]
        mode = "tool"
    return Reply(mode, message, stats, ids, trace)
