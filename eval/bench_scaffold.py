"""What tools cost before and while they are called, at a wide vocabulary: `python -m eval.bench_scaffold`.

Times compilation, lifts, joint commits and masks; puts hostile schemas into a process that they may ruin; and counts
which calls of the public BFCL data can be written, and what llguidance says of what our grammar writes. Without that
data the probes of `eval.schema_probes` serve as tools. Measures no model.
"""

import argparse
import gc
import gzip
import json
import os
import platform
import random
import re
import resource
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonschema import Draft202012Validator
from tqdm import tqdm

from eval.schema_coverage import (
    BY_DESIGN,
    ENGINES,
    LLGUIDANCE_OPTIONS,
    Compiler,
    Lost,
    Refused,
    Worker,
    judge,
    llguidance,
)
from eval.schema_probes import PROBES, Probe
from eval.wide_vocabulary import WIDE, wide_tokenizer
from repo_package import ROOT, load_repo_module

dialects = load_repo_module("schema_dialects")
scaffolds = load_repo_module("schema_scaffold")
layouts = load_repo_module("scaffold_layout")
slots = load_repo_module("slot_grammar")
grammars = load_repo_module("reply_grammar")

PUBLIC = ROOT.parent / "shared" / "data" / "bfcl_open"
ARRAY_BUDGET = 4
SLOT_POSITIONS = 16
TARGETS = {
    "compile": {"p50_ms": 1.0, "p99_ms": 20.0},
    "300 tools": {"seconds": 0.5},
    "commit, closed": {"p50_ms": 1.0},
    "commit, open": {"p50_ms": 3.0},
    "hostile": {"seconds": 2.0},
}
"""What must hold."""

Tool = dict[str, Any]


def tool_of(parameters: Any, name: str = "act") -> Tool:
    """A tool of the OpenAI form."""
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def value_of(schema: Any, **more: Any) -> dict[str, Any]:
    """Parameters of one required argument."""
    return {"type": "object", "properties": {"value": schema}, "required": ["value"], **more}


