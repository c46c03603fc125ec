"""Synthetic calls: the same wherever they are made, valid, complete in kinds, and said in the request."""

import gzip
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any, get_args

import pytest
from jsonschema import Draft202012Validator
from transformers import AutoTokenizer

from repo_package import ROOT, load_repo_module
from training import synthetic_calls
from training.data import DEFAULT_DATA, PromptStyle, Record, build_row, read_records
from training.synthetic_calls import (
    FIELDS,
    ITEMS,
    KINDS,
    NOUNS,
    PARAMETERS,
    VERBS,
    Names,
    check_record,
    example,
    generate,
)

scaffolds = load_repo_module("schema_scaffold")
layouts = load_repo_module("scaffold_layout")

COUNT = 500


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return list(generate(COUNT, seed=3))


def gold(records: list[Record]) -> Iterator[tuple[Record, Record, Record]]:
    """(record, tool, arguments) of every call."""
    for record in records:
        tools = {tool["function"]["name"]: tool for tool in record["tools"]}
        for call in record["calls"]:
            yield record, tools[call["name"]], call["arguments"]


# ---------------------------------------------------------------------------------------------------------------------
# What a request says: readers that know nothing of how it was made
# ---------------------------------------------------------------------------------------------------------------------

WORD_NUMBERS = {synthetic_calls.number_words(value): value for value in range(100)}
SHORT_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
WORDS = "|".join(sorted(WORD_NUMBERS, key=len, reverse=True))


def numbers_in(text: str) -> set[float]:
    """All numbers in digits and words, each with and without its sign."""
    found = set[float]()
    for sign, digits, million in re.findall(r"(-|minus )?(\d+(?:,\d{3})*(?:\.\d+)?)( million)?", text):
        size = round(float(digits.replace(",", "")) * (1_000_000 if million else 1), 6)
        found |= {size, -size} if sign else {size}
    for sign, word in re.findall(rf"(minus )?\b({WORDS})\b", text.lower()):
        found.add(WORD_NUMBERS[word] * (-1.0 if sign else 1.0))
    return found


def dates_in(text: str) -> set[str]:
    """All days, in ISO form."""
    found = {"-".join(parts) for parts in re.findall(r"(\d{4})[-/](\d\d)[-/](\d\d)", text)}
    months = "|".join(SHORT_MONTHS)
    named = re.findall(rf"\b(\d\d?)(?:st|nd|rd|th)?(?: of)? ({months})[a-z]* (\d{{4}})\b", text)
    named += [
        (day, month, year)
        for month, day, year in re.findall(rf"\b({months})[a-z]* (\d\d?)(?:st|nd|rd|th)?,? (\d{{4}})\b", text)
    ]
    for day, month, year in named:
        # A count may stand before a month that it does not belong to.
        with suppress(ValueError):
            found.add(date(int(year), SHORT_MONTHS.index(month) + 1, int(day)).isoformat())
    told = re.search(r"Today is (\S+)\.", text)
    if told is not None:
        today, rest = datetime.strptime(told[1], "%Y-%m-%d").date(), text.replace(told[0], "")
        found.discard(today.isoformat())
        found |= dates_in(rest)
        known = {"today": 0, "the day after tomorrow": 2, "tomorrow": 1, "yesterday": -1}
        found |= {
            (today + timedelta(days)).isoformat() for word, days in known.items() if re.search(rf"{word}\b", rest)
        }
        for days in re.findall(rf"(\d+|{WORDS}) days from today", rest):
            number = int(days) if days.isdigit() else WORD_NUMBERS[days]
            found.add((today + timedelta(number)).isoformat())
    return found


