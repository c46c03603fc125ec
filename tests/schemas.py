"""Hypothesis strategies for tests: tool schemas, values that fit them, and texts that their scaffolds admit.

Names and texts are hostile on purpose: quotes, backslashes, names of special tokens, emoji, control characters.
"""

import json
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from repo_package import load_repo_module

scaffold_module = load_repo_module("schema_scaffold")

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
    # Surrogates are no Unicode text; NUL is left out of values by the grammar (see `raw_string_automaton`).
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
    """Floats of at most 15 significant digits between 1e-4 and 1e15, which have one text without exponent, and zero."""

    def decimal(digits: int, exponent: int) -> float:
        return float(f"{digits}e{exponent}")

    made = st.builds(decimal, st.integers(-(10**15) + 1, 10**15 - 1), st.integers(-19, 14))
    return st.one_of(st.sampled_from([0.0, -0.0, 0.5, 1e-4, 0.1, 100.0, 999999999999999.0]), made).filter(
        lambda value: value == 0 or 1e-4 <= abs(value) < 1e15
    )


numbers = st.one_of(st.integers(-20, 20), integers, short_decimals(), st.floats(allow_nan=False, allow_infinity=False))


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


_nullable = st.sampled_from(["string", "integer", "number"]).map(lambda kind: {"type": [kind, "null"]})


def _open_ended(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """Unions, freely named properties, and arrays whose first items have schemas of their own."""
    several = st.lists(inner, min_size=2, max_size=3)
    free = st.builds(
        lambda properties, rest: {"type": "object", "properties": properties, "additionalProperties": rest},
        st.dictionaries(names, inner, max_size=2),
        inner,
    )
    led = st.builds(lambda prefix, rest: {"type": "array", "prefixItems": prefix, "items": rest}, several, inner)
    return st.one_of(several.map(lambda parts: {"anyOf": parts}), free, led)


rich_parameter_schemas = _objects(
    st.recursive(
        st.one_of(_open_kinds, _nullable, _closed()),
        lambda inner: st.one_of(_open_ended(inner), _open_ended(inner), _objects(inner), _arrays(inner)),
        max_leaves=5,
    )
)
"""Schemas of a tool's parameters with choices between kinds and names, for values that `walk` makes."""


def tool(parameters: dict[str, Any], name: str = "act") -> dict[str, Any]:
    """A tool of the OpenAI form."""
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def one(schema: Any, required: bool = True, /, **rest: Any) -> dict[str, Any]:
    """Parameters with one property `a`."""
    return {"type": "object", "properties": {"a": schema}, **({"required": ["a"]} if required else {}), **rest}


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


# ------------------------------------------------------------------------------------------------ texts of a scaffold


def raw_text(automaton: Any, chance: random.Random, most: int | None = None) -> bytes:
    """Any raw text of an automaton, of at most so many characters."""
    state, text, chars = 0, b"", 0
    needed = list(zip(automaton.chars_needed.tolist(), automaton.bytes_needed.tolist(), strict=True))
    while True:
        steps = []
        for code, target in enumerate(automaton.transitions[state].tolist()):
            begins = int(code & 0xC0 != 0x80)
            room = most is None or chars + begins + needed[target][0] <= most
            if target >= 0 and room and (len(text) < 24 or needed[target] < needed[state]):
                steps.append((code, target, begins))
        if automaton.accepting[state] and (not steps or chance.random() < 0.2):
            return text
        code, state, begins = chance.choice(steps)
        text, chars = text + bytes([code]), chars + begins


def as_dumped(text: str) -> str:
    """A JSON text as `json.dumps` writes it, but with its numbers as they are: some have more than one text."""
    value = json.loads(text, parse_float=lambda number: f"\0{number}")
    return re.sub(r'"\\u0000([^"\\]+)"', r"\1", json.dumps(value, ensure_ascii=False))


def taken_by(written: str, leaf: Any, frame: Any) -> set[str]:
    """Texts that a leaf must not have: those of its like, and for keys the declared names."""
    if leaf.distinct is None:
        return set()
    declared = list(frame.node.reserved) if leaf.distinct == 0 else []
    return set(scaffold_module.taken_texts(written, leaf)).union(map(leaf.text, declared))


def leaf_text(leaf: Any, taken: set[str], chance: random.Random) -> str:
    """Any text of a leaf as it stands in the call, none of the taken ones."""
    if leaf.kind == "choice":
        return chance.choice([text for text in leaf.choices if text not in taken])
    if leaf.kind == "guided":
        return "0"
    for _ in range(1000):
        raw = raw_text(leaf.automaton, chance, leaf.max_length).decode()
        text = leaf.text(raw) if leaf.kind == "string" else raw
        if text not in taken:
            return text
    raise AssertionError(f"no text is left for the value at {leaf.path}")


def walk(scaffold: Any, chance: random.Random, generous: float = 0.7, steps: int = 60) -> str:
    """One text that a scaffold admits, chosen by chance.

    Args:
        scaffold: the tool.
        chance: where chance comes from.
        generous: how likely what can be left out may come, at each of the first `steps` texts; later it never may.
        steps: how many texts are free.
    """
    written, leaf, frame, node = "", None, None, scaffold.root
    for step in range(20_000):
        least = step >= steps or chance.random() >= generous
        if node is not None:
            options = scaffold_module.node_options(node, frame, least)
        else:
            options = scaffold_module.next_options(leaf, frame, least)
        option = chance.choice(options)
        written += option.text
        if option.leads_to == "end":
            return written
        leaf, frame, node = option.leaf, option.frame, option.node
        if leaf is not None:
            written += leaf_text(leaf, taken_by(written, leaf, frame), chance)
    raise AssertionError("the walk does not come to an end")


def admits(scaffold: Any, arguments: Any) -> bool:
    """Whether some walk writes exactly these arguments."""
    return admits_text(scaffold, json.dumps(arguments, ensure_ascii=False))


def admits_text(scaffold: Any, text: str) -> bool:
    """Whether some walk writes exactly this text."""
    pending = [(option, 0) for option in scaffold_module.node_options(scaffold.root)]
    seen = set()
    while pending:
        option, place = pending.pop()
        if not text.startswith(option.text, place):
            continue
        place += len(option.text)
        if option.leads_to == "end" and place == len(text):
            return True
        key = (option.leads_to, option.leaf, option.frame, option.node, place)
        if option.leads_to == "end" or key in seen:
            continue
        seen.add(key)
        if option.node is not None:
            pending += [(after, place) for after in scaffold_module.node_options(option.node, option.frame)]
            continue
        for end in _leaf_ends(option, text, place):
            pending += [(after, end) for after in scaffold_module.next_options(option.leaf, option.frame)]
    return False


def _leaf_ends(option: Any, text: str, place: int) -> Iterator[int]:
    """Where the value of an option's leaf that starts at `place` may end."""
    leaf = option.leaf
    if leaf is None:
        yield place
        return
    taken = taken_by(text[:place], leaf, option.frame)
    if leaf.kind == "choice":
        ends = [place + len(choice) for choice in leaf.choices if text.startswith(choice, place)]
    elif leaf.quoted:
        ends = [json.decoder.scanstring(text, place)[1] - 1]  # type: ignore[attr-defined]
    else:
        try:
            ends = [json.JSONDecoder().raw_decode(text, place)[1]]
        except json.JSONDecodeError:
            ends = []
    for end in ends:
        written = text[place:end]
        if written not in taken and scaffold_module.fits(leaf, leaf.value(written)):
            yield end
