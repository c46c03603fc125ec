"""Every dialect becomes the draft 2020-12 that its author means, judged by jsonschema's validators of each draft."""

import copy
import gzip
import json
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from repo_package import ROOT, load_repo_module

module = load_repo_module("schema_dialects")
normalise_schema, normalise_tool, Change = module.normalise_schema, module.normalise_tool, module.Change

quick = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
DATA = ROOT.parent / "shared" / "data" / "bfcl_open"
STRING, NULL = {"type": "string"}, {"type": "null"}


def normalised(schema: Any) -> dict[str, Any]:
    """The normalised schema, after checks that hold for every one."""
    before = copy.deepcopy(schema)
    result, changes = normalise_schema(schema, "act")
    assert schema == before
    assert bool(changes) == (json.dumps(result, sort_keys=True) != json.dumps(before, sort_keys=True))
    assert normalise_schema(result, "act") == (result, ())
    return result


def accepts(schema: Any, value: Any, validator: Any = Draft202012Validator) -> bool:
    return validator(schema).is_valid(value)


# --------------------------------------------------------------------------------------------- one case after the other

CASES: dict[str, tuple[Any, Any]] = {
    # type names
    "python": (
        {"type": "dict", "properties": {"a": {"type": "float"}}},
        {"type": "object", "properties": {"a": {"type": "number"}}},
    ),
    "java": ({"type": "HashMap"}, {"type": "object"}),
    "gemini": (
        {"type": "OBJECT", "properties": {"a": {"type": "STRING"}}},
        {"type": "object", "properties": {"a": STRING}},
    ),
    "any": ({"type": "any", "description": "x"}, {"description": "x"}),
    "any among others": ({"type": ["string", "any"]}, {}),
    "empty name": ({"type": ""}, STRING),
    "tuple": ({"type": "tuple", "items": {"type": "float"}}, {"type": "array", "items": {"type": "number"}}),
    "set": (
        {"type": "set", "items": {"type": "int"}},
        {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
    ),
    "set that may repeat": ({"type": "set", "uniqueItems": False}, {"type": "array", "uniqueItems": False}),
    "one type in a list": ({"type": ["str"]}, STRING),
    "types in a list": ({"type": ["str", "None", "string"]}, {"type": ["string", "null"]}),
    "unknown name": ({"type": "Widget"}, {"type": "Widget"}),
    "a property called type": (
        {"type": "object", "properties": {"type": {"type": "str"}}},
        {"type": "object", "properties": {"type": STRING}},
    ),
    "values are no schemas": (
        {"enum": [{"type": "dict"}], "default": {"type": "dict"}},
        {"enum": [{"type": "dict"}], "default": {"type": "dict"}, "type": "object"},
    ),
    # drafts
    "draft": ({"$schema": "http://json-schema.org/draft-07/schema#"}, {"$schema": module.DRAFT}),
    "other dialect": ({"$schema": "https://example.com/mine"}, {"$schema": "https://example.com/mine"}),
    "id": ({"id": "http://example.com/x"}, {"$id": "http://example.com/x"}),
    "anchor": ({"id": "#here"}, {"$anchor": "here"}),
    "list of items": (
        {"type": "array", "items": [{"type": "int"}], "additionalItems": {"type": "str"}},
        {"type": "array", "prefixItems": [{"type": "integer"}], "items": STRING},
    ),
    "empty list of items": (
        {"type": "array", "items": [], "additionalItems": False},
        {"type": "array", "items": False},
    ),
    "additional items of no list": (
        {"type": "array", "items": STRING, "additionalItems": False},
        {"type": "array", "items": STRING},
    ),
    "additional items behind a prefix": (
        {"type": "array", "prefixItems": [STRING], "additionalItems": False},
        {"type": "array", "prefixItems": [STRING], "items": False},
    ),
    "two lists of items": (
        {"type": "array", "items": [STRING], "prefixItems": []},
        {"type": "array", "items": [STRING], "prefixItems": []},
    ),
    "dependencies": (
        {"type": "object", "dependencies": {"a": ["b", "b"], "c": {"minProperties": 2.0}, "d": "e", "f": 7}},
        {
            "type": "object",
            "dependentRequired": {"a": ["b"], "d": ["e"]},
            "dependentSchemas": {"c": {"minProperties": 2}},
            "dependencies": {"f": 7},
        },
    ),
    "no dependencies": ({"type": "object", "dependencies": {}}, {"type": "object"}),
    "exclusive bound of draft 4": (
        {"type": "number", "minimum": 0, "exclusiveMinimum": True},
        {"type": "number", "exclusiveMinimum": 0},
    ),
    "inclusive bound of draft 4": (
        {"type": "number", "maximum": 9, "exclusiveMaximum": False},
        {"type": "number", "maximum": 9},
    ),
    "exclusive without a bound": (
        {"type": "number", "exclusiveMinimum": True},
        {"type": "number", "exclusiveMinimum": True},
    ),
    "required property": (
        {
            "type": "object",
            "properties": {"a": {"type": "string", "required": True}, "b": {"type": "string", "required": False}},
        },
        {"type": "object", "properties": {"a": STRING, "b": STRING}, "required": ["a"]},
    ),
    "required property beside a list": (
        {
            "type": "object",
            "properties": {"a": STRING, "b": {"type": "string", "required": True}},
            "required": ["a", "a"],
        },
        {"type": "object", "properties": {"a": STRING, "b": STRING}, "required": ["a", "b"]},
    ),
    "required objects": (
        {
            "type": "object",
            "required": True,
            "properties": {"a": {"type": "object", "required": True, "properties": {"b": {"required": True}}}},
        },
        {
            "type": "object",
            "properties": {"a": {"type": "object", "properties": {"b": {}}, "required": ["b"]}},
            "required": ["a"],
        },
    ),
    "required branch": (
        {"anyOf": [{"type": "string", "required": True}]},
        {"anyOf": [{"type": "string", "required": True}]},
    ),
    "optional property": (
        {
            "type": "object",
            "properties": {"a": {"type": "string", "optional": True}, "b": {"type": "string", "optional": "yes"}},
            "required": ["a"],
        },
        {"type": "object", "properties": {"a": STRING, "b": STRING}, "required": ["a"]},
    ),
    "property that is not optional": (
        {"type": "object", "properties": {"a": {"type": "string", "optional": False}}},
        {"type": "object", "properties": {"a": STRING}, "required": ["a"]},
    ),
    "list of optional properties": (
        {"type": "object", "properties": {"a": STRING}, "optional": ["a"]},
        {"type": "object", "properties": {"a": STRING}},
    ),
    "required and undeclared": (
        {"type": "object", "properties": {}, "required": ["a"]},
        {"type": "object", "properties": {}, "required": ["a"]},
    ),
    # nothing, nulls, numbers as text
    "no schema": (None, {"type": "object", "properties": {}}),
    "true": (True, {}),
    "false": (False, {"not": {}}),
    "empty": ({}, {}),
    "description": ({"description": "anything"}, {"description": "anything"}),
    "nulls": (
        {
            "type": "object",
            "properties": {"a": {"type": "string", "enum": None, "items": None, "default": None}},
            "required": None,
            "description": None,
        },
        {"type": "object", "properties": {"a": {"type": "string", "default": None}}},
    ),
    "null properties": ({"type": "object", "properties": None}, {"type": "object"}),
    "null type": ({"type": None, "properties": {}}, {"type": "object", "properties": {}}),
    "null is a value": ({"const": None}, {"const": None, "type": "null"}),
    "empty list for an object": ({"type": "object", "properties": []}, {"type": "object", "properties": {}}),
    "numbers as text": (
        {"type": "string", "minLength": "3", "maxLength": 5.0},
        {"type": "string", "minLength": 3, "maxLength": 5},
    ),
    "bounds as text": (
        {"type": "number", "minimum": "-1.5", "maximum": "1e3", "multipleOf": " 2 "},
        {"type": "number", "minimum": -1.5, "maximum": 1000.0, "multipleOf": 2},
    ),
    "inexact or no numbers as text": (
        {"type": "number", "minimum": "0.10000000000000000001", "maximum": "many", "multipleOf": "1e999"},
        {"type": "number", "minimum": "0.10000000000000000001", "maximum": "many", "multipleOf": "1e999"},
    ),
    "no count": ({"type": "string", "minLength": "2.5"}, {"type": "string", "minLength": "2.5"}),
    "example": ({"type": "string", "example": "x", "examples": ["y"]}, {"type": "string", "examples": ["y", "x"]}),
    "examples": ({"type": "string", "examples": {"a": 1}}, {"type": "string", "examples": [{"a": 1}]}),
    # missing types
    "properties tell": ({"properties": {"a": {}}}, {"properties": {"a": {}}, "type": "object"}),
    "items tell": ({"items": STRING}, {"items": STRING, "type": "array"}),
    "pattern tells": ({"pattern": "^a"}, {"pattern": "^a", "type": "string"}),
    "format tells": ({"format": "date"}, {"format": "date", "type": "string"}),
    "numeric format tells": ({"format": "int32", "minimum": 0}, {"format": "int32", "minimum": 0, "type": "integer"}),
    "unknown format does not": ({"format": "colour"}, {"format": "colour"}),
    "bounds tell": ({"minimum": 0}, {"minimum": 0, "type": "number"}),
    "values tell": ({"enum": ["a", "b"]}, {"enum": ["a", "b"], "type": "string"}),
    "mixed values do not": ({"enum": ["a", 1, None]}, {"enum": ["a", 1, None]}),
    "numbers among values": ({"enum": [1, 2.5]}, {"enum": [1, 2.5], "type": "number"}),
    "truth values": ({"enum": [True]}, {"enum": [True], "type": "boolean"}),
    "two types told": ({"minLength": 1, "minimum": 1}, {"minLength": 1, "minimum": 1}),
    "branches of an object": (
        {"properties": {"a": {}}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
        {"properties": {"a": {}}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}], "type": "object"},
    ),
    "branches of other types": (
        {"properties": {"a": {}}, "anyOf": [STRING, {"type": "object"}]},
        {"properties": {"a": {}}, "anyOf": [STRING, {"type": "object"}]},
    ),
    "references": (
        {"$ref": "#/$defs/a", "minLength": 3, "$defs": {"a": {}}},
        {"$ref": "#/$defs/a", "minLength": 3, "$defs": {"a": {}}},
    ),
    "negations": (
        {"type": "object", "not": {"properties": {"a": {"minLength": 3}}}},
        {"type": "object", "not": {"properties": {"a": {"minLength": 3}}}},
    ),
    "counted items": (
        {"type": "array", "contains": {"minLength": 3}, "maxContains": 1},
        {"type": "array", "contains": {"minLength": 3}, "maxContains": 1},
    ),
    # nullable
    "nullable": (
        {"properties": {"a": {"type": "string", "nullable": True}}},
        {"properties": {"a": {"type": ["string", "null"]}}, "type": "object"},
    ),
    "nullable arguments": ({"type": "object", "nullable": True}, {"type": "object"}),
    "not nullable": ({"items": {"type": ["string", "null"], "nullable": False}}, {"items": STRING, "type": "array"}),
    "nullable enum": (
        {"items": {"type": "string", "enum": ["a"], "nullable": True}},
        {"items": {"type": ["string", "null"], "enum": ["a", None]}, "type": "array"},
    ),
    "nullable values": (
        {"items": {"enum": ["a", 1], "nullable": True}},
        {"items": {"enum": ["a", 1, None]}, "type": "array"},
    ),
    "nullable anything": ({"items": {"nullable": True}}, {"items": {}, "type": "array"}),
    "nullable const": (
        {"items": {"const": "a", "nullable": True, "title": "A"}},
        {"items": {"title": "A", "anyOf": [{"const": "a", "type": "string"}, NULL]}, "type": "array"},
    ),
    "nullable branches": (
        {"items": {"anyOf": [STRING], "nullable": True, "title": "A"}},
        {"items": {"title": "A", "anyOf": [STRING, NULL]}, "type": "array"},
    ),
    "nullable branches with null": (
        {"items": {"anyOf": [STRING, NULL], "nullable": True}},
        {"items": {"anyOf": [STRING, NULL]}, "type": "array"},
    ),
    "nullable one of": (
        {"items": {"oneOf": [STRING], "nullable": True}},
        {"items": {"anyOf": [{"oneOf": [STRING]}, NULL]}, "type": "array"},
    ),
    "nullable reference": (
        {
            "type": "object",
            "properties": {"a": {"$ref": "#/$defs/b", "nullable": True, "description": "x"}},
            "$defs": {"b": STRING},
        },
        {
            "type": "object",
            "properties": {"a": {"description": "x", "anyOf": [{"$ref": "#/$defs/b"}, NULL]}},
            "$defs": {"b": STRING},
        },
    ),
    # what is not understood
    "unknown words": (
        {"type": "object", "x-order": 1, "discriminator": {"propertyName": "a"}},
        {"type": "object", "x-order": 1, "discriminator": {"propertyName": "a"}},
    ),
    "no schemas": (
        {"type": "object", "properties": {"a": "string", "b": 1}},
        {"type": "object", "properties": {"a": "string", "b": 1}},
    ),
}


