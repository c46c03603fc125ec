"""What each way of calling tools gets right and what it costs, on one base: `python -m eval.compare`.

    python -m eval.compare --sets simple_python multiple unseen --limit 50

Every request goes through all decodings, one at a time, greedy, in an order drawn anew for each request, over the same
prompt. No tool is given: each decoding decides by itself whether to call and which tool.

- `raw`: transformers' `generate` on the base, its text read as calls; `+lookup` with prompt look-up.
- `llguidance`, `xgrammar`: the base decides freely until it writes `<tool_call>`; from there on the engine's grammar of
  a call of any tool holds, and behind the call the base is free again. That is how servers use both (structural tags).
  Masks in transformers' `generate`; `+jump` appends forced text without forwards, `+lookup` adds prompt look-up.
- `ar`, `verified`, `diffusion`: the `generate` of this model; the latter two with each drafter.

Prints a table for each set and writes JSON and, where matplotlib is installed, a plot beside it. `verified` is checked
against `ar` on every request. On a CPU two processes share the requests, so that 50 of each set take minutes; times are
then those of a busy machine, the same for all. Results of an interrupted run are kept, and the same command goes on.
"""

import argparse
import gc
import json
import multiprocessing
import random
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from eval import bench_decoding, rivals
from eval.bench_decoding import installed, load, threads
from eval.devices import device_name
from eval.held_out import BFCL_FOLDER, BFCL_SETS, OWN_SETS, Request, requests
from eval.held_out_tables import markdown
from eval.load_metrics import load_metric
from eval.resumable import PartialResults, evaluation_parser, versions
from eval.schema_coverage import Refused
from repo_package import load_repo_module

dialects = load_repo_module("schema_dialects")
generation = load_repo_module("generation_smollm_diffusion")
scaffolds = load_repo_module("schema_scaffold")

REFERENCE = "ar"
DRAFTERS = ("head", "lookup", "mixed")
TEXT_TOKENS = 32
"""Most tokens of a reply outside its calls, for everyone: what a chat reply says is not looked at."""
MAX_CALLS = 8
"""Most calls of a reply, for everyone."""

NOTES = {
    "deciding": (
        "This model calls where P(call) reaches its tool_call_threshold, at the start of a reply; raw and the engines "
        "call where <tool_call> is the base's argmax, at the start or behind text. After a call the base decides."
    ),
    "limits": (
        f"For everyone at most {TEXT_TOKENS} tokens outside calls and {MAX_CALLS} calls. A call of raw or an engine "
        "ends at max_call_tokens, unfinished; ours takes from there on only what its schema asks for."
    ),
    "costs": (
        "A forward is one call of the base's (or head's) forward, counted by hooks, the prefill included. Forwards, "
        "tokens and times are over the requests of the set that every decoding answered with a call."
    ),
    "compilation": (
        "Grammars of the engines and scaffolds of ours are compiled before the clock starts, without caches. What ours "
        "lifts to tokens while it writes is on its clock."
    ),
    "hallucinated": (
        "Share of the arguments whose name is not in the schema or whose value nothing supports "
        "(eval/metrics/hallucination_rate/README.md). Gold calls have some too: see hallucinated_gold."
    ),
}


# ---------------------------------------------------------------------------------------------------------------------
# Engines over whole replies
# ---------------------------------------------------------------------------------------------------------------------

Tools = Sequence[tuple[str, Mapping[str, Any]]]
"""Name and JSON Schema of each tool."""


def any_call_schema(tools: Tools) -> dict[str, Any]:
    """JSON Schema of a call of one of the tools."""
    calls = [rivals.call_schema(name, parameters) for name, parameters in tools]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


class CallsEngine(Protocol):
    """An engine that compiles calls of several tools at once."""

    def compile_calls(self, tools: Tools) -> rivals.Compiled:
        """Compile the grammar of what stands between `<tool_call>` and `</tool_call>`.

        Args:
            tools: those that may be called.

        Raises:
            Refused: the engine does not support a schema.
        """
        ...


class LlguidanceCalls(rivals.Llguidance):
    """llguidance, for calls of any tool."""

    def compile_calls(self, tools: Tools) -> rivals.Compiled:
        """See `CallsEngine`."""
        matcher = self.matcher(any_call_schema(tools))
        return lambda: _WholeLlguidanceCall(self, matcher.deep_copy())


