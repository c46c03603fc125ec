"""The algebra of JSON Schema: any schema as a union of shapes of one JSON type each.

Takes a schema in draft 2020-12 (see `schema_dialects`) and gives, for any place in it, the shapes that a value there
may have: references resolved, `allOf` merged, `oneOf` made exact, `not` and `if` turned into what they leave over.
What a shape says is exact. Pure Python, no tokens and no text of calls.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import combinations
from typing import Any, NoReturn
from urllib.parse import unquote

from .byte_automata import ByteAutomaton
from .regular_expressions import FORMATS, UnsupportedPatternError, format_automaton, pattern_automaton

# Bounds on hostile schemas: beyond them a tool is refused at once instead of eating time and memory.
MAX_BRANCHES = 64
MAX_CHOICES = 4096
MAX_CHOICE_TEXT = 250_000
MAX_NAME = 10_000
MAX_WORK = 100_000
MAX_TOTAL_STATES = 10_000
# Deeper values in a schema (`const`, `enum`) or deeper checks of them are refused.
MAX_VALUE_DEPTH = 64

JSON_TYPES = ("string", "integer", "number", "boolean", "null", "object", "array")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Keywords that describe and do not constrain. `default` is what omission means, so it asks nothing of the call's text.
_ANNOTATIONS = _words("""
    title description default examples example $schema $id $anchor $comment $defs definitions deprecated readOnly
    writeOnly contentEncoding contentMediaType contentSchema externalDocs xml discriminator
""")
_ASSERTIONS = _words("""
    type enum const $ref allOf anyOf oneOf not if then else properties required additionalProperties patternProperties
    propertyNames minProperties maxProperties dependentRequired dependentSchemas items prefixItems minItems maxItems
    uniqueItems contains minContains maxContains minLength maxLength pattern format minimum maximum exclusiveMinimum
    exclusiveMaximum multipleOf
""")
# Formats of draft 2020-12 that validators may assert and that have no automaton here. Names outside the standard
# (`int32`, `password`, `phone`) assert nothing there, and so nothing here.
_REFUSED_FORMATS = _words("""
    idn-email idn-hostname iri iri-reference uri-reference uri-template json-pointer relative-json-pointer regex
