"""What each choice of decoding is worth that needs no training: `python -m eval.decoding_ablation`.

One factor at a time around the defaults, all choices on the same requests: denoising steps, remasking policies,
drafters, the copy head, joint commits, the field mask, budgets of slots and arrays, noise and guidance of the draft.
The default drafter is here `head`, since `mixed` hides what the head does. The tool is given, so that only its
arguments differ; requests that do not want exactly one call are passed over.

Each choice writes one `diffusion` reply, which is its draft, and one `verified` reply, whose tokens are compared with
those of `ar`. Prompts are kept in a `PromptCache`, so times are of what lies behind the prefill. Every number has the
95% interval of a bootstrap over the requests; a star marks a choice whose paired difference from the defaults has an
interval without 0.

A request takes some 10 s on one core, 26 choices of 2 replies: the default set at the default limit about 5 minutes,
the four sets of the model card (`--sets seen unseen simple_python multiple`) half an hour. `--factors` chooses among
the factors.
"""

import argparse
import json
import random
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from itertools import takewhile
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from eval.bench_decoding import load, quiet, threads
from eval.devices import device_name
from eval.held_out import BFCL_FOLDER, Model, Request, gold_slots, requests
from eval.held_out_tables import markdown
from eval.load_metrics import load_metric
from eval.resumable import PartialResults, evaluation_parser, versions
from repo_package import load_repo_module

configuration = load_repo_module("configuration_smollm_diffusion")
dialects = load_repo_module("schema_dialects")
drafting = load_repo_module("drafting")
generation = load_repo_module("generation_smollm_diffusion")
grammar = load_repo_module("slot_grammar")
policies = load_repo_module("draft_policies")
prompts = load_repo_module("prompt_cache")
writing = load_repo_module("call_decoding")

_CanvasState: Any = drafting._CanvasState

SETS = ("seen", "unseen", "simple_python", "multiple", "simple_java", "simple_javascript")
DEFAULTS = "defaults"
OPTIONS: dict[str, Any] = {
    "drafter": "head",
    "num_diffusion_steps": 4,
    "remasking": "confidence",
    "draft_temperature": 0.0,
    "guidance_scale": 0.0,
}
"""Of generation, where a choice says nothing else."""
SHUT, OPEN = -100.0, 30.0
"""Log-odds of copying at which the other distribution has no say. The head takes what is not copied for as probable as
the smallest float32, e to the -87: an open gate has to leave what is written above that."""
DRAWS = 2000
"""Of the bootstrap."""


# ---------------------------------------------------------------------------------------------------------------------
# Choices
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """What a choice changes of the defaults.

    Args:
        options: of generation.
        config: fields of the model's config.
        scale: numbers of the model's config and what they are multiplied by.
        gate: log-odds of copying at every position; None is what the head says.
        alone: every position of a value is committed by itself.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    scale: Mapping[str, float] = field(default_factory=dict)
    gate: float | None = None
    alone: bool = False

    def fields(self, config: Any) -> dict[str, Any]:
        """The fields of a model's config that it changes, with their values."""
        scaled = {name: max(1, round(getattr(config, name) * factor)) for name, factor in self.scale.items()}
        return {**self.config, **scaled}

    def differs(self, config: Any) -> bool:
        """Whether it changes anything for a model of this config."""
        fields = self.fields(config)
        if fields:
            return any(getattr(config, name) != value for name, value in fields.items())
        return bool(self.options) or self.alone or self.gate is not None


