"""The OpenAI chat completions protocol: request bodies in, replies, stream chunks and errors out.

Takes the bytes of a request body and what the model answered; gives a checked `ChatRequest` and JSON-ready dicts. What
would change the result and is not supported is refused, never ignored. Knows no model, no HTTP framework and no Ray.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from serving.interface import Answer, CallStart, ChatRequest, Delta, Options, TextDelta

MAX_STOPS, MAX_STOP_LENGTH = 4, 64
"""As many stop strings as in the OpenAI API; their length is bounded because generation compiles them."""


class ApiError(Exception):
    """What a client is told instead of an answer, in the form of the OpenAI API.

    Args:
        status: HTTP status.
        message: what was wrong, where, and what to do.
        param: the field of the request at fault.
        code: a word for programs.
        retry_after: seconds after which the same request may be answered.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    def body(self) -> dict[str, Any]:
        """The JSON of the error."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Limits:
    """What a request may ask for at most.

    Args:
        max_body_bytes: bytes of a request body.
        max_messages: messages of a conversation.
        max_tools: tools of a request.
    """

    max_body_bytes: int = 1_000_000
    max_messages: int = 1000
    max_tools: int = 128


# ---------------------------------------------------------------------------------------------------------------------
# The request body
# ---------------------------------------------------------------------------------------------------------------------


class _Wire(BaseModel):
    """Part of a body: no conversions between types, no unknown fields."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class TextPart(_Wire):
    """A part of a content; this model reads text only."""

    type: Literal["text"]
    text: str


class CalledFunction(_Wire):
    """Name and JSON arguments of a call in the history."""

    name: str
    arguments: str


class ToolCall(_Wire):
    """A call in the history."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class Message(_Wire):
    """A message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = Field(None, description="Ignored: the chat template has no names.")
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None


class FunctionTool(_Wire):
    """A function that may be called."""

    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = Field(None, description="Arguments always follow the schema, whatever this says.")
    returns: dict[str, Any] | None = Field(None, alias="return")


class Tool(_Wire):
    """A tool; only functions are supported."""

    type: Literal["function"]
    function: FunctionTool


class NamedFunction(_Wire):
    """The function that must be called."""

    name: str


class NamedTool(_Wire):
    """A `tool_choice` that names a function."""

    type: Literal["function"]
    function: NamedFunction


class StreamOptions(_Wire):
    """Options of a stream."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(None, description="Ignored.")


class TemplateOptions(_Wire):
    """Options of the chat template."""

    enable_thinking: bool | None = None


class TextFormat(_Wire):
    """The only response format besides calls."""

    type: Literal["text"]


_Zero = Annotated[float, Field(ge=0, le=0)]


class ChatBody(_Wire):
    """Body of `POST /v1/chat/completions`."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    tools: list[Tool] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(None, description="0 or absent is greedy.")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Ours.
    decoding: Literal["verified", "diffusion", "ar"] | None = None
    drafter: Literal["head", "lookup", "mixed"] | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: TemplateOptions | None = None
    stats: bool | None = Field(None, description="The reply tells what it cost.")
    # They do not change the result.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prediction: Any = None
    # Not supported: only the value that changes nothing is taken.
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    frequency_penalty: _Zero | None = None
    presence_penalty: _Zero | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    response_format: TextFormat | None = None
    modalities: list[Literal["text"]] | None = None
    audio: None = None
    functions: None = None
    function_call: None = None
    reasoning_effort: None = None
    verbosity: None = None
    web_search_options: None = None


_ADVICE = {
    "n": "one reply a request is supported: send the request several times",
    "logprobs": "log-probabilities are not supported: leave it out",
    "top_logprobs": "log-probabilities are not supported: leave it out",
    "frequency_penalty": "penalties are not supported: leave it out",
    "presence_penalty": "penalties are not supported: leave it out",
    "logit_bias": "biases are not supported: leave it out",
    "response_format": "only text is supported: for JSON give a tool with that schema and tool_choice",
    "modalities": "only text is supported",
    "audio": "only text is supported",
    "functions": "use tools",
    "function_call": "use tools and tool_choice",
    "reasoning_effort": "use chat_template_kwargs with enable_thinking",
    "verbosity": "it is not supported: ask for it in the prompt",
    "web_search_options": "only your own functions are supported: use tools",
}
_FIELDS = {
    alias
    for model in (ChatBody, Message, TextPart, ToolCall, CalledFunction, Tool, FunctionTool, NamedTool, StreamOptions)
    for name, info in model.model_fields.items()
    for alias in (name, info.alias)
}


