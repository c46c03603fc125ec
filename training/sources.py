"""Public function-calling data sets, by Hub id -> records as `training.data` reads them.

Takes rows of xLAM-60k, Glaive v2, ToolACE or Hermes v1; gives one record per decision of the assistant: the
conversation so far, the tools in JSON Schema draft 2020-12, and the calls or the text that follow. What a row says is
parsed and never run. It does not know which requests or functions are in an evaluation set.

    python -m training.sources Team-ACE/ToolACE --out DATA/train/toolace.jsonl.gz --on-error skip
"""

import argparse
import ast
import itertools
import json
import math
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from repo_package import load_repo_module

from .records import Record, write_records

dialects = load_repo_module("schema_dialects")
algebra = load_repo_module("schema_algebra")

MAX_LITERAL = 200_000
"""Characters of one Python-like text; longer ones are refused before they are parsed."""

MAX_TYPE = 400
"""Characters of the name of one Python type."""


class SourceError(ValueError):
    """A row that cannot become a record.

    Args:
        source: Hub id of the data set, with the configuration where it has several.
        row: number of the row, from 0.
        field: the column at fault.
        reason: what is wrong, in words that rows with the same fault share.
        detail: what is wrong in this row.
    """

    def __init__(self, source: str, row: int, field: str, reason: str, detail: str = "") -> None:
        told = f"{reason} ({detail})" if detail else reason
        advice = 'Leave such rows out with on_error="skip" (--on-error skip), or correct the row.'
        super().__init__(f"{source}, row {row}, field {field!r}: {told}. {advice}")
        self.source = source
        self.row = row
        self.field = field
        self.reason = reason
        self.detail = detail


@dataclass
class Counts:
    """What became of the rows.

    Args:
        rows: rows read.
        records: records they gave.
        with_calls: records that expect calls.
        calls: calls of all records.
        nothing: rows without a decision to learn.
        skipped: refused rows by field and reason.
    """

    rows: int = 0
    records: int = 0
    with_calls: int = 0
    calls: int = 0
    nothing: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    def add(self, record: Record) -> None:
        """Count one record."""
        self.records += 1
        self.with_calls += bool(record["calls"])
        self.calls += len(record["calls"])

    def __str__(self) -> str:
        lines = [
            f"{self.rows} rows -> {self.records} records: {self.with_calls} with {self.calls} calls, "
            f"{self.records - self.with_calls} without a call",
            f"{self.nothing} rows without a decision, {self.skipped.total()} rows skipped",
            *(f"  {count} {reason}" for reason, count in self.skipped.most_common()),
        ]
        return "\n".join(lines)


class _Refused(Exception):
    """A fault of a row, before it is known which row it is; the arguments are those of `SourceError`."""

    def __init__(self, field: str, reason: str, detail: str = "") -> None:
        super().__init__(field, reason, detail)


Parsed = tuple[list[Record], list[Any]]
"""Messages (role, content, tool_calls) and tools of any form."""


@dataclass(frozen=True)
class _Source:
    """One data set.

    Args:
        hub_id: its id on the Hub.
        name: `source` of its records.
        license: as its card states it.
        read: messages and tools of a row, or None where the row is not about tools.
        tools_field: the column that holds the tools.
        turns_field: the column that holds the assistant's turns.
        configurations: those to read; empty for the default one.
    """

    hub_id: str
    name: str
    license: str
    read: Callable[[Mapping[str, Any]], Parsed | None]
    tools_field: str
    turns_field: str
    configurations: tuple[str, ...] = ()


# ---------------------------------------------------------------------------------------------------------------------
# From rows to records
# ---------------------------------------------------------------------------------------------------------------------