def times_in(text: str) -> set[str]:
    """All times of the day, as HH:MM."""
    found = {"12:00"} if "noon" in text else set()
    found |= {"00:00"} if "midnight" in text else set()
    for hour, minute, half in re.findall(r"\b(\d{1,2})(?::(\d\d))?(?::00Z)?(?: (am|pm)\b)?", text.replace("T", " ")):
        if half:
            found.add(f"{int(hour) % 12 + 12 * (half == 'pm'):02d}:{minute or '00'}")
        elif minute:
            found.add(f"{hour}:{minute}")
    for word, part in re.findall(r"half past (\w+) in the (morning|afternoon|evening)", text):
        found.add(f"{WORD_NUMBERS[word] % 12 + 12 * (part != 'morning'):02d}:30")
    return found


def durations_in(text: str) -> set[str]:
    """All durations in ISO 8601, combined where two follow each other."""
    number = rf"(\d+|{WORDS})"
    found = {"PT30M"} if "half an hour" in text else set()
    for value, unit in re.findall(rf"{number} (hour|minute|second|day|week)", text):
        amount = value if value.isdigit() else WORD_NUMBERS[value]
        found.add(
            {"hour": "PT{}H", "minute": "PT{}M", "second": "PT{}S", "day": "P{}D", "week": "P{}W"}[unit].format(amount)
        )
    for value, unit, minutes in re.findall(rf"{number} (hour|day)s and (\d+) minutes", text):
        amount = value if value.isdigit() else WORD_NUMBERS[value]
        found.add(f"PT{amount}H{minutes}M" if unit == "hour" else f"P{amount}DT{minutes}M")
    return found


def plain(text: str) -> str:
    """Lower case, words apart: `inProgress`, `IN_PROGRESS` and `in progress` are alike."""
    return re.sub(r"[\s_-]+", " ", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text)).lower()


def says(request: str, name: str, schema: Record, value: Any) -> bool:
    """Whether a request says a value of a schema."""
    if "anyOf" in schema:
        return any(
            Draft202012Validator(one, format_checker=Draft202012Validator.FORMAT_CHECKER).is_valid(value)
            and says(request, name, one, value)
            for one in schema["anyOf"]
        )
    if "const" in schema:
        return True  # nothing is to be chosen
    if value is None or value == []:
        return re.search(r"\bno\b|\bany\b|\bnone\b|\bempty\b", request) is not None
    if isinstance(value, bool):
        words = r"\b(on|yes|true|enabled|please)\b" if value else r"\b(off|no|false|disabled|without)\b"
        return re.search(words, request) is not None and plain(name) in plain(request)
    if isinstance(value, (int, float)):
        return value in numbers_in(request)
    if isinstance(value, list):
        inner = schema.get("prefixItems") or [schema["items"]] * len(value)
        return all(says(request, name, one, item) for one, item in zip(inner, value, strict=True))
    if isinstance(value, dict):
        known, other = schema.get("properties", {}), schema.get("additionalProperties", {})
        return all(
            (key in known or key in request) and says(request, key, known.get(key, other), item)
            for key, item in value.items()
        )
    return says_string(request, schema, value)


def says_string(request: str, schema: Record, value: str) -> bool:
    """Whether a request says a string, by the reader of its format."""
    kind, pattern = schema.get("format", ""), schema.get("pattern", "")
    if kind == "date":
        return value in dates_in(request)
    if kind == "duration":
        return value in durations_in(request)
    if kind == "time" or "2[0-3]" in pattern:
        return value[:5] in times_in(request)
    if kind == "date-time" or "T" in pattern:
        day, hour = value[:10], value[11:16]
        return day in dates_in(request) and hour in times_in(request)
    if "enum" in schema:
        return plain(value) in plain(request)
    return value in request


# ---------------------------------------------------------------------------------------------------------------------


def test_an_example_is_the_same_wherever_it_is_made(records: list[Record]) -> None:
    assert list(generate(20, seed=3, start=100)) == records[100:120]
    assert example(7, 3).record == records[7]
    assert example(7, 4).record != records[7]
    assert len({record["id"] for record in records}) == COUNT
    assert len({record["messages"][0]["content"] for record in records}) > 0.98 * COUNT


