"""Tool schemas of every dialect -> JSON Schema draft 2020-12, and tools of every form -> the OpenAI form.

Takes what users have: draft 3 to 2019-09, OpenAPI, MCP, BFCL and other language type names, schemas with missing or
null keywords; gives what they mean, with a list of the changes. It judges nothing: what it does not understand stays.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

# Bounds on hostile schemas: deeper ones may contain themselves, and larger ones cost more than they are worth.
MAX_LEVELS = 64
MAX_SCHEMAS = 30_000

DRAFT = "https://json-schema.org/draft/2020-12/schema"


@dataclass(frozen=True)
class Change:
    """One change that made a schema standard.

    Args:
        pointer: JSON pointer to the changed schema, in the schema as it was given.
        before, after: the keywords at issue, as text; long values are shortened.
    """

    pointer: str
    before: str
    after: str


def normalise_schema(schema: Any, tool: str) -> tuple[dict[str, Any], tuple[Change, ...]]:
    """Bring the parameters of a tool into JSON Schema draft 2020-12.

    A change keeps the values that are allowed or narrows them to what the author means (a missing `type` that
    `properties` tells, for example); none allows more. The result shares the parts that did not change with the
    schema, which stays as it is; a second run changes nothing.

    Args:
        schema: a JSON Schema of any dialect; None is no parameters.
        tool: name of the tool, for errors.

    Returns:
        The schema in draft 2020-12, and the changes in the order in which they were met.

    Raises:
        ValueError: the schema is no JSON object, contains itself, or is nested deeper than 64 levels.

    >>> schema, changes = normalise_schema({"properties": {"day": {"type": "str", "nullable": True}}}, "set_alarm")
    >>> schema
    {'properties': {'day': {'type': ['string', 'null']}}, 'type': 'object'}
    >>> changes[0]
    Change(pointer='', before='{"properties": {"day": {"type": "str", "nullable": true}}}', after='{"type": "object"}')
    """
    if schema is None:
        empty = {"type": "object", "properties": {}}
        return empty, (Change("", "null", _shown(empty)),)
    if isinstance(schema, bool):
        given: dict[str, Any] = {} if schema else {"not": {}}
        return given, (Change("", json.dumps(schema), _shown(given)),)
    if not isinstance(schema, Mapping):
        raise ValueError(f"tool {tool!r}: the parameters are a JSON Schema object, not {type(schema).__name__}.")
    document = _Document(tool)
    result = document.schema(schema, _Place("", "", "root"))
    if document.guessed and document.refers_under_negation:
        # A reference carries a guessed type to where a narrower schema allows more.
        document = _Document(tool)
        result = document.schema(schema, _Place("", "", "root", guess=False))
    document.move_references()
    return result, tuple(document.changes)


def normalise_tool(tool: Any) -> dict[str, Any]:
    """Bring a tool into the OpenAI form `{"type": "function", "function": {"name", "description", "parameters"}}`.

    Args:
        tool: a pydantic model class (its fields are the parameters), an MCP tool (dict or object with `inputSchema`),
            an Anthropic tool (`input_schema`), a flat tool of OpenAI's Responses API, a Gemini function declaration,
            or a tool of the OpenAI form, which stays as it is.

    Returns:
        The tool. Schemas are not changed, and keys that are not known stay: beside `name`, or where they were.

    Raises:
        ValueError: it is none of these, or several Gemini declarations at once.
    """
    if isinstance(tool, type) and callable(getattr(tool, "model_json_schema", None)):
        schema = dict(tool.model_json_schema())  # type: ignore[attr-defined]
        described = {"description": schema.pop("description")} if "description" in schema else {}
        return {"type": "function", "function": {"name": tool.__name__, **described, "parameters": schema}}
    if not isinstance(tool, Mapping) and hasattr(tool, "inputSchema"):
        tool = _fields(tool)
    if not isinstance(tool, Mapping):
        raise ValueError(f"a tool is a dict, a pydantic model class or an MCP tool, not {type(tool).__name__}.")
    for key in ("function_declarations", "functionDeclarations"):
        if key in tool:
            if not isinstance(tool[key], Sequence) or len(tool[key]) != 1:
                raise ValueError(f"a tool holds several {key}: pass each of them as a tool.")
            return normalise_tool(tool[key][0])
    if isinstance(tool.get("function"), Mapping):
        function = _function(tool["function"])
        return dict(tool) if function == tool["function"] else {**tool, "function": function}
    if "name" not in tool or tool.get("type", "function") not in ("function", "custom"):
        return dict(tool)
    return {"type": "function", "function": _function({key: tool[key] for key in tool if key != "type"})}


def _fields(tool: Any) -> dict[str, Any]:
    """The fields of an MCP tool that is an object."""
    if callable(getattr(tool, "model_dump", None)):
        return tool.model_dump(mode="json", by_alias=True, exclude_none=True)
    found = {key: getattr(tool, key, None) for key in ("name", "description", "inputSchema")}
    return {key: value for key, value in found.items() if value is not None}


def _function(function: Mapping[str, Any]) -> dict[str, Any]:
    """A function with its schema under `parameters`."""
    names = ("inputSchema", "input_schema", "parameters_json_schema", "parametersJsonSchema")
    name = next((name for name in names if name in function), None)
    if name is None or function.get("parameters") is not None:
        return dict(function)
    renamed = ((("parameters" if key == name else key), value) for key, value in function.items())
    return {key: value for key, value in renamed if (key, value) != ("parameters", None)}


# ---------------------------------------------------------------------------------------------------------------------
# Words of the dialects
# ---------------------------------------------------------------------------------------------------------------------

_TYPES = ("string", "integer", "number", "boolean", "null", "object", "array")
# Names of other languages in lower case, for they are met in any case.
_TYPE_NAMES: dict[str, str | None] = {
    name: kind
    for kind, names in {
        "object": "dict hashmap hashtable map mapping record struct",
        "number": "float double real decimal bigdecimal",
        "integer": "int long short byte biginteger bigint",
        "boolean": "bool",
        "string": "str char character text",
        "array": "list tuple arraylist linkedlist vector queue stack set hashset frozenset",
        "null": "none nonetype void",
        None: "any unknown type_unspecified",
    }.items()
    for name in names.split()
} | {kind: kind for kind in _TYPES}
# BFCL leaves the type of a value empty where it means a string.
_TYPE_NAMES[""] = "string"
_SETS = {"set", "hashset", "frozenset"}


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_COUNTS = _words("minLength maxLength minItems maxItems minContains maxContains minProperties maxProperties")
_BOUNDS = _words("minimum maximum exclusiveMinimum exclusiveMaximum multipleOf")
_NUMERIC = frozenset(_COUNTS + _BOUNDS)
_WORDS_OF_TYPE = {
    "object": _words(
        """properties required additionalProperties patternProperties propertyNames minProperties maxProperties
        dependentRequired dependentSchemas unevaluatedProperties"""
    ),
    "array": _words("items prefixItems minItems maxItems uniqueItems contains unevaluatedItems"),
    "string": _words("pattern minLength maxLength contentEncoding contentMediaType"),
    "number": _BOUNDS,
}
_TYPE_OF_FORMAT = {"int32": "integer", "int64": "integer", "float": "number", "double": "number"} | dict.fromkeys(
    _words(
        """date date-time time duration email idn-email hostname idn-hostname ipv4 ipv6 uri uri-reference iri
        iri-reference uuid uri-template json-pointer relative-json-pointer regex byte binary password"""
    ),
    "string",
)
# Where other schemas speak of the same value.
_IN_PLACE = _words("$ref $dynamicRef allOf anyOf oneOf not if then else const dependentSchemas")
# What describes a value, or is there for references.
_BESIDE = _words(
    "title description default examples deprecated readOnly writeOnly $comment $schema $id $anchor $defs definitions"
)
# Null is what many programs write for a keyword that is not there; it is a value for the others (`const`, `default`).
_NEVER_NULL = {
    *_words("type enum format optional nullable id additionalItems dependencies"),
    *(*_COUNTS, *_BOUNDS, *_IN_PLACE, *_BESIDE),
    *(word for words in _WORDS_OF_TYPE.values() for word in words),
} - {"const", "default"}
_TRUE, _FALSE = (True, "true", "True", "yes"), (False, "false", "False", "no")


# ---------------------------------------------------------------------------------------------------------------------
# The walk
# ---------------------------------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """Where a schema stands.

    Args:
        given: JSON pointer in the schema as it was given.
        target: JSON pointer in the result.
        role: `"root"`, `"property"`, `"item"` or `"other"`.
        level: how many schemas it is inside of.
        guess: a type may be guessed: narrowing here narrows the whole.
        typed: another schema gives the type of the same value.
    """

    given: str
    target: str
    role: str
    level: int = 0
    guess: bool = True
    typed: bool = False


class _Document:
    """One schema on its way; lives for one `normalise_schema`."""

    def __init__(self, tool: str) -> None:
        self.tool = tool
        self.changes: list[Change] = []
        self.schemas = 0
        self.moved: dict[str, str] = {}
        self.references: list[tuple[str, dict[str, Any]]] = []
        self.guessed = False
        self.refers_under_negation = False

    def schema(self, given: Any, place: _Place) -> Any:
        """A schema and all inside it; what is no JSON object stays as it is."""
        if place.given != place.target:
            self.moved[place.given] = place.target
        if not isinstance(given, Mapping):
            return given
        self.schemas += 1
        if place.level > MAX_LEVELS:
            fault = f"schemas are nested deeper than {MAX_LEVELS} levels or contain themselves: flatten them"
        elif self.schemas > MAX_SCHEMAS:
            fault = f"there are more than {MAX_SCHEMAS} schemas in it: split the tool"
        else:
            fault = ""
        if fault:
            raise ValueError(f"tool {self.tool!r}, parameters at {place.given or '/'!r}: {fault}.")
        result = dict(given)
        self._nulls(result, place)
        self._names(result, place)
        self._types(result, place)
        self._annotations(result, place)
        self._numbers(result, place)
        self._empty_lists(result, place)
        origin = self._arrays_and_dependencies(result, place)
        self._required(result, place)
        self._guess_type(result, place)
        wrapped = self._nullable(result, place)
        inner = place._replace(target=place.target + "/anyOf/0", level=place.level + 1) if wrapped else place
        if not _INSIDE.keys().isdisjoint(result):
            self._inside(result, place, inner, origin)
        outside: dict[str, Any] = {}
        if wrapped:
            outside = {word: result.pop(word) for word in _BESIDE if word in result}
            outside["anyOf"] = [result, {"type": "null"}]
        if "$ref" in result:
            self.references.append((place.given, result))
            self.refers_under_negation |= not place.guess
        return outside or result

    def change(self, place: _Place, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
        """Put a change on the list."""
        self.changes.append(Change(place.given, _shown(before), _shown(after)))

    def swap(self, result: dict[str, Any], place: _Place, before: Sequence[str], **after: Any) -> None:
        """Replace some keywords by others, and put that on the list."""
        old = {word: result[word] for word in before if word in result}
        for word in old.keys() - after.keys():
            del result[word]
        result.update(after)  # what is replaced keeps its place
        self.change(place, old, after)

    # ------------------------------------------------------------------------------------- a schema, keyword by keyword

    def _nulls(self, result: dict[str, Any], place: _Place) -> None:
        if None not in result.values():
            return
        for word in [word for word, value in result.items() if value is None and word in _NEVER_NULL]:
            self.swap(result, place, [word])

    def _names(self, result: dict[str, Any], place: _Place) -> None:
        """`$schema`, `id` and `$id`."""
        draft = result.get("$schema")
        if isinstance(draft, str) and re.match(r"https?://json-schema\.org/", draft) and draft != DRAFT:
            self.swap(result, place, ["$schema"], **{"$schema": DRAFT})
        if isinstance(result.get("id"), str) and "$id" not in result:
            self.swap(result, place, ["id"], **{"$id": result["id"]})
        name = result.get("$id")
        if isinstance(name, str) and re.fullmatch(r"#[A-Za-z_][-A-Za-z0-9._]*", name) and "$anchor" not in result:
            self.swap(result, place, ["$id"], **{"$anchor": name[1:]})

    def _types(self, result: dict[str, Any], place: _Place) -> None:
        """Type names of other languages; a list of one type."""
        given = result.get("type")
        if isinstance(given, str) and given in _TYPES:
            return
        listed = list(given) if isinstance(given, (list, tuple)) else [given]
        names = [name.strip().lower() for name in listed if isinstance(name, str)]
        if not names or len(names) < len(listed) or not all(name in _TYPE_NAMES for name in names):
            return
        kinds = list(dict.fromkeys(_TYPE_NAMES[name] for name in names))
        unique = {"uniqueItems": True} if "uniqueItems" not in result and not _SETS.isdisjoint(names) else {}
        if None in kinds:
            self.swap(result, place, ["type"])
        elif (kind := kinds[0] if len(kinds) == 1 else kinds) != given:
            self.swap(result, place, ["type"], type=kind, **unique)

    def _annotations(self, result: dict[str, Any], place: _Place) -> None:
        """OpenAPI's `example`, and examples that are no list."""
        examples = result.get("examples", [])
        if not isinstance(examples, (list, tuple)):
            self.swap(result, place, ["examples"], examples=[examples])
        if "example" in result:
            self.swap(result, place, ["example"], examples=[*result.get("examples", []), result["example"]])

    def _numbers(self, result: dict[str, Any], place: _Place) -> None:
        """Numbers that are written as strings, counts that are written as floats, and draft 4's exclusive bounds."""
        if _NUMERIC.isdisjoint(result):
            return
        for word in (*_COUNTS, *_BOUNDS):
            if word in result and (exact := _exact_number(result[word], word in _COUNTS)) is not None:
                self.swap(result, place, [word], **{word: exact})
        for word, bound in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
            if result.get(word) is False:
                self.swap(result, place, [word])
            elif result.get(word) is True and _is_number(result.get(bound)):
                self.swap(result, place, [word, bound], **{word: result[bound]})

    def _empty_lists(self, result: dict[str, Any], place: _Place) -> None:
        """Empty objects as PHP writes them."""
        for word in _MAPS:
            if word in result and result[word] == []:
                self.swap(result, place, [word], **{word: {}})

    def _arrays_and_dependencies(self, result: dict[str, Any], place: _Place) -> dict[str, str]:
        """Keywords that draft 2020-12 gave other names; tells for the new ones how they were called."""
        origin = {}
        if isinstance(result.get("items"), (list, tuple)) and "prefixItems" not in result:
            after = {"prefixItems": list(result["items"])} if result["items"] else {}
            origin["prefixItems"] = "items"
            if "additionalItems" in result:
                after["items"] = result["additionalItems"]
                origin["items"] = "additionalItems"
            self.swap(result, place, ["items", "additionalItems"], **after)
        elif "additionalItems" in result and "prefixItems" in result and "items" not in result:
            origin["items"] = "additionalItems"
            self.swap(result, place, ["additionalItems"], items=result["additionalItems"])
        elif "additionalItems" in result and "prefixItems" not in result:
            self.swap(result, place, ["additionalItems"])  # says nothing without a list of items
        if isinstance(result.get("dependencies"), Mapping) and self._dependencies(result, place):
            origin["dependentSchemas"] = "dependencies"
        return origin

    def _dependencies(self, result: dict[str, Any], place: _Place) -> bool:
        """Draft 7's `dependencies`: lists of names, or schemas; draft 3's single names. Whether any was moved."""
        names, schemas = result.get("dependentRequired", {}), result.get("dependentSchemas", {})
        if not isinstance(names, Mapping) or not isinstance(schemas, Mapping):
            return False
        moved: dict[str, dict[str, Any]] = {"dependentRequired": {**names}, "dependentSchemas": {**schemas}}
        others = {}
        for name, value in result["dependencies"].items():
            listed = [value] if isinstance(value, str) else value
            if isinstance(listed, (list, tuple)) and _all_names(listed) and name not in names:
                moved["dependentRequired"][name] = list(dict.fromkeys(listed))
            elif isinstance(value, (Mapping, bool)) and name not in schemas:
                moved["dependentSchemas"][name] = value
            else:
                others[name] = value
        if others and len(others) == len(result["dependencies"]):
            return False
        after = {word: value for word, value in {**moved, "dependencies": others}.items() if value}
        self.swap(result, place, [*moved, "dependencies"], **after)
        return True

    def _required(self, result: dict[str, Any], place: _Place) -> None:
        """Names of required properties, also where a property itself says that it is."""
        listed = result.get("required")
        if isinstance(listed, (list, tuple)) and _all_names(listed) and len({*listed}) < len(listed):
            self.swap(result, place, ["required"], required=list(dict.fromkeys(listed)))
        elif listed is False or (listed is True and place.role != "other"):
            self.swap(result, place, ["required"])
        if "optional" in result:
            optional = result["optional"]
            names_left_out = isinstance(optional, (list, tuple)) and _all_names(optional)
            if names_left_out or (place.role != "other" and _one_of(optional, (*_TRUE, *_FALSE))):
                self.swap(result, place, ["optional"])
        properties = result.get("properties")
        names = result.get("required", [])
        if isinstance(properties, Mapping) and isinstance(names, (list, tuple)) and _all_names(names):
            known = {*names}
            lifted = [name for name, inner in properties.items() if name not in known and _says_required(inner)]
            if lifted:
                self.swap(result, place, ["required"], required=[*names, *lifted])

    def _guess_type(self, result: dict[str, Any], place: _Place) -> None:
        """A missing `type`, where the other keywords tell it."""
        if "type" in result:
            return
        kind = _type_of_values(result)
        if kind is None and place.guess and not place.typed:
            kind = _type_of_words(result)
            self.guessed |= kind is not None
        if kind is not None:
            result["type"] = kind
            told = [word for word in result if word != "type" and word not in _BESIDE]
            self.change(place, {word: result[word] for word in told}, {"type": kind})

    def _nullable(self, result: dict[str, Any], place: _Place) -> bool:
        """OpenAPI's `nullable`; whether the schema has to become one of two alternatives."""
        flag = result.get("nullable")
        if not isinstance(flag, bool):
            return False
        kinds = result["type"] if isinstance(result.get("type"), (list, tuple)) else [result.get("type")]
        combined = [word for word in _IN_PLACE if word in result or not _all_names(kinds if "type" in result else [])]
        if not flag and len(kinds) > 1 and "null" in kinds:
            left = [kind for kind in kinds if kind != "null"]
            self.swap(result, place, ["nullable", "type"], type=left[0] if len(left) == 1 else left)
        elif not flag or place.role == "root":  # the arguments of a call are an object
            self.swap(result, place, ["nullable"])
        elif not combined:
            after: dict[str, Any] = {}
            if "type" in result:
                after["type"] = list(dict.fromkeys([*kinds, "null"])) if kinds != ["null"] else "null"
            if isinstance(result.get("enum"), (list, tuple)):
                after["enum"] = [*result["enum"], *([] if _one_of(None, result["enum"]) else [None])]
            self.swap(result, place, ["nullable", *after], **after)
        elif isinstance(result.get("anyOf"), (list, tuple)) and not {*result} - {*_BESIDE, "anyOf", "nullable"}:
            branches = [*result["anyOf"], *([] if any(map(_is_null, result["anyOf"])) else [{"type": "null"}])]
            self.swap(result, place, ["nullable", "anyOf"], anyOf=branches)
        else:
            del result["nullable"]
            rest = {word: value for word, value in result.items() if word not in _BESIDE}
            self.change(place, {"nullable": True, **rest}, {"anyOf": [rest, {"type": "null"}]})
            return True
        return False

    # ---------------------------------------------------------------------------------------------- schemas inside it

    def _inside(self, result: dict[str, Any], outer: _Place, place: _Place, origin: Mapping[str, str]) -> None:
        """Normalise what a schema holds, in `result` itself; `outer` is where its definitions will stand."""
        typed = place.typed or "type" in result
        for word, (role, same_value, monotone) in _INSIDE.items():
            if word not in result:
                continue
            held, around = result[word], outer if word in _BESIDE else place
            given, target = f"{around.given}/{origin.get(word, word)}", f"{around.target}/{word}"
            here = _Place(given, target, role, around.level + 1, around.guess and monotone, typed and same_value)
            if word in _MAPS and isinstance(held, Mapping):
                result[word] = {name: self.schema(inner, _step(here, name)) for name, inner in held.items()}
            elif word in _LISTS and isinstance(held, (list, tuple)):
                result[word] = [self.schema(inner, _step(here, index)) for index, inner in enumerate(held)]
            elif word not in _MAPS and word not in _LISTS:
                result[word] = self.schema(held, here)

    def move_references(self) -> None:
        """Point references to where the schemas are now."""
        for pointer, schema in self.references:
            reference = schema["$ref"]
            if isinstance(reference, str) and reference.startswith("#/"):
                target = self.moved.get(unquote(reference[1:]))
                if target is not None:
                    schema["$ref"] = "#" + quote(target, safe="/~!$&'()*+,;=:@")
                    self.changes.append(Change(pointer, _shown({"$ref": reference}), _shown({"$ref": schema["$ref"]})))