def records(
    hub_id: str,
    revision: str | None = None,
    streaming: bool = True,
    *,
    on_error: str = "refuse",
    limit: int | None = None,
    counts: Counts | None = None,
) -> Iterator[Record]:
    """Read a data set from the Hub as records, one per decision.

    Args:
        hub_id: a key of `ADAPTERS`.
        revision: commit, branch or tag of the data set; None is its newest state.
        streaming: read row by row instead of downloading the data set first.
        on_error: `"refuse"` stops at a row that cannot be converted, `"skip"` leaves it out and counts it.
        limit: most rows to read; None reads all.
        counts: is updated while the iterator runs.

    Yields:
        Records with `id`, `source`, `license`, `messages`, `tools`, `calls` and, for a reply in words, `answer`.

    Raises:
        ValueError: the data set or `on_error` is not known, or `limit` is negative.
        SourceError: a row cannot be converted.
        OSError: the data set could not be loaded.
    """
    source = _source(hub_id)
    if limit is not None and limit < 0:
        raise ValueError(f"limit is {limit}: pass the most rows to read, or None for all.")
    rows = itertools.chain.from_iterable(
        ((configuration, number, row) for number, row in enumerate(_load(hub_id, configuration, revision, streaming)))
        for configuration in source.configurations or (None,)
    )
    return _converted(source, itertools.islice(rows, limit), on_error, Counts() if counts is None else counts)


def convert(
    hub_id: str, rows: Iterable[Mapping[str, Any]], *, on_error: str = "refuse", counts: Counts | None = None
) -> Iterator[Record]:
    """Convert rows that are already at hand; see `records`.

    Args:
        hub_id: a key of `ADAPTERS`.
        rows: rows of this data set.
        on_error: `"refuse"` or `"skip"`.
        counts: is updated while the iterator runs.

    Yields:
        Records, one per decision.
    """
    numbered = ((None, number, row) for number, row in enumerate(rows))
    return _converted(_source(hub_id), numbered, on_error, Counts() if counts is None else counts)


def decisions(conversation: Record) -> Iterator[Record]:
    """Split a conversation into what the assistant had to decide: calls, or words.

    Args:
        conversation: what an adapter gives: `id`, `source`, `license`, `messages` up to the end, `tools`.

    Yields:
        A record for each turn of the assistant that answers the user or a tool; its id ends in the turn's index. What
        the assistant says beside a call is left out.
    """
    messages = conversation["messages"]
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or messages[index - 1]["role"] not in ("user", "tool"):
            continue
        record = {
            **conversation,
            "id": f"{conversation['id']}-{index}",
            "messages": messages[:index],
            "calls": message.get("tool_calls", []),
        }
        if not record["calls"] and message["content"]:
            record["answer"] = message["content"]
        yield record


def _source(hub_id: str) -> _Source:
    if hub_id not in _SOURCES:
        raise ValueError(f"there is no adapter for {hub_id!r}: choose one of {', '.join(_SOURCES)}.")
    return _SOURCES[hub_id]


