"""Writing the calls of one reply: drafts, their verification, and the autoregressive reference, as one loop.

Takes a grammar and a drafter; a `CallWriter` is a generator that asks for forwards of the base and of the head and is
sent what they gave, so that whoever runs it can answer many rows with one forward. Knows no model and no batch.
"""

import json
import re
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.utils import logging

from .drafting import Draft, Drafter, Drafting, DraftTask, HeadRequest
from .reply_grammar import Cursor, ReplyGrammar, call_continuation
from .scaffold_layout import DraftSlot, draft_layout
from .schema_scaffold import Scaffold
from .slot_grammar import Canvas, Vocabulary

logger = logging.get_logger(__name__)

# What is written of a call ends inside a string, some of which is there, or behind what may be half a number or word.
_BREAKS_OFF = re.compile(rb'(?:[^"]|"(?:[^"\\]|\\.)*+")*+(?:(?<=[-+.\w])|"(?=.)(?:[^"\\]|\\.)*+\\?)', re.DOTALL)
# Drafts of the head in a row that saved nothing, after which the base writes the rest of the call by itself.
MAX_VAIN_DRAFTS = 3


# Slots that decide on the structure of a call and hold no value of it.
STRUCTURE_KINDS = ("presence", "length", "branch")


@dataclass(frozen=True)
class DraftedSlot:
    """One slot of the first draft of a call, and what became of it.

    Args:
        path: JSON pointer of its value inside the arguments, such as `/days/0`.
        kind: see `slot_kind`.
        drafted: its text in the draft: raw contents of strings, JSON otherwise.
        final: its text in the final call; None where that call has no such slot.
    """

    path: str
    kind: str
    drafted: str
    final: str | None

    @property
    def accepted(self) -> bool:
        """Whether it stands unchanged."""
        return self.drafted == self.final


def slot_kind(slot: DraftSlot) -> str:
    """What a slot holds: `"string"`, `"integer"`, `"number"`, `"boolean"`, `"enum"` (of any closed set), or the `"key"`
    of a freely named property; or one of `STRUCTURE_KINDS`."""
    if slot.role != "value":
        return slot.role
    if slot.leaf.kind != "choice":
        return slot.leaf.kind
    boolean = not slot.leaf.quoted and {"true", "false"}.issuperset(slot.leaf.choices)
    return "boolean" if boolean else "enum"


@dataclass
class GenerationStats:
    """What one request cost; forwards are counted by hooks on the modules, those of a batch for each of its rows.

    Args:
        base_forwards, head_forwards: forwards of the base and of the head.
        calls: calls that the grammar made; what looks like a call in free text is text.
        slots: what became of the first draft of each call, slot by slot.
        cut: JSON pointers (in the tool's schema) of values that were ended by the limit of their length; an empty
            pointer for a call.
        seconds: wall time per stage: scaffold, prefill, adapter (where the model has a draft adapter), draft, verify,
            text.
    """

    base_forwards: int = 0
    head_forwards: int = 0
    calls: int = 0
    slots: list[DraftedSlot] = field(default_factory=list, repr=False)
    cut: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def drafted_slots(self) -> int:
        """Values in the first draft of each call."""
        return sum(slot.kind not in STRUCTURE_KINDS for slot in self.slots)

    @property
    def accepted_slots(self) -> int:
        """Those of them that stand unchanged in the final call."""
        return sum(slot.accepted for slot in self.slots if slot.kind not in STRUCTURE_KINDS)

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
class BaseRequest:
    """One forward of the base that a row asks for.

    Args:
        tokens: what to run behind what is cached.
        keep: places in `tokens` whose logits are wanted, ascending; at least one.
        rejected: set by whoever asked, when the answer was read: so many tokens at the end are to be forgotten.
    """

    tokens: list[int]
    keep: list[int]
    rejected: int = 0


# Is sent [n, vocab] logits of the places asked for, or the head's log-probabilities.
Writing = Generator[BaseRequest | HeadRequest, Tensor, None]


class Chooser(Protocol):
    """Chooses a token where the grammar leaves a choice."""

    def __call__(self, cursor: Cursor, logits: Tensor) -> int:
        """A token that the cursor allows, given the base's logits [vocab]."""
        ...


def choose_best(cursor: Cursor, logits: Tensor) -> int:
    """The constrained argmax; see `Cursor.choose`."""
    return cursor.choose(logits)