class _WholeLlguidanceCall(rivals.LlguidanceCall):
    """Is complete behind its last line break, because more follows it here."""

    @property
    def complete(self) -> bool:
        return self.matcher.is_accepting()


class XgrammarCalls(rivals.Xgrammar):
    """xgrammar, for calls of any tool."""

    def compile_calls(self, tools: Tools) -> rivals.Compiled:
        """See `CallsEngine`."""
        start = self.matcher(any_call_schema(tools))
        return lambda: _WholeXgrammarCall(self, start.fork())


class _WholeXgrammarCall(rivals.XgrammarCall):
    """Is complete behind its last line break, because more follows it here."""

    @property
    def complete(self) -> bool:
        return self.matcher.is_completed()


ENGINES: dict[str, Callable[[PreTrainedTokenizerFast, int, rivals.Encode], CallsEngine]] = {
    "llguidance": LlguidanceCalls,
    "xgrammar": XgrammarCalls,
}
"""By the name of the distribution that each needs."""


@dataclass(frozen=True)
class _Place:
    """Where a reply is.

    Args:
        call: the open call as the engine sees it; None outside calls and without an engine.
        inside: whether a call is open.
        fed: whether the engine took the last token.
        ended: whether the last token ended the reply.
        text, written, calls: tokens outside calls, tokens of the open call, calls begun.
    """

    call: rivals.Constraint | None = None
    inside: bool = False
    fed: bool = False
    ended: bool = False
    text: int = 0
    written: int = 0
    calls: int = 0


class FreeReply:
    """A reply that is free until it calls, as a `rivals.Constraint`.

    Args:
        vocabulary: the tokens.
        begin: begins a call in an engine's grammar; None leaves calls to the base as well.
        call_tokens: most tokens of a call.
    """

    def __init__(self, vocabulary: Any, begin: rivals.Compiled | None, call_tokens: int) -> None:
        self.vocabulary = vocabulary
        self.begin = begin
        self.call_tokens = call_tokens
        self.places = [_Place()]
        self.free = torch.ones(vocabulary.size, dtype=torch.bool)

    @property
    def complete(self) -> bool:
        """Whether the reply ended, or reached a limit; more is accepted all the same, as look-up may go beyond it."""
        now = self.places[-1]
        if now.inside:
            return now.ended or now.written >= self.call_tokens
        return now.ended or now.text >= TEXT_TOKENS or now.calls >= MAX_CALLS

    @property
    def unfinished(self) -> bool:
        """Whether a call is open."""
        return self.places[-1].inside

    def allowed(self) -> Tensor:
        """bool [vocab]: tokens that may come next."""
        now = self.places[-1]
        if now.call is None:
            return self.free
        if now.call.complete:
            return torch.arange(self.vocabulary.size) == self.vocabulary.call_end
        return now.call.allowed()

    def accept(self, tokens: Sequence[int]) -> int:
        """Take the longest prefix of `tokens` that is allowed, up to the end of the reply; returns its length."""
        for index, token in enumerate(tokens):
            behind = None if self.places[-1].ended else self._behind(token)
            if behind is None:
                return index
            self.places.append(behind)
        return len(tokens)

    def take_back(self, count: int) -> None:
        """Forget the last tokens."""
        for _ in range(count):
            last = self.places.pop()
            if last.fed and last.call is not None:
                last.call.take_back(1)

    def forced(self) -> list[int]:
        """Tokens that must come next."""
        call = self.places[-1].call
        if call is None:
            return []
        return [self.vocabulary.call_end] if call.complete else call.forced()

    def _behind(self, token: int) -> _Place | None:
        """The place behind a token; None where it is not allowed."""
        now = self.places[-1]
        if not now.inside and token == self.vocabulary.call_start:
            call = None if self.begin is None else self.begin()
            return _Place(call, inside=True, text=now.text, calls=now.calls + 1)
        ended = token == self.vocabulary.im_end
        if not now.inside:
            return replace(now, text=now.text + 1, ended=ended)
        if token == self.vocabulary.call_end and (now.call is None or now.call.complete):
            return _Place(text=now.text, calls=now.calls)
        if now.call is None:
            return replace(now, written=now.written + 1, ended=ended)
        return replace(now, written=now.written + 1, fed=True) if now.call.accept([token]) else None


