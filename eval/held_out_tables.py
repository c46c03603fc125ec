"""The Markdown tables of the model card, out of what `eval.held_out` measured: `python -m eval.held_out --markdown`.

Takes the contents of a result file; gives tables, so that no figure of the card is typed by hand.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

_Counts = Mapping[str, Any]
_OF_DECODING: dict[str, Callable[[_Counts], str]] = {
    "right": lambda counts: _of(counts, "right", "requests"),
    "calls right": lambda counts: _of(counts, "calls_right", "calls_wanted"),
    "base forwards per call": lambda counts: _plain(counts.get("base_forwards_per_call")),
    "head forwards per call": lambda counts: _plain(counts.get("head_forwards_per_call")),
    "values accepted": lambda counts: _percent(counts.get("slots_accepted")),
    "values right": lambda counts: _percent(counts.get("values_right")),
    "median ms per call": lambda counts: _plain(counts.get("median_ms")),
}
_SPREAD: dict[str, Callable[[_Counts], str]] = {
    "requests right": lambda counts: _spread(counts.get("right")),
    "calls right": lambda counts: _spread(counts.get("calls_right")),
    "base forwards per call": lambda counts: _spread(counts.get("base_forwards_per_call"), 2),
    "values accepted, share": lambda counts: _spread(counts.get("slots_accepted"), 3),
    "values right, share": lambda counts: _spread(counts.get("values_right"), 3),
}


def tables(results: Mapping[str, Any]) -> list[str]:
    """The tables of a result file.

    Args:
        results: what `eval.held_out` wrote.

    Returns:
        Markdown tables, those that have a row: requests of the own sets, of the leaderboard's categories, the decision
        to call, slots by kind, and the spread over several models. A column in which nothing stands is left out.
    """
    own, leaderboard = results.get("sets", {}), results.get("bfcl", {})
    several = results.get("spread", {})
    spreads = {**_named(several.get("sets", {})), **several.get("bfcl", {})}
    models = 1 + len(results.get("further_models", ()))
    found = [
        markdown(["set", "decoding", *_OF_DECODING], _decoding_rows(_named(own))),
        markdown(["category", "decoding", *_OF_DECODING], _decoding_rows(leaderboard)),
        _decision(results),
        _kinds({**_named(own), **leaderboard}),
        markdown([f"set, {models} models", "decoding", *_SPREAD], _spread_rows(spreads)),
    ]
    return [table for table in found if table]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells, without the columns that are empty in all rows; an empty text where there are no rows."""
    if not rows:
        return ""
    kept = [column for column in range(len(header)) if any(row[column] for row in rows)]
    first, *others = (f"| {' | '.join(line[column] for column in kept)} |" for line in (header, *rows))
    return "\n".join([first, f"|{'---|' * len(kept)}", *others])


def _decoding_rows(sets: Mapping[str, Mapping[str, _Counts]]) -> list[list[str]]:
    rows = []
    for name, decodings in sets.items():
        for decoding, counts in decodings.items():
            cells = {column: read(counts) for column, read in _OF_DECODING.items()}
            if decoding == "diffusion":
                cells["values accepted"] = "not checked"
            rows.append([name, f"`{decoding}`", *cells.values()])
    return rows


def _decision(results: Mapping[str, Any]) -> str:
    header = ["set", "calls where one is wanted", "none where none is", "balanced accuracy", "AUC of P(call)"]
    sets = {**results.get("sets", {}), **results.get("bfcl", {})}
    rows = []
    for name, found in results.get("decision", {}).items():
        if found is not None:
            counts = sets[name]["ar"]
            shares = [counts[key] for key in ("relevance", "irrelevance", "balanced_accuracy")]
            label = f"{name} tools" if name in results["sets"] else name
            rows.append([label, *map(_percent, shares), f"{found['auc']:.3f}"])
    return markdown(header, rows)


def _kinds(sets: Mapping[str, Mapping[str, _Counts]]) -> str:
    """By kind of slot: what the base accepts of drafts, and how many of the gold slots a decoding writes."""
    decodings = list(dict.fromkeys(name for found in sets.values() for name in found))
    header = ["set", "kind of slot", "drafted", "accepted", "tokens accepted", *(f"right, `{n}`" for n in decodings)]
    rows = []
    for name, found in sets.items():
        drafted = found.get("verified", {}).get("accepted_by_kind", {})
        right = {decoding: found.get(decoding, {}).get("right_by_kind", {}) for decoding in decodings}
        for kind in sorted({*drafted, *(kind for kinds in right.values() for kind in kinds)}):
            rates = drafted.get(kind, {})
            rows.append(
                [
                    name,
                    kind,
                    _plain(rates.get("drafted_slots")),
                    _percent(rates.get("slot_acceptance")),
                    _percent(rates.get("token_acceptance")),
                    *(_right(kinds.get(kind)) for kinds in right.values()),
                ]
            )
    return markdown(header, rows)


def _spread_rows(sets: Mapping[str, Mapping[str, _Counts]]) -> list[list[str]]:
    return [
        [name, f"`{decoding}`", *(read(counts) for read in _SPREAD.values())]
        for name, decodings in sets.items()
        for decoding, counts in decodings.items()
    ]


def _named(sets: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{name} tools": found for name, found in sets.items()}


def _of(counts: _Counts, part: str, whole: str) -> str:
    return f"{counts[part]} of {counts[whole]}" if counts[whole] else ""


def _plain(number: float | None) -> str:
    return "" if number is None else str(number)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _right(rates: _Counts | None) -> str:
    return "" if rates is None else f"{rates['exact_match']:.0%} of {rates['slots']}"


def _spread(numbers: _Counts | None, digits: int = 1) -> str:
    if numbers is None:
        return ""
    mean, deviation, least, most = (f"{numbers[key]:.{digits}f}" for key in ("mean", "sd", "least", "most"))
    return f"{mean} ± {deviation} ({least} to {most})"
