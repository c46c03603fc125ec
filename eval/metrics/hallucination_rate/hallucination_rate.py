"""Invented arguments: names that the schema does not have, and values that nobody said.

Takes the calls of replies, the tools that were offered and the conversations, all as JSON; says nothing of whether a
supported value is the right one. The rules are written down in README.md beside this module.
"""

import json
import re
import unicodedata
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import datasets
import evaluate

_DESCRIPTION = """
Share of the arguments in calls that are hallucinated: their name is not in the tool's schema, or their value is
supported neither by the schema (enum, const, default, the two booleans, null), nor by what was said, nor by an allowed
transformation of it (case, accents, punctuation, plurals, numbers in words, forms of dates and times, lists, yes and
no). The card beside the metric has the rules.
"""

_CITATION = """
Defined in this repository.
"""

_INPUTS = """
Args:
    predictions: for each reply its calls as a JSON text, [{"name": ..., "arguments": {...}}, ...]; [] where nothing is
        called.
    tools: for each reply the tools that were offered as a JSON text, a list in OpenAI style.
    conversations: for each reply the messages in front of it as a JSON text, a list in OpenAI style.

Returns:
    requests: how many.
    unread: replies that are no JSON list of calls; nothing of them is counted.
    calls: in the replies that are.
    unknown_tools: calls of tools that were not offered; each of their arguments has an unknown name.
    arguments: values without members at any depth of the arguments, and names that are unknown.
    unknown_names: names that the schema does not have.
    unsupported_values: values, and names of freely named properties, that nothing supports.
    hallucination_rate: share of the arguments that are one of both.
    reply_hallucination_rate: share of the replies that call with at least one.
    hallucinated: for each reply the JSON pointers of such arguments, the number of the call in front.
    A rate over nothing is None.

Examples:
    >>> import json
    >>> import evaluate
    >>> metric = evaluate.load("eval/metrics/hallucination_rate")
    >>> properties = {"city": {"type": "string"}, "days": {"type": "integer"}, "unit": {"enum": ["C", "F"]}}
    >>> schema = {"type": "object", "properties": properties}
    >>> tools = json.dumps([{"type": "function", "function": {"name": "weather", "parameters": schema}}])
    >>> said = json.dumps([{"role": "user", "content": "Weather in Zürich for two days?"}])
    >>> good = '[{"name": "weather", "arguments": {"city": "zurich", "days": 2, "unit": "C"}}]'
    >>> bad = '[{"name": "weather", "arguments": {"city": "Bern", "days": 2, "wind": true}}]'
    >>> found = metric.compute(predictions=[good, bad], tools=[tools] * 2, conversations=[said] * 2)
    >>> found["hallucinated"]
    [[], ['/0/city', '/0/wind']]
    >>> found["arguments"], round(found["hallucination_rate"], 2)
    (6, 0.33)
"""


