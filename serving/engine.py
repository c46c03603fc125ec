"""One copy of the model and the thread that runs it: requests wait in order, and those that can run together do.

Takes `ChatRequest`s; gives the events of each reply. Everything that touches model or tokenizer happens in one thread.
Requests whose options are equal run as one batch, rows with faults alone; a request that streams runs alone, since
a streamer follows one reply.
"""

import asyncio
import importlib
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

from serving.interface import Answer, ChatRequest, Event, Options, Refusal, internal_refusal
from serving.protocol import ApiError
from serving.reply_parser import ReplyParser

DEFAULT_MAX_TOKENS = 256
"""Most tokens of a text where neither the request nor the model's generation config says."""

STUCK_AFTER_S = 60.0
"""A forward that takes that long beyond a request's time is taken for one that never ends."""


class OutOfTimeError(Exception):
    """Nobody waits any more for what is being generated."""


@dataclass(eq=False)
class _Job:
    """A request on its way.

    Args:
        request: the request.
        deadline: `time.monotonic()` at which it is given up.
        loop: where its events are read.
        events: its events.
        arrived: `time.monotonic()` at which it came.
        gone: whether its reader is.
        tools: normalised tools.
        prompt_tokens: tokens of its prompt.
        max_tokens: most tokens of text, as far as the context has room.
    """

    request: ChatRequest
    deadline: float
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    arrived: float = field(default_factory=time.monotonic)
    gone: bool = False
    tools: list[dict[str, Any]] = field(default_factory=list)
    prompt_tokens: int = 0
    max_tokens: int = 0

    @property
    def over(self) -> bool:
        return self.gone or time.monotonic() >= self.deadline

    @property
    def alone(self) -> bool:
        """Whether it must run alone: pieces go to one reader, and a seed rules all draws of a batch."""
        options = self.request.options
        return self.request.stream or (options.seed is not None and options.temperature > 0)

    def tell(self, events: Iterable[Event]) -> None:
        """Hand over events, from the model's thread."""
        for event in events:
            try:
                self.loop.call_soon_threadsafe(self.events.put_nowait, event)
            except RuntimeError:  # the reader's loop is closed
                self.gone = True
                return