@pytest.mark.parametrize(("schema", "expected"), CASES.values(), ids=CASES)
def test_a_dialect_becomes_the_standard(schema: Any, expected: Any) -> None:
    assert normalised(schema) == expected


def test_every_type_name_in_any_case_has_a_standard_name() -> None:
    names = {
        "object": "dict object HashMap Hashtable Map record",
        "number": "float double Float Double number real decimal",
        "integer": "int Integer long Long short byte BigInteger bigint",
        "boolean": "bool Boolean",
        "string": "str String char text",
        "array": "list tuple array ArrayList Array Vector LinkedList",
        "null": "null None NoneType void",
    }
    for kind, known in names.items():
        for name in known.split():
            for written in (name, name.lower(), name.upper(), name.capitalize()):
                assert normalised({"type": written}) == {"type": kind}
    assert normalised({"type": "Any"}) == normalised({"type": "ANY"}) == {}


def test_changes_name_the_place_and_both_sides() -> None:
    schema = {"type": "dict", "properties": {"a/b": {"type": "array", "items": [{"type": "float"}]}}, "required": None}
    _, changes = normalise_schema(schema, "act")
    assert changes == (
        Change("", '{"required": null}', "{}"),
        Change("", '{"type": "dict"}', '{"type": "object"}'),
        Change("/properties/a~1b", '{"items": [{"type": "float"}]}', '{"prefixItems": [{"type": "float"}]}'),
        Change("/properties/a~1b/items/0", '{"type": "float"}', '{"type": "number"}'),
    )