# ---------------------------------------------------------------------------------------------------------------------
# Decodings
# ---------------------------------------------------------------------------------------------------------------------


def read_calls(vocabulary: Any, reply: Sequence[int]) -> list[dict[str, Any]] | None:
    """The calls of a reply, whoever wrote it.

    Args:
        vocabulary: the tokens.
        reply: token ids.

    Returns:
        `{"name", "arguments"}` of each call; None where one is not closed, is no JSON, or is no such object.
    """
    if reply.count(vocabulary.call_start) != reply.count(vocabulary.call_end):
        return None
    try:
        calls = generation.parse_calls(vocabulary, reply)
    except (ValueError, RecursionError):
        return None
    for call in calls:
        if not isinstance(call, dict) or set(call) != {"name", "arguments"}:
            return None
        if not isinstance(call["name"], str) or not isinstance(call["arguments"], dict):
            return None
    return calls


def tools_of(request: Request) -> list[tuple[str, dict[str, Any]]]:
    """Name and schema (draft 2020-12) of the tools that a request shows."""
    functions = [tool["function"] for tool in request.row.tools]
    return [(f["name"], dialects.normalise_schema(f.get("parameters"), f["name"])[0]) for f in functions]


@dataclass
class Arena:
    """A model with the engines over its tokenizer.

    Args:
        model: ours; raw and the engines decode with its base.
        tokenizer: its tokenizer.
        engines: names of `ENGINES`.
        bench: counts forwards and seconds.
    """

    model: Any
    tokenizer: PreTrainedTokenizerFast
    engines: Sequence[str]
    bench: bench_decoding.Bench = field(init=False)
    loaded: dict[str, CallsEngine] = field(init=False)
    compiled: dict[str, rivals.Compiled] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.bench = bench_decoding.Bench(self.model, self.tokenizer, [])
        vocabulary = self.bench.vocabulary
        self.loaded = {name: ENGINES[name](self.tokenizer, vocabulary.size, vocabulary.encode) for name in self.engines}

    def row(self, request: Request, chosen: Mapping[str, "Decoding"], chance: random.Random) -> dict[str, Any]:
        """One request through all decodings.

        Args:
            request: the request.
            chosen: the decodings by name.
            chance: draws their order.

        Returns:
            `{"compile": seconds by engine, "answers": by decoding}`, as JSON; the decodings of an engine that refuses
            the tools are missing in both.
        """
        seconds = self.prepare(request)
        answers = {}
        for name in chance.sample(list(chosen), len(chosen)):
            try:
                answer = self.bench.measure(partial(chosen[name], self, request))
            except Refused:
                continue
            answers[name] = {
                "calls": answer.reply.arguments,
                "reply": answer.reply.tokens,
                "cut": answer.reply.cut,
                "base_forwards": answer.base_forwards,
                "head_forwards": answer.head_forwards,
                "seconds": answer.seconds,
            }
        return {"compile": seconds, "answers": answers}

    def prepare(self, request: Request) -> dict[str, float]:
        """Compile a request's tools; returns the seconds by engine, without those that refuse them."""
        # Under other names, because ours keeps what it compiled before and shares it with itself.
        anew = [{"function": {**t["function"], "name": f"{t['function']['name']} anew"}} for t in request.row.tools]
        start = perf_counter()
        for tool in anew:
            scaffolds.compile_scaffold(tool)
        seconds = {bench_decoding.THIS: perf_counter() - start}
        self.compiled = {}
        for name, engine in self.loaded.items():
            start = perf_counter()
            try:
                self.compiled[name] = engine.compile_calls(tools_of(request))
            except Refused:
                continue
            seconds[name] = perf_counter() - start
        return seconds

    def raw(self, request: Request, look_up: int = 0) -> bench_decoding.Reply:
        """The base alone."""
        reply = FreeReply(self.bench.vocabulary, None, self.bench.limit)
        end = self.tokenizer.eos_token_id
        base, prompt, limit = self.model.base, request.row.prompt_ids, 4 * self.bench.limit
        written = rivals.generate(base, prompt, reply, end, limit, look_up, masked=False)
        return self._reply(written.tokens, reply.unfinished)

    def rival(self, request: Request, engine: str, jump: bool = False, look_up: int = 0) -> bench_decoding.Reply:
        """The base under an engine; by transformers' `generate`, or with jump-forward in a loop of its own."""
        if engine not in self.compiled:
            raise Refused(f"{engine} does not support the tools.")
        reply = FreeReply(self.bench.vocabulary, self.compiled[engine], self.bench.limit)
        base, prompt, limit = self.model.base, request.row.prompt_ids, 4 * self.bench.limit
        if jump:
            written = rivals.decode(base, prompt, reply, limit, jump, look_up)
        else:
            written = rivals.generate(base, prompt, reply, self.tokenizer.eos_token_id, limit, look_up)
        return self._reply(written.tokens, reply.unfinished)

    @torch.no_grad()
    def ours(self, request: Request, **options: Any) -> bench_decoding.Reply:
        """One of our decodings."""
        ids = torch.tensor([request.row.prompt_ids], device=self.model.device)
        output = self.model.generate(
            ids,
            tools=request.row.tools,
            tokenizer=self.tokenizer,
            max_tool_calls=MAX_CALLS,
            max_new_tokens=TEXT_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            **options,
        )
        stats = output.stats[0]
        return self._reply(output.sequences[0, ids.shape[1] :].tolist(), bool(stats.cut), stats.base_forwards)

    def _reply(self, tokens: Sequence[int], cut: bool, counted: int | None = None) -> bench_decoding.Reply:
        """A reply without its end token."""
        end = self.tokenizer.eos_token_id
        tokens = [token for token in tokens if token != end]
        return bench_decoding.Reply(read_calls(self.bench.vocabulary, tokens), cut, tokens, counted=counted)


