"""What decoding a call costs, ours against public engines on the same base: `python -m eval.bench_decoding`.

Every request of a set goes through transformers' `generate` under llguidance and xgrammar, through both with
jump-forward and prompt look-up, and through our own decodings, in an order drawn anew for each request; greedy, one
request at a time. The tool's name is given to all. With `--simulate` the base's choices are those of the gold call, and
drafts err at chosen rates: that measures costs, not quality. Measures no accuracy.
"""

import argparse
import gc
import hashlib
import importlib.metadata
import json
import logging
import platform
import random
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from jsonschema import Draft202012Validator
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from eval import rivals
from eval.devices import device_name
from eval.gold_choices import (
    PaidDrafter,
    Shape,
    gold_choices,
    gold_chooser,
    gold_tokens,
    smollm3_shape,
)
from eval.oracle_drafter import OracleDrafter
from eval.schema_coverage import Refused
from repo_package import PACKAGE, ROOT, load_repo_module
from training.data import read_records

dialects = load_repo_module("schema_dialects")
drafting = load_repo_module("drafting")
generation = load_repo_module("generation_smollm_diffusion")
modeling = load_repo_module("modeling_smollm_diffusion")
scaffolds = load_repo_module("schema_scaffold")
slots = load_repo_module("slot_grammar")
tokenization = load_repo_module("tokenization_utils")

PUBLIC = ROOT.parent / "shared" / "data" / "bfcl_open" / "normalised"
RESULTS = ROOT / "eval" / "results"
ERROR_RATES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
THIS = "this repository"
REFERENCE = "ar"

COUNTING = (
    "A forward is one call of the base's forward, counted by a hook on the module, the prefill included. Rivals are "
    "given the call up to its arguments as part of their prompt; `generate` runs the prompt in its first forward, the "
    "loops with jump-forward run the text that is forced at the start with it. Ours is given tool_choice and writes "
    "the name itself. No decoding is charged for what follows the arguments."
)


# ---------------------------------------------------------------------------------------------------------------------
# Requests
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """One request for one call.

    Args:
        id: of the record.
        prompt_ids: tokens of the prompt, tools and messages in full.
        tools: that the prompt shows.
        tool: the one that shall be called.
        arguments: the gold ones.
        compile_seconds: what compiling that tool took us, at its first time.
    """

    id: str
    prompt_ids: list[int]
    tools: list[dict[str, Any]]
    tool: dict[str, Any]
    arguments: dict[str, Any]
    compile_seconds: float

    @property
    def name(self) -> str:
        """Name of the tool."""
        return self.tool["function"]["name"]

    @property
    def parameters(self) -> dict[str, Any]:
        """JSON Schema of the arguments."""
        return dialects.normalise_schema(self.tool["function"]["parameters"], self.name)[0]


def requests(
    path: Path, tokenizer: PreTrainedTokenizerFast, room: int, limit: int, seed: int
) -> tuple[list[Request], dict[str, int]]:
    """Requests of a set that want one call, in an order drawn by the seed.

    Args:
        path: gzipped JSONL of records.
        tokenizer: the model's.
        room: most tokens of a prompt.
        limit: most requests.
        seed: of the order.

    Returns:
        The requests, and how many records were passed over, by reason.
    """
    records = sorted(read_records(path), key=lambda record: hashlib.sha256(f"{seed} {record['id']}".encode()).digest())
    found: list[Request] = []
    left_out: Counter[str] = Counter()
    for record in records:
        if len(found) == limit:
            break
        if len(record["calls"]) != 1:
            left_out["not one call"] += 1
            continue
        call = record["calls"][0]
        tool = next(tool for tool in record["tools"] if tool["function"]["name"] == call["name"])
        prompt = tokenizer.apply_chat_template(
            record["messages"], tools=record["tools"], add_generation_prompt=True, return_dict=False
        )
        if len(prompt) > room:
            left_out["prompt too long"] += 1
            continue
        start = time.perf_counter()
        try:
            scaffolds.compile_scaffold(tool)
            seconds = time.perf_counter() - start
            for other in record["tools"]:
                scaffolds.compile_scaffold(other)
        except scaffolds.UnsupportedSchemaError:
            left_out["schema refused"] += 1
            continue
        found.append(Request(record["id"], list(prompt), record["tools"], tool, call["arguments"], seconds))
    return found, dict(left_out)