# Keywords that hold schemas: by name, in a list, or one. Of each: the role of the schemas inside, whether they speak of
# the same value, and whether narrowing them narrows the whole.
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_INSIDE: dict[str, tuple[str, bool, bool]] = {
    "$defs": ("other", False, True),
    "definitions": ("other", False, True),
    "properties": ("property", False, True),
    "patternProperties": ("item", False, True),
    "additionalProperties": ("item", False, True),
    "unevaluatedProperties": ("item", False, True),
    "propertyNames": ("other", False, False),
    "prefixItems": ("item", False, True),
    "items": ("item", False, True),
    "unevaluatedItems": ("item", False, True),
    "contains": ("other", False, False),
    "allOf": ("other", True, True),
    "anyOf": ("other", True, True),
    "oneOf": ("other", True, False),
    "not": ("other", True, False),
    "if": ("other", True, False),
    "then": ("other", True, False),
    "else": ("other", True, False),
    "dependentSchemas": ("other", True, False),
}


def _step(place: _Place, name: Any) -> _Place:
    escaped = str(name).replace("~", "~0").replace("/", "~1")
    return _Place(f"{place.given}/{escaped}", f"{place.target}/{escaped}", *place[2:])


# ---------------------------------------------------------------------------------------------------------------------
# Single values
# ---------------------------------------------------------------------------------------------------------------------