""") - frozenset(FORMATS)


class UnsupportedSchemaError(ValueError):
    """A tool's schema asks for something that cannot be guaranteed.

    Args:
        tool: name of the tool.
        pointer: JSON pointer to the fault inside the tool's `parameters`; empty for the root.
        keyword: the JSON Schema keyword at fault.
        advice: what is wrong and what to do about it.
    """

    def __init__(self, tool: str, pointer: str, keyword: str, advice: str) -> None:
        super().__init__(f"tool {tool!r}, parameters at {pointer or '/'!r}, keyword {keyword!r}: {advice}")
        self.tool = tool
        self.pointer = pointer
        self.keyword = keyword
        self.advice = advice


@dataclass(frozen=True)
class Located:
    """A schema at its place in the document, or its opposite. Two are equal where their places are.

    Args:
        schema: the schema.
        pointer: JSON pointer to it.
        negated: it stands for the values that do not fit the schema.
    """

    schema: Any = field(compare=False)
    pointer: str
    negated: bool = False

    def at(self, *steps: str | int, negated: bool = False) -> "Located":
        """A schema inside this one."""
        schema, pointer = self.schema, self.pointer
        for step in steps:
            schema = schema[step]
            pointer += "/" + escape_pointer(str(step))
        return Located(schema, pointer, negated)


All = tuple[Located, ...]
"""Schemas that a value must fit all at once; none is no demand."""

ANYTHING: All = ()
FREE = Located(True, "#true")
NOTHING = Located(False, "#false")


@dataclass(frozen=True)
class Closed:
    """A finite set of values, by their JSON texts (text tells true from 1)."""

    texts: tuple[str, ...]

    @cached_property
    def values(self) -> tuple[Any, ...]:
        """The values, in the order of their texts."""
        return tuple(json.loads(text) for text in self.texts)

    @cached_property
    def keys(self) -> frozenset[str]:
        """What equal values share."""
        return frozenset(map(value_key, self.values))


@dataclass(frozen=True)
class StringShape:
    """Strings. `patterns`, `formats`: all must match; `not_patterns`: none may; lengths count code points."""

    patterns: frozenset[str] = frozenset()
    not_patterns: frozenset[str] = frozenset()
    formats: frozenset[str] = frozenset()
    min_length: int = 0
    max_length: int | None = None
    excluded: frozenset[str] = frozenset()


@dataclass(frozen=True)
class NumberShape:
    """Numbers. `integer`: True only integral ones, False only others, None all of them."""

    integer: bool | None = None
    minimum: Fraction | None = None
    maximum: Fraction | None = None
    exclusive_minimum: bool = False
    exclusive_maximum: bool = False
    multiples: frozenset[Fraction] = frozenset()
    not_multiples: frozenset[Fraction] = frozenset()
    excluded: frozenset[Fraction] = frozenset()


@dataclass(frozen=True)
class ArrayLayer:
    """What one schema says of the items of an array: `prefix` one by one, then `items` (None: nothing)."""

    prefix: tuple[Located, ...]
    items: Located | None


@dataclass(frozen=True)
class Contains:
    """At least `low` and at most `high` items fit `schema`."""

    schema: Located
    low: int = 1
    high: int | None = None


@dataclass(frozen=True)
class ArrayShape:
    """Arrays."""

    layers: tuple[ArrayLayer, ...] = ()
    min_items: int = 0
    max_items: int | None = None
    unique: bool = False
    contains: tuple[Contains, ...] = ()

    def item(self, index: int) -> All:
        """What an item must fit."""
        found = []
        for layer in self.layers:
            if index < len(layer.prefix):
                found.append(layer.prefix[index])
            elif layer.items is not None:
                found.append(layer.items)
        return conjunction(found)

    @property
    def prefix_length(self) -> int:
        """How many items have a place of their own."""
        return max((len(layer.prefix) for layer in self.layers), default=0)


@dataclass(frozen=True)
class ObjectLayer:
    """What one schema says of the properties of an object.

    Args:
        properties: by name.
        patterns: by pattern of the name.
        additional: of the others; None where the schema does not say.
    """

    properties: Mapping[str, Located] = field(hash=False)
    patterns: Mapping[str, Located] = field(hash=False)
    additional: Located | None

    def named(self, name: str) -> list[Located]:
        """What the layer asks of one property."""
        found = [self.properties[name]] if name in self.properties else []
        for pattern, schema in self.patterns.items():
            if pattern_automaton(pattern).accepts(name.encode()):
                found.append(schema)
        return found or ([self.additional] if self.additional is not None else [])


@dataclass(frozen=True)
class ObjectShape:
    """Objects. `implied`: pairs (name, names that must stand beside it); `names`: schemas of all property names."""

    layers: tuple[ObjectLayer, ...] = ()
    required: frozenset[str] = frozenset()
    implied: frozenset[tuple[str, frozenset[str]]] = frozenset()
    names: tuple[Located, ...] = ()
    min_properties: int = 0
    max_properties: int | None = None

    def named(self, name: str) -> All:
        """What a property must fit."""
        return conjunction(schema for layer in self.layers for schema in layer.named(name))

    @property
    def declared(self) -> list[str]:
        """Names with a schema of their own, in schema order, and those that others or nothing makes required."""
        named = dict.fromkeys(name for layer in self.layers for name in layer.properties)
        asked = self.required.union(*(others for _, others in self.implied))
        return list(named | dict.fromkeys(sorted(asked - named.keys())))


Shape = Closed | StringShape | NumberShape | ArrayShape | ObjectShape

NULL = Closed(("null",))
BOOLEAN = Closed(("true", "false"))
_OF_TYPE: dict[str, Shape] = {
    "string": StringShape(),
    "integer": NumberShape(integer=True),
    "number": NumberShape(),
    "boolean": BOOLEAN,
    "null": NULL,
    "object": ObjectShape(),
    "array": ArrayShape(),
}
ANY_SHAPES = tuple(_OF_TYPE[name] for name in ("string", "number", "boolean", "null", "object", "array"))


def conjunction(schemas: Iterable[Located]) -> All:
    """All of some schemas, each once."""
    return tuple(dict.fromkeys(schemas))


def escape_pointer(name: str) -> str:
    """One step of a JSON pointer (RFC 6901)."""
    return name.replace("~", "~0").replace("/", "~1")


def value_key(value: Any) -> str:
    """A text that values have in common which are equal in JSON Schema: 1 is 1.0, true is not 1."""
    return json.dumps(with_plain_numbers(value), sort_keys=True)


def with_plain_numbers(value: Any) -> Any:
    """A value with integral floats as ints, so that equal values have equal texts."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [with_plain_numbers(item) for item in value]
    if isinstance(value, dict):
        return {name: with_plain_numbers(item) for name, item in value.items()}
    return value


