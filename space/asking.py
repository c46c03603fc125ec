"""One request to the model as the page asks it: traced for the picture, then timed beside the reference.

Takes the model, a text and tools; gives an `Answer`. A public page has limits: of text, reply and time.
"""

import time
from dataclasses import dataclass
from typing import Any

MAX_REQUEST = 2_000
MAX_SECONDS = 30.0
MAX_NEW_TOKENS = 128
MAX_CALLS = 4


@dataclass(frozen=True)
class Options:
    """What a visitor chooses; see `CallOptions` of the model.

    Args:
        decoding: `"verified"`, `"diffusion"` or `"ar"`.
        drafter: `"head"`, `"lookup"` or `"mixed"`.
        steps: most denoising steps of a draft, 1 to 8.
        remasking: the policy that says which drafted tokens stand after a step.
    """

    decoding: str = "verified"
    drafter: str = "head"
    steps: int = 4
    remasking: str = "confidence"


@dataclass(frozen=True)
class Run:
    """One way of answering a request, and what it took.

    Args:
        decoding: which.
        base_forwards, head_forwards: of the base and of the head.
        seconds: wall time.
    """

    decoding: str
    base_forwards: int
    head_forwards: int
    seconds: float


@dataclass(frozen=True)
class Answer:
    """What the page shows of a request.

    Args:
        request: its text.
        message: the reply as an OpenAI-style message.
        trace: the events of the model's trace.
        texts: text of the reply, cut in front of every `<tool_call>`.
        cut: JSON pointers of values that the limit of their length ended; an empty one for a call.
        runs: what it took; where tools were called by a draft, the reference behind it.
        same_tokens: whether the reference wrote the same tokens; None where there is none.
    """

    request: str
    message: dict[str, Any]
    trace: list[Any]
    texts: tuple[str, ...]
    cut: tuple[str, ...]
    runs: tuple[Run, ...]
    same_tokens: bool | None


class Deadline:
    """A streamer that shows nothing and ends a generation that takes too long.

    Args:
        seconds: wall time from now on.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.end_time = time.monotonic() + seconds

    def put(self, value: Any) -> None:
        """Look at the clock whenever tokens were written."""
        if time.monotonic() > self.end_time:
            raise TimeoutError(f"This took longer than {self.seconds:.0f} seconds and was stopped: ask for less.")

    def end(self) -> None:
        """Nothing is held back."""


def ask(
    model: Any,
    tokenizer: Any,
    request: str,
    tools: list[dict[str, Any]],
    options: Options,
    max_seconds: float = MAX_SECONDS,
) -> Answer:
    """Answer a request and measure it.

    Args:
        model, tokenizer: of this repository.
        request: what the visitor typed.
        tools: as `read_tools` gives them.
        options: how to decode.
        max_seconds: wall time after which it is given up.

    Returns:
        The answer. Where a draft called a tool, the same request ran twice more, once as asked and once as the
        reference, so that both times leave out what is compiled once for a schema.

    Raises:
        ValueError: the request is empty or too long, or the model refuses tools or options.
        TimeoutError: it took too long.
    """
    request = request.strip()
    if not request:
        raise ValueError("The request is empty: type what you want, such as “Will it rain in Berlin tomorrow?”")
    if len(request) > MAX_REQUEST:
        raise ValueError(f"The request has {len(request):,} characters; this page takes at most {MAX_REQUEST:,}.")
    deadline = Deadline(max_seconds)

    def respond(decoding: str, trace: bool = False) -> tuple[Any, Run]:
        start = time.perf_counter()
        reply = model.respond(
            [{"role": "user", "content": request}],
            tools=tools,
            tokenizer=tokenizer,
            decoding=decoding,
            drafter=options.drafter,
            num_diffusion_steps=options.steps,
            remasking=options.remasking,
            max_new_tokens=MAX_NEW_TOKENS,
            max_tool_calls=MAX_CALLS,
            output_trace=trace,
            streamer=deadline,
        )
        seconds = time.perf_counter() - start
        return reply, Run(decoding, reply.stats.base_forwards, reply.stats.head_forwards, seconds)

    reply, run = respond(options.decoding, trace=True)
    runs: tuple[Run, ...] = (run,)
    same_tokens = None
    if reply.stats.calls and options.decoding != "ar":
        reference, of_reference = respond("ar")
        runs = (respond(options.decoding)[1], of_reference)
        same_tokens = reference.token_ids == reply.token_ids
    texts = _cut_before_calls(tokenizer, reply.token_ids)
    return Answer(request, reply.message, reply.trace, texts, reply.stats.cut, runs, same_tokens)


def _cut_before_calls(tokenizer: Any, token_ids: list[int]) -> tuple[str, ...]:
    """Text of a reply in pieces that begin with `<tool_call>`, the first one perhaps not; found by its token."""
    start = tokenizer.convert_tokens_to_ids("<tool_call>")
    places = [place for place, token in enumerate(token_ids) if token == start and place] + [len(token_ids)]
    return tuple(tokenizer.decode(token_ids[a:b]) for a, b in zip([0, *places], places, strict=False))