CHANGES: dict[str, dict[str, Change]] = {
    "steps": {str(number): Change({"num_diffusion_steps": number}) for number in (1, 2, 8)},
    "remasking": {
        name: Change({"remasking": name})
        for name in sorted(policies.REMASKING_POLICIES)
        if name != OPTIONS["remasking"]
    },
    "drafter": {name: Change({"drafter": name}) for name in generation.DRAFTERS if name != OPTIONS["drafter"]},
    "copy_head": {"off": Change(gate=SHUT), "alone": Change(gate=OPEN)},
    "commit": {"per position": Change(alone=True)},
    "field_mask": {name: Change(config={"field_mask": name}) for name in configuration.FIELD_MASKS},
    "budgets": {
        f"{name} {word}": Change(scale={f"{name}_budget": factor})
        for name in ("string", "number", "array")
        for word, factor in (("halved", 0.5), ("doubled", 2.0))
    },
    "draft_temperature": {str(value): Change({"draft_temperature": value}) for value in (0.5, 1.0)},
    "guidance_scale": {"0.5": Change({"guidance_scale": 0.5})},
}
"""By factor and value. `copy_head`: the gate between what the head writes and what it copies is held shut (what the
pointer reads still informs the last block) or open, where no value ends before its slot, since NULL is in no prompt.
`budgets`: a call with a longer array than is laid out counts no drafted values, so compare its forwards instead."""


def chosen(factors: Sequence[str], config: Any) -> dict[str, Change]:
    """The defaults and the choices of some factors, by the names of the table.

    Args:
        factors: of `CHANGES`.
        config: the model's; what changes nothing of it is left out.
    """
    found = {DEFAULTS: Change()}
    for factor in factors:
        found |= {f"{factor} {name}": one for name, one in CHANGES[factor].items() if one.differs(config)}
    return found


@contextmanager
def replaced(owner: Any, values: Mapping[str, Any]) -> Iterator[None]:
    """Attributes of an object have other values while the block runs."""
    before = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


@contextmanager
def applied(model: Any, change: Change) -> Iterator[Counter[str]]:
    """A model drafts with a choice while the block runs.

    Args:
        model: the model, of the modules of this repository.
        change: the choice; its generation options are left to the caller.

    Returns:
        Where positions are committed by themselves, `values` of the last draft and those of them that are `broken`;
        else nothing.
    """
    counts: Counter[str] = Counter()
    with ExitStack() as stack:
        stack.enter_context(replaced(model.config, change.fields(model.config)))
        if change.gate is not None:
            gate = change.gate
            hook = model.diffusion_head.copy_gate.register_forward_hook(
                lambda _module, _inputs, output: torch.full_like(output, gate)
            )
            stack.callback(hook.remove)
        if change.alone:
            own = {"commit_slots": commit_alone, "_CanvasState": partial(AloneState, counts)}
            stack.enter_context(replaced(drafting, own))
        yield counts


# ---------------------------------------------------------------------------------------------------------------------
# Positions by themselves
# ---------------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def automaton_tokens(automaton: Any, length: int, null_id: int) -> Tensor:
    """What can occur at each position of a slot, whatever stands at the others.

    Args:
        automaton: `slot_grammar.TokenAutomaton` of the slot.
        length: its positions.
        null_id: id of NULL, the last one.

    Returns:
        bool [length, null_id + 1].
    """
    allowed = torch.zeros(length, null_id + 1, dtype=torch.bool)
    states, ended = np.zeros(len(automaton.accepting), dtype=bool), False
    states[0] = True
    for place in range(length):
        classes = (automaton.transitions[states] >= 0).any(axis=0)
        allowed[place, : len(automaton.token_class)] = torch.from_numpy(classes[automaton.token_class])
        ended = ended or bool(automaton.accepting[states].any())
        allowed[place, null_id] = ended
        behind = automaton.transitions[states]
        states = np.zeros_like(states)
        states[behind[behind >= 0]] = True
    return allowed


def possible_tokens(slot: Any, null_id: int) -> Tensor:
    """What can occur at each position of a `slot_grammar.CanvasSlot`: bool [length, null_id + 1]."""
    if slot.automaton is not None:
        return automaton_tokens(slot.automaton, slot.length, null_id)
    allowed = torch.zeros(slot.length, null_id + 1, dtype=torch.bool)
    allowed[torch.arange(slot.length), slot.choices.cpu()] = True
    return allowed


