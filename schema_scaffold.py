"""JSON Schema of a tool -> Scaffold: which text of a call is fixed, and which choices are left to a model.

Takes the `parameters` schema of a tool, gives a tree of nodes, the literal texts that may stand between two values,
and the layout that a drafter fills. Pure Python: no tokens, no tensors, no model. What the tree cannot guarantee
raises `UnsupportedSchemaError`.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

SlotKind = Literal["string", "integer", "number", "choice"]
SlotRole = Literal["value", "presence", "length"]

# Bounds on hostile schemas: a tool beyond them is refused at once instead of eating time and memory.
MAX_DEPTH = 32
MAX_LEAVES = 2000
MAX_CHOICES = 4096

# Keywords that describe and do not constrain. `default` is what omission means, so it asks nothing of the call's text.
_ANNOTATIONS = frozenset(
    [
        "title",
        "description",
        "default",
        "examples",
        "example",
        "$schema",
        "$id",
        "$comment",
        "deprecated",
        "readOnly",
        "writeOnly",
        "nullable",
    ]
)
_TYPE_KEYWORDS = {
    "object": frozenset({"properties", "required", "additionalProperties"}),
    "array": frozenset({"items", "minItems", "maxItems"}),
    "string": frozenset[str](),
    "integer": frozenset[str](),
    "number": frozenset[str](),
    "boolean": frozenset[str](),
}
_PYTHON_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}


class UnsupportedSchemaError(ValueError):
    """A tool's schema asks for something that the scaffold cannot guarantee.

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
class Leaf:
    """One value that a model chooses.

    Args:
        kind: which automaton its text must satisfy.
        path: JSON pointer of its schema, for messages and traces.
        quoted: the value is a JSON string whose quotes belong to the fixed text.
        choices: closed set of texts for kind `"choice"`: escaped string contents when `quoted`, whole JSON literals
            otherwise.
    """

    kind: SlotKind
    path: str
    quoted: bool
    choices: tuple[str, ...] = ()

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
class ObjectNode:
    """An object with declared properties only, written in schema order."""

    properties: tuple[Property, ...]


@dataclass(frozen=True)
class ArrayNode:
    """An array whose items share one schema; `max_items` None means without end."""

    item: "Node"
    min_items: int
    max_items: int | None


Node = Leaf | ObjectNode | ArrayNode


@dataclass(frozen=True)
class Scaffold:
    """A compiled tool: its name and the tree of its arguments."""

    tool: str
    root: ObjectNode


# ---------------------------------------------------------------------------------------------------------------------
# Compilation
# ---------------------------------------------------------------------------------------------------------------------


def compile_scaffold(tool: Mapping[str, Any]) -> Scaffold:
    """Compile a normalised tool into its scaffold.

    Args:
        tool: OpenAI-style tool, `{"type": "function", "function": {"name", "parameters"}}`; absent parameters mean
            none.

    Returns:
        The scaffold; every text it admits validates against the schema (JSON Schema draft 2020-12).

    Raises:
        UnsupportedSchemaError: the schema is malformed, over a bound, or uses a keyword that is not guaranteed.
    """
    function = tool["function"]
    parameters = function.get("parameters") or {"type": "object", "properties": {}}
    compiler = _Compiler(function["name"])
    root = compiler.node(parameters, "", 0)
    if not isinstance(root, ObjectNode):
        raise UnsupportedSchemaError(
            function["name"], "", "type", "the parameters of a tool are an object: wrap the schema in one."
        )
    if _least_leaves(root) > MAX_LEAVES:
        raise compiler.refuse("", "required", f"more than {MAX_LEAVES} values are required: ask for fewer.")
    return Scaffold(function["name"], root)


