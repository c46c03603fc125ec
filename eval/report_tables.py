"""The Markdown tables of `python -m eval.report`: one function for each result file.

Each takes the contents of a file and gives paragraphs. Tables that a command prints as Markdown are that command's; the
others are made here.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from eval import ablation, compare, decoding_ablation, latency
from eval.held_out_tables import markdown, tables
from eval.latency_measure import MODES

Result = Mapping[str, Any]


def folded(title: str, paragraphs: Sequence[str]) -> str:
    """Paragraphs that a reader opens by their title."""
    return "\n\n".join([f"<details><summary>{title}</summary>", *paragraphs, "</details>"])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _percent(share: float | None, digits: int = 0) -> str:
    return "" if share is None else f"{share:.{digits}%}"


def _of(part: int | None, whole: int) -> str:
    return f"{part} of {whole}" if whole else ""


# ---------------------------------------------------------------------------------------------------------------------
# eval.compare
# ---------------------------------------------------------------------------------------------------------------------


def compare_summary(result: Result) -> list[str]:
    """Our decodings beside the best settings of each rival, all sets in one table."""
    sets = result["sets"]
    header = ["decoding", "valid", "right"]
    header += [f"{name}: {column}" for name in sets for column in ("forwards", "ms")]
    rows = []
    for name in _best_rivals_and_ours(sets):
        found = [one["decodings"][name] for one in sets.values()]
        right = sum(row["ast"] if row["ast_of"] else row["exact"] for row in found)
        count = sum(row["requests"] for row in found)
        costs = [[_number(row["base_forwards_per_call"]), _number(row["ms"] and row["ms"]["p50"])] for row in found]
        valid = _of(sum(row["valid"] for row in found), count)
        rows.append([f"`{name}`", valid, _of(right, count), *itertools.chain(*costs)])
    return [
        "Whole replies on the same base: each decoding decides by itself whether to call and which tool. Forwards of "
        "the base and median milliseconds of a call; of the base alone and of each engine the fastest setting, and "
        "that with the fewest forwards where it is another. *Right*: by BFCL's rules, on unseen tools exactly.",
        markdown(header, rows),
        "Forwards and times are over the requests that every decoding answered with a call: "
        + ", ".join(f"{one['answered_by_all_with_a_call']} of {one['requests']} ({name})" for name, one in sets.items())
        + ". [docs/evaluation.md](docs/evaluation.md) has all decodings.",
    ]


def _best_rivals_and_ours(sets: Mapping[str, Result]) -> list[str]:
    """Of the base alone and of each engine the settings with the least time and with the fewest forwards over all
    sets; all of ours."""

    def total(name: str, of: Callable[[Result], float | None]) -> float:
        return sum(of(one["decodings"][name]) or float("inf") for one in sets.values())

    answered = [[name for name, row in one["decodings"].items() if row["requests"]] for one in sets.values()]
    names = [name for name in answered[0] if all(name in found for found in answered)]
    rivals: dict[str, list[str]] = {}
    for name in names:
        if not compare.is_ours(name):
            rivals.setdefault(name.split("+")[0], []).append(name)
    best = set()
    for found in rivals.values():
        best.add(min(found, key=lambda name: total(name, lambda row: row["ms"] and row["ms"]["p50"])))
        best.add(min(found, key=lambda name: total(name, lambda row: row["base_forwards_per_call"])))
    return [name for name in names if name in best or compare.is_ours(name)]


def compare_body(result: Result) -> list[str]:
    """All decodings and columns, a table for each set, and the notes of the command."""
    paragraphs = ["\n".join(f"- {name}: {text}" for name, text in result["notes"].items())]
    for name, found in result["sets"].items():
        gold, compiled = found["hallucinated_gold"], found["compile_ms"]
        means = ", ".join(f"{engine} {_number(spread and spread['mean'])}" for engine, spread in compiled.items())
        beside = (
            f"{found['requests']} requests, {found['left_out']} left out; forwards, tokens and times over "
            f"{found['answered_by_all_with_a_call']}. Compilation, ms a request: {means}."
        )
        if gold is not None:
            beside += f" Of the arguments of the gold calls {gold:.1%} count as hallucinated."
        paragraphs.append(folded(f"{name}: all decodings", [compare.table({name: found}), beside]))
    return paragraphs


# ---------------------------------------------------------------------------------------------------------------------
# eval.bfcl
# ---------------------------------------------------------------------------------------------------------------------


def bfcl_body(result: Result) -> list[str]:
    """Accuracy by category and by BFCL's groups, decisions, and why answers are wrong."""
    header = ["category", "decoding", "right", "accuracy", "95% interval", "called", "refused", "cut"]
    header += ["as `ar`", "base forwards", "head forwards", "ms, median"]
    rows, faults = [], []
    for category, decodings in result["categories"].items():
        for decoding, row in decodings.items():
            cells = [_of(row["right"], row["requests"]), _percent(row["accuracy"], 1), _interval(row["interval"])]
            cells += [str(row[name]) for name in ("called", "refused", "cut")]
            numbers = ("calls_of_ar", "base_forwards", "head_forwards", "median_ms")
            rows.append([category, f"`{decoding}`", *cells, *(_number(row[name]) for name in numbers)])
            faults += [[category, f"`{decoding}`", fault, str(count)] for fault, count in row["faults"].items()]
    groups = [
        [group, f"`{decoding}`", _percent(row["accuracy"], 1), _interval(row["interval"]), ", ".join(row["of"])]
        for decoding, found in result["groups"].items()
        for group, row in found.items()
    ]
    decided = [
        [f"`{decoding}`", *(_of(*counts) if counts else "" for counts in found.values())]
        for decoding, found in result["decisions"].items()
    ]
    names = next(iter(result["decisions"].values()))
    return [
        markdown(header, rows),
        "called: replies that call; refused: requests that could not be asked; cut: replies with a value that was "
        "ended at its limit of length; as `ar`: replies with the calls of `ar`. Forwards are means a request. "
        f"Requests: {result['data']}; intervals: {result['bootstrap_draws']} draws of a bootstrap.",
        markdown(["group", "decoding", "accuracy", "95% interval", "of"], groups),
        markdown(["decoding", *names], decided),
        folded("Why answers are wrong", [markdown(["category", "decoding", "fault", "answers"], faults)]),
    ]