class Sampler:
    """Draws from the base's distribution over what the grammar allows.

    A draft is one fixed text, so its tokens stand exactly when they equal the draw: token x with the probability p(x)
    that the base gives it, and otherwise the draw has the distribution of p without x. That is speculative sampling
    (arXiv 2211.17192) with a proposal that puts everything on one token; the reply has the distribution of sampling
    without drafts and, for one seed, the same tokens.

    Args:
        warpers: temperature, top-k and the like, in order: each maps (ids, scores [1, vocab]) to scores.
        seed: of the draws.
    """

    def __init__(self, warpers: Sequence[Callable[[Any, Tensor], Tensor]], seed: int) -> None:
        self.warpers = tuple(warpers)
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, cursor: Cursor, logits: Tensor) -> int:
        lowest = torch.finfo(torch.float32).min
        scores = logits.float().nan_to_num(nan=lowest, neginf=lowest)
        return self.draw(scores.masked_fill(~cursor.mask(), float("-inf")))

    def draw(self, scores: Tensor) -> int:
        """Draw from scores [vocab], whatever they allow."""
        # Relative to the best, so that no warper takes all of them out of the range of numbers.
        warped = (scores.float() - scores.float().max())[None]
        for warper in self.warpers:
            warped = warper(None, warped)
        return int(torch.multinomial(warped[0].softmax(-1).cpu(), 1, generator=self.generator))