# ---------------------------------------------------------------------------------------------------------------------
# Decodings
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Reply:
    """What a decoding wrote.

    Args:
        arguments: of the call; None where the limit of length left no JSON.
        cut: whether a limit of length ended the call or a value.
        tokens: of the whole reply, where the decoding wrote it itself.
        drafted, accepted: slots of ours, looked-up tokens of rivals; None where that is not known.
        counted: forwards of the base by the decoding's own count, where it has one.
    """

    arguments: Any
    cut: bool
    tokens: list[int] | None = None
    drafted: int | None = None
    accepted: int | None = None
    counted: int | None = None


@dataclass
class Answer:
    """A reply and what it cost.

    Args:
        reply: what was written.
        base_forwards, head_forwards: by hooks.
        seconds: wall time.
        behind_prefill: part of it behind the first forward of the base.
    """

    reply: Reply
    base_forwards: int = 0
    head_forwards: int = 0
    seconds: float = 0.0
    behind_prefill: float = 0.0


@dataclass
class Bench:
    """A model with the engines over its tokenizer.

    Args:
        model: ours; rivals decode with its base.
        tokenizer: its tokenizer.
        engines: names of `rivals.ENGINES`.
    """

    model: Any
    tokenizer: PreTrainedTokenizerFast
    engines: Sequence[str]
    vocabulary: Any = field(init=False)
    loaded: dict[str, rivals.Engine] = field(init=False)
    compiled: dict[str, rivals.Compiled] = field(default_factory=dict)
    compile_seconds: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        size = self.model.config.get_text_config().vocab_size
        self.vocabulary = slots.Vocabulary(self.tokenizer, size, self.model.device)
        self.loaded = {
            name: rivals.ENGINES[name](self.tokenizer, size, self.vocabulary.encode) for name in self.engines
        }

    @property
    def limit(self) -> int:
        """Most tokens of a rival's call: where a call of ours takes only what it must."""
        return self.model.config.max_call_tokens

    @property
    def room(self) -> int:
        """Most tokens of a prompt, so that no context is exceeded."""
        return self.model.config.get_text_config().max_position_embeddings - 4 * self.limit

    def prepare(self, request: Request, record: bool = True) -> None:
        """Compile a request's tool for the engines; one that refuses it sits this request out."""
        self.compiled = {}
        seconds = {THIS: request.compile_seconds}
        for name, engine in self.loaded.items():
            start = time.perf_counter()
            try:
                self.compiled[name] = engine.compile(request.name, request.parameters, self.opening(request)[1:])
            except Refused:
                continue
            seconds[name] = time.perf_counter() - start
        if record:
            for name, value in seconds.items():
                self.compile_seconds.setdefault(name, []).append(value)

    def opening(self, request: Request) -> list[int]:
        """Tokens of the call up to its arguments."""
        texts = (tokenization.CALL_OPENING, tokenization.call_segments(request.name, {})[2], '", "arguments": ')
        return [self.vocabulary.call_start, *(token for text in texts for token in self.vocabulary.encode(text))]

    def measure(self, run: Callable[[], Reply]) -> Answer:
        """Run a decoding and count."""
        counts: Counter[str] = Counter()
        first: list[float] = []

        def base_ran(*_: Any) -> None:
            counts["base"] += 1
            if not first:
                self._wait()
                first.append(time.perf_counter())

        def head_ran(*_: Any) -> None:
            counts["head"] += 1

        hooks = [
            self.model.base.register_forward_hook(base_ran),
            self.model.diffusion_head.register_forward_hook(head_ran),
        ]
        start = time.perf_counter()
        try:
            reply = run()
        finally:
            for hook in hooks:
                hook.remove()
        self._wait()
        end = time.perf_counter()
        if reply.counted not in (None, counts["base"]):
            raise RuntimeError(f"The model counted {reply.counted} forwards of the base, the hooks {counts['base']}.")
        return Answer(reply, counts["base"], counts["head"], end - start, end - (first or [end])[0])

    def _wait(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()

    # --------------------------------------------------------------- ours and theirs

    def ours(self, request: Request, decoding: str, **options: Any) -> Reply:
        """One of our decodings."""
        ids = torch.tensor([request.prompt_ids], device=self.model.device)
        output = self.model.generate(
            ids,
            tools=request.tools,
            tokenizer=self.tokenizer,
            tool_choice={"type": "function", "function": {"name": request.name}},
            max_tool_calls=1,
            do_sample=False,
            return_dict_in_generate=True,
            decoding=decoding,
            **options,
        )
        reply = output.sequences[0, ids.shape[1] :].tolist()
        stats = output.stats[0]
        (call,) = generation.parse_calls(self.vocabulary, reply)
        # A draft that nobody checks is not accepted.
        drafted, accepted = stats.drafted_slots, stats.accepted_slots if decoding == "verified" else None
        return Reply(call["arguments"], bool(stats.cut), reply, drafted, accepted, stats.base_forwards)

    def rival(
        self,
        request: Request,
        engine: str,
        loop: bool = True,
        jump: bool = True,
        look_up: int = 0,
        gold: Sequence[int] | None = None,
    ) -> Reply:
        """One of the rivals.

        Args:
            request: the request.
            engine: its engine.
            loop: by a loop of its own, else by transformers' `generate`.
            jump: with jump-forward; only in a loop of its own.
            look_up: tokens of a prompt look-up.
            gold: tokens of the reply that the base shall choose.
        """
        if engine not in self.compiled:
            raise Refused(f"{engine} does not support the schema.")
        opening = self.opening(request)
        prompt, constraint = [*request.prompt_ids, *opening], self.compiled[engine]()
        if loop:
            chooser = rivals.greedy if gold is None else gold_chooser(self.vocabulary, self._behind(opening, gold))
            written = rivals.decode(self.model.base, prompt, constraint, self.limit, jump, look_up, chooser)
        else:
            end = self.tokenizer.eos_token_id
            written = rivals.generate(self.model.base, prompt, constraint, end, self.limit, look_up)
        text = self.tokenizer.decode(written.tokens, clean_up_tokenization_spaces=False)
        return Reply(_arguments(text), written.cut, None, written.drafted, written.accepted)

    def _behind(self, opening: Sequence[int], gold: Sequence[int]) -> list[int]:
        """The tokens of a gold reply that lie behind the opening; one that straddles it is spelled anew."""
        text = self.vocabulary.spell(gold)[len(self.vocabulary.spell(opening)) :]
        tokens: list[int] = []
        for token in reversed(gold):
            if len(self.vocabulary.spell([token, *tokens])) > len(text):
                break
            tokens.insert(0, token)
        missing = text[: len(text) - len(self.vocabulary.spell(tokens))]
        return [*self.vocabulary.encode_bytes(missing), *tokens]


def _arguments(text: str) -> Any:
    """The JSON value at the start of a text; None where there is none."""
    try:
        return json.JSONDecoder().raw_decode(text)[0]
    except ValueError:
        return None


Decoding = Callable[[Bench, Request], Reply]


def decodings(engines: Sequence[str], steps: int) -> dict[str, Decoding]:
    """What is compared, by name.

    Args:
        engines: those that are installed.
        steps: most denoising steps of the head's drafts.
    """

    def rival(**options: Any) -> Decoding:
        return lambda bench, request: bench.rival(request, **options)

    def ours(**options: Any) -> Decoding:
        return lambda bench, request: bench.ours(request, **options)

    look_up = rivals.LOOK_UP_TOKENS
    return {
        **{f"generate, {name}": rival(engine=name, loop=False) for name in engines},
        **{f"generate + look-up, {name}": rival(engine=name, loop=False, look_up=look_up) for name in engines},
        **{f"jump-forward, {name}": rival(engine=name) for name in engines},
        **{f"jump-forward + look-up, {name}": rival(engine=name, look_up=look_up) for name in engines},
        REFERENCE: ours(decoding="ar"),
        "verified, head": ours(decoding="verified", drafter="head", num_diffusion_steps=steps),
        "verified, look-up": ours(decoding="verified", drafter="lookup"),
        "verified, mixed": ours(decoding="verified", drafter="mixed", num_diffusion_steps=steps),
        "diffusion, head": ours(decoding="diffusion", drafter="head", num_diffusion_steps=steps),
        "diffusion, mixed": ours(decoding="diffusion", drafter="mixed", num_diffusion_steps=steps),
    }


def compare(
    bench: Bench, chosen: Mapping[str, Decoding], todo: Sequence[Request], seed: int, label: str, warm_up: int
) -> list[dict[str, Answer]]:
    """Put every request to every decoding, in an order drawn for each request.

    Args:
        bench: model and engines.
        chosen: the decodings.
        todo: requests, those to warm up with in front.
        seed: of the orders.
        label: of the progress bar.
        warm_up: how many requests are run and not counted.

    Returns:
        Answers by decoding, one dict a request; where an engine refuses the request, its decodings are missing.
    """
    chance, results = random.Random(seed), []
    gc.collect()
    for number, request in enumerate(tqdm(todo, label, unit="request")):
        bench.prepare(request, record=number >= warm_up)
        answers: dict[str, Answer] = {}
        for name in chance.sample(list(chosen), len(chosen)):
            try:
                answers[name] = bench.measure(partial(chosen[name], bench, request))
            except Refused:
                continue
        if number >= warm_up:
            results.append(answers)
    return results


# ---------------------------------------------------------------------------------------------------------------------
# The report
# ---------------------------------------------------------------------------------------------------------------------


def summary(name: str, todo: Sequence[Request], results: Sequence[Mapping[str, Answer]]) -> dict[str, Any]:
    """What one decoding did and cost.

    Args:
        name: of the decoding.
        todo: the requests.
        results: the answers to each.

    Returns:
        Counts, spreads of forwards and times, and shares. Times over those of `ar` are medians over requests.
    """
    rows = [
        (request, answers[name], answers[REFERENCE])
        for request, answers in zip(todo, results, strict=True)
        if name in answers
    ]
    if not rows:
        return {"requests": 0, "refused": len(todo)}
    own = [answer for _, answer, _ in rows]
    whole = [answers[name] for answers in results if name in answers and not _any_cut(answers)]
    drafted = [answer.reply.drafted for answer in own if answer.reply.drafted is not None]
    accepted = [answer.reply.accepted for answer in own if answer.reply.accepted is not None]
    return {
        "requests": len(rows),
        "refused": len(todo) - len(rows),
        "cut": sum(answer.reply.cut for answer in own),
        "base_forwards": _spread([answer.base_forwards for answer in own], (50, 90, 99)),
        "base_forwards_where_nobody_is_cut": _mean([answer.base_forwards for answer in whole]),
        "head_forwards": _mean([answer.head_forwards for answer in own]),
        "ms": _spread([1000 * answer.seconds for answer in own], (50, 95), 1),
        "times_ar": _median([answer.seconds / reference.seconds for _, answer, reference in rows]),
        "times_ar_behind_prefill": _median(
            [
                answer.behind_prefill / reference.behind_prefill
                for _, answer, reference in rows
                if reference.behind_prefill
            ]
        ),
        "valid": sum(
            Draft202012Validator(request.parameters).is_valid(answer.reply.arguments) for request, answer, _ in rows
        ),
        "same_arguments_as_ar": sum(
            _canonical(answer.reply.arguments) == _canonical(reference.reply.arguments) for _, answer, reference in rows
        ),
        "same_tokens_as_ar": (
            sum(answer.reply.tokens == reference.reply.tokens for _, answer, reference in rows)
            if own[0].reply.tokens is not None
            else None
        ),
        "accepted": round(sum(accepted) / sum(drafted), 3) if accepted and sum(drafted) else None,
    }


def _any_cut(answers: Mapping[str, Answer]) -> bool:
    return any(answer.reply.cut for answer in answers.values())


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _mean(values: Sequence[float]) -> float | None:
    return round(float(np.mean(values)), 3) if len(values) else None


def _median(values: Sequence[float]) -> float | None:
    return round(float(np.median(values)), 3) if len(values) else None


def _spread(values: Sequence[float], percents: Sequence[int], digits: int = 0) -> dict[str, Any]:
    """Mean, and percentiles that are values which occurred."""
    found = np.percentile(values, percents, method="inverted_cdf").tolist()
    named = {f"p{percent}": round(value, digits or None) for percent, value in zip(percents, found, strict=True)}
    return {"mean": _mean(values), **named}


_COLUMNS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "n": lambda row: row["requests"],
    "cut": lambda row: row["cut"],
    "base": lambda row: row["base_forwards"]["mean"],
    "p50": lambda row: row["base_forwards"]["p50"],
    "p90": lambda row: row["base_forwards"]["p90"],
    "p99": lambda row: row["base_forwards"]["p99"],
    "whole": lambda row: row["base_forwards_where_nobody_is_cut"],
    "head": lambda row: row["head_forwards"],
    "ms p50": lambda row: row["ms"]["p50"],
    "ms p95": lambda row: row["ms"]["p95"],
    "x ar": lambda row: row["times_ar"],
    "x behind": lambda row: row["times_ar_behind_prefill"],
    "valid": lambda row: row["valid"],
    "= ar": lambda row: row["same_arguments_as_ar"],
    "tokens = ar": lambda row: row["same_tokens_as_ar"],
    "accepted": lambda row: row["accepted"],
}
_LEGEND = (
    "cut: ended by a limit of length; base: mean forwards of the base, and percentiles; whole: the mean where nobody "
    "was cut; head: mean forwards of the head; x ar: time over that of ar, median; x behind: the same behind the first "
    "forward; accepted: of drafted slots (ours) or looked-up tokens (rivals)."
)