class _Compiler:
    """Walks one schema and counts its leaves; lives for one `compile_scaffold`."""

    def __init__(self, tool: str) -> None:
        self.tool = tool
        self.leaves = 0

    def refuse(self, pointer: str, keyword: str, advice: str) -> UnsupportedSchemaError:
        return UnsupportedSchemaError(self.tool, pointer, keyword, advice)

    def node(self, schema: Any, pointer: str, depth: int) -> Node:
        if not isinstance(schema, Mapping):
            raise self.refuse(pointer, "schema", f"a schema is a JSON object, not {type(schema).__name__}.")
        if depth > MAX_DEPTH:
            raise self.refuse(pointer, "properties", f"nesting is deeper than {MAX_DEPTH} levels: flatten the schema.")
        self.leaves += 1
        if self.leaves > MAX_LEAVES:
            raise self.refuse(pointer, "properties", f"more than {MAX_LEAVES} values in one tool: split the tool.")
        if "const" in schema or "enum" in schema:
            return self.closed(schema, pointer)
        kind = self.type_of(schema, pointer)
        if kind == "object":
            return self.object(schema, pointer, depth)
        if kind == "array":
            return self.array(schema, pointer, depth)
        self.check_keywords(schema, kind, pointer)
        if kind == "boolean":
            return Leaf("choice", pointer, quoted=False, choices=("true", "false"))
        return Leaf(kind, pointer, quoted=kind == "string")  # type: ignore[arg-type]

    def type_of(self, schema: Mapping[str, Any], pointer: str) -> str:
        kind = schema.get("type", "object" if isinstance(schema.get("properties"), Mapping) else None)
        if isinstance(kind, str) and kind in _TYPE_KEYWORDS:
            return kind
        # A combinator without a type is the more telling complaint than the missing type.
        telling = next((word for word in ("anyOf", "oneOf", "allOf", "$ref", "not", "if") if word in schema), "type")
        raise self.refuse(
            pointer, telling, f"{schema.get(telling)!r} is not supported: use one of {', '.join(_TYPE_KEYWORDS)}."
        )

    def check_keywords(
        self, schema: Mapping[str, Any], kind: str, pointer: str, also: frozenset[str] = frozenset()
    ) -> None:
        known = _TYPE_KEYWORDS[kind] | _ANNOTATIONS | {"type"} | also
        for keyword in schema:
            if keyword not in known:
                raise self.refuse(
                    pointer,
                    str(keyword),
                    f"not guaranteed for type {kind!r}: remove it or check the value in your tool.",
                )

    def closed(self, schema: Mapping[str, Any], pointer: str) -> Leaf:
        keyword = "const" if "const" in schema else "enum"
        listed = schema.get("enum", [None])
        if not isinstance(listed, Sequence) or isinstance(listed, str) or not listed:
            raise self.refuse(pointer, "enum", "an enum is a non-empty list of JSON values.")
        if len(listed) > MAX_CHOICES:
            raise self.refuse(
                pointer, "enum", f"more than {MAX_CHOICES} values: use a string and check it in your tool."
            )
        values = [schema["const"]] if keyword == "const" else list(listed)
        if (
            "const" in schema
            and "enum" in schema
            and self.text(schema["const"], pointer, "const")
            not in {self.text(value, pointer, "enum") for value in listed}
        ):
            raise self.refuse(pointer, "const", "it is not among the values of enum: no value fits both.")
        if "type" in schema:
            kind = schema["type"]
            if not isinstance(kind, str) or kind not in _PYTHON_TYPES:
                raise self.refuse(pointer, "type", f"{kind!r} is not a JSON type.")
            values = [value for value in values if _has_type(value, kind)]
        for word in schema:
            if word not in _ANNOTATIONS | {"type", "enum", "const"}:
                raise self.refuse(
                    pointer, str(word), f"not guaranteed beside {keyword!r}: apply it to the listed values."
                )
        if not values:
            raise self.refuse(pointer, keyword, "no listed value has the declared type: correct the list or the type.")
        quoted = all(isinstance(value, str) for value in values)
        texts = dict.fromkeys(self.text(value, pointer, keyword) for value in values)
        return Leaf("choice", pointer, quoted, tuple(text[1:-1] if quoted else text for text in texts))

    def text(self, value: Any, pointer: str, keyword: str) -> str:
        """The JSON text of a value that stands in the schema; text, not the value, tells true from 1."""
        try:
            text = json.dumps(value, ensure_ascii=False, allow_nan=False)
            text.encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise self.refuse(pointer, keyword, f"a value is not JSON that can be written: {error}.") from None
        return text

    def object(self, schema: Mapping[str, Any], pointer: str, depth: int) -> ObjectNode:
        self.check_keywords(schema, "object", pointer)
        properties = schema.get("properties", {})
        required = schema.get("required", [])
        if not isinstance(properties, Mapping) or not all(isinstance(name, str) for name in properties):
            raise self.refuse(pointer, "properties", "properties is a JSON object of schemas.")
        if (
            isinstance(required, str)
            or not isinstance(required, Sequence)
            or not all(isinstance(name, str) for name in required)
        ):
            raise self.refuse(pointer, "required", "required is a list of property names.")
        for name in required:
            if name not in properties:
                raise self.refuse(pointer, "required", f"{name!r} is required but not declared under properties.")
        extra = schema.get("additionalProperties", bool(pointer and not properties))
        if isinstance(extra, Mapping) or (extra and not properties):
            raise self.refuse(
                pointer, "additionalProperties", "free-form keys are not supported: declare the properties."
            )
        return ObjectNode(
            tuple(self.property(name, properties[name], name in required, pointer, depth) for name in properties)
        )

    def property(self, name: str, schema: Any, required: bool, pointer: str, depth: int) -> Property:
        self.text(name, pointer, "properties")
        inner = f"{pointer}/properties/{_escape_pointer(name)}"
        if required and isinstance(schema, Mapping) and schema.get("nullable"):
            raise self.refuse(
                inner, "nullable", "a required value that may be null is not supported: make it optional."
            )
        return Property(name, self.node(schema, inner, depth + 1), required)

    def array(self, schema: Mapping[str, Any], pointer: str, depth: int) -> ArrayNode:
        self.check_keywords(schema, "array", pointer)
        if "items" not in schema:
            raise self.refuse(pointer, "items", "an array needs the schema of its items.")
        bounds = {}
        for keyword in ("minItems", "maxItems"):
            bound = schema.get(keyword)
            if bound is not None and (isinstance(bound, bool) or not isinstance(bound, int) or bound < 0):
                raise self.refuse(pointer, keyword, f"{bound!r} is not a count of items.")
            bounds[keyword] = bound
        low, high = bounds["minItems"] or 0, bounds["maxItems"]
        if high is not None and high < low:
            raise self.refuse(pointer, "maxItems", f"maxItems {high} is below minItems {low}: no array fits.")
        array = ArrayNode(self.node(schema["items"], f"{pointer}/items", depth + 1), low, high)
        if _least_leaves(array) > MAX_LEAVES:
            raise self.refuse(pointer, "minItems", f"more than {MAX_LEAVES} values are required: ask for fewer items.")
        return array