class ModelEngine:
    """Answers requests with a model of this process.

    Args:
        model: the model, in eval mode.
        tokenizer: its tokenizer.
        max_batch_size: most requests of a batch.
        batch_wait_ms: how long a request waits for others to run with.
        prompt_cache: a `PromptCache` of the model, or None.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_batch_size: int = 8,
        batch_wait_ms: float = 5.0,
        prompt_cache: Any = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_batch_size, self.batch_wait_s, self.prompt_cache = max_batch_size, batch_wait_ms / 1000, prompt_cache
        self._tools = module_beside(model, "tokenization_utils")
        self._scaffolds = module_beside(model, "schema_scaffold")
        self._generation = module_beside(model, "generation_smollm_diffusion")
        self._waiting: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._running: list[_Job] = []
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    async def run(self, request: ChatRequest, seconds: float) -> AsyncGenerator[Event]:
        """As in `interface.Engine`."""
        job = _Job(request, time.monotonic() + seconds, asyncio.get_running_loop())
        with self._changed:
            if self._closed:
                raise RuntimeError("The engine is closed.")
            self._waiting.append(job)
            self._changed.notify()
        try:
            while True:
                event = await job.events.get()
                yield event
                if isinstance(event, (Answer, Refusal)):
                    return
        finally:
            job.gone = True

    async def ready(self) -> bool:
        """As in `interface.Engine`."""
        return self.fault() is None

    def fault(self) -> str | None:
        """Why no request would be answered; None if all is well."""
        if not self._thread.is_alive():
            return "the model's thread has ended"
        running = self._running
        late = time.monotonic() - max((job.deadline for job in running), default=time.monotonic())
        return f"a forward takes {late:.0f} s longer than its request may" if late > STUCK_AFTER_S else None

    def close(self) -> None:
        """End the thread once what waits is answered."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    # --------------------------------------------------------------- the model's thread

    def _work(self) -> None:
        while batch := self._next_batch():
            self._running = batch
            try:
                self._run(batch)
            except Exception as error:
                for job in batch:
                    job.tell([internal_refusal(error)])
            self._running = []

    def _next_batch(self) -> list[_Job]:
        """The request that waits longest and those that can run with it; empty when the engine is closed."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return []
                first = self._waiting[0]
                fitting = self._fitting(first)
                rest = first.arrived + self.batch_wait_s - time.monotonic()
                if first.alone or len(fitting) == self.max_batch_size or rest <= 0 or self._closed:
                    for job in fitting:
                        self._waiting.remove(job)
                    return fitting
                self._changed.wait(rest)

    def _fitting(self, first: _Job) -> list[_Job]:
        """A request and those behind it that can run in one batch with it."""
        if first.alone:
            return [first]
        options = first.request.options
        fitting = [job for job in self._waiting if job.request.options == options and not job.alone]
        return fitting[: self.max_batch_size]

    def _run(self, batch: Sequence[_Job]) -> None:
        """Answer a batch; a request near the end of the context has less room for text, and so runs on its own."""
        groups: dict[int, list[_Job]] = {}
        for job in batch:
            try:
                if not job.over:
                    self._prepare(job)
                    groups.setdefault(job.max_tokens, []).append(job)
                else:
                    job.tell([_out_of_time()])
            except ApiError as error:
                job.tell([Refusal(error.status, error.message, error.param, error.code)])
            except Exception as error:
                job.tell([internal_refusal(error)])
        for group in groups.values():
            self._answer(group)

    def _prepare(self, job: _Job) -> None:
        """Check what only the model can: tools, their schemas and the length of the prompt."""
        request, options = job.request, job.request.options
        job.tools = _checked("tools", "invalid_tools", self._tools.normalise_tools, request.tools)
        callable_tools, _ = _checked(
            "tool_choice", "invalid_tool_choice", self._generation.choose_tools, job.tools, _tool_choice(options)
        )
        for tool in callable_tools:
            _checked("tools", "unsupported_schema", self._scaffolds.compile_scaffold, tool)
        prompt = self.tokenizer.apply_chat_template(
            request.messages,
            tools=job.tools or None,
            add_generation_prompt=True,
            return_dict=True,
            enable_thinking=self._thinks(options),
        )
        job.prompt_tokens = len(prompt["input_ids"])
        wanted = options.max_tokens or self.model.generation_config.max_new_tokens or DEFAULT_MAX_TOKENS
        context = self._generation.context_of(self.model.config)
        room = wanted if context is None else context - job.prompt_tokens
        if room < 1:
            raise ApiError(
                400,
                f"The prompt has {job.prompt_tokens} tokens, the model's context {context}: shorten it or drop tools.",
                "messages",
                "context_length_exceeded",
            )
        job.max_tokens = min(wanted, room)

    def _answer(self, group: Sequence[_Job]) -> None:
        """Answer requests that agree in their options; where a batch fails, each of them alone."""
        try:
            for job, answer in zip(group, self._respond(group), strict=True):
                job.tell([answer])
        except OutOfTimeError:
            for job in group:
                job.tell([_out_of_time()])
        except Exception as error:
            if len(group) > 1:
                for job in group:
                    self._answer([job])
                return
            # `respond` raises ValueError for what is wrong with a request, in words for its sender.
            is_fault = isinstance(error, ValueError)
            group[0].tell([Refusal(400, str(error), code="invalid_request") if is_fault else internal_refusal(error)])

    def _respond(self, group: Sequence[_Job]) -> list[Answer]:
        """Run the model."""
        first, options = group[0], group[0].request.options
        streamer = _Pieces(self._parser(first), first) if first.request.stream else None
        if options.temperature > 0:
            # Without a seed draws differ from one start of the server to the next.
            _ = torch.seed() if options.seed is None else torch.manual_seed(options.seed)
        with self._watched(group):
            replies = self.model.respond_batch(
                [job.request.messages for job in group],
                tokenizer=self.tokenizer,
                tools=[job.tools for job in group],
                **self._kwargs(options, first.max_tokens),
                **({} if streamer is None else {"streamer": streamer}),
            )
        return [self._answer_of(job, reply, len(group)) for job, reply in zip(group, replies, strict=True)]

    def _kwargs(self, options: Options, max_tokens: int) -> dict[str, Any]:
        """The options as `respond_batch` takes them; what is not asked for is left to the generation config."""
        kwargs: dict[str, Any] = {
            "tool_choice": _tool_choice(options),
            "max_new_tokens": max_tokens,
            "max_tool_calls": options.max_tool_calls,
            "decoding": options.decoding,
            "drafter": options.drafter,
            "enable_thinking": self._thinks(options),
            "prompt_cache": self.prompt_cache,
            "stop_strings": list(options.stop) or None,
            "do_sample": options.temperature > 0,
        }
        if options.temperature > 0:
            # top_k=0: all tokens, where transformers would take 50.
            kwargs |= {"temperature": options.temperature, "top_p": options.top_p, "top_k": 0}
        return {name: value for name, value in kwargs.items() if value is not None}

    def _thinks(self, options: Options) -> bool:
        wanted = options.enable_thinking
        return bool(getattr(self.model.generation_config, "enable_thinking", False)) if wanted is None else wanted

    def _parser(self, job: _Job) -> ReplyParser:
        may_call = bool(job.tools) and job.request.options.tool_choice != "none"
        return ReplyParser(self.model._vocabulary(self.tokenizer), may_call, job.request.options.stop)

    def _answer_of(self, job: _Job, reply: Any, batch_size: int) -> Answer:
        parser, ids = self._parser(job), reply.token_ids
        parser.feed(ids)
        parser.finish()
        ends = self.model.generation_config.eos_token_id
        ended = bool(ids) and ids[-1] in (ends if isinstance(ends, (list, tuple)) else [ends])
        names = ("base_forwards", "head_forwards", "drafted_slots", "accepted_slots")
        stats = {name: getattr(reply.stats, name) for name in names}
        stats |= {"batch_size": batch_size, "seconds": dict(reply.stats.seconds)}
        return parser.answer(ended, job.prompt_tokens, len(ids), stats)

    @contextmanager
    def _watched(self, group: Sequence[_Job]) -> Iterator[None]:
        """End generation in front of the next forward of the base once nobody waits for it."""

        def check(*_: Any) -> None:
            if all(job.over for job in group):
                raise OutOfTimeError

        hook = self.model.base.register_forward_pre_hook(check)
        try:
            yield
        finally:
            hook.remove()


class _Pieces:
    """A streamer that hands a reply's pieces to their reader.

    Args:
        parser: reads the reply.
        job: whose reply it is.
    """

    def __init__(self, parser: ReplyParser, job: _Job) -> None:
        self.parser, self.job, self.is_prompt = parser, job, True

    def put(self, value: torch.Tensor) -> None:
        """Take tokens; the prompt comes first."""
        if self.is_prompt:
            self.is_prompt = False
        else:
            self.job.tell(self.parser.feed(value.reshape(-1).tolist()))

    def end(self) -> None:
        """The reply is complete."""
        self.job.tell(self.parser.finish())


def module_beside(model: Any, name: str) -> ModuleType:
    """A module of the model's own code, wherever that was loaded from."""
    return importlib.import_module(f"{type(model).__module__.rpartition('.')[0]}.{name}")


def _tool_choice(options: Options) -> str | dict[str, Any]:
    named = options.tool_name
    return options.tool_choice if named is None else {"type": "function", "function": {"name": named}}


def _checked(param: str, code: str, check: Any, *args: Any) -> Any:
    """The result of a check; what it finds wrong is the client's fault."""
    try:
        return check(*args)
    except ValueError as error:
        raise ApiError(400, str(error), param, code) from error


def _out_of_time() -> Refusal:
    return Refusal(504, "The request took longer than it may: ask for less, or send it again later.", code="timeout")