class CallWriter:
    """Writes the calls of one row.

    Args:
        grammar: the calls that are possible.
        context_ids: everything in front of the reply's first call.
        drafter: who drafts; None is the autoregressive reference.
        unchecked: take drafts as they are, without the base's check.
        steps: denoising steps of the first draft of a call.
        choose: chooses where the grammar leaves a choice.
        room: tokens that fit into the base's context behind `context_ids`; None is no limit.
        stats: where time is added up.
        trace: where events are kept; None keeps none.
        on_tokens: is handed the reply's tokens in order as they become final, whole names and values at a time.
        on_draft: sees canvas, ids and what is written of the arguments after each denoising step.
    """

    def __init__(
        self,
        grammar: ReplyGrammar,
        context_ids: Sequence[int],
        *,
        drafter: Drafter | None,
        unchecked: bool,
        steps: int,
        choose: Chooser,
        room: int | None,
        stats: GenerationStats,
        trace: list[TraceEvent] | None = None,
        on_tokens: Callable[[list[int]], None] | None = None,
        on_draft: Callable[[Canvas, Tensor, str], None] | None = None,
        array_budget: int = 1,
    ) -> None:
        self.grammar = grammar
        self.vocabulary = grammar.vocabulary
        self.context_ids = context_ids
        self.drafter = drafter
        self.unchecked = unchecked
        self.steps = steps
        self.choose = choose
        self.limit = room
        self.stats = stats
        self.trace = trace
        self.on_tokens = on_tokens
        self.on_draft = on_draft
        self.array_budget = array_budget
        self.cursor = grammar.start()
        self.reply: list[int] = grammar.opening()
        self.cached = len(self.reply)  # reply tokens whose keys and values are in the cache
        self.told = 0  # reply tokens that were handed to `on_tokens`
        self.drafted: dict[int, dict[str, Any] | None] = {}  # arguments of the first draft, by the number of the call
        self.before: dict[int, dict[str, Any]] = {}  # and of the last one
        self.head_asked = False  # by the last draft
        self.vain_drafts: dict[int, int] = {}  # in a row, by the number of the call

    def write(self, name_logits: Tensor) -> Writing:
        """Write until the reply is complete: `reply` then goes from `<tool_call>` to `<|im_end|>`.

        Args:
            name_logits: [vocab], behind the forced opening of the first call.
        """
        self.commit_forced()
        if not self.cursor.finished and self.cached == len(self.reply):
            self.commit(self.choose(self.cursor, name_logits))
            self.commit_forced()
        while not self.cursor.finished:
            if self.unchecked and self.cursor.tool and self.cursor.calls not in self.drafted:
                yield from self.accept_draft()
            elif self.unchecked or self.drafter is None:
                yield from self.verify([], [])
            else:
                yield from self.verify(*(yield from self.draft()))
        self.tell()
        self.stats.calls, self.stats.cut = self.cursor.calls, self.cursor.cut
        if self.stats.cut:
            logger.warning(
                f"Values reached their limit of length and were ended there: {', '.join(map(repr, self.stats.cut))}."
            )
        self.count_slots()

    # --------------------------------------------------------------- committing

    def commit(self, token: int, cursor: Cursor | None = None) -> None:
        """Append one token that the grammar allows; `cursor` is the one behind it where it is known."""
        behind = self.cursor.advance(token) if cursor is None else cursor
        assert behind is not None, "only tokens of the grammar are committed"
        self.cursor = behind
        self.reply.append(token)
        if self.on_tokens is not None and not behind.in_value and not breaks_off(self.current_call()):
            self.tell()

    def commit_forced(self) -> None:
        """Append tokens while the grammar leaves no choice (jump-forward)."""
        while not self.cursor.finished and (token := self.cursor.forced()) is not None:
            self.commit(token)

    def tell(self) -> None:
        """Hand on what is final and was not handed on yet."""
        if self.on_tokens is not None and self.told < len(self.reply):
            self.on_tokens(self.reply[self.told :])
            self.told = len(self.reply)

    # --------------------------------------------------------------- verification

    def verify(self, draft: Sequence[int], behind: Sequence[Cursor]) -> Writing:
        """One forward of the base over what is pending and a draft; keeps the draft up to the first token the base
        would not choose.

        At least one choice is made, the same as without a draft, so drafts can only save forwards.

        Args:
            draft: tokens that the grammar allows behind the reply.
            behind: the cursor behind each of them.
        """
        self.require_room()
        pending, cursors = self.reply[self.cached :], [self.cursor, *behind]
        # Logits are wanted only where the grammar leaves a choice, and behind the last token.
        open_places = [place for place, cursor in enumerate(cursors[:-1]) if cursor.forced() is None]
        open_places.append(len(draft))
        request = BaseRequest([*pending, *draft], [len(pending) - 1 + place for place in open_places])
        logits = yield request
        with self.stats.timed("verify"):
            accepted = self.accept(draft, cursors, dict(zip(open_places, logits, strict=True)))
            request.rejected = len(draft) - accepted
            self.cached += len(pending) + accepted
            chosen = self.reply[self.cached : self.cached + 1] if request.rejected else []
            self.commit_forced()
        if self.trace is not None:
            decode = self.vocabulary.tokenizer.decode
            texts = {"accepted": draft[:accepted], "drafted": draft[accepted : accepted + 1], "chosen": chosen}
            self.trace.append(TraceEvent("verify", {name: decode(list(tokens)) for name, tokens in texts.items()}))

    def accept(self, draft: Sequence[int], cursors: Sequence[Cursor], logits: dict[int, Tensor]) -> int:
        """Commit the draft up to the first other choice, and that choice.

        Args:
            draft: the tokens.
            cursors: in front of the first token and behind each.
            logits: by the number of tokens in front.

        Returns:
            How many tokens of the draft stand.
        """
        call, accepted = self.cursor.calls, 0
        while not self.cursor.finished:
            forced = self.cursor.forced()
            token = self.choose(self.cursor, logits[accepted]) if forced is None else forced
            if accepted == len(draft) or token != draft[accepted]:
                self.commit(token)
                break
            accepted += 1
            self.commit(token, cursors[accepted])
        if draft and self.head_asked:
            # What is forced was committed before: a draft begins with a choice, so one token of it saves a forward.
            self.vain_drafts[call] = 0 if accepted else self.vain_drafts.get(call, 0) + 1
        return accepted

    def room(self) -> int | None:
        """How many tokens fit into the base's context behind the reply so far; None where it has no limit."""
        return None if self.limit is None else max(0, self.limit - len(self.reply))

    def require_room(self) -> None:
        """Refuse to run the base past its context, which some bases cannot do at all."""
        if self.limit is not None and len(self.reply) > self.limit:
            raise ValueError(
                f"The prompt of {len(self.context_ids)} tokens leaves too little of the context "
                f"({len(self.context_ids) + self.limit} tokens) for the call: shorten it, drop tools, or allow "
                "fewer calls."
            )

    # --------------------------------------------------------------- drafting

    def draft(self) -> Generator[HeadRequest, Tensor, tuple[list[int], list[Cursor]]]:
        """Tokens that may complete the reply, and the cursors behind them; none while the tool is open or where
        drafting does not pay."""
        tool = self.cursor.tool
        if tool is None or self.vain_drafts.get(self.cursor.calls, 0) >= MAX_VAIN_DRAFTS:
            return [], []
        # A redraft behind a correction only fills in what is left; one step is enough for it.
        steps = self.steps if self.cursor.calls not in self.drafted else 1
        tokens = yield from self.drafted_tokens(tool, steps, widen=False)
        with self.stats.timed("draft"):
            if tokens and self.cursor.calls:
                # Where one call followed another the next may follow too, and its name is then read off at once.
                tokens += [*self.vocabulary.encode("\n"), *self.grammar.opening()]
            behind = self.cursor.walk(tokens[: self.room()])
        return tokens[: len(behind)], behind

    def accept_draft(self) -> Writing:
        """Write the rest of the current call from a draft, unchecked; what cannot be drafted is left to the base.

        That is a call too large to lay out, and what lies behind a value or a call that reaches its limit of length.
        """
        tool = self.cursor.tool
        assert tool is not None
        tokens = yield from self.drafted_tokens(tool, self.steps, widen=True)
        if not tokens:
            logger.warning(
                f"Tool {tool.tool!r} is too large to be drafted at once; the base writes this call by itself."
            )
        with self.stats.timed("draft"):
            for token in tokens:
                cursor = self.cursor.advance(token)
                if cursor is None:
                    break
                self.commit(token, cursor)
            self.commit_forced()

    def drafted_tokens(self, tool: Scaffold, steps: int, widen: bool) -> Generator[HeadRequest, Tensor, list[int]]:
        """Draft the current call, and what the drafter expects behind it, as tokens; none where it cannot."""
        assert self.drafter is not None
        written, call = self.current_call(), self.cursor.calls
        text = arguments_text(written)

        def on_step(canvas: Canvas, ids: Tensor) -> None:
            if self.trace is not None:
                self.trace.append(TraceEvent("draft", {"call": call, "canvas": canvas.view(ids)}))
            if self.on_draft is not None:
                self.on_draft(canvas, ids, text)

        watched = self.trace is not None or self.on_draft is not None
        before = self.before.get(call)
        task = DraftTask(tool, text, self.context_ids, call, steps, widen, on_step if watched else None, before)
        draft = yield from self._timed(self.drafter.draft(task))
        self.drafted.setdefault(call, None if draft is None else draft.arguments)
        if draft is None:
            return []
        self.before[call] = draft.arguments
        scaffolds = {scaffold.tool: scaffold for scaffold in self.grammar.scaffolds}
        calls = calls_of(draft, self.vocabulary, scaffolds, tool, written)[: 1 if self.unchecked else None]
        for number, (_, arguments) in zip(range(call + 1, call + len(calls)), draft.following, strict=False):
            self.drafted.setdefault(number, arguments)
        return [token for tokens in calls for token in tokens]

    def _timed(self, drafting: Drafting) -> Generator[HeadRequest, Tensor, Any]:
        """Run a drafting, its own time added up; the time of the forwards is added by whoever runs them."""
        answer = None
        while True:
            with self.stats.timed("draft"):
                try:
                    self.head_asked = answer is not None
                    request = next(drafting) if answer is None else drafting.send(answer)
                except StopIteration as done:
                    return done.value
            answer = yield request

    def current_call(self) -> bytes:
        """Bytes of the call being written, from behind `<tool_call>`."""
        return self.vocabulary.spell(self.reply[len(self.in_front()) + 1 :])

    def in_front(self) -> list[int]:
        """Tokens of the reply in front of the call being written."""
        return self.reply[: len(self.reply) - 1 - self.reply[::-1].index(self.vocabulary.call_start)]

    def count_slots(self) -> None:
        """Compare the first draft of each call with what became of it."""
        for index, call in enumerate(parse_calls(self.vocabulary, self.reply)):
            draft = self.drafted.get(index)
            scaffold = next(scaffold for scaffold in self.grammar.scaffolds if scaffold.tool == call["name"])
            layout = draft_layout(scaffold, self.array_budget)
            if draft is None or layout is None:
                continue
            try:
                final, drafted = layout.texts(call["arguments"]), layout.texts(draft)
            except ValueError:
                continue  # it went beyond what is laid out for a drafter
            self.stats.slots += [
                DraftedSlot(slot.path, slot_kind(slot), text, after)
                for slot, text, after in zip(layout.slots, drafted, final, strict=True)
                if text is not None
            ]


