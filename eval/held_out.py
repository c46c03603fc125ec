"""How often the model gets requests right that it was not trained on, and at what cost: `python -m eval.held_out`.

Two sets of our own that no training row shows: `seen` (tools of the training data, requests held out) and `unseen`
(tools that occur nowhere in training, refusals among them), one call or none each. Here a request counts as right when
its calls equal the gold ones: no normalisation, no partial credit. And the open categories of the Berkeley Function
Calling Leaderboard, where right is what its lists of possible answers allow; their tools are shown in full.

`--markdown` measures nothing: it prints the tables of the model card out of the file of an earlier run.
"""

import argparse
import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from eval.held_out_tables import tables
from eval.load_metrics import load_metric
from eval.metrics.ast_accuracy.ast_accuracy import accepts_calls
from eval.resumable import versions
from repo_package import ROOT, load_repo_module
from training.data import DEFAULT_DATA, Record, Row, dev_records, evaluation_rows, held_out_records, read_records

writing = load_repo_module("call_decoding")
dialects = load_repo_module("schema_dialects")
generation = load_repo_module("generation_smollm_diffusion")
scaffolds = load_repo_module("schema_scaffold")
layouts = load_repo_module("scaffold_layout")
grammar = load_repo_module("slot_grammar")

OWN_SETS = ("seen", "unseen")
BFCL_SETS = (
    "simple_python",
    "multiple",
    "parallel",
    "parallel_multiple",
    "irrelevance",
    "simple_java",
    "simple_javascript",
)
BFCL_FOLDER = Path("bfcl_open", "normalised")
DECODINGS = ("ar", "verified", "diffusion")


# ---------------------------------------------------------------------------------------------------------------------
# Requests
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """One request.

    Args:
        row: prompt, tools and gold calls.
        answers: the possible answers of each call; None where only the gold calls are right.
    """

    row: Row
    answers: list[dict[str, Any]] | None = None

    def accepts(self, calls: Sequence[Mapping[str, Any]], equal: bool) -> bool:
        """Whether calls are right; `equal` says whether they are the gold ones."""
        return equal if self.answers is None else accepts_calls(calls, self.answers)


def requests(
    name: str, data: Path, tokenizer: PreTrainedTokenizerFast, room: int, limit: int
) -> tuple[list[Request], int]:
    """Requests of a set in the order of a hash of their ids, so that a smaller limit takes the first of them.

    Args:
        name: of `OWN_SETS` or `BFCL_SETS`.
        data: folder with `train/`, `dev/` and `bfcl_open/`.
        tokenizer: the model's tokenizer.
        room: most tokens of a prompt.
        limit: most requests.

    Returns:
        The requests, and how many records were left out before the limit was reached, because their prompt is too long
        or a tool's schema is not supported.
    """
    found: list[Request] = []
    left_out = 0
    for record in sorted(_records(name, data), key=lambda record: hashlib.sha256(record["id"].encode()).hexdigest()):
        if len(found) == limit:
            break
        rows = evaluation_rows([record], tokenizer) if name in OWN_SETS else [_full_row(record, tokenizer)]
        fitting = [row for row in rows if len(row.prompt_ids) <= room and _supported(row)]
        found += [Request(row, record.get("possible_answer")) for row in fitting]
        left_out += not fitting
    return found, left_out


def _records(name: str, data: Path) -> list[Record]:
    if name in BFCL_SETS:
        return list(read_records(data / BFCL_FOLDER / f"{name}.jsonl.gz"))
    records = held_out_records(data) if name == "seen" else dev_records(data)
    return [r for r in records if len(r["messages"]) == 1 and len(r["calls"]) <= 1 and r["tools"]]


def _full_row(record: Record, tokenizer: PreTrainedTokenizerFast) -> Row:
    """A row whose prompt shows everything that the record holds."""
    messages, tools = record["messages"], record["tools"]
    prompt = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=False)
    return Row(record["id"], record["source"], list(prompt), [], tools, record["calls"], messages)