Decoding = Callable[[Arena, Request], bench_decoding.Reply]
"""Its reply's `arguments` are the list of calls; None where the reply cannot be read."""


def decodings(engines: Sequence[str]) -> dict[str, Decoding]:
    """What is compared, by name; see the head of this file."""

    def rival(**options: Any) -> Decoding:
        return lambda arena, request: arena.rival(request, **options)

    def ours(**options: Any) -> Decoding:
        return lambda arena, request: arena.ours(request, **options)

    look_up = rivals.LOOK_UP_TOKENS
    found: dict[str, Decoding] = {"raw": Arena.raw, "raw+lookup": lambda arena, r: arena.raw(r, look_up)}
    for engine in engines:
        found[engine] = rival(engine=engine)
        found[f"{engine}+jump"] = rival(engine=engine, jump=True)
        found[f"{engine}+jump+lookup"] = rival(engine=engine, jump=True, look_up=look_up)
    found[REFERENCE] = ours(decoding="ar")
    for name in ("verified", "diffusion"):
        found |= {f"{name}+{drafter}": ours(decoding=name, drafter=drafter) for drafter in DRAFTERS}
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The report
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Texts:
    """Requests of a set as the metrics take them, as JSON texts.

    Args:
        gold: calls.
        tools: in OpenAI style, schemas of draft 2020-12.
        said: messages.
    """

    gold: list[str]
    tools: list[str]
    said: list[str]


def texts_of(todo: Sequence[Request]) -> Texts:
    """The texts of requests."""
    tools = [
        [{"function": {"name": name, "parameters": schema}} for name, schema in tools_of(request)] for request in todo
    ]
    return Texts(
        [json.dumps(request.row.calls) for request in todo],
        [json.dumps(one) for one in tools],
        [json.dumps(request.row.messages) for request in todo],
    )


