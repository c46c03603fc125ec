"""What the HTTP application and the engines behind it exchange: requests, the events of replies, and refusals.

Plain data, since it crosses processes. Knows no model, no HTTP and no Ray.
"""

import traceback
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Options:
    """How a request is to be answered; requests whose options are equal may run as one batch.

    Args:
        tool_choice: `"auto"`, `"none"` or `"required"`.
        tool_name: the tool that must be called, where `tool_choice` names one.
        max_tool_calls: most calls; None leaves it to the model.
        max_tokens: most tokens of text; None leaves it to the model. Calls are never cut by it.
        temperature: 0 is greedy.
        top_p: nucleus, where the temperature is above 0.
        seed: makes draws repeatable.
        stop: texts that end a text.
        decoding, drafter, enable_thinking: as in the model's `generate`; None leaves them to the model.
    """

    tool_choice: str = "auto"
    tool_name: str | None = None
    max_tool_calls: int | None = None
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    decoding: str | None = None
    drafter: str | None = None
    enable_thinking: bool | None = None


@dataclass(frozen=True)
class ChatRequest:
    """One checked request.

    Args:
        messages: the conversation as the model's chat template takes it; arguments of calls are dicts.
        tools: OpenAI-style tools.
        options: how to answer.
        stream: whether pieces are wanted as soon as they are final.
        include_usage: whether a stream ends with the usage.
        stats: whether the reply tells what it cost.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] = field(default_factory=list)
    options: Options = Options()
    stream: bool = False
    include_usage: bool = False
    stats: bool = False


@dataclass(frozen=True)
class TextDelta:
    """The next piece of a text, or of the reasoning in front of it."""

    text: str
    reasoning: bool = False


@dataclass(frozen=True)
class CallStart:
    """A call of this tool begins; calls are numbered by `index` from 0."""

    index: int
    name: str


@dataclass(frozen=True)
class ArgumentsDelta:
    """The next piece of the JSON of a call's arguments."""

    index: int
    text: str


Delta = TextDelta | CallStart | ArgumentsDelta


@dataclass(frozen=True)
class Answer:
    """A complete reply.

    Args:
        content: the text; may be empty.
        reasoning: what was thought in front of it.
        calls: name and JSON arguments of each call.
        finish_reason: `"stop"`, `"length"` or `"tool_calls"`.
        prompt_tokens, completion_tokens: tokens read and written.
        stats: what it cost: `base_forwards`, `head_forwards`, `drafted_slots`, `accepted_slots`, `seconds` per stage,
            and `batch_size`, the requests that ran in the same batch.
        attempts: replicas that were asked, those that died included.
    """

    content: str
    reasoning: str
    calls: list[tuple[str, str]]
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    stats: dict[str, Any]
    attempts: int = 1


@dataclass(frozen=True)
class Refusal:
    """Why a request has no answer, as data, since it crosses processes.

    Args:
        status, message, param, code: as in `ApiError`.
        where: for the log alone: kind and place of an internal error, without any text of the request.
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    where: str = ""


Event = Delta | Answer | Refusal


class Engine(Protocol):
    """What the HTTP application asks of whatever runs the model."""

    def run(self, request: ChatRequest, seconds: float) -> AsyncGenerator[Event]:
        """The events of a reply: deltas if the request streams, then one `Answer` or `Refusal`.

        Args:
            request: the request.
            seconds: the time that it may take; closing the generator ends it earlier.

        Raises:
            ReplicaLostError: whoever had the request died.
        """
        ...

    async def ready(self) -> bool:
        """Whether a request would be answered now."""
        ...


class ReplicaLostError(Exception):
    """A request cannot be answered because the replicas that had it died; says so in words for its sender."""


def internal_refusal(error: BaseException) -> Refusal:
    """An error of ours: the client gets an id; the log gets kind and place, but no message, which may quote texts.

    Args:
        error: what was raised.
    """
    incident = uuid.uuid4().hex[:12]
    frames = traceback.extract_tb(error.__traceback__)[-6:]
    places = " < ".join(f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}" for frame in frames[::-1])
    return Refusal(
        500,
        f"Internal error {incident}: the log of the server has its place under this id.",
        code="internal_error",
        where=f"{incident}: {type(error).__name__} at {places}",
    )