def commit_alone(slots: Sequence[Any], log_probs: Sequence[Tensor], fixed: Sequence[Tensor], null_id: int) -> list[Any]:
    """The best possible token of each position by itself, in place of `slot_grammar.commit_slots`.

    Args:
        slots: the slots.
        log_probs: one float [length, vocab + 2] a slot.
        fixed: one int64 [length] a slot, a token where the position is committed, -1 where it is free.
        null_id: id of NULL.

    Returns:
        One `Commit` a slot, which may be no string of it.
    """
    commits = []
    for slot, rows, known in zip(slots, log_probs, fixed, strict=True):
        scores = rows.detach().float().cpu().masked_fill(~possible_tokens(slot, null_id), -torch.inf)
        best, tokens = scores.max(dim=1)
        free = known < 0
        surety = torch.where(free, best.exp().clamp(max=1), torch.ones(()))
        commits.append(grammar.Commit(tokens.where(free, known), surety, float(best[free].sum())))
    return commits


def is_value(slot: Any, tokens: Sequence[int], null_id: int) -> bool:
    """Whether the tokens of a slot are one of its strings, or the beginning of one that goes on behind the slot.

    Args:
        slot: a `slot_grammar.CanvasSlot`.
        tokens: of its positions.
        null_id: id of NULL.
    """
    if slot.automaton is None:
        return bool((slot.choices.cpu() == torch.tensor(tokens)).all(dim=1).any())
    content = list(takewhile(lambda token: token != null_id, tokens))
    if any(token != null_id for token in tokens[len(content) :]):
        return False
    state, used = 0, 0
    for token in content:
        state, begun = slot.automaton.step(state, token)
        used += begun
        if state < 0:
            return False
    if slot.max_length is not None and used + slot.automaton.chars_needed[state] > slot.max_length:
        return False
    return len(content) == len(tokens) or slot.automaton.accepts(state)


class AloneState(_CanvasState):
    """A canvas whose values may be broken when it is full: the shortest value then stands in place of each.

    Args:
        counts: gets the numbers of `values` and of those that are `broken`, of the last canvas only.
        canvas, observed, how: as of any canvas.
    """

    def __init__(self, counts: Counter[str], canvas: Any, observed: Sequence[Any], how: Any) -> None:
        super().__init__(canvas, observed, how)
        self.counts = counts
        counts.clear()

    def text(self, slot: Any) -> str:
        """The text of a slot of the full canvas."""
        if slot.slot.role in writing.STRUCTURE_KINDS:  # decided jointly, as always
            return super().text(slot)
        self.counts["values"] += 1
        if is_value(slot, self.ids[slot.positions].tolist(), self.canvas.null_id):
            return super().text(slot)
        self.counts["broken"] += 1
        self.ids[slot.positions] = self.canvas.null_id  # nothing of it stands, so nothing can go on behind it
        leaf = slot.slot.leaf
        return leaf.choices[0] if leaf.automaton is None else leaf.automaton.completed(b"").decode()