def _supported(row: Row) -> bool:
    try:
        for tool in row.tools:
            scaffolds.compile_scaffold(tool)
    except scaffolds.UnsupportedSchemaError:
        return False
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Answers
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Answer:
    """What one decoding made of a request, and what it cost.

    Args:
        calls: `{"name", "arguments"}` each.
        reply: tokens of a reply that calls, else none.
        probability: P(call), where the trace was kept.
        slots: numbers of drafted and accepted slots and tokens by kind, in columns of `draft_acceptance`.
        base_forwards, head_forwards: of the request.
        seconds: wall time.
    """

    calls: list[dict[str, Any]]
    reply: list[int]
    probability: float | None
    slots: dict[str, list[Any]]
    base_forwards: int
    head_forwards: int
    seconds: float


@dataclass
class Model:
    """A model with its tokenizer.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        drafter: who drafts; None is the model's own choice.
    """

    model: Any
    tokenizer: PreTrainedTokenizerFast
    drafter: str | None
    vocabulary: Any = field(init=False)

    def __post_init__(self) -> None:
        size = self.model.config.get_text_config().vocab_size
        self.vocabulary = grammar.Vocabulary(self.tokenizer, size)

    @property
    def room(self) -> int:
        """Most tokens of a prompt, so that the calls fit behind it."""
        config = self.model.config
        return config.get_text_config().max_position_embeddings - 4 * config.max_call_tokens

    def answer(self, request: Request, decoding: str) -> Answer:
        """One request through one decoding."""
        ids = torch.tensor([request.row.prompt_ids], device=self.model.device)
        # The trace tells P(call), which is the same for all decodings; where nothing is drafted it costs least.
        traced = decoding == "ar"
        start = time.perf_counter()
        output = self.model.generate(
            ids,
            tools=request.row.tools,
            tokenizer=self.tokenizer,
            decoding=decoding,
            drafter=self.drafter,
            max_tool_calls=len(request.row.calls) + 1,  # enough to see that one too many was made
            do_sample=False,
            output_trace=traced,
            return_dict_in_generate=True,
            max_new_tokens=1,  # of a text reply, which is not looked at
        )
        seconds = time.perf_counter() - start
        reply = output.sequences[0, ids.shape[1] :].tolist()
        calls = generation.parse_calls(self.vocabulary, reply)
        stats = output.stats[0]
        routes = [event.data["probability"] for event in output.trace[0] if event.kind == "route"] if traced else []
        return Answer(
            calls,
            reply if calls else [],
            routes[0] if routes else None,
            # A draft that nobody checks is not accepted.
            self.slot_counts(stats.slots if decoding == "verified" else []),
            stats.base_forwards,
            stats.head_forwards,
            seconds,
        )

    def slot_counts(self, slots: Sequence[Any]) -> dict[str, list[Any]]:
        """Columns of `draft_acceptance` for `DraftedSlot`s, one entry a kind.

        Tokens are those of a slot's text by itself; accepted are those up to the first that differs from the final
        text.
        """
        counts: dict[str, Counter[str]] = {}
        for slot in slots:
            drafted = self.vocabulary.encode(slot.drafted)
            final = () if slot.final is None else self.vocabulary.encode(slot.final)
            pairs = enumerate(zip(drafted, final, strict=False))
            same = next((n for n, (one, other) in pairs if one != other), min(len(drafted), len(final)))
            counts.setdefault(slot.kind, Counter()).update(
                drafted_slots=1, accepted_slots=int(slot.accepted), drafted_tokens=len(drafted), accepted_tokens=same
            )
        columns = ("drafted_slots", "accepted_slots", "drafted_tokens", "accepted_tokens")
        return {"kinds": list(counts), **{name: [one[name] for one in counts.values()] for name in columns}}


def run_set(model: Model, todo: Sequence[Request], decodings: Sequence[str], label: str) -> dict[str, list[Answer]]:
    """All requests of a set through all decodings.

    Args:
        model: the model.
        todo: the requests.
        decodings: names of decodings.
        label: of the progress bar.

    Returns:
        Answers by decoding, in the order of the requests.
    """
    answers: dict[str, list[Answer]] = {decoding: [] for decoding in decodings}
    for number, request in enumerate(tqdm(todo, label, unit="request")):
        # The decodings take turns on each request, so that a change in the machine's speed meets all of them; each is
        # first as often as the others, since the first one compiles the tools.
        place = number % len(decodings)
        for decoding in [*decodings[place:], *decodings[:place]]:
            answers[decoding].append(model.answer(request, decoding))
    return answers