def _one_of(value: Any, listed: Sequence[Any]) -> bool:
    """Whether a value is in a list; 1 is not true."""
    return any(type(value) is type(item) and value == item for item in listed)


def _all_names(listed: Sequence[Any]) -> bool:
    """Whether a list holds strings alone."""
    return all(isinstance(item, str) for item in listed)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_null(schema: Any) -> bool:
    return isinstance(schema, Mapping) and schema.get("type") == "null"


def _says_required(schema: Any) -> bool:
    """Whether the schema of a property says that it must be there (draft 3)."""
    if not isinstance(schema, Mapping):
        return False
    return schema.get("required") is True or ("optional" in schema and _one_of(schema["optional"], _FALSE))


def _exact_number(value: Any, count: bool) -> int | float | None:
    """The number that a string stands for, or the int that a count stands for; None where it is fine or unclear."""
    if isinstance(value, str) and len(value) <= 400 and re.fullmatch(r"\s*-?\d+(\.\d+)?([eE][-+]?\d{1,3})?\s*", value):
        exact = Fraction(value.strip())
        if exact.denominator == 1 and (count or re.fullmatch(r"\s*-?\d+\s*", value)):
            return int(exact)
        number = float(value)
        return number if math.isfinite(number) and Fraction(repr(number)) == exact and not count else None
    if count and isinstance(value, float) and value.is_integer():
        return int(value)
    return None