class Algebra:
    """Shapes of the places in one document; remembers what it has worked out.

    Args:
        tool: name of the tool, for errors.
        root: the document, in draft 2020-12.
    """

    def __init__(self, tool: str, root: Any) -> None:
        self.tool = tool
        self.root = root
        self.work = 0
        self.states = 0
        self.place = ""
        self._automata: set[ByteAutomaton] = set()
        self._known: dict[Located, list[Shape]] = {}
        self._open: list[Located] = []

    def refuse(self, pointer: str, keyword: str, advice: str) -> NoReturn:
        """Raise the error of this tool."""
        raise UnsupportedSchemaError(self.tool, pointer, keyword, advice)

    def count(self, steps: int) -> None:
        """Count work, and refuse a schema that takes too much."""
        self.work += steps
        if self.work > MAX_WORK:
            self.refuse(self.place, "schema", f"more than {MAX_WORK} steps to work it out: simplify it.")

    def count_states(self, automaton: ByteAutomaton, pointer: str, keyword: str) -> ByteAutomaton:
        """Count the states of an automaton once, and refuse a tool that needs too many."""
        if automaton not in self._automata:
            self._automata.add(automaton)
            self.states += len(automaton.accepting)
        if self.states > MAX_TOTAL_STATES:
            advice = f"the values of the tool need automata of more than {MAX_TOTAL_STATES} states: ask for less."
            self.refuse(pointer, keyword, advice)
        return automaton

    # ------------------------------------------------------------------------------------------------ shapes of places

    def shapes(self, schemas: All) -> list[Shape]:
        """The shapes of the values that fit all of some schemas; none where no value does."""
        result: list[Shape] = list(ANY_SHAPES)
        for located in schemas:
            result = self.both(result, self.of(located), located)
        return result

    def of(self, located: Located) -> list[Shape]:
        """The shapes of one schema, or of its opposite."""
        if located not in self._known:
            self.place = located.pointer
            self.count(1)
            if located in self._open:
                self.refuse(located.pointer, "$ref", "it refers to itself with nothing in between: remove the circle.")
            self._open.append(located)
            try:
                self._known[located] = self._opposite(located) if located.negated else self._of(located)
            except RecursionError:
                self.refuse(located.pointer, "schema", "combinators are nested too deeply: flatten the schema.")
            finally:
                self._open.pop()
        return self._known[located]

    def both(self, one: Sequence[Shape], other: Sequence[Shape], located: Located) -> list[Shape]:
        """Shapes of the values that have a shape of each list."""
        if list(other) == list(ANY_SHAPES):
            return list(one)
        if list(one) == list(ANY_SHAPES):
            return self._bounded(list(other), located)
        self.count(len(one) * len(other))
        merged = dict.fromkeys(shape for a in one for b in other if (shape := self.merge(a, b)) is not None)
        return self._bounded(list(merged), located)

    def _bounded(self, shapes: list[Shape], located: Located) -> list[Shape]:
        if len(shapes) > MAX_BRANCHES:
            self.refuse(located.pointer, "anyOf", f"more than {MAX_BRANCHES} alternatives for one value: use fewer.")
        return shapes

    # ------------------------------------------------------------------------------------------------------- a schema

    def _of(self, located: Located) -> list[Shape]:
        schema = located.schema
        if isinstance(schema, bool):
            return list(ANY_SHAPES) if schema else []
        if not isinstance(schema, Mapping):
            self.refuse(located.pointer, "schema", f"a schema is a JSON object, not {type(schema).__name__}.")
        for word in schema:
            if word not in _ASSERTIONS and word not in _ANNOTATIONS and not str(word).startswith("x-"):
                self.refuse(located.pointer, str(word), "not a keyword that can be guaranteed: remove it.")
        name = schema.get("$id")
        if located.pointer and isinstance(name, str) and not name.startswith("#") and _mentions(schema, "$ref"):
            self.refuse(located.pointer, "$id", "it starts a document of its own, whose references are not followed.")
        result = self._typed(located)
        if "enum" in schema or "const" in schema:
            result = self.both(result, self._listed(located), located)
        if "$ref" in schema:
            result = self.both(result, self.of(self.target(located)), located)
        for part in self._parts(located, "allOf"):
            result = self.both(result, self.of(part), located)
        if "anyOf" in schema:
            parts = _merged_values(shape for part in self._parts(located, "anyOf") for shape in self.of(part))
            result = self.both(result, self._bounded(parts, located), located)
        if "oneOf" in schema:
            result = self.both(result, self._exactly_one(located), located)
        if "not" in schema:
            result = self.both(result, self.of(located.at("not", negated=True)), located)
        if "if" in schema:
            result = self.both(result, self._conditional(located), located)
        for name in self._mapping(located, "dependentSchemas"):
            dependent = located.at("dependentSchemas", name)
            without = [shape for shape in ANY_SHAPES if shape != ObjectShape()] + [_without(name)]
            result = self.both(result, [*without, *self._with(name, self.of(dependent))], located)
        return result

    def _typed(self, located: Located) -> list[Shape]:
        """Shapes by `type` and the keywords that belong to one type."""
        names = self.types(located)
        shapes: list[Shape] = []
        for name in names:
            if name == "string":
                shapes.append(self._string(located))
            elif name in ("integer", "number"):
                shapes.append(self._number(located, name))
            elif name == "array":
                shapes.append(self._array(located))
            elif name == "object":
                shapes.append(self._object(located))
            else:
                shapes.append(_OF_TYPE[name])
        return [shape for shape in shapes if _possible_alone(shape)]

    def types(self, located: Located) -> list[str]:
        """The JSON types that `type` allows, all where it is absent; `integer` only without `number`."""
        if "type" not in located.schema:
            return ["string", "number", "boolean", "null", "object", "array"]
        kind = located.schema["type"]
        names = [kind] if isinstance(kind, str) else kind
        if not isinstance(names, Sequence) or not names or any(name not in JSON_TYPES for name in names):
            self.refuse(located.pointer, "type", f"{kind!r} is not supported: use one of {', '.join(JSON_TYPES)}.")
        return [name for name in dict.fromkeys(names) if name != "integer" or "number" not in names]

    def _string(self, located: Located) -> StringShape:
        pattern, form = located.schema.get("pattern"), located.schema.get("format")
        patterns, formats = set(), set()
        if pattern is not None:
            self.pattern(located, "pattern", pattern)
            patterns.add(pattern)
        if isinstance(form, str) and form in FORMATS:
            formats.add(form)
        elif form is not None and (not isinstance(form, str) or form in _REFUSED_FORMATS):
            self.refuse(located.pointer, "format", f"{form!r} is not guaranteed: use {', '.join(sorted(FORMATS))}.")
        low, high = self._count(located, "minLength"), self._count(located, "maxLength")
        return StringShape(frozenset(patterns), frozenset(), frozenset(formats), low or 0, high)

    def pattern(self, located: Located, keyword: str, pattern: Any) -> ByteAutomaton:
        """The automaton of a pattern, refused in the words of the schema."""
        if not isinstance(pattern, str):
            self.refuse(located.pointer, keyword, f"a pattern is a string, not {pattern!r}.")
        try:
            return self.count_states(pattern_automaton(pattern), located.pointer, keyword)
        except UnsupportedPatternError as error:
            self.refuse(located.pointer, keyword, f"{error}")

    def _number(self, located: Located, name: str) -> NumberShape:
        bounds = {word: self._fraction(located, word) for word in ("minimum", "maximum", "multipleOf")}
        over, under = self._fraction(located, "exclusiveMinimum"), self._fraction(located, "exclusiveMaximum")
        step = bounds["multipleOf"]
        if step is not None and step <= 0:
            self.refuse(located.pointer, "multipleOf", f"{located.schema['multipleOf']!r} is not above zero.")
        shape = NumberShape(
            True if name == "integer" else None,
            bounds["minimum"],
            bounds["maximum"],
            multiples=frozenset() if step is None else frozenset({step}),
        )
        shape = _tighter(shape, NumberShape(minimum=over, exclusive_minimum=over is not None))
        return _tighter(shape, NumberShape(maximum=under, exclusive_maximum=under is not None))

    def _fraction(self, located: Located, word: str) -> Fraction | None:
        value = located.schema.get(word)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.refuse(located.pointer, word, f"{value!r} is not a number.")
        try:
            # A float stands for the decimal that the schema's author wrote: 0.01 is one hundredth.
            return Fraction(repr(value)) if isinstance(value, float) else Fraction(value)
        except (ValueError, OverflowError):
            self.refuse(located.pointer, word, f"{value!r} is not a finite number.")

    def _array(self, located: Located) -> ArrayShape:
        schema = located.schema
        if "prefixItems" in schema and not isinstance(schema["prefixItems"], Sequence):
            self.refuse(located.pointer, "prefixItems", "prefixItems is a list of schemas.")
        prefix = tuple(located.at("prefixItems", index) for index in range(len(schema.get("prefixItems", ()))))
        layer = ArrayLayer(prefix, located.at("items") if "items" in schema else None)
        contains = []
        if "contains" in schema:
            low, high = self._count(located, "minContains"), self._count(located, "maxContains")
            contains.append(Contains(located.at("contains"), 1 if low is None else low, high))
        if not isinstance(schema.get("uniqueItems", False), bool):
            self.refuse(located.pointer, "uniqueItems", "uniqueItems is true or false.")
        low, high = self._count(located, "minItems"), self._count(located, "maxItems")
        if high is not None and high < (low or 0):
            self.refuse(located.pointer, "maxItems", f"maxItems {high} is below minItems {low}: no array fits.")
        return ArrayShape(
            (layer,) if prefix or layer.items is not None else (),
            low or 0,
            high,
            bool(schema.get("uniqueItems")),
            tuple(contains),
        )

    def _object(self, located: Located) -> ObjectShape:
        schema = located.schema
        properties = {name: located.at("properties", name) for name in self._mapping(located, "properties")}
        patterns = {}
        for pattern in self._mapping(located, "patternProperties"):
            self.pattern(located, "patternProperties", pattern)
            patterns[pattern] = located.at("patternProperties", pattern)
        for name in properties:
            if len(name) > MAX_NAME:
                self.refuse(located.pointer, "properties", f"a name has more than {MAX_NAME} characters: shorten it.")
            self.text(name, located.pointer, "properties")
        additional = located.at("additionalProperties") if "additionalProperties" in schema else None
        implied = []
        for name in self._mapping(located, "dependentRequired"):
            others = self._names(located, schema["dependentRequired"][name], "dependentRequired")
            implied.append((name, frozenset(others)))
        names = (located.at("propertyNames"),) if "propertyNames" in schema else ()
        layer = ObjectLayer(properties, patterns, additional)
        return ObjectShape(
            (layer,) if properties or patterns or additional is not None else (),
            frozenset(self._names(located, schema.get("required", []), "required")),
            frozenset(implied),
            names,
            self._count(located, "minProperties") or 0,
            self._count(located, "maxProperties"),
        )

    def _listed(self, located: Located) -> list[Shape]:
        """The values of `const` and `enum`."""
        schema = located.schema
        listed = schema.get("enum", [None])
        if not isinstance(listed, Sequence) or isinstance(listed, str) or not listed:
            self.refuse(located.pointer, "enum", "an enum is a non-empty list of JSON values.")
        if len(listed) > MAX_CHOICES:
            self.refuse(located.pointer, "enum", f"more than {MAX_CHOICES} values: use a string and check it yourself.")
        keyword = "const" if "const" in schema else "enum"
        values = [schema["const"]] if "const" in schema else listed
        texts = dict.fromkeys(self.text(value, located.pointer, keyword) for value in values)
        if sum(map(len, texts)) > MAX_CHOICE_TEXT:
            self.refuse(located.pointer, keyword, f"more than {MAX_CHOICE_TEXT} characters of values: shorten them.")
        if "const" in schema and "enum" in schema:
            texts = texts if value_key(schema["const"]) in {value_key(value) for value in listed} else {}
        return [Closed(tuple(texts))] if texts else []

    def text(self, value: Any, pointer: str, keyword: str) -> str:
        """The JSON text of a value that stands in the schema."""
        try:
            text = json.dumps(value, ensure_ascii=False, allow_nan=False)
            text.encode()
        except (TypeError, ValueError, RecursionError) as error:
            self.refuse(pointer, keyword, f"a value is not JSON that can be written: {error}.")
        if _depth(value) > MAX_VALUE_DEPTH:
            self.refuse(pointer, keyword, f"a value is nested deeper than {MAX_VALUE_DEPTH} levels.")
        return text

    def target(self, located: Located) -> Located:
        """The schema that a local `$ref` names."""
        reference = located.schema["$ref"]
        own = self.root.get("$id") if isinstance(self.root, Mapping) else None
        if isinstance(reference, str) and isinstance(own, str) and reference.startswith(own):
            reference = reference[len(own) :] or "#"
        if not isinstance(reference, str) or not re.match(r"#(/|$)", reference):
            self.refuse(located.pointer, "$ref", f"{reference!r} is not local: use #/$defs/... or inline the schema.")
        schema, pointer = self.root, ""
        for step in unquote(reference[1:]).split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            try:
                if isinstance(schema, list) and not re.fullmatch("0|[1-9][0-9]*", step):
                    raise IndexError(step)
                schema = schema[int(step)] if isinstance(schema, list) else schema[step]
            except (KeyError, IndexError, ValueError, TypeError):
                self.refuse(located.pointer, "$ref", f"{reference!r} names nothing in the schema: correct it.")
            pointer += "/" + escape_pointer(step)
        return Located(schema, pointer)

    def _exactly_one(self, located: Located) -> list[Shape]:
        """The alternatives of `oneOf`, each without what fits another one."""
        parts = self._parts(located, "oneOf")
        result: list[Shape] = []
        for part in parts:
            shapes = self.of(part)
            for other in parts:
                if other != part and any(self.overlap(a, b) for a in shapes for b in self.of(other)):
                    shapes = self.both(shapes, self.of(replace(other, negated=True)), located)
            result += shapes
        return self._bounded(list(dict.fromkeys(result)), located)

    def _none_or_several(self, located: Located) -> list[Shape]:
        """What fits none of the alternatives of `oneOf`, or two of them."""
        parts = self._parts(located, "oneOf")
        result = self.shapes(conjunction(replace(part, negated=True) for part in parts))
        for one, other in combinations(parts, 2):
            result += self.both(self.of(one), self.of(other), located)
        return result

    def _conditional(self, located: Located, negated: bool = False) -> list[Shape]:
        """What `if`, `then` and `else` leave over, or what they refuse."""
        result: list[Shape] = []
        for word, condition in (("then", located.at("if")), ("else", located.at("if", negated=True))):
            if word in located.schema:
                branch = self.of(located.at(word, negated=negated))
            else:
                branch = [] if negated else list(ANY_SHAPES)
            if "then" in located.schema or "else" in located.schema:
                result += self.both(self.of(condition), branch, located)
            elif not negated:
                return list(ANY_SHAPES)
        return self._bounded(list(dict.fromkeys(result)), located)

    def _with(self, name: str, shapes: Iterable[Shape]) -> list[Shape]:
        """Objects among shapes, with a property required."""
        return [replace(shape, required=shape.required | {name}) for shape in shapes if isinstance(shape, ObjectShape)]

    # ------------------------------------------------------------------------------------------------- keyword values

    def _parts(self, located: Located, word: str) -> list[Located]:
        parts = located.schema.get(word, [])
        if not isinstance(parts, Sequence) or isinstance(parts, str) or (word in located.schema and not parts):
            self.refuse(located.pointer, word, f"{word} is a non-empty list of schemas.")
        return [located.at(word, index) for index in range(len(parts))]

    def _mapping(self, located: Located, word: str) -> Mapping[str, Any]:
        value = located.schema.get(word, {})
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            self.refuse(located.pointer, word, f"{word} is a JSON object of schemas.")
        return value

    def _names(self, located: Located, value: Any, word: str) -> list[str]:
        if (
            isinstance(value, str)
            or not isinstance(value, Sequence)
            or not all(isinstance(name, str) for name in value)
        ):
            self.refuse(located.pointer, word, f"{word} is a list of property names.")
        for name in value:
            self.text(name, located.pointer, word)
        return list(value)

    def _count(self, located: Located, word: str) -> int | None:
        value = located.schema.get(word)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            self.refuse(located.pointer, word, f"{value!r} is not a count.")
        return value

    # ------------------------------------------------------------------------------------------------------- opposites

    def _opposite(self, located: Located) -> list[Shape]:
        """Shapes of the values that do not fit a schema: those that break one of its keywords."""
        schema = located.schema
        if isinstance(schema, bool):
            return [] if schema else list(ANY_SHAPES)
        positive = replace(located, negated=False)
        self.of(positive)  # refuses what is malformed
        names = self.types(positive)
        others = ("string", "boolean", "null", "object", "array")
        broken: list[Shape] = [_OF_TYPE[name] for name in others if name not in names]
        if "number" not in names:
            broken.append(NumberShape(integer=False if "integer" in names else None))
        own: dict[str, Any] = {
            "string": self._breaking_string,
            "number": self._breaking_number,
            "integer": self._breaking_number,
            "array": self._breaking_array,
            "object": self._breaking_object,
        }
        for name in names:
            if name in own:
                broken += own[name](positive)
        if "enum" in schema or "const" in schema:
            broken += self._unlisted(positive)
        if "$ref" in schema:
            broken += self.of(replace(self.target(positive), negated=True))
        for part in self._parts(positive, "allOf"):
            broken += self.of(replace(part, negated=True))
        if "anyOf" in schema:
            broken += self.shapes(tuple(replace(part, negated=True) for part in self._parts(positive, "anyOf")))
        if "not" in schema:
            broken += self.of(positive.at("not"))
        if "oneOf" in schema:
            broken += self._none_or_several(positive)
        if "if" in schema:
            broken += self._conditional(positive, negated=True)
        for name in self._mapping(positive, "dependentSchemas"):
            dependent = positive.at("dependentSchemas", name, negated=True)
            broken += self._with(name, self.of(dependent))
        return self._bounded(list(dict.fromkeys(broken)), located)

    def _breaking_string(self, located: Located) -> list[Shape]:
        shape, result = self._string(located), list[Shape]()
        if shape.formats:
            self.refuse(located.pointer, "format", "its opposite, which `not`, `if` or `oneOf` asks for, is not known.")
        result += [StringShape(not_patterns=frozenset({pattern})) for pattern in sorted(shape.patterns)]
        if shape.min_length:
            result.append(StringShape(max_length=shape.min_length - 1))
        if shape.max_length is not None:
            result.append(StringShape(min_length=shape.max_length + 1))
        return result

    def _breaking_number(self, located: Located) -> list[Shape]:
        shape, result = self._number(located, "number"), list[Shape]()
        if shape.minimum is not None:
            result.append(NumberShape(maximum=shape.minimum, exclusive_maximum=not shape.exclusive_minimum))
        if shape.maximum is not None:
            result.append(NumberShape(minimum=shape.maximum, exclusive_minimum=not shape.exclusive_maximum))
        return result + [NumberShape(not_multiples=frozenset({step})) for step in shape.multiples]

    def _breaking_array(self, located: Located) -> list[Shape]:
        shape, result = self._array(located), list[Shape]()
        if shape.unique:
            self.refuse(
                located.pointer, "uniqueItems", "its opposite, which `not` or `if` asks for, is not guaranteed."
            )
        if shape.min_items:
            result.append(ArrayShape(max_items=shape.min_items - 1))
        if shape.max_items is not None:
            result.append(ArrayShape(min_items=shape.max_items + 1))
        for layer in shape.layers:
            for index, item in enumerate(layer.prefix):
                broken = (*[FREE] * index, replace(item, negated=True))
                result.append(ArrayShape((ArrayLayer(broken, None),), min_items=index + 1))
            if layer.items is not None:
                if layer.prefix:
                    self.refuse(located.pointer, "items", "its opposite behind prefixItems is not guaranteed.")
                result.append(ArrayShape(contains=(Contains(replace(layer.items, negated=True)),)))
        for contains in shape.contains:
            if contains.low != 1 or contains.high is not None:
                self.refuse(located.pointer, "minContains", "its opposite is not guaranteed inside `not` or `if`.")
            result.append(ArrayShape((ArrayLayer((), replace(contains.schema, negated=True)),)))
        return result

    def _breaking_object(self, located: Located) -> list[Shape]:
        shape, result = self._object(located), list[Shape]()
        for layer in shape.layers:
            if layer.patterns or layer.additional is not None:
                word = "patternProperties" if layer.patterns else "additionalProperties"
                self.refuse(located.pointer, word, "its opposite, which `not`, `if` or `oneOf` asks for, is not known.")
            for name, schema in layer.properties.items():
                broken = ObjectLayer({name: replace(schema, negated=not schema.negated)}, {}, None)
                result.append(ObjectShape((broken,), frozenset({name})))
        if shape.names:
            self.refuse(located.pointer, "propertyNames", "its opposite is not guaranteed inside `not` or `if`.")
        result += [_without(name) for name in sorted(shape.required)]
        for name, others in sorted(shape.implied):
            result += [replace(_without(other), required=frozenset({name})) for other in sorted(others)]
        if shape.min_properties:
            result.append(ObjectShape(max_properties=shape.min_properties - 1))
        if shape.max_properties is not None:
            result.append(ObjectShape(min_properties=shape.max_properties + 1))
        return result

    def _unlisted(self, located: Located) -> list[Shape]:
        """Shapes of everything that `const` and `enum` do not list."""
        (listed,) = self._listed(located) or [Closed(())]
        assert isinstance(listed, Closed)
        values = list(listed.values)
        if any(isinstance(value, (dict, list)) and value for value in values):
            self.refuse(located.pointer, "enum", "everything but an object or an array is not guaranteed.")
        numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
        result: list[Shape] = [
            StringShape(excluded=frozenset(value for value in values if isinstance(value, str))),
            NumberShape(excluded=frozenset(Fraction(repr(value)) for value in numbers)),
            ArrayShape(min_items=int([] in values)),
            ObjectShape(min_properties=int({} in values)),
        ]
        left = tuple(text for text in ("true", "false", "null") if text not in listed.texts)
        return result + ([Closed(left)] if left else [])

    # ----------------------------------------------------------------------------------------------------- conjunction

    def merge(self, a: Shape, b: Shape) -> Shape | None:
        """The shape of the values that have both shapes, or None where it is plain that none has."""
        if isinstance(b, Closed) and not isinstance(a, Closed):
            a, b = b, a
        if isinstance(a, Closed):
            self.count(len(a.texts))
            kept = tuple(text for text, value in zip(a.texts, a.values, strict=True) if self.admits(b, value))
            if len(kept) == len(a.texts):
                return a
            return Closed(kept) if kept else None
        merged: Shape
        if isinstance(a, StringShape) and isinstance(b, StringShape):
            merged = StringShape(
                a.patterns | b.patterns,
                a.not_patterns | b.not_patterns,
                a.formats | b.formats,
                max(a.min_length, b.min_length),
                _least(a.max_length, b.max_length),
                a.excluded | b.excluded,
            )
        elif isinstance(a, NumberShape) and isinstance(b, NumberShape):
            if None not in (a.integer, b.integer) and a.integer != b.integer:
                return None
            merged = _tighter(a, b)
        elif isinstance(a, ArrayShape) and isinstance(b, ArrayShape):
            merged = ArrayShape(
                tuple(dict.fromkeys(a.layers + b.layers)),
                max(a.min_items, b.min_items),
                _least(a.max_items, b.max_items),
                a.unique or b.unique,
                tuple(dict.fromkeys(a.contains + b.contains)),
            )
        elif isinstance(a, ObjectShape) and isinstance(b, ObjectShape):
            merged = ObjectShape(
                a.layers + tuple(layer for layer in b.layers if layer not in a.layers),
                a.required | b.required,
                a.implied | b.implied,
                conjunction(a.names + b.names),
                max(a.min_properties, b.min_properties),
                _least(a.max_properties, b.max_properties),
            )
        else:
            return None
        return merged if _possible_alone(merged) else None

    def overlap(self, a: Shape, b: Shape, depth: int = 0) -> bool:
        """Whether a value may have both shapes; True where it is not known."""
        self.count(1)
        merged = self.merge(a, b)
        if not isinstance(merged, ObjectShape) or depth >= 3:
            return merged is not None
        for name in merged.required:
            first, *rest = merged.named(name) or (FREE,)
            candidates = self.of(first)
            for other in rest:
                candidates = [
                    shape
                    for one in candidates
                    for two in self.of(other)
                    if self.overlap(one, two, depth + 1) and (shape := self.merge(one, two)) is not None
                ]
            if not candidates:
                return False
        return True

    # ------------------------------------------------------------------------------------------------ values of shapes

    def fits(self, schemas: All, value: Any) -> bool:
        """Whether a value fits all of some schemas."""
        return all(any(self.admits(shape, value) for shape in self.of(located)) for located in schemas)

    def admits(self, shape: Shape, value: Any) -> bool:
        """Whether a value has a shape."""
        self.count(1)
        if isinstance(shape, Closed):
            return value_key(value) in shape.keys
        if isinstance(shape, StringShape):
            return isinstance(value, str) and _admits_string(shape, value)
        if isinstance(shape, NumberShape):
            return isinstance(value, (int, float)) and not isinstance(value, bool) and _admits_number(shape, value)
        if isinstance(shape, ArrayShape):
            return isinstance(value, list) and self._admits_array(shape, value)
        return isinstance(value, dict) and self._admits_object(shape, value)

    def _admits_array(self, shape: ArrayShape, value: list[Any]) -> bool:
        if not shape.min_items <= len(value) <= _or_infinite(shape.max_items):
            return False
        if shape.unique and len(set(map(value_key, value))) < len(value):
            return False
        for contains in shape.contains:
            count = sum(self.fits((contains.schema,), item) for item in value)
            if not contains.low <= count <= _or_infinite(contains.high):
                return False
        return all(self.fits(shape.item(index), item) for index, item in enumerate(value))

    def _admits_object(self, shape: ObjectShape, value: dict[str, Any]) -> bool:
        if not shape.min_properties <= len(value) <= _or_infinite(shape.max_properties):
            return False
        if not shape.required <= value.keys():
            return False
        if any(name in value and not others <= value.keys() for name, others in shape.implied):
            return False
        return all(self.fits(shape.names, name) and self.fits(shape.named(name), item) for name, item in value.items())