def _least_leaves(node: Node) -> int:
    """How many values the shortest text of a node holds."""
    if isinstance(node, ArrayNode):
        return node.min_items * max(1, _least_leaves(node.item))
    if isinstance(node, ObjectNode):
        return sum(_least_leaves(entry.node) for entry in node.properties if entry.required)
    return 1


def _has_type(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _PYTHON_TYPES[kind])


def _escape_pointer(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


# ---------------------------------------------------------------------------------------------------------------------
# Literal texts between two values
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frame:
    """Where a value stands: the container, how many of its properties or items are decided, and the frame around it."""

    node: ObjectNode | ArrayNode
    done: int
    parent: "Frame | None"


@dataclass(frozen=True)
class Option:
    """One literal text that may come next, and what it leads to.

    Args:
        text: the literal, from the end of the last value up to the start of the next.
        leads_to: `"value"`: the value `leaf` follows; `"gap"`: an empty container was written, and a further text is
            due; `"end"`: the arguments are complete.
        leaf: the value that follows, else None.
        frame: where the value or the empty container stands.
        avoidable: it starts an optional property, or an item over the minimum; among the others there is exactly one.
    """

    text: str
    leads_to: Literal["value", "gap", "end"]
    leaf: Leaf | None
    frame: Frame | None
    avoidable: bool = False


def first_options(scaffold: Scaffold) -> list[Option]:
    """Texts that may open the arguments: `{` and what leads to the first value, or `{}`."""
    return list(_open(scaffold.root, None))


def next_options(leaf: Leaf | None, frame: Frame | None) -> list[Option]:
    """Texts that may follow a value (its closing quote included) or an empty container.

    Args:
        leaf: the value just finished, or None after an empty container.
        frame: where it stands.

    Returns:
        The options in schema order. No option's text is a prefix of another's unless that one opens a value there.
    """
    quote = '"' if leaf is not None and leaf.quoted else ""
    return list(_prefixed(quote, _after(frame)))


def _open(node: Node, frame: Frame | None) -> Iterator[Option]:
    if isinstance(node, Leaf):
        yield Option('"' if node.quoted else "", "value", node, frame)
    elif isinstance(node, ObjectNode):
        yield from _properties(node, 0, frame)
    else:
        if node.max_items is None or node.max_items > 0:
            yield from _prefixed("[", _open(node.item, Frame(node, 1, frame)), avoidable=node.min_items == 0)
        if node.min_items == 0:
            yield Option("[]", "gap", None, frame)


def _properties(node: ObjectNode, done: int, parent: Frame | None) -> Iterator[Option]:
    lead = ", " if done else "{"
    for index in range(done, len(node.properties)):
        entry = node.properties[index]
        # `done` counts properties passed, written or not; whether one was written decides between "{" and ", ", and a
        # frame only exists behind a written one.
        key = f"{lead}{json.dumps(entry.name, ensure_ascii=False)}: "
        yield from _prefixed(key, _open(entry.node, Frame(node, index + 1, parent)), avoidable=not entry.required)
        if entry.required:
            return
    if done:
        yield from _prefixed("}", _after(parent))
    else:
        yield Option("{}", "gap", None, parent)


def _after(frame: Frame | None) -> Iterator[Option]:
    if frame is None:
        yield Option("", "end", None, None)
    elif isinstance(frame.node, ObjectNode):
        yield from _properties(frame.node, frame.done, frame.parent)
    else:
        array = frame.node
        if array.max_items is None or frame.done < array.max_items:
            item = _open(array.item, Frame(array, frame.done + 1, frame.parent))
            yield from _prefixed(", ", item, avoidable=frame.done >= array.min_items)
        if frame.done >= array.min_items:
            yield from _prefixed("]", _after(frame.parent))


def _prefixed(text: str, options: Iterator[Option], avoidable: bool = False) -> Iterator[Option]:
    for option in options:
        yield replace(option, text=text + option.text, avoidable=avoidable or option.avoidable)


def argument_segments(scaffold: Scaffold, arguments: Mapping[str, Any]) -> list[str]:
    """Cut the JSON text of arguments as the options do: fixed texts and the texts of leaves in turn.

    Differs from `tokenization_utils.call_segments` where a closed set holds containers, or strings beside other values:
    each of its texts is one leaf, quotes and brackets included.

    Args:
        scaffold: the tool.
        arguments: what fits it, in any order.

    Returns:
        At least two segments, the first and the last fixed; an empty container ends its segment. Joined they are the
        arguments as `json.dumps` writes them in schema order.
    """
    segments, fixed = list[str](), list[str]()

    def end(*texts: str) -> None:
        segments.extend(["".join(fixed), *texts])
        fixed.clear()

    def container(brackets: str, entries: Iterable[tuple[str, Node, Any]]) -> None:
        lead = brackets[0]
        for key, node, value in entries:
            fixed.append(lead + key)
            walk(node, value)
            lead = ", "
        if lead == ", ":
            fixed.append(brackets[1])
        else:
            fixed.append(brackets)
            end()

    def walk(node: Node, value: Any) -> None:
        if isinstance(node, ObjectNode):
            present = [entry for entry in node.properties if entry.name in value]
            keys = [f"{json.dumps(entry.name, ensure_ascii=False)}: " for entry in present]
            container("{}", [(key, entry.node, value[entry.name]) for key, entry in zip(keys, present, strict=True)])
        elif isinstance(node, ArrayNode):
            container("[]", [("", node.item, item) for item in value])
        else:
            quote = '"' if node.quoted else ""
            fixed.append(quote)
            end(node.text(value))
            fixed.append(quote)

    walk(scaffold.root, arguments)
    return [*segments, "".join(fixed)]


# ---------------------------------------------------------------------------------------------------------------------
# The layout that a drafter fills
# ---------------------------------------------------------------------------------------------------------------------

_PRESENT = ("true", "false")


@dataclass(frozen=True)
class DraftSlot:
    """One place of the layout that a drafter fills.

    Args:
        path: JSON pointer of the value inside the arguments, for example `/days/0`.
        role: `"value"`, or a structure decision: `"presence"` of an optional property, `"length"` of an array.
        leaf: kind and choices of its text.
        alive_if: pairs (index of an earlier structure slot, n): this slot matters only if each of them decides on
            more than n (present counts as 1, absent as 0).
        open_ended: a length whose largest choice is the budget and not the schema's maximum.
    """

    path: str
    role: SlotRole
    leaf: Leaf
    alive_if: tuple[tuple[int, int], ...]
    open_ended: bool = False


@dataclass(frozen=True)
class Observed:
    """What is known of a slot's text: all of it, or its beginning."""

    text: str
    complete: bool


@dataclass(frozen=True)
class Layout:
    """A call with every property present and every array at its budget: fixed texts and slots in reading order.

    Args:
        scaffold: what it lays out.
        array_budget: items laid out per array, more where the schema asks for more.
        pieces: fixed texts, and ints that index `slots`.
        slots: the places to fill.
    """

    scaffold: Scaffold
    array_budget: int
    pieces: tuple[str | int, ...]
    slots: tuple[DraftSlot, ...]

    def assemble(self, texts: Sequence[str]) -> dict[str, Any]:
        """The arguments that a text for every slot stands for.

        Args:
            texts: one a slot, in the order of `slots`: raw string contents for string slots, JSON text for the
                others; texts of slots that are not alive are not read.

        Returns:
            The arguments, properties in schema order.
        """
        return _Reader(self, texts).object(self.scaffold.root, alive=True)

    def observe(self, written: str) -> tuple[list[Observed | None], bool]:
        """What the beginning of the arguments' JSON text says about the slots.

        Args:
            written: text from the opening brace on, as `json.dumps` writes it; may end anywhere.

        Returns:
            One entry a slot, None where nothing is known; and whether an array went on behind the items that are laid
            out, so that what follows it could not be read.
        """
        observer = _Observer(self, written)
        observer.node(self.scaffold.root, alive=True)
        return observer.known, observer.beyond

    def texts(self, arguments: Mapping[str, Any]) -> list[str | None]:
        """The inverse of `assemble`: the text of every slot, None for slots that are not alive.

        An array over the budget is cut to it: the length slot then decides on the budget itself, which readers take
            as "at least".

        Raises:
            ValueError: the arguments do not fit the scaffold.
        """
        writer = _Writer(self)
        writer.node(self.scaffold.root, "", arguments)
        return writer.texts


def draft_layout(scaffold: Scaffold, array_budget: int) -> Layout | None:
    """Lay a scaffold out for a drafter.

    Args:
        scaffold: the compiled tool.
        array_budget: items laid out per array, at least 1.

    Returns:
        The layout, or None when it would need more than `MAX_LEAVES` slots, or many times as many containers.
    """
    builder = _LayoutBuilder(array_budget)
    try:
        builder.node(scaffold.root, "", ())
    except _TooLarge:
        return None
    return Layout(scaffold, array_budget, tuple(builder.pieces), tuple(builder.slots))


class _TooLarge(Exception):
    pass


class _LayoutBuilder:
    def __init__(self, array_budget: int) -> None:
        self.array_budget = array_budget
        self.pieces: list[str | int] = []
        self.slots: list[DraftSlot] = []
        self.nodes = 0

    def fixed(self, text: str) -> None:
        if self.pieces and isinstance(self.pieces[-1], str):
            self.pieces[-1] += text
        else:
            self.pieces.append(text)

    def slot(
        self, path: str, role: SlotRole, leaf: Leaf, alive_if: tuple[tuple[int, int], ...], open_ended: bool = False
    ) -> int:
        if len(self.slots) >= MAX_LEAVES:
            raise _TooLarge
        self.pieces.append(len(self.slots))
        self.slots.append(DraftSlot(path, role, leaf, alive_if, open_ended))
        return len(self.slots) - 1

    def node(self, node: Node, path: str, alive_if: tuple[tuple[int, int], ...]) -> None:
        self.nodes += 1
        # Containers without a slot (arrays of a fixed length of empty objects) cost text and time all the same.
        if self.nodes > 4 * MAX_LEAVES:
            raise _TooLarge
        if isinstance(node, Leaf):
            quote = '"' if node.quoted else ""
            self.fixed(quote)
            self.slot(path, "value", node, alive_if)
            self.fixed(quote)
        elif isinstance(node, ObjectNode):
            self.object(node, path, alive_if)
        else:
            self.array(node, path, alive_if)

    def object(self, node: ObjectNode, path: str, alive_if: tuple[tuple[int, int], ...]) -> None:
        self.fixed("{")
        for index, entry in enumerate(node.properties):
            inner, alive = f"{path}/{_escape_pointer(entry.name)}", alive_if
            self.fixed(", " if index else "")
            if not entry.required:
                presence = self.slot(inner, "presence", Leaf("choice", inner, False, _PRESENT), alive_if)
                alive = (*alive_if, (presence, 0))
            self.fixed(f"{json.dumps(entry.name, ensure_ascii=False)}: ")
            self.node(entry.node, inner, alive)
        self.fixed("}")

    def array(self, node: ArrayNode, path: str, alive_if: tuple[tuple[int, int], ...]) -> None:
        counts = _draft_counts(node, self.array_budget)
        self.fixed("[")
        length = None
        if len(counts) > 1:
            leaf = Leaf("choice", path, False, tuple(map(str, counts)))
            length = self.slot(path, "length", leaf, alive_if, node.max_items is None or node.max_items > counts[-1])
        for index in range(counts[-1]):
            self.fixed(", " if index else "")
            uncertain = () if length is None or index < node.min_items else ((length, index),)
            self.node(node.item, f"{path}/{index}", alive_if + uncertain)
        self.fixed("]")


def _draft_counts(node: ArrayNode, budget: int) -> range:
    """The lengths that a drafter may decide on."""
    high = max(budget, node.min_items)
    return range(node.min_items, (high if node.max_items is None else min(high, node.max_items)) + 1)


class _Reader:
    """Reads slot texts back into a value; walks exactly as `_LayoutBuilder` does."""

    def __init__(self, layout: Layout, texts: Sequence[str]) -> None:
        self.budget = layout.array_budget
        if len(texts) != len(layout.slots):
            raise ValueError(f"{len(texts)} texts for {len(layout.slots)} slots: give one a slot.")
        self.texts = iter(texts)

    def node(self, node: Node, alive: bool) -> Any:
        if isinstance(node, ObjectNode):
            return self.object(node, alive)
        if isinstance(node, ArrayNode):
            return self.array(node, alive)
        text = next(self.texts)
        if not alive:
            return None
        return text if node.kind == "string" else node.value(text)

    def object(self, node: ObjectNode, alive: bool) -> dict[str, Any]:
        result = {}
        for entry in node.properties:
            decided = entry.required or next(self.texts) == "true"
            present = alive and decided
            value = self.node(entry.node, present)
            if present:
                result[entry.name] = value
        return result

    def array(self, node: ArrayNode, alive: bool) -> list[Any]:
        counts = _draft_counts(node, self.budget)
        length = counts[-1]
        if len(counts) > 1:
            text = next(self.texts)
            length = int(text) if alive else 0
        values = [self.node(node.item, alive and index < length) for index in range(counts[-1])]
        return values[:length]


class _Writer:
    """Writes a value as slot texts; walks exactly as `_LayoutBuilder` does."""

    def __init__(self, layout: Layout) -> None:
        self.budget = layout.array_budget
        self.texts: list[str | None] = []

    def node(self, node: Node, path: str, value: Any, alive: bool = True) -> None:
        if isinstance(node, ObjectNode):
            self.object(node, path, value, alive)
        elif isinstance(node, ArrayNode):
            self.array(node, path, value, alive)
        elif not alive:
            self.texts.append(None)
        else:
            text = value if node.kind == "string" else node.text(value)
            if not isinstance(text, str) or (node.kind == "choice" and text not in node.choices):
                raise ValueError(f"{value!r} at {path or '/'} does not fit the scaffold.")
            self.texts.append(text)

    def object(self, node: ObjectNode, path: str, value: Any, alive: bool) -> None:
        if alive and (not isinstance(value, Mapping) or set(value) - {entry.name for entry in node.properties}):
            raise ValueError(f"{value!r} at {path or '/'} does not fit the scaffold's object.")
        for entry in node.properties:
            present = alive and entry.name in value
            if not entry.required:
                self.texts.append(("true" if present else "false") if alive else None)
            elif alive and not present:
                raise ValueError(f"{path}/{entry.name} is required and missing.")
            self.node(entry.node, f"{path}/{entry.name}", value[entry.name] if present else None, present)

    def array(self, node: ArrayNode, path: str, value: Any, alive: bool) -> None:
        counts = _draft_counts(node, self.budget)
        if alive and (not isinstance(value, Sequence) or isinstance(value, str) or len(value) < node.min_items):
            raise ValueError(f"{value!r} at {path or '/'} does not fit the scaffold's array.")
        items = list(value) if alive else []
        if len(counts) > 1:
            self.texts.append(str(min(len(items), counts[-1])) if alive else None)
        for index in range(counts[-1]):
            present = index < len(items)
            self.node(node.item, f"{path}/{index}", items[index] if present else None, present)


_NUMBER = re.compile(r"[-+.0-9eE]*")


class _Observer:
    """Reads as much of a partly written value as there is; walks exactly as `_LayoutBuilder` does."""

    def __init__(self, layout: Layout, written: str) -> None:
        self.budget = layout.array_budget
        self.written = written
        self.place = 0
        self.exhausted = False
        self.beyond = False
        self.known: list[Observed | None] = []

    def literal(self, text: str) -> bool:
        """Read a fixed text; sets `exhausted` where what is left could still become it."""
        if self.written.startswith(text, self.place):
            self.place += len(text)
            return True
        self.exhausted = self.exhausted or text.startswith(self.written[self.place :])
        return False

    def node(self, node: Node, alive: bool) -> None:
        alive = alive and not self.exhausted
        if isinstance(node, ObjectNode):
            self.object(node, alive and self.literal("{"))
        elif isinstance(node, ArrayNode):
            self.array(node, alive and self.literal("["))
        elif not alive or (node.quoted and not self.literal('"')):
            self.known.append(None)
        else:
            self.known.append(self.string(node) if node.quoted else self.plain(node))

    def object(self, node: ObjectNode, alive: bool) -> None:
        lead = ""
        for entry in node.properties:
            alive = alive and not self.exhausted
            present = alive and self.literal(f"{lead}{json.dumps(entry.name, ensure_ascii=False)}: ")
            if not entry.required:
                certain = alive and not self.exhausted
                self.known.append(Observed("true" if present else "false", True) if certain else None)
            self.node(entry.node, present)
            lead = ", " if present else lead
        if alive and not self.exhausted:
            self.literal("}")

    def array(self, node: ArrayNode, alive: bool) -> None:
        counts = _draft_counts(node, self.budget)
        length_slot = len(self.known)
        if len(counts) > 1:
            self.known.append(None)
        count, ended = 0, not alive
        for index in range(counts[-1]):
            ended = ended or self.exhausted or self.ends(index)
            count += not ended
            self.node(node.item, not ended)
        if alive and not self.exhausted:
            if not ended and not self.literal("]"):
                # The text goes on with an item for which there is no slot (or with nothing that can be told apart
                # from one).
                self.beyond = not self.exhausted
                self.exhausted = True
            elif len(counts) > 1:
                self.known[length_slot] = Observed(str(count), True)

    def ends(self, index: int) -> bool:
        """Whether the array ends before its item `index`; reads the bracket or the comma."""
        if self.written.startswith("]", self.place):
            self.place += 1
            return True
        if index == 0:
            self.exhausted = self.exhausted or self.place == len(self.written)
            return False
        return not self.literal(", ")

    def string(self, leaf: Leaf) -> Observed:
        end = self.place
        while end < len(self.written) and self.written[end] != '"':
            end += 2 if self.written[end] == "\\" else 1
        text, complete = self.written[self.place : end], end < len(self.written)
        self.place = end + 1
        self.exhausted = self.exhausted or not complete
        if leaf.kind == "string":
            text = _unescape(text)
        return Observed(text, complete)

    def plain(self, leaf: Leaf) -> Observed:
        rest = self.written[self.place :]
        if leaf.kind == "choice":
            # Only a delimiter behind it tells that a choice is whole: 1 may still become 10.
            whole = (choice for choice in leaf.choices if rest.startswith(tuple(choice + end for end in ",]}")))
            text = next(whole, rest)
        else:
            text = _NUMBER.match(rest).group()  # type: ignore[union-attr]
        self.place += len(text)
        self.exhausted = self.exhausted or self.place >= len(self.written)
        return Observed(text, not self.exhausted)


def _unescape(text: str) -> str:
    """The raw text of escaped string contents that may end inside an escape, which is then left out."""
    for cut in range(len(text), max(-1, len(text) - 7), -1):
        try:
            return json.loads(f'"{text[:cut]}"')
        except json.JSONDecodeError:
            continue
    return ""