class HallucinationRate(evaluate.Metric):
    """Share of invented arguments."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": text, "tools": text, "conversations": text}),
        )

    def _compute(self, predictions: list[str], tools: list[str], conversations: list[str]) -> dict[str, Any]:
        """See `inputs_description`."""
        if not predictions:
            raise ValueError("There are no replies to measure: give at least one.")
        found = [
            _judge_reply(text, _schemas(offered, number), _said(messages, number))
            for number, (text, offered, messages) in enumerate(zip(predictions, tools, conversations, strict=True))
        ]
        read = [reply for reply in found if reply is not None]
        names, values = (sum(len(getattr(reply, kind)) for reply in read) for kind in ("unknown", "unsupported"))
        arguments = sum(reply.arguments for reply in read)
        calling = [reply for reply in read if reply.calls]
        return {
            "requests": len(found),
            "unread": len(found) - len(read),
            "calls": sum(reply.calls for reply in read),
            "unknown_tools": sum(reply.unknown_tools for reply in read),
            "arguments": arguments,
            "unknown_names": names,
            "unsupported_values": values,
            "hallucination_rate": (names + values) / arguments if arguments else None,
            "reply_hallucination_rate": (
                sum(bool(reply.hallucinated) for reply in calling) / len(calling) if calling else None
            ),
            "hallucinated": [[] if reply is None else reply.hallucinated for reply in found],
        }


# ---------------------------------------------------------------------------------------------------------------------
# Calls against schemas
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class _Verdict:
    """What is invented in one reply; places are JSON pointers with the number of the call in front."""

    calls: int = 0
    unknown_tools: int = 0
    arguments: int = 0
    unknown: list[str] = field(default_factory=list)
    unsupported: list[str] = field(default_factory=list)
    hallucinated: list[str] = field(default_factory=list)

    def count(self, place: str, kind: list[str] | None = None) -> None:
        """Count an argument; `kind` is the list of its fault."""
        self.arguments += 1
        if kind is not None:
            kind.append(place)
            self.hallucinated.append(place)


def _judge_reply(text: str | None, schemas: dict[str, Any], said: "_Said") -> _Verdict | None:
    """Judge the calls of a reply; None where the text lists none."""
    calls = _calls(text)
    if calls is None:
        return None
    verdict = _Verdict(calls=len(calls))
    for number, call in enumerate(calls):
        if call["name"] in schemas:
            judge = _Judge(schemas[call["name"]], said, verdict)
            try:
                judge.value(call["arguments"], [judge.root], f"/{number}")
            except RecursionError:
                return None  # nested more deeply than can be judged
        else:
            verdict.unknown_tools += 1
            for name in call["arguments"]:
                verdict.count(_below(f"/{number}", name), verdict.unknown)
    return verdict


class _Judge:
    """Judges the arguments of a call.

    Args:
        root: the tool's schema, in which references are looked up.
        said: what the conversation says.
        verdict: what is counted is added to.
    """

    def __init__(self, root: Any, said: "_Said", verdict: _Verdict) -> None:
        self.root = root
        self.said = said
        self.verdict = verdict

    def value(self, value: Any, schemas: list[Any], place: str) -> None:
        """Judge a value and all in it, given the schemas that are about it."""
        views = [view for schema in schemas for view in self.views(schema, frozenset())]
        if any(_key(value) in _listed(view) for view in views):
            for leaf in _leaves(value, place):
                self.verdict.count(leaf)
        elif isinstance(value, dict):
            for name, inner in value.items():
                self.member(name, inner, views, _below(place, name))
        elif isinstance(value, list):
            for index, item in enumerate(value):
                self.value(item, _item_schemas(views, index), _below(place, str(index)))
        else:
            supported = _is_of_type(value, views) or self.said.supports(value)
            self.verdict.count(place, None if supported else self.verdict.unsupported)

    def member(self, name: str, value: Any, views: list[dict[str, Any]], place: str) -> None:
        """Judge a property of an object."""
        declared, free = _property_schemas(views, name)
        if not declared and free is None:
            self.verdict.count(place, self.verdict.unknown)
        elif not declared and not self.said.supports(name):
            # Where names are free they are content, as values are.
            self.verdict.count(place, self.verdict.unsupported)
        else:
            self.value(value, declared or free or [], place)

    def views(self, schema: Any, seen: frozenset[str]) -> Iterator[dict[str, Any]]:
        """A schema and those that it is put together of, references followed once."""
        if not isinstance(schema, dict):
            return
        yield schema
        for keyword in ("allOf", "anyOf", "oneOf"):
            for part in schema.get(keyword) or []:
                yield from self.views(part, seen)
        for keyword in ("then", "else"):
            yield from self.views(schema.get(keyword), seen)
        reference = schema.get("$ref")
        if isinstance(reference, str) and reference not in seen:
            yield from self.views(self.resolved(reference), seen | {reference})

    def resolved(self, reference: str) -> Any:
        """What a local reference names; None where that is nothing."""
        found = self.root
        for step in reference.removeprefix("#").split("/")[1:]:
            name = step.replace("~1", "/").replace("~0", "~")
            found = found.get(name) if isinstance(found, dict) else None
        return found if reference.startswith("#") else None


def _property_schemas(views: list[dict[str, Any]], name: str) -> tuple[list[Any], list[Any] | None]:
    """The schemas that declare a property, and those of freely named ones; None where names are not free."""
    declared = [view["properties"][name] for view in views if name in (view.get("properties") or {})]
    for view in views:
        patterns = view.get("patternProperties") or {}
        declared += [schema for pattern, schema in patterns.items() if _matches(pattern, name)]
    if any(view.get("additionalProperties") is False for view in views):
        return declared, None
    opened = [view["additionalProperties"] for view in views if view.get("additionalProperties")]
    if opened or not any(view.get("properties") or view.get("patternProperties") for view in views):
        return declared, opened
    return declared, None


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.search(pattern, name) is not None
    except re.error:
        return False  # of another dialect; the name is then judged by the other keywords


def _item_schemas(views: list[dict[str, Any]], index: int) -> list[Any]:
    """The schemas that are about an item of an array."""
    found = []
    for view in views:
        first = view.get("prefixItems") or []
        if index < len(first):
            found.append(first[index])
        elif "items" in view:
            found.append(view["items"])
    return found


def _listed(view: dict[str, Any]) -> set[Hashable]:
    """Keys of the values that a schema names itself."""
    values = [*(view.get("enum") or []), *(view[keyword] for keyword in ("const", "default") if keyword in view)]
    return {_key(value) for value in values}


def _is_of_type(value: Any, views: list[dict[str, Any]]) -> bool:
    """Whether a value is a boolean or null where the schema's type is that: it names all values there are."""
    wanted = "null" if value is None else "boolean" if isinstance(value, bool) else ""
    return any(wanted in ([kind] if isinstance(kind := view.get("type"), str) else kind or []) for view in views)