def test_changes_are_short_whatever_they_hold() -> None:
    loop: list[Any] = []
    loop.append(loop)
    huge: dict[str, Any] = {
        "enum": ["x" * 10**6] * 10,
        "minLength": None,
        "properties": {str(n): {} for n in range(10_000)},
    }
    huge |= {"const": loop, "items": [[[[[]]]]], "minimum": 10**6000, "default": object()}
    _, changes = normalise_schema(
        {"nullable": False, "examples": huge, "properties": {"a": huge | {"nullable": True}}}, "act"
    )
    assert changes
    assert max(len(change.before) + len(change.after) for change in changes) < 4000


# --------------------------------------------------------------------------------------------- meaning

VALUES: list[Any] = [
    None, True, False, 0, 1, 2.5, -3, "", "a", "abc", [], ["a"], [1, 1], ["a", 2], [None], [[1]], {}, {"a": 1},
    {"a": "abc"},
    {"b": None}, {"a": 1, "b": 2}, {"a": [1], "c": "a"}, {"a": {"a": 1}}, {"b": "a", "c": 3}, {"a": None, "b": "abc"},
]  # fmt: skip

small = st.integers(0, 3)
words = st.sampled_from(["a", "b", "c"])
plain_keywords = st.one_of(
    st.fixed_dictionaries({"minLength": small}),
    st.fixed_dictionaries({"pattern": st.sampled_from(["a", "^$"])}),
    st.fixed_dictionaries({"minimum": small}),
    st.fixed_dictionaries({"maxItems": small}),
    st.fixed_dictionaries({"uniqueItems": st.just(True)}),
    st.fixed_dictionaries({"maxContains": st.just(1)}),
    st.fixed_dictionaries({"minProperties": small}),
    st.fixed_dictionaries({"required": st.lists(words, unique=True)}),
    st.fixed_dictionaries({"enum": st.lists(st.sampled_from(["a", 1, 2.5, None, True]), min_size=1, unique_by=repr)}),
    st.fixed_dictionaries({"const": st.sampled_from(["a", 1, None])}),
    st.fixed_dictionaries({"type": st.sampled_from(["string", "integer", "object", "array", "number", "null"])}),
    st.fixed_dictionaries(
        {"type": st.lists(st.sampled_from(["string", "integer", "object"]), min_size=1, unique=True)}
    ),
    st.just({}),
)


