"""Training and evaluation rows out of the record files: which records, which prompt, which reply.

Takes record files; gives token rows in this model's chat template. Records of the evaluation sets, and the maths
problems that are held out, never become training rows. No torch, no model.
"""

import hashlib
import json
import logging
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from repo_package import ROOT, load_repo_module

from .augmentation import Augmentation, Renaming, augment, shorten, without_called_tools
from .records import (
    SUFFIXES,
    OnError,
    Record,
    RecordError,
    RecordFile,
    StoredRecord,
    as_record,
    bare_call,
    encoded_columns,
    is_simple,
    load_file,
    normal_text,
    read_records,
    text_key,
    tool_key,
    write_records,
)

__all__ = [
    "DEFAULT_DATA",
    "EVALUATION_STYLE",
    "SOURCE_WEIGHTS",
    "Augmentation",
    "PromptStyle",
    "Record",
    "Row",
    "RowStream",
    "SingleCall",
    "build_row",
    "dev_records",
    "evaluation_rows",
    "held_out_problems",
    "held_out_records",
    "is_simple",
    "read_records",
    "shorten",
    "single_call",
    "tokenizer_texts",
    "write_records",
]

logger = logging.getLogger(__name__)
tokenization = load_repo_module("tokenization_utils")

DEFAULT_DATA = ROOT.parent / "shared" / "data"
"""Where the record files are looked for; they lie beside the repository, never in it."""

SOURCE_WEIGHTS = {
    "train/snips": 14.0,
    "train/hwu64": 12.0,
    "train/home_assistant": 3.0,
    "train/restaurants8k": 5.0,
    "train/ste": 2.0,
    "train/gpteacher_toolformer": 6.0,
    "train/sgd": 8.0,
    "train/star": 3.0,
    "train/taskmaster4": 4.0,
    "train/clinc150": 4.0,
    "train/metatool": 5.0,
    "train/compositions": 5.0,
    "train/seal_tools_dev": 0.5,
    "train/glaive_demo": 1.0,
    "train/toolrl_sft": 0.5,
    "train/synthetic_templates": 22.0,
    "train/synthetic_calls": 12.0,
    "train/toolace": 8.0,
    "train/xlam": 20.0,
    "train/glaive": 10.0,
    "train/hermes": 3.0,
    "train/irrelevance_removed": 9.0,
    "train/nocall_misc": 4.0,
    "text/chatterbot_corpus": 2.0,
    "text/self_instruct_seed": 0.5,
    "text/synthetic_persona_chat": 3.0,
    "text/gsm8k_train": 1.5,
}
"""How often each file is drawn, where it exists. Natural requests count far more per record than the many template-made
ones; a file that is not named here weighs `OTHER_WEIGHT`."""

OTHER_WEIGHT = 1.0
MAX_MISSES = 1000
"""Records in a row that do not fit a style before a draw is given up."""
TALK_SOURCES = ("train/irrelevance_removed", "train/nocall_misc")
"""Files of `train/` whose records want no call, as all of `text/` do."""

HELD_OUT_SOURCES = ("snips", "hwu64", "home_assistant", "restaurants8k", "ste", "gpteacher_toolformer", "taskmaster4")
"""Natural call files out of which the seen-tools evaluation set is chosen."""
PROBLEMS = "text/gsm8k_train"
"""The file of maths problems of which some are held out."""

REFUSALS = (
    "I have no tool for that, sorry.",
    "Sorry, none of my tools can do that.",
    "I can't do that with the tools I have.",
    "That is beyond my tools, I am afraid.",
    "None of the available tools fits this request.",
    "Sorry, I can't help with that here.",
    "I don't have a tool that does this.",
    "My tools don't cover that, sorry.",
    "I am not able to do that with these tools.",
    "No tool here can do that. Can I help with something else?",
    "That is not something my tools can do.",
    "Sorry, there is no suitable tool for this.",
)
SMALL_TALK = (
    "I am here to help. What can I do for you?",
    "Sure. Tell me what you need.",
    "I am an assistant that can talk and call tools.",
    "Thanks for telling me. How can I help?",
    "Could you tell me a little more?",
    "I am not sure about that one.",
)