# ---------------------------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------------------------


def summary(todo: Sequence[Request], answers: Sequence[Answer], reference: Sequence[Answer]) -> dict[str, Any]:
    """Counts of one decoding over a set.

    Args:
        todo: the requests.
        answers: of the decoding.
        reference: of `ar`.

    Returns:
        Counts of requests (`right`, `calls_right`, `refusals_right`, `names_right`, `equal` to the gold calls, `valid`,
        `same_tokens_as_ar`), rates of the decision to call, acceptance of values and by kind of slot (None where no
        draft is checked), share of the gold calls' values that were written exactly, also by kind of slot, forwards
        per call, and the median time of requests that call. What `diffusion` writes are its drafts.
    """
    made = [json.dumps(answer.calls, ensure_ascii=False) for answer in answers]
    gold = [json.dumps(request.row.calls, ensure_ascii=False) for request in todo]
    match = load_metric("call_match").compute(predictions=made, references=gold)
    right = [one.accepts(answer.calls, equal) for one, answer, equal in zip(todo, answers, match["right"], strict=True)]
    wants = [bool(request.row.calls) for request in todo]
    tools = [json.dumps(normal_tools(request.row), ensure_ascii=False) for request in todo]
    valid = load_metric("call_validity").compute(predictions=made, tools=tools)["valid"]
    decided = load_metric("decision_roc").compute(
        predictions=[float(bool(answer.calls)) for answer in answers], references=wants, threshold=0.5
    )
    seconds = [answer.seconds for answer in answers if answer.calls]
    return {
        "requests": len(todo),
        "right": sum(right),
        "calls_wanted": sum(wants),
        "calls_right": sum(one for one, want in zip(right, wants, strict=True) if want),
        "names_right": round((match["name_match"] or 0) * sum(wants)),
        "refusals_right": sum(one for one, want in zip(right, wants, strict=True) if not want),
        "equal": sum(match["right"]),
        **{name: _rounded(decided[name]) for name in ("relevance", "irrelevance", "balanced_accuracy")},
        "valid": round(valid * len(todo)),
        "same_tokens_as_ar": sum(one.reply == other.reply for one, other in zip(answers, reference, strict=True)),
        **_costs(answers),
        **_slots_right(todo, answers),
        "median_ms": round(1000 * median(seconds), 1) if seconds else None,
    }


def normal_tools(row: Row) -> list[dict[str, Any]]:
    """A row's tools with schemas of draft 2020-12, as the metric `call_validity` takes them."""
    functions = [tool["function"] for tool in row.tools]
    return [
        {"function": {"name": f["name"], "parameters": dialects.normalise_schema(f.get("parameters"), f["name"])[0]}}
        for f in functions
    ]


def _costs(answers: Sequence[Answer]) -> dict[str, Any]:
    """Acceptance of drafts and forwards per call."""
    found = load_metric("draft_acceptance").compute(
        **{name: [answer.slots[name] for answer in answers] for name in answers[0].slots},
        calls=[len(answer.calls) for answer in answers],
        base_forwards=[answer.base_forwards for answer in answers],
        head_forwards=[answer.head_forwards for answer in answers],
    )
    kinds = found["by_kind"]
    values = [rates for kind, rates in kinds.items() if kind not in writing.STRUCTURE_KINDS]
    accepted, drafted = (sum(rates[f"{name}_slots"] for rates in values) for name in ("accepted", "drafted"))
    return {
        "slots_accepted": _rounded(accepted / drafted) if drafted else None,
        "accepted_by_kind": {kind: {name: _rounded(rate) for name, rate in kinds[kind].items()} for kind in kinds},
        "base_forwards_per_call": _rounded(found["base_forwards_per_call"], 2),
        "head_forwards_per_call": _rounded(found["head_forwards_per_call"], 2),
    }