def table(rows: Mapping[str, dict[str, Any]]) -> str:
    """Summaries as text, one decoding a line."""
    lines = [f"{'':38}" + "".join(f"{column:>{_width(column)}}" for column in _COLUMNS)]
    for name, row in rows.items():
        if not row["requests"]:
            lines.append(f"{name:38} refused every request")
            continue
        values = [(column, read(row)) for column, read in _COLUMNS.items()]
        lines.append(
            f"{name:38}" + "".join(f"{'-' if value is None else value:>{_width(column)}}" for column, value in values)
        )
    return "\n".join(lines)


def _width(column: str) -> int:
    return max(8, len(column) + 2)


def compile_times(bench: Bench) -> dict[str, Any]:
    """Milliseconds that compiling one tool took, by engine."""
    return {
        name: _spread([1000 * value for value in seconds], (50, 95), 2)
        for name, seconds in bench.compile_seconds.items()
    }


def measure(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    """The comparison on the base's own choices, set by set."""
    report: dict[str, Any] = {}
    for name in options.sets:
        bench.compile_seconds.clear()
        todo, left_out = requests(
            options.data / f"{name}.jsonl.gz",
            bench.tokenizer,
            bench.room,
            options.limit + options.warm_up,
            options.seed,
        )
        chosen = decodings(bench.engines, options.steps)
        results = compare(bench, chosen, todo, options.seed, name, options.warm_up)
        counted = todo[options.warm_up :]
        report[name] = {
            "requests": len(counted),
            "left_out": left_out,
            "compile_ms": compile_times(bench),
            "decodings": {decoding: summary(decoding, counted, results) for decoding in chosen},
        }
        print(f"\n{name}: {len(counted)} requests, left out: {left_out or 'none'}")
        print(table(report[name]["decodings"]))
        print("compilation, apart:", json.dumps(report[name]["compile_ms"]))
    return report


# ---------------------------------------------------------------------------------------------------------------------
# Simulation
# ---------------------------------------------------------------------------------------------------------------------


class Simulation:
    """Decodings of a bench whose base chooses the gold call.

    Args:
        bench: model and engines.
        todo: the requests; those whose call is not written within the limits are left out.
        seed: of the drafts' errors.
        steps: most denoising steps that a draft costs; weights without training are never sure enough to save some.
    """

    def __init__(self, bench: Bench, todo: Sequence[Request], seed: int, steps: int) -> None:
        self.bench = bench
        self.seed = seed
        self.steps = steps
        self.gold: dict[str, list[int]] = {}
        for request in todo:
            scaffold = scaffolds.compile_scaffold(request.tool)
            tokens = gold_tokens(bench.vocabulary, scaffold, request.arguments, bench.model.config)
            if tokens is not None:
                self.gold[request.id] = tokens
        self.todo = [request for request in todo if request.id in self.gold]

    def decodings(self, rates: Sequence[float]) -> dict[str, Decoding]:
        """What is compared: plain, jump-forward and look-up loops of each engine, `ar`, `verified` at each rate and
        both ways of going on behind a correction."""
        chosen: dict[str, Decoding] = {}
        loops: dict[str, dict[str, Any]] = {
            "plain": {"jump": False},
            "jump-forward": {},
            "jump-forward + look-up": {"look_up": rivals.LOOK_UP_TOKENS},
        }
        for loop, options in loops.items():
            for engine in self.bench.engines:
                chosen[f"{loop}, {engine}"] = partial(self.rival, engine=engine, **options)
        chosen[REFERENCE] = partial(self.ours, decoding="ar")
        for recovers in (True, False):
            for rate in rates:
                # The same name where nothing is wrong: there is no correction.
                chosen[verified_at(rate, recovers)] = partial(self.verified, rate=rate, recovers=recovers)
        return chosen

    def rival(self, bench: Bench, request: Request, **options: Any) -> Reply:
        """A rival's loop."""
        return bench.rival(request, gold=self.gold[request.id], **options)

    def ours(self, bench: Bench, request: Request, **options: Any) -> Reply:
        """One of our decodings."""
        gold = self.gold[request.id]
        with gold_choices(bench.model.base, len(request.prompt_ids), gold):
            reply = bench.ours(request, **options)
        if reply.tokens != gold:
            raise RuntimeError(f"{request.id}: the reply is not what the base was made to choose.")
        return reply

    def verified(self, bench: Bench, request: Request, rate: float, recovers: bool) -> Reply:
        """`verified` with drafts that err at a rate and cost what the head's cost; see `OracleDrafter`."""
        oracle = OracleDrafter(lambda task: request.arguments, rate, self.seed, recovers=recovers)
        drafter = PaidDrafter(oracle, drafting.HeadDrafter(bench.vocabulary, bench.model.config))
        return self.ours(bench, request, decoding="verified", drafter=drafter, num_diffusion_steps=self.steps)


def verified_at(rate: float, recovers: bool = True) -> str:
    """Name of `verified` with drafts that err at a rate."""
    return f"verified, {100 * rate:g}% of slots wrong{'' if recovers or not rate else ' for good'}"


def crossing(points: Sequence[tuple[float, float]], level: float) -> float | None:
    """The least share of accepted slots from which on a cost stays at a level or below it.

    Args:
        points: (share accepted, cost), in any order.
        level: the level.

    Returns:
        The share, interpolated; the least one measured where all costs are low; None where the cost at the greatest
        share is too high.
    """
    ordered = sorted(points, reverse=True)
    if ordered[0][1] > level:
        return None
    for (share, cost), (next_share, next_cost) in pairwise(ordered):
        if next_cost > level:
            return round(share - (share - next_share) * (level - cost) / (next_cost - cost), 3)
    return round(ordered[-1][0], 3)


RESTS = {True: "the rest of a corrected value is drafted right", False: "it is drafted wrong"}
"""What the oracle does behind a correction, in words."""


def curve(rows: Mapping[str, dict[str, Any]], rates: Sequence[float], recovers: bool) -> list[dict[str, Any]]:
    """What `verified` costs at each error rate.

    Args:
        rows: summaries by decoding.
        rates: of errors.
        recovers: which of the two oracles.

    Returns:
        One dict a rate: the share of slots accepted, forwards of base and head, and cost over that of `ar`.
    """
    reference = rows[REFERENCE]["base_forwards"]["mean"]
    points = []
    for rate in sorted(rates):
        row = rows[verified_at(rate, recovers)]
        forwards = row["base_forwards"]["mean"]
        points.append(
            {
                "slots wrong": rate,
                "accepted": row["accepted"],
                "base forwards": forwards,
                "of ar's": round(forwards / reference, 3),
                "head forwards": row["head_forwards"],
                "time of ar's": row["times_ar"],
                "behind prefill": row["times_ar_behind_prefill"],
            }
        )
    return points


def thresholds(points: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Shares of accepted slots from which on `verified` pays, of a `curve`."""
    goals = {
        "half the base forwards of ar": ("of ar's", 0.5),
        "faster than ar": ("time of ar's", 1.0),
        "faster than ar behind the prefill": ("behind prefill", 1.0),
    }
    known = [point for point in points if point["accepted"] is not None]
    return {
        name: crossing([(point["accepted"], point[cost]) for point in known], level) if known else None
        for name, (cost, level) in goals.items()
    }


def curve_table(points: Sequence[Mapping[str, Any]]) -> str:
    """A curve as text, one error rate a line."""
    lines = ["".join(f"{name:>16}" for name in points[0])]
    for point in points:
        values = [
            f"{value:.0%}" if name in ("slots wrong", "accepted") and value is not None else value
            for name, value in point.items()
        ]
        lines.append("".join(f"{'-' if value is None else value:>16}" for value in values))
    return "\n".join(lines)


def simulate(shapes: Sequence[Callable[[], Shape]], options: argparse.Namespace) -> dict[str, Any]:
    """The comparison on gold choices, shape by shape; the first set only."""
    report: dict[str, Any] = {}
    for make in shapes:
        shape = make()
        bench = Bench(shape.model, shape.tokenizer, options.engines)
        found, left_out = requests(
            options.data / f"{options.sets[0]}.jsonl.gz",
            bench.tokenizer,
            bench.room,
            options.limit + options.warm_up,
            options.seed,
        )
        simulation = Simulation(bench, found, options.seed, options.steps)
        chosen = simulation.decodings(options.error_rates)
        results = compare(bench, chosen, simulation.todo, options.seed, shape.label[:40], options.warm_up)
        counted = simulation.todo[options.warm_up :]
        rows = {name: summary(name, counted, results) for name in chosen}
        if missing := len(found) - len(simulation.todo):
            left_out["gold call is not written"] = missing
        made = report[shape.label] = {"requests": len(counted), "left_out": left_out, "decodings": rows, "curves": {}}
        print(f"\nSIMULATION on {shape.label}: choices of the gold call; {len(counted)} requests, left out: ", end="")
        print(f"{left_out or 'none'}\n{table(rows)}")
        for recovers, words in RESTS.items():
            points = curve(rows, options.error_rates, recovers)
            made["curves"][words] = {"points": points, "accepted_needed": thresholds(points)}
            print(f"\nSIMULATION, {words}:\n{curve_table(points)}")
            for name, share in made["curves"][words]["accepted_needed"].items():
                print(
                    f"{name}: {'at no share measured' if share is None else f'from {share:.0%} of slots accepted on'}"
                )
    return report


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def load(path: str, device: str, dtype: Any) -> Shape:
    """A model of a folder or repo, loaded so that it shares its modules, and what they have compiled, with this one."""
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    model = modeling.SmolLMDiffusionForCausalLM.from_pretrained(path, dtype=dtype)
    label = "the shipped model" if Path(path).resolve() == ROOT else f"the model {path}"
    return Shape(label, model.to(device).eval(), tokenizer)


def installed(names: Sequence[str]) -> dict[str, str]:
    """Versions of those packages that are installed."""
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            print(f"{name} is missing: pip install {name}")
    return versions


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run torch with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep our modules from warning of every value that reaches its limit of length: weak models write many."""
    logger = logging.getLogger(PACKAGE)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default=str(ROOT), help="folder or repo of the model")
    parser.add_argument("--data", type=Path, default=PUBLIC, help="folder of gzipped JSONL records")
    parser.add_argument("--sets", nargs="+", default=["simple_python"], help="names of files in that folder")
    parser.add_argument("--limit", type=int, default=200, help="most requests of a set")
    parser.add_argument("--warm-up", type=int, default=3, help="requests in front of them that are not counted")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4, help="most denoising steps of a draft")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--simulate", action="store_true", help="gold choices, and drafts that err at chosen rates")
    parser.add_argument("--error-rates", nargs="+", type=float, default=list(ERROR_RATES), help="of --simulate")
    parser.add_argument(
        "--shapes", nargs="+", default=["model", "smollm3-3b"], choices=["model", "smollm3-3b"], help="of --simulate"
    )
    parser.add_argument("--layers", type=int, default=9, help="of the 36 of the 3B's shape; fewer spoil its times")
    parser.add_argument("--out", type=Path, default=None, help="JSON file; by default in eval/results")
    options = parser.parse_args(arguments)
    if options.out is None:
        options.out = RESULTS / ("bench_decoding_simulation.json" if options.simulate else "bench_decoding.json")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    options = parse(arguments)
    versions = installed(list(rivals.ENGINES))
    options.engines = list(versions)
    dtype = getattr(torch, options.dtype)
    report: dict[str, Any] = {
        "command": shlex.join(
            ["python", "-m", "eval.bench_decoding", *(sys.argv[1:] if arguments is None else arguments)]
        ),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            **versions,
        },
        "threads": options.threads,
        "device": device_name(torch.device(options.device)),
        "dtype": options.dtype,
        "counting": COUNTING,
    }
    loaded = partial(load, options.model, options.device, dtype)
    with threads(options.threads):
        if options.simulate:
            wide = partial(smollm3_shape, options.layers, device=options.device, dtype=dtype)
            shapes = [{"model": loaded, "smollm3-3b": wide}[name] for name in options.shapes]
            report["simulated"] = simulate(shapes, options)
        else:
            shape = loaded()
            report["sets"] = measure(Bench(shape.model, shape.tokenizer, options.engines), options)
    print(f"\n{_LEGEND}\n{COUNTING}\n{json.dumps(report['versions'])}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