def _type_of_values(schema: Mapping[str, Any]) -> str | None:
    """The one type of all values of `enum` or `const`."""
    listed = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(listed, (list, tuple)):
        return None
    kinds = {_type_of_value(value) for value in listed}
    if kinds == {"integer", "number"}:
        return "number"
    return kinds.pop() if len(kinds) == 1 else None


def _type_of_value(value: Any) -> str | None:
    kinds = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}
    if type(value) in kinds:
        return kinds[type(value)]
    return "object" if isinstance(value, Mapping) else "array" if isinstance(value, (list, tuple)) else None


def _type_of_words(schema: Mapping[str, Any]) -> str | None:
    """The type that the keywords of a schema speak of, where it is one and no branch speaks of another."""
    if "$ref" in schema or "$dynamicRef" in schema or "enum" in schema or "const" in schema:
        return None
    kinds = {kind for kind, words in _WORDS_OF_TYPE.items() if any(word in schema for word in words)}
    form = schema.get("format")
    if isinstance(form, str) and form in _TYPE_OF_FORMAT:
        kinds.add(_TYPE_OF_FORMAT[form])
    if kinds == {"integer", "number"}:
        kinds = {"integer"}
    if len(kinds) != 1:
        return None
    kind = kinds.pop()
    branches = [branch for word in ("allOf", "anyOf", "oneOf") for branch in _items(schema.get(word))]
    return kind if all(_may_be(branch, kind) for branch in branches) else None


