"""Hypothesis strategies for tests: tool schemas of every supported kind, and values that fit them.

Names and texts are hostile on purpose: quotes, backslashes, names of special tokens, emoji, control characters.
"""

import json
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

HOSTILE_TEXTS = (
    '"',
    "\\",
    "\n",
    "<tool_call>",
    "</tool_call>",
    "<|im_end|>",
    "🙂",
    "é",
    "a/b~c",
    '", "arguments": {',
    "C:\\new\\table",
    "\ufdd01",
    "\x7f\x1f",
    "{}",
    "null",
    "",
)
ORDINARY_TEXTS = ("city", "days", "day", "unit", "Paris", "New York", "true", "10", "1")

texts = st.one_of(
    st.sampled_from(ORDINARY_TEXTS),
    st.sampled_from(HOSTILE_TEXTS),
    # Surrogates are no Unicode text; NUL is left out of values by the grammar (see `escaped_string_automaton`).
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6),
)
names = st.one_of(st.sampled_from(ORDINARY_TEXTS), texts)
integers = st.one_of(st.integers(-20, 20), st.integers(), st.integers(10**18, 10**30))
json_values = st.recursive(
    st.one_of(
        st.none(), st.booleans(), integers, st.floats(allow_nan=False, allow_infinity=False), texts, st.just("\0")
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=4,
)


def short_decimals() -> st.SearchStrategy[float]:
    """Floats of at most 15 significant digits between 1e-4 and 1e15, which the number grammar can write, and zero."""

    def decimal(digits: int, exponent: int) -> float:
        return float(f"{digits}e{exponent}")

    made = st.builds(decimal, st.integers(-(10**15) + 1, 10**15 - 1), st.integers(-19, 14))
    return st.one_of(st.sampled_from([0.0, -0.0, 0.5, 1e-4, 0.1, 100.0, 999999999999999.0]), made).filter(
        lambda value: value == 0 or 1e-4 <= abs(value) < 1e15
    )


numbers = st.one_of(st.integers(-20, 20), integers, short_decimals())


def _closed() -> st.SearchStrategy[dict[str, Any]]:
    strings = st.lists(texts, min_size=1, max_size=4)
    anything = st.lists(json_values, min_size=1, max_size=4)
    return st.one_of(
        st.builds(lambda values: {"enum": values}, st.one_of(strings, anything)),
        st.builds(lambda values: {"type": "string", "enum": values}, strings),
        st.builds(lambda value: {"const": value}, json_values),
    )


def _objects(inner: st.SearchStrategy[dict[str, Any]], max_size: int = 3) -> st.SearchStrategy[dict[str, Any]]:
    @st.composite
    def build(draw: Callable[[st.SearchStrategy[Any]], Any]) -> dict[str, Any]:
        properties = draw(st.dictionaries(names, inner, max_size=max_size))
        schema: dict[str, Any] = {"type": "object", "properties": properties}
        if properties:
            required = draw(st.lists(st.sampled_from(list(properties)), unique=True))
            if required or draw(st.booleans()):
                schema["required"] = required
        if not properties or draw(st.booleans()):
            schema["additionalProperties"] = False
        return schema

    return build()


def _arrays(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    def build(items: dict[str, Any], low: int | None, more: int | None) -> dict[str, Any]:
        schema: dict[str, Any] = {"type": "array", "items": items}
        if low is not None:
            schema["minItems"] = low
        if more is not None:
            schema["maxItems"] = (low or 0) + more
        return schema

    bound = st.one_of(st.none(), st.integers(0, 3))
    return st.builds(build, inner, bound, bound)


_open_kinds = st.sampled_from(["string", "integer", "number", "boolean"]).map(lambda kind: {"type": kind})
value_schemas = st.recursive(
    st.one_of(_open_kinds, _open_kinds, _closed()),
    lambda inner: st.one_of(_objects(inner), _arrays(inner)),
    max_leaves=4,
)
"""Schemas of one value, nested a few levels."""

parameter_schemas = _objects(value_schemas, max_size=4)
"""Schemas of a tool's parameters."""


def tool(parameters: dict[str, Any], name: str = "act") -> dict[str, Any]:
    """A tool of the OpenAI form."""
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def fitting(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values that fit a schema and that the grammar can write; properties in schema order."""
    if "const" in schema:
        return st.just(schema["const"])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if schema["type"] == "object":
        return _fitting_objects(schema)
    if schema["type"] == "array":
        low = schema.get("minItems", 0)
        high = min(schema.get("maxItems", low + 3), low + 3)
        return st.lists(fitting(schema["items"]), min_size=low, max_size=high)
    kinds = {"string": texts, "integer": integers, "number": numbers, "boolean": st.booleans()}
    return kinds[schema["type"]]


def _fitting_objects(schema: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    @st.composite
    def build(draw: Callable[[st.SearchStrategy[Any]], Any]) -> dict[str, Any]:
        required = schema.get("required", [])
        return {
            name: draw(fitting(inner))
            for name, inner in schema["properties"].items()
            if name in required or draw(st.booleans())
        }

    return build()


@st.composite
def fitted_parameters(draw: Callable[[st.SearchStrategy[Any]], Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A tool's parameters and arguments that fit them."""
    parameters = draw(parameter_schemas)
    return parameters, draw(fitting(parameters))


def examples(strategy: st.SearchStrategy[Any], count: int) -> list[Any]:
    """`count` different examples of a strategy, the same in every run.

    For tests that spread their work over made-up inputs and count what they did.
    """
    found: dict[str, Any] = {}

    # No shrinking and no database: nothing fails in here.
    @settings(
        max_examples=3 * count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(example: Any) -> None:
        found.setdefault(json.dumps(example), example)

    collect()
    assert len(found) >= count, f"only {len(found)} different examples were found"
    # Neighbours are alike, so take them from the whole range.
    return list(found.values())[:: len(found) // count][:count]