def _interval(ends: Sequence[float]) -> str:
    return f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f}"


# ---------------------------------------------------------------------------------------------------------------------
# eval.held_out and eval.bench_decoding
# ---------------------------------------------------------------------------------------------------------------------


def held_out_summary(result: Result) -> list[str]:
    """The command's tables, without those by kind of slot and over several models."""
    return [table for table in tables(result) if not _is_long(table)]


def held_out_body(result: Result) -> list[str]:
    """All of the command's tables."""
    return [folded(_heading(table), [table]) if _is_long(table) else table for table in tables(result)]


def _is_long(table: str) -> bool:
    return "| kind of slot |" in table or " models |" in table


def _heading(table: str) -> str:
    return "By kind of slot" if "| kind of slot |" in table else "Several models: mean ± deviation (least to most)"


_COSTS: dict[str, Callable[[Result], str]] = {
    "base forwards, mean": lambda row: f"{row['base_forwards']['mean']:.1f}",
    "median": lambda row: _number(row["base_forwards"]["p50"]),
    "where nobody is cut": lambda row: _number(_rounded(row["base_forwards_where_nobody_is_cut"])),
    "head forwards": lambda row: f"{row['head_forwards']:.1f}",
    "time, of `ar`": lambda row: f"{row['times_ar']:.2f}",
    "valid": lambda row: _of(row["valid"], row["requests"]),
    "arguments of `ar`": lambda row: str(row["same_arguments_as_ar"]),
}
_MORE_COSTS: dict[str, Callable[[Result], str]] = {
    "90%": lambda row: _number(row["base_forwards"]["p90"]),
    "99%": lambda row: _number(row["base_forwards"]["p99"]),
    "ms, median": lambda row: _number(row["ms"]["p50"]),
    "ms, 95%": lambda row: _number(row["ms"]["p95"]),
    "time behind the prefill, of `ar`": lambda row: f"{row['times_ar_behind_prefill']:.2f}",
    "cut": lambda row: str(row["cut"]),
    "tokens of `ar`": lambda row: _number(row["same_tokens_as_ar"]),
    "accepted": lambda row: _percent(row["accepted"]),
}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)


