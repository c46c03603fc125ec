"""What training and evaluation records share, and splits that share no tool: `python -m training.audit overlap|split`.

Takes record files, JSONL, gzipped or not. `overlap` counts the training records that repeat a request of an evaluation
set or have a tool that one calls, and lists them to be left out; `split` parts records so that no tool stands on both
sides. Words are what spaces and punctuation part; whether two differently worded requests mean the same, it does not
know. No torch, no model.
"""

import argparse
import gzip
import hashlib
import json
import platform
import random
import re
import shlex
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from repo_package import ROOT

from .data import DEFAULT_DATA
from .records import Record, RecordError, RecordFile, bare_call, record_files

DEFAULT_TRAIN = [DEFAULT_DATA / "train", DEFAULT_DATA / "text"]
DEFAULT_EVALUATION = [DEFAULT_DATA / "dev", DEFAULT_DATA / "bfcl_open" / "normalised"]
DEFAULT_OUT = ROOT / "eval" / "results" / "audit.json"
ALL = "all"
"""In place of a file's label: all files of that side. Labels have a slash."""

_WORD = re.compile(r"[^\W_]+")
_APOSTROPHES = str.maketrans("", "", "'’ʼ")


# ---- What a record says


def user_texts(record: Record) -> list[str]:
    """The texts of all user messages."""
    return [message["content"] or "" for message in record["messages"] if message.get("role") == "user"]


def called_names(record: Record) -> list[str]:
    """Names of the functions that are called: expected, or earlier in the conversation."""
    earlier = [bare_call(call) for message in record["messages"] for call in message.get("tool_calls") or []]
    return [call["name"] for call in [*record["calls"], *earlier]]


def shown_names(record: Record) -> list[str]:
    """Names of the tools that are shown."""
    return [tool["function"]["name"] for tool in record["tools"]]


# ---- What counts as equal


def words(text: str) -> list[str]:
    """Words without case, accents, apostrophes and punctuation."""
    if not text.isascii():
        parts = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
        text = "".join(sign for sign in parts if not unicodedata.combining(sign))
    return _WORD.findall(text.lower().translate(_APOSTROPHES))


@lru_cache(maxsize=1 << 17)
def tool_key(name: str) -> str:
    """What names of one tool have in common: `getWeather`, `get_weather` and `Get.Weather` are alike."""
    return "".join(words(name)) or name


def signature(function: Record) -> tuple[str, ...]:
    """A function's name and the sorted names of its parameters."""
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    return function["name"], *sorted(properties if isinstance(properties, dict) else ())


# ---- Overlap


class Match(NamedTuple):
    """A request of an evaluation set that a text repeats.

    Args:
        request: its number in the index.
        kind: `exact`, `near`, or `short` where it is equal but too short to mean anything.
        share: part of its n-grams that the text contains.
    """

    request: int
    kind: str
    share: float