def spread(seconds: Sequence[float]) -> dict[str, Any]:
    """How times are spread: count, and p50, p99 and maximum in milliseconds."""
    if not seconds:
        return {"n": 0}
    times = 1000 * np.array(seconds)
    p50, p99 = np.percentile(times, [50, 99])
    return {
        "n": len(times),
        **{key: round(float(v), 4) for key, v in (("p50_ms", p50), ("p99_ms", p99), ("max_ms", times.max()))},
    }


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that an action took, and its result."""
    start = time.perf_counter()
    result = action()
    return time.perf_counter() - start, result


# ---------------------------------------------------------------------------------------------------------------------
# Tools and calls
# ---------------------------------------------------------------------------------------------------------------------


def made_calls(guaranteed: Callable[[Probe], bool] = lambda probe: True) -> list[tuple[Tool, dict[str, Any]]]:
    """Tools of every keyword with arguments that fit: the probes that compile and that `guaranteed` picks."""
    picked = [probe for probe in PROBES if probe.name not in BY_DESIGN and guaranteed(probe)]
    tools = [(tool_of(probe.parameters), probe.accepted_texts) for probe in picked]
    return [(tool, json.loads(text)) for tool, texts in tools if compiled(tool) is not None for text in texts]


def public_tools(data: Path) -> list[Tool]:
    """The different functions of BFCL as they are published, in their own dialect."""
    found: dict[str, Tool] = {}
    for path in sorted((data / "original").glob("BFCL_v4_*.json")):
        for line in path.read_text(encoding="utf-8").splitlines():
            for function in json.loads(line)["function"]:
                found.setdefault(json.dumps(function), {"type": "function", "function": function})
    return list(found.values())


def public_calls(data: Path) -> Iterator[tuple[Tool, dict[str, Any]]]:
    """The gold calls of BFCL, each with its tool."""
    for path in sorted((data / "normalised").glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for record in map(json.loads, file):
                tools = {tool["function"]["name"]: tool for tool in record["tools"]}
                yield from ((tools[call["name"]], call["arguments"]) for call in record["calls"])


def compiled(tool: Tool) -> Any:
    """The scaffold of a tool, None where it is refused."""
    try:
        return scaffolds.compile_scaffold(tool)
    except scaffolds.UnsupportedSchemaError:
        return None


# ---------------------------------------------------------------------------------------------------------------------
# Compilation, lifts, memory
# ---------------------------------------------------------------------------------------------------------------------


def renamed(tool: Tool, suffix: str) -> Tool:
    """The same tool under another name, which no cache knows."""
    return {**tool, "function": {**tool["function"], "name": tool["function"]["name"] + suffix}}


def ready(vocabulary: Any, tool: Tool) -> float | None:
    """Seconds from a tool to all that a first token and a first draft need; None where it is refused."""
    start = time.perf_counter()
    scaffold = compiled(tool)
    if scaffold is None:
        return None
    layout = layouts.draft_layout(scaffold, ARRAY_BUDGET)
    if layout is not None:
        budgets = [
            slots.slot_budget(slot.leaf, SLOT_POSITIONS) if slot.leaf.kind != "choice" else 1 for slot in layout.slots
        ]
        slots.build_canvas(vocabulary, layout, budgets, vocabulary.size, vocabulary.size + 1)
    grammars.ReplyGrammar(vocabulary, [scaffold], 1, 256, 1024).start()
    return time.perf_counter() - start


def bench_compile(vocabulary: Any, tools: Sequence[Tool]) -> dict[str, Any]:
    """Compilation of every tool: alone, and with layout, canvas and grammar.

    `first` meets each automaton for the first time in this process; `again` knows automata and lifts, but no tool.
    """
    report: dict[str, Any] = {"tools": len(tools)}
    for attempt in ("first", "again"):
        fresh = [renamed(tool, f"_{attempt}") for tool in tools]
        alone = [timed(partial(compiled, tool)) for tool in tqdm(fresh, f"compile {attempt}")]
        fresh = [renamed(tool, f"_{attempt}_ready") for tool in tools]
        whole = [ready(vocabulary, tool) for tool in tqdm(fresh, f"ready {attempt}")]
        report[f"compile {attempt}"] = spread([seconds for seconds, scaffold in alone if scaffold is not None])
        report[f"ready {attempt}"] = spread([seconds for seconds in whole if seconds is not None])
    report["refused"] = sum(scaffold is None for _, scaffold in alone)
    report["cached"] = spread([timed(partial(compiled, tool))[0] for tool in fresh[-1000:]])
    return report


def bench_many(tools: Sequence[Tool], count: int = 300) -> dict[str, Any]:
    """Compilation of many tools at once, and the memory that each keeps."""
    many = [renamed(tools[index % len(tools)], f"_many_{index}") for index in range(count)]
    seconds, _ = timed(lambda: [compiled(tool) for tool in many])
    traced = [renamed(tool, "_traced") for tool in many]
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    kept = [compiled(tool) for tool in traced]
    after = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    alive = sum(scaffold is not None for scaffold in kept)
    return {"tools": count, "seconds": round(seconds, 4), "kib_per_tool": round((after - before) / 1024 / alive, 2)}


LIFTED: dict[str, Any] = {
    "string": {"type": "string"},
    "string, maxLength 64": {"type": "string", "maxLength": 64},
    "string, minLength 8": {"type": "string", "minLength": 8},
    "integer": {"type": "integer"},
    "integer, 1 to 1000": {"type": "integer", "minimum": 1, "maximum": 1000},
    "number": {"type": "number"},
    "number, 0 to 1": {"type": "number", "minimum": 0, "maximum": 1},
    "number, multiple of 0.01": {"type": "number", "multipleOf": 0.01},
    **{
        f"format {name}": {"type": "string", "format": name}
        for name in ("date", "date-time", "time", "duration", "email", "uri", "uuid", "ipv4", "ipv6", "hostname")
    },
    "pattern, plate": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}-[A-Z]{2}$"},
    "pattern, unanchored": {"type": "string", "pattern": "[a-z]+@"},
    "pattern, password": {"type": "string", "pattern": r"^(?=.*[A-Z])(?=.*\d).{8,}$"},
    "pattern, e-mail of zod": next(p.schema for p in PROBES if p.name == "pattern: e-mail of zod"),
}
"""Schemas whose automata are lifted to the tokens at their first use."""


def first_leaf(scaffold: Any) -> Any:
    """The leaf of the only argument of a tool."""
    return scaffold.root.properties[0].node


def bench_lifts(size: int) -> list[dict[str, Any]]:
    """First uses, in a process that has met no automaton yet; see `measure_lifts`."""
    worker = Worker(partial(lifter, size), seconds=300.0)
    rows = worker.ask(list(LIFTED))
    worker.close()
    return rows


def lifter(size: int) -> Callable[[list[str]], list[dict[str, Any]]]:
    """What measures the lifts of some of `LIFTED` at so many tokens."""
    return partial(measure_lifts, wide_tokenizer(size), size)


def measure_lifts(tokenizer: Any, size: int, names: Sequence[str]) -> list[dict[str, Any]]:
    """Building an automaton, lifting it for drafts (raw) and for masks (escaped), and lifting it with files on disk.

    Small lifts are cheaper than a file and made anew.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        cold, storing, reading = (slots.Vocabulary(tokenizer, size) for _ in range(3))
        warming = scaffolds.compile_scaffold(tool_of(value_of({"type": "string", "pattern": "^warm$"})))
        for vocabulary in (cold, storing, reading):
            os.environ[slots.CACHE_VARIABLE] = "" if vocabulary is cold else folder
            vocabulary.lift(first_leaf(warming).automaton)
        for name in names:
            tool = tool_of(value_of(LIFTED[name]), f"lift {name}")
            build, scaffold = timed(partial(scaffolds.compile_scaffold, tool))
            raw = first_leaf(scaffold).automaton
            escaped = raw.escaped if first_leaf(scaffold).quoted else raw
            os.environ[slots.CACHE_VARIABLE] = ""
            lift, lifted = timed(partial(cold.lift, raw))
            lift_escaped, _ = timed(partial(cold.lift, escaped))
            os.environ[slots.CACHE_VARIABLE] = folder
            storing.lift(raw)
            from_disk, _ = timed(partial(reading.lift, raw))
            os.environ[slots.CACHE_VARIABLE] = ""
            milliseconds = {"build": build, "lift": lift, "lift_escaped": lift_escaped, "from_disk": from_disk}
            rows.append(
                {
                    "kind": name,
                    "states": len(raw.accepting),
                    "classes": lifted.transitions.shape[1],
                    "kib": round(lifted.nbytes / 1024, 1),
                    **{f"{key}_ms": round(1000 * seconds, 2) for key, seconds in milliseconds.items()},
                }
            )
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Joint commits and masks
# ---------------------------------------------------------------------------------------------------------------------