def _costs(result: Result, columns: Mapping[str, Callable[[Result], str]]) -> Iterator[str]:
    """A table for each set."""
    for name, found in result["sets"].items():
        rows = [
            [decoding, *(read(row) for read in columns.values())]
            for decoding, row in found["decodings"].items()
            if row["requests"]
        ]
        yield markdown([f"{name}, {found['requests']} requests", *columns], rows)


def bench_body(result: Result) -> list[str]:
    """What each decoding costs, with the tails, the times and what was accepted."""
    return [result["counting"], *_costs(result, _COSTS), folded("More columns", list(_costs(result, _MORE_COSTS)))]


# ---------------------------------------------------------------------------------------------------------------------
# eval.latency and eval.chat
# ---------------------------------------------------------------------------------------------------------------------


def latency_body(result: Result) -> list[str]:
    """A table for each factor, and what was left out."""
    start = result["start"]
    paragraphs = [
        f"{result['model']}, {result['device']}, {result['dtype']}. {result['method']}",
        f"Start: {start['load_s']:.1f} s to load the model, {start['vocabulary_s']:.2f} s to read the tokenizer's "
        f"tokens, {start['first_ms']:.0f} ms for the first request of all.",
    ]
    for name, rows in result["factors"].items():
        if rows:
            header = [latency.TITLES[name], "decoding", "ms, median", "ms, 95%", "ms, of `ar`", "first, ms", "calls/s"]
            header += ["tokens/s", "base forwards", "head forwards", "accepted"]
            split = [row for row in rows if MODES[row["mode"]].split]
            phases = list(rows[0]["phases_ms"])
            where = [[*_cell(name, row), *(f"{row['phases_ms'][phase]:.1f}" for phase in phases)] for row in split]
            both = [
                markdown(header, [_latency_cells(name, row) for row in rows]),
                "Where the time goes, ms, mean:",
                markdown([latency.TITLES[name], "decoding", *phases], where),
            ]
            paragraphs.append(folded(f"By {latency.TITLES[name]}", both))
    left_out = [f"- not measured: {what}: {reason}" for what, reason in result["left_out"].items()]
    left_out += [f"- not compiled in {mode}: {parts}" for mode, parts in result["not_compiled"].items()]
    return [*paragraphs, "\n".join(left_out)] if left_out else paragraphs


def _cell(factor: str, row: Result) -> list[str]:
    """What names a cell of the grid."""
    return [latency.label(factor, row), f"`{row['decoding']}`"]


def _latency_cells(factor: str, row: Result) -> list[str]:
    numbers = [row[name] for name in ("calls_per_second", "tokens_per_second", "base_forwards", "head_forwards")]
    return [
        *_cell(factor, row),
        *(f"{row['ms'][name]:.1f}" for name in ("p50", "p95")),
        "" if row["of_ar"] is None else f"{row['of_ar']:.2f}",
        f"{row['first_ms']:.0f}",
        *(f"{value:.1f}" for value in numbers),
        _percent(row["accepted"]),
    ]