def read_request(body: bytes, limits: Limits) -> tuple[str, ChatRequest]:
    """Check a request body.

    Args:
        body: UTF-8 JSON.
        limits: what it may ask for at most.

    Returns:
        The name of the model that it asks for, and the request.

    Raises:
        ApiError: 400, what is wrong with it.
    """
    try:
        data = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"The body is not JSON: {error}.", code="invalid_json") from error
    try:
        wire = ChatBody.model_validate(data)
    except ValidationError as error:
        raise _fault(error) from error
    for name, most in (("messages", limits.max_messages), ("tools", limits.max_tools)):
        if len(getattr(wire, name) or ()) > most:
            raise ApiError(400, f"There are more than {most} {name}: send fewer.", name, "too_many")
    tools = [_tool(tool) for tool in wire.tools or ()]
    usage = bool(wire.stream_options and wire.stream_options.include_usage)
    return wire.model, ChatRequest(
        _messages(wire.messages), tools, _options(wire), bool(wire.stream), usage, bool(wire.stats)
    )


def _fault(error: ValidationError) -> ApiError:
    """The first fault that lies deepest, since every way of a union reports one."""
    found = max(error.errors(include_url=False, include_input=False), key=lambda fault: len(fault["loc"]))
    unknown = found["type"] == "extra_forbidden"
    # Between the fields stand the names of the ways of a union.
    path = [part for part in found["loc"] if isinstance(part, int) or part in _FIELDS]
    path += found["loc"][-1:] if unknown and found["loc"][-1] not in path[-1:] else []
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")[:200] or None
    what = "unknown field: leave it out" if unknown else found["msg"]
    advice = _ADVICE.get(str(found["loc"][0])) if found["loc"] else None
    return ApiError(400, f"{param or 'The body'}: {what}{f' ({advice})' if advice else ''}.", param)


def _tool(tool: Tool) -> dict[str, Any]:
    """A tool as the prompt shows it; `strict` says nothing to the model."""
    function = tool.function.model_dump(by_alias=True, exclude_none=True, exclude={"strict"})
    return {"type": "function", "function": function}


def _options(wire: ChatBody) -> Options:
    choice, named = wire.tool_choice, isinstance(wire.tool_choice, NamedTool)
    if wire.max_tokens is not None and wire.max_completion_tokens is not None:
        raise ApiError(400, "max_tokens and max_completion_tokens are both set: set one of them.", "max_tokens")
    stop = [wire.stop] if isinstance(wire.stop, str) else wire.stop or []
    if len(stop) > MAX_STOPS or not all(0 < len(text) <= MAX_STOP_LENGTH for text in stop):
        raise ApiError(400, f"stop: give at most {MAX_STOPS} texts of 1 to {MAX_STOP_LENGTH} characters.", "stop")
    template = wire.chat_template_kwargs.enable_thinking if wire.chat_template_kwargs else None
    return Options(
        tool_choice="required" if isinstance(choice, NamedTool) else choice or "auto",
        tool_name=choice.function.name if isinstance(choice, NamedTool) else None,
        # A tool that is named is called once, as in the OpenAI API.
        max_tool_calls=1 if named or wire.parallel_tool_calls is False else None,
        max_tokens=wire.max_tokens or wire.max_completion_tokens,
        temperature=wire.temperature or 0.0,
        top_p=1.0 if wire.top_p is None else wire.top_p,
        seed=wire.seed,
        stop=tuple(stop),
        decoding=wire.decoding,
        drafter=wire.drafter,
        enable_thinking=template if wire.enable_thinking is None else wire.enable_thinking,
    )


def _messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The conversation for the chat template; tool results stand in the order of their calls, as it has no ids."""
    checked: list[dict[str, Any]] = []
    calls: dict[str, int] = {}
    results: list[tuple[int, dict[str, Any]]] = []
    for index, message in enumerate(messages):
        text, where = _text(message.content), f"messages[{index}]"
        if message.role != "tool":
            calls, results = {}, []
        if message.role != "assistant" and (message.tool_calls or message.reasoning_content):
            raise ApiError(400, f"{where}: only messages of the assistant have calls and reasoning.", where)
        if text is None and not message.tool_calls:
            raise ApiError(400, f"{where}.content is missing: give a text.", f"{where}.content")
        plain: dict[str, Any] = {"role": message.role, "content": text or ""}
        if message.role == "tool":
            if message.tool_call_id not in calls:
                raise ApiError(
                    400,
                    f"{where}.tool_call_id is not the id of a call in the message of the assistant before it.",
                    f"{where}.tool_call_id",
                )
            results.append((calls[message.tool_call_id], plain))
            results.sort(key=lambda result: result[0])
            checked[len(checked) - len(results) + 1 :] = [result for _, result in results]
            continue
        if message.tool_call_id is not None:
            raise ApiError(400, f"{where}.tool_call_id: only messages of tools have one.", f"{where}.tool_call_id")
        if message.tool_calls:
            plain["tool_calls"] = [_history_call(call, f"{where}.tool_calls[{i}]") for i, call in
                                   enumerate(message.tool_calls)]  # fmt: skip
            calls = {call.id: place for place, call in enumerate(message.tool_calls)}
        if message.reasoning_content:
            plain["reasoning_content"] = message.reasoning_content
        checked.append(plain)
    return checked


def _text(content: str | list[TextPart] | None) -> str | None:
    return "".join(part.text for part in content) if isinstance(content, list) else content


def _history_call(call: ToolCall, where: str) -> dict[str, Any]:
    """A call of the history; its arguments are parsed, so that the prompt has them in the model's own spelling."""
    try:
        arguments = from_json(call.function.arguments, allow_inf_nan=False) if call.function.arguments.strip() else {}
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        param = f"{where}.function.arguments"
        raise ApiError(400, f"{param} is not the JSON text of an object.", param)
    return {"type": "function", "function": {"name": call.function.name, "arguments": arguments}}