COMMITTED: dict[str, tuple[str, Any]] = {
    "choice of 50": (
        "closed",
        {"enum": [f"{'the quick brown fox jumps over a dog ' * 2}{index}" for index in range(50)]},
    ),
    "boolean": ("closed", {"type": "boolean"}),
    "integer": ("closed", {"type": "integer"}),
    "number": ("closed", {"type": "number"}),
    "date": ("closed", {"type": "string", "format": "date"}),
    "uuid": ("closed", {"type": "string", "format": "uuid"}),
    "email": ("open", {"type": "string", "format": "email"}),
    "string": ("open", {"type": "string"}),
    "string, maxLength 64": ("open", {"type": "string", "maxLength": 64}),
}
"""Slots whose commits are timed, and whether the target of closed or of open kinds is theirs."""


def canvas_of(vocabulary: Any, scaffold: Any, positions: int = SLOT_POSITIONS, arrays: int = ARRAY_BUDGET) -> Any:
    """The canvas of a tool with so many positions for every open slot; None where it cannot be drafted."""
    layout = layouts.draft_layout(scaffold, arrays)
    if layout is None or any(slot.leaf.kind == "guided" for slot in layout.slots):
        return None
    return slots.build_canvas(vocabulary, layout, [positions] * len(layout.slots), vocabulary.size, vocabulary.size + 1)