def _items(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else ()


def _may_be(branch: Any, kind: str) -> bool:
    """Whether a branch speaks of a type, as far as it says."""
    if not isinstance(branch, Mapping):
        return True
    if any(word in branch for word in ("$ref", "$dynamicRef", "allOf", "anyOf", "oneOf", "enum", "const")):
        return False
    named = branch.get("type", kind)
    return kind in [_TYPE_NAMES.get(name.strip().lower()) for name in _items(named) or [named] if isinstance(name, str)]


def _shown(fragment: Mapping[str, Any]) -> str:
    """Keywords as JSON, shortened."""
    return "{" + ", ".join(f'"{word}": {_short(value, 2)}' for word, value in fragment.items()) + "}"


_encode = json.JSONEncoder(ensure_ascii=False).encode


def _short(value: Any, levels: int) -> str:
    if isinstance(value, str):
        text = _encode(value[:80])
    elif isinstance(value, (Mapping, list, tuple)):
        left, right = "{}" if isinstance(value, Mapping) else "[]"
        if not levels and value:
            return left + "..." + right
        if isinstance(value, Mapping):
            shown = [f"{_short(name, 0)}: {_short(item, levels - 1)}" for name, item in islice(value.items(), 4)]
        else:
            shown = [_short(item, levels - 1) for item in value[:4]]
        return left + ", ".join(shown + ["..."] * (len(value) > 4)) + right
    else:
        try:
            text = _encode(value)
        except (TypeError, ValueError):  # no JSON value, or an int with more digits than Python prints
            text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."