# ---------------------------------------------------------------------------------------------------------------------
# Replies
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Envelope:
    """What all parts of one reply share.

    Args:
        id: of the completion, `chatcmpl-...`; ids of calls are made of it.
        created: Unix time in seconds.
        model: the served name.
    """

    id: str
    created: int
    model: str

    def call_id(self, index: int) -> str:
        """The id of a call."""
        return f"call_{self.id.removeprefix('chatcmpl-')}{index:02d}"


def completion(envelope: Envelope, answer: Answer, stats: bool) -> dict[str, Any]:
    """The reply to a request that does not stream.

    Args:
        envelope: id, time and model.
        answer: what the model answered.
        stats: whether to tell what it cost.

    Returns:
        An OpenAI `chat.completion`.
    """
    message: dict[str, Any] = {
        "role": "assistant",
        "content": answer.content or (None if answer.calls else ""),
        "refusal": None,
    }
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    if answer.calls:
        message["tool_calls"] = [
            {
                "id": envelope.call_id(index),
                "type": "function",
                "function": {"name": name, "arguments": arguments},
            }
            for index, (name, arguments) in enumerate(answer.calls)
        ]
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answer.finish_reason}
    return {
        **_head(envelope, "chat.completion"),
        "choices": [choice],
        "usage": usage(answer),
        **({"stats": answer.stats} if stats else {}),
    }


def usage(answer: Answer) -> dict[str, int]:
    """Tokens read and written."""
    total = answer.prompt_tokens + answer.completion_tokens
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": total,
    }


def opening_chunk(envelope: Envelope, request: ChatRequest) -> str:
    """The first event of a stream, which tells the role."""
    return _chunk(envelope, request, {"role": "assistant", "content": None})


def delta_chunk(envelope: Envelope, request: ChatRequest, delta: Delta) -> str:
    """The event of a piece."""
    if isinstance(delta, TextDelta):
        return _chunk(envelope, request, {"reasoning_content" if delta.reasoning else "content": delta.text})
    call: dict[str, Any] = {"index": delta.index}
    if isinstance(delta, CallStart):
        call |= {"id": envelope.call_id(delta.index), "type": "function"}
        call["function"] = {"name": delta.name, "arguments": ""}
    else:
        call["function"] = {"arguments": delta.text}
    return _chunk(envelope, request, {"tool_calls": [call]})


def closing_chunks(envelope: Envelope, request: ChatRequest, answer: Answer) -> str:
    """The events that end a stream: why it ends, the usage if it was asked for, and `[DONE]`."""
    events = _chunk(envelope, request, {}, answer.finish_reason, {"stats": answer.stats} if request.stats else {})
    if request.include_usage:
        events += _event({**_head(envelope, "chat.completion.chunk"), "choices": [], "usage": usage(answer)})
    return events + "data: [DONE]\n\n"


def error_chunk(error: ApiError) -> str:
    """The event of an error in the middle of a stream."""
    return _event(error.body())


def _head(envelope: Envelope, kind: str) -> dict[str, Any]:
    return {"id": envelope.id, "object": kind, "created": envelope.created, "model": envelope.model}


def _chunk(
    envelope: Envelope,
    request: ChatRequest,
    delta: Mapping[str, Any],
    finish_reason: str | None = None,
    more: Mapping[str, Any] | None = None,
) -> str:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    own = {"usage": None} if request.include_usage else {}
    return _event({**_head(envelope, "chat.completion.chunk"), "choices": [choice], **own, **(more or {})})


def _event(data: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