def set_report(todo: Sequence[Request], rows: Sequence[Mapping[str, Any]], chosen: Sequence[str]) -> dict[str, Any]:
    """All that is measured of a set.

    Args:
        todo: the requests.
        rows: what `Arena.row` gave for each.
        chosen: names of the decodings.

    Returns:
        Numbers of requests, `hallucinated_gold` (the rate of the gold calls), compilation in ms a request by engine,
        and `summary` by decoding.
    """
    answers = [row["answers"] for row in rows]
    common = [place for place, found in enumerate(answers) if all(found.get(name, {}).get("calls") for name in chosen)]
    gold = _metric("hallucination_rate", texts := texts_of(todo), texts.gold)
    engines = dict.fromkeys(name for row in rows for name in row["compile"])
    return {
        "requests": len(todo),
        "answered_by_all_with_a_call": len(common),
        "hallucinated_gold": _rounded(gold["hallucination_rate"]),
        "compile_ms": {
            name: _spread([1000 * row["compile"][name] for row in rows if name in row["compile"]], 2)
            for name in engines
        },
        "decodings": {name: summary(name, todo, texts, answers, common) for name in chosen},
    }


def summary(
    name: str,
    todo: Sequence[Request],
    texts: Texts,
    answers: Sequence[Mapping[str, Any]],
    common: Sequence[int],
) -> dict[str, Any]:
    """What one decoding got right and what it cost.

    Args:
        name: of the decoding.
        todo: the requests.
        texts: of the requests.
        answers: to each, by decoding.
        common: places of the requests that all decodings answered with a call; costs are over these.

    Returns:
        Counts: `requests`, `refused` (by the engine), `exact`, of them `calls_exact` of `calls_wanted`, `ast` of
        `ast_of` (where accepted answers are known), `valid`, `unread`, `calls_missing`, `calls_unwanted`, `cut`,
        `calls`, `arguments`, `unknown_names`, `unsupported_values`, and, of ours, `same_tokens_as_ar`. Rates:
        `hallucination_rate`, `relevance`, `irrelevance`. Costs: spreads of forwards, tokens and milliseconds.
    """
    places = [place for place, found in enumerate(answers) if name in found]
    if not places:
        return {"requests": 0, "refused": len(todo)}
    own = [answers[place][name] for place in places]
    kept = Texts(*([column[place] for place in places] for column in (texts.gold, texts.tools, texts.said)))
    made = ["" if answer["calls"] is None else json.dumps(answer["calls"]) for answer in own]
    exact = load_metric("call_match").compute(predictions=made, references=kept.gold)["right"]
    wants = [bool(todo[place].row.calls) for place in places]
    valid = load_metric("call_validity").compute(predictions=made, tools=kept.tools)["valid"]
    decided = load_metric("relevance").compute(predictions=made, references=kept.gold)
    invented = _metric("hallucination_rate", kept, made)
    same = [answers[place].get(REFERENCE, {}).get("reply") == answers[place][name]["reply"] for place in places]
    return {
        "requests": len(places),
        "refused": len(todo) - len(places),
        "exact": sum(exact),
        "calls_wanted": sum(wants),
        "calls_exact": sum(right for right, want in zip(exact, wants, strict=True) if want),
        **_accepted([todo[place] for place in places], own, exact),
        "valid": round(valid * len(places)),
        "unread": decided["unread"],
        **{count: decided[count] for count in ("calls_missing", "calls_unwanted")},
        **{rate: _rounded(decided[rate]) for rate in ("relevance", "irrelevance")},
        "cut": sum(answer["cut"] for answer in own),
        **{count: invented[count] for count in ("calls", "arguments", "unknown_names", "unsupported_values")},
        "hallucination_rate": _rounded(invented["hallucination_rate"]),
        "same_tokens_as_ar": sum(same) if is_ours(name) else None,
        **costs([answers[place][name] for place in common]),
        "ms_of_all_requests": _spread([1000 * answer["seconds"] for answer in own]),
    }


def is_ours(name: str) -> bool:
    """Whether a decoding is of this repository, and so writes the tokens of `ar` or might."""
    return name.split("+")[0] in generation.DECODINGS


def _accepted(todo: Sequence[Request], own: Sequence[Mapping[str, Any]], exact: Sequence[bool]) -> dict[str, Any]:
    """How many of the requests with accepted answers are answered by one."""
    known = [entry for entry in zip(todo, own, exact, strict=True) if entry[0].answers is not None]
    right = [answer["calls"] is not None and one.accepts(answer["calls"], equal) for one, answer, equal in known]
    return {"ast": sum(right) if known else None, "ast_of": len(known)}