def random_scores(rows: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """float32 [rows, width]: scores without any preference. Rows are stretches of one long noise, which is fast."""
    starts = torch.randint(_STRETCH, (rows,), generator=generator).tolist()
    return torch.stack([_noise(width)[start : start + width] for start in starts])


_STRETCH = 1 << 16


@cache
def _noise(width: int) -> torch.Tensor:
    return torch.randn(width + _STRETCH, generator=torch.Generator().manual_seed(0))


def bench_commits(vocabulary: Any, rounds: int, seed: int) -> list[dict[str, Any]]:
    """Joint commits of one slot, and of eight alike at once."""
    generator, rows = torch.Generator().manual_seed(seed), []
    for name, (target, schema) in tqdm(COMMITTED.items(), "commits"):
        canvas = canvas_of(vocabulary, scaffolds.compile_scaffold(tool_of(value_of(schema), f"commit {name}")))
        (slot,) = canvas.slots
        free = torch.full((slot.length,), -1)
        scores = [random_scores(slot.length, vocabulary.size + 2, generator).log_softmax(dim=-1) for _ in range(8)]
        slots.commit_slots([slot] * 8, scores, [free] * 8, canvas.null_id)  # tables are made at the first use
        one = [timed(partial(slots.commit_slot, slot, scores[n % 8], free, canvas.null_id))[0] for n in range(rounds)]
        many = partial(slots.commit_slots, [slot] * 8, scores, [free] * 8, canvas.null_id)
        eight = [timed(many)[0] / 8 for _ in range(max(1, rounds // 8))]
        batched = {f"batched_{key}": value for key, value in spread(eight).items() if key != "n"}
        rows.append({"kind": name, "target": target, "positions": slot.length, **spread(one), **batched})
    return rows


def bench_masks(vocabulary: Any, calls: Sequence[tuple[Tool, dict[str, Any]]]) -> dict[str, Any]:
    """Masks of the reference and of llguidance, token by token over the same calls.

    `first walk` knows no literal text of the tool yet; forced tokens need no mask and are left out of the others.
    """
    rival = _llguidance_masks(vocabulary) if ENGINES["llguidance"].version else None
    times: dict[str, list[float]] = {"mask, first walk": [], "mask": [], "advance": [], "llguidance": []}
    tokens = forced = 0
    for tool, arguments in tqdm(calls, "masks"):
        scaffold = compiled(tool)
        if scaffold is None or misfit(vocabulary, tool, arguments):
            continue
        fresh = scaffolds.compile_scaffold(renamed(tool, "_masks"))
        spelled = grammars.call_continuation(vocabulary, fresh, arguments, b'\n{"name": "')
        for walk in ("mask, first walk", "mask"):
            cursor = grammars.ReplyGrammar(vocabulary, [fresh], 1, 256, 4096).start()
            for token in spelled:
                if cursor.forced() is None:
                    times[walk].append(timed(cursor.mask)[0])
                seconds, after = timed(partial(cursor.advance, token))
                if walk == "mask":
                    times["advance"].append(seconds)
                    tokens, forced = tokens + 1, forced + (cursor.forced() is not None)
                cursor = after
        if rival is not None:
            times["llguidance"] += rival(tool, arguments)
    return {"tokens": tokens, "forced": forced, **{name: spread(values) for name, values in times.items()}}


def _llguidance_masks(vocabulary: Any) -> Callable[[Tool, dict[str, Any]], list[float]]:
    from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
    from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

    class Tokens:
        tokens = [token or f"<|{index}|>".encode() for index, token in enumerate(vocabulary.bytes)]
        special_token_ids = [index for index, token in enumerate(vocabulary.bytes) if not token]
        eos_token_id = vocabulary.im_end
        bos_token_id = None

        def __call__(self, text: bytes) -> list[int]:
            return list(vocabulary.encode(bytes(text).decode()))

    tokenizer = LLTokenizer(TokenizerWrapper(Tokens()))
    bitmask = allocate_token_bitmask(1, vocabulary.size)

    def masks(tool: Tool, arguments: dict[str, Any]) -> list[float]:
        schema = json.dumps(standard_parameters(tool))
        matcher = LLMatcher(
            tokenizer, LLMatcher.grammar_from_json_schema(schema, overrides=LLGUIDANCE_OPTIONS), log_level=0
        )
        seconds = []
        for segment in scaffolds.argument_segments(compiled(tool), arguments):
            for token in vocabulary.encode(segment):
                if matcher.is_error():
                    return []
                seconds.append(timed(partial(fill_next_token_bitmask, matcher, bitmask))[0])
                matcher.consume_token(token)
        return seconds

    return masks


# ---------------------------------------------------------------------------------------------------------------------
# Hostile schemas
# ---------------------------------------------------------------------------------------------------------------------


def _pattern(pattern: str) -> dict[str, Any]:
    return value_of({"type": "string", "pattern": pattern})


def _nested(depth: int, leaf: Any, wrap: Callable[[Any], Any]) -> Any:
    for _ in range(depth):
        leaf = wrap(leaf)
    return leaf


def _doubling(count: int) -> dict[str, Any]:
    """Definitions that each hold the next one twice."""
    both = {f"d{n}": value_of({"$ref": f"#/$defs/d{n + 1}"}) for n in range(count)}
    for n, schema in enumerate(both.values()):
        schema["properties"]["other"] = {"$ref": f"#/$defs/d{n + 1}"}
        schema["required"] = ["value", "other"]
    return {"$defs": {**both, f"d{count}": {"type": "string"}}, **value_of({"$ref": "#/$defs/d0"})}


_STRING = {"type": "string"}

HOSTILE: dict[str, Callable[[], Any]] = {
    "pattern (a|b)*a(a|b){20}": lambda: _pattern("^(a|b)*a(a|b){20}$"),
    "pattern (a{1000}){1000}": lambda: _pattern("^(a{1000}){1000}$"),
    "pattern ((a*)*)*b": lambda: _pattern("^((a*)*)*b$"),
    "pattern (a?){500}a{500}": lambda: _pattern("^(a?){500}a{500}$"),
    "pattern .*(.*(.*x)) unanchored": lambda: _pattern("(.*.*.*.*.*.*x)+y{30}"),
    "pattern of 50 lookaheads": lambda: _pattern(
        "^" + "".join(f"(?=.*{chr(97 + n % 26)}{n})" for n in range(50)) + ".*$"
    ),
    "pattern of 12 crossing lookaheads": lambda: _pattern("^" + "".join(f"(?=.*{c})" for c in "abcdefghijkl") + ".*$"),
    "pattern of nested lookaheads": lambda: _pattern("^" + _nested(200, "a", lambda inner: f"(?!{inner})") + ".*$"),
    "pattern of 10,000 characters": lambda: _pattern("^" + "ab?[c-e]" * 1250 + "$"),
    "pattern of 10,000 alternatives": lambda: _pattern("^(" + "|".join(f"w{n}x" for n in range(10_000)) + ")$"),
    "pattern of 5,000 parentheses": lambda: _pattern("^" + "(" * 5000 + "a" + ")" * 5000 + "$"),
    "pattern that is no expression": lambda: _pattern("^(a[$"),
    "30 patterns at once": lambda: value_of(
        {"type": "string", "allOf": [{"pattern": f"{chr(97 + n % 26)}.{{{n}}}x"} for n in range(30)]}
    ),
    "10,000 properties": lambda: {"type": "object", "properties": {f"p{n}": _STRING for n in range(10_000)}},
    "10,000 required properties": lambda: {
        "type": "object",
        "properties": {f"p{n}": _STRING for n in range(10_000)},
        "required": [f"p{n}" for n in range(10_000)],
    },
    "1,900 properties": lambda: {"type": "object", "properties": {f"p{n}": {"type": "integer"} for n in range(1900)}},
    "1,000-deep objects": lambda: _nested(1000, _STRING, value_of),
    "200-deep arrays": lambda: value_of(_nested(200, _STRING, lambda inner: {"type": "array", "items": inner})),
    "900-deep not": lambda: value_of(_nested(900, _STRING, lambda inner: {"not": inner})),
    "reference to itself": lambda: {"$defs": {"a": {"$ref": "#/$defs/a"}}, **value_of({"$ref": "#/$defs/a"})},
    "references in a ring": lambda: {
        "$defs": {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{(n + 1) % 50}"}]} for n in range(50)},
        **value_of({"$ref": "#/$defs/d0"}),
    },
    "recursion that never ends": lambda: {
        "$defs": {"a": value_of({"$ref": "#/$defs/a"})},
        **value_of({"$ref": "#/$defs/a"}),
    },
    "definitions that double 40 times": lambda: _doubling(40),
    "recursive anyOf of 20": lambda: {
        "$defs": {"a": {"anyOf": [_STRING, *(value_of({"$ref": "#/$defs/a"}) for _ in range(20))]}},
        **value_of({"$ref": "#/$defs/a"}),
    },
    "reference that leads nowhere": lambda: value_of({"$ref": "#/$defs/absent"}),
    "reference to the web": lambda: value_of({"$ref": "https://example.org/schema.json"}),
    "allOf of 20 anyOf of 2": lambda: value_of(
        {"allOf": [{"anyOf": [{"pattern": f"a{n}"}, {"pattern": f"b{n}"}]} for n in range(20)], "type": "string"}
    ),
    "allOf of 12 anyOf of 6 objects": lambda: value_of(
        {"allOf": [{"anyOf": [{"type": "object", "required": [f"k{n}{m}"]} for m in range(6)]} for n in range(12)]}
    ),
    "anyOf of 5,000": lambda: value_of({"anyOf": [value_of({"const": n}) for n in range(5000)]}),
    "oneOf of 300 overlapping": lambda: value_of({"oneOf": [{"type": "integer", "minimum": n} for n in range(300)]}),
    "30 nested conditions": lambda: value_of(
        _nested(30, {"type": "integer"}, lambda inner: {"if": {"minimum": 3}, "then": inner, "else": inner})
    ),
    "enum of 1 MB in 100,000 texts": lambda: value_of({"enum": [f"name {n:05d}" for n in range(100_000)]}),
    "enum of 4,000 texts": lambda: value_of({"enum": [f"name {n:05d}" for n in range(4000)]}),
    "enum of one text of 1 MB": lambda: value_of({"enum": ["x" * 1_000_000]}),
    "const of 900 lists": lambda: value_of({"const": _nested(900, 1, lambda inner: [inner])}),
    "name of 1 MB": lambda: {"type": "object", "properties": {"n" * 1_000_000: _STRING}},
    "maxLength 10^12": lambda: value_of({"type": "string", "maxLength": 10**12}),
    "minLength 10^9": lambda: value_of({"type": "string", "minLength": 10**9}),
    "minLength 3,000": lambda: value_of({"type": "string", "minLength": 3000}),
    "minItems 10^9": lambda: value_of({"type": "array", "items": _STRING, "minItems": 10**9}),
    "10^9 unique booleans": lambda: value_of(
        {"type": "array", "items": {"type": "boolean"}, "uniqueItems": True, "minItems": 10**9}
    ),
    "maxItems 10^12": lambda: value_of({"type": "array", "items": _STRING, "maxItems": 10**12}),
    "minContains 10^9": lambda: value_of({"type": "array", "contains": {"const": 1}, "minContains": 10**9}),
    "multipleOf 10^-300": lambda: value_of({"type": "number", "multipleOf": 1e-300}),
    "multipleOf a prime": lambda: value_of({"type": "integer", "multipleOf": 1_000_003}),
    "minimum 10^4000": lambda: value_of({"type": "integer", "minimum": 10**4000}),
    "minimum 10^300, maximum 10^-300": lambda: value_of({"type": "number", "minimum": 1e300, "maximum": 1e-300}),
    "200 patterns of names": lambda: value_of(
        {"type": "object", "patternProperties": {f"^{chr(97 + n % 26)}{n}": _STRING for n in range(200)}}
    ),
    "500 dependent names": lambda: {
        "type": "object",
        "properties": {f"p{n}": {"type": "integer"} for n in range(500)},
        "dependentRequired": {f"p{n}": [f"p{n + 1}"] for n in range(499)},
        "minProperties": 3,
    },
}
"""Schemas made to exhaust time or memory."""


def hostile_victim(size: int) -> Callable[[str], dict[str, Any]]:
    """What suffers the hostile schemas, by name: compiles them and asks for a canvas and a mask at so many tokens."""
    vocabulary = slots.Vocabulary(wide_tokenizer(size), size)

    def suffer(name: str) -> dict[str, Any]:
        tool = tool_of(HOSTILE[name](), "hostile")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start, cpu = time.perf_counter(), time.process_time()
        try:
            scaffold = scaffolds.compile_scaffold(tool)
            step = time.perf_counter() - start
            canvas = canvas_of(vocabulary, scaffold)
            cursor = grammars.ReplyGrammar(vocabulary, [scaffold], 1, 256, 1024).start()
            cursor = cursor.advance(vocabulary.encode("hostile")[0]) or cursor
            cursor.mask()
            result = "compiled" if canvas is not None else "compiled, not drafted"
        except scaffolds.UnsupportedSchemaError as error:
            step, result = time.perf_counter() - start, f"refused: {error.keyword}: {error.advice[:90]}"
        except Exception as error:
            step, result = time.perf_counter() - start, f"FAILED: {type(error).__name__}: {error}"[:120]
        seconds = time.perf_counter() - start
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        return {
            "seconds": round(seconds, 3),
            "cpu_seconds": round(time.process_time() - cpu, 3),
            "compile_seconds": round(step, 3),
            "mib": round(grown, 1),
            "result": result,
        }

    return suffer


def bench_hostile(size: int) -> dict[str, dict[str, Any]]:
    """Every hostile schema: seconds, growth of memory, result; a process that hangs is ended and begun anew."""
    worker, rows = Worker(partial(hostile_victim, size), seconds=30.0), {}
    for name in tqdm(HOSTILE, "hostile"):
        try:
            rows[name] = worker.ask(name)
        except Lost as error:
            rows[name] = {"seconds": worker.seconds, "result": f"FAILED: {error}"}
    worker.close()
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# What can be written, and who agrees
# ---------------------------------------------------------------------------------------------------------------------


def standard_parameters(tool: Tool) -> Any:
    """A tool's parameters in draft 2020-12."""
    function = tool["function"]
    return dialects.normalise_schema(function["parameters"], function["name"])[0]


def written(scaffold: Any, arguments: Mapping[str, Any]) -> str:
    """Arguments as the grammar writes them."""
    return "".join(scaffolds.argument_segments(scaffold, arguments))


def _canonical(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def misfit(vocabulary: Any, tool: Tool, arguments: dict[str, Any]) -> str | None:
    """Why a call cannot be written, None where its text and the tokens of the reply grammar stand for the same JSON."""
    try:
        scaffold = scaffolds.compile_scaffold(tool)
        text = written(scaffold, arguments)
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    if _canonical(json.loads(text)) != _canonical(arguments):
        return f"the text is {text}"
    reply = [*grammars.call_continuation(vocabulary, scaffold, arguments, b'\n{"name": "'), vocabulary.im_end]
    followed = grammars.ReplyGrammar(vocabulary, [scaffold], 1, 1 << 20, 1 << 20).start().follow(reply)
    if len(followed) < len(reply):
        return f"the grammar stops behind {vocabulary.spell(followed).decode(errors='replace')}"
    return None


def unfit(tool: Tool, arguments: dict[str, Any]) -> str | None:
    """Why a published call does not fit its own tool, None where it does; names that are not declared do not fit."""
    parameters = standard_parameters(tool)
    if undeclared := set(arguments) - set(parameters.get("properties", {})):
        return f"{sorted(undeclared)} are not declared"
    error = next(Draft202012Validator(parameters).iter_errors(arguments), None)
    return None if error is None else error.message


def undrafted(tool: Tool, arguments: dict[str, Any]) -> str | None:
    """Why no layout has slots for a call that can be written, None where its slots stand for the same JSON."""
    layout = layouts.draft_layout(scaffolds.compile_scaffold(tool), max(ARRAY_BUDGET, _longest_array(arguments)))
    if layout is None:
        return "there is no layout"
    try:
        texts = [text or "" for text in layout.texts(arguments)]
    except ValueError as error:
        return str(error)
    if _canonical(layout.assemble(texts)) != _canonical(arguments):
        return f"the slots say {_canonical(layout.assemble(texts))}"
    return None


def _longest_array(value: Any) -> int:
    if isinstance(value, Mapping):
        return max(map(_longest_array, value.values()), default=0)
    if isinstance(value, list):
        return max(len(value), *map(_longest_array, value), 0)
    return 0


def random_call(vocabulary: Any, scaffold: Any, generator: torch.Generator) -> str:
    """Arguments that the reply grammar lets random logits write, within random limits of length: the text."""
    limits = torch.randint(1, 13, (1,), generator=generator), torch.randint(1, 201, (1,), generator=generator)
    cursor = grammars.ReplyGrammar(vocabulary, [scaffold], 1, *map(int, limits)).start()
    tokens: list[int] = []
    while not cursor.finished:
        tokens.append(cursor.choose(random_scores(1, vocabulary.size, generator)[0]))
        cursor = cursor.advance(tokens[-1])
        assert cursor is not None, f"the grammar leaves no way on behind {vocabulary.spell(tokens)!r}"
    text = vocabulary.spell(tokens).decode()
    return text.partition('", "arguments": ')[2].removesuffix("}\n")


def random_draft(vocabulary: Any, tool: Tool, generator: torch.Generator) -> str | None:
    """Arguments that joint commits make of random logits: the text.

    None where the tool cannot be drafted, a value outgrew its slot, or the grammar does not take the whole: a draft is
    checked before it is used.
    """
    scaffold = scaffolds.compile_scaffold(tool)
    canvas = canvas_of(vocabulary, scaffold)
    if canvas is None:
        return None
    decided: dict[int, int] = {}
    texts = []
    for index, slot in enumerate(canvas.slots):
        texts.append("")
        if not all(low <= decided.get(control, -1) <= high for control, low, high in slot.slot.alive_if):
            continue
        scores = random_scores(slot.length, vocabulary.size + 2, generator)
        scores[:, canvas.null_id] += 6.0  # so that most values end inside their slots
        commit = slots.commit_slot(slot, scores, torch.full((slot.length,), -1), canvas.null_id)
        if commit is None or commit.overflow:
            return None
        texts[-1] = canvas.text(slot, commit.tokens)
        if slot.slot.role not in ("value", "key"):
            decided[index] = slot.slot.decision(texts[-1])
    arguments = canvas.layout.assemble(texts)
    return None if misfit(vocabulary, tool, arguments) else written(scaffold, arguments)


@cache
def _llguidance() -> Compiler:
    return llguidance()


# What llguidance refuses although JSON and the schema allow it: U+007F in strings, and exponents and -0.0 of numbers
# with bounds.
_BEYOND_LLGUIDANCE = re.compile(r"\x7f|[0-9]e[-+]?[0-9]|-0\.0")


def llguidance_guarantees(probe: Probe) -> bool:
    """Whether llguidance, where it is installed, makes no mistake about a probe."""
    return ENGINES["llguidance"].version is not None and judge(_llguidance(), probe).result == "yes"


def llguidance_says(tool: Tool, text: str) -> str:
    """What llguidance with fixed separators makes of arguments.

    Returns:
        `"accepted"`, `"rejected"`, `"unsupported"` where it refuses the schema, or `"explained"` where it rejects a
        text that has what it never takes.
    """
    try:
        matches = _llguidance()(standard_parameters(tool))
    except Refused:
        return "unsupported"
    if matches(text):
        return "accepted"
    return "explained" if _BEYOND_LLGUIDANCE.search(text) else "rejected"


def bench_truth(vocabulary: Any, calls: Sequence[tuple[Tool, dict[str, Any]]], seed: int) -> dict[str, Any]:
    """Gold calls that can be written and drafted; what llguidance says of them and of random calls of their tools.

    A call that cannot be written although it fits its tool is a misfit; others are counted as unfit.
    """
    generator = torch.Generator().manual_seed(seed)
    faults: dict[str, list[dict[str, Any]]] = {"misfits": [], "unfit": [], "undrafted": [], "rejected": []}
    says: dict[str, Counter[str]] = {"gold": Counter(), "random call": Counter(), "random draft": Counter()}

    def note(kind: str, tool: Tool, text: Any, why: str) -> None:
        faults[kind].append({"tool": tool["function"]["name"], "text": str(text)[:300], "why": why[:300]})

    for tool, arguments in tqdm(calls, "truth"):
        if (problem := misfit(vocabulary, tool, arguments)) is not None:
            reason = unfit(tool, arguments)
            note("unfit" if reason else "misfits", tool, _canonical(arguments), reason or problem)
            continue
        if (problem := undrafted(tool, arguments)) is not None:
            note("undrafted", tool, _canonical(arguments), problem)
        if ENGINES["llguidance"].version is None:
            continue
        texts = {
            "gold": written(scaffolds.compile_scaffold(tool), arguments),
            "random call": random_call(vocabulary, scaffolds.compile_scaffold(tool), generator),
            "random draft": random_draft(vocabulary, tool, generator),
        }
        for kind, text in texts.items():
            verdict = "none made" if text is None else llguidance_says(tool, text)
            says[kind][verdict] += 1
            if verdict == "rejected":
                note("rejected", tool, text, kind)
    counts = {name: len(found) for name, found in faults.items()}
    return {
        "gold_calls": len(calls),
        **counts,
        "llguidance": {kind: dict(verdicts) for kind, verdicts in says.items()},
        "examples": {name: found[:20] for name, found in faults.items() if found},
    }


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------

SECTIONS = ("compile", "many", "lifts", "commits", "masks", "hostile", "truth")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The chosen sections.

    Args:
        options: of the command.

    Returns:
        JSON: what was measured, by section.
    """
    os.environ[slots.CACHE_VARIABLE] = ""  # lifts are timed as they are without files
    tokenizer = wide_tokenizer(options.vocabulary)
    seconds, vocabulary = timed(lambda: slots.Vocabulary(tokenizer, len(tokenizer)))
    calls = list(public_calls(options.data)) or made_calls()
    tools = public_tools(options.data) or list({json.dumps(tool): tool for tool, _ in calls}.values())
    chance = random.Random(options.seed)
    chance.shuffle(calls)
    chance.shuffle(tools)
    calls, tools = calls[: options.limit], tools[: options.limit]
    gc.collect()
    gc.freeze()  # what was imported is not searched for garbage again and again while tools are timed
    sections: dict[str, Callable[[], Any]] = {
        "compile": lambda: {
            "public tools": bench_compile(vocabulary, tools),
            "tools of every keyword": bench_compile(vocabulary, [tool_of(probe.parameters) for probe in PROBES]),
        },
        "many": lambda: bench_many(tools),
        "lifts": lambda: bench_lifts(options.vocabulary),
        "commits": lambda: bench_commits(vocabulary, options.rounds, options.seed),
        "masks": lambda: bench_masks(vocabulary, calls[: options.rounds]),
        "hostile": lambda: bench_hostile(options.vocabulary),
        "truth": lambda: {
            "public calls": bench_truth(vocabulary, calls, options.seed),
            "calls of every keyword": bench_truth(vocabulary, made_calls(llguidance_guarantees), options.seed),
        },
    }
    report: dict[str, Any] = {
        "command": f"python -m eval.bench_scaffold --limit {options.limit} --rounds {options.rounds} "
        f"--seed {options.seed} --threads {options.threads}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
        | {name: engine.version for name, engine in ENGINES.items() if name == "llguidance"},
        "vocabulary": {"tokens": len(tokenizer), "seconds": round(seconds, 3)},
        "data": "BFCL v4" if options.data.exists() else "eval/schema_probes.py",
    }
    return report | {name: sections[name]() for name in options.sections}


def show(report: Mapping[str, Any]) -> None:
    """Print a report: one line a measurement."""
    for name in (name for name in report if name not in SECTIONS):
        print(f"{name}: {report[name]}")
    for name in (name for name in SECTIONS if name in report):
        print(f"\n{name}")
        found = report[name]
        for key, value in found.items() if isinstance(found, dict) else ((row["kind"], row) for row in found):
            if isinstance(value, dict) and any(isinstance(inner, dict) for inner in value.values()):
                print(f"  {key}")
                for inner_key, inner in value.items():
                    print(f"    {inner_key:24} {json.dumps(inner)[:400]}")
            else:
                print(f"  {key:34} {json.dumps(value)}")
    for line in failures(report):
        print("MISSED:", line)


def failures(report: Mapping[str, Any]) -> list[str]:
    """What a report holds that must not be."""
    found = []

    def check(what: str, target: str, row: Mapping[str, Any]) -> None:
        for key, most in TARGETS[target].items():
            if row.get(key, 0.0) > most:
                found.append(f"{what}: {key} {row[key]} is over {most}")

    for name, row in report.get("compile", {}).items():
        check(f"compile, {name}", "compile", row["compile again"])
    if "many" in report:
        check("300 tools", "300 tools", report["many"])
    for row in report.get("commits", []):
        check(f"commit of a {row['kind']}", f"commit, {row['target']}", row)
    for name, row in report.get("hostile", {}).items():
        check(name, "hostile", row)
        if row["result"].startswith("FAILED"):
            found.append(f"{name}: {row['result']}")
    for name, row in report.get("truth", {}).items():
        found += [f"{name}: {row[fault]} {fault}" for fault in ("misfits", "rejected") if row[fault]]
    return found


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", type=Path, default=PUBLIC, help="folder with original/ and normalised/")
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=SECTIONS)
    parser.add_argument("--vocabulary", type=int, default=WIDE, help="tokens")
    parser.add_argument("--limit", type=int, default=10_000, help="most public tools, and most public calls")
    parser.add_argument("--rounds", type=int, default=200, help="commits per kind, and calls whose masks are timed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "eval" / "results" / "bench_scaffold.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    report = run(options)
    show(report)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