# ---------------------------------------------------------------------------------------------------------------------
# Replies
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Asked:
    """One request with the prompt that was kept of it.

    Args:
        model: the model with its tokenizer.
        request: wants one call.
        seed: of every reply.
        cache: keeps the prompt.
    """

    model: Model
    request: Request
    seed: int
    cache: Any = field(default_factory=lambda: prompts.PromptCache(max_entries=2))

    @torch.no_grad()
    def reply(self, decoding: str, options: Mapping[str, Any]) -> tuple[list[int], Any, float]:
        """Tokens of one reply, its stats and its wall time in ms."""
        row, model = self.request.row, self.model.model
        torch.manual_seed(self.seed)
        ids = torch.tensor([row.prompt_ids], device=model.device)
        start = perf_counter()
        output = model.generate(
            ids,
            tools=row.tools,
            tokenizer=self.model.tokenizer,
            tool_choice={"type": "function", "function": {"name": row.calls[0]["name"]}},
            max_tool_calls=1,
            decoding=decoding,
            prompt_cache=self.cache,
            do_sample=False,
            return_dict_in_generate=True,
            **options,
        )
        tokens = output.sequences[0, ids.shape[1] :].tolist()
        return tokens, output.stats[0], 1000 * (perf_counter() - start)

    def outcome(self, change: Change, reference: Sequence[int]) -> dict[str, Any]:
        """What a choice makes of the request.

        Args:
            change: the choice.
            reference: tokens of `ar`.

        Returns:
            As JSON: the `calls` of the `diffusion` reply, how many values of the gold call they have right, values
            that were broken; drafted and accepted values and forwards of the `verified` reply; times of both.
        """
        options = {**OPTIONS, **change.options}
        with applied(self.model.model, change) as counts:
            written, _, written_ms = self.reply("diffusion", options)
            values, broken = counts["values"], counts["broken"]
            tokens, stats, ms = self.reply("verified", options)
        calls = generation.parse_calls(self.model.vocabulary, written)
        slots = [slot for slot in gold_slots(self.request.row, calls) if slot[2] not in writing.STRUCTURE_KINDS]
        return {
            "calls": calls,
            "values_right": sum(made == gold for made, gold, _ in slots),
            "values_wanted": len(slots),
            "values": values,
            "broken": broken,
            "drafted": stats.drafted_slots,
            "accepted": stats.accepted_slots,
            "base_forwards": stats.base_forwards,
            "head_forwards": stats.head_forwards,
            "same": tokens == reference,
            "diffusion_ms": round(written_ms, 3),
            "verified_ms": round(ms, 3),
        }

    def row(self, changes: Mapping[str, Change], chance: random.Random) -> dict[str, dict[str, Any]]:
        """The outcome of every choice, by name; they take turns in an order that is drawn."""
        self.reply("diffusion", OPTIONS)  # keeps the prompt, and compiles the tool
        reference, _, _ = self.reply("ar", OPTIONS)
        found = {name: self.outcome(changes[name], reference) for name in chance.sample(list(changes), len(changes))}
        return {name: found[name] for name in changes}


# ---------------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------------

RATES: dict[str, tuple[str, str | None]] = {
    "values right": ("values_right", "values_wanted"),
    "calls right": ("right", None),
    "calls valid": ("valid", None),
    "values accepted": ("accepted", "drafted"),
    "base forwards": ("base_forwards", None),
    "head forwards": ("head_forwards", None),
    "same as ar": ("same", None),
}
"""Column -> what is summed, and the sum that it is divided by; None divides by the number of requests."""
TIMES = {"diffusion ms": "diffusion_ms", "verified ms": "verified_ms"}
"""Column -> of what it is the median."""
OF_DIFFUSION = ("values right", "calls right", "calls valid")
"""Rates of the `diffusion` reply; the others are of the `verified` one."""


def judge(todo: Sequence[Request], rows: Sequence[Mapping[str, dict[str, Any]]]) -> None:
    """Add to the outcomes of all choices whether the call is `right` and whether it is `valid`.

    A call with a broken value is neither. Right is what held-out requests count as right; see `eval.held_out`.

    Args:
        todo: the requests.
        rows: what `Asked.row` gave for each.
    """
    gold = [json.dumps(request.row.calls, ensure_ascii=False) for request in todo]
    match, validity = load_metric("call_match"), load_metric("call_validity")

    @cache
    def is_valid(made: str, tools: str) -> bool:
        return bool(validity.compute(predictions=[made], tools=[tools])["valid"])

    tools = [json.dumps(called_tool(request), ensure_ascii=False) for request in todo]
    for name in rows[0]:
        own = [row[name] for row in rows]
        made = [json.dumps(one["calls"], ensure_ascii=False) for one in own]
        equal = match.compute(predictions=made, references=gold)["right"]
        for request, one, text, schema, same in zip(todo, own, made, tools, equal, strict=True):
            one["right"] = not one["broken"] and request.accepts(one["calls"], bool(same))
            one["valid"] = not one["broken"] and is_valid(text, schema)


def called_tool(request: Request) -> list[dict[str, Any]]:
    """The tool of the gold call, its schema of draft 2020-12, as a list of tools."""
    name = request.row.calls[0]["name"]
    tool = next(tool["function"] for tool in request.row.tools if tool["function"]["name"] == name)
    schema = dialects.normalise_schema(tool.get("parameters"), name)[0]
    return [{"function": {"name": name, "parameters": schema}}]