@dataclass(frozen=True)
class PromptStyle:
    """How much of the tools a prompt shows.

    Args:
        max_tools: most tools in one prompt; the tools a call needs are always kept.
        description_chars: descriptions are cut to this many characters; 0 leaves them out.
        max_prompt_tokens: a prompt over this loses tools that are not needed, then the oldest exchanges of the
            conversation; if that is not enough, the record is skipped.
        max_target_tokens: a record with a longer reply is skipped.
    """

    max_tools: int = 3
    description_chars: int = 40
    max_prompt_tokens: int = 320
    max_target_tokens: int = 128


EVALUATION_STYLE = PromptStyle()
"""The prompts of both evaluation sets."""


@dataclass(frozen=True)
class Row:
    """One prompt and its reply in tokens.

    Args:
        id: the record's id.
        source: the file the record comes from, such as `train/snips`.
        prompt_ids: tokens up to and including the generation prompt.
        target_ids: tokens of the reply with `<|im_end|>`.
        tools: the tools the prompt shows, OpenAI style.
        calls: expected calls, `{"name", "arguments"}`; empty for text replies.
        messages: the conversation of the prompt.
        follow_ups: further turns on the same tools, (tokens from the end of the last reply to the generation prompt,
            reply tokens).
    """

    id: str
    source: str
    prompt_ids: list[int]
    target_ids: list[int]
    tools: list[Record]
    calls: list[Record]
    messages: list[Record]
    follow_ups: list[tuple[list[int], list[int]]] = field(default_factory=list)

    def spans(self) -> list[tuple[list[int], list[int]]]:
        """(context tokens, reply tokens) of all turns in order; joined they are the row's sequence."""
        return [(self.prompt_ids, self.target_ids), *self.follow_ups]

    def __len__(self) -> int:
        return sum(len(context) + len(reply) for context, reply in self.spans())


@dataclass(frozen=True)
class SingleCall:
    """What the head trains on: one prompt, the called tool's schema and the gold arguments.

    Args:
        prompt_ids: tokens up to and including the generation prompt.
        schema: `parameters` of the called tool as the prompt shows it.
        name: the tool's name.
        arguments: gold arguments.
    """

    prompt_ids: list[int]
    schema: Record
    name: str
    arguments: Record


def held_out_records(data: Path, count: int = 200) -> list[Record]:
    """The evaluation set of seen tools and unseen requests: one turn, one call with arguments, chosen by a hash of
    the id.

    Args:
        data: folder with `train/`. Lines that are no records are left out here; it is `RowStream` that refuses them.
        count: how many.

    Returns:
        The records, in the order of their hashes.
    """
    paths = [path for source in HELD_OUT_SOURCES for path in _paths(data, f"train/{source}")]
    candidates: list[tuple[str, Any, int]] = []
    for dataset in (load_file(path, "skip").dataset for path in paths):
        columns = encoded_columns(dataset)
        rows = zip(columns["id"].to_pylist(), columns["tool_key"].to_pylist(), strict=True)
        candidates += [(_digest(name), dataset, index) for index, (name, key) in enumerate(rows) if key is not None]
    found: list[Record] = []
    for _, dataset, index in sorted(candidates, key=lambda candidate: candidate[0]):
        record = as_record(dataset[index])
        if len(found) < count and record["calls"][0]["arguments"]:
            found.append(record)
        if len(found) == count:
            break
    return found


def held_out_problems(data: Path, count: int = 300) -> list[Record]:
    """The maths problems that are kept out of training, chosen by a hash of the id.

    Args:
        data: folder with `text/`; one without maths problems has none to hold out.
        count: how many.

    Returns:
        The records, in the order of their hashes.
    """
    candidates: list[tuple[str, Any, int]] = []
    for dataset in (load_file(path, "skip").dataset for path in _paths(data, PROBLEMS)):
        names = encoded_columns(dataset)["id"].to_pylist()
        candidates += [(_digest(name), dataset, index) for index, name in enumerate(names)]
    candidates.sort(key=lambda candidate: candidate[0])
    return [as_record(dataset[index]) for _, dataset, index in candidates[:count]]