def _merged_values(shapes: Iterable[Shape]) -> list[Shape]:
    """The same alternatives, each once, and all closed sets in one; stops where there are too many."""
    plain, texts = dict[Shape, None](), dict[str, None]()
    for shape in shapes:
        if isinstance(shape, Closed):
            texts |= dict.fromkeys(shape.texts)
        elif len(plain) <= MAX_BRANCHES:
            plain[shape] = None
    return [*plain, *([Closed(tuple(texts))] if texts else [])]


def _without(name: str) -> ObjectShape:
    """Objects that lack a property."""
    return ObjectShape((ObjectLayer({name: NOTHING}, {}, None),))


def _possible_alone(shape: Shape) -> bool:
    """Whether a shape's own bounds leave room; what its schemas leave is not looked at."""
    if isinstance(shape, StringShape):
        return shape.min_length <= _or_infinite(shape.max_length)
    if isinstance(shape, NumberShape) and shape.minimum is not None and shape.maximum is not None:
        if shape.minimum == shape.maximum:
            return not (shape.exclusive_minimum or shape.exclusive_maximum)
        return shape.minimum < shape.maximum
    if isinstance(shape, ArrayShape):
        return shape.min_items <= _or_infinite(shape.max_items)
    if isinstance(shape, ObjectShape):
        least = max(shape.min_properties, len(shape.required))
        return least <= _or_infinite(shape.max_properties)
    return True


