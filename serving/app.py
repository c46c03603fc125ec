"""The HTTP application: admission, limits, time, errors, streams, health and metrics, in front of any `Engine`.

Takes HTTP requests; gives OpenAI-style JSON and event streams. Knows no model and no Ray, so that it can be tested in
one process. Logs say what became of a request, never what stood in it.
"""

import asyncio
import hmac
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from serving.interface import Answer, ChatRequest, Engine, Event, Refusal, ReplicaLostError, internal_refusal
from serving.protocol import (
    ApiError,
    ChatBody,
    Envelope,
    Limits,
    closing_chunks,
    completion,
    delta_chunk,
    error_chunk,
    opening_chunk,
    read_request,
)

logger = logging.getLogger("serving")

CLIENT_GONE = 499
"""The status that logs and metrics show where nobody waited for the answer."""

_STARTED = int(time.time())


@dataclass(frozen=True)
class Settings:
    """How the application serves.

    Args:
        model_name: the name that requests ask for.
        limits: of a request.
        max_queued: most requests that wait or run; further ones get 429.
        request_timeout_s: most seconds from the first byte of a request to the last of its answer.
        api_key: what clients must send as a bearer token; None lets everybody in.
    """

    model_name: str = "smollm-diffusion"
    limits: Limits = field(default_factory=Limits)
    max_queued: int = 64
    request_timeout_s: float = 60.0
    api_key: str | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Metrics and admission
# ---------------------------------------------------------------------------------------------------------------------


class Metrics:
    """What `/metrics` shows, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        seconds = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
        self.requests = Counter(
            "smollm_requests", "Chat requests by HTTP status; 499: the client left", ["status"], registry=self.registry
        )
        self.seconds = Histogram(
            "smollm_request_seconds", "Seconds to the end of an answer", buckets=seconds, registry=self.registry
        )
        self.first_seconds = Histogram(
            "smollm_first_event_seconds", "Seconds to a stream's first piece", buckets=seconds, registry=self.registry
        )
        self.batch_size = Histogram(
            "smollm_batch_size",
            "Requests that ran in the batch of an answered request",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=self.registry,
        )
        self.queued = Gauge("smollm_queued_requests", "Requests that wait or run", registry=self.registry)
        self.tokens = Counter("smollm_tokens", "Tokens of answered requests", ["kind"], registry=self.registry)
        self.forwards = Counter(
            "smollm_forwards",
            "Forwards that answered requests took part in, by part of the model",
            ["part"],
            registry=self.registry,
        )
        self.retries = Counter(
            "smollm_retries", "Requests given to a further replica because one was lost", registry=self.registry
        )

    def note(self, answer: Answer) -> None:
        """Count what an answer cost."""
        self.tokens.labels("prompt").inc(answer.prompt_tokens)
        self.tokens.labels("completion").inc(answer.completion_tokens)
        self.forwards.labels("base").inc(answer.stats["base_forwards"])
        self.forwards.labels("head").inc(answer.stats["head_forwards"])
        self.batch_size.observe(answer.stats["batch_size"])
        self.retries.inc(answer.attempts - 1)


class Gate:
    """Counts the requests that are in, and lets no more in than may be, and none once it is closed.

    Args:
        most: requests that may be in at once.
        queued: shows how many are.
    """

    def __init__(self, most: int, queued: Gauge) -> None:
        self.most, self.queued = most, queued
        self.inside = 0
        self.closed = False
        self._empty = asyncio.Event()
        self._empty.set()

    def enter(self) -> None:
        """Let a request in.

        Raises:
            ApiError: 503 once closed, 429 where it is full.
        """
        if self.closed:
            raise ApiError(503, "The server is shutting down: ask another one.", code="shutting_down", retry_after=5)
        if self.inside >= self.most:
            message = f"{self.most} requests wait or run already: send it again a little later."
            raise ApiError(429, message, code="too_many_requests", retry_after=1)
        self.inside += 1
        self.queued.set(self.inside)
        self._empty.clear()

    def leave(self) -> None:
        """Let a request out."""
        self.inside -= 1
        self.queued.set(self.inside)
        if not self.inside:
            self._empty.set()

    async def drain(self) -> None:
        """Close, and wait until everybody is out."""
        self.closed = True
        await self._empty.wait()


# ---------------------------------------------------------------------------------------------------------------------
# The application
# ---------------------------------------------------------------------------------------------------------------------


def create_app(engine: Engine, settings: Settings | None = None) -> FastAPI:
    """The application; its `state.gate` is closed and drained to shut it down.

    Args:
        engine: who answers.
        settings: how to serve.
    """
    settings = settings or Settings()
    metrics = Metrics()
    gate = Gate(settings.max_queued, metrics.queued)
    app = FastAPI(title="SmolLM3 with a schema diffusion head", version="1", docs_url=None, redoc_url=None)
    app.state.gate = gate
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        """Unknown paths and methods, in the form of the OpenAI API."""
        response = error_response(ApiError(error.status_code, f"{error.detail}: see /openapi.json for what there is."))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(ApiError)
    async def failed(_: Request, error: ApiError) -> JSONResponse:
        return error_response(error)

    @app.post("/v1/chat/completions", **_described())
    async def chat(http: Request) -> Response:
        """Answer a conversation, with calls of tools where they are needed."""
        try:
            _authorise(http, settings.api_key)
            gate.enter()
        except ApiError as error:
            metrics.requests.labels(str(error.status)).inc()
            raise
        return await _Exchange(http, settings, engine, metrics, gate).respond()

    @app.get("/v1/models")
    async def models(http: Request) -> dict[str, Any]:
        """The models that are served: one."""
        _authorise(http, settings.api_key)
        return {"object": "list", "data": [_model_card(settings.model_name)]}

    @app.get("/health", responses={503: {"description": "No replica can answer, or the server shuts down"}})
    async def health() -> JSONResponse:
        """Whether a request would be answered."""
        well = not gate.closed and await engine.ready()
        return JSONResponse({"status": "ok" if well else "unavailable"}, 200 if well else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def shown() -> Response:
        """Metrics in the text format of Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def _authorise(http: Request, api_key: str | None) -> None:
    given = http.headers.get("authorization", "").removeprefix("Bearer ")
    # As bytes, which may hold any character; those of a header were read as Latin-1.
    if api_key is not None and not hmac.compare_digest(given.encode("latin-1"), api_key.encode()):
        raise ApiError(401, "The API key is missing or wrong: send Authorization: Bearer KEY.", code="invalid_api_key")


