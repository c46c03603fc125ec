"""What `eval.latency` measures with: made-up requests of controlled size, and a clock that splits time into phases.

A cell says how large a request is and how it is decoded. Tools, values and prompts are drawn from a seed; the base is
made to choose the call that the cell asks for, and drafts are wrong in as many slots as it says, so that any model
can be timed, one of random weights too. What this simulation costs is timed apart and counts for nothing.
"""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, wraps
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from eval.devices import wait_for
from eval.gold_choices import PaidDrafter, Shape, gold_choices, gold_tokens
from eval.oracle_drafter import OracleDrafter
from repo_package import load_repo_module

decoding = load_repo_module("call_decoding")
drafting = load_repo_module("drafting")
generation = load_repo_module("generation_smollm_diffusion")
modeling = load_repo_module("modeling_smollm_diffusion")
prompt_caches = load_repo_module("prompt_cache")
scaffolds = load_repo_module("schema_scaffold")

REST = "Python"
PHASES = ("prefill", "route", "scaffold", "draft", "commit", "verify", REST)
"""Where time goes. prefill: the prompt's forward, and what is done with a prompt cache. route: whether a call is made.
scaffold: reading and compiling tools, laying out a call. draft: forwards of the head, its reading of the prompt
included. commit: choosing strings out of the head's marginals. verify: the base's further forwards, which are all
steps of `ar`, and the constrained choices from their logits. Python: everything else, such as spelling tokens."""
SIMULATION = "simulation"
TOOLS = ("book", "find", "make", "send")
"""Beginnings of the names of a request's tools, which differ in nothing else."""
REUSED = 0.75
"""Share of a prompt that earlier requests began with, where prompts are reused."""

_PLACES: tuple[tuple[Any, str, str], ...] = (
    (generation._BatchRun, "start", "prefill"),
    (generation._BatchRun, "read", "prefill"),
    (generation._BatchRun, "route", "route"),
    (modeling.SmolLMDiffusionForCausalLM, "call_probability", "route"),
    (generation.SchemaGenerationMixin, "_tools_of_rows", "scaffold"),
    (generation.SchemaGenerationMixin, "_grammar_of", "scaffold"),
    (drafting, "lay_out", "scaffold"),
    (generation._BatchRun, "teach", "draft"),
    (generation._BatchRun, "adapt", "draft"),
    (generation._BatchRun, "predict", "draft"),
    (drafting._CanvasState, "commit_structure", "commit"),
    (drafting._CanvasState, "commit_values", "commit"),
    (drafting._CanvasState, "draft", "commit"),
    (generation._BatchRun, "verify", "verify"),
    (decoding.CallWriter, "accept", "verify"),
)
"""Functions of the model and the phase that their time belongs to; one that runs inside another counts by itself."""