def _leaves(value: Any, place: str) -> Iterator[str]:
    """Places of the values without members."""
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for name, inner in pairs:
            yield from _leaves(inner, _below(place, str(name)))
    else:
        yield place


def _below(place: str, name: str) -> str:
    return f"{place}/{name.replace('~', '~0').replace('/', '~1')}"


def _key(value: Any) -> Hashable:
    """Something hashable that is equal exactly for equal JSON values."""
    if isinstance(value, dict):
        return ("object", frozenset((name, _key(inner)) for name, inner in value.items()))
    if isinstance(value, list):
        return ("array", tuple(_key(inner) for inner in value))
    if isinstance(value, bool) or value is None:
        return ("literal", str(value))
    return ("text", value) if isinstance(value, str) else ("number", value)


# ---------------------------------------------------------------------------------------------------------------------
# Text in one form
# ---------------------------------------------------------------------------------------------------------------------

_UNITS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_SMALL = {word: value for value, word in enumerate(_UNITS)}
_SMALL |= {word: 10 * value for value, word in enumerate(_TENS, 2)}
# Not "second", which is mostly a unit of time.
_ORDINALS = {"first": 1, "third": 3, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8, "ninth": 9}
_SMALL |= _ORDINALS | {"tenth": 10, "eleventh": 11, "twelfth": 12}
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
_WORD = "|".join([*_SMALL, *_SCALES])
_SPOKEN = re.compile(rf"\b(?:{_WORD})\b(?:(?:\s+and\s+|[\s-]+)(?:{_WORD})\b)*")
_SCALED = re.compile(rf"(\d+(?:\.\d+)?)\s*({'|'.join(_SCALES)})\b")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_ORDINAL = re.compile(r"(?<=\d)(?:st|nd|rd|th)\b")
_TOKEN = re.compile(r"\d+(?:\.\d+)?|[^\W\d_]+")
_ARTICLE = re.compile(r"\b(?:an?|the)\b")
# Words that mean a number without being its name.
_COUNTS = {
    "once": "1", "single": "1", "twice": "2", "double": "2", "couple": "2", "pair": "2", "both": "2",
    "triple": "3", "dozen": "12", "half": "0.5", "quarter": "0.25",
}  # fmt: skip
_YES = frozenset(["true", "yes", "on", "enable", "enabled", "with", "include", "including", "allow", "allowed"])
_NO = frozenset(["false", "no", "not", "off", "disable", "disabled", "without", "exclude", "excluding", "never", "don"])


def _plain(text: str) -> str:
    """Text in small letters, without accents, with all numbers in digits and no ordinals."""
    parts = unicodedata.normalize("NFKD", text.casefold())
    text = "".join(part for part in parts if not unicodedata.combining(part)).replace("’", "'")
    text = _ORDINAL.sub("", _THOUSANDS.sub("", text))
    text = _SCALED.sub(lambda match: _number(Decimal(match[1]) * _SCALES[match[2]]), text)
    return _SPOKEN.sub(lambda match: " ".join(map(str, _spoken(re.split(r"[\s-]+", match[0])))), text)