def chat_body(result: Result) -> list[str]:
    """What was compared with the plain base, how much of it differs, and the times of both."""
    same = [
        [
            *(row["model"], row["group"], row["tools"], str(row["prompts"])),
            *(f"{row[name]['different']} of {row[name]['compared']}" for name in ("forward", "steps", "tokens")),
            str(row["ties"]),
            "; ".join(f"{decision}: {count}" for decision, count in row["decisions"].items()),
        ]
        for row in result["rows"]
    ]
    header = ["model", "prompts", "tools", "number", "logits of a forward", "logits of steps", "tokens", "near ties"]
    header += ["decisions"]
    times = [
        [
            *(row["model"], row["group"], row["tools"]),
            *(_number(row[f"{what}_ms"][key]) for what in ("forward", "reply") for key in ("model", "base", "ratio")),
        ]
        for row in result["rows"]
    ]
    columns = [f"{what}, {key}" for what in ("forward", "reply") for key in ("ms", "ms of the base", "ratio")]
    weights = "; ".join(
        f"{state}: {found['different']} of {found['compared']}" for state, found in result["weights"].items()
    )
    return [
        f"Differences over {result['prompts']} prompts: {result['differences']}. The base: {result['base']}. Each cell "
        f"says how many numbers differ of those compared. Weights that differ: {weights}.",
        markdown(header, same),
        folded("Times", [markdown(["model", "prompts", "tools", *columns], times)]),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# eval.decoding_ablation and eval.ablation
# ---------------------------------------------------------------------------------------------------------------------


def decoding_ablation_body(result: Result) -> list[str]:
    """The command's table over all requests, and one for each set."""
    settings = ", ".join(f"`{name}` {value}" for name, value in result["defaults"].items())
    together = result["together"]
    sets = [
        folded(f"{name}, {part['requests']} requests", [decoding_ablation.table(part["choices"])])
        for name, part in result["sets"].items()
    ]
    broken = [
        f"- {name}: {row['broken_values'][0]} of {row['broken_values'][1]} drafted values were no value of their slot"
        for name, row in together["choices"].items()
        if row["broken_values"][1]
    ]
    return [
        f"Nothing is trained here. One factor at a time around {settings}; {together['requests']} requests with the "
        "tool given. In brackets the 95% interval of a bootstrap over requests; a star: differs from the defaults "
        "(paired). Times are of what lies behind the prefill.",
        decoding_ablation.table(together["choices"]),
        *(["\n".join(broken)] if broken else []),
        *sets,
    ]


def ablation_body(result: Result) -> list[str]:
    """The command's table: defaults in percent, choices as differences in points."""
    heads = result["heads"]
    defaults = [head for head in heads if head["name"] == ablation.DEFAULTS]
    others = [head for head in heads if head["name"] != ablation.DEFAULTS]
    return [
        "Small heads, trained for this comparison only. Acceptance is the share of drafted values that the base lets "
        "stand; right is what one denoising step gives against gold. Defaults: percent, mean and range over seeds; "
        "choices: points more or less than that mean.",
        folded(f"{len(others)} choices", [ablation.table(defaults, others)]),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# eval.decision and training.audit
# ---------------------------------------------------------------------------------------------------------------------


def decision_body(result: Result) -> list[str]:
    """How well each model decides, in each way of deciding."""
    header = ["model", "set", "prompts", "decided by", "AUC", "called where wanted", "not called where unwanted"]
    rows = [
        [
            *(f"`{model}`", name, str(found["prompts"]), way),
            f"{values['auc']:.3f}",
            *(_percent(values[key]) for key in ("relevance", "irrelevance", "balanced_accuracy")),
            f"{values['ece_15']:.3f}",
        ]
        for model, measured in result["models"].items()
        for name, found in measured["sets"].items()
        for way, values in found.items()
        if way != "prompts"
    ]
    return [
        "As many prompts that want a call as prompts that want none. `base`: the base's argmax; `0.5`: its P(call) "
        "against 0.5; `shipped`: what the model ships with.",
        markdown([*header, "balanced accuracy", "calibration error (15 bins)"], rows),
    ]


def audit_summary(result: Result) -> list[str]:
    """What training shares with evaluation, in words."""
    totals = result["totals"]
    return [
        f"Of {totals['training_records']:,} training records {totals['exact'] + totals['near']:,} repeat one of "
        f"{totals['evaluation_records']:,} evaluation requests ({totals['exact']:,} word by word), {totals['shows']:,} "
        f"show a tool with the name of one that an evaluation set calls, {totals['calls']:,} call one, and "
        f"{totals['twins']:,} show one with the same parameters too; the audit lists "
        f"{sum(totals['drop'].values()):,} to be left out."
    ]


_OVERLAPS = {
    "repeat a request": "exact",
    "nearly": "near",
    "show a called tool": "shows",
    "call one": "calls",
    "same parameters": "twins",
}


def audit_body(result: Result) -> list[str]:
    """The same, and a table for each side."""
    training = [
        [label, *(f"{row[key]:,}" for key in ("records", *_OVERLAPS.values())), f"{sum(row['drop'].values()):,}"]
        for label, row in result["training"].items()
    ]
    evaluation = [
        [label, *(f"{row[key]:,}" for key in ("records", *_OVERLAPS.values())), str(len(row["shared_tools"]))]
        for label, row in result["evaluation"].items()
    ]
    settings = ", ".join(f"{name} {value}" for name, value in result["settings"].items())
    return [
        *audit_summary(result),
        f"Settings: {settings}. Numbers are of training records; names are equal without case and punctuation.",
        folded("By training file", [markdown(["training file", "records", *_OVERLAPS, "left out"], training)]),
        folded(
            "By evaluation set",
            [markdown(["evaluation set", "its records", *_OVERLAPS, "its tools in training"], evaluation)],
        ),
    ]