def _tighter(a: NumberShape, b: NumberShape) -> NumberShape:
    """Both shapes at once."""
    low, low_open = a.minimum, a.exclusive_minimum
    if b.minimum is not None and (low is None or (b.minimum, b.exclusive_minimum) > (low, low_open)):
        low, low_open = b.minimum, b.exclusive_minimum
    high, high_open = a.maximum, a.exclusive_maximum
    if b.maximum is not None and (high is None or (-b.maximum, b.exclusive_maximum) > (-high, high_open)):
        high, high_open = b.maximum, b.exclusive_maximum
    return NumberShape(
        a.integer if b.integer is None else b.integer,
        low,
        high,
        low_open,
        high_open,
        a.multiples | b.multiples,
        a.not_multiples | b.not_multiples,
        a.excluded | b.excluded,
    )


def _least(a: int | None, b: int | None) -> int | None:
    return min((bound for bound in (a, b) if bound is not None), default=None)


def _or_infinite(bound: int | None) -> float:
    return float("inf") if bound is None else bound


@lru_cache(maxsize=1024)
def _named_automaton(kind: str, name: str) -> ByteAutomaton:
    return format_automaton(name) if kind == "format" else pattern_automaton(name)


def _admits_string(shape: StringShape, value: str) -> bool:
    text = value.encode(errors="surrogatepass")
    return (
        shape.min_length <= len(value) <= _or_infinite(shape.max_length)
        and value not in shape.excluded
        and all(_named_automaton("pattern", name).accepts(text) for name in shape.patterns)
        and not any(_named_automaton("pattern", name).accepts(text) for name in shape.not_patterns)
        and all(_named_automaton("format", name).accepts(text) for name in shape.formats)
    )