def _model_card(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": _STARTED, "owned_by": "local"}


def _described() -> dict[str, Any]:
    """The chat endpoint as OpenAPI shows it; the body is read by hand, for its limits."""
    error = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
    statuses = {
        400: "Something is wrong with the request, or asks for what is not supported",
        401: "The API key is missing or wrong",
        404: "No such model",
        413: "The body is too large",
        415: "The body is not JSON",
        429: "Too many requests wait",
        500: "An internal error; the message holds its id",
        503: "The server is shutting down, or the replica was lost",
        504: "The request took too long",
    }
    responses: dict[int | str, dict[str, Any]] = {
        status: {"description": text, **error} for status, text in statuses.items()
    }
    answer: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}}
    responses[200] = {"description": "A chat.completion, or a stream of chat.completion.chunk", "content": answer}
    body = {"application/json": {"schema": {"$ref": "#/components/schemas/ChatBody"}}}
    return {"responses": responses, "openapi_extra": {"requestBody": {"required": True, "content": body}}}


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI description, with the body and the errors of the chat endpoint."""
    spec = get_openapi(title=app.title, version=app.version, routes=app.routes)
    _, schemas = models_json_schema([(ChatBody, "validation")], ref_template="#/components/schemas/{model}")
    fields = {name: {"type": ["string", "null"]} for name in ("param", "code")}
    text = {"type": "string"}
    error = {"type": "object", "properties": {"message": text, "type": text, **fields}, "required": ["message", "type"]}
    schemas["$defs"]["Error"] = {"type": "object", "properties": {"error": error}, "required": ["error"]}
    spec.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
    return spec


# ---------------------------------------------------------------------------------------------------------------------
# One chat request
# ---------------------------------------------------------------------------------------------------------------------


class _Exchange:
    """One chat request from its admission to the last byte of its answer.

    Args:
        http: the request.
        settings: how to serve.
        engine: who answers.
        metrics: where it is counted.
        gate: where it is let out.
    """

    def __init__(self, http: Request, settings: Settings, engine: Engine, metrics: Metrics, gate: Gate) -> None:
        self.http, self.settings, self.engine, self.metrics, self.gate = http, settings, engine, metrics, gate
        self.id = uuid.uuid4().hex[:20]
        self.started = time.monotonic()
        self.deadline = asyncio.get_running_loop().time() + settings.request_timeout_s
        self.events: AsyncGenerator[Event] | None = None
        self.ended = False

    async def respond(self) -> Response:
        """The response; one that streams ends the exchange itself."""
        try:
            request = await self.guarded(self.read())
            first = await self.guarded(self.unless_gone(self.next_event()))
            envelope = Envelope(f"chatcmpl-{self.id}", int(time.time()), self.settings.model_name)
            if request.stream and not isinstance(first, Refusal):
                self.metrics.first_seconds.observe(time.monotonic() - self.started)
                return _EventStream(self.stream(request, envelope, first), self)
            answer = self.answer_in(first)
            await self.close(200, answer)
            return JSONResponse(completion(envelope, answer, request.stats))
        except ApiError as error:
            await self.close(error.status)
            return error_response(error)
        except BaseException:  # the server ends the task
            await self.close(CLIENT_GONE)
            raise

    async def read(self) -> ChatRequest:
        """The request, checked; its answer is asked for."""
        body = await read_body(self.http, self.settings.limits.max_body_bytes)
        model, request = read_request(body, self.settings.limits)
        if model != self.settings.model_name:
            message = f"There is no model of that name here: use {self.settings.model_name!r}."
            raise ApiError(404, message, "model", "model_not_found")
        self.events = self.engine.run(request, self.deadline - asyncio.get_running_loop().time())
        return request

    async def next_event(self) -> Event:
        """The next event of the answer."""
        assert self.events is not None
        return await anext(self.events)

    async def unless_gone(self, event: Awaitable[Event]) -> Event:
        """An event, unless the client leaves before it comes."""
        coming, leaving = asyncio.ensure_future(event), asyncio.ensure_future(self.client_leaves())
        try:
            await asyncio.wait({coming, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                raise ApiError(CLIENT_GONE, "The client has left.")
            return coming.result()
        finally:
            for task in (coming, leaving):
                task.cancel()
            await asyncio.gather(coming, leaving, return_exceptions=True)

    async def client_leaves(self) -> None:
        """Wait until the connection is closed."""
        while (await self.http.receive())["type"] != "http.disconnect":
            pass

    async def guarded(self, work: Awaitable[Any]) -> Any:
        """Work in the time that is left, its faults as `ApiError`."""
        try:
            async with asyncio.timeout_at(self.deadline):
                return await work
        except TimeoutError as error:
            seconds = self.settings.request_timeout_s
            message = f"The request took longer than {seconds:g} s: ask for less, or send it again later."
            raise ApiError(504, message, code="timeout") from error
        except ReplicaLostError as error:
            message = f"{error} Send it again."
            raise ApiError(503, message, code="replica_lost", retry_after=1) from error
        except (ApiError, asyncio.CancelledError):
            raise
        except Exception as error:
            raise self.error_of(internal_refusal(error)) from error

    def answer_in(self, event: Event) -> Answer:
        """The answer, or the error that stands in its place."""
        if isinstance(event, Refusal):
            raise self.error_of(event)
        assert isinstance(event, Answer)
        return event

    def error_of(self, refusal: Refusal) -> ApiError:
        """A refusal as an error; where it is ours, the log gets what it may know."""
        if refusal.where:
            logger.error("request %s: internal error %s", self.id, refusal.where)
        return ApiError(refusal.status, refusal.message, refusal.param, refusal.code)

    async def stream(self, request: ChatRequest, envelope: Envelope, first: Event) -> AsyncIterator[str]:
        """The events of a stream; what goes wrong in the middle is its last event."""
        yield opening_chunk(envelope, request)
        event = first
        try:
            while not isinstance(event, (Answer, Refusal)):
                yield delta_chunk(envelope, request, event)
                event = await self.guarded(self.next_event())
            answer = self.answer_in(event)
        except ApiError as error:
            await self.close(error.status)
            yield error_chunk(error)
            return
        yield closing_chunks(envelope, request, answer)
        await self.close(200, answer)

    async def close(self, status: int, answer: Answer | None = None) -> None:
        """Count and log the request, end what still runs for it, and let it out; once."""
        if self.ended:
            return
        self.ended = True
        self.gate.leave()
        seconds = time.monotonic() - self.started
        self.metrics.requests.labels(str(status)).inc()
        self.metrics.seconds.observe(seconds)
        tokens = ""
        if answer is not None:
            self.metrics.note(answer)
            tokens = f", {answer.prompt_tokens} + {answer.completion_tokens} tokens, {answer.finish_reason}"
        logger.info("request %s: %d in %.3f s%s", self.id, status, seconds, tokens)
        if self.events is not None:
            await self.events.aclose()


class _EventStream(StreamingResponse):
    """Events of an exchange, which ends with it, also where the client leaves before the first byte."""

    def __init__(self, events: AsyncIterator[str], exchange: _Exchange) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout_at(self.exchange.deadline + 1):  # a client that does not read
                await super().__call__(scope, receive, send)
        except TimeoutError:
            pass
        finally:
            await self.exchange.close(CLIENT_GONE)


async def read_body(http: Request, most: int) -> bytes:
    """The body of a request.

    Raises:
        ApiError: 415, it is no JSON; 413, it is larger than `most` bytes.
    """
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(
            415, "The body must be JSON: send Content-Type: application/json.", code="unsupported_media_type"
        )
    parts, size = [], 0
    declared = http.headers.get("content-length", "")
    too_large = ApiError(413, f"The body is larger than {most} bytes: send less.", code="body_too_large")
    if declared.isdecimal() and len(declared) < 20 and int(declared) > most:
        raise too_large
    async for part in http.stream():
        size += len(part)
        if size > most:
            raise too_large
        parts.append(part)
    return b"".join(parts)


def error_response(error: ApiError) -> JSONResponse:
    """The response of an error."""
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body(), error.status, headers)