def _load(hub_id: str, configuration: str | None, revision: str | None, streaming: bool) -> Iterable[Mapping[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{hub_id} is read with `datasets`: pip install datasets.") from error
    try:
        return datasets.load_dataset(hub_id, configuration, split="train", revision=revision, streaming=streaming)
    except OSError as error:
        advice = (
            "Check the connection and the revision; if its page on the Hub asks to accept terms, accept them and log "
            "in with `hf auth login`."
        )
        raise OSError(f"{hub_id} could not be loaded: {error}. {advice}") from error


def _converted(
    source: _Source, rows: Iterable[tuple[str | None, int, Mapping[str, Any]]], on_error: str, counts: Counts
) -> Iterator[Record]:
    if on_error not in ("refuse", "skip"):
        raise ValueError(f'on_error is {on_error!r}: pass "refuse" or "skip".')
    return _each(source, rows, on_error == "skip", counts)


def _each(
    source: _Source, rows: Iterable[tuple[str | None, int, Mapping[str, Any]]], skip: bool, counts: Counts
) -> Iterator[Record]:
    for configuration, number, row in rows:
        counts.rows += 1
        try:
            conversation = _adapt(source, row, number, configuration)
        except SourceError as error:
            if not skip:
                raise
            counts.skipped[f"{error.field}: {error.reason}"] += 1
            continue
        found = [] if conversation is None else list(decisions(conversation))
        counts.nothing += not found
        for record in found:
            counts.add(record)
            yield record


def _adapt(source: _Source, row: Mapping[str, Any], number: int, configuration: str | None = None) -> Record | None:
    """The conversation of a row, checked; None where there is nothing to learn in it."""
    place = f"{source.hub_id} ({configuration})" if configuration else source.hub_id
    try:
        parsed = source.read(row)
        if parsed is None:
            return None
        messages, given = parsed
        tools = _tools(given, source.tools_field)
        _check_turns(messages, source.turns_field)
        _check_calls(messages, tools, source.turns_field)
        if not any(message["role"] == "assistant" for message in messages):
            return None
        prefix = f"{source.name}-{configuration}" if configuration else source.name
        record = {
            "id": f"{prefix}-{number}",
            "source": source.name,
            "license": source.license,
            "messages": messages,
            "tools": tools,
        }
        _check_text(record, source.turns_field)
    except _Refused as fault:
        raise SourceError(place, number, *fault.args) from None
    return record


def _tools(given: Sequence[Any], field: str) -> list[Record]:
    """Tools in the OpenAI form with schemas of one dialect, each once."""
    known: dict[str, Record] = {}
    for tool in given:
        try:
            function = dialects.normalise_tool(tool).get("function")
        except ValueError as error:
            raise _Refused(field, "not a tool", str(error)) from None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise _Refused(field, "a tool without a name", _shown(tool))
        name, description = function["name"], function.get("description")
        try:
            parameters = dialects.normalise_schema(function.get("parameters"), name)[0]
        except ValueError as error:
            raise _Refused(field, "not a schema", str(error)) from None
        if not isinstance(parameters.get("properties", {}), Mapping):
            raise _Refused(field, "not a schema", f"{name}: its properties are no object")
        if not parameters:
            parameters = {"type": "object", "properties": {}}
        described = {"description": description} if isinstance(description, str) else {}
        made = {"type": "function", "function": {"name": name, **described, "parameters": parameters}}
        if known.setdefault(name, made) != made:
            raise _Refused(field, "two different tools of one name", name)
    return list(known.values())


def _check_turns(messages: Sequence[Record], field: str) -> None:
    """Refuse a conversation whose turns are not in an order that can be."""
    before = "system"
    for index, message in enumerate(messages):
        role = message["role"]
        if role == "system" and index:
            raise _Refused(field, "a system message after the start", f"turn {index}")
        if before == "system" and role not in ("system", "user"):
            raise _Refused(field, "the conversation does not start with the user", role)
        if role == "tool" and before != "tool" and not messages[index - 1].get("tool_calls"):
            raise _Refused(field, "a tool result without a call", f"turn {index}")
        if role != "tool" and not message["content"] and "tool_calls" not in message:
            raise _Refused(field, "an empty turn", f"turn {index}, {role}")
        before = role


# A schema with one of these may allow arguments that it does not name.
_OPEN = {"additionalProperties", "patternProperties", "allOf", "anyOf", "oneOf", "$ref", "$dynamicRef"}


def _check_calls(messages: Sequence[Record], tools: Sequence[Record], field: str) -> None:
    """Refuse calls of functions that are not offered, and arguments that do not fit their schema."""
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    for call in (call for message in messages for call in message.get("tool_calls", ())):
        name, arguments = call["name"], call["arguments"]
        if name not in schemas:
            raise _Refused(field, "a call of a function that is not offered", name)
        schema = schemas[name]
        unknown = sorted(arguments.keys() - schema.get("properties", {}).keys())
        if unknown and _OPEN.isdisjoint(schema):
            raise _Refused(field, "an argument that the schema does not have", f"{name}: {unknown[0]}")
        try:
            fits = algebra.Algebra(name, schema).fits((algebra.Located(schema, ""),), arguments)
        except algebra.UnsupportedSchemaError:
            continue  # the head leaves such a tool out by itself; the base can learn from it
        if not fits:
            raise _Refused(field, "arguments that do not fit the schema", f"{name}: {_shown(arguments)}")


def _check_text(record: Record, field: str) -> None:
    """Refuse what cannot be written to a file: half of a surrogate pair, numbers that JSON lacks."""
    try:
        json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise _Refused(field, "not text that can be written as JSON", str(error)) from None


# ---------------------------------------------------------------------------------------------------------------------
# Texts: JSON, and what looks like Python
# ---------------------------------------------------------------------------------------------------------------------

_WORDS = {"true": True, "false": False, "null": None}


class _JsonWords(ast.NodeTransformer):
    """Reads JSON's words in a Python expression."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(_WORDS[node.id]) if node.id in _WORDS else node


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


_decoder = json.JSONDecoder(strict=False, parse_constant=_no_constant)


def _value(text: str, field: str) -> Any:
    """The value of a JSON text or of a Python literal; nothing is evaluated.

    Raises:
        _Refused: the text is neither, longer than `MAX_LITERAL`, or holds what JSON does not have.
    """
    if len(text) > MAX_LITERAL:
        raise _Refused(field, f"a value of more than {MAX_LITERAL} characters")
    try:
        return _decoder.decode(text)
    except (ValueError, RecursionError):
        pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unknown escapes in strings
            tree = ast.parse(text.strip(), mode="eval")
            return _plain(ast.literal_eval(_JsonWords().visit(tree)))
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        raise _Refused(field, "neither JSON nor a literal", _shown(text)) from None


def _plain(value: Any) -> Any:
    """A Python value as JSON has it; ValueError where JSON has no such value."""
    if value is None or isinstance(value, (str, bool, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return {name: _plain(item) for name, item in value.items()}
    raise ValueError(f"no JSON value: {type(value).__name__}")


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _text(row: Mapping[str, Any], field: str) -> str:
    value = row.get(field)
    if not isinstance(value, str):
        raise _Refused(field, "not a text", type(value).__name__)
    return value


def _list(value: Any, field: str) -> list[Any]:
    """A list, given as it is or as text."""
    if isinstance(value, str):
        value = _value(value, field)
    if not isinstance(value, list):
        raise _Refused(field, "not a list", _shown(value))
    return value


def _call(value: Any, field: str) -> Record:
    """A call out of an object with `name` and `arguments`, which may be an object, a text of one, or absent."""
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise _Refused(field, "a call without a name", _shown(value))
    arguments = value.get("arguments")
    if isinstance(arguments, str):
        arguments = _value(arguments, field) if arguments.strip() else {}
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise _Refused(field, "arguments that are no object", _shown(arguments))
    return {"name": value["name"], "arguments": arguments}


def _assistant(content: str, calls: list[Record]) -> Record:
    return {"role": "assistant", "content": content.strip(), **({"tool_calls": calls} if calls else {})}


def _split(text: str, separator: str = ",") -> list[str]:
    """Parts of a text between separators that stand outside of brackets and quotes."""
    parts, depth, quote, start = [], 0, "", 0
    index = 0
    while index < len(text):
        letter = text[index]
        if quote:
            if letter == "\\":
                index += 1
            elif letter == quote:
                quote = ""
        elif letter in "\"'":
            quote = letter
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        elif letter == separator and not depth:
            parts.append(text[start:index])
            start = index + 1
        index += 1
    parts.append(text[start:])
    return [part.strip() for part in parts]


# ---------------------------------------------------------------------------------------------------------------------
# Salesforce/xlam-function-calling-60k: `query`, and lists as JSON texts in `tools` and `answers`
# ---------------------------------------------------------------------------------------------------------------------

_SIMPLE = {"str", "string", "int", "integer", "float", "number", "bool", "boolean", "object", "any"}
_ARRAYS = {"list", "array", "set", "sequence", "iterable"}


def _read_xlam(row: Mapping[str, Any]) -> Parsed:
    tools = [_xlam_tool(tool) for tool in _list(row.get("tools"), "tools")]
    calls = [_call(answer, "answers") for answer in _list(row.get("answers"), "answers")]
    question = {"role": "user", "content": _text(row, "query").strip()}
    # No call is an answer, too: the words for it are chosen by `training.data`.
    return [question, {"role": "assistant", "content": "", "tool_calls": calls}], tools


def _xlam_tool(tool: Any) -> Any:
    """A tool whose parameters are a map of names to Python types, as one with a JSON Schema."""
    parameters = tool.get("parameters") if isinstance(tool, Mapping) else None
    if not isinstance(parameters, Mapping) or isinstance(parameters.get("type"), str):
        return tool
    properties, required = {}, []
    for name, given in parameters.items():
        if not isinstance(given, Mapping) or not isinstance(given.get("type"), str):
            raise _Refused("tools", "a parameter without a type", f"{tool.get('name')}: {name}")
        kind, *notes = _split(given["type"])
        optional = re.fullmatch(r"(?i)optional\[(.*)\]", kind)
        if len(kind) > MAX_TYPE:
            raise _Refused("tools", "a type that is not known", f"{tool.get('name')}: {name}: {_shown(kind)}")
        schema = _schema_of(optional[1] if optional else kind)
        properties[name] = {**schema, **{key: given[key] for key in ("description", "default") if key in given}}
        if not optional and "default" not in given and "optional" not in [note.lower() for note in notes]:
            required.append(name)
    return {**tool, "parameters": {"type": "object", "properties": properties, "required": required}}


def _schema_of(kind: str) -> Record:
    """The schema of a Python type's name, such as `List[Union[int, str]]`."""
    alternatives = _split(kind, "|")
    base, bracket, rest = kind.strip().partition("[")
    base = base.strip().lower().removeprefix("typing.")
    inner = _split(rest.strip().removesuffix("]")) if bracket else []
    if len(alternatives) > 1 or (base == "union" and inner):
        return {"anyOf": [_schema_of(part) for part in (inner if base == "union" else alternatives)]}
    if base == "none" and not inner:
        return {"type": "null"}
    if base == "optional" and len(inner) == 1:
        return {"anyOf": [_schema_of(inner[0]), {"type": "null"}]}
    if base in _SIMPLE and not inner:
        return {} if base == "any" else {"type": base}
    if base in _ARRAYS and len(inner) < 2:
        items = {"items": _schema_of(inner[0])} if inner else {}
        return {"type": "set" if base == "set" else "array", **items}
    if base in ("dict", "mapping") and len(inner) in (0, 2):
        return {"type": "object", **({"additionalProperties": _schema_of(inner[1])} if inner else {})}
    if base == "tuple":
        if len(inner) == 2 and inner[1] == "...":
            return {"type": "array", "items": _schema_of(inner[0])}
        parts = [_schema_of(part) for part in inner]
        return {"type": "array", **({"prefixItems": parts, "items": False, "minItems": len(parts)} if parts else {})}
    raise _Refused("tools", "a type that is not known", _shown(kind))


# ---------------------------------------------------------------------------------------------------------------------
# glaiveai/glaive-function-calling-v2: functions one after another in `system`, turns as one text in `chat`
# ---------------------------------------------------------------------------------------------------------------------

_GLAIVE_TURN = re.compile(r"^[ \t]*(USER|ASSISTANT|FUNCTION RESPONSE):", re.MULTILINE)
_GLAIVE_INSIDE = re.compile(r"(?:ASSISTANT|FUNCTION RESPONSE):|<functioncall>")
_GLAIVE_ROLES = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}
_GLAIVE_CALL = re.compile(
    r"""\{\s*"name"\s*:\s*"(?P<name>[^"\\]+)"\s*,\s*"arguments"\s*:\s*'(?P<arguments>.*)'\s*\}""", re.DOTALL
)


def _read_glaive(row: Mapping[str, Any]) -> Parsed:
    before, *parts = _GLAIVE_TURN.split(_text(row, "chat"))
    if before.strip() or not parts:
        raise _Refused("chat", "text before the first turn" if before.strip() else "no turns", _shown(before.strip()))
    messages = []
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        role, said = _GLAIVE_ROLES[speaker], said.replace("<|endoftext|>", " ").strip()
        if _GLAIVE_INSIDE.search(said.replace("<functioncall>", "") if role == "assistant" else said):
            raise _Refused("chat", "a turn inside of another", _shown(said))
        if role == "assistant":
            content, *calls = said.split("<functioncall>")
            messages.append(_assistant(content, [_glaive_call(call.strip()) for call in calls]))
        else:
            messages.append({"role": role, "content": said})
    return messages, _glaive_tools(_text(row, "system"))


def _glaive_tools(system: str) -> list[Any]:
    tools = []
    start = system.find("{")
    while 0 <= start < len(system):
        try:
            tool, start = _decoder.raw_decode(system, start)
        except (ValueError, RecursionError) as error:
            raise _Refused("system", "functions that are no JSON", str(error)) from None
        tools.append(tool)
        start += len(system[start:]) - len(system[start:].lstrip(" \t\r\n,"))
    return tools


def _glaive_call(text: str) -> Record:
    """A call whose arguments are JSON between single quotes, which may themselves hold single quotes."""
    match = _GLAIVE_CALL.fullmatch(text)
    if not match:
        return _call(_value(text, "chat"), "chat")
    arguments = match["arguments"]
    try:
        _decoder.decode(arguments)
    except (ValueError, RecursionError):
        arguments = arguments.replace("\\'", "'")
    return _call({"name": match["name"], "arguments": arguments}, "chat")


# ---------------------------------------------------------------------------------------------------------------------
# Team-ACE/ToolACE: functions as a list in `system`, calls as `[name(key=value, ...), ...]` in `conversations`
# ---------------------------------------------------------------------------------------------------------------------

_TOOLACE_DATE = re.compile(r"(?:The current time|Today) is \d{4}-\d\d-\d\d[^.\n\[{]*\.?")


def _read_toolace(row: Mapping[str, Any]) -> Parsed:
    system = _text(row, "system")
    start = re.search(r"\[\s*\{", system)
    tools: list[Any] = []
    if start:
        try:
            tools = _decoder.raw_decode(system, start.start())[0]
        except (ValueError, RecursionError) as error:
            raise _Refused("system", "functions that are no JSON", str(error)) from None
    names = [tool["name"] for tool in tools if isinstance(tool, Mapping) and isinstance(tool.get("name"), str)]
    date = _TOOLACE_DATE.search(system[: start.start()] if start else system)
    messages: list[Record] = [{"role": "system", "content": date[0].strip()}] if date else []
    for role, said in _turns(row, {"user": "user", "assistant": "assistant", "tool": "tool"}):
        if role == "assistant":
            calls = _toolace_calls(said, names)
            messages.append(_assistant("" if calls else said, calls))
        else:
            messages.append({"role": role, "content": said})
    return messages, tools


def _turns(row: Mapping[str, Any], roles: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """(role, text) of `conversations`, a list of `from` and `value`."""
    for index, turn in enumerate(_list(row.get("conversations"), "conversations")):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
            raise _Refused("conversations", "a turn without a text", f"turn {index}")
        role = roles.get(str(turn.get("from")))
        if role is None:
            raise _Refused("conversations", "a speaker that is not known", f"turn {index}: {turn.get('from')}")
        yield role, turn["value"].strip()


def _toolace_calls(text: str, names: Sequence[str]) -> list[Record]:
    """The calls of a turn; none where it is plain text."""
    longest_first = sorted(set(names), key=len, reverse=True)
    opening = re.search(rf"\[\s*(?:{'|'.join(map(re.escape, longest_first))})\s*\(", text) if names else None
    if not opening and not (text.startswith("[") and text.endswith(")]")):
        return []
    if (opening and opening.start()) or not text.endswith("]"):
        raise _Refused("conversations", "calls and words in one turn", _shown(text))
    return [_toolace_call(part, longest_first) for part in _split(text[1:-1])]


def _toolace_call(text: str, names: Sequence[str]) -> Record:
    """One call `name(key=value, ...)`; names may hold blanks and brackets."""
    name = next((name for name in names if re.match(rf"{re.escape(name)}\s*\(", text)), None)
    if name is None:
        name = text.partition("(")[0].strip()
    rest = text[len(name) :].strip()
    if not (rest.startswith("(") and rest.endswith(")")):
        raise _Refused("conversations", "a call that cannot be read", _shown(text))
    arguments: Record = {}
    for part in _split(rest[1:-1]) if rest[1:-1].strip() else ():
        key, equals, value = part.partition("=")
        key = key.strip()
        if not equals or not key or key in arguments or key[0] in "\"'[{(":
            raise _Refused("conversations", "an argument that cannot be read", _shown(part))
        arguments[key] = _value(value.strip(), "conversations")
    return {"name": name, "arguments": arguments}


# ---------------------------------------------------------------------------------------------------------------------
# NousResearch/hermes-function-calling-v1: `<tool_call>` in `conversations`, functions in `tools` or in the system turn
# ---------------------------------------------------------------------------------------------------------------------

_HERMES_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "tool": "tool"}
_HERMES_TOOLS = re.compile(r"<tools>\s*([\[{].*?)\s*</tools>", re.DOTALL)
_HERMES_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
_HERMES_RESULT = re.compile(r"<tool_response>\s*(.*?)\s*</tool_response>", re.DOTALL)


def _read_hermes(row: Mapping[str, Any]) -> Parsed | None:
    messages: list[Record] = []
    told = ""
    for role, said in _turns(row, _HERMES_ROLES):
        if role == "system":
            told += said  # the functions and how to call them, which our template says in its own words
        elif role == "assistant":
            content = _HERMES_CALL.sub("", said)
            if "<tool_call>" in content or "</tool_call>" in content:
                raise _Refused("conversations", "a call that is not closed", _shown(said))
            calls = [_call(_value(text, "conversations"), "conversations") for text in _HERMES_CALL.findall(said)]
            messages.append(_assistant(content, calls))
        elif role == "tool":
            results = _HERMES_RESULT.findall(said) or [said]
            messages += [{"role": "tool", "content": result} for result in results]
        else:
            messages.append({"role": role, "content": said})
    if row.get("tools"):
        return messages, _list(row["tools"], "tools")
    listed = _HERMES_TOOLS.search(told)
    return (messages, _hermes_tools(listed[1])) if listed else None  # without tools it is about JSON, not about calls


def _hermes_tools(text: str) -> list[Any]:
    """Functions of a system turn: a list, one object, or one object per line."""
    try:
        value = _value(text, "conversations")
    except _Refused:
        return [_value(line, "conversations") for line in text.splitlines() if line.strip()]
    return value if isinstance(value, list) else [value]


_SOURCES = {
    source.hub_id: source
    for source in (
        _Source("Salesforce/xlam-function-calling-60k", "xlam_60k", "CC-BY-4.0", _read_xlam, "tools", "answers"),
        _Source("glaiveai/glaive-function-calling-v2", "glaive_v2", "Apache-2.0", _read_glaive, "system", "chat"),
        _Source("Team-ACE/ToolACE", "toolace", "Apache-2.0", _read_toolace, "system", "conversations"),
        _Source(
            "NousResearch/hermes-function-calling-v1",
            "hermes_v1",
            "Apache-2.0",
            _read_hermes,
            "tools",
            "conversations",
            ("func_calling_singleturn", "func_calling", "glaive_func_calling"),
        ),
    )
}

ADAPTERS: dict[str, Callable[[Mapping[str, Any], int], Record | None]] = {
    hub_id: partial(_adapt, source) for hub_id, source in _SOURCES.items()
}
"""By Hub id: (row, its number) -> the whole conversation as a record without `calls`, which `decisions` splits; None
where the row holds no decision. Raises `SourceError`."""


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    """The command: one data set into one file, counts to standard output."""
    parser = argparse.ArgumentParser(prog="python -m training.sources", description="A public data set as records.")
    parser.add_argument("hub_id", choices=list(ADAPTERS), metavar="HUB_ID", help=", ".join(ADAPTERS))
    parser.add_argument("--out", type=Path, required=True, help="file to write, FILE.jsonl.gz")
    parser.add_argument("--limit", type=int, help="most rows to read")
    parser.add_argument("--revision", help="commit, branch or tag of the data set")
    parser.add_argument("--on-error", choices=("refuse", "skip"), default="refuse", help="what a malformed row does")
    options = parser.parse_args(arguments)
    counts = Counts()
    try:
        from tqdm import tqdm

        found = records(options.hub_id, options.revision, on_error=options.on_error, limit=options.limit, counts=counts)
        write_records(options.out, tqdm(found, desc=options.hub_id, unit=" records"))
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    print(counts)
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