def held_out_requests(data: Path | Sequence[Path]) -> list[str]:
    """What the users say in the evaluation sets and held-out problems of all folders: whichever of them a model is
    measured on, training must not have seen it."""
    return [
        record["messages"][-1]["content"]
        for folder in folders_of(data)
        for record in (*held_out_records(folder), *held_out_problems(folder))
    ]


def dev_records(data: Path) -> list[Record]:
    """The evaluation set of unseen tools, whole; see `is_simple` for its single calls in one turn.

    Raises:
        RecordError: there is none.
    """
    paths = _paths(data, "dev/dev")
    if not paths:
        raise RecordError(
            f"{data / 'dev' / 'dev.jsonl'} is missing (or .jsonl.gz): requests to evaluate on, whose tools are not "
            "in train/. Put some records there, or train without evaluation: --eval_rows 0."
        )
    return [as_record(row) for path in paths for row in load_file(path).dataset]


def folders_of(data: Path | Sequence[Path]) -> list[Path]:
    """One data folder or several, as a list."""
    return [data] if isinstance(data, Path) else list(data)


def source_files(data: Path | Sequence[Path]) -> dict[str, list[Path]]:
    """The record files in `train/` and `text/` of the folders, by label such as `train/snips`.

    Raises:
        RecordError: there are none.
    """
    found: dict[str, list[Path]] = {}
    for folder in folders_of(data):
        for path in sorted((*folder.glob("train/*"), *folder.glob("text/*"))):
            if path.name.endswith(SUFFIXES):
                found.setdefault(RecordFile(path).label, []).append(path)
    if not found:
        where = ", ".join(map(str, folders_of(data))) or "no folder"
        raise RecordError(f"{where}: the mixture is empty; train/ or text/ with .jsonl or .jsonl.gz files are needed")
    return found


def _paths(folder: Path, label: str) -> list[Path]:
    return [path for end in SUFFIXES if (path := folder / f"{label}{end}").exists()]


def evaluation_rows(
    records: list[Record], tokenizer: PreTrainedTokenizerFast, style: PromptStyle = EVALUATION_STYLE
) -> list[Row]:
    """Rows of an evaluation set: the same on every call.

    Args:
        records: of `held_out_records` or `dev_records`.
        tokenizer: the model's tokenizer.
        style: how the prompts look.

    Returns:
        One row per record that fits the style.
    """
    rows = (build_row(record, tokenizer, style, random.Random(_digest(record["id"]))) for record in records)
    return [row for row in rows if row is not None]


def build_row(
    record: Record, tokenizer: PreTrainedTokenizerFast, style: PromptStyle, rng: random.Random, source: str = ""
) -> Row | None:
    """Turn a record into a row.

    Args:
        record: one record.
        tokenizer: the model's tokenizer.
        style: how much of the tools the prompt shows.
        rng: draws number and order of the tools and, in conversations without calls, the turn to learn.
        source: the file the record comes from.

    Returns:
        The row, or None where prompt or reply is over the style's limits.
    """
    record = in_schema_order(record)
    messages, reply = _split_reply(record, rng)
    calls = record["calls"]
    target_ids = _target_ids(tokenizer, calls, reply, record.get("think"))
    if len(target_ids) > style.max_target_tokens:
        return None
    needed = {call["name"] for call in calls}
    tools = _choose_tools(record["tools"], needed | _called_earlier(messages), style, rng)
    while True:
        prompt_ids = tokenizer.apply_chat_template(
            messages,
            tools=tools or None,
            add_generation_prompt=True,
            enable_thinking=bool(record.get("think")),
            return_dict=False,
        )
        if len(prompt_ids) <= style.max_prompt_tokens:
            return Row(record["id"], source or record["source"], prompt_ids, target_ids, tools, calls, messages)
        smaller = _trimmed(messages, tools, needed)
        if smaller is None:
            return None
        messages, tools = smaller


def _trimmed(messages: list[Record], tools: list[Record], needed: set[str]) -> tuple[list[Record], list[Record]] | None:
    """One tool less that nothing in the prompt calls, or else one exchange less; None where neither can go.

    An exchange is a user's turn with all that follows it up to the next one, so calls go with their results. The system
    message and the last exchange stay, and where tools are shown, one stays.
    """
    spare = [tool for tool in tools if tool["function"]["name"] not in needed | _called_earlier(messages)]
    if spare and len(tools) > 1:
        return messages, [tool for tool in tools if tool is not spare[-1]]
    users = [index for index, message in enumerate(messages) if message["role"] == "user"]
    if len(users) < 2:
        return None
    opening = messages[:1] if messages[0]["role"] == "system" else []
    return opening + messages[users[1] :], tools