def costs(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Forwards, tokens and times of answers; None where there are none."""
    calls = sum(len(answer["calls"]) for answer in answers)
    base = [answer["base_forwards"] for answer in answers]
    return {
        "base_forwards_per_call": _rounded(sum(base) / calls, 2) if calls else None,
        "base_forwards": _spread(base, 2),
        "head_forwards": _spread([answer["head_forwards"] for answer in answers], 2),
        "tokens": _spread([len(answer["reply"]) for answer in answers], 2),
        "ms": _spread([1000 * answer["seconds"] for answer in answers]),
    }


def _metric(name: str, texts: Texts, made: list[str]) -> dict[str, Any]:
    return load_metric(name).compute(predictions=made, tools=texts.tools, conversations=texts.said)


def _rounded(number: float | None, digits: int = 4) -> float | None:
    return None if number is None else round(number, digits)


def _spread(values: Sequence[float], digits: int = 1) -> dict[str, float] | None:
    """Mean, and percentiles that are values which occurred."""
    if not values:
        return None
    found = [float(np.mean(values)), *np.percentile(values, (50, 95), method="inverted_cdf").tolist()]
    return {name: round(value, digits) for name, value in zip(("mean", "p50", "p95"), found, strict=True)}


_Row = Mapping[str, Any]
_COLUMNS: dict[str, Callable[[_Row], str]] = {
    "exact": lambda row: f"{row['exact']} of {row['requests']}",
    "calls exact": lambda row: _of(row["calls_exact"], row["calls_wanted"]),
    "AST": lambda row: _of(row["ast"], row["ast_of"]),
    "valid": lambda row: f"{row['valid']} of {row['requests']}",
    "hallucinated": lambda row: "" if row["hallucination_rate"] is None else f"{row['hallucination_rate']:.1%}",
    "calls missing": lambda row: str(row["calls_missing"]),
    "calls unwanted": lambda row: str(row["calls_unwanted"]),
    "cut": lambda row: str(row["cut"]),
    "base / call": lambda row: _shown(row["base_forwards_per_call"]),
    "base p95": lambda row: _part(row["base_forwards"], "p95"),
    "head": lambda row: _part(row["head_forwards"], "mean"),
    "tokens": lambda row: _part(row["tokens"], "mean"),
    "ms p50": lambda row: _part(row["ms"], "p50"),
    "ms p95": lambda row: _part(row["ms"], "p95"),
    "= ar": lambda row: "" if row["same_tokens_as_ar"] is None else f"{row['same_tokens_as_ar']} of {row['requests']}",
}


def table(sets: Mapping[str, Mapping[str, Any]]) -> str:
    """The comparison as a Markdown table.

    Args:
        sets: what `set_report` gave, by set.

    Returns:
        One line for each set and decoding; an engine that refused every request has no numbers.
    """
    lines = [
        [name, f"`{decoding}`", *(read(row) if row["requests"] else "" for read in _COLUMNS.values())]
        for name, found in sets.items()
        for decoding, row in found["decodings"].items()
    ]
    return markdown(["set", "decoding", *_COLUMNS], lines)


def _of(part: int | None, whole: int) -> str:
    return f"{part} of {whole}" if whole else ""


def _shown(number: float | None) -> str:
    return "" if number is None else f"{number:g}"


def _part(spread: Mapping[str, float] | None, name: str) -> str:
    return "" if spread is None else f"{spread[name]:g}"


_COLOURS = {"ours": "tab:blue", "engines": "tab:orange", "raw": "tab:gray"}


def plot(sets: Mapping[str, Mapping[str, Any]], path: Path) -> bool:
    """Draw right requests, base forwards per call and median time as bars, a line of three charts for each set.

    Args:
        sets: what `set_report` gave, by set.
        path: of the PNG file.

    Returns:
        Whether it was drawn: not where matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{path} is not drawn: pip install matplotlib (it is part of the extra `evaluation`)", file=sys.stderr)
        return False
    charts: dict[str, Callable[[_Row], float]] = {
        "requests right (AST where known, else exact), %": _right,
        "base forwards per call": lambda row: row["base_forwards_per_call"] or 0,
        "ms per reply that calls, median": lambda row: row["ms"]["p50"] if row["ms"] else 0,
    }
    figure = Figure(figsize=(15, 1 + 4 * len(sets)), layout="constrained")
    for line, (name, found) in zip(figure.subplots(len(sets), len(charts), squeeze=False), sets.items(), strict=True):
        rows = {decoding: row for decoding, row in found["decodings"].items() if row["requests"]}
        groups = ["ours" if is_ours(decoding) else "raw" if "raw" in decoding else "engines" for decoding in rows]
        for axes, (title, read) in zip(line, charts.items(), strict=True):
            bars = axes.barh(list(rows), [read(row) for row in rows.values()], color=[_COLOURS[g] for g in groups])
            axes.bar_label(bars, fmt="%.3g", padding=2)
            axes.margins(x=0.15)  # room for the labels
            axes.invert_yaxis()
            axes.set_title(f"{name}: {title}", fontsize=10)
    figure.savefig(path, dpi=120)
    return True


def _right(row: _Row) -> float:
    return 100 * (row["ast"] / row["ast_of"] if row["ast_of"] else row["exact"] / row["requests"])


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command's options; `versions` are those of the engines that are installed."""
    parser = evaluation_parser("compare", __doc__, limit=50)
    names = list(decodings(list(ENGINES)))
    parser.add_argument(
        "--sets", nargs="+", default=["simple_python", "multiple", "unseen"], choices=[*OWN_SETS, *BFCL_SETS]
    )
    parser.add_argument("--decodings", nargs="+", choices=names, help="by default all whose engine is installed")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--jobs", type=int, default=0, help="processes that share the requests; 0 = 2 on a CPU, else 1")
    options = parser.parse_args(arguments)
    if options.limit < 0 or options.threads < 0 or options.jobs < 0:
        parser.error("--limit, --threads and --jobs are numbers from 0")
    options.jobs = options.jobs or (min(2, torch.get_num_threads()) if options.device == "cpu" else 1)
    options.threads = options.threads or max(1, torch.get_num_threads() // options.jobs)
    wanted = [name for name in ENGINES if options.decodings is None or _uses(options.decodings, name)]
    options.versions = installed(wanted)
    missing = [name for name in wanted if name not in options.versions]
    if missing and options.decodings is not None:
        parser.error(f"--decodings: {', '.join(missing)} is not installed: pip install {' '.join(missing)}")
    options.decodings = options.decodings or list(decodings(list(options.versions)))
    if REFERENCE not in options.decodings:
        parser.error("--decodings must hold ar: verified is checked against it")
    for name in options.sets:
        path = options.data / ("train" if name == "seen" else "dev/dev.jsonl.gz")
        path = options.data / BFCL_FOLDER / f"{name}.jsonl.gz" if name in BFCL_SETS else path
        if not path.exists():
            parser.error(f"--sets {name}: there is no {path}; name the folder of the data with --data")
    options.command = shlex.join(["python", "-m", "eval.compare", *(sys.argv[1:] if arguments is None else arguments)])
    return options


def _uses(names: Sequence[str], engine: str) -> bool:
    return any(name.split("+")[0] == engine for name in names)


def opened(options: argparse.Namespace) -> tuple["Contest", PartialResults]:
    """The model with its engines, and the results so far.

    Raises:
        SystemExit: the model cannot be loaded, or the partial results are of another run.
    """
    decisive = ("model", "data", "sets", "decodings", "limit", "seed", "threads", "jobs", "device", "dtype")
    try:
        contest = Contest(options)
        store = PartialResults(options.out, {name: getattr(options, name) for name in decisive})
    except (OSError, ValueError) as error:
        raise SystemExit(f"eval.compare: {error}") from error
    return contest, store


class Contest:
    """The requests and the decodings that a command line names, in one process.

    Args:
        options: of the command line.

    Raises:
        OSError, ValueError: the model cannot be loaded.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        shape = load(options.model, options.device, getattr(torch, options.dtype))
        self.options = options
        self.arena = Arena(shape.model, shape.tokenizer, list(options.versions))
        known = decodings(list(options.versions))
        self.chosen = {name: decoding for name, decoding in known.items() if name in options.decodings}
        self.sets: dict[str, tuple[list[Request], int]] = {}
        self.warm = False

    def requests(self, name: str) -> tuple[list[Request], int]:
        """The requests of a set, and how many records were left out.

        Raises:
            SystemExit: all were.
        """
        if name not in self.sets:
            limit = self.options.limit or sys.maxsize
            found = requests(name, self.options.data, self.arena.tokenizer, self.arena.bench.room, limit)
            if not found[0]:
                raise SystemExit(f"{name}: all {found[1]} records were left out; is this the model that was meant?")
            self.sets[name] = found
        return self.sets[name]

    def row(self, name: str, number: int) -> dict[str, Any]:
        """What `Arena.row` gives for a request; what is set up at the first use is nobody's cost."""
        request = self.requests(name)[0][number]
        if not self.warm:
            self.arena.row(request, self.chosen, random.Random(self.options.seed))
            gc.collect()
            self.warm = True
        return self.arena.row(request, self.chosen, random.Random(f"{self.options.seed} {name} {number}"))


_contest: Contest | None = None
"""Of a process that `shared` started."""


def _enter(options: argparse.Namespace) -> None:
    global _contest
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asked ends this one
    torch.set_num_threads(options.threads)
    _contest = Contest(options)


def _row(name: str, number: int) -> dict[str, Any]:
    assert _contest is not None
    return _contest.row(name, number)


def shared(
    options: argparse.Namespace, places: Sequence[tuple[str, int]]
) -> Iterator[tuple[tuple[str, int], dict[str, Any]]]:
    """Rows of requests from `options.jobs` processes, each with a model of its own, as soon as they are known.

    Args:
        options: of the command line.
        places: set and number of each request.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context, initializer=_enter, initargs=(options,)) as pool:
        futures = {pool.submit(_row, *place): place for place in places}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def run(contest: Contest, store: PartialResults, options: argparse.Namespace) -> dict[str, Any]:
    """All sets through all decodings.

    Returns:
        What `set_report` gives by set, with `left_out`: records whose prompt is too long or that ours refuses.
    """
    places = [(name, number) for name in options.sets for number in range(len(contest.requests(name)[0]))]
    missing = [place for place in places if "{} {}".format(*place) not in store]
    here = ((place, contest.row(*place)) for place in missing)
    rows = here if options.jobs == 1 else shared(options, missing)
    for (name, number), row in tqdm(rows, "compare", total=len(missing), unit="request"):
        store.put(f"{name} {number}", row)
    found: dict[str, Any] = {}
    for name in options.sets:
        todo, left_out = contest.requests(name)
        known = [store[f"{name} {number}"] for number in range(len(todo))]
        found[name] = {"left_out": left_out, **set_report(todo, known, list(contest.chosen))}
    return found


def show(sets: Mapping[str, Mapping[str, Any]], versions: Mapping[str, str]) -> None:
    """Print the table and what stands beside it."""
    print(f"\n{table(sets)}\n")
    for name, found in sets.items():
        shared, gold = found["answered_by_all_with_a_call"], found["hallucinated_gold"]
        print(f"{name}: {found['requests']} requests, {found['left_out']} left out, costs over {shared} of them")
        print(f"  gold calls, hallucinated: {'-' if gold is None else f'{gold:.1%}'}")
        print(f"  compilation apart, ms a request: {json.dumps(found['compile_ms'])}")
        for decoding, row in found["decodings"].items():
            if decoding.startswith("verified") and row["same_tokens_as_ar"] < row["requests"]:
                different = row["requests"] - row["same_tokens_as_ar"]
                print(f"  WARNING: {decoding} differs from ar on {different} of {row['requests']} requests")
    print("\n".join(NOTES.values()))
    print(json.dumps(versions))


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    options = parse(arguments)
    with threads(options.threads):
        contest, store = opened(options)
        with store.kept_when_interrupted("requests"):
            sets = run(contest, store, options)
    measured_with = versions() | options.versions
    report = {
        "command": options.command,
        "versions": measured_with,
        "threads": options.threads,
        "jobs": options.jobs,
        "device": device_name(torch.device(options.device)),
        "dtype": options.dtype,
        "tool_call_threshold": getattr(contest.arena.model.generation_config, "tool_call_threshold", None),
        "notes": NOTES,
        "sets": sets,
    }
    store.finish(report)
    show(sets, measured_with)
    plot(sets, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