def calls_of(
    draft: Draft, vocabulary: Vocabulary, scaffolds: Mapping[str, Scaffold], tool: Scaffold, written: bytes
) -> list[list[int]]:
    """Tokens of a draft, call by call.

    Args:
        draft: of the call that is written, and of what follows it.
        vocabulary: the tokens.
        scaffolds: the tools that may be called behind it, by name.
        tool: the one that is called.
        written: bytes of the call so far, from behind `<tool_call>`.

    Returns:
        What completes the call, then each call behind it with the line break in front; it ends in front of what is no
        call of the tools, and is empty where the draft does not begin with what is written.
    """
    calls: list[list[int]] = []
    try:
        if tokens := call_continuation(vocabulary, tool, draft.arguments, written):
            calls.append(tokens)
            for name, arguments in draft.following:
                tokens = call_continuation(vocabulary, scaffolds[name], arguments, b"")
                calls.append([*vocabulary.encode("\n"), vocabulary.call_start, *tokens])
    except (KeyError, ValueError) as error:
        # Drafts can only save forwards, so that one that errs costs no more than that.
        logger.warning_once(f"A drafter drafts what is no call of the tools given: {error}.")
    return calls


def breaks_off(written: bytes) -> bool:
    """Whether a partly written call ends inside a name, a string, a number or a word."""
    return _BREAKS_OFF.fullmatch(written) is not None


def arguments_text(written: bytes) -> str:
    """The arguments' part of a partly written call; a character cut in the middle is left out."""
    opening = written.find(b'", "arguments": ')
    return "" if opening < 0 else written[opening + len(b'", "arguments": ') :].decode(errors="ignore")


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