def _called_earlier(messages: Sequence[Record]) -> set[str]:
    return {bare_call(call)["name"] for message in messages for call in message.get("tool_calls") or ()}


def single_call(row: Row) -> SingleCall | None:
    """The row as a training example of the head, or None where it is not exactly one call with arguments."""
    if len(row.calls) != 1 or not row.calls[0]["arguments"]:
        return None
    call = row.calls[0]
    schema = next(tool["function"]["parameters"] for tool in row.tools if tool["function"]["name"] == call["name"])
    return SingleCall(row.prompt_ids, schema, call["name"], call["arguments"])


def any_record(record: Mapping[str, Any]) -> bool:
    """Keep every record."""
    return True


@dataclass
class RowStream:
    """Training rows, drawn by source weight and built on the fly.

    The records stay in memory-mapped Arrow files, which all processes of a machine share.

    Args:
        data: folders with `train/` and `text/`.
        tokenizer: the model's tokenizer.
        max_messages: longer conversations are left out (they cost many tokens for one decision).
        follow_ups: most further turns of one row: requests for the same tools, which share the cost of reading them.
        keep: further filter on records, such as `is_simple`; negatives pass it too.
        weights: label of a file -> how often it is drawn; each must exist. None takes every file there is, with its
            weight in `SOURCE_WEIGHTS`.
        talk_weight: multiplies the weights of the files whose records want no call.
        augmentation: how often tools are renamed, reordered and described less.
        negative_share: part of the drawn calls whose tools are taken away, as far as others are left.
        beside_tools_share: part of the drawn talk without tools that is shown beside tools of another record, so that
            having tools is no reason to call.
        leave_out: JSONL file of records to leave out (`file`, `line`, `id`), as `python -m training.audit overlap
            --drop` writes it.
        on_error: what to do with lines that are no records: `"refuse"` or `"skip"` (they are counted).
        skipped: how many records were left out, by reason.

    Raises:
        RecordError: a file is missing or wrong, or nothing is left to draw.
        ValueError: a share or a weight is out of its range.
    """

    data: Sequence[Path] | Path
    tokenizer: PreTrainedTokenizerFast
    max_messages: int = 3
    follow_ups: int = 0
    keep: Callable[[Mapping[str, Any]], bool] = any_record
    weights: Mapping[str, float] | None = None
    talk_weight: float = 1.0
    augmentation: Augmentation = field(default_factory=Augmentation)
    negative_share: float = 0.04
    beside_tools_share: float = 0.4
    leave_out: Path | None = None
    on_error: OnError = "refuse"
    skipped: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        for name in ("negative_share", "beside_tools_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share: give a number from 0 to 1, not {getattr(self, name)}.")
        files = source_files(self.data)
        weights = self._weights(files)
        held_out = set(map(normal_text, held_out_requests(self.data)))
        dropped = _dropped(self.leave_out)
        parts: list[Any] = []
        pools: dict[str, list[NDArray[np.int64]]] = defaultdict(list)
        requests: dict[str, list[int]] = defaultdict(list)
        start = 0
        for label, weight in weights.items():
            for path in files[label] if weight else ():
                loaded = load_file(path, self.on_error)
                self.skipped["corrupt"] += len(loaded.faults)
                trained = self._trained(loaded.dataset, label, held_out, dropped[label])
                if self.follow_ups:
                    keys = encoded_columns(loaded.dataset)["tool_key"].to_pylist()
                    for index in trained:
                        if keys[index] is not None:
                            requests[keys[index]].append(start + int(index))
                pools[label].append(start + self._kept(loaded.dataset, trained))
                parts.append(loaded.dataset)
                start += len(loaded.dataset)
        self._check_dropped(sum(len(dropped[label]) for label in pools))
        self.pools = {label: pool for label, found in pools.items() if len(pool := np.concatenate(found))}
        if not self.pools:
            why = ", ".join(f"{count} {reason}" for reason, count in self.skipped.items() if count)
            raise RecordError(f"the mixture of {', '.join(weights)} is empty; left out: {why or 'nothing'}")
        self.shares = [weights[label] for label in self.pools]
        self.dataset = datasets.concatenate_datasets(parts)
        # Hash of a called function -> rows that are one turn and one call of it.
        self.requests = {key: np.array(found) for key, found in requests.items()}
        logger.info("records to draw: %s", {label: len(pool) for label, pool in self.pools.items()})

    def _weights(self, files: Mapping[str, list[Path]]) -> dict[str, float]:
        chosen = {label: SOURCE_WEIGHTS.get(label, OTHER_WEIGHT) for label in files}
        if self.weights is not None:
            chosen = dict(self.weights)
        missing = sorted(chosen.keys() - files.keys())
        if missing:
            where = ", ".join(map(str, folders_of(self.data)))
            raise RecordError(f"{where}: no file for {', '.join(missing)}; there are {', '.join(sorted(files))}")
        wrong = {label: weight for label, weight in chosen.items() if not 0 <= weight < float("inf")}
        if wrong or self.talk_weight < 0:
            raise ValueError(f"weights must be 0 or more: {wrong or {'talk_weight': self.talk_weight}}.")
        return {
            label: weight * (self.talk_weight if label.startswith("text/") or label in TALK_SOURCES else 1.0)
            for label, weight in chosen.items()
        }

    def _trained(self, dataset: Any, label: str, held_out: set[str], dropped: Mapping[int, str]) -> NDArray[np.int64]:
        """Rows of one file that may train: none that shows a held-out request, is too long or is to be left out."""
        columns = encoded_columns(dataset)
        texts = columns["text_keys"].combine_chunks()
        turns = np.diff(texts.offsets.to_numpy())
        hits = np.isin(texts.flatten().to_numpy(), [text_key(text) for text in held_out])
        shown = np.bincount(np.repeat(np.arange(len(turns)), turns), weights=hits, minlength=len(turns)) > 0
        if label == "train/compositions":  # their messages are requests of other files joined
            for index, messages in enumerate(columns["messages"].to_pylist()):
                said = [normal_text(message.get("content") or "") for message in json.loads(messages)]
                shown[index] |= any(request in text for text in said for request in held_out)
        left_out = np.zeros_like(shown)
        if dropped:
            rows = zip(columns["line"].to_pylist(), columns["id"].to_pylist(), strict=True)
            left_out[:] = [dropped.get(line) == name for line, name in rows]
        long = (turns > self.max_messages) & label.startswith("train/")
        for reason, found in (("held out", shown), ("left out as asked", left_out), ("too many messages", long)):
            self.skipped[reason] += int(found.sum())
        rows_left: NDArray[np.int64] = np.flatnonzero(~(shown | left_out | long))
        return rows_left

    def _check_dropped(self, asked: int) -> None:
        found = self.skipped["left out as asked"]
        if found < asked:
            advice = "the record files have changed: run the audit again"
            raise RecordError(f"{self.leave_out}: {asked - found} of {asked} records are not where it says; {advice}")

    def _kept(self, dataset: Any, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        if self.keep is any_record:
            return rows
        columns = encoded_columns(dataset)
        if self.keep is is_simple:  # known without decoding anything
            return rows[columns["tool_key"].is_valid().to_numpy()[rows]]
        return np.array([index for index in rows if self.keep(StoredRecord(columns, int(index)))], dtype=np.int64)

    def draw(self, style: PromptStyle, rng: random.Random) -> Row:
        """Draw a row; records that do not fit the style are counted in `skipped` and drawn past.

        Args:
            style: how the prompt looks.
            rng: alone decides what is drawn: the same state gives the same row, in any process.

        Raises:
            RecordError: of `MAX_MISSES` records none fits the style.
        """
        labels = list(self.pools)
        for _ in range(MAX_MISSES):
            label = rng.choices(labels, self.shares)[0]
            record = self._drawn(int(rng.choice(self.pools[label])))
            if rng.random() < self.negative_share:
                negative = without_called_tools(record)
                record = negative if negative is not None and self.keep(negative) else record
            if label.startswith("text/") and rng.random() < self.beside_tools_share:
                record = self._beside_tools(record, rng)
            shown, renaming = augment(record, self.augmentation, rng, described=style.description_chars >= 20)
            row = build_row(shown, self.tokenizer, style, rng, label)
            if row is not None:
                return self._with_follow_ups(row, record, renaming, rng) if self.follow_ups else row
            self.skipped["too long"] += 1
        raise RecordError(f"of {MAX_MISSES} records none fits {style}: allow more tokens, or other sources")

    def _drawn(self, index: int) -> Record:
        return as_record(self.dataset[index])

    def _beside_tools(self, record: Record, rng: random.Random) -> Record:
        """Talk with tools of another record beside it; reasoning keeps to itself, as does talk where there are none."""
        others = [label for label in self.pools if not label.startswith("text/")]
        if record.get("think") or record["tools"] or not others:
            return record
        tools = self._drawn(int(rng.choice(self.pools[rng.choice(others)])))["tools"]
        beside = {**record, "id": f"{record['id']}-beside-tools", "tools": tools}
        return beside if tools and self.keep(beside) else record

    def _with_follow_ups(self, row: Row, record: Record, renaming: Renaming, rng: random.Random) -> Row:
        """Append requests for the row's tools, as if the user went on; the texts of earlier turns stay in context.

        Args:
            row: the row.
            record: what it was made of, in its own names.
            renaming: what became of the names.
            rng: draws the requests.
        """
        if record.get("think"):
            return row
        shown = {tool["function"]["name"]: tool["function"] for tool in row.tools}
        keys = [
            tool_key(tool["function"]) for tool in record["tools"] if renaming.name(tool["function"]["name"]) in shown
        ]
        pools = [self.requests[key] for key in keys if len(self.requests.get(key, ())) > 1]
        for _ in range(rng.randint(0, self.follow_ups) if pools else 0):
            request = self._drawn(int(rng.choice(rng.choice(pools))))
            call, text = renaming.call(request["calls"][0]), request["messages"][0]["content"]
            call["arguments"] = _ordered(call["arguments"], shown[call["name"]]["parameters"])
            target = _target_ids(self.tokenizer, [call], "", None)
            if text != record["messages"][-1].get("content") and len(target) <= 64:
                row.follow_ups.append((_next_turn_ids(self.tokenizer, text), target))
        return row


def _dropped(path: Path | None) -> defaultdict[str, dict[int, str]]:
    """Label -> line -> id of the records to leave out.

    Raises:
        RecordError: the file does not hold such a list.
    """
    found: defaultdict[str, dict[int, str]] = defaultdict(dict)
    lines = path.read_text(encoding="utf-8").splitlines() if path else []
    for number, text in enumerate(lines, start=1):
        try:
            entry = json.loads(text)
            found[entry["file"]][int(entry["line"])] = entry["id"]
        except (ValueError, KeyError, TypeError) as error:
            advice = "each line must hold `file`, `line` and `id`, as `python -m training.audit overlap --drop` writes"
            raise RecordError(f"{path}:{number}: not a record to leave out ({error!r}); {advice}") from None
    return found


def tokenizer_texts(data: Path | Sequence[Path], per_source: int = 3000, seed: int = 0) -> Iterator[str]:
    """Texts to train the tokenizer on: prompts with tools, requests, calls and chat, held-out requests excluded.

    Args:
        data: folders with `train/` and `text/`.
        per_source: most records per file.
        seed: of the draw.

    Yields:
        Plain texts.
    """
    # The literals of JSON are rare in requests but occur in any schema: often enough here, each becomes one token.
    yield "true false null " * 2000
    banned = set(map(text_key, held_out_requests(data)))
    rng = random.Random(seed)
    for path in (path for paths in source_files(data).values() for path in paths):
        dataset = load_file(path).dataset
        keys = encoded_columns(dataset)["text_keys"].to_pylist()
        free = [index for index, found in enumerate(keys) if banned.isdisjoint(found)]
        for index in rng.sample(free, min(per_source, len(free))):
            record = as_record(dataset[index])
            for message in record["messages"]:
                yield message.get("content") or ""
            for tool in rng.sample(record["tools"], min(2, len(record["tools"]))):
                yield json.dumps(tool["function"], ensure_ascii=False)
            for call in record["calls"]:
                yield "".join(tokenization.call_segments(call["name"], call["arguments"])[1:-1])
            yield record.get("answer") or ""
            yield record.get("think") or ""


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def in_schema_order(record: Record) -> Record:
    """The record with the arguments of all calls in the order of their schemas: the only one that decoding can write.

    Args:
        record: one record; it is not changed.
    """
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in record["tools"]}

    def ordered(call: Record) -> Record:
        if "function" in call:
            return {**call, "function": ordered(call["function"])}
        return {**call, "arguments": _ordered(call["arguments"], schemas.get(call["name"]))}

    messages = [
        {**message, "tool_calls": [ordered(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in record["messages"]
    ]
    return {**record, "messages": messages, "calls": [ordered(call) for call in record["calls"]]}


def _ordered(value: Any, schema: Any) -> Any:
    """A value with the keys of its objects as `properties` has them, further keys behind."""
    if isinstance(value, list) and isinstance(schema, dict):
        return [_ordered(item, schema.get("items")) for item in value]
    properties = schema.get("properties") if isinstance(schema, dict) else None
    if not isinstance(value, dict) or not isinstance(properties, dict):
        return value
    names = [*(name for name in properties if name in value), *(name for name in value if name not in properties)]
    return {name: _ordered(value[name], properties.get(name)) for name in names}


def _next_turn_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Tokens between two replies: the next user turn and the generation prompt, as the chat template writes them."""
    turn = (
        f"\n{tokenization.IM_START_TOKEN}user\n{tokenization.escape_content(text)}{tokenization.IM_END_TOKEN}\n"
        f"{tokenization.IM_START_TOKEN}assistant\n{tokenization.THINK_TOKEN}\n\n{tokenization.THINK_END_TOKEN}\n"
    )
    ids: list[int] = tokenizer(turn, add_special_tokens=False)["input_ids"]
    return ids


def _split_reply(record: Record, rng: random.Random) -> tuple[list[Record], str]:
    """The conversation to show and the text to answer with (unused where the record has calls)."""
    messages = record["messages"]
    if messages[-1]["role"] != "assistant":
        choices = REFUSALS if record["tools"] else SMALL_TALK
        return messages, record.get("answer") or choices[int(_digest(record["id"]), 16) % len(choices)]
    ends = [i for i, message in enumerate(messages) if message["role"] == "assistant" and message.get("content") and i]
    end = rng.choice(ends or [len(messages) - 1])
    opening = messages[:1] if messages[0]["role"] == "system" else []
    # A chat turn depends on little before it; a short window keeps it cheap. It starts with the user, so that no result
    # of a tool is shown without its call.
    users = [i for i in range(end) if messages[i]["role"] == "user"]
    start = next((i for i in users if i >= end - 3), users[-1] if users else len(opening))
    return opening + messages[start:end], messages[end].get("content") or ""


def _target_ids(tokenizer: PreTrainedTokenizerFast, calls: list[Record], reply: str, think: str | None) -> list[int]:
    """Tokens of the reply: reasoning if there is some, then calls or text, then the end token."""
    lead = (
        f"{tokenization.THINK_TOKEN}\n{tokenization.escape_content(think)}\n{tokenization.THINK_END_TOKEN}\n"
        if think
        else ""
    )
    ids: list[int] = tokenizer(lead, add_special_tokens=False)["input_ids"] if lead else []
    if calls:
        ids += tokenization.calls_token_ids(tokenizer, [(call["name"], call["arguments"]) for call in calls])
    else:
        ids += tokenizer(tokenization.escape_content(reply), add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id]


def _choose_tools(tools: list[Record], needed: set[str], style: PromptStyle, rng: random.Random) -> list[Record]:
    """Shortened tools in random order: the needed ones and a random number of others."""
    kept = [tool for tool in tools if tool["function"]["name"] in needed]
    others = [tool for tool in tools if tool["function"]["name"] not in needed]
    room = max(style.max_tools - len(kept), 0)
    least = 0 if kept else min(1, room)
    chosen = kept + rng.sample(others, min(rng.randint(least, max(room, least)), len(others)))
    rng.shuffle(chosen)
    return [{"type": "function", "function": shorten(tool["function"], style.description_chars)} for tool in chosen]
