"""Any supported schema x any logits -> a call that validates; what is written is what the tree can hold."""

import json
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from repo_package import load_repo_module
from tiny_tokenizer import tiny_vocabulary

scaffold_module = load_repo_module("schema_scaffold")
grammar_module = load_repo_module("reply_grammar")
layout_module = load_repo_module("scaffold_layout")
compile_scaffold, UnsupportedSchemaError = scaffold_module.compile_scaffold, scaffold_module.UnsupportedSchemaError

quick = settings(deadline=None, suppress_health_check=list(HealthCheck))
FORMATS = ("date", "date-time", "time", "duration", "email", "uri", "uuid", "ipv4", "ipv6", "hostname")
PATTERNS = ("^[a-c]{2,4}$", "b", "^(?!ab)", "^(?=.*[0-9])[a-z0-9]+$", "\\.csv$", "^\\w+\\s\\w+$", "^$|^é+$")
NAMES = ("a", "b", "c", "é")
texts = st.sampled_from(["", "a", "ab", "New York", 'say "hi"', "C:\\new", "日本", "\n"])


def counted(low: str, high: str, most: int = 3) -> st.SearchStrategy[dict[str, Any]]:
    """A lower and an upper bound, either or both."""

    def build(bounds: tuple[int, int], given_bounds: tuple[bool, bool]) -> dict[str, Any]:
        pairs = zip((low, high), sorted(bounds), given_bounds, strict=True)
        return {word: bound for word, bound, chosen in pairs if chosen}

    number = st.integers(0, most)
    return st.builds(build, st.tuples(number, number), st.tuples(st.booleans(), st.booleans()))


def merged(*parts: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.tuples(*parts).map(lambda found: {word: value for part in found for word, value in part.items()})


def maybe(**words: Any) -> st.SearchStrategy[dict[str, Any]]:
    """Each keyword there or not."""
    return st.fixed_dictionaries({}, optional=words)


strings = merged(
    st.just({"type": "string"}),
    counted("minLength", "maxLength", 6),
    st.one_of(
        st.just({}),
        st.builds(lambda p: {"pattern": p}, st.sampled_from(PATTERNS)),
        maybe(format=st.sampled_from(FORMATS)),
    ),
)
integers = merged(
    st.just({"type": "integer"}), counted("minimum", "maximum", 300), maybe(multipleOf=st.sampled_from([1, 2, 7, 0.5]))
)
numbers = merged(
    st.just({"type": "number"}),
    counted("exclusiveMinimum", "maximum", 40),
    maybe(multipleOf=st.sampled_from([0.5, 0.25, 3]), exclusiveMaximum=st.sampled_from([1.5, 20, 1e3])),
)
closed = st.one_of(
    st.builds(lambda values: {"enum": values}, st.lists(st.one_of(texts, st.none(), st.integers(0, 11)), min_size=1)),
    st.builds(lambda value: {"const": value}, st.one_of(texts, st.just({"x": [1]}), st.just(1.5))),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {}, True, {"type": ["string", "null"]}]),
)


def objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    name = st.sampled_from(NAMES)
    some = st.lists(name, max_size=2, unique=True)
    return merged(
        st.just({"type": "object"}),
        st.builds(lambda properties: {"properties": properties}, st.dictionaries(name, inner, min_size=1, max_size=3)),
        maybe(
            required=some,
            additionalProperties=st.one_of(st.booleans(), inner),
            patternProperties=st.dictionaries(st.sampled_from(["^[a-c]", "z$"]), inner, min_size=1, max_size=2),
            propertyNames=st.just({"maxLength": 3}),
            dependentRequired=st.dictionaries(name, some, min_size=1, max_size=2),
        ),
        st.one_of(st.just({}), st.just({}), counted("minProperties", "maxProperties")),
    )