def test_every_call_validates_and_goes_through_its_scaffold(records: list[Record]) -> None:
    for record, tool, arguments in gold(records):
        schema = tool["function"]["parameters"]
        Draft202012Validator.check_schema(schema)
        validator = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
        validator.validate(arguments)
        assert set(arguments) <= set(schema["properties"]), record["id"]
    for record in records:
        check_record(record)


def test_an_invalid_call_is_told_with_its_record(records: list[Record]) -> None:
    record = next(record for record in records if record["calls"])
    call = {**record["calls"][0], "arguments": {"unheard of": 1}}
    with pytest.raises(ValueError, match=rf"{record['id']}: .*Correct the kind"):
        check_record({**record, "calls": [call]})


def test_every_value_is_said_in_the_request(records: list[Record]) -> None:
    said, unsaid = Counter[bool](), list[tuple[str, str, Any]]()
    for record, tool, arguments in gold(records):
        request = record["messages"][0]["content"]
        for name, value in arguments.items():
            done = says(request, name, tool["function"]["parameters"]["properties"][name], value)
            said[done] += 1
            if not done:
                unsaid.append((request, name, value))
    assert said[True] >= 0.99 * said.total(), unsaid[:5]
    assert said.total() > COUNT


def test_a_date_is_named_where_the_tool_has_two_of_them() -> None:
    seen = 0
    for record, tool, arguments in gold(list(generate(4000, 8))):
        properties = tool["function"]["parameters"]["properties"]
        dates = [name for name, schema in properties.items() if schema.get("format") == "date"]
        for name in set(dates) & set(arguments) if len(dates) > 1 else ():
            seen += 1
            assert plain(name) in plain(record["messages"][0]["content"]), record["id"]
    assert seen > 10


def test_the_readers_miss_what_is_not_said() -> None:
    assert not says("in 3 days", "n", {"type": "integer"}, 4)
    assert not says("at 2:30 am", "t", {"type": "string", "format": "time"}, "14:30:00Z")
    assert not says("on May 3, 2024", "d", {"type": "string", "format": "date"}, "2024-05-04")
    assert not says("two hours", "d", {"type": "string", "format": "duration"}, "PT2M")
    assert not says("dry run off", "dry_run", {"type": "boolean"}, True)
    assert says("minus 2.5 million", "n", {"type": "integer"}, -2_500_000)
    assert says("Today is 2024-02-28. Do it tomorrow.", "d", {"type": "string", "format": "date"}, "2024-02-29")


def test_every_kind_of_value_and_decision_appears() -> None:
    counts = Counter[str]()
    for index in range(1500):
        counts.update(example(index, 5).counts)
    assert set(KINDS) <= counts.keys()
    assert {f"array of {length}" for length in range(7)} <= counts.keys()
    assert {f"array/{kind}" for kind in ITEMS} <= counts.keys()
    assert {f"object/{kind}" for kind in FIELDS} <= counts.keys()
    assert {f"union/{branch}" for branch in ("string", "integer", "number", "name", "date", "null")} <= counts.keys()
    assert {f"calls: {style}" for style in ("one", "two tools", "same tool", "none")} <= counts.keys()
    assert {f"tools: {number}" for number in (1, 2, 3, 4)} <= counts.keys()
    assert {"left out", "left out, has a default", "optional, said"} <= counts.keys()


def test_every_kind_of_slot_of_the_layout_is_filled(records: list[Record]) -> None:
    roles, kinds, escaped = set[str](), set[str](), 0
    for _, tool, arguments in gold(records[:250]):
        layout = layouts.draft_layout(scaffolds.compile_scaffold(tool), 4)
        assert layout is not None
        texts = layout.texts(arguments)
        for slot, text in zip(layout.slots, texts, strict=True):
            if text is not None:
                roles.add(slot.role)
                kinds.add(slot.leaf.kind)
                escaped += slot.leaf.kind == "string" and slot.leaf.text(text) != text
    assert roles == {"value", "key", "presence", "length", "branch"}
    assert kinds == {"string", "integer", "number", "choice"}
    assert escaped > 5, "no text that JSON escapes"


