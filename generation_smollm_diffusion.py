"""Generation: options, routing, batches of calls and text, `generate` and `respond`, as a mixin of the model.

Takes prompt ids and tools; gives ids as any `generate` does, or an OpenAI-style message. All rows of a batch go through
the same stages together: the prompts in one forward of the base, which also routes; then calls, one forward for all
rows at a time; then text, by transformers' own generation. Text that turns into a call is routed again.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.utils import ModelOutput, logging

from .batched_cache import BatchedCache
from .call_decoding import (
    BaseRequest,
    CallWriter,
    Chooser,
    GenerationStats,
    Sampler,
    TraceEvent,
    choose_best,
    parse_calls,
)
from .candidate_generation import assisted_generate
from .compiled_decoding import beside_no_compiler
from .diffusion_head import PromptMemory
from .draft_policies import policy
from .drafting import Denoising, Drafter, HeadRequest, head_inputs
from .mixed_drafter import DRAFTERS, named_drafter
from .prompt_cache import PromptCache, assemble
from .reply_grammar import ReplyGrammar
from .schema_scaffold import compile_scaffold
from .slot_grammar import Canvas, Vocabulary
from .tokenization_utils import (
    THINK_END_TOKEN,
    THINK_TOKEN,
    TOOL_CALL_TOKEN,
    normalise_tools,
    thinking_from_prompt_ids,
    tools_from_prompt_ids,
)
from .tool_retrieval import ToolRetriever, retrieve_tools

logger = logging.get_logger(__name__)

DECODINGS = ("verified", "diffusion", "ar")
MAX_DIFFUSION_STEPS = 8


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
        num_diffusion_steps: most denoising steps of a draft, 1 to 8.
        remasking: the policy that says which drafted tokens stand after a step; one of `REMASKING_POLICIES`.
        draft_temperature: Gumbel temperature of the draft.
        guidance_scale: classifier-free guidance of the draft: how far away from what the head says without a prompt.
        drafter: `"head"`, `"lookup"` (values out of the prompt, for a base without a trained head), `"mixed"` (values
            out of the prompt, the head for the rest and once per call), or a `Drafter`.
        tool_call_threshold: calls when P(call) is at least this; None calls when the base itself would. P(call) is what
            the model's `decision_head` says, or, where it has none, the base's probability of a call's first token;
            None asks no probe.
        max_tool_calls: most calls in one reply.
        enable_thinking: the base reasons in `<think>` first, for at most `max_new_tokens`, then routes.
        on_unsupported: what becomes of a value whose schema cannot be guaranteed: `"error"` raises
            `UnsupportedSchemaError`, `"ar"` lets the base write it under the guidance of llguidance.
        prompt_cache: keeps the prompts of earlier requests, so that what they share is not run again.
        output_trace: keep a trace of what happened.
    """

    decoding: str = "verified"
    tool_choice: Any = "auto"
    num_diffusion_steps: int = 4
    remasking: str = "confidence"
    draft_temperature: float = 0.0
    guidance_scale: float = 0.0
    drafter: Any = "head"
    tool_call_threshold: float | None = None
    max_tool_calls: int = 8
    enable_thinking: bool = False
    on_unsupported: str = "error"
    prompt_cache: PromptCache | None = None
    output_trace: bool = False

    def __post_init__(self) -> None:
        if self.decoding not in DECODINGS:
            raise ValueError(f"decoding={self.decoding!r} is unknown: use one of {', '.join(DECODINGS)}.")
        if self.on_unsupported not in ("error", "ar"):
            raise ValueError(f'on_unsupported={self.on_unsupported!r} is unknown: use "error" or "ar".')
        if self.drafter not in DRAFTERS and not callable(getattr(self.drafter, "draft", None)):
            raise ValueError(
                f"drafter={self.drafter!r} is unknown: use one of {', '.join(DRAFTERS)}, or an object with a `draft` "
                "method."
            )
        policy(self.remasking)
        for name, high in (("num_diffusion_steps", MAX_DIFFUSION_STEPS), ("max_tool_calls", None)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (high and value > high):
                raise ValueError(
                    f"{name}={value!r} is out of range: use a whole number from 1{f' to {high}' if high else ''}."
                )
        for name in ("draft_temperature", "guidance_scale"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise ValueError(f"{name}={value!r} is out of range: use a finite number from 0.")
        threshold = self.tool_call_threshold
        if threshold is not None and not (isinstance(threshold, (int, float)) and 0 <= threshold <= 1):
            raise ValueError(f"tool_call_threshold={threshold!r} is no probability: use a number from 0 to 1, or None.")
        # By its methods, since a class of remote code exists once per entry file.
        if self.prompt_cache is not None and not (
            hasattr(self.prompt_cache, "match") and hasattr(self.prompt_cache, "store")
        ):
            raise ValueError(f"prompt_cache={self.prompt_cache!r} is no PromptCache: make one and pass it every time.")


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

    >>> choose_tools([{"type": "function", "function": {"name": "now"}}], "none")
    ([], False)
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
# Rows
# ---------------------------------------------------------------------------------------------------------------------


class _Stream:
    """Hands one reply to a streamer: the prompt first, every token once and in order, then the end.

    Args:
        streamer: of transformers; one with `put_draft` also sees the drafts.
        prompt: long [prompt].
        vocabulary: the tokens.
    """

    def __init__(self, streamer: Any, prompt: Tensor, vocabulary: Vocabulary | None) -> None:
        self.streamer = streamer
        self.vocabulary = vocabulary
        self.is_prompt = False  # whether what generation hands over next is the prompt once more
        self.held: Tensor | None = None  # the last token of a text, which may turn out to be none of it
        streamer.put(prompt[None].cpu())

    def write(self, tokens: Sequence[int]) -> None:
        """Hand over tokens that are final."""
        self.streamer.put(torch.tensor(tokens))

    def draft(self, canvas: Canvas, ids: Tensor, written: str) -> None:
        """Show what is drafted behind what is written; a masked token is a low line."""
        if not hasattr(self.streamer, "put_draft"):
            return
        assert self.vocabulary is not None
        shown = "".join(
            part if isinstance(part, str) else "".join("_" if text is None else text for text in part.tokens)
            for part in canvas.view(ids)
        )
        rest = shown.removeprefix(written) if shown.startswith(written) else shown
        self.streamer.put_draft(torch.tensor(self.vocabulary.encode(rest)))

    # What transformers' own generation calls; it begins with the prompt, which was handed over already.

    def put(self, value: Tensor) -> None:
        """Take what transformers' own generation has written."""
        if self.is_prompt:
            self.is_prompt = False
            return
        self.release(keep=True)
        self.held = value

    def end(self) -> None:
        """The text ends, but not yet the reply."""

    def release(self, keep: bool) -> None:
        """Hand over the last token of a text, or drop it."""
        if self.held is not None and keep:
            self.streamer.put(self.held)
        self.held = None

    def close(self) -> None:
        """The reply ends."""
        self.streamer.end()


@dataclass(eq=False)
class _Row:
    """One request of a batch.

    Args:
        prompt: its tokens without padding.
        tools: those that may be called.
        must_call: a call is asked for, whatever the base prefers.
        silent: keep the base from writing a call as free text.
        choose: chooses tokens of calls.
        grammar: the calls that are possible; None: no tool may be called.
        stream: where finished tokens go.
        mode: `"think"`, `"tool"`, `"chat"`, or `"done"`.
        reply: tokens so far.
        memory: what the head has read of the context.
        read: how many tokens that is.
        unread: what the head has not read yet: hidden states [n, features] and tokens.
        later: the same of the calls, which the head reads when a further one begins.
        read_calls: how many calls of the reply the head has read.
        thought: whether the base has thought already.
        sampled: whether the decision against a call was drawn, and so holds for the first token of the text only.
        call_probability: P(call) behind its context, as the model's probe or else its base has it.
    """

    prompt: list[int]
    tools: list[dict[str, Any]]
    must_call: bool
    silent: bool
    choose: Chooser
    stats: GenerationStats
    grammar: ReplyGrammar | None = None
    stream: _Stream | None = None
    trace: list[TraceEvent] = field(default_factory=list)
    mode: str = "chat"
    reply: list[int] = field(default_factory=list)
    memory: PromptMemory | None = None
    read: int = 0
    unread: list[tuple[Tensor, list[int]]] = field(default_factory=list)
    later: list[tuple[Tensor, list[int]]] = field(default_factory=list)
    read_calls: int = 0
    thought: bool = False
    sampled: bool = False
    call_probability: float = 0.0

    @property
    def context(self) -> list[int]:
        """Everything so far."""
        return self.prompt + self.reply

    def append(self, tokens: Sequence[int]) -> None:
        """Append final tokens that were not streamed yet."""
        self.reply += tokens
        if self.stream is not None and tokens:
            self.stream.write(tokens)


class _NoCalls(LogitsProcessor):
    """Keeps rows of a text from beginning a call.

    Args:
        token: `<tool_call>`.
        always: bool [rows].
        first: bool [rows], those that only must not begin with it.
        start: tokens in front of the text.
    """

    def __init__(self, token: int, always: Sequence[bool], first: Sequence[bool], start: int) -> None:
        self.token, self.always, self.first, self.start = token, torch.tensor(always), torch.tensor(first), start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = self.always | self.first if input_ids.shape[1] == self.start else self.always
        if not bool(rows.any()):
            return scores
        scores = scores.clone()
        # Beams of one row lie side by side.
        scores[rows.repeat_interleave(len(scores) // len(rows)).to(scores.device), self.token] = float("-inf")
        return scores


_SPELLED = f"{TOOL_CALL_TOKEN}\n{{".encode()
"""What readers of text, such as `parse_response`, take for the beginning of a call."""


@lru_cache(maxsize=2)
def _tokens_that_spell_it(vocabulary: Vocabulary) -> dict[bytes, list[int]]:
    """By every beginning of the opening of a call: the ordinary tokens that would complete it."""
    found: dict[bytes, list[int]] = {}
    for token, spelled in enumerate(vocabulary.bytes):
        for length in range(1, len(_SPELLED)):
            if spelled and spelled.startswith(_SPELLED[length:]):
                found.setdefault(_SPELLED[:length], []).append(token)
    return found


class _NoSpelledCalls(LogitsProcessor):
    """Keeps a text from spelling the opening of a call in ordinary tokens.

    A prompt can make the base quote one; who reads the text could not tell it from a call, and nothing would have
    checked its name and arguments.

    Args:
        vocabulary: the tokens.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.bytes, self.completing = vocabulary.bytes, _tokens_that_spell_it(vocabulary)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for row, ids in enumerate(input_ids[:, -len(_SPELLED) :].tolist()):
            # No byte of a text is 0xFF: it stands for tokens that are no text.
            tail = b"".join(self.bytes[token] or b"\xff" for token in ids)
            begun = next((start for start in self.completing if tail.endswith(start)), None)
            if begun is not None:
                scores = scores.clone()
                scores[row, self.completing[begun]] = float("-inf")
        return scores


class _StopAt(StoppingCriteria):
    """Ends the text of a row with a token.

    Args:
        tokens: int64 [rows], -1 for rows that it does not end.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = torch.tensor(tokens)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        tokens = self.tokens.repeat_interleave(len(input_ids) // len(self.tokens)).to(input_ids.device)
        return input_ids[:, -1] == tokens


class _BatchRun:
    """Runs a batch from its prompts to its replies.

    Args:
        model: the model, for forwards of base and head.
        rows: the requests.
        options: decoding options.
        vocabulary: the tokens.
        make_grammar: the calls that are possible behind a row's context.
        write_text: transformers' own generation with what the user asks of it; takes keyword arguments.
        eos_ids: tokens that end a reply.
        pad_id: what stands where a row has no token.
    """

    def __init__(
        self,
        model: Any,
        rows: list[_Row],
        options: CallOptions,
        vocabulary: Vocabulary,
        make_grammar: Callable[[_Row], ReplyGrammar],
        write_text: Callable[..., Tensor],
        eos_ids: set[int],
        pad_id: int,
    ) -> None:
        self.model = model
        self.rows = rows
        self.options = options
        self.vocabulary = vocabulary
        self.make_grammar = make_grammar
        self.write_text = write_text
        self.eos_ids = eos_ids
        self.pad_id = pad_id
        grammars = [row.grammar for row in rows if row.grammar is not None]
        self.opening = grammars[0].opening() if grammars else []
        # With a draft adapter the head reads a pass of its own, where it drafts, and not what the base computes anyway.
        reads = options.decoding != "ar" and options.drafter != "lookup"
        self.head_reads = reads and not model.has_draft_adapter
        self.reads_calls = self.head_reads and options.max_tool_calls > 1
        self.asks_probe = options.tool_call_threshold is not None and model.decision_head is not None
        self.stacked: tuple[list[PromptMemory], PromptMemory] | None = None

    def run(self) -> None:
        """Complete the reply of every row."""
        rows = self.rows
        if not self.opening:
            self.text(BatchedCache(len(rows), self.model.device), rows)
            return
        cache = self.start()
        logits = self.read(cache, rows)
        while rows:
            for row, at_end in zip(rows, logits[:, 0], strict=True):
                self.route(row, at_end)
            calling = [index for index, row in enumerate(rows) if row.mode == "tool"]
            writing = [index for index, row in enumerate(rows) if row.mode != "tool"]
            if calling:
                self.calls(cache.select(calling), [rows[index] for index in calling], logits[calling, 1])
            if writing:
                cache, rows = cache.select(writing), [rows[index] for index in writing]
                # The last token in front of the text is run again, so that generation starts from its logits.
                cache.crop(len(self.opening) + 1)
                cache = self.text(cache, rows)
            again = [index for index, row in enumerate(rows) if writing and row.mode in ("route", "call")]
            rows = [rows[index] for index in again]
            if rows:
                cache = cache.select(again)
                logits = self.read(cache, rows)

    # --------------------------------------------------------------- reading and routing

    def start(self) -> BatchedCache:
        """The cache in front of the prompts: what earlier requests left of them."""
        kept, device = self.options.prompt_cache, self.model.device
        if kept is None:
            return BatchedCache(len(self.rows), device)
        prefixes = [kept.match(self.model, row.prompt, needs_memory=self.head_reads) for row in self.rows]
        if not any(prefixes):
            return BatchedCache(len(self.rows), device)
        for row, prefix in zip(self.rows, prefixes, strict=True):
            if prefix is not None and self.head_reads:
                row.memory, row.read = prefix.memory, prefix.length
        cache, mask = assemble(prefixes)
        return BatchedCache(len(self.rows), device, cache, mask)

    def read(self, cache: BatchedCache, rows: list[_Row]) -> Tensor:
        """Run what is not cached of every row, and the forced opening of a call, in one forward.

        Args:
            cache: of these rows.
            rows: the rows.

        Returns:
            [rows, 2, vocab]: the logits behind the context, which route, and behind the opening, for the name.
        """
        lengths = cache.lengths.tolist()
        self.require_room(rows)
        tokens = [[*row.context[length:], *self.opening] for row, length in zip(rows, lengths, strict=True)]
        width = max(map(len, tokens))
        with self.forward(rows, "prefill"):
            keep = [width - len(self.opening) - 1, width - 1]
            hidden = self.head_reads or self.asks_probe
            block = cache.forward(self.model.base, tokens, keep, hidden=hidden, left=True)
            if self.head_reads:
                states = self.model.prompt_features_of(block.hidden_states)
                end = width - len(self.opening)
                for row, state in zip(rows, states, strict=True):
                    new = row.context[row.read + sum(len(ids) for _, ids in row.unread) :]
                    row.unread.append((state[end - len(new) : end], new))
                    row.later = [(state[end:], self.opening)]
            self.keep_prompts(cache, rows)
        last = block.hidden_states[-1] if block.hidden_states is not None and self.asks_probe else None
        at_end = None if last is None else last[:, keep[0]]
        chances = self.model.call_probability(block.logits[:, 0], at_end, self.vocabulary.call_start)
        for row, chance in zip(rows, chances.tolist(), strict=True):
            row.call_probability = chance
        return block.logits

    def require_room(self, rows: Sequence[_Row]) -> None:
        """Refuse to run the base past its context, which some bases cannot do at all."""
        context = context_of(self.model.config)
        for row in rows:
            if context is not None and row.grammar is not None and len(row.context) + len(self.opening) >= context:
                raise ValueError(
                    f"The prompt of {len(row.context)} tokens leaves too little of the context of {context} for a "
                    "call: shorten it, or drop tools."
                )

    def keep_prompts(self, cache: BatchedCache, rows: list[_Row]) -> None:
        """Leave the prompts to later requests."""
        kept = self.options.prompt_cache
        if kept is None:
            return
        if self.head_reads:
            self.teach(rows)
        for index, row in enumerate(rows):
            columns = cache.mask[index].nonzero()[: len(row.prompt), 0]
            memory = row.memory.prefix(len(row.prompt)) if row.memory is not None else None
            kept.store(self.model, row.prompt, cache.cache, index, columns, memory)

    def route(self, row: _Row, logits: Tensor) -> None:
        """Decide between thinking, calling and talking.

        Args:
            row: the row.
            logits: [vocab], behind its context.
        """
        if row.mode == "call" or row.grammar is None:
            row.mode = "tool" if row.mode == "call" else "chat"
            return
        if self.options.enable_thinking and not row.thought:
            row.mode = "think"
            return
        threshold, call = self.options.tool_call_threshold, self.vocabulary.call_start
        row.sampled = isinstance(row.choose, Sampler) and threshold is None
        if threshold is not None:
            prefers = row.call_probability >= threshold
        elif isinstance(row.choose, Sampler):
            prefers = row.choose.draw(logits) == call
        else:
            prefers = int(logits.float().argmax()) == call
        row.mode = "tool" if row.must_call or prefers else "chat"
        data = {"mode": row.mode, "probability": row.call_probability, "forced": row.must_call}
        row.trace.append(TraceEvent("route", data))

    @contextmanager
    def forward(self, rows: Sequence[_Row], stage: str) -> Iterator[None]:
        """Count the block's forwards and its time for these rows."""
        with ExitStack() as stack:
            for row in rows:
                stack.enter_context(row.stats.timed(stage))
            stack.enter_context(self.model._counted([row.stats for row in rows]))
            stack.enter_context(beside_no_compiler())
            yield

    # --------------------------------------------------------------- calls

    def calls(self, cache: BatchedCache, rows: list[_Row], name_logits: Tensor) -> None:
        """Write the calls of rows that call, one forward of the base for all rows at a time."""
        writers = [self.writer(row) for row in rows]
        writing = [writer.write(logits) for writer, logits in zip(writers, name_logits, strict=True)]
        asked: dict[int, BaseRequest | HeadRequest] = {}

        def tell(index: int, answer: Tensor | None) -> None:
            try:
                asked[index] = next(writing[index]) if answer is None else writing[index].send(answer)
            except StopIteration:
                asked.pop(index, None)
                rows[index].reply += writers[index].reply
                rows[index].mode = "done"

        cached = list(range(len(rows)))
        for index in cached:
            tell(index, None)
        while asked:
            heads = {index: request for index, request in asked.items() if isinstance(request, HeadRequest)}
            if heads:
                self.note_calls([(rows[index], writers[index]) for index in heads])
                answers = self.predict([rows[index] for index in heads], list(heads.values()))
                for index, answer in zip(heads, answers, strict=True):
                    tell(index, answer)
                continue
            cache, cached = cache.select([cached.index(index) for index in sorted(asked)]), sorted(asked)
            requests = [request for index in cached if isinstance(request := asked[index], BaseRequest)]
            kept = self.verify(cache, [rows[index] for index in cached], requests)
            for index, logits in zip(cached, kept, strict=True):
                tell(index, logits)
            if asked:
                rejected = [request.rejected for request in requests]
                for index, request in zip(cached, requests, strict=True):
                    if request.rejected and self.reads_calls:
                        states, ids = rows[index].later[-1]
                        rows[index].later[-1] = states[: -request.rejected], ids[: -request.rejected]
                cache.forget(rejected)

    def writer(self, row: _Row) -> CallWriter:
        """What writes the calls of a row."""
        options, config = self.options, self.model.config
        grammar = self.make_grammar(row) if row.reply else row.grammar
        assert grammar is not None
        context, limit = row.context, context_of(config)
        return CallWriter(
            grammar,
            context,
            drafter=None if options.decoding == "ar" else self.drafter(row),
            unchecked=options.decoding == "diffusion",
            steps=options.num_diffusion_steps,
            choose=row.choose,
            room=None if limit is None else limit - len(context),
            stats=row.stats,
            trace=row.trace if options.output_trace else None,
            on_tokens=None if row.stream is None else row.stream.write,
            on_draft=None if row.stream is None else row.stream.draft,
            array_budget=config.array_budget,
        )

    def drafter(self, row: _Row) -> Drafter:
        """The drafter that the options name."""
        options = self.options
        if not isinstance(options.drafter, str):
            return options.drafter
        draws = options.draft_temperature > 0 or options.remasking == "random"
        generator = torch.Generator().manual_seed(_seed()) if draws else None
        how = Denoising(options.remasking, options.draft_temperature, generator)
        return named_drafter(options.drafter, self.vocabulary, self.model.config, how)

    def verify(self, cache: BatchedCache, rows: list[_Row], requests: Sequence[BaseRequest]) -> list[Tensor]:
        """One forward of the base for all rows: the logits [n, vocab] that each asked for."""
        columns = sorted({place for request in requests for place in request.keep})
        places = {column: place for place, column in enumerate(columns)}
        with self.forward(rows, "verify"):
            tokens = [request.tokens for request in requests]
            compiled, base = self.model.compiled_decoding, self.model.base
            if compiled is not None:
                # Copied at the first check of a call; from then on it grows in place.
                cache.cache, base = compiled.static_cache(cache.cache), compiled.verify
            block = cache.forward(base, tokens, columns, hidden=self.reads_calls)
            if self.reads_calls:
                states = self.model.prompt_features_of(block.hidden_states)
                for row, request, state in zip(rows, requests, states, strict=True):
                    row.later.append((state[: len(request.tokens)], request.tokens))
        return [
            block.logits[index, [places[place] for place in request.keep]] for index, request in enumerate(requests)
        ]

    # --------------------------------------------------------------- the head

    def note_calls(self, drafting: Sequence[tuple[_Row, CallWriter]]) -> None:
        """Let the head read the context, and the calls that are complete, before it drafts the next one."""
        if self.model.has_draft_adapter:
            self.adapt(drafting)
        else:
            for row, writer in drafting:
                if row.memory is not None and writer.cursor.calls > row.read_calls and not row.unread:
                    row.unread, row.later, row.read_calls = row.later, [], writer.cursor.calls
        self.teach([row for row, _ in drafting if row.unread])

    def adapt(self, drafting: Sequence[tuple[_Row, CallWriter]]) -> None:
        """Run what stands in front of a call through the base with the draft adapter, where the head has not read it.

        Args:
            drafting: rows, and what writes their calls.
        """
        new = [(row, writer) for row, writer in drafting if row.memory is None or writer.cursor.calls > row.read_calls]
        if not new:
            return
        rows = [row for row, _ in new]
        contexts = [row.context + writer.in_front() for row, writer in new]
        with self.forward(rows, "adapter"):
            features = self.model.draft_features(contexts)
        for (row, writer), states, context in zip(new, features, contexts, strict=True):
            row.unread, row.read_calls = [(states[row.read :], context[row.read :])], writer.cursor.calls

    def teach(self, rows: Sequence[_Row]) -> None:
        """Encode what the head has not read of these rows, in one batch."""
        rows = [row for row in rows if any(ids for _, ids in row.unread)]
        if not rows:
            return
        features = [torch.cat([states for states, _ in row.unread]) for row in rows]
        width = max(map(len, features))
        states = torch.stack([torch.nn.functional.pad(part, (0, 0, 0, width - len(part))) for part in features])
        device = states.device
        ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.bool)
        for index, (row, part) in enumerate(zip(rows, features, strict=True)):
            ids[index, : len(part)] = torch.tensor([token for _, held in row.unread for token in held])
            mask[index, : len(part)] = True
        offset = torch.tensor([row.read for row in rows], device=device)
        memory = self.model.diffusion_head.encode_prompt(states, ids.to(device), mask.to(device), offset)
        for index, (row, part) in enumerate(zip(rows, features, strict=True)):
            own = memory if len(rows) == 1 else memory.select(torch.tensor([index], device=device)).prefix(len(part))
            row.memory = own if row.memory is None else row.memory.extend(own)
            row.read, row.unread = row.read + len(part), []

    def predict(self, rows: list[_Row], requests: list[HeadRequest]) -> list[Tensor]:
        """One forward of the head for all rows: log-probabilities [n, vocab + 2] of each."""
        compiled = self.model.compiled_decoding
        draft = self.model.draft_log_probs if compiled is None else compiled.head_step
        with self.forward(rows, "draft"):
            inputs = head_inputs(requests, self.model.device)
            log_probs = draft(self.memory_of(rows), *inputs, self.options.guidance_scale)
        return [row[: len(request.positions)] for row, request in zip(log_probs, requests, strict=True)]

    def memory_of(self, rows: list[_Row]) -> PromptMemory:
        """The memories of these rows as one batch; kept while they stay the same."""
        memories = [row.memory for row in rows if row.memory is not None]
        if len(memories) == 1:
            return memories[0]
        known = self.stacked
        if known is None or [id(held) for held in known[0]] != [id(held) for held in memories]:
            known = self.stacked = (memories, PromptMemory.stack(memories))
        return known[1]

    # --------------------------------------------------------------- text

    def text(self, cache: BatchedCache, rows: list[_Row]) -> BatchedCache:
        """Write text by transformers' own generation: until a reply, a thought or the text in front of a call ends.

        Args:
            cache: of these rows, the last token of each context left out; empty: nothing is cached.
            rows: the rows; their mode becomes `"route"` behind a thought, `"call"` where a call begins, else `"done"`.

        Returns:
            The cache as it was, or an empty one where generation left it unusable.
        """
        vocabulary, device = self.vocabulary, self.model.device
        for row in rows:
            if row.mode == "think":
                row.append([vocabulary.think_start, *vocabulary.encode("\n")])
        ids, mask = self.text_inputs(cache, rows)
        columns, width = cache.columns, ids.shape[1]
        stops = [self.stop_of(row) for row in rows]
        silent = [row.silent or row.mode == "think" for row in rows]
        stream = rows[0].stream
        if stream is not None:
            stream.is_prompt = True
        with self.forward(rows, "text"):
            output = self.write_text(
                inputs=ids.to(device),
                attention_mask=mask.long().to(device),
                past_key_values=cache.cache if columns else None,
                logits_processor=[
                    _NoCalls(vocabulary.call_start, silent, [row.sampled for row in rows], width),
                    _NoSpelledCalls(vocabulary),
                ],
                stopping_criteria=[_StopAt(stops)],
                streamer=stream,
            )
        for row, stop, written in zip(rows, stops, output[:, width:].tolist(), strict=True):
            self.take_text(row, stop, written)
        # What was read of the prompts stays; the text is run again in one piece where it is routed.
        if columns and cache.cache.get_seq_length() == output.shape[1] - 1 and len(output) == len(rows):
            cache.cache.crop(columns - (output.shape[1] - 1))
            return cache
        return BatchedCache(len(rows), device)

    def text_inputs(self, cache: BatchedCache, rows: Sequence[_Row]) -> tuple[Tensor, Tensor]:
        """Ids and mask [rows, columns] of the contexts in the columns of the cache, the rest padded on the left."""
        lengths = cache.lengths.tolist()
        rest = [row.context[length:] for row, length in zip(rows, lengths, strict=True)]
        width = max(map(len, rest))
        ids = torch.full((len(rows), cache.columns + width), self.pad_id)
        mask = torch.cat([cache.mask, torch.zeros(len(rows), width, dtype=torch.bool)], dim=1)
        for index, (row, tokens) in enumerate(zip(rows, rest, strict=True)):
            mask[index, mask.shape[1] - len(tokens) :] = True
            ids[index, mask[index]] = torch.tensor(row.context)
        return ids, mask

    def stop_of(self, row: _Row) -> int:
        """The token that ends a row's text before its end; -1 is none."""
        if row.mode == "think":
            return self.vocabulary.think_end
        return self.vocabulary.call_start if row.grammar is not None and not row.silent else -1

    def take_text(self, row: _Row, stop: int, written: list[int]) -> None:
        """Append a text to its row and say what comes next.

        Args:
            row: the row.
            stop: the token that ended it early, or -1.
            written: the text, with whatever pads it behind its end.
        """
        ends = [place for place, token in enumerate(written) if token == stop or token in self.eos_ids]
        text, end = (written[: ends[0]], written[ends[0]]) if ends else (written, None)
        thinks, row.mode = row.mode == "think", "done"
        if thinks:
            row.mode, row.thought = "route", True
        elif end is not None and end == stop:
            row.mode = "call"
        elif end is not None:
            text = [*text, end]
        row.reply += text
        if row.stream is not None:
            row.stream.release(keep=not ends or row.mode == "done")
        if thinks:
            row.append([self.vocabulary.think_end, *self.vocabulary.encode("\n")])


class _Settings:
    """Transformers' own generation settings of a request: the keyword argument, else the config, else the default's.

    Args:
        kwargs: the keyword arguments.
        configs: generation configs, the one that goes first in front.
    """

    def __init__(self, kwargs: dict[str, Any], *configs: GenerationConfig | None) -> None:
        self.sources = [kwargs, *(vars(config) for config in configs if config is not None)]

    def get(self, name: str, default: Any = None) -> Any:
        """A setting."""
        return next((source[name] for source in self.sources if source.get(name) is not None), default)

    def ids(self, name: str) -> set[int]:
        """A setting that is one token id or several."""
        value = self.get(name, [])
        return set(value) if isinstance(value, (list, tuple)) else {int(value)}

    def chooser(self) -> Chooser:
        """What chooses the tokens of calls: the argmax, or draws as `do_sample` and its settings ask."""
        if not self.get("do_sample", False):
            return choose_best
        warpers: list[Any] = []
        if (temperature := self.get("temperature", 1.0)) != 1.0:
            warpers.append(TemperatureLogitsWarper(temperature))
        if top_k := self.get("top_k", 50):  # transformers' own default
            warpers.append(TopKLogitsWarper(top_k))
        if (top_p := self.get("top_p", 1.0)) < 1.0:
            warpers.append(TopPLogitsWarper(top_p))
        if (min_p := self.get("min_p")) is not None:
            warpers.append(MinPLogitsWarper(min_p))
        return Sampler(warpers, _seed())


def _seed() -> int:
    """A seed out of torch's global randomness."""
    return int(torch.randint(1 << 62, ()))


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
                block, and out of the same system block whether to think.
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
        if _Settings(kwargs, generation_config, self.generation_config).get("stop_strings") is not None:
            kwargs["tokenizer"] = tokenizer
        rows = None if input_ids is None else self._tools_of_rows(tools, tokenizer, input_ids)
        if input_ids is None or tokenizer is None or rows is None or not any(rows):
            choose_tools([], options.tool_choice)
            with beside_no_compiler():
                return super().generate(inputs, **_of_text(generation_config, kwargs))  # type: ignore[misc]
        kwargs.pop("input_ids", None)
        if tools is None and all(thinking_from_prompt_ids(tokenizer, row) for row in input_ids.tolist()):
            options = replace(options, enable_thinking=True)
        return self._generate_rows(input_ids, rows, tokenizer, options, generation_config, kwargs)

    def respond(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tokenizer: PreTrainedTokenizerFast,
        tools: Sequence[Any] | None = None,
        tool_retriever: ToolRetriever | None = None,
        **kwargs: Any,
    ) -> Reply:
        """Answer a conversation: template, `generate` and parsing in one call.

        Args:
            messages: the conversation, OpenAI style; at least one message.
            tokenizer: this model's tokenizer.
            tools: tools as in `generate`.
            tool_retriever: chooses among the tools those that the prompt shows; see `tool_retrieval.py`.
            kwargs: as in `generate`; `enable_thinking` and `date` go to the chat template.

        Returns:
            The reply.

        Raises:
            ValueError: as `generate`; also an empty list of messages, or a retriever that returns no tools of these.
        """
        return self.respond_batch(
            [messages], tokenizer=tokenizer, tools=tools, tool_retriever=tool_retriever, **kwargs
        )[0]

    def respond_batch(
        self,
        conversations: Sequence[Sequence[dict[str, Any]]],
        *,
        tokenizer: PreTrainedTokenizerFast,
        tools: Sequence[Any] | None = None,
        tool_retriever: ToolRetriever | None = None,
        **kwargs: Any,
    ) -> list[Reply]:
        """Answer several conversations in one batch; each gets the reply that it would get alone.

        Args:
            conversations: the conversations, OpenAI style; each with at least one message.
            tokenizer: this model's tokenizer.
            tools: tools of all conversations, or a list of lists, one a conversation.
            tool_retriever: as in `respond`; asked once for each conversation.
            kwargs: as in `respond`; they hold for all conversations.

        Returns:
            The replies, in order. What a forward that serves several rows costs is counted in each of them.

        Raises:
            ValueError: as `generate`; also an empty list of messages.
        """
        if not all(conversations):
            raise ValueError("The list of messages is empty: pass at least one message.")
        if not conversations:
            return []
        template = {name: kwargs.pop(name) for name in ("date",) if name in kwargs}
        template["enable_thinking"] = kwargs.setdefault(
            "enable_thinking", bool(getattr(self.generation_config, "enable_thinking", False))
        )
        rows = _tools_by_row(tools, len(conversations))
        if tool_retriever is not None:
            choice = self._call_options(kwargs.get("generation_config"), dict(kwargs)).tool_choice
            rows = [
                _retrieved(tool_retriever, messages, own, choice)
                for messages, own in zip(conversations, rows, strict=True)
            ]
        prompts = [
            tokenizer.apply_chat_template(
                list(messages), tools=own or None, add_generation_prompt=True, return_dict=True, **template
            )["input_ids"]
            for messages, own in zip(conversations, rows, strict=True)
        ]
        encoded = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(self.device)
        kwargs["return_dict_in_generate"] = True
        shared = GenerationStats()
        with self._counted([shared]):
            output = self.generate(**encoded, tools=rows, tokenizer=tokenizer, **kwargs)
        replies = output.sequences[:, encoded["input_ids"].shape[1] :].tolist()
        stats = getattr(output, "stats", None) or [deepcopy(shared) for _ in replies]
        traces = getattr(output, "trace", None) or [[] for _ in replies]
        vocabulary, pad = self._vocabulary(tokenizer), tokenizer.pad_token_id
        return [
            _reply(_without_padding(ids, pad), vocabulary, row_stats, trace)
            for ids, row_stats, trace in zip(replies, stats, traces, strict=True)
        ]

    def assisted_generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """Generate with transformers' own assisted decoding: unconstrained, drafts as its candidates.

        Args:
            inputs: long [1, prompt], or `input_ids` among the keyword arguments.
            kwargs: as in `candidate_generation.assisted_generate`.

        Returns:
            What transformers' `generate` returns.
        """
        return assisted_generate(self, inputs, **kwargs)

    @property
    def init_continuous_batching(self) -> Any:
        """Absent: it would write calls as free text, past `generate` and what that guarantees.

        Raises:
            AttributeError: always, so that `transformers serve --continuous-batching` goes on without it.
        """
        raise AttributeError("Continuous batching would bypass this model's generate: use respond_batch or serve.py.")

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
        return _tools_by_row(tools, len(input_ids))

    def _generate_rows(
        self,
        input_ids: Tensor,
        tools: list[list[dict[str, Any]]],
        tokenizer: PreTrainedTokenizerFast,
        options: CallOptions,
        generation_config: GenerationConfig | None,
        kwargs: dict[str, Any],
    ) -> Any:
        """All rows of a batch, from the prompts to padded replies."""
        settings = _Settings(kwargs, generation_config, self.generation_config)
        if settings.get("num_return_sequences", 1) != 1:
            raise ValueError("num_return_sequences is not supported with tools: repeat the prompt instead.")
        attention_mask, streamer = kwargs.pop("attention_mask", None), kwargs.pop("streamer", None)
        if streamer is not None and len(tools) > 1:
            raise ValueError("A streamer follows one reply: generate one row at a time, or leave the streamer out.")
        as_dict = settings.get("return_dict_in_generate", False)
        kwargs.pop("return_dict_in_generate", None)
        vocabulary, rows = self._vocabulary(tokenizer), list[_Row]()
        for index, prompt in enumerate(input_ids):
            real = prompt if attention_mask is None else prompt[attention_mask[index].bool()]
            rows.append(self._row(real, tools[index], vocabulary, options, settings, streamer))
        run = _BatchRun(
            self,
            rows,
            options,
            vocabulary,
            partial(self._grammar_of, vocabulary=vocabulary, options=options),
            self._text_writer(generation_config, kwargs, super().generate),  # type: ignore[misc]
            settings.ids("eos_token_id"),
            tokenizer.pad_token_id,
        )
        run.run()
        if rows[0].stream is not None:
            rows[0].stream.close()
        longest = max(len(row.reply) for row in rows)
        padded = [row.reply + [tokenizer.pad_token_id] * (longest - len(row.reply)) for row in rows]
        sequences = torch.cat([input_ids, input_ids.new_tensor(padded)], dim=1)
        if not as_dict:
            return sequences
        traces = [row.trace for row in rows] if options.output_trace else None
        return SchemaGenerateOutput(sequences=sequences, stats=[row.stats for row in rows], trace=traces)

    def _row(
        self,
        prompt: Tensor,
        tools: list[dict[str, Any]],
        vocabulary: Vocabulary,
        options: CallOptions,
        settings: "_Settings",
        streamer: Any,
    ) -> _Row:
        """One request of a batch, its tools compiled."""
        callable_tools, must_call = choose_tools(tools, options.tool_choice)
        # Whoever decides against a call for the base must also keep it from writing one as free text.
        forbids = options.tool_choice == "none" or options.tool_call_threshold is not None
        row = _Row(
            prompt.tolist(),
            callable_tools,
            must_call,
            silent=bool(tools) and forbids,
            choose=settings.chooser(),
            stats=GenerationStats(),
        )
        if callable_tools:
            with row.stats.timed("scaffold"):
                row.grammar = self._grammar_of(row, vocabulary, options)
        if streamer is not None:
            row.stream = _Stream(streamer, prompt, vocabulary)
        return row

    def _grammar_of(self, row: _Row, vocabulary: Vocabulary, options: CallOptions) -> ReplyGrammar:
        """The calls that are possible behind a row's context."""
        limit, reply_limit, length = self.config.max_call_tokens, None, len(row.context)
        context = context_of(self.config)
        if context is not None:
            if length >= context:
                raise ValueError(
                    f"The prompt has {length} tokens, the model's context {context}: shorten it or drop tools."
                )
            # The last call may begin in the middle of what is left, and what its schema requires comes on top.
            reply_limit = (context - length) // 2
            limit = min(limit, max(1, reply_limit // 2))
        scaffolds = [compile_scaffold(tool, options.on_unsupported) for tool in row.tools]
        most = self.config.max_value_tokens
        return ReplyGrammar(vocabulary, scaffolds, options.max_tool_calls, most, limit, reply_limit)

    def _text_writer(
        self, generation_config: GenerationConfig | None, kwargs: dict[str, Any], generate: Callable[..., Tensor]
    ) -> Callable[..., Tensor]:
        """Transformers' generation with what the user asks of it; more processors and criteria may be added."""

        def write(inputs: Tensor, **own: Any) -> Tensor:
            for name, kind in (("logits_processor", LogitsProcessorList), ("stopping_criteria", StoppingCriteriaList)):
                own[name] = kind([*(kwargs.get(name) or ()), *own[name]])
            return generate(inputs, **_of_text(generation_config, {**kwargs, **own, "return_dict_in_generate": False}))

        return write

    def _vocabulary(self, tokenizer: PreTrainedTokenizerFast) -> Vocabulary:
        """The tokenizer seen as bytes, with what is compiled for it; the last one is kept."""
        device, size = self.device, self.config.get_text_config().vocab_size
        known: Vocabulary | None = getattr(self, "_last_vocabulary", None)
        if known is None or known.tokenizer is not tokenizer or known.size != size or known.device != device:
            known = self._last_vocabulary = Vocabulary(tokenizer, size, device)
        return known

    @contextmanager
    def _counted(self, counted: Sequence[GenerationStats]) -> Iterator[None]:
        """Count forwards of base and head while the block runs, by hooks on the modules; those of this thread."""
        thread = get_ident()

        def count_base(*_: Any) -> None:
            for stats in counted if get_ident() == thread else ():
                stats.base_forwards += 1

        def count_head(*_: Any) -> None:
            for stats in counted if get_ident() == thread else ():
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


def _of_text(generation_config: GenerationConfig | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What transformers' own generation is asked for: no guidance, which in a generation config is that of drafts."""
    if generation_config is None:
        return {**kwargs, "guidance_scale": 1.0}
    generation_config = deepcopy(generation_config)
    generation_config.guidance_scale = 1.0
    return {**kwargs, "generation_config": generation_config}


def _tools_by_row(tools: Sequence[Any] | None, rows: int) -> list[list[dict[str, Any]]]:
    """Normalised tools of every row, out of one list for all or a list of lists."""
    if isinstance(tools, (list, tuple)) and tools and all(isinstance(row, (list, tuple)) for row in tools):
        if len(tools) != rows:
            raise ValueError(f"{len(tools)} lists of tools for {rows} prompts: give one list a prompt.")
        return [normalise_tools(row) for row in tools]
    return [normalise_tools(tools)] * rows


def _retrieved(
    retriever: ToolRetriever, messages: Sequence[dict[str, Any]], tools: list[dict[str, Any]], tool_choice: Any
) -> list[dict[str, Any]]:
    """Those of a conversation's tools that its prompt shows."""
    choose_tools(tools, tool_choice)  # refuses what fits none of all tools, before most of them are left out
    return retrieve_tools(retriever, messages, tools, tool_choice)


def _without_padding(ids: list[int], pad: int) -> list[int]:
    """A reply without what fills it up to the longest of its batch."""
    return ids[: next((end for end in range(len(ids), 0, -1) if ids[end - 1] != pad), 0)]


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