def arrays(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return merged(
        st.just({"type": "array"}),
        counted("minItems", "maxItems"),
        maybe(items=inner, prefixItems=st.lists(inner, min_size=1, max_size=2)),
        st.one_of(st.just({}), maybe(uniqueItems=st.just(True)), maybe(contains=inner, minContains=st.integers(0, 2))),
    )


def combined(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    parts = st.lists(inner, min_size=1, max_size=3)
    return st.one_of(
        st.builds(lambda found: {"anyOf": found}, parts),
        st.builds(lambda found: {"oneOf": found}, parts),
        st.builds(lambda a, b: {"allOf": [a, b]}, inner, inner),
        st.builds(lambda a, b: {**a, "not": b} if isinstance(a, dict) else {"not": b}, inner, inner),
        st.builds(lambda a, b, c: {"if": a, "then": b, "else": c}, inner, inner, inner),
        st.just({"$ref": "#/$defs/tree"}),
    )


schemas = st.recursive(
    st.one_of(strings, integers, numbers, closed),
    lambda inner: st.one_of(objects(inner), arrays(inner), combined(inner)),
    max_leaves=6,
)
TREE = {
    "type": "object",
    "properties": {"v": {"type": "integer"}, "kids": {"type": "array", "items": {"$ref": "#/$defs/tree"}}},
    "required": ["v"],
}
parameters = st.builds(
    lambda properties, rest: {**rest, "type": "object", "properties": properties, "$defs": {"tree": TREE}},
    st.dictionaries(st.sampled_from(NAMES), schemas, max_size=3),
    maybe(required=st.lists(st.sampled_from(NAMES), max_size=2, unique=True), additionalProperties=st.booleans()),
)


def write(scaffold: Any, choose: Callable[[torch.Tensor], int], value_tokens: int = 12, call_tokens: int = 60) -> bytes:
    """The arguments of one call, token by token under the grammar."""
    vocabulary = tiny_vocabulary()
    cursor = grammar_module.ReplyGrammar(vocabulary, [scaffold], 1, value_tokens, call_tokens).start()
    for _ in range(3000):
        text = cursor.text
        forced = cursor.forced()
        token = choose(cursor.mask()) if forced is None else forced
        cursor = cursor.advance(token)
        assert cursor is not None
        if cursor.calls:
            return text.partition(b'"arguments": ')[2].removesuffix(b"}\n")
    pytest.fail("the call does not end")


def at_random(seed: int) -> Callable[[torch.Tensor], int]:
    """Picks tokens like a model with random logits would."""
    generator = torch.Generator().manual_seed(seed)

    def choose(mask: torch.Tensor) -> int:
        logits = torch.randn(mask.shape, generator=generator)
        return int(logits.masked_fill(~mask, float("-inf")).argmax())

    return choose


def compiled(schema: dict[str, Any]) -> Any:
    return compile_scaffold({"type": "function", "function": {"name": "act", "parameters": schema}})


@settings(quick, max_examples=300)
@given(parameters, st.integers(0, 2**31))
@example(
    {"type": "object", "properties": {"a": {"$ref": "#/$defs/tree"}}, "$defs": {"tree": TREE}, "required": ["a"]}, 1
)
def test_any_supported_schema_and_any_logits_give_a_valid_call(schema: dict[str, Any], seed: int) -> None:
    try:
        scaffold = compiled(schema)
    except UnsupportedSchemaError:
        return
    text = write(scaffold, at_random(seed))
    value = json.loads(text)
    errors = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER).iter_errors(value)
    assert [error.message for error in errors] == []
    # The segments of what was written are what the grammar itself would follow.
    assert json.loads("".join(scaffold_module.argument_segments(scaffold, value))) == value


@settings(quick, max_examples=100)
@given(parameters, st.integers(0, 2**31), st.integers(0, 200))
def test_what_is_written_is_read_back_into_the_layout(schema: dict[str, Any], seed: int, cut: int) -> None:
    try:
        scaffold = compiled(schema)
    except UnsupportedSchemaError:
        return
    layout = layout_module.draft_layout(scaffold, 3)
    if layout is None:
        return
    value = json.loads(write(scaffold, at_random(seed)))
    try:
        texts = layout.texts(value)
    except ValueError:
        return  # deeper or wider than what is laid out
    again = layout.assemble([text if text is not None else "" for text in texts])
    if layout.texts(again) == texts and again == value:
        written = "".join(scaffold_module.argument_segments(scaffold, value))[:cut]
        observed, _ = layout.observe(written)
        for slot, seen, text in zip(layout.slots, observed, texts, strict=True):
            if seen is not None and seen.complete and slot.role in ("presence", "value") and text is not None:
                assert seen.text == text, (slot.path, written)


def test_tools_of_the_same_schema_are_compiled_once() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    assert compiled(schema) is compiled(json.loads(json.dumps(schema)))
    assert compiled(schema) is not compiled({**schema, "required": ["a"]})


def random_schemas(count: int) -> list[dict[str, Any]]:
    chance = random.Random(0)
    return [
        {
            "type": "object",
            "properties": {
                f"p{index}": {"type": chance.choice(["string", "integer", "boolean"])} for index in range(5)
            },
            "title": str(number),
        }
        for number in range(count)
    ]


def test_the_cache_of_compiled_tools_is_bounded() -> None:
    for schema in random_schemas(scaffold_module.MAX_COMPILED + 10):
        compiled(schema)
    assert len(scaffold_module._compiled) == scaffold_module.MAX_COMPILED