def _spoken(words: list[str]) -> list[int]:
    """The numbers that number words say; a word that cannot go on with one begins the next."""
    numbers: list[int] = []
    total = 0
    part: int | None = None
    for word in words:
        if word == "and":
            continue
        if word in _SCALES:
            scaled = (1 if part is None else part) * _SCALES[word]
            total, part = (total, scaled) if word == "hundred" else (total + scaled, None)
        elif part is None or (part and part % 100 == 0) or (part % 100 >= 20 and part % 10 == 0 and _SMALL[word] < 10):
            part = (part or 0) + _SMALL[word]
        else:
            numbers.append(total + part)
            total, part = 0, _SMALL[word]
    return [*numbers, total + (part or 0)]


def _words(plain: str) -> list[str]:
    """The words and numbers of a plain text, without articles, words in the singular."""
    tokens = _TOKEN.findall(_ARTICLE.sub(" ", plain))
    return [_digits(token) if token[0].isdecimal() else _singular(token) for token in tokens]


def _singular(word: str) -> str:
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and re.search(r"(?:s|x|z|ch|sh)es$", word):
        return word[:-2]
    return word[:-1] if len(word) > 3 and re.search(r"[^su]s$", word) else word


def _digits(text: str) -> str:
    """A number without zeros that say nothing."""
    whole, _, rest = text.partition(".")
    rest = rest.rstrip("0")
    return (whole.lstrip("0") or "0") + (f".{rest}" if rest else "")


def _number(value: Decimal) -> str:
    """A number in digits, as `_digits` writes it."""
    if not value.is_finite() or abs(value.adjusted()) > 40:
        return str(value)  # too long to be said in digits
    digits = _digits(format(abs(value), "f"))
    return f"-{digits}" if value < 0 else digits


# ---------------------------------------------------------------------------------------------------------------------
# Dates and times
# ---------------------------------------------------------------------------------------------------------------------

_Date = tuple[int | None, int, int | None]
"""Year, month, day; None where it is not said."""

_NAMES = [
    "january", "february", "march", "april", "may", "june", "july", "august", "september", "october", "november",
    "december",
]  # fmt: skip
_MONTHS = {name: number for number, name in enumerate(_NAMES, 1)}
_MONTHS |= {name[:3]: number for name, number in _MONTHS.items()} | {"sept": 9}
_MONTH = rf"({'|'.join(_MONTHS)})\b\.?"
_YMD = re.compile(r"(?<!\d)(\d{4})[-/.](\d{1,2})[-/.](\d{1,2})(?!\d)")
_NUMERIC = re.compile(r"(?<![\d/.-])(\d{1,2})[-/.](\d{1,2})[-/.](\d{4}|\d{2})(?!\d)")
_MONTH_DAY = re.compile(rf"\b{_MONTH}\s*(?:the\s+)?(\d{{1,2}})\b(?!:)(?:,?\s+(\d{{4}})\b)?")
_DAY_MONTH = re.compile(rf"\b(\d{{1,2}})\s+(?:of\s+)?{_MONTH}(?:,?\s+(\d{{4}})\b)?")
_MONTH_YEAR = re.compile(rf"\b{_MONTH},?\s+(?:of\s+)?(\d{{4}})\b")
_TWELVE = re.compile(r"(?<![\d:])(\d{1,2})(?::(\d{2}))?(?::\d{2})?\s*([ap])\.?m\b\.?")
_CLOCK = re.compile(r"(?<![\d:])(\d{1,2}):(\d{2})(?::\d{2}(?:\.\d+)?)?(?![\d:])")
_O_CLOCK = re.compile(r"(?<![\d:])(\d{1,2})()\s*o'?\s?clock\b")
_NAMED_TIMES = {"noon": 720, "midday": 720, "midnight": 0}
# What may stand beside a date or a time without saying more.
_BESIDE = re.compile(r"\b(?:t|z|utc|gmt|at|on|(?:mon|tues|wednes|thurs|fri|satur|sun)day)\b|[\W_]")