class Clock:
    """Splits the time of a piece of work into phases; a phase inside another takes its time out of the outer one's.

    On an accelerator every border waits until the device is done, so that its work counts where it was asked for.

    Args:
        device: where the model runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    def enter(self, phase: str) -> None:
        """A phase begins."""
        self._charge()
        self._open.append(phase)

    def leave(self) -> None:
        """The last phase that began ends."""
        self._charge()
        self._open.pop()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The block is a phase."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def measure(self, work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
        """Time a piece of work.

        Args:
            work: what is run.

        Returns:
            What it returns, and seconds by phase: all of `PHASES`, which add up to its wall time without what the
            simulation took, and `SIMULATION`.
        """
        self._seconds, self._open = dict.fromkeys((*PHASES, SIMULATION), 0.0), []
        with self.phase(REST):
            result = work()
        return result, self._seconds

    @contextmanager
    def split(self) -> Iterator[None]:
        """Note the phases of the model's functions while the block runs, by wrapping them from outside."""
        with ExitStack() as stack:
            for owner, name, phase in _PLACES:
                stack.enter_context(patch.object(owner, name, self._timed(getattr(owner, name), phase)))
            yield

    def _timed(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.phase(phase):
                return function(*args, **kwargs)

        return run

    def _charge(self) -> None:
        """Charge the time since the last border to the phase that is open."""
        wait_for(self.device)
        now = time.perf_counter()
        if self._open:
            self._seconds[self._open[-1]] += now - self._since
        self._since = now


# ---------------------------------------------------------------------------------------------------------------------
# Cells
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mode:
    """How a request is run.

    Args:
        compiled: the mode of `torch.compile`; None compiles nothing.
        reuse: a `PromptCache` holds the first part of the prompt.
        new_tools: every request brings tools that no earlier one had.
        split: its phases are timed.
    """

    compiled: str | None = None
    reuse: bool = False
    new_tools: bool = False
    split: bool = True


MODES = {
    "warm": Mode(),
    "new tools": Mode(new_tools=True),
    "prefix reuse": Mode(reuse=True),
    "compiled": Mode(compiled="default"),
    "compiled, prefix reuse": Mode(compiled="default", reuse=True),
    "CUDA graphs": Mode(compiled="reduce-overhead"),
    "CUDA graphs, prefix reuse": Mode(compiled="reduce-overhead", reuse=True),
    "warm, not split": Mode(split=False),
}
"""By name. The last one tells what the clock itself costs."""


@dataclass(frozen=True)
class Cell:
    """What is measured.

    Args:
        prompt: tokens of the prompt.
        slots: string values of the call, all required.
        value: tokens of each of them.
        batch: rows of a request, all alike, so that they end together.
        steps: denoising steps of a draft, all of which are taken.
        accuracy: share of the slots that are drafted right.
        decoding: `"verified"` or `"ar"`.
        mode: a name of `MODES`.
    """

    prompt: int = 512
    slots: int = 4
    value: int = 4
    batch: int = 1
    steps: int = 4
    accuracy: float = 1.0
    decoding: str = "verified"
    mode: str = "warm"

    @property
    def wrong(self) -> int:
        """How many slots are drafted wrong."""
        return round((1 - self.accuracy) * self.slots)


# ---------------------------------------------------------------------------------------------------------------------
# Requests
# ---------------------------------------------------------------------------------------------------------------------


class LeftOut(ValueError):
    """A cell cannot be measured; says why."""


@dataclass(frozen=True, eq=False)
class MadeRequest:
    """One request, as often as the cell's batch says.

    Args:
        prompt_ids: tokens of the prompt.
        tools: that may be called.
        arguments: of the call that the base is made to choose, one of the first tool.
        reply: its tokens.
        twin: the scaffold of a tool that is like the first one; the tool itself is left for the request to compile.
        seed: of the drafts' errors.
    """

    prompt_ids: list[int]
    tools: list[dict[str, Any]]
    arguments: dict[str, str]
    reply: list[int]
    twin: Any
    seed: int


@dataclass
class Maker:
    """Makes requests for a model.

    Args:
        shape: the model and its tokenizer.
        seed: of all draws.
    """

    shape: Shape
    seed: int

    @cached_property
    def vocabulary(self) -> Any:
        """The tokens, as the model itself sees them."""
        return self.shape.model._vocabulary(self.shape.tokenizer)

    @cached_property
    def words(self) -> dict[int, str]:
        """Tokens of letters, most of them with a space in front, by id: what prompts and values are made of."""
        spelled = enumerate(text or b"" for text in self.vocabulary.bytes)
        return {token: text.decode() for token, text in spelled if len(text) > 1 and text.lstrip(b" ").isalpha()}

    def make(self, cell: Cell, number: int, repeat: int) -> MadeRequest:
        """Make a request.

        Args:
            cell: what it is like.
            number: of the cell; cells have tools of their own.
            repeat: number of the request; the last part of the prompt and, where the mode says so, the tools depend
                on it.

        Raises:
            LeftOut: the prompt is too short for a message, or the call is beyond a limit of the model.
        """
        own = repeat if MODES[cell.mode].new_tools else 0
        tools = [_tool(cell.slots, f"{verb}_{number:03d}_{own:03d}") for verb in TOOLS]
        chance = random.Random(f"values {self.seed} {number}")
        arguments = {name: self.value(cell.value, chance) for name in tools[0]["function"]["parameters"]["properties"]}
        twin = _twin(tools[0])
        reply = self.reply(cell, twin, arguments)
        prompt = self.prompt(cell, number, repeat)
        return MadeRequest(prompt, tools, arguments, reply, twin, self.seed + 1000 * repeat)

    def value(self, tokens: int, chance: random.Random) -> str:
        """Words that are so many tokens.

        Raises:
            LeftOut: no such text was found.
        """
        texts = list(self.words.values())
        for _ in range(1000):
            text = chance.choice(texts).strip()
            while len(self.vocabulary.encode(text)) < tokens:
                text += chance.choice(texts)
            if len(self.vocabulary.encode(text)) == tokens:
                return text
        raise LeftOut(f"the tokenizer has no words that are a value of {tokens} tokens")

    def reply(self, cell: Cell, scaffold: Any, arguments: dict[str, str]) -> list[int]:
        """Tokens of the reply that calls a tool.

        Raises:
            LeftOut: the model's limits do not let it be written.
        """
        config = self.shape.model.config
        reply = gold_tokens(self.vocabulary, scaffold, arguments, config)
        if reply is None:
            limits = f"max_value_tokens={config.max_value_tokens} and max_call_tokens={config.max_call_tokens}"
            raise LeftOut(f"the model's {limits} do not let it write {cell.slots} values of {cell.value} tokens")
        context = generation.context_of(config)
        # `generate` lets a call take at most a quarter of what the prompt leaves of the context.
        if context is not None and (context - cell.prompt) // 4 < len(reply):
            raise LeftOut(
                f"the model's context of {context} tokens leaves too little room for a call of {len(reply)} tokens"
            )
        return reply

    def prompt(self, cell: Cell, number: int, repeat: int) -> list[int]:
        """A user's message of random words, in the chat template; its first part is the same in all repeats.

        Raises:
            LeftOut: the template alone is longer.
        """
        messages = [{"role": "user", "content": ""}]
        template = self.shape.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        missing = cell.prompt - len(template)
        if missing < 0:
            raise LeftOut(f"the chat template alone has {len(template)} tokens")
        end = len(template) - 1 - template[::-1].index(self.vocabulary.im_end)
        tokens = list(self.words)
        shared = min(missing, max(0, round(REUSED * cell.prompt) - end))
        first = random.Random(f"prompt {self.seed} {number}").choices(tokens, k=shared)
        rest = random.Random(f"rest {self.seed} {number} {repeat}").choices(tokens, k=missing - shared)
        return [*template[:end], *first, *rest, *template[end:]]


def _tool(slots: int, name: str) -> dict[str, Any]:
    """A tool of string parameters."""
    properties = {chr(ord("a") + index): {"type": "string"} for index in range(slots)}
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": "A tool.", "parameters": parameters}}


def _twin(tool: dict[str, Any]) -> Any:
    """The scaffold of a tool that differs in a remark only, so that the tool itself stays unknown."""
    function = tool["function"]
    parameters = {**function["parameters"], "description": "A twin."}
    return scaffolds.compile_scaffold({"type": "function", "function": {**function, "parameters": parameters}})


# ---------------------------------------------------------------------------------------------------------------------
# Simulation
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Unpaid:
    """A drafter that asks for no forward and whose own time counts as simulation."""

    drafter: Any
    clock: Clock

    def draft(self, task: Any) -> Any:
        """See `drafting.Drafter`."""
        with self.clock.phase(SIMULATION):
            return (yield from self.drafter.draft(task))


def oracle_of(cell: Cell, request: MadeRequest) -> OracleDrafter:
    """An oracle that drafts exactly as many slots wrong as the cell says; the seed decides which.

    Raises:
        RuntimeError: no such draft was drawn, as where values cannot be wrong.
    """
    task = drafting.DraftTask(request.twin, "", request.prompt_ids, 0, cell.steps)
    for seed in range(request.seed, request.seed + 1000):
        oracle = OracleDrafter(lambda _: request.arguments, cell.wrong / cell.slots, seed)
        draft = _value_of(oracle.draft(task))
        if sum(draft.arguments[name] != text for name, text in request.arguments.items()) == cell.wrong:
            return oracle
    raise RuntimeError(f"No draft with {cell.wrong} of {cell.slots} slots wrong was drawn.")


def _value_of(drafting_of_call: Any) -> Any:
    """What a drafting that asks for nothing returns."""
    try:
        next(drafting_of_call)
    except StopIteration as done:
        return done.value
    raise RuntimeError("The oracle asks for a forward.")


@contextmanager
def _chosen(clock: Clock, base: Any, request: MadeRequest) -> Iterator[None]:
    """Make the base choose the reply in all rows, which are alike, and time what that takes as simulation."""

    def begin(*_: Any) -> None:
        clock.enter(SIMULATION)

    def end(_module: Any, _inputs: Any, output: Any) -> None:
        output.logits[1:] = output.logits[:1]
        clock.leave()

    # Hooks run in the order in which they are registered.
    with ExitStack() as stack:
        stack.callback(base.register_forward_hook(begin).remove)
        stack.enter_context(gold_choices(base, len(request.prompt_ids), request.reply))
        stack.callback(base.register_forward_hook(end).remove)
        yield


@contextmanager
def _all_steps() -> Iterator[None]:
    """Let every draft take all of its steps: none ends early because it is sure or has settled."""
    keep = drafting._CanvasState._keep

    def unsettled(state: Any, tokens: Tensor, steps_left: int) -> None:
        state.proposed = None
        keep(state, tokens, steps_left)

    with patch.object(drafting._CanvasState, "_keep", unsettled), patch.object(drafting, "EARLY_STOP", 2.0):
        yield


class Runner:
    """Runs requests and times them.

    Args:
        maker: who makes them.
    """

    def __init__(self, maker: Maker) -> None:
        self.shape = maker.shape
        self.vocabulary = maker.vocabulary
        self.clock = Clock(self.shape.model.device)
        self.compiled: dict[str | None, Any] = {None: None}
        self._caches: dict[Cell, Any] = {}

    def run(self, cell: Cell, request: MadeRequest) -> dict[str, Any]:
        """Run a request.

        Args:
            cell: what it is like.
            request: the request.

        Returns:
            `ms` by phase (their sum is the latency), `simulation_ms`, forwards of base and head, the slots drafted and
            accepted (None for `ar`), tokens of a row's reply, and those of its prompt that a cache held; `uncompiled`,
            parts of the model that the mode wants compiled and that are not, with the reasons.

        Raises:
            RuntimeError: the reply is not what the base was made to choose.
        """
        model, mode = self.shape.model, MODES[cell.mode]
        options = self._options(cell, request)
        reused = self._reused(cell)
        model.compiled_decoding = self._compiled(mode)
        ids = torch.tensor([request.prompt_ids] * cell.batch, device=model.device)
        with ExitStack() as stack:
            stack.enter_context(_all_steps())
            if mode.split:
                stack.enter_context(self.clock.split())
            stack.enter_context(_chosen(self.clock, model.base, request))
            output, seconds = self.clock.measure(
                lambda: model.generate(ids, tokenizer=self.shape.tokenizer, return_dict_in_generate=True, **options)
            )
        if any(row != request.reply for row in output.sequences[:, ids.shape[1] :].tolist()):
            raise RuntimeError(f"{cell}: the reply is not what the base was made to choose.")
        stats = output.stats[0]
        drafts = cell.decoding != "ar"
        return {
            "ms": {phase: 1000 * seconds[phase] for phase in PHASES},
            "simulation_ms": 1000 * seconds[SIMULATION],
            "base_forwards": stats.base_forwards,
            "head_forwards": stats.head_forwards,
            "drafted": stats.drafted_slots if drafts else None,
            "accepted": stats.accepted_slots if drafts else None,
            "tokens": len(request.reply),
            "reused_tokens": (self._reused(cell) - reused) / cell.batch,
            "uncompiled": dict(model.compiled_decoding.off) if model.compiled_decoding is not None else {},
        }

    def _options(self, cell: Cell, request: MadeRequest) -> dict[str, Any]:
        """Keyword arguments of `generate`."""
        options: dict[str, Any] = {
            "tools": request.tools,
            "tool_choice": "required",
            "max_tool_calls": 1,
            "do_sample": False,
            "decoding": cell.decoding,
            "num_diffusion_steps": cell.steps,
        }
        if cell.decoding != "ar":
            head = drafting.HeadDrafter(self.vocabulary, self.shape.model.config)
            options["drafter"] = PaidDrafter(_Unpaid(oracle_of(cell, request), self.clock), head)
        if MODES[cell.mode].reuse:
            options["prompt_cache"] = self._caches.setdefault(cell, prompt_caches.PromptCache())
        return options

    def _reused(self, cell: Cell) -> int:
        """Prompt tokens that the cell's cache has spared so far."""
        return self._caches[cell].stats.reused_tokens if cell in self._caches else 0

    def _compiled(self, mode: Mode) -> Any:
        """What stands in for the model's forwards; made when it is first asked for."""
        if mode.compiled not in self.compiled:
            self.shape.model.compile_decoding(mode=mode.compiled)
            self.compiled[mode.compiled] = self.shape.model.compiled_decoding
        return self.compiled[mode.compiled]
