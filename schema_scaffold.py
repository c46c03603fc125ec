"""JSON Schema of a tool -> Scaffold: which text of a call is fixed, and which choices are left to a model.

Takes the `parameters` schema of a tool and gives a tree of nodes and the literal texts that may stand between two
values. Pure Python: no tokens, no tensors, no model. What the tree cannot guarantee raises `UnsupportedSchemaError`.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import combinations, pairwise
from typing import Any, Literal, NoReturn
from urllib.parse import quote
from weakref import WeakKeyDictionary

import numpy as np

from .byte_automata import (
    AutomatonTooLarge,
    ByteAutomaton,
    at_least,
    at_most,
    difference,
    finite,
    intersection,
    raw_string_automaton,
)
from .number_automata import integer_automaton, number_automaton
from .regular_expressions import format_automaton, format_max_length, pattern_automaton
from .schema_algebra import (
    MAX_CHOICES,
    NOTHING,
    Algebra,
    All,
    ArrayShape,
    Closed,
    Located,
    NumberShape,
    ObjectShape,
    Shape,
    StringShape,
    UnsupportedSchemaError,
    conjunction,
    with_plain_numbers,
)
from .schema_dialects import normalise_schema

SlotKind = Literal["string", "integer", "number", "choice", "guided"]

# Bounds on hostile schemas: a tool beyond them is refused at once instead of eating time and memory.
MAX_COMPILED = 4096
MAX_PARTS = 200_000
MAX_DEPTH = 32
MAX_LEAVES = 2000
# More patterns than this beside each other cut the names of an object into too many sets.
MAX_KEY_PATTERNS = 4
# A set of names that is not larger is written out as optional properties.
MAX_NAMES = 256
# A part of a schema that is used again is written out again where it is this small, and linked to otherwise.
_INLINE_LEAVES = 32
# Where values must differ, longer strings than this never run out.
_SHORT_LENGTH = 32


@dataclass(frozen=True)
class Leaf:
    """One value that a model chooses.

    Args:
        kind: what its text is: a string, an integer, a number, one of a closed set, or a value that another engine
            guides.
        path: JSON pointer of its schema, for messages and traces.
        quoted: the value is a JSON string whose quotes belong to the fixed text.
        choices: closed set of texts for kind `"choice"`: escaped string contents when `quoted`, whole JSON literals
            otherwise.
        automaton: raw texts of an open kind: contents of strings before escaping, JSON texts of numbers.
        max_length: most characters (code points) of a string.
        distinct: None, or whose like the value must not repeat: 0 the keys of its object, n the items of the array
            that is n containers up.
        guide: JSON text of the schema that guides kind `"guided"`.
    """

    kind: SlotKind
    path: str
    quoted: bool
    choices: tuple[str, ...] = ()
    automaton: ByteAutomaton | None = field(default=None, repr=False)
    max_length: int | None = None
    distinct: int | None = None
    guide: str | None = None

    def value(self, text: str) -> Any:
        """The JSON value of a text of this leaf as it stands in the call (string contents escaped)."""
        return json.loads(f'"{text}"' if self.quoted else text)

    def text(self, value: Any) -> str:
        """The text of a JSON value as it stands in the call; the inverse of `value`."""
        dumped = json.dumps(value, ensure_ascii=False, allow_nan=False)
        return dumped[1:-1] if self.quoted else dumped


@dataclass(frozen=True)
class Property:
    """One declared property of an object."""

    name: str
    node: "Node"
    required: bool


@dataclass(frozen=True)
class Extra:
    """Further properties whose names a model chooses: the set of names, and what stands behind them."""

    key: Leaf
    node: "Node"


@dataclass(frozen=True, eq=False)
class ObjectNode:
    """An object: declared properties in schema order, then extras.

    Args:
        path: JSON pointer of its schema.
        properties: the declared ones.
        extras: kinds of further properties.
        min_properties, max_properties: how many in all.
        implied: pairs (index of a property, indices that must stand beside it).
        reserved: names that no further property may have.
    """

    path: str
    properties: tuple[Property, ...]
    extras: tuple[Extra, ...] = ()
    min_properties: int = 0
    max_properties: int | None = None
    implied: tuple[tuple[int, frozenset[int]], ...] = ()
    reserved: frozenset[str] = frozenset()

    @property
    def constrained(self) -> bool:
        """Whether it matters which properties are present."""
        return bool(self.implied or self.min_properties or self.max_properties is not None)

    @cached_property
    def required(self) -> frozenset[int]:
        """Indices of the properties that are always there."""
        return frozenset(index for index, entry in enumerate(self.properties) if entry.required)

    def possible(self, done: int, present: frozenset[int], count: int) -> bool:
        """Whether the object can still be completed.

        Args:
            done: how many declared properties are decided.
            present: those of them that are written.
            count: properties written, extras included.
        """
        absent = frozenset(range(done)) - present
        needed = self.required.union(present, *(self._needed_beside[index] for index in self.required | present))
        if needed & absent:
            return False
        if self.max_properties is not None and count + len(needed - present) > self.max_properties:
            return False
        if self.extras or count + len(needed - present) >= self.min_properties:
            return True
        free = range(done, len(self.properties))
        return count + sum(not self._needed_beside[index] & absent for index in free) >= self.min_properties

    def least_nodes(self) -> list["Node"]:
        """What stands in the object where everything is left out that may be; of free names any one."""
        needed = self.required.union(*(self._needed_beside[index] for index in self.required))
        lacking = max(0, self.min_properties - len(needed))
        free = [index for index in range(len(self.properties)) if index not in needed]
        nodes = [self.properties[index].node for index in sorted(needed)]
        if lacking and self.extras:
            return nodes + [extra.node for extra in self.extras] * lacking
        return nodes + [self.properties[index].node for index in free[len(free) - lacking :]]

    @cached_property
    def _needed_beside(self) -> tuple[frozenset[int], ...]:
        """What must stand beside each property, directly or by way of others."""
        direct = dict[int, set[int]]()
        for index, others in self.implied:
            direct.setdefault(index, set()).update(others)
        found = []
        for index in range(len(self.properties)):
            needed, pending = set[int](), [index] if index in direct else []
            while pending:
                new = direct.get(pending.pop(), set()) - needed
                needed |= new
                pending += new
            found.append(frozenset(needed))
        return tuple(found)


@dataclass(frozen=True, eq=False)
class ArrayNode:
    """An array.

    Args:
        path: JSON pointer of its schema.
        item: schema of the items behind the prefix; None where there are none.
        min_items, max_items: how many; None means without end.
        prefix: items with a schema of their own.
        match: what at least `min_matches` and at most `max_matches` items (behind the prefix) are; `item` is then
            what the others are.
    """

    path: str
    item: "Node | None"
    min_items: int
    max_items: int | None
    prefix: tuple["Node", ...] = ()
    match: "Node | None" = None
    min_matches: int = 0
    max_matches: int | None = None


@dataclass(eq=False)
class UnionNode:
    """One of several nodes; `shortest` is the one to take where a call has to end."""

    path: str
    branches: tuple["Node", ...]
    shortest: "Node | None" = None


@dataclass(eq=False)
class Link:
    """A node that stands elsewhere too: the target of a recursive reference, or a large part that is used again."""

    path: str
    target: "Node | None" = None


Node = Leaf | ObjectNode | ArrayNode | UnionNode | Link


@dataclass(frozen=True, eq=False)
class Scaffold:
    """A compiled tool.

    Args:
        tool: its name.
        root: the tree of its arguments.
        memo: what others work out for it, by the vocabulary it is worked out for; goes when either goes.
    """

    tool: str
    root: Node
    memo: WeakKeyDictionary[Any, dict[Any, Any]] = field(default_factory=WeakKeyDictionary, repr=False)


# ---------------------------------------------------------------------------------------------------------------------
# Compilation
# ---------------------------------------------------------------------------------------------------------------------


def compile_scaffold(tool: Mapping[str, Any], on_unsupported: str = "error") -> Scaffold:
    """Compile a tool into its scaffold.

    Args:
        tool: OpenAI-style tool, `{"type": "function", "function": {"name", "parameters"}}`; absent parameters mean
            none. The schema may be of any dialect that `schema_dialects` knows.
        on_unsupported: what becomes of a value whose schema cannot be guaranteed here: `"error"` raises, `"ar"` makes
            it a guided leaf, which llguidance constrains while the base writes it.

    Returns:
        The scaffold, the same object for the same tool while it is among the `MAX_COMPILED` last used; every text it
        admits validates against the schema (JSON Schema draft 2020-12).

    Raises:
        UnsupportedSchemaError: the schema is malformed, over a bound, or uses a keyword that is not guaranteed.

    >>> colour = {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"]}
    >>> paint = compile_scaffold({"type": "function", "function": {"name": "paint", "parameters": colour}})
    >>> argument_segments(paint, {"colour": "red"})
    ['{"colour": "', 'red', '"}']
    >>> argument_segments(paint, {"colour": "green"})
    Traceback (most recent call last):
    ValueError: 'green' at /colour does not fit the scaffold.
    """
    function = tool["function"]
    name, parameters = function["name"], function.get("parameters")
    if _is_huge(parameters):
        raise UnsupportedSchemaError(
            name, "", "schema", f"more than {MAX_PARTS} parts, or it holds itself: shorten it."
        )
    try:
        text = json.dumps([on_unsupported, name, parameters])
    except (TypeError, ValueError, RecursionError) as error:
        raise UnsupportedSchemaError(name, "", "schema", f"not JSON that can be written: {error}.") from error
    key = hashlib.sha256(text.encode()).digest()
    known = _compiled.pop(key, None)
    if known is None:
        known = _Compiler(name, _normalised(name, parameters), on_unsupported == "ar").scaffold()
    _compiled[key] = known  # the most recent one stands last
    while len(_compiled) > MAX_COMPILED:
        _compiled.pop(next(iter(_compiled)), None)
    return known


# Scaffolds by the digest of their tool, the least recently used first.
_compiled: dict[bytes, Scaffold] = {}


def _is_huge(parameters: Any) -> bool:
    """Whether a schema has too many parts to be written out; shared ones count wherever they stand."""
    pending, count = [parameters], 0
    while pending and count <= MAX_PARTS:
        part = pending.pop()
        count += 1
        if isinstance(part, Mapping):
            pending.extend(part.values())
        elif isinstance(part, list | tuple):
            pending.extend(part)
    return bool(pending)


def _normalised(tool: str, parameters: Any) -> dict[str, Any]:
    """The parameters in draft 2020-12; absent ones are no arguments."""
    if parameters is None or parameters is True or parameters == {}:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    try:
        return normalise_schema(parameters, tool)[0]
    except ValueError as error:
        raise UnsupportedSchemaError(tool, "", "schema", str(error)) from error


class _Compiler:
    """Builds the tree of one tool; lives for one `compile_scaffold`.

    Args:
        tool: name of the tool.
        schema: its parameters in draft 2020-12.
        guide: whether values that cannot be guaranteed become guided leaves.
    """

    def __init__(self, tool: str, schema: Any, guide: bool) -> None:
        self.tool = tool
        self.schema = schema
        self.guide = guide
        self.algebra = Algebra(tool, schema)
        self.leaves = 0
        self.built: dict[tuple[All, bool], Node | None] = {}
        self.sizes: dict[int, int] = {}
        self.links: dict[tuple[All, bool], Link] = {}
        self.under_way: set[tuple[All, bool]] = set()

    def refuse(self, pointer: str, keyword: str, advice: str) -> NoReturn:
        raise UnsupportedSchemaError(self.tool, pointer, keyword, advice)

    def scaffold(self) -> Scaffold:
        # Arguments without declared properties are no arguments; freely named ones have to be asked for.
        words = set(self.schema) - _EMPTY_OBJECT_WORDS if isinstance(self.schema, Mapping) else {""}
        if not words and not self.schema.get("properties") and not self.schema.get("required"):
            self.schema = {**self.schema, "additionalProperties": False}
        place = Located(self.schema, "")
        if any(not _is_object(shape) for shape in self.algebra.of(place)):
            self.refuse("", "type", "the parameters of a tool are an object: wrap the schema in one.")
        root = self.node((place,), 0, False)
        if root is None:
            self.refuse("", "schema", "no arguments fit the schema: correct it.")
        _Sizes(self).settle(root)
        return Scaffold(self.tool, root)

    # ---------------------------------------------------------------------------------------------------------- nodes

    def node(self, schemas: All, depth: int, distinct: bool) -> Node | None:
        """The node of the values that fit all of some schemas; None where no value does.

        Args:
            schemas: the schemas.
            depth: containers around it.
            distinct: it stands inside an array of unique items, where equal numbers must have equal texts.
        """
        key = (schemas, distinct)
        pointer = schemas[0].pointer if schemas else ""
        if key in self.under_way:
            return self.links.setdefault(key, Link(pointer))
        known = self.built.get(key)
        if known is not None and self.sizes[id(known)] > _INLINE_LEAVES:
            return self.links.setdefault(key, Link(pointer, known))
        if known is None and key in self.built:
            return None
        if depth > MAX_DEPTH:
            self.refuse(pointer, "properties", f"nesting is deeper than {MAX_DEPTH} levels: flatten the schema.")
        before = self.leaves
        if known is not None:
            self.leaves += self.sizes[id(known)]
        else:
            self.leaves += 1
            self.under_way.add(key)
            try:
                known = self.built[key] = self._guarded(schemas, depth, distinct)
            finally:
                self.under_way.discard(key)
            self.sizes[id(known)] = self.leaves - before
            if key in self.links:
                self.links[key].target = known
        if self.leaves > MAX_LEAVES:
            self.refuse(pointer, "properties", f"more than {MAX_LEAVES} values in one tool: split the tool.")
        return known

    def _guarded(self, schemas: All, depth: int, distinct: bool) -> Node | None:
        """The node, or a guided leaf where that is asked for and the schema cannot be guaranteed."""
        try:
            return self._union(schemas, depth, distinct)
        except UnsupportedSchemaError:
            if not self.guide or distinct or len(schemas) != 1 or schemas[0].negated or not schemas[0].pointer:
                raise
            (place,) = schemas
            document = {"$defs": {"parameters": _with_moved_references(self.schema)}}
            document["$ref"] = "#/$defs/parameters" + quote(place.pointer, safe="/~")  # type: ignore[assignment]
            return Leaf("guided", place.pointer, quoted=False, guide=json.dumps(document))

    def _union(self, schemas: All, depth: int, distinct: bool) -> Node | None:
        pointer = schemas[0].pointer if schemas else ""
        shapes = self.algebra.shapes(schemas)
        listed = dict.fromkeys(text for shape in shapes if isinstance(shape, Closed) for text in shape.texts)
        if len(listed) > MAX_CHOICES:
            self.refuse(pointer, "anyOf", f"more than {MAX_CHOICES} values: use a string and check it yourself.")
        branches: list[Node] = []
        for shape in shapes:
            if isinstance(shape, Closed):
                if listed:
                    branches.append(self.closed(list(listed), pointer, distinct))
                    listed = {}
                continue
            branch = self.shape(shape, pointer, depth, distinct)
            if branch is not None:
                branches.append(branch)
        if len(branches) > 1:
            return UnionNode(pointer, tuple(branches))
        return branches[0] if branches else None

    def shape(self, shape: Shape, pointer: str, depth: int, distinct: bool) -> Node | None:
        """The node of one shape, or None where no value has it."""
        if isinstance(shape, StringShape | NumberShape):
            return self.open(shape, pointer, distinct)
        if isinstance(shape, ArrayShape):
            return self.array(shape, pointer, depth, distinct)
        assert isinstance(shape, ObjectShape)
        return self.object(shape, pointer, depth, distinct)

    def open(self, shape: StringShape | NumberShape, pointer: str, distinct: bool) -> Leaf | None:
        most = None
        try:
            if isinstance(shape, StringShape):
                automaton, most = _string_language(shape)
            else:
                automaton = _number_language(shape, distinct)
        except AutomatonTooLarge as error:
            self.refuse(pointer, _word_of(shape), f"the values need an automaton of {error}: ask for less.")
        self.algebra.count_states(automaton, pointer, _word_of(shape))
        kind: SlotKind = "string"
        if isinstance(shape, NumberShape):
            kind = "integer" if shape.integer else "number"
        return None if automaton.empty else Leaf(kind, pointer, kind == "string", (), automaton, most)

    def closed(self, texts: list[str], pointer: str, distinct: bool) -> Leaf:
        if distinct:
            # 1 and 1.0 are one value, and one of them is enough.
            plain = (with_plain_numbers(json.loads(text)) for text in texts)
            texts = list(dict.fromkeys(json.dumps(value, ensure_ascii=False) for value in plain))
        quoted = all(text.startswith('"') for text in texts)
        return Leaf("choice", pointer, quoted, tuple(text[1:-1] if quoted else text for text in texts))

    # -------------------------------------------------------------------------------------------------------- objects

    def object(self, shape: ObjectShape, pointer: str, depth: int, distinct: bool) -> ObjectNode | None:
        properties = []
        free = self._free(shape)
        for name in shape.declared:
            place, required = shape.named(name), name in shape.required
            if not self.algebra.fits(shape.names, name):
                place = (NOTHING,)
            inner = self.node(self._without_null(place, required), depth + 1, distinct)
            if inner is not None:
                properties.append(Property(name, inner, required))
            elif len(place) == 1 and not place[0].negated and not _forbids(place[0].schema, required):
                self.refuse(place[0].pointer, "schema", "no value fits: its keywords contradict each other.")
            elif required:
                return None
        most = shape.max_properties
        wants_more = most is None or most > sum(entry.required for entry in properties)
        extras = self.extras(shape, pointer, depth, distinct) if free and wants_more else ()
        few = [extra for extra in extras if extra.key.automaton is None or extra.key.automaton.strings[0] <= MAX_NAMES]
        extras = tuple(extra for extra in extras if extra not in few)
        few.sort(key=lambda extra: extra.key.automaton is not None)  # listed names stand first
        further = {name: extra.node for extra in few for name in _names_of(extra.key) if name not in shape.declared}
        properties += [Property(name, inner, False) for name, inner in further.items()]
        able = sum(extra.key.automaton.strings[0] for extra in extras if extra.key.automaton is not None)
        if extras and shape.min_properties > len(properties) + able:
            self.refuse(pointer, "minProperties", "fewer names are possible: lower it.")
        number = {entry.name: index for index, entry in enumerate(properties)}
        implied = []
        for name, others in sorted(shape.implied, key=lambda pair: pair[0]):
            if name in number and not others <= number.keys():
                self.refuse(
                    pointer, "dependentRequired", f"{name!r} asks for a property that is forbidden: correct it."
                )
            if name in number:
                implied.append((number[name], frozenset(number[other] for other in others)))
            elif extras:
                self.refuse(pointer, "dependentRequired", f"declare {name!r} under properties.")
        if implied and shape.min_properties and most is not None:
            self.refuse(
                pointer, "dependentRequired", "not guaranteed beside minProperties and maxProperties: drop one."
            )
        if most is not None and most >= len(properties) and not extras:
            most = None
        reserved = frozenset(shape.declared) | number.keys()
        node = ObjectNode(pointer, tuple(properties), extras, shape.min_properties, most, tuple(implied), reserved)
        return node if node.possible(0, frozenset(), 0) else None

    def _free(self, shape: ObjectShape) -> bool:
        """Whether names that are not declared may be written: where the schema says so, or declares none at all."""
        explicit = [layer for layer in shape.layers if layer.additional is not None or layer.patterns]
        return bool(explicit) or not any(layer.properties for layer in shape.layers)

    def _without_null(self, place: All, required: bool) -> All:
        """What an optional property holds: its absence is its null, unless a default gives absence a meaning."""
        if required or any(isinstance(one.schema, Mapping) and one.schema.get("default") is not None for one in place):
            return place
        try:
            shapes = self.algebra.shapes(place)
        except UnsupportedSchemaError:
            return place  # its own node will say so
        if any(shape != _NULL for shape in shapes) and any(isinstance(shape, Closed) for shape in shapes):
            if any(isinstance(one.schema, Mapping) and {"enum", "const"} & one.schema.keys() for one in place):
                return place
            if any(isinstance(shape, Closed) and "null" in shape.texts for shape in shapes):
                return (*place, _NOT_NULL)
        return place

    def extras(self, shape: ObjectShape, pointer: str, depth: int, distinct: bool) -> tuple[Extra, ...]:
        """Kinds of further properties: one for each set of patterns that a name may match."""
        patterns = sorted({pattern for layer in shape.layers for pattern in layer.patterns})
        if len(patterns) > MAX_KEY_PATTERNS:
            self.refuse(pointer, "patternProperties", f"more than {MAX_KEY_PATTERNS} patterns in one object.")
        plain = any(layer.additional is not None for layer in shape.layers) or not patterns
        found = []
        for size in range(len(patterns) + 1):
            for matched in combinations(patterns, size):
                if not matched and not plain:
                    continue
                inner = self.node(self._behind(shape, matched), depth + 1, distinct)
                if inner is None:
                    continue
                found += [Extra(_distinct_leaf(key, 0), inner) for key in self.keys(shape, matched, patterns, pointer)]
        return tuple(found)

    def keys(self, shape: ObjectShape, matched: Sequence[str], patterns: Sequence[str], pointer: str) -> Iterator[Leaf]:
        """Leaves of the names that match exactly some of the patterns."""
        others = frozenset(patterns) - set(matched)
        wanted = StringShape(patterns=frozenset(matched), not_patterns=others)
        for one in self.algebra.shapes(shape.names):
            merged = self.algebra.merge(wanted, one)
            if isinstance(merged, Closed):
                yield self.closed(list(merged.texts), pointer, False)
            elif isinstance(merged, StringShape) and (key := self.open(merged, pointer, False)) is not None:
                yield key

    def _behind(self, shape: ObjectShape, matched: Iterable[str]) -> All:
        """What stands behind a name that is not declared and matches exactly some patterns."""
        matched, found = set(matched), []
        for layer in shape.layers:
            own = [layer.patterns[pattern] for pattern in layer.patterns if pattern in matched]
            found += own or ([layer.additional] if layer.additional is not None else [])
        return conjunction(found)

    # --------------------------------------------------------------------------------------------------------- arrays

    def array(self, shape: ArrayShape, pointer: str, depth: int, distinct: bool) -> ArrayNode | None:
        distinct = distinct or shape.unique
        contains = shape.contains[0] if shape.contains else None
        if len(shape.contains) > 1:
            self.refuse(pointer, "contains", "more than one `contains` for one array is not guaranteed: keep one.")
        # Where only so many items may match, the others must not.
        bounded = contains is not None and contains.high is not None
        others = (replace(contains.schema, negated=True),) if contains is not None and bounded else ()
        prefix = []
        length = shape.prefix_length if shape.max_items is None else min(shape.prefix_length, shape.max_items)
        most = shape.max_items
        for index in range(length):
            inner = self.node(conjunction((*shape.item(index), *others)), depth + 1, distinct)
            if inner is None:
                length = most = index
                break
            prefix.append(inner)
        behind = shape.item(shape.prefix_length)
        item = match = None
        if most is None or most > len(prefix):
            item = self.node(conjunction((*behind, *others)), depth + 1, distinct)
            if contains is not None and (contains.low or bounded):
                match = self.node(conjunction((*behind, contains.schema)), depth + 1, distinct)
        low, matches = shape.min_items, contains.low if contains is not None else 0
        if item is None:
            # Only matches may stand behind the prefix.
            further = math.inf if match is not None and contains is not None and contains.high is None else 0
            if match is not None and contains is not None and contains.high is not None:
                further = contains.high
            most = None if math.isinf(further) and most is None else int(min(_or_infinite(most), length + further))
        matches, most_matches = (contains.low, contains.high) if contains is not None else (0, None)
        low = max(shape.min_items, length + matches if matches else 0)
        if low > _or_infinite(most) or (matches and match is None):
            return None
        node = ArrayNode(pointer, item, low, most, tuple(prefix), match, matches, most_matches)
        return self.unique(node) if shape.unique else node

    def unique(self, node: ArrayNode) -> ArrayNode | None:
        """The array with items that cannot repeat."""
        if node.max_items is not None and node.max_items <= 1:
            return node
        if node.prefix or node.match is not None:
            self.refuse(node.path, "uniqueItems", "not guaranteed beside prefixItems or contains: drop one of them.")
        assert node.item is not None
        item = _distinct_node(node.item, 1)
        if item is None:
            self.refuse(
                node.path,
                "uniqueItems",
                "the items have to be of one type and hold a required string or number, and no free property names.",
            )
        most = min(_or_infinite(node.max_items), _how_many(item))
        if node.min_items > most:
            return None
        return replace(node, item=item, max_items=None if math.isinf(most) else int(most))


_NULL = Closed(("null",))
_NOT_NULL = Located({"type": "null"}, "#null", negated=True)
_EMPTY_OBJECT_WORDS = {
    "type",
    "properties",
    "required",
    "title",
    "description",
    "$schema",
    "$id",
    "$comment",
    "default",
}


def _is_object(shape: Shape) -> bool:
    if isinstance(shape, Closed):
        return all(text.startswith("{") for text in shape.texts)
    return isinstance(shape, ObjectShape)


def _forbids(schema: Any, required: bool) -> bool:
    """Whether a schema is there to forbid a property, and no mistake."""
    return schema is False or (not required and schema == {"not": {}})


def _word_of(shape: StringShape | NumberShape) -> str:
    """The keyword that makes a language large."""
    if isinstance(shape, StringShape):
        return "pattern" if shape.patterns | shape.not_patterns else "format" if shape.formats else "minLength"
    if shape.multiples | shape.not_multiples:
        return "multipleOf"
    return "minimum" if shape.minimum is not None else "maximum"


def _names_of(key: Leaf) -> list[str]:
    """All names of a leaf that has only a few."""
    if key.automaton is None:
        return [key.value(choice) for choice in key.choices]
    names, pending = [], [(0, b"")]
    while pending:
        state, text = pending.pop()
        if key.automaton.accepting[state] and len(text.decode()) <= _or_infinite(key.max_length):
            names.append(text.decode())
        after = key.automaton.transitions[state]
        pending += [(int(after[byte]), text + bytes([byte])) for byte in np.flatnonzero(after >= 0)[::-1].tolist()]
    return names


def _or_infinite(bound: int | None) -> float:
    return math.inf if bound is None else bound


@lru_cache(maxsize=4096)
def _string_language(shape: StringShape) -> tuple[ByteAutomaton, int | None]:
    """Raw texts of a string shape, and the most characters, which are counted apart from the automaton."""
    automaton, most = raw_string_automaton(), shape.max_length
    for pattern in sorted(shape.patterns):
        automaton = intersection(automaton, pattern_automaton(pattern))
    for name in sorted(shape.formats):
        automaton = intersection(automaton, format_automaton(name))
        most = min((bound for bound in (most, format_max_length(name)) if bound is not None), default=None)
    for pattern in sorted(shape.not_patterns):
        automaton = difference(automaton, pattern_automaton(pattern))
    if shape.excluded:
        automaton = difference(automaton, finite(text.encode(errors="ignore") for text in sorted(shape.excluded)))
    if shape.min_length:
        automaton = at_least(automaton, shape.min_length)
    if most is not None and not automaton.empty and automaton.chars_needed[0] > most:
        automaton = intersection(automaton, finite([]))
    return automaton, most


@lru_cache(maxsize=4096)
def _number_language(shape: NumberShape, distinct: bool) -> ByteAutomaton:
    """JSON texts of a number shape; `distinct`: one text for each value."""
    step = _common_multiple(shape.multiples)
    if shape.integer:
        low = None if shape.minimum is None else math.floor(shape.minimum) + 1
        if shape.minimum is not None and not shape.exclusive_minimum:
            low = math.ceil(shape.minimum)
        high = None if shape.maximum is None else math.ceil(shape.maximum) - 1
        if shape.maximum is not None and not shape.exclusive_maximum:
            high = math.floor(shape.maximum)
        automaton = integer_automaton(low, high, None if step is None else step.numerator)
        for other in sorted(shape.not_multiples):
            automaton = difference(automaton, integer_automaton(low, high, other.numerator))
    else:
        short = distinct or shape.integer is False or bool(shape.not_multiples or shape.excluded)
        bounds = (shape.minimum, shape.maximum, shape.exclusive_minimum, shape.exclusive_maximum)
        automaton = number_automaton(*bounds, step, short)
        integral = [Fraction(1)] if shape.integer is False else []
        for other in [*integral, *sorted(shape.not_multiples)]:
            automaton = difference(automaton, number_automaton(None, None, False, False, other, short))
        if distinct:
            automaton = difference(automaton, _integral_decimals())
    if shape.excluded:
        texts = {text for value in shape.excluded for text in _texts_of(value)}
        automaton = difference(automaton, finite(text.encode() for text in sorted(texts)))
    return automaton


@lru_cache(maxsize=1)
def _integral_decimals() -> ByteAutomaton:
    return intersection(number_automaton(None, None, False, False, Fraction(1), True), pattern_automaton(r"\."))


def _texts_of(value: Fraction) -> set[str]:
    texts = {"-0.0"} if value == 0 else set()
    if value.denominator == 1:
        texts.add(str(value.numerator))
    with suppress(OverflowError):
        texts.add(repr(float(value)))
    return texts


def _common_multiple(steps: Iterable[Fraction]) -> Fraction | None:
    result = None
    for step in steps:
        if result is None:
            result = step
        else:
            top = math.lcm(result.numerator, step.numerator)
            result = Fraction(top, math.gcd(result.denominator, step.denominator))
    return result


def _distinct_leaf(leaf: Leaf, level: int) -> Leaf:
    """A leaf whose values must differ; short lengths are built in, so that it is known how many values there are."""
    if leaf.automaton is None or leaf.max_length is None or leaf.max_length > _SHORT_LENGTH:
        return replace(leaf, distinct=level)
    return replace(leaf, automaton=at_most(leaf.automaton, leaf.max_length), max_length=None, distinct=level)


def _how_many(node: Node) -> float:
    """How many values a distinct item may have at least."""
    if isinstance(node, Leaf):
        return len(node.choices) if node.automaton is None else node.automaton.strings[0]
    return math.inf


def _distinct_node(node: Node, level: int) -> Node | None:
    """An item that cannot repeat: its last required open value differs wherever all before it is equal."""
    if isinstance(node, Leaf):
        return _distinct_leaf(node, level) if node.kind != "guided" else None
    if not isinstance(node, ObjectNode) or _has_extras(node):
        return None
    for index in reversed(range(len(node.properties))):
        entry = node.properties[index]
        inner = _distinct_node(entry.node, level + 1) if entry.required else None
        if inner is not None and math.isinf(_how_many(inner)):
            changed = list(node.properties)
            changed[index] = replace(entry, node=inner)
            return replace(node, properties=tuple(changed))
    return None


def _has_extras(node: Node) -> bool:
    """Whether names are free somewhere inside, so that equal values may have different texts."""
    return any(isinstance(inner, ObjectNode) and inner.extras for inner in _reachable(node))


def _with_moved_references(schema: Any) -> Any:
    """A schema whose local references start at `#/$defs/parameters`."""
    if isinstance(schema, list):
        return [_with_moved_references(item) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved = {name: _with_moved_references(item) for name, item in schema.items()}
    if isinstance(moved.get("$ref"), str):
        moved["$ref"] = "#/$defs/parameters" + moved["$ref"][1:]
    return moved


# ---------------------------------------------------------------------------------------------------------------------
# Sizes
# ---------------------------------------------------------------------------------------------------------------------


def _children(node: Node) -> list[Node]:
    if isinstance(node, ObjectNode):
        return [entry.node for entry in node.properties] + [extra.node for extra in node.extras]
    if isinstance(node, ArrayNode):
        return [inner for inner in (*node.prefix, node.item, node.match) if inner is not None]
    if isinstance(node, UnionNode):
        return list(node.branches)
    return [node.target] if isinstance(node, Link) and node.target is not None else []


def _reachable(root: Node) -> list[Node]:
    found, pending = {id(root): root}, [root]
    while pending:
        for inner in _children(pending.pop()):
            if id(inner) not in found:
                found[id(inner)] = inner
                pending.append(inner)
    return list(found.values())


def guided_leaves(scaffold: Scaffold) -> list[Leaf]:
    """The values of a tool that another engine guides."""
    return [node for node in _reachable(scaffold.root) if isinstance(node, Leaf) and node.kind == "guided"]


class _Sizes:
    """The least number of values and of nested containers that each node needs; settles unions on their shortest."""

    def __init__(self, compiler: _Compiler) -> None:
        self.compiler = compiler
        self.sizes: dict[int, tuple[float, float]] = {}

    def settle(self, root: Node) -> None:
        nodes = _reachable(root)
        if any(isinstance(node, UnionNode | Link) for node in nodes):
            changed = True
            while changed:
                changed = False
                for node in reversed(nodes):
                    size = self.measure(node)
                    if size != self.sizes.get(id(node), (math.inf, math.inf)):
                        self.sizes[id(node)] = size
                        changed = True
        else:
            self.measure_tree(root)
        self.refuse_endless(nodes)
        for node in nodes:
            if isinstance(node, UnionNode):
                node.shortest = min(node.branches, key=lambda branch: self.sizes[id(branch)])

    def refuse_endless(self, nodes: list[Node]) -> None:
        """Refuse nodes of which no value is small enough, the innermost first."""
        none = (math.inf, math.inf)
        endless = [node for node in nodes if math.isinf(self.sizes.get(id(node), none)[0])]
        if endless:
            place = max((node.path for node in endless), key=len)
            self.compiler.refuse(place, "$ref", "every value contains another of its kind: make it optional.")
        for node in nodes:
            values, containers = self.sizes[id(node)]
            if containers > MAX_DEPTH + 1:
                self.compiler.refuse(node.path, "properties", f"nesting is deeper than {MAX_DEPTH} levels: flatten it.")
            if values > MAX_LEAVES and all(self.sizes[id(inner)][0] <= MAX_LEAVES for inner in _children(node)):
                word = "minItems" if isinstance(node, ArrayNode) else "required"
                self.compiler.refuse(node.path, word, f"more than {MAX_LEAVES} values are required: ask for fewer.")

    def measure_tree(self, node: Node) -> None:
        for inner in _children(node):
            self.measure_tree(inner)
        self.sizes[id(node)] = self.measure(node)

    def measure(self, node: Node) -> tuple[float, float]:
        """(values, containers) of the smallest text, from what is known of the nodes inside."""
        of = self.sizes.get
        unknown = (math.inf, math.inf)
        if isinstance(node, Leaf):
            return (1, 0)
        if isinstance(node, Link):
            return of(id(node.target), unknown)
        if isinstance(node, UnionNode):
            return min(of(id(branch), unknown) for branch in node.branches)
        if isinstance(node, ObjectNode):
            inner = [of(id(one), unknown) for one in node.least_nodes()]
            return (1 + sum(size for size, _ in inner), 1 + max([0, *(deep for _, deep in inner)]))
        inner = [of(id(one), unknown) for one in node.prefix[: node.min_items]]
        rest = node.min_items - len(inner) - node.min_matches
        behind = node.item if node.item is not None else node.match
        total = sum(size for size, _ in inner)
        for one, count in ((node.match, node.min_matches), (behind, rest)):
            if one is not None and count > 0:
                inner.append(of(id(one), unknown))
                total += count * max(1, inner[-1][0])
        return (1 + total, 1 + max([0, *(deep for _, deep in inner)]))


# ---------------------------------------------------------------------------------------------------------------------
# Literal texts between two values
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frame:
    """Where a value stands inside a container. Numbers are kept only as far as they matter for what may follow.

    Args:
        node: the container.
        parent: the frame around it.
        done: declared properties that are decided, or items begun.
        count: properties begun, or items begun that match.
        present: declared properties begun, where it matters.
        depth: containers around the value.
    """

    node: ObjectNode | ArrayNode
    parent: "Frame | None"
    done: int = 0
    count: int = 0
    present: frozenset[int] = frozenset()
    depth: int = field(default=1, compare=False)

    def with_property(self, index: int) -> "Frame":
        """The frame behind one more declared property."""
        assert isinstance(self.node, ObjectNode)
        present = self.present | {index} if self.node.constrained else self.present
        return replace(self, done=index + 1, count=self._counted(), present=present)

    def with_extra(self) -> "Frame":
        """The frame behind one more freely named property."""
        assert isinstance(self.node, ObjectNode)
        return replace(self, done=len(self.node.properties), count=self._counted())

    def _counted(self) -> int:
        assert isinstance(self.node, ObjectNode)
        most = self.node.max_properties
        return min(self.count + 1, max(1, self.node.min_properties) if most is None else most)

    def with_item(self, matches: bool) -> "Frame":
        """The frame behind one more item."""
        node = self.node
        assert isinstance(node, ArrayNode)
        done, count = self.done + 1, self.count + matches
        if node.max_items is None:
            done = min(done, max(node.min_items, len(node.prefix)) + 1)
        if node.max_matches is None:
            count = min(count, node.min_matches)
        return replace(self, done=done, count=count)


@dataclass(frozen=True)
class Option:
    """One literal text that may come next, and what it leads to.

    Args:
        text: the literal, from the end of the last value up to the start of the next.
        leads_to: `"value"`: the value `leaf` follows; `"node"`: a text of `node` follows; `"gap"`: an empty container
            was written, and a further text is due; `"end"`: the arguments are complete.
        leaf: the value that follows, else None.
        frame: where the value or the empty container stands.
        node: the node that follows, else None.
    """

    text: str
    leads_to: Literal["value", "node", "gap", "end"]
    leaf: Leaf | None
    frame: Frame | None
    node: Node | None = None


def node_options(node: Node, frame: Frame | None = None, least: bool = False) -> list[Option]:
    """Texts that may open a node: the arguments as a whole, or what a link leads to.

    Args:
        node: the node.
        frame: where it stands.
        least: only what the schema requires, so that the call ends.
    """
    return list(_open(node, frame, least))


def next_options(leaf: Leaf | None, frame: Frame | None, least: bool = False) -> list[Option]:
    """Texts that may follow a value (its closing quote included) or an empty container.

    Args:
        leaf: the value just finished, or None after an empty container.
        frame: where it stands.
        least: as in `node_options`.

    Returns:
        The options in schema order.
    """
    if leaf is not None and frame is not None and isinstance(frame.node, ObjectNode):
        for extra in frame.node.extras:
            if extra.key is leaf:
                return list(_prefixed('": ', _open(extra.node, frame, least)))
    quote = '"' if leaf is not None and leaf.quoted else ""
    return list(_prefixed(quote, _after(frame, least)))


def _open(node: Node, frame: Frame | None, least: bool) -> Iterator[Option]:
    depth = frame.depth if frame is not None else 0
    least = least or depth > MAX_DEPTH
    if isinstance(node, Leaf):
        yield Option('"' if node.quoted else "", "value", node, frame)
    elif isinstance(node, Link):
        assert node.target is not None
        yield Option("", "node", None, frame, node.target)
    elif isinstance(node, UnionNode):
        assert node.shortest is not None
        for branch in (node.shortest,) if least else node.branches:
            yield from _open(branch, frame, least)
    elif isinstance(node, ObjectNode):
        yield from _properties(Frame(node, frame, depth=depth + 1), least)
    else:
        yield from _items(Frame(node, frame, depth=depth + 1), least)


def _properties(frame: Frame, least: bool) -> Iterator[Option]:
    node = frame.node
    assert isinstance(node, ObjectNode)
    # Recursive schemas end here: beyond the bound nothing is opened that may be left out.
    least = least or frame.depth > MAX_DEPTH
    lead = ", " if frame.count else "{"
    count, present = frame.count, frame.present

    def possible(done: int, also: tuple[int, ...] = ()) -> bool:
        return not node.constrained or node.possible(done, present | set(also), count + len(also))

    for index in range(frame.done, len(node.properties)):
        entry = node.properties[index]
        may_skip = not entry.required and possible(index + 1)
        if possible(index + 1, (index,)) and not (least and may_skip):
            key = f"{lead}{json.dumps(entry.name, ensure_ascii=False)}: "
            yield from _prefixed(key, _open(entry.node, frame.with_property(index), least))
        if not may_skip:
            return
    short = count < node.min_properties
    if node.max_properties is None or count < node.max_properties:
        for extra in node.extras if short or not least else ():
            yield Option(lead + '"', "value", extra.key, frame.with_extra())
    if short:
        return
    if count:
        yield from _prefixed("}", _after(frame.parent, least))
    else:
        yield Option("{}", "gap", None, frame.parent)


def _items(frame: Frame, least: bool) -> Iterator[Option]:
    node, done, matches = frame.node, frame.done, frame.count
    assert isinstance(node, ArrayNode)
    least = least or frame.depth > MAX_DEPTH
    lead = ", " if done else "["
    complete = done >= node.min_items and matches >= node.min_matches
    full = node.max_items is not None and done >= node.max_items
    if not full and not (least and complete):
        for inner, match in _next_items(node, done, matches, least):
            yield from _prefixed(lead, _open(inner, frame.with_item(match), least))
    if complete and done:
        yield from _prefixed("]", _after(frame.parent, least))
    elif complete:
        yield Option("[]", "gap", None, frame.parent)


def _next_items(node: ArrayNode, done: int, matches: int, least: bool) -> Iterator[tuple[Node, bool]]:
    """What the next item may be, and whether it counts as a match."""
    if done < len(node.prefix):
        yield node.prefix[done], False
        return
    lacking = node.min_matches - matches
    if node.match is not None and (node.max_matches is None or matches < node.max_matches):
        yield node.match, True
        if least and lacking > 0:
            return
    spare = node.max_items is None or node.max_items - done > lacking
    if node.item is not None and spare and not (node.match is not None and least and lacking > 0):
        yield node.item, False


def _after(frame: Frame | None, least: bool) -> Iterator[Option]:
    if frame is None:
        yield Option("", "end", None, None)
    elif isinstance(frame.node, ObjectNode):
        yield from _properties(frame, least)
    else:
        yield from _items(frame, least)


def _prefixed(text: str, options: Iterable[Option]) -> Iterator[Option]:
    for option in options:
        yield replace(option, text=text + option.text)


def taken_texts(written: str, leaf: Leaf) -> list[str]:
    """Texts that a distinct value must not have.

    Args:
        written: the arguments' JSON text up to the value, its opening quote included.
        leaf: the value, with `distinct` set.

    Returns:
        Texts as they would stand in the call.
    """
    assert leaf.distinct is not None
    starts = _entry_starts(written)
    level = starts[-max(1, leaf.distinct)]
    entries = [written[start:end].removesuffix(", ") for start, end in pairwise(level)]
    if leaf.distinct == 0:
        return [_leading(entry[1:], quoted=True) for entry in entries]
    prefix = written[level[-1] :]
    return [_leading(entry[len(prefix) :], leaf.quoted) for entry in entries if entry.startswith(prefix)]


def _entry_starts(written: str) -> list[list[int]]:
    """Offsets of the entries of every container that is still open, the outermost first."""
    stack: list[list[int]] = []
    place = 0
    while place < len(written):
        character = written[place]
        if character == '"':
            place = _string_end(written, place + 1)
        elif character in "{[":
            stack.append([place + 1])
        elif character in "}]":
            stack.pop()
        elif character == ",":
            stack[-1].append(place + 2)
        place += 1
    return stack


def _string_end(text: str, place: int) -> int:
    """Offset of the quote that ends a string's contents, or the end of the text."""
    while place < len(text) and text[place] != '"':
        place += 2 if text[place] == "\\" else 1
    return place


def _leading(text: str, quoted: bool) -> str:
    """The value's text at the start of an entry or of the rest of one."""
    if quoted:
        return text[: _string_end(text, 0)]
    return json.dumps(json.JSONDecoder().raw_decode(text)[0], ensure_ascii=False)


# ---------------------------------------------------------------------------------------------------------------------
# Values in the tree
# ---------------------------------------------------------------------------------------------------------------------


Known = dict[tuple[int, int], bool]


def fits(node: Node, value: Any, known: Known | None = None) -> bool:
    """Whether a node can hold a JSON value; what the literal texts see to (implied, repeated) is not looked at.

    Args:
        node: the node.
        value: the value.
        known: answers so far by the ids of node and value, for parts that many branches share.
    """
    known = {} if known is None else known
    key = (id(node), id(value))
    if key not in known:
        known[key] = _fits(node, value, known)
    return known[key]


def _fits(node: Node, value: Any, known: Known) -> bool:
    if isinstance(node, Link):
        assert node.target is not None
        return fits(node.target, value, known)
    if isinstance(node, UnionNode):
        return any(fits(branch, value, known) for branch in node.branches)
    if isinstance(node, ObjectNode):
        if not isinstance(value, Mapping):
            return False
        if any(entry.required and entry.name not in value for entry in node.properties):
            return False
        declared = {entry.name: entry.node for entry in node.properties}
        return all(
            fits(declared[name], item, known) if name in declared else extra_of(node, name, item, known) is not None
            for name, item in value.items()
        )
    if isinstance(node, ArrayNode):
        if not isinstance(value, list) or not node.min_items <= len(value) <= _or_infinite(node.max_items):
            return False
        return all(item_of(node, index, item, known) is not None for index, item in enumerate(value))
    return _leaf_fits(node, value)


def extra_of(node: ObjectNode, name: str, value: Any, known: Known | None = None) -> Extra | None:
    """The kind of further property that a name and a value are, if any."""
    if name in node.reserved:
        return None
    able = (extra for extra in node.extras if _leaf_fits(extra.key, name))
    return next((extra for extra in able if fits(extra.node, value, known)), None)


def item_of(node: ArrayNode, index: int, value: Any, known: Known | None = None) -> Node | None:
    """The node of an item, if it has one."""
    candidates = [node.prefix[index]] if index < len(node.prefix) else [node.match, node.item]
    return next((inner for inner in candidates if inner is not None and fits(inner, value, known)), None)


def branch_of(node: UnionNode, value: Any) -> Node | None:
    """The first branch that holds a value."""
    return next((branch for branch in node.branches if fits(branch, value)), None)


def _leaf_fits(leaf: Leaf, value: Any) -> bool:
    if leaf.kind == "guided":
        return True
    if leaf.quoted and not isinstance(value, str):
        return False
    try:
        text = leaf.text(value)
        if leaf.automaton is None:
            return text in leaf.choices
        if leaf.kind != "string":
            return (
                isinstance(value, (int, float))
                and not isinstance(value, bool)
                and leaf.automaton.accepts(text.encode())
            )
        return leaf.automaton.accepts(value.encode()) and len(value) <= _or_infinite(leaf.max_length)
    except (ValueError, TypeError):
        return False


def argument_segments(scaffold: Scaffold, arguments: Mapping[str, Any]) -> list[str]:
    """Cut the JSON text of arguments as the options do: fixed texts and the texts of leaves in turn.

    Differs from `tokenization_utils.call_segments` where a closed set holds containers, or strings beside other values:
    each of its texts is one leaf, quotes and brackets included; and where a link begins, which ends a segment.

    Args:
        scaffold: the tool.
        arguments: what fits it, in any order.

    Returns:
        The segments. Joined they are the arguments as `json.dumps` writes them in schema order.

    Raises:
        ValueError: the arguments do not fit the scaffold.
    """
    writer = _SegmentWriter()
    writer.walk(scaffold.root, arguments, "")
    return [*writer.segments, "".join(writer.fixed)]


class _SegmentWriter:
    def __init__(self) -> None:
        self.segments: list[str] = []
        self.fixed: list[str] = []

    def end(self, *texts: str) -> None:
        self.segments.extend(["".join(self.fixed), *texts])
        self.fixed.clear()

    def walk(self, node: Node, value: Any, path: str) -> None:
        if isinstance(node, Link):
            assert node.target is not None
            self.end()
            self.walk(node.target, value, path)
        elif isinstance(node, UnionNode):
            branch = branch_of(node, value)
            if branch is None:
                raise ValueError(f"{value!r} at {path or '/'} does not fit the scaffold.")
            self.walk(branch, value, path)
        elif isinstance(node, ObjectNode):
            self.object(node, value, path)
        elif isinstance(node, ArrayNode):
            self.array(node, value, path)
        else:
            if not _leaf_fits(node, value):
                raise ValueError(f"{value!r} at {path or '/'} does not fit the scaffold.")
            quote = '"' if node.quoted else ""
            self.fixed.append(quote)
            self.end(node.text(value))
            self.fixed.append(quote)

    def object(self, node: ObjectNode, value: Any, path: str) -> None:
        if not isinstance(value, Mapping):
            raise ValueError(f"{value!r} at {path or '/'} does not fit the scaffold's object.")
        if any(entry.required and entry.name not in value for entry in node.properties):
            raise ValueError(f"{value!r} at {path or '/'} does not fit the scaffold's object: a value is missing.")
        lead = "{"
        for entry in node.properties:
            if entry.name in value:
                self.fixed.append(f"{lead}{json.dumps(entry.name, ensure_ascii=False)}: ")
                self.walk(entry.node, value[entry.name], f"{path}/{entry.name}")
                lead = ", "
        declared = {entry.name for entry in node.properties}
        for name in [name for name in value if name not in declared]:
            extra = extra_of(node, name, value[name])
            if extra is None:
                raise ValueError(f"{name!r} at {path or '/'} does not fit the scaffold's object.")
            self.fixed.append(lead + '"')
            self.end(extra.key.text(name))
            self.fixed.append('": ')
            self.walk(extra.node, value[name], f"{path}/{name}")
            lead = ", "
        self.close("{}", bool(value))

    def array(self, node: ArrayNode, value: Any, path: str) -> None:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise ValueError(f"{value!r} at {path or '/'} does not fit the scaffold's array.")
        if not node.min_items <= len(value) <= _or_infinite(node.max_items):
            raise ValueError(f"{len(value)} items at {path or '/'} do not fit the scaffold's array.")
        for index, item in enumerate(value):
            inner = item_of(node, index, item)
            if inner is None:
                raise ValueError(f"{item!r} at {path}/{index} does not fit the scaffold's array.")
            self.fixed.append(", " if index else "[")
            self.walk(inner, item, f"{path}/{index}")
        self.close("[]", bool(value))

    def close(self, brackets: str, filled: bool) -> None:
        if filled:
            self.fixed.append(brackets[1])
        else:
            self.fixed.append(brackets)
            self.end()