def _dates(plain: str) -> tuple[list[set[_Date]], str]:
    """The dates of a plain text, each with all its readings, and the text without them."""
    found: list[set[_Date]] = []

    def note(*readings: _Date) -> str:
        found.append({(y, m, d) for y, m, d in readings if 1 <= m <= 12 and (d is None or 1 <= d <= 31)})
        return " "

    def numeric(match: re.Match[str]) -> str:
        one, other, year = int(match[1]), int(match[2]), int(match[3]) + (2000 if len(match[3]) == 2 else 0)
        return note((year, one, other), (year, other, one))

    def named(match: re.Match[str], month: int, day: int | None, year: int) -> str:
        said = match[year]
        return note((int(said) if said else None, _MONTHS[match[month]], int(match[day]) if day else None))

    rest = _YMD.sub(lambda match: note((int(match[1]), int(match[2]), int(match[3]))), plain)
    rest = _NUMERIC.sub(numeric, rest)
    rest = _MONTH_DAY.sub(lambda match: named(match, 1, 2, 3), rest)
    rest = _DAY_MONTH.sub(lambda match: named(match, 2, 1, 3), rest)
    rest = _MONTH_YEAR.sub(lambda match: named(match, 1, None, 2), rest)
    return [readings for readings in found if readings], rest


def _times(plain: str) -> tuple[list[set[int]], str]:
    """The times of a plain text in minutes, each with all its readings, and the text without them."""
    found: list[set[int]] = []

    def twelve(match: re.Match[str]) -> str:
        found.append({(int(match[1]) % 12 + (12 if match[3] == "p" else 0)) * 60 + int(match[2] or 0)})
        return " "

    def clock(match: re.Match[str]) -> str:
        minutes = int(match[1]) * 60 + int(match[2] or 0)
        # Half past seven may be in the evening; 07:30 may not.
        both = match[1][0] != "0" and int(match[1]) <= 12
        found.append({minutes % 720, minutes % 720 + 720} if both else {minutes})
        return " "

    rest = _O_CLOCK.sub(clock, _CLOCK.sub(clock, _TWELVE.sub(twelve, plain)))
    for name, minutes in _NAMED_TIMES.items():
        if re.search(rf"\b{name}\b", rest):
            found.append({minutes})
            rest = re.sub(rf"\b{name}\b", " ", rest)
    return found, rest


# ---------------------------------------------------------------------------------------------------------------------
# What was said
# ---------------------------------------------------------------------------------------------------------------------