def flat(name: str) -> str:
    return re.sub("[^a-z]", "", name.lower())


def test_one_tool_at_most_fits_a_request_and_none_where_it_is_refused() -> None:
    meaning = {}
    for sense, entry in VERBS.items():
        for noun in NOUNS["train"]:
            for verb in entry["train"]:
                meaning[flat(verb + noun)] = meaning[flat(noun + verb)] = (sense, noun)
    refused = 0
    for index in range(400):
        made = example(index, 6)
        shown = [meaning[flat(tool["function"]["name"])] for tool in made.record["tools"]]
        assert len(set(shown)) == len(shown), made.record["id"]
        if made.record["calls"]:
            assert {call["name"] for call in made.record["calls"]} == set(made.asked)
        else:
            refused += 1
            assert not {meaning[flat(name)] for name in made.asked} & set(shown), made.record["id"]
    assert 20 < refused < 80


def tool_names(names: Names) -> set[str]:
    """All tool names that may be made, in lower case and without `_`, `-` and `.`."""
    verbs = [verb for entry in VERBS.values() for verb in entry[names]]
    found = {f"{verb}{noun}".replace(" ", "") for verb in verbs for noun in NOUNS[names]}
    return found | {f"{noun}{verb}".replace(" ", "") for verb in verbs for noun in NOUNS[names]}


def test_training_and_held_out_names_are_disjoint() -> None:
    train_verbs, dev_verbs = ({verb for entry in VERBS.values() for verb in entry[names]} for names in ("train", "dev"))
    assert not train_verbs & dev_verbs
    train_nouns, dev_nouns = ({word for noun in NOUNS[names] for word in noun.split()} for names in ("train", "dev"))
    assert not train_nouns & dev_nouns
    train_words, dev_words = ({word for pair in PARAMETERS.values() for word in pair[side]} for side in (0, 1))
    assert not train_words & dev_words
    assert not tool_names("train") & tool_names("dev")
    assert len(tool_names("train")) > 1000
    for names in get_args(Names):
        possible = tool_names(names)
        made = {flat(tool["function"]["name"]) for record in generate(100, 9, names) for tool in record["tools"]}
        assert made <= possible


def test_no_synthetic_tool_is_one_of_the_evaluation_sets() -> None:
    if not (DEFAULT_DATA / "dev" / "dev.jsonl.gz").exists():
        pytest.skip("the record files are not beside the repository")
    files = [DEFAULT_DATA / "dev" / "dev.jsonl.gz", *(DEFAULT_DATA / "bfcl_open" / "normalised").glob("*.jsonl.gz")]
    used = {
        flat(tool["function"]["name"]) for path in files for record in read_records(path) for tool in record["tools"]
    }
    assert not used & (tool_names("train") | tool_names("dev"))


def test_the_command_writes_what_the_training_data_reader_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "made" / "calls.jsonl.gz"
    synthetic_calls.main(["--count", "40", "--seed", "3", "--start", "5", "--out", str(path)])
    read = list(read_records(path))
    assert read == list(generate(40, 3, start=5))
    assert "40 records" in capsys.readouterr().out
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        assert set(json.loads(next(lines))) == {"id", "source", "license", "messages", "tools", "calls"}
    tokenizer = AutoTokenizer.from_pretrained(ROOT, trust_remote_code=False)
    style = PromptStyle(max_tools=4, max_prompt_tokens=4096, max_target_tokens=2048)
    rows = [build_row(record, tokenizer, style, random.Random(0)) for record in read]
    assert all(row is not None and row.calls == record["calls"] for row, record in zip(rows, read, strict=True))


def test_a_count_below_one_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        synthetic_calls.main(["--count", "0", "--out", str(tmp_path / "x.jsonl.gz")])
    assert "give 1 or more" in capsys.readouterr().err