def _merged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    return {word: value for part in parts for word, value in part.items()}


def _schemas(keywords: st.SearchStrategy[Any], combined: Any) -> st.SearchStrategy[dict[str, Any]]:
    leaves = st.lists(keywords, max_size=3).map(_merged)
    return st.recursive(
        leaves, lambda inner: st.lists(st.one_of(keywords, combined(inner)), max_size=3).map(_merged), max_leaves=6
    )


def standard_keywords(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    several = st.lists(inner, min_size=1, max_size=2)
    one = ("not", "if", "then", "else", "contains", "propertyNames", "additionalProperties", "items")
    return st.one_of(
        st.fixed_dictionaries({"properties": st.dictionaries(words, inner, max_size=2)}),
        *(st.fixed_dictionaries({word: inner}) for word in one),
        *(st.fixed_dictionaries({word: several}) for word in ("allOf", "anyOf", "oneOf", "prefixItems")),
        st.fixed_dictionaries({"dependentSchemas": st.dictionaries(words, inner, max_size=1)}),
    )


standard_schemas = _schemas(plain_keywords, standard_keywords)


@st.composite
def referring_schemas(draw: Any) -> dict[str, Any]:
    """Schemas whose definitions are referred to, also under negation."""
    schema, defined = draw(standard_schemas), draw(standard_schemas)
    word = draw(st.sampled_from(["not", "anyOf", "items", "allOf"]))
    reference = {"$ref": "#/$defs/d"}
    return {**schema, word: [reference] if word in ("anyOf", "allOf") else reference, "$defs": {"d": defined}}


@settings(quick, max_examples=150)
@given(st.one_of(standard_schemas, referring_schemas()))
def test_a_standard_schema_never_allows_more_than_before(schema: dict[str, Any]) -> None:
    result = normalised(schema)
    Draft202012Validator.check_schema(result)
    for value in VALUES:
        assert not accepts(result, value) or accepts(schema, value), value


def old_keywords(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    several = st.lists(inner, min_size=1, max_size=2)
    return st.one_of(
        st.fixed_dictionaries({"properties": st.dictionaries(words, inner, max_size=2)}),
        st.fixed_dictionaries({"items": several}, optional={"additionalItems": st.one_of(inner, st.booleans())}),
        st.fixed_dictionaries({"items": inner}, optional={"additionalItems": st.booleans()}),
        *(st.fixed_dictionaries({word: several}) for word in ("allOf", "anyOf", "oneOf")),
        st.fixed_dictionaries({"not": inner}),
        st.fixed_dictionaries(
            {"dependencies": st.dictionaries(words, st.one_of(inner, st.lists(words, unique=True)), max_size=2)}
        ),
    )


draft_4_bounds = st.fixed_dictionaries({"minimum": small, "exclusiveMinimum": st.booleans()})


@settings(quick, max_examples=150)
@given(
    _schemas(
        st.one_of(plain_keywords.filter(lambda part: not {"const", "maxContains"} & {*part}), draft_4_bounds),
        old_keywords,
    ),
    st.booleans(),
)
def test_draft_4_keeps_its_meaning(schema: dict[str, Any], typed: bool) -> None:
    if typed:
        schema = _with_types(schema)
    result = normalised(schema)
    Draft202012Validator.check_schema(result)
    for value in VALUES:
        before = accepts(schema, value, jsonschema.Draft4Validator)
        assert accepts(result, value) == before if typed else not accepts(result, value) or before, value


def _with_types(schema: Any) -> Any:
    """The same with a type in every schema, so that none is guessed."""
    if isinstance(schema, list):
        return [_with_types(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    result: dict[str, Any] = {"type": ["string", "number", "object", "array", "null", "boolean"]} | schema
    for word in ("items", "additionalItems", "allOf", "anyOf", "oneOf", "not"):
        if word in result:
            result[word] = _with_types(result[word])
    for word in ("properties", "dependencies"):
        if word in result:
            result[word] = {
                name: inner if isinstance(inner, list) else _with_types(inner) for name, inner in schema[word].items()
            }
    return result


@settings(quick)
@given(standard_schemas, st.booleans())
def test_nullable_adds_null_and_nothing_else(schema: dict[str, Any], flag: bool) -> None:
    inner = normalised({"items": {**schema, "nullable": flag}})["items"]
    plain = normalised({"items": schema})["items"]
    for value in VALUES:
        if flag:
            assert accepts(inner, value) == (value is None or accepts(plain, value)), value
        else:
            assert not accepts(inner, value) or accepts(plain, value), value


def test_required_of_draft_3_keeps_its_meaning() -> None:
    schema = {
        "type": "object",
        "properties": {
            "a": {"type": "string", "required": True},
            "b": {"type": "object", "properties": {"c": {"type": "integer", "required": True}}},
        },
    }
    result = normalised(schema)
    for value in ({}, {"a": "x"}, {"a": "x", "b": {}}, {"a": "x", "b": {"c": 1}}, {"b": {"c": 1}}):
        assert accepts(result, value) == accepts(schema, value, jsonschema.Draft3Validator)


# --------------------------------------------------------------------------------------------- references


def test_definitions_stay_where_references_find_them() -> None:
    schema = {
        "type": "dict",
        "properties": {"a": {"$ref": "#/definitions/point"}},
        "definitions": {"point": {"type": "tuple", "items": [{"type": "float"}, {"type": "float"}]}},
    }
    result = normalised(schema)
    assert result["properties"]["a"] == {"$ref": "#/definitions/point"}
    assert accepts(result, {"a": [1, 2.5]})
    assert not accepts(result, {"a": ["x"]})


def test_references_follow_schemas_that_move() -> None:
    schema = {
        "type": "object",
        "properties": {
            "a b": {"type": "array", "items": [{"type": "int"}, {"type": "str"}], "additionalItems": {"type": "bool"}},
            "b": {"$ref": "#/properties/a b/items/1"},
            "c": {"$ref": "#/properties/a%20b/additionalItems"},
            "d": {"nullable": True, "not": {"const": 3}, "type": "object", "properties": {"e/f": {"type": "int"}}},
            "g": {"$ref": "#/properties/d/properties/e~1f"},
            "h": {"$ref": "#/properties/d"},
            "i": {"type": "object", "dependencies": {"x": {"properties": {"y": {"type": "int"}}}}},
            "j": {"$ref": "#/properties/i/dependencies/x/properties/y"},
        },
    }
    result = normalised(schema)
    for good, bad in (
        ({"b": "x"}, {"b": 1}),
        ({"c": True}, {"c": "x"}),
        ({"g": 1}, {"g": "x"}),
        ({"h": None}, {"h": {"e/f": "x"}}),
        ({"j": 1}, {"j": "x"}),
    ):
        assert accepts(result, good)
        assert not accepts(result, bad)
    _, changes = normalise_schema(schema, "act")
    assert (
        Change("/properties/b", '{"$ref": "#/properties/a b/items/1"}', '{"$ref": "#/properties/a%20b/prefixItems/1"}')
        in changes
    )


def test_definitions_of_a_nullable_schema_stay_in_their_place() -> None:
    inner = {"$ref": "#/properties/a/$defs/b", "nullable": True, "$defs": {"b": {"type": "int"}}}
    result = normalised({"type": "object", "properties": {"a": inner}})
    assert accepts(result, {"a": 1})
    assert accepts(result, {"a": None})
    assert not accepts(result, {"a": "x"})


# --------------------------------------------------------------------------------------------- hostile input


def test_deep_and_cyclic_schemas_are_refused_by_name_and_place() -> None:
    deep: dict[str, Any] = {}
    for _ in range(1000):
        deep = {"properties": {"p": deep}}
    cyclic: dict[str, Any] = {"type": "object", "properties": {}}
    cyclic["properties"]["a"] = cyclic["properties"]["b"] = cyclic
    branches: dict[str, Any] = {}
    branches["anyOf"] = [branches, branches]
    for schema, place in ((deep, "/properties/p"), (cyclic, "/properties/a"), (branches, "/anyOf/0")):
        with pytest.raises(ValueError, match=f"tool 'act', parameters at '{place * 65}': schemas are nested deeper"):
            normalise_schema(schema, "act")


def test_64_levels_are_fine() -> None:
    deep: dict[str, Any] = {"type": "float"}
    for _ in range(64):
        deep = {"type": "array", "items": deep}
    assert normalised(deep)


def test_nullable_schemas_count_as_two_levels() -> None:
    deep: dict[str, Any] = {"type": "float"}
    for level in range(60):
        deep = {"type": "array", "items": deep, "nullable": True, "not": {"const": 3}}
        if level == 29:
            assert normalised({"items": deep})
    with pytest.raises(ValueError, match="nested deeper"):
        normalise_schema({"items": deep}, "act")


def test_shared_schemas_do_not_multiply_without_end() -> None:
    shared: dict[str, Any] = {"type": "int"}
    for _ in range(40):
        shared = {"type": "object", "properties": {"a": shared, "b": shared}}
    start = time.process_time()
    with pytest.raises(ValueError, match=r"tool 'act', parameters at '.*': there are more than 30000 schemas"):
        normalise_schema(shared, "act")
    assert time.process_time() - start < 3


def test_many_properties_are_normalised_soon() -> None:
    schema = {
        "type": "dict",
        "properties": {f"p{n}": {"type": "String", "description": "x", "required": True} for n in range(10_000)},
        "required": [f"p{n}" for n in range(5_000)],
    }
    start = time.process_time()
    result, changes = normalise_schema(schema, "act")
    assert time.process_time() - start < 1
    assert len(result["required"]) == 10_000
    assert len(changes) == 20_002


@pytest.mark.parametrize("schema", ["object", 3, [{}], 1.5])
def test_what_is_no_schema_is_refused(schema: Any) -> None:
    with pytest.raises(ValueError, match=r"tool 'act': the parameters are a JSON Schema object, not"):
        normalise_schema(schema, "act")


WEIRD = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-2, 2), st.floats(), st.sampled_from(["", "a", "dict", "3", "null"])
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner),
        st.dictionaries(
            st.one_of(
                st.sampled_from(["a", 1]),
                st.sampled_from(sorted(module._NEVER_NULL)),
                st.sampled_from(["items", "example", "const", "default"]),
            ),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=12,
)


@settings(quick, max_examples=200)
@given(st.dictionaries(st.sampled_from(sorted(module._NEVER_NULL)), WEIRD, max_size=4))
def test_malformed_schemas_pass_through_unchanged_on_the_second_run(schema: dict[str, Any]) -> None:
    before = repr(schema)
    result, _ = normalise_schema(schema, "act")
    assert repr(schema) == before
    again, changes = normalise_schema(result, "act")
    assert repr(again) == repr(result)
    assert changes == ()


# --------------------------------------------------------------------------------------------- tools

PARAMETERS = {"type": "object", "properties": {"a": STRING}}
FUNCTION = {"name": "act", "description": "Acts.", "parameters": PARAMETERS}
TOOL = {"type": "function", "function": FUNCTION}
BARE = {"name": "act", "description": "Acts."}

TOOLS: dict[str, tuple[Any, Any]] = {
    "openai": (TOOL, TOOL),
    "openai with more": ({**TOOL, "cache": 1}, {**TOOL, "cache": 1}),
    "bare": (FUNCTION, TOOL),
    "responses": (
        {"type": "function", **FUNCTION, "strict": True},
        {"type": "function", "function": {**FUNCTION, "strict": True}},
    ),
    "strict": (
        {"type": "function", "function": {**FUNCTION, "strict": True}},
        {"type": "function", "function": {**FUNCTION, "strict": True}},
    ),
    "mcp": (
        {**BARE, "inputSchema": PARAMETERS, "annotations": {"title": "A"}},
        {"type": "function", "function": {**FUNCTION, "annotations": {"title": "A"}}},
    ),
    "anthropic": (
        {**BARE, "input_schema": PARAMETERS, "type": "custom", "cache_control": {}},
        {"type": "function", "function": {**FUNCTION, "cache_control": {}}},
    ),
    "gemini": (
        {**BARE, "parameters": {"type": "OBJECT"}},
        {"type": "function", "function": {**BARE, "parameters": {"type": "OBJECT"}}},
    ),
    "gemini with JSON Schema": ({**BARE, "parametersJsonSchema": PARAMETERS}, TOOL),
    "gemini list of one": ({"function_declarations": [FUNCTION]}, TOOL),
    "wrapped mcp": ({"type": "function", "function": {**BARE, "inputSchema": PARAMETERS, "parameters": None}}, TOOL),
    "both schemas": (
        {**FUNCTION, "inputSchema": {}},
        {"type": "function", "function": {**FUNCTION, "inputSchema": {}}},
    ),
    "no parameters": (BARE, {"type": "function", "function": BARE}),
    "server tool": (
        {"type": "web_search_20250305", "name": "web_search"},
        {"type": "web_search_20250305", "name": "web_search"},
    ),
    "no name": ({"description": "x"}, {"description": "x"}),
    "mcp object": (SimpleNamespace(**BARE, inputSchema=PARAMETERS), TOOL),
    "mcp object without description": (
        SimpleNamespace(name="act", description=None, inputSchema=PARAMETERS),
        {"type": "function", "function": {"name": "act", "parameters": PARAMETERS}},
    ),
}


@pytest.mark.parametrize(("tool", "expected"), TOOLS.values(), ids=TOOLS)
def test_a_tool_becomes_the_openai_form(tool: Any, expected: Any) -> None:
    before = copy.deepcopy(tool)
    result = normalise_tool(tool)
    assert result == expected
    assert tool == before
    assert normalise_tool(result) == result


@pytest.mark.parametrize("tool", ["act", 3, None, [TOOL], int])
def test_what_is_no_tool_is_refused(tool: Any) -> None:
    with pytest.raises(ValueError, match="a tool is a dict"):
        normalise_tool(tool)
    with pytest.raises(ValueError, match="several function_declarations"):
        normalise_tool({"function_declarations": [FUNCTION, FUNCTION]})


def test_pydantic_models_are_tools() -> None:
    pydantic = pytest.importorskip("pydantic", reason="pydantic makes the models of this test")

    address = pydantic.create_model("Address", city=(str, ...), zip=(str | None, None))
    weight = pydantic.Field(gt=0, le=30)
    parcel = pydantic.create_model(
        "SendParcel", __doc__="Sends a parcel.", to=(address, ...), tags=(set[str], set()), weight=(float, weight)
    )
    tool = normalise_tool(parcel)
    assert tool["function"]["name"] == "SendParcel"
    assert tool["function"]["description"] == "Sends a parcel."
    assert "description" not in tool["function"]["parameters"]
    result = normalised(tool["function"]["parameters"])
    assert accepts(result, {"to": {"city": "Paris", "zip": None}, "weight": 1})
    assert not accepts(result, {"to": {}, "weight": 1})
    assert not accepts(result, {"to": {"city": "Paris"}, "weight": 0})


def test_mcp_objects_that_are_pydantic_models_keep_their_fields() -> None:
    pydantic = pytest.importorskip("pydantic", reason="pydantic makes the models of this test")

    optional = (dict[str, Any] | None, None)
    kind = pydantic.create_model(
        "Tool", name=(str, ...), description=(str | None, None), inputSchema=(dict[str, Any], ...), annotations=optional
    )
    tool = normalise_tool(kind(name="act", inputSchema=PARAMETERS, annotations={"readOnlyHint": True}))
    assert tool["function"] == {"name": "act", "parameters": PARAMETERS, "annotations": {"readOnlyHint": True}}


# --------------------------------------------------------------------------------------------- BFCL


def _lines(path: Path) -> list[dict[str, Any]]:
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
    return [json.loads(line) for line in text.splitlines()]


def _type_names(schema: Any) -> Counter[str]:
    """How often each type name occurs in a schema."""
    names: Counter[str] = Counter()
    if isinstance(schema, dict):
        names[str(schema.get("type"))] += 1
        for inner in [*schema.get("properties", {}).values(), schema.get("items")]:
            names += _type_names(inner)
    return names


@pytest.mark.skipif(not DATA.exists(), reason="the BFCL files are not part of the repository")
def test_every_bfcl_schema_becomes_standard_and_none_is_left_out() -> None:
    before: Counter[str] = Counter()
    after: Counter[str] = Counter()
    expected = {line["id"]: line for path in (DATA / "normalised").glob("*.gz") for line in _lines(path)}
    validator, other = Draft202012Validator(Draft202012Validator.META_SCHEMA), []
    for path in sorted((DATA / "original").glob("BFCL*.json")):
        for line in _lines(path):
            for index, function in enumerate(line["function"]):
                before += _type_names(function["parameters"])
                schema, _ = normalise_schema(function["parameters"], function["name"])
                after += _type_names(schema)
                # The metaschema costs milliseconds a schema: check one function of each request.
                assert index or validator.is_valid(schema)
                assert normalise_schema(schema, "act") == (schema, ())
                if schema != expected[line["id"]]["tools"][index]["function"]["parameters"]:
                    other.append(function["name"])
    assert {"dict", "float", "tuple", "any", "String", "HashMap", "ArrayList", "long", "char", ""} <= {*before}
    assert {*after} == {"object", "string", "integer", "number", "boolean", "array", "None"}
    assert before.total() == after.total() > 8000
    assert after["None"] == before["any"]
    # The converted data leave out `required` where no property is declared.
    assert other == ["waste_calculation.calculate"]