class _Said:
    """What a conversation says, in the forms in which values are looked for.

    Args:
        texts: its texts.
    """

    def __init__(self, texts: list[str]) -> None:
        self.plain = [_plain(text) for text in texts]
        words = [_words(plain) for plain in self.plain]
        self.runs = "\n".join(f" {' '.join(text)} " for text in words)
        self.single = {word for text in words for word in text}
        self.dates = [date for plain in self.plain for readings in _dates(plain)[0] for date in readings]
        self.times = {time for plain in self.plain for readings in _times(plain)[0] for time in readings}
        self.numbers = self._numbers()

    def _numbers(self) -> set[str]:
        """All numbers in digits."""
        found = {word for word in self.single if word[0].isdecimal()}
        found |= {_COUNTS[word] for word in self.single & _COUNTS.keys()}
        # "may" by itself is mostly no month.
        named = self.single.intersection(_NAMES) - {"may"}
        found |= {str(month) for _, month, _ in self.dates} | {str(_MONTHS[name]) for name in named}
        found |= {str(part) for time in self.times for part in divmod(time, 60)}
        for plain in self.plain:
            for sign in re.finditer(r"(?:(?<![\w)])[-−–]|\b(?:minus|negative)\s+)\s?(\d+(?:\.\d+)?)", plain):
                found.add(f"-{_digits(sign[1])}")
            for power in re.finditer(r"\d+(?:\.\d+)?e[-+]?\d{1,3}\b", plain):
                found.add(_number(Decimal(power[0])))
            for percent in re.finditer(r"(\d+(?:\.\d+)?)\s*(?:%|percent\b|per cent\b)", plain):
                found.add(_number(Decimal(percent[1]) / 100))
            for short in re.finditer(r"(\d+(?:\.\d+)?)(k|m|bn)\b", plain):
                found.add(_number(Decimal(short[1]) * {"k": 10**3, "m": 10**6, "bn": 10**9}[short[2]]))
            for whole, part in re.findall(r"(\d{1,9})\s?/\s?(\d{1,9})", plain):
                found |= {_number(Decimal(whole) / Decimal(part))} if int(part) else set()
        return found

    def supports(self, value: Any) -> bool:
        """Whether a value without members was said in some form."""
        if value is None:
            return False
        if isinstance(value, bool):
            return bool(self.single & (_YES if value else _NO))
        if isinstance(value, str):
            return self.supports_text(value)
        return _number(Decimal(value)) in self.numbers

    def supports_text(self, text: str) -> bool:
        """Whether a text was said: at one stretch, as a number, date or time, or part by part where it is a list."""
        if self._holds(text):
            return True
        parts = [part for part in re.split(r"[,;|&\n]|\band\b", text) if part.strip()]
        return len(parts) > 1 and all(map(self._holds, parts))

    def _holds(self, text: str) -> bool:
        plain = _plain(text)
        words = _words(plain)
        if not re.search("[a-z0-9]", plain):
            # Signs, and scripts that do not part their words.
            return any(plain.strip() in said for said in ("", *self.plain))
        if not words:  # nothing but articles, such as the mark "A"
            return all(
                any(article in _ARTICLE.findall(said) for said in self.plain) for article in _ARTICLE.findall(plain)
            )
        moment = self._holds_moment(plain)
        if moment is not None:
            return moment
        if f" {' '.join(words)} " in self.runs or plain.strip() in self.numbers:
            return True
        return any(group.issuperset(words) and bool(self.single & group) for group in (_YES, _NO))

    def _holds_moment(self, plain: str) -> bool | None:
        """Whether all parts of a date, a time, or both were said; None where the text is something else."""
        dates, rest = _dates(plain)
        times, rest = _times(rest)
        if (not dates and not times) or _BESIDE.sub("", rest):
            return None
        if dates:
            times = [readings for readings in times if readings != {0}]  # the day's beginning fills in for no time
        said = all(any(map(self._says_date, readings)) for readings in dates)
        return said and all(readings & self.times for readings in times)

    def _says_date(self, date: _Date) -> bool:
        year, month, day = date
        return any(
            month == other_month
            and (day is None or day == other_day)
            and (year is None or year == other_year or (other_year is None and str(year) in self.numbers))
            for other_year, other_month, other_day in self.dates
        )


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def _calls(text: str | None) -> list[dict[str, Any]] | None:
    """The calls that a JSON text lists, None where it is no such list."""
    try:
        # Decimals, so that long numbers are compared as they are written.
        listed = json.loads(
            text or "", parse_float=Decimal, parse_constant=_no_constant, object_pairs_hook=_distinct_names
        )
    except (ValueError, RecursionError):
        return None
    if not isinstance(listed, list):
        return None
    for call in listed:
        if not isinstance(call, dict) or set(call) != {"name", "arguments"}:
            return None
        if not isinstance(call["name"], str) or not isinstance(call["arguments"], dict):
            return None
    return listed


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _distinct_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name occurs twice in an object")
    return dict(pairs)


def _schemas(text: str | None, number: int) -> dict[str, Any]:
    """The schema of each tool of a JSON list, by name."""
    try:
        listed = json.loads(text or "", parse_float=Decimal)
        if not isinstance(listed, list):
            raise TypeError("it is no list")
        functions = [tool["function"] for tool in listed]
        return {function["name"]: function.get("parameters") or {} for function in functions}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"The tools of reply {number} are no JSON list of OpenAI-style tools: {error}.") from error


def _said(text: str | None, number: int) -> _Said:
    """What a JSON list of messages says."""
    try:
        messages = json.loads(text or "")
    except ValueError as error:
        raise ValueError(f"The conversation of reply {number} is no JSON list of messages: {error}.") from error
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"The conversation of reply {number} is no JSON list of messages.")
    return _Said([text for message in messages for text in _texts(message)])


def _texts(value: Any) -> Iterator[str]:
    """All that a message says, results of tools and arguments of earlier calls included."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name not in ("role", "type", "id", "tool_call_id"):
                yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)
    elif value is not None:
        yield str(value)