@dataclass
class RequestIndex:
    """Finds the requests of evaluation sets in other texts.

    Near means: the text contains at least `threshold` of the request's distinct n-grams of words. A request of fewer
    than n words is one n-gram of all its words. N-grams are kept as 64-bit hashes of word numbers: memory grows with
    the evaluation sets only, and two of a million n-grams share a hash once in some ten million audits.

    Args:
        ngram: n, in words.
        threshold: of the share, above 0 and at most 1.
        min_words: shorter requests match only when equal, and are counted apart.
    """

    ngram: int = 8
    threshold: float = 0.5
    min_words: int = 5
    numbers: dict[str, int] = field(default_factory=dict)
    owners: list[list[tuple[int, str]]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    vocabulary: dict[str, int] = field(default_factory=dict)
    postings: dict[int, dict[int, list[int]]] = field(default_factory=lambda: defaultdict(dict))

    def __post_init__(self) -> None:
        if self.ngram < 1 or self.min_words < 1 or not 0 < self.threshold <= 1:
            raise ValueError("ngram and min_words must be at least 1, threshold above 0 and at most 1")

    def add(self, text: str, file: int, record_id: str) -> None:
        """Add one request of an evaluation file; a text without words is left out."""
        found = words(text)
        if not found:
            return
        number = self.numbers.setdefault(" ".join(found), len(self.owners))
        if number < len(self.owners):
            self.owners[number].append((file, record_id))
            return
        self.owners.append([(file, record_id)])
        ids = [self.vocabulary.setdefault(word, len(self.vocabulary)) for word in found]
        length = min(self.ngram, len(ids))
        grams = _grams(ids, length)
        self.sizes.append(len(grams))
        if len(ids) >= self.min_words:
            table = self.postings[length]
            for gram in grams:
                table.setdefault(gram, []).append(number)

    def matches(self, text: str) -> list[Match]:
        """The requests that the text repeats, in the order of their numbers."""
        found = words(text)
        equal = self.numbers.get(" ".join(found))
        counts: Counter[int] = Counter()
        # A word that no request has cannot stand in a shared n-gram: only the runs between such words are looked at.
        runs: list[list[int]] = [[]]
        for word in found:
            number = self.vocabulary.get(word)
            if number is not None:
                runs[-1].append(number)
            elif runs[-1]:
                runs.append([])
        for length, table in self.postings.items():
            for gram in set().union(*(_grams(run, length) for run in runs)):
                counts.update(table.get(gram, ()))
        near = {number: count / self.sizes[number] for number, count in counts.items()}
        result = [
            Match(number, "near", share)
            for number, share in near.items()
            if share >= self.threshold and number != equal
        ]
        if equal is not None:
            result.append(Match(equal, "exact" if len(found) >= self.min_words else "short", 1.0))
        return sorted(result)


def _grams(ids: Sequence[int], length: int) -> set[int]:
    # Hashes of tuples of integers are the same in every process, unlike those of texts.
    return {hash(tuple(ids[start : start + length])) for start in range(len(ids) - length + 1)}


@dataclass
class ToolNames:
    """Tools of one file or several.

    Args:
        names: of tools that are shown or called.
        keys: `tool_key` of those.
        signatures: of tools that are shown.
        called: names of tools that are shown and called, now or earlier in the conversation. A tool of the past that is
            no longer shown is not asked for.
        called_keys: `tool_key` of those.
        called_signatures: of those, as they are shown.
    """

    names: set[str] = field(default_factory=set)
    keys: set[str] = field(default_factory=set)
    signatures: set[tuple[str, ...]] = field(default_factory=set)
    called: set[str] = field(default_factory=set)
    called_keys: set[str] = field(default_factory=set)
    called_signatures: set[tuple[str, ...]] = field(default_factory=set)

    def add(self, record: Record) -> None:
        """Add the tools that a record shows or calls."""
        shown, called = set(shown_names(record)), set(called_names(record))
        new = (shown | called) - self.names
        self.names |= new
        self.keys.update(map(tool_key, new))
        called &= shown
        self.called_keys.update(map(tool_key, called - self.called))
        self.called |= called
        tools = {signature(tool["function"]) for tool in record["tools"]}
        self.signatures |= tools
        self.called_signatures.update(tool for tool in tools if tool[0] in called)

    def update(self, other: "ToolNames") -> None:
        """Add the tools of another file."""
        for part in fields(self):
            getattr(self, part.name).update(getattr(other, part.name))


@dataclass
class Cell:
    """What training files share with evaluation files. The first four and the last three are numbers of records.

    Args:
        exact: training records with a user message equal to a request.
        near: other training records with a near-duplicate of one.
        short: other training records with a message equal to a request too short to mean anything.
        evaluation: evaluation records whose request was found, exactly or nearly.
        names: tool names on both sides, shown or called.
        called: those of them that the evaluation side calls.
        alike: the evaluation side's tool names that are on the other when case and punctuation do not count.
        signatures: tools on both sides with the same name and the same parameter names.
        shows: training records that show a tool which the evaluation side calls, case and punctuation not counted.
        calls: training records that call such a tool, now or earlier in the conversation.
        twins: training records that show one with exactly its name and its parameter names.
        worst: (share, training id, evaluation id), largest share first; of two files only.
    """

    exact: int = 0
    near: int = 0
    short: int = 0
    evaluation: int = 0
    names: int = 0
    called: int = 0
    alike: int = 0
    signatures: int = 0
    shows: int = 0
    calls: int = 0
    twins: int = 0
    worst: list[tuple[float, str, str]] = field(default_factory=list)


_COLUMNS = tuple(part.name for part in fields(Cell) if part.name != "worst")


class Found(NamedTuple):
    """A training record to leave out.

    Args:
        file: label of its file.
        line: its number, from 1.
        id: of the record.
        why: `request`: it repeats one of an evaluation set; else `tool`: it shows or calls a tool that one calls.
    """

    file: str
    line: int
    id: str
    why: str


@dataclass
class Overlap:
    """Outcome of `overlap`.

    Args:
        cells: for each training file's label and evaluation file's label, either of which may be `ALL`.
        records: records per label.
        drop: training records to leave out, in the order of the files.
        skipped: corrupt lines passed over, per label.
        shared_tools: for each evaluation file's label and `ALL`, its called tools that training records show or call.
    """

    cells: dict[tuple[str, str], Cell] = field(default_factory=dict)
    records: dict[str, int] = field(default_factory=dict)
    drop: list[Found] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    shared_tools: dict[str, list[str]] = field(default_factory=dict)


def overlap(
    train: Sequence[RecordFile], evaluation: Sequence[RecordFile], index: RequestIndex, examples: int = 3
) -> Overlap:
    """Count what training files share with evaluation files.

    An evaluation record's request is its last user message; all user messages of a training record are compared.

    Args:
        train: training files.
        evaluation: evaluation files.
        index: empty; says what counts as a near-duplicate.
        examples: worst pairs to keep per training file and evaluation file.

    Returns:
        The counts.

    Raises:
        RecordError: a file cannot be read, or two have the same folder and name.
    """
    _check_labels([*train, *evaluation])
    result = Overlap()
    theirs = [_evaluation_tools(file, number, index, result) for number, file in enumerate(evaluation)]
    theirs.append(ToolNames())
    for names in theirs[:-1]:
        theirs[-1].update(names)
    labels = [*(file.label for file in evaluation), ALL]
    everything = _Row.empty(len(theirs))
    for file in tqdm(train, desc="training files", unit="file", disable=None):
        row = _file_overlap(file, theirs, index, examples, result)
        everything.add(row)
        for label, cell in zip(labels, row.whole(theirs, index), strict=True):
            result.cells[file.label, label] = cell
    for label, cell, names in zip(labels, everything.whole(theirs, index), theirs, strict=True):
        result.cells[ALL, label] = cell
        result.shared_tools[label] = sorted(name for name in names.called if tool_key(name) in everything.tools.keys)
    return result


def _evaluation_tools(file: RecordFile, number: int, index: RequestIndex, result: Overlap) -> ToolNames:
    """The tools of one evaluation file, whose requests go into the index."""
    names = ToolNames()
    result.records[file.label] = 0
    for _, record in file.records():
        result.records[file.label] += 1
        names.add(record)
        for text in user_texts(record)[-1:]:
            index.add(text, number, record["id"])
    result.skipped[file.label] = file.skipped
    return names


@dataclass
class _Row:
    """What one training file or all share with each evaluation file and, last, with all of them.

    Args:
        cells: the counts of records.
        hit: numbers of the requests that were found, exactly or nearly.
        tools: of the training side.
    """

    cells: list[Cell]
    hit: list[set[int]]
    tools: ToolNames

    @classmethod
    def empty(cls, columns: int) -> "_Row":
        return cls([Cell() for _ in range(columns)], [set() for _ in range(columns)], ToolNames())

    def add(self, other: "_Row") -> None:
        """Add the counts of another training file; no record is in both."""
        for cell, more in zip(self.cells, other.cells, strict=True):
            for name in ("exact", "near", "short", "shows", "calls", "twins"):
                setattr(cell, name, getattr(cell, name) + getattr(more, name))
        for requests, found in zip(self.hit, other.hit, strict=True):
            requests |= found
        self.tools.update(other.tools)

    def whole(self, theirs: Sequence[ToolNames], index: RequestIndex) -> list[Cell]:
        """The cells with what is not a count of training records: evaluation records and tools."""
        for number, (cell, names) in enumerate(zip(self.cells, theirs, strict=True)):
            owners = [owner for request in self.hit[number] for owner, _ in index.owners[request]]
            # The last column is that of all evaluation files.
            cell.evaluation = len(owners) if number == len(theirs) - 1 else owners.count(number)
            cell.names = len(self.tools.names & names.names)
            cell.called = len(self.tools.names & names.called)
            cell.signatures = len(self.tools.signatures & names.signatures)
            cell.alike = sum(tool_key(name) in self.tools.keys for name in names.names)
        return self.cells


def _file_overlap(
    file: RecordFile, theirs: Sequence[ToolNames], index: RequestIndex, examples: int, result: Overlap
) -> _Row:
    """What one training file shares with each evaluation file."""
    row = _Row.empty(len(theirs))
    # Decisions of one dialogue follow each other and repeat its messages.
    matches = lru_cache(maxsize=4096)(index.matches)
    result.records[file.label] = 0
    for line, record in file.records():
        result.records[file.label] += 1
        row.tools.add(record)
        found = {match for text in user_texts(record) for match in matches(text)}
        _count_requests(row, record["id"], found, index, examples)
        has_tool = _count_tools(row.cells, record, theirs)
        has_request = any(match.kind != "short" for match in found)
        if has_request or has_tool:
            result.drop.append(Found(file.label, line, record["id"], "request" if has_request else "tool"))
    result.skipped[file.label] = file.skipped
    return row


def _count_requests(row: _Row, record_id: str, found: Iterable[Match], index: RequestIndex, examples: int) -> None:
    """Count one training record by the nearest of its matches with each evaluation file."""
    kinds: dict[int, set[str]] = defaultdict(set)
    for match in found:
        for number, owner in index.owners[match.request]:
            if match.kind != "short":
                _keep_worst(row.cells[number].worst, (match.share, record_id, owner), examples)
            for column in (number, len(row.cells) - 1):
                kinds[column].add(match.kind)
                if match.kind != "short":
                    row.hit[column].add(match.request)
    for column, seen in kinds.items():
        kind = next(kind for kind in ("exact", "near", "short") if kind in seen)
        setattr(row.cells[column], kind, getattr(row.cells[column], kind) + 1)


def _count_tools(cells: Sequence[Cell], record: Record, theirs: Sequence[ToolNames]) -> bool:
    """Count one training record by its tools; whether any evaluation file calls one of them."""
    shown, called = ({tool_key(name) for name in names(record)} for names in (shown_names, called_names))
    if theirs[-1].called_keys.isdisjoint(shown | called):
        return False
    tools = {signature(tool["function"]) for tool in record["tools"]}
    for cell, names in zip(cells, theirs, strict=True):
        cell.shows += not names.called_keys.isdisjoint(shown)
        cell.calls += not names.called_keys.isdisjoint(called)
        cell.twins += not names.called_signatures.isdisjoint(tools)
    return True


def _keep_worst(worst: list[tuple[float, str, str]], entry: tuple[float, str, str], count: int) -> None:
    if len(worst) < count or entry[0] >= worst[-1][0]:
        if entry not in worst:
            worst.append(entry)
            worst.sort(key=lambda item: (-item[0], item[1:]))
        del worst[count:]


def _check_labels(files: Sequence[RecordFile]) -> None:
    """Raise where two files would be counted under one label."""
    counts = Counter(file.label for file in files)
    for file in files:
        if counts[file.label] > 1:
            raise RecordError(f"{file.path}: more than one file is called {file.label}; rename it or its folder")


# ---- Split


class RecordTools(NamedTuple):
    """The tools of one record, by `tool_key`: those called, now or earlier, and those only shown."""

    called: tuple[str, ...]
    shown: tuple[str, ...]


def record_tools(record: Record) -> RecordTools:
    """The tools of a record."""
    called = sorted({sys.intern(tool_key(name)) for name in called_names(record)})
    shown = {sys.intern(tool_key(name)) for name in shown_names(record)}
    return RecordTools(tuple(called), tuple(sorted(shown.difference(called))))


@dataclass
class Split:
    """Outcome of `split`.

    Args:
        held_out: for each record, whether it is held out.
        tools: for each tool, by `tool_key`, whether it is held out.
        components: records in each component, largest first.
        linked: records that belong to components; the share is reached over these.
        linked_held_out: how many of them are held out.
    """

    held_out: list[bool]
    tools: dict[str, bool]
    components: list[int]
    linked: int
    linked_held_out: int


def split(records: Sequence[RecordTools], share: float, seed: int = 0, by: str = "shown") -> Split:
    """Part records so that no tool stands on both sides.

    Records that share a tool are one component and stay together; the components that come closest to the share are
    held out, chosen at random among those of one size. Records without any tool are for training.

    Args:
        records: the tools of each record.
        share: part of the linked records to hold out, 0 to 1.
        seed: of the choice.
        by: `shown`: every tool links. `called`: only called tools link, and `trimmed` must then take tools of the
            other side out of each record; tools never called and records without a call are drawn by the share.

    Returns:
        Sides of records and tools.

    Raises:
        ValueError: the share is not between 0 and 1, or `by` is unknown.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}; give a number between 0 and 1")
    if by not in ("shown", "called"):
        raise ValueError(f"by is {by!r}; give 'shown' or 'called'")
    links = [tools.called + tools.shown if by == "shown" else tools.called for tools in records]
    parents = _components(links)
    members = Counter(_root(parents, keys[0]) for keys in links if keys)
    roots, sizes = list(members), list(members.values())
    rng = random.Random(seed)
    linked = sum(sizes)
    chosen = {roots[place] for place in closest_subset(sizes, round(share * linked), rng)}
    side = {key: _root(parents, key) in chosen for key in parents}
    for tools in records:
        for key in tools.shown:
            if key not in side:
                digest = hashlib.sha256(f"{seed} {key}".encode(errors="backslashreplace")).digest()
                side[key] = int.from_bytes(digest[:6], "big") < share * 2**48
    held_out = [
        side[keys[0]] if keys else _drawn_side(tools, side, share, rng)
        for keys, tools in zip(links, records, strict=True)
    ]
    linked_held_out = sum(members[root] for root in chosen)
    return Split(held_out, side, sorted(sizes, reverse=True), linked, linked_held_out)


def trimmed(record: Record, tools: dict[str, bool], held_out: bool) -> Record:
    """The record without the tools of the other side; the same object where nothing goes.

    Args:
        record: of the side `held_out`.
        tools: `Split.tools`.
        held_out: the record's side.
    """
    kept = [tool for tool in record["tools"] if tools[tool_key(tool["function"]["name"])] == held_out]
    return record if len(kept) == len(record["tools"]) else {**record, "tools": kept}


def closest_subset(sizes: Sequence[int], target: int, rng: random.Random) -> list[int]:
    """Choose items whose sizes add up as closely to the target as any choice can; the smaller sum of two equally close.

    Args:
        sizes: positive.
        target: at least 0.
        rng: draws which of the items of one size, and which of the closest choices.

    Returns:
        Places of the chosen items.
    """
    groups: dict[int, list[int]] = defaultdict(list)
    for place, size in enumerate(sizes):
        groups[size].append(place)
    # Powers of two of equal items: any number of them can be put together, and there are few such bundles.
    bundles: list[tuple[int, int]] = []
    for size, places in groups.items():
        rng.shuffle(places)
        left, count = min(len(places), 2 * target // size), 1
        while left:
            bundles.append((size, min(count, left)))
            left -= min(count, left)
            count *= 2
    rng.shuffle(bundles)
    # Bit s of an integer: sum s can be reached. The empty choice is closer than any sum above twice the target.
    mask = (1 << (2 * target + 1)) - 1
    reached = [1]
    for size, count in bundles:
        reached.append((reached[-1] | reached[-1] << size * count) & mask)
    sums = [total for total, bit in enumerate(reversed(f"{reached[-1]:b}")) if bit == "1"]
    left = min(sums, key=lambda total: (abs(total - target), total))
    chosen: list[int] = []
    for (size, count), before in zip(reversed(bundles), reversed(reached[:-1]), strict=True):
        if not before >> left & 1:
            left -= size * count
            chosen += [groups[size].pop() for _ in range(count)]
    return sorted(chosen)


def _components(links: Iterable[Sequence[str]]) -> dict[str, str]:
    """Union-find: each tool's parent, after all tools of each record are joined."""
    parents: dict[str, str] = {}
    for keys in links:
        for key in keys:
            parents.setdefault(key, key)
            parents[_root(parents, key)] = _root(parents, keys[0])
    return parents


def _root(parents: dict[str, str], key: str) -> str:
    while parents[key] != key:
        parents[key] = parents[parents[key]]
        key = parents[key]
    return key


def _drawn_side(tools: RecordTools, side: dict[str, bool], share: float, rng: random.Random) -> bool:
    """Side of a record without links: drawn, but so that it keeps a tool if it shows any."""
    sides = {side[key] for key in tools.shown}
    drawn = rng.random() < share
    return drawn if drawn in sides else True in sides


# ---- Commands


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Returns:
        Exit status: 0; 1 where `--fail-above` is exceeded; 2 where files or options are wrong.
    """
    typed = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(typed)
    options.command = shlex.join(["python", "-m", "training.audit", *typed])
    try:
        status: int = options.run(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.audit", description=__doc__)
    commands = parser.add_subparsers(required=True)
    style = argparse.ArgumentDefaultsHelpFormatter
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--train", type=Path, nargs="+", default=DEFAULT_TRAIN, help="record files or folders of them")
    common.add_argument(
        "--on-error", choices=["refuse", "skip"], default="refuse", help="for lines that are no records"
    )
    one = commands.add_parser("overlap", parents=[common], formatter_class=style, help="what training files share")
    one.add_argument("--evaluation", type=Path, nargs="+", default=DEFAULT_EVALUATION, help="record files or folders")
    one.add_argument("--ngram", type=int, default=RequestIndex.ngram, help="words of an n-gram")
    one.add_argument("--threshold", type=float, default=RequestIndex.threshold, help="share of a request's n-grams")
    one.add_argument("--min-words", type=int, default=RequestIndex.min_words, help="shorter requests count apart")
    one.add_argument("--examples", type=int, default=3, help="worst pairs to show for two files")
    one.add_argument("--out", type=Path, default=DEFAULT_OUT, help="JSON file for all counts")
    one.add_argument("--drop", type=Path, help="JSONL file for the training records to leave out: file, line, id, why")
    one.add_argument(
        "--drop-tools",
        choices=["called", "none"],
        default="called",
        help="besides records that repeat a request, leave out those with a tool that an evaluation set calls, or none",
    )
    one.add_argument("--fail-above", type=int, help="exit status 1 where more training records are to be left out")
    one.set_defaults(run=_run_overlap)
    two = commands.add_parser("split", parents=[common], formatter_class=style, help="hold out tools")
    two.add_argument("--share", type=float, default=0.1, help="part of the records to hold out")
    two.add_argument("--seed", type=int, default=0, help="of the choice")
    two.add_argument("--by", choices=["shown", "called"], default="shown", help="tools that keep records together")
    two.add_argument("--out", type=Path, help="new folder for train/, text/, dev/dev.jsonl.gz and split.json")
    two.set_defaults(run=_run_split)
    return parser


def _run_overlap(options: argparse.Namespace) -> int:
    index = RequestIndex(options.ngram, options.threshold, options.min_words)
    train = record_files(options.train, options.on_error == "skip")
    result = overlap(train, record_files(options.evaluation, options.on_error == "skip"), index, options.examples)
    if options.drop_tools == "none":
        result.drop = [found for found in result.drop if found.why != "tool"]
    print("\n".join(overlap_table(result)))
    settings = {"ngram": index.ngram, "threshold": index.threshold, "min_words": index.min_words}
    report = {
        "command": options.command,
        "versions": {"python": platform.python_version()},
        "settings": {**settings, "drop_tools": options.drop_tools},
        **_overlap_report(result),
    }
    _write(options.out, json.dumps(report, indent=1) + "\n")
    if options.drop:
        _write(options.drop, "".join(json.dumps(found._asdict()) + "\n" for found in result.drop))
    return int(options.fail_above is not None and len(result.drop) > options.fail_above)


def _overlap_report(result: Overlap) -> dict[str, Any]:
    """All counts, ready for JSON: totals, each training and each evaluation file, and what is not 0 for two files."""
    training = list(dict.fromkeys(one for one, _ in result.cells if one != ALL))
    evaluation = list(dict.fromkeys(two for _, two in result.cells if two != ALL))
    reasons: dict[str, Counter[str]] = {label: Counter() for label in training}
    for found in result.drop:
        reasons[found.file][found.why] += 1

    def counts(cell: Cell) -> dict[str, int]:
        return {name: getattr(cell, name) for name in _COLUMNS}

    def drop(labels: Iterable[str]) -> dict[str, int]:
        return {why: sum(reasons[label][why] for label in labels) for why in ("request", "tool")}

    return {
        "totals": {
            "training_records": sum(result.records[label] for label in training),
            "evaluation_records": sum(result.records[label] for label in evaluation),
            **counts(result.cells[ALL, ALL]),
            "shared_tools": len(result.shared_tools[ALL]),
            "drop": drop(training),
        },
        "training": {
            label: {
                "records": result.records[label],
                "skipped": result.skipped[label],
                **counts(result.cells[label, ALL]),
                "drop": drop([label]),
            }
            for label in training
        },
        "evaluation": {
            label: {
                "records": result.records[label],
                "skipped": result.skipped[label],
                **counts(result.cells[ALL, label]),
                "shared_tools": result.shared_tools[label],
            }
            for label in evaluation
        },
        "pairs": [
            {"training_file": one, "evaluation_file": two, **{name: n for name, n in asdict(cell).items() if n}}
            for (one, two), cell in result.cells.items()
            if ALL not in (one, two) and cell != Cell()
        ],
    }


def overlap_table(result: Overlap) -> list[str]:
    """The lines that `overlap` prints: a row for two files that share anything, the worst pairs, the sums."""
    lines = [f"{'training file':28}{'evaluation file':30}" + "".join(f"{name:>11}" for name in _COLUMNS)]
    for (one, two), cell in result.cells.items():
        if cell != Cell():
            lines.append(f"{one:28}{two:30}" + "".join(f"{getattr(cell, name):11}" for name in _COLUMNS))
    for (one, two), cell in result.cells.items():
        for share, ours, theirs in cell.worst:
            lines.append(f"{share:.2f} of {two} {json.dumps(theirs)} in {one} {json.dumps(ours)}")
    for label, count in result.skipped.items():
        if count:
            lines.append(f"{label}: {count} corrupt lines skipped")
    trained = {one for one, _ in result.cells}
    total = sum(count for label, count in result.records.items() if label in trained)
    held = sum(count for label, count in result.records.items() if label not in trained)
    cell = result.cells[ALL, ALL]
    return [
        *lines,
        f"{cell.exact + cell.near} of {total} training records repeat a request of {held} evaluation records",
        f"{cell.shows} show a tool that an evaluation record calls, {cell.calls} call one, {cell.twins} show one with "
        "the same parameters",
        f"{len(result.drop)} training records are to be left out",
    ]


def _run_split(options: argparse.Namespace) -> int:
    files = record_files(options.train, options.on_error == "skip")
    _check_labels(files)
    targets = _targets(files, options.out) if options.out else []
    tools: list[RecordTools] = []
    counts: dict[str, int] = {}
    names: set[str] = set()
    for file in tqdm(files, desc="files", unit="file", disable=None):
        before = len(tools)
        for _, record in file.records():
            tools.append(record_tools(record))
            names.update(shown_names(record), called_names(record))
        counts[file.label] = len(tools) - before
    result = split(tools, options.share, options.seed, options.by)
    report = _split_report(result, tools, counts, names)
    print("\n".join(split_table(report)))
    if options.by == "shown" and not report["linked_held_out"] and round(options.share * result.linked):
        print("nothing could be held out: the components are too large; --by called links fewer records")
    for file in files:
        if file.skipped:
            print(f"{file.label}: {file.skipped} corrupt lines skipped")
    if options.out:
        _write_split(files, targets, options.out, result, options.by == "called")
        settings = {"share": options.share, "seed": options.seed, "by": options.by}
        _write(options.out / "split.json", json.dumps({**settings, **report}, indent=1) + "\n")
    return 0


def _split_report(
    result: Split, tools: Sequence[RecordTools], counts: dict[str, int], names: Iterable[str]
) -> dict[str, Any]:
    """Counts of both sides, ready for JSON; the first of each pair is training, the second held out."""
    files: dict[str, list[int]] = {}
    sides = iter(result.held_out)
    for label, count in counts.items():
        held = sum(next(sides) for _ in range(count))
        files[label] = [count - held, held]
    calls, others, away = [0, 0], [0, 0], [0, 0]
    for record, held_out in zip(tools, result.held_out, strict=True):
        calls[held_out] += bool(record.called)
        others[held_out] += len(record.shown)
        away[held_out] += sum(result.tools[key] != held_out for key in record.shown)
    held_names = sorted(name for name in names if result.tools[tool_key(name)])
    return {
        "components": len(result.components),
        "largest": result.components[:10],
        "linked": result.linked,
        "linked_held_out": result.linked_held_out,
        "records": [len(tools) - sum(result.held_out), sum(result.held_out)],
        "records_with_calls": calls,
        "tools": [sum(not held_out for held_out in result.tools.values()), sum(result.tools.values())],
        "uncalled_tools_shown": others,
        "uncalled_tools_taken_out": away,
        "files": files,
        "held_out_names": held_names,
    }


def split_table(report: dict[str, Any]) -> list[str]:
    """The lines that `split` prints: components, both sides, and each file's records on them."""
    largest = ", ".join(map(str, report["largest"]))
    lines = [
        f"{report['components']} components over {report['linked']} records; largest: {largest or 'none'}",
        f"held out of these: {report['linked_held_out']}",
        f"{'':34}{'training':>10}{'held out':>10}",
    ]
    for name in ("records", "records_with_calls", "tools", "uncalled_tools_shown", "uncalled_tools_taken_out"):
        lines.append(f"{name.replace('_', ' '):34}{report[name][0]:10}{report[name][1]:10}")
    lines += [f"  {label:32}{ours:10}{theirs:10}" for label, (ours, theirs) in report["files"].items()]
    held = report["held_out_names"]
    lines.append(f"held out: {', '.join(map(json.dumps, held[:20])) or 'nothing'}{' ...' if len(held) > 20 else ''}")
    return lines


def _targets(files: Sequence[RecordFile], out: Path) -> list[Path]:
    """Where each file's training records go: `text/` stays `text/`, all else is `train/`."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder; name a new one, nothing is written over")
    paths = []
    for file in files:
        folder, name = file.label.rsplit("/", 1)
        paths.append(out / ("text" if folder == "text" else "train") / f"{name}.jsonl.gz")
        if paths[-1] in paths[:-1]:
            raise RecordError(f"{file.path}: another file would be written to {paths[-1]} too; rename one")
    return paths


def _write_split(files: Sequence[RecordFile], targets: Sequence[Path], out: Path, result: Split, trim: bool) -> None:
    """Read the files again and write each record to its side."""
    sides = iter(result.held_out)
    with ExitStack() as stack:
        held = stack.enter_context(_create(out / "dev" / "dev.jsonl.gz"))
        for file, target in zip(tqdm(files, desc="writing", unit="file", disable=None), targets, strict=True):
            with _create(target) as kept:
                for _, record in file.records():
                    side = next(sides)
                    record = trimmed(record, result.tools, side) if trim else record
                    (held if side else kept).write(json.dumps(record).encode() + b"\n")


def _create(path: Path) -> gzip.GzipFile:
    path.parent.mkdir(parents=True, exist_ok=True)
    # No time inside: the same records make the same bytes.
    return gzip.GzipFile(path, "wb", mtime=0)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