def _slots_right(todo: Sequence[Request], answers: Sequence[Answer]) -> dict[str, Any]:
    """Exact match of the slots that the gold calls have; None and nothing where they have none."""
    slots = [slot for one, answer in zip(todo, answers, strict=True) for slot in gold_slots(one.row, answer.calls)]
    if not slots:
        return {"values_right": None, "right_by_kind": {}}
    predictions, references, kinds = zip(*slots, strict=True)
    found = load_metric("slot_match").compute(predictions=predictions, references=references, kinds=kinds)["by_kind"]
    values = [rates for kind, rates in found.items() if kind not in writing.STRUCTURE_KINDS]
    wanted = sum(rates["slots"] for rates in values)
    right = sum(rates["slots"] * rates["exact_match"] for rates in values)
    return {
        "values_right": _rounded(right / wanted) if wanted else None,
        "right_by_kind": {
            kind: {name: _rounded(rate) for name, rate in rates.items()} for kind, rates in found.items()
        },
    }


def gold_slots(row: Row, calls: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """What calls hold in the slots of a row's gold calls.

    A gold call is compared with the call of its name that is most like it; no call is taken twice.

    Args:
        row: tools and gold calls.
        calls: `{"name", "arguments"}` each.

    Returns:
        For each slot its text in the call (empty where it has none), its gold text and its kind, as `slot_match` takes
        them. Texts are in quotes, so that an empty string is a value. Calls that fit no layout have no slots here.
    """
    tools = {tool["function"]["name"]: tool for tool in row.tools}
    left, found = list(calls), []
    for gold in row.calls:
        named = [index for index, call in enumerate(left) if call["name"] == gold["name"]]
        alike = [_likeness(left[index]["arguments"], gold["arguments"]) for index in named]
        made = left.pop(named[alike.index(max(alike))])["arguments"] if named else None
        # One item more than the gold call has, so that longer arrays differ from it in their length.
        items = max((len(part) for value in gold["arguments"].values() for part in _containers(value)), default=0) + 1
        layout = layouts.draft_layout(scaffolds.compile_scaffold(tools[gold["name"]]), items)
        true = None if layout is None else _texts(layout, gold["arguments"])
        if true is None:
            continue
        drafted = (None if made is None else _texts(layout, made)) or [None] * len(true)
        found += [
            ("" if text is None else json.dumps(text), json.dumps(wanted), writing.slot_kind(slot))
            for slot, text, wanted in zip(layout.slots, drafted, true, strict=True)
            if wanted is not None
        ]
    return found


def _likeness(made: Mapping[str, Any], gold: Mapping[str, Any]) -> int:
    """Equal arguments, less those that the gold call does not have."""
    return sum(made.get(name) == value for name, value in gold.items()) - len(made.keys() - gold.keys())


def _texts(layout: Any, arguments: Mapping[str, Any]) -> list[str | None] | None:
    try:
        return layout.texts(arguments)
    except ValueError:
        return None  # they go beyond what is laid out


def _containers(value: Any) -> Iterator[Any]:
    """The arrays and objects in a value, itself included."""
    if isinstance(value, list | dict):
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _containers(inner)


def decision(todo: Sequence[Request], reference: Sequence[Answer]) -> dict[str, Any] | None:
    """How well P(call) separates the requests of a set that want a call; None where all or none do.

    Args:
        todo: the requests.
        reference: the answers of `ar`.

    Returns:
        `auc`, `best_threshold` and `best_balanced_accuracy` of `decision_roc`.
    """
    wants = [bool(request.row.calls) for request in todo]
    if all(wants) or not any(wants):
        return None
    found = load_metric("decision_roc").compute(
        predictions=[answer.probability for answer in reference], references=wants
    )
    return {name: _rounded(found[name], 4) for name in ("auc", "best_threshold", "best_balanced_accuracy")}


def spread(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and spread of the numbers of several models, in the shape of one of them.

    Args:
        results: nested dicts of the same shape; what is no number in all of them is left out.

    Returns:
        `{"mean", "sd", "least", "most"}` in place of each number; `sd` is that of a sample.
    """
    found: dict[str, Any] = {}
    for name, value in results[0].items():
        others = [result.get(name) for result in results]
        numbers = [other for other in others if isinstance(other, int | float)]
        if isinstance(value, Mapping):
            found[name] = spread([other for other in others if isinstance(other, Mapping)])
        elif len(numbers) == len(others):
            deviation = stdev(numbers) if len(numbers) > 1 else 0.0
            found[name] = {
                "mean": round(mean(numbers), 4),
                "sd": round(deviation, 4),
                "least": min(numbers),
                "most": max(numbers),
            }
    return found


def _rounded(number: float | None, digits: int = 3) -> float | None:
    return number if number is None or isinstance(number, int) else round(number, digits)


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def measure(model: Model, options: argparse.Namespace) -> dict[str, Any]:
    """All sets with one model, printed as they are done.

    Returns:
        `{"sets": ..., "bfcl": ..., "decision": ..., "left_out": ...}`: by set, the first two by decoding too.
    """
    results: dict[str, Any] = {"sets": {}, "bfcl": {}, "decision": {}, "left_out": {}}
    for name in options.sets:
        todo, left_out = requests(name, options.data, model.tokenizer, model.room, options.limit)
        if not todo:
            raise SystemExit(f"{name}: all {left_out} records were left out; is this the model that was meant?")
        answers = run_set(model, todo, options.decodings, name)
        counts = {decoding: summary(todo, answers[decoding], answers["ar"]) for decoding in options.decodings}
        results["sets" if name in OWN_SETS else "bfcl"][name] = counts
        results["decision"][name] = decision(todo, answers["ar"])
        results["left_out"][name] = left_out
        print(f"\n{name}, {len(todo)} requests, {left_out} left out")
        for decoding in options.decodings:
            print(f"  {decoding:9}", json.dumps(counts[decoding]))
    return results


def models(options: argparse.Namespace) -> Iterator[Model]:
    """The models, loaded one after the other."""
    for path in options.model.split(","):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        dtype = getattr(torch, options.dtype)
        yield Model(
            AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, dtype=dtype).eval(),
            tokenizer,
            options.drafter,
        )


def _command(options: argparse.Namespace) -> str:
    """The command that was run, as far as it changes what is measured."""
    words = [f"--sets {' '.join(options.sets)}", f"--limit {options.limit}", f"--threads {options.threads}"]
    words += [f"--model {options.model}"] if options.model != str(ROOT) else []
    words += [f"--decodings {' '.join(options.decodings)}"] if tuple(options.decodings) != DECODINGS else []
    words += [f"--drafter {options.drafter}"] if options.drafter else []
    words += [f"--dtype {options.dtype}"] if options.dtype != "float32" else []
    return f"python -m eval.held_out {' '.join(words)}"


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--model", default=str(ROOT), help="folder or repo of the model; several, such as seeds, with commas between"
    )
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder with train/, dev/ and bfcl_open/")
    parser.add_argument("--sets", nargs="+", default=list(OWN_SETS), choices=[*OWN_SETS, *BFCL_SETS])
    parser.add_argument("--decodings", nargs="+", default=list(DECODINGS), choices=generation.DECODINGS)
    parser.add_argument("--drafter", default=None, choices=generation.DRAFTERS, help="None is the model's own")
    parser.add_argument("--limit", type=int, default=200, help="most requests per set")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=ROOT / "eval" / "results" / "held_out.json")
    parser.add_argument("--markdown", action="store_true", help="only print the tables of the file that --out names")
    options = parser.parse_args(arguments)
    if options.markdown:
        if not options.out.is_file():
            parser.error(f"--markdown: there is no {options.out}; measure first, or name another file with --out")
        print("\n\n".join(tables(json.loads(options.out.read_text(encoding="utf-8")))))
        return
    if "ar" not in options.decodings:
        parser.error("--decodings must hold ar: the others are compared with it")
    torch.set_num_threads(options.threads)
    runs, drafters = [], []
    for model in models(options):
        drafters.append(options.drafter or getattr(model.model.generation_config, "drafter", "head"))
        runs.append(measure(model, options))
    results = {
        "command": _command(options),
        "drafter": drafters[0],
        "versions": versions(),
        "threads": options.threads,
        **runs[0],
    }
    if len(runs) > 1:
        results["further_models"] = runs[1:]
        results["spread"] = spread([{name: run[name] for name in ("sets", "bfcl", "decision")} for run in runs])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