def _admits_number(shape: NumberShape, value: int | float) -> bool:
    exact = Fraction(repr(value)) if isinstance(value, float) else Fraction(value)
    if shape.integer is not None and (exact.denominator == 1) != shape.integer:
        return False
    if shape.minimum is not None and (exact < shape.minimum or (exact == shape.minimum and shape.exclusive_minimum)):
        return False
    if shape.maximum is not None and (exact > shape.maximum or (exact == shape.maximum and shape.exclusive_maximum)):
        return False
    return (
        exact not in shape.excluded
        and all((exact / step).denominator == 1 for step in shape.multiples)
        and all((exact / step).denominator != 1 for step in shape.not_multiples)
    )


def _mentions(schema: Any, word: str) -> bool:
    """Whether a keyword stands anywhere in a schema."""
    pending = [schema]
    while pending:
        part = pending.pop()
        if isinstance(part, Mapping):
            if word in part:
                return True
            pending.extend(part.values())
        elif isinstance(part, list | tuple):
            pending.extend(part)
    return False


def _depth(value: Any) -> int:
    """Levels of containers, counted without recursion."""
    deepest, pending = 0, [(value, 0)]
    while pending:
        item, depth = pending.pop()
        deepest = max(deepest, depth)
        if isinstance(item, Mapping):
            pending += [(inner, depth + 1) for inner in item.values()]
        elif isinstance(item, (list, tuple)):
            pending += [(inner, depth + 1) for inner in item]
    return deepest