def numbers(rows: Sequence[Mapping[str, Mapping[str, Any]]], seed: int) -> dict[str, dict[str, Any]]:
    """The columns of every choice.

    Args:
        rows: judged outcomes of each request, by choice.
        seed: of the bootstrap.

    Returns:
        By choice and column `value`, its 95% `interval`, and, but for the defaults, the `difference` from them with
        `difference_interval`, over the same samples of requests; None where there is nothing to divide by. Beside them
        `broken_values`: how many of how many drafted values.
    """
    draws = np.random.default_rng([seed, len(rows)]).integers(len(rows), size=(DRAWS, len(rows)))
    whole = np.arange(len(rows))[None]
    found: dict[str, dict[str, Any]] = {}
    base: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}
    for name in rows[0]:
        own = [row[name] for row in rows]
        found[name] = {"broken_values": [sum(one["broken"] for one in own), sum(one["values"] for one in own)]}
        for column in (*RATES, *TIMES):
            measured = column_of(own, column)
            value, samples = measured(whole), measured(draws)
            base.setdefault(column, (value, samples))
            cell = {"value": _value(value), "interval": _interval(samples)}
            if name != DEFAULTS:
                cell |= {
                    "difference": _value(value - base[column][0]),
                    "difference_interval": _interval(samples - base[column][1]),
                }
            found[name][column] = cell
    return found


def column_of(outcomes: Sequence[Mapping[str, Any]], column: str) -> Callable[[NDArray[np.int64]], NDArray[np.float64]]:
    """What computes a column of samples of the requests, int64 [samples, requests] -> float64 [samples]."""
    if column in TIMES:
        times = np.array([one[TIMES[column]] for one in outcomes], dtype=np.float64)
        return lambda draws: np.median(times[draws], axis=1)
    part, of = RATES[column]
    parts = np.array([one[part] for one in outcomes], dtype=np.float64)
    wholes = np.array([1 if of is None else one[of] for one in outcomes], dtype=np.float64)

    def rate(draws: NDArray[np.int64]) -> NDArray[np.float64]:
        total = wholes[draws].sum(axis=1)
        nothing = np.full(len(draws), np.nan)
        return np.divide(parts[draws].sum(axis=1), total, out=nothing, where=total > 0)

    return rate


def _value(values: NDArray[np.float64]) -> float | None:
    return None if np.isnan(values[0]) else round(float(values[0]), 4)


def _interval(samples: NDArray[np.float64]) -> list[float] | None:
    known = samples[~np.isnan(samples)]
    return [round(float(end), 4) for end in np.percentile(known, [2.5, 97.5])] if len(known) else None


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table of what `numbers` gave."""
    columns = (*RATES, *TIMES)
    header = [f"{name} (`{'diffusion' if name in OF_DIFFUSION else 'verified'}`)" for name in RATES] + list(TIMES)
    return markdown(["choice", *header], [[name, *(_cell(row[c], c) for c in columns)] for name, row in found.items()])


def _cell(cell: Mapping[str, Any], column: str) -> str:
    if cell["value"] is None:
        return ""
    factor, digits, unit = (1, 0 if column in TIMES else 2, "") if column in _PLAIN else (100, 1, "%")
    value, low, high = (f"{factor * number:.{digits}f}" for number in (cell["value"], *cell["interval"]))
    difference = cell.get("difference_interval")
    star = "*" if difference is not None and (difference[0] > 0 or difference[1] < 0) else ""
    return f"{value}{unit} ({low} to {high}){star}"


_PLAIN = ("base forwards", "head forwards", *TIMES)


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command's options."""
    parser = evaluation_parser("decoding_ablation", __doc__, limit=50)
    parser.add_argument("--sets", nargs="+", default=["unseen"], choices=SETS)
    parser.add_argument("--factors", nargs="+", default=list(CHANGES), choices=list(CHANGES))
    options = parser.parse_args(arguments)
    if options.limit < 0 or options.threads < 0:
        parser.error("--limit and --threads are numbers from 0")
    for name in options.sets:
        own = {"seen": "train", "unseen": Path("dev", "dev.jsonl.gz")}
        path = options.data / own.get(name, BFCL_FOLDER / f"{name}.jsonl.gz")
        if not path.exists():
            parser.error(f"--sets {name}: there is no {path}; name the folder of the data with --data")
    given = sys.argv[1:] if arguments is None else arguments
    options.command = shlex.join(["python", "-m", "eval.decoding_ablation", *given])
    return options


