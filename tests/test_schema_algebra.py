"""The algebra agrees with jsonschema on which values fit, whatever keywords meet; what it cannot say it refuses."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from repo_package import load_repo_module

algebra_module = load_repo_module("schema_algebra")
Algebra, Located = algebra_module.Algebra, algebra_module.Located
UnsupportedSchemaError = algebra_module.UnsupportedSchemaError

quick = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])

NAMES = ("a", "b", "c")
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 4),
    st.sampled_from([0.5, 1.0, 2.5, -0.0]),
    st.sampled_from(["", "a", "b", "ab", "aé", "abc"]),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(NAMES), inner, max_size=3)),
    max_leaves=5,
)
small = st.integers(0, 3)
PATTERNS = ("a", "^a", "b$", "^(a|b)*$")


def words(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Schemas of a few keywords."""
    named = st.dictionaries(st.sampled_from(NAMES), inner, min_size=1, max_size=2)
    parts = st.lists(inner, min_size=1, max_size=2)
    some = st.lists(st.sampled_from(NAMES), max_size=2, unique=True)
    types = st.sampled_from(["string", "integer", "number", "boolean", "null", "object", "array"])
    keywords: dict[str, st.SearchStrategy[Any]] = {
        "type": st.one_of(types, st.lists(types, min_size=1, max_size=3, unique=True)),
        "enum": st.lists(values, min_size=1, max_size=3),
        "const": values,
        "minimum": st.integers(-1, 2),
        "exclusiveMaximum": st.integers(0, 3),
        "multipleOf": st.sampled_from([1, 2, 0.5]),
        "minLength": small,
        "maxLength": small,
        "pattern": st.sampled_from(PATTERNS),
        "properties": named,
        "required": some,
        "additionalProperties": inner,
        "patternProperties": st.dictionaries(st.sampled_from(PATTERNS), inner, min_size=1, max_size=1),
        "propertyNames": inner,
        "minProperties": small,
        "maxProperties": small,
        "dependentRequired": st.dictionaries(st.sampled_from(NAMES), some, min_size=1, max_size=2),
        "dependentSchemas": named,
        "items": inner,
        "prefixItems": parts,
        "minItems": small,
        "maxItems": small,
        "uniqueItems": st.booleans(),
        "contains": inner,
        "minContains": small,
        "maxContains": small,
        "allOf": parts,
        "anyOf": parts,
        "oneOf": parts,
        "not": inner,
        "if": inner,
        "then": inner,
        "else": inner,
        "$ref": st.sampled_from(["#/$defs/x", "#/$defs/y"]),
    }

    def build(chosen: list[str]) -> st.SearchStrategy[dict[str, Any]]:
        return st.fixed_dictionaries({word: keywords[word] for word in chosen})

    return st.lists(st.sampled_from(list(keywords)), max_size=3, unique=True).flatmap(build)


schemas = st.recursive(st.one_of(st.booleans(), words(st.just(True))), words, max_leaves=5)


def fits(schema: Any, value: Any) -> bool:
    return bool(Algebra("act", schema).fits((Located(schema, ""),), value))


@settings(quick, max_examples=500)
@given(schemas, schemas, schemas, st.lists(values, min_size=1, max_size=6))
@example({"oneOf": [{"type": "integer"}, {"type": "number"}]}, True, True, [1, 1.5, "a"])
@example({"not": {"required": ["a"]}}, True, True, [{}, {"a": 1}, 3])
@example({"if": {"properties": {"a": {"const": 1}}}, "then": {"required": ["b"]}}, True, True, [{"a": 1}, {"a": 2}])
@example({"$ref": "#/$defs/x", "minimum": 2}, {"type": "integer"}, True, [1, 2, "a"])
@example({"enum": [1, True, "1"]}, True, True, [1, 1.0, True, "1"])
def test_the_algebra_agrees_with_jsonschema(schema: Any, x: Any, y: Any, candidates: list[Any]) -> None:
    assume(isinstance(schema, dict))
    document = {**schema, "$defs": {"x": x, "y": y}}
    try:
        judged = [fits(document, value) for value in candidates]
    except UnsupportedSchemaError:
        return
    try:
        expected = [Draft202012Validator(document).is_valid(value) for value in candidates]
    except RecursionError:
        pytest.fail("a schema that refers to itself without progress has to be refused")
    assert judged == expected


@settings(quick, max_examples=200)
@given(schemas, st.lists(values, min_size=1, max_size=6))
def test_an_opposite_holds_exactly_what_does_not_fit(schema: Any, candidates: list[Any]) -> None:
    algebra = Algebra("act", schema)
    try:
        opposite = [algebra.fits((Located(schema, "", negated=True),), value) for value in candidates]
        assert opposite == [not algebra.fits((Located(schema, ""),), value) for value in candidates]
    except UnsupportedSchemaError:
        pass


@pytest.mark.parametrize(
    ("schema", "pointer", "keyword"),
    [
        ({"type": "string", "pattern": "("}, "", "pattern"),
        ({"type": "string", "pattern": 3}, "", "pattern"),
        ({"type": "string", "format": "iri"}, "", "format"),
        ({"type": "strin"}, "", "type"),
        ({"type": []}, "", "type"),
        ({"enum": []}, "", "enum"),
        ({"enum": [float("nan")]}, "", "enum"),
        ({"anyOf": []}, "", "anyOf"),
        ({"properties": {"a": {"minLength": -1}}}, "/properties/a", "minLength"),
        ({"properties": {"a/b": {"multipleOf": 0}}}, "/properties/a~1b", "multipleOf"),
        ({"properties": {"a": 3}}, "/properties/a", "schema"),
        ({"properties": [1]}, "", "properties"),
        ({"required": "a"}, "", "required"),
        ({"$ref": "https://example.com/x"}, "", "$ref"),
        ({"$ref": "#/$defs/none"}, "", "$ref"),
        ({"$ref": "#"}, "", "$ref"),
        ({"unevaluatedProperties": False}, "", "unevaluatedProperties"),
        ({"minItems": 3, "maxItems": 2}, "", "maxItems"),
        ({"not": {"type": "string", "format": "date"}}, "/not", "format"),
    ],
)  # fmt: skip
def test_what_cannot_be_said_is_refused_at_its_place(schema: Any, pointer: str, keyword: str) -> None:
    algebra = Algebra("act", schema)

    def walk(located: Any) -> None:
        for shape in algebra.of(located):
            for layer in getattr(shape, "layers", ()):
                for inner in getattr(layer, "properties", {}).values():
                    walk(inner)

    with pytest.raises(UnsupportedSchemaError) as caught:
        walk(Located(schema, ""))
    assert (caught.value.tool, caught.value.pointer, caught.value.keyword) == ("act", pointer, keyword)


def test_combinators_cannot_eat_time() -> None:
    wide = {"allOf": [{"anyOf": [{"minLength": i}, {"type": "integer", "minimum": i}]} for i in range(200)]}
    with pytest.raises(UnsupportedSchemaError, match="alternatives"):
        fits({"allOf": [{"anyOf": [{"pattern": f"a{{{i}}}"}, {"pattern": f"b{{{i}}}"}]} for i in range(1, 30)]}, "a")
    assert isinstance(json.dumps(wide), str)
    deep: Any = {"type": "string"}
    for _ in range(5000):
        deep = {"not": deep}
    with pytest.raises(UnsupportedSchemaError):
        fits(deep, "a")