def opened(options: argparse.Namespace) -> tuple[Model, PartialResults]:
    """The model, and the results so far.

    Raises:
        SystemExit: the model cannot be loaded, or the partial results are of another run.
    """
    decisive = ("model", "data", "sets", "factors", "limit", "seed", "threads", "device")
    try:
        shape = load(options.model, options.device, torch.float32)
        store = PartialResults(options.out, {name: getattr(options, name) for name in decisive})
    except (OSError, ValueError) as error:
        raise SystemExit(f"eval.decoding_ablation: {error}") from error
    return Model(shape.model, shape.tokenizer, None), store


def run_set(
    model: Model, name: str, store: PartialResults, options: argparse.Namespace
) -> tuple[list[dict[str, dict[str, Any]]], dict[str, int]]:
    """All choices on the requests of a set.

    Returns:
        Judged outcomes of each request by choice, and the numbers of records that were passed over, by reason.

    Raises:
        SystemExit: no request is left.
    """
    todo, left_out = requests(name, options.data, model.tokenizer, model.room, options.limit or sys.maxsize)
    asked = [request for request in todo if len(request.row.calls) == 1]
    if not asked:
        raise SystemExit(f"{name}: none of {len(todo) + left_out} records wants one call; is this the data meant?")
    changes = chosen(options.factors, model.model.config)
    for number, request in enumerate(tqdm(asked, name, unit="request")):
        key = f"{name} {number}"
        if key not in store:
            outcomes = Asked(model, request, options.seed).row(changes, random.Random(f"{options.seed} {key}"))
            store.put(key, outcomes)
    rows = [store[f"{name} {number}"] for number in range(len(asked))]
    judge(asked, rows)
    return rows, {"left out": left_out, "not one call": len(todo) - len(asked)}


def measure(model: Model, store: PartialResults, options: argparse.Namespace) -> dict[str, Any]:
    """All sets; the numbers of each and of all requests together."""
    sets: dict[str, Any] = {}
    together: list[dict[str, dict[str, Any]]] = []
    for name in options.sets:
        rows, passed = run_set(model, name, store, options)
        sets[name] = {"requests": len(rows), **passed, "choices": numbers(rows, options.seed)}
        together += rows
    return {
        "sets": sets,
        "together": {"requests": len(together), "choices": numbers(together, options.seed)},
    }


def show(report: Mapping[str, Any]) -> None:
    """Print the table over all requests and what stands beside it."""
    found = report["together"]["choices"]
    print(f"\n{table(found)}\n")
    for name, part in report["sets"].items():
        print(f"{name}: {part['requests']} requests, {part['left out']} left out, {part['not one call']} not one call")
    for name, row in found.items():
        broken, values = row["broken_values"]
        if values:
            print(f"{name}: {broken} of {values} drafted values were no value of their slot")
        if row["same as ar"]["value"] < 1:
            print(f"WARNING: {name}: verified differs from ar on some requests")
    print("95% intervals; * differs from the defaults (paired). Times are of what lies behind the prefill.")


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    options = parse(arguments)
    with threads(options.threads or torch.get_num_threads()), quiet():
        model, store = opened(options)
        with store.kept_when_interrupted("requests"):
            found = measure(model, store, options)
        used = torch.get_num_threads()
    names = ("field_mask", "string_budget", "number_budget", "array_budget")
    report = {
        "command": options.command,
        "versions": versions() | {"numpy": np.__version__},
        "threads": used,
        "device": device_name(torch.device(options.device)),
        "bootstrap_draws": DRAWS,
        "defaults": OPTIONS | {name: getattr(model.model.config, name) for name in names},
        **found,
    }
    store.finish(report)
    show(report)


if __name__ == "__main__":
    main()
