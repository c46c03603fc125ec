"""The scaffold admits exact JSON that validates and refuses what it cannot guarantee; its layouts lose nothing."""

import json
import random
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator, SchemaError

import schemas
from repo_package import load_repo_module

scaffold_module = load_repo_module("schema_scaffold")
compile_scaffold = scaffold_module.compile_scaffold
draft_layout = scaffold_module.draft_layout
first_options, next_options = scaffold_module.first_options, scaffold_module.next_options
Leaf, UnsupportedSchemaError = scaffold_module.Leaf, scaffold_module.UnsupportedSchemaError
MAX_CHOICES, MAX_DEPTH, MAX_LEAVES = scaffold_module.MAX_CHOICES, scaffold_module.MAX_DEPTH, scaffold_module.MAX_LEAVES

# Hypothesis draws nested schemas and values; that is slow on a busy machine, and no fault.
quick = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


def compiled(parameters: Any) -> Any:
    return compile_scaffold(schemas.tool(parameters))


def leaf_value(leaf: Any, chance: random.Random) -> Any:
    """Any value of a leaf."""
    if leaf.kind == "string":
        return chance.choice([*schemas.HOSTILE_TEXTS, *schemas.ORDINARY_TEXTS])
    if leaf.kind == "integer":
        return chance.choice([0, -7, 12, 10**20])
    return chance.choice([0, -3, 0.5, -12.25, 1e-4, 10**20])


def walk(scaffold: Any, chance: random.Random, generous: float = 0.7) -> str:
    """One text that the scaffold admits, chosen by chance; takes what is avoidable with probability `generous`."""
    written, options = "", first_options(scaffold)
    for step in range(10_000):
        # Exactly one way on takes nothing that could be left out: a call can always be brought to an end.
        (needed,) = [option for option in options if not option.avoidable]
        avoidable = [option for option in options if option.avoidable]
        take = avoidable and step < 60 and chance.random() < generous
        option = chance.choice(avoidable) if take else needed
        written += option.text
        if option.leads_to == "end":
            return written
        leaf = option.leaf
        if leaf is not None:
            written += chance.choice(leaf.choices) if leaf.kind == "choice" else leaf.text(leaf_value(leaf, chance))
        options = next_options(leaf, option.frame)
    raise AssertionError("the walk does not come to an end")


def admits(scaffold: Any, arguments: dict[str, Any]) -> bool:
    """Whether some walk writes exactly these arguments."""
    text = json.dumps(arguments, ensure_ascii=False)
    pending = [(option, 0) for option in first_options(scaffold)]
    while pending:
        option, place = pending.pop()
        if not text.startswith(option.text, place):
            continue
        place += len(option.text)
        if option.leads_to == "end":
            if place == len(text):
                return True
            continue
        for end in _leaf_ends(option.leaf, text, place):
            pending += [(after, end) for after in next_options(option.leaf, option.frame)]
    return False


def _leaf_ends(leaf: Any, text: str, place: int) -> list[int]:
    """Where the value of a leaf that starts at `place` may end."""
    if leaf is None:
        return [place]
    if leaf.kind == "choice":
        return [place + len(choice) for choice in leaf.choices if text.startswith(choice, place)]
    if leaf.quoted:
        _, end = json.decoder.scanstring(text, place)  # type: ignore[attr-defined]
        return [end - 1]
    _, end = json.JSONDecoder().raw_decode(text, place)
    return [end]


# ------------------------------------------------------------------------------------------------- what is admitted


@settings(quick, max_examples=150)
@given(schemas.parameter_schemas, st.integers())
def test_every_walk_is_exact_json_that_validates(parameters: dict[str, Any], seed: int) -> None:
    validator = Draft202012Validator(parameters)
    scaffold, chance = compiled(parameters), random.Random(seed)
    for generous in (0.0, 0.5, 0.9):
        written = walk(scaffold, chance, generous)
        arguments = json.loads(written)
        assert json.dumps(arguments, ensure_ascii=False) == written
        assert list(validator.iter_errors(arguments)) == []


@settings(quick, max_examples=150)
@given(schemas.fitted_parameters())
def test_every_fitting_value_is_admitted(fitted: tuple[dict[str, Any], dict[str, Any]]) -> None:
    parameters, arguments = fitted
    assert admits(compiled(parameters), arguments)


@quick
@given(schemas.parameter_schemas, st.integers())
def test_no_option_is_ambiguous(parameters: dict[str, Any], seed: int) -> None:
    """An option is the beginning of another one only where it opens a value."""
    scaffold, chance = compiled(parameters), random.Random(seed)
    options = first_options(scaffold)
    for _ in range(10):
        for one in options:
            for other in options:
                if one is not other and other.text.startswith(one.text):
                    assert one.leads_to == "value"
        option = chance.choice(options)
        if option.leads_to == "end":
            break
        options = next_options(option.leaf, option.frame)


def test_optional_properties_are_left_out_and_never_null() -> None:
    kinds = [{"type": "string"}, {"type": "integer"}, {"type": "number"}, {"type": "boolean"}, {"enum": ["a", "b"]}]
    properties: dict[str, Any] = {f"p{index}": kind for index, kind in enumerate(kinds)}
    properties["nested"] = {"type": "object", "properties": dict(properties)}
    properties["nullable"] = {"type": "string", "nullable": True}
    scaffold = compiled({"type": "object", "properties": properties})
    chance, seen = random.Random(0), set[str]()
    for _ in range(200):
        arguments = json.loads(walk(scaffold, chance))
        assert None not in arguments.values()
        assert None not in arguments.get("nested", {}).values()
        seen |= set(map(str, [sorted(arguments)]))
    assert "[]" in seen
    assert len(seen) > 20, "properties come and go independently"


def test_properties_stand_in_schema_order() -> None:
    names = ["z", "a", "m"]
    scaffold = compiled(
        {"type": "object", "properties": {name: {"type": "boolean"} for name in names}, "required": names[::-1]}
    )
    assert list(json.loads(walk(scaffold, random.Random(0)))) == names


@pytest.mark.parametrize(
    ("array", "lengths"),
    [
        ({"minItems": 2, "maxItems": 3}, {2, 3}),
        ({"maxItems": 0}, {0}),
        ({"minItems": 3, "maxItems": 3}, {3}),
        ({"maxItems": 1}, {0, 1}),
    ],
)
def test_array_bounds_are_kept_and_reached(array: dict[str, int], lengths: set[int]) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "array", "items": {"type": "boolean"}, **array}},
        "required": ["a"],
    }
    scaffold, chance = compiled(schema), random.Random(0)
    assert {len(json.loads(walk(scaffold, chance))["a"]) for _ in range(50)} == lengths


def test_no_parameters_is_an_empty_object() -> None:
    for parameters in (None, {}, {"type": "object"}, {"type": "object", "properties": {}}):
        assert walk(compiled(parameters), random.Random(0)) == "{}"


# ------------------------------------------------------------------------------------------------- what is refused

STRING = {"type": "string"}
NAN = float("nan")


def nested_schema(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = STRING
    for _ in range(levels):
        schema = {"type": "object", "properties": {"x": schema}}
    return schema


def nested_list(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


def nested_arrays(levels: int, minimum: int) -> dict[str, Any]:
    schema: dict[str, Any] = STRING
    for _ in range(levels):
        schema = {"type": "array", "items": schema, "minItems": minimum}
    return schema


# (schema of the property `a/b`, where the fault lies below it, keyword)
UNSUPPORTED: list[tuple[Any, str, str]] = [
    ({"anyOf": [STRING]}, "", "anyOf"),
    ({"oneOf": [STRING]}, "", "oneOf"),
    ({"allOf": [STRING]}, "", "allOf"),
    ({"$ref": "#/$defs/x"}, "", "$ref"),
    ({"not": STRING}, "", "not"),
    ({"if": STRING, "then": STRING}, "", "if"),
    ({"type": "string", "anyOf": [STRING]}, "", "anyOf"),
    ({"type": "string", "$ref": "#"}, "", "$ref"),
    ({"type": "string", "pattern": "(a+)+$"}, "", "pattern"),
    ({"type": "string", "format": "date"}, "", "format"),
    ({"type": "string", "minLength": 1}, "", "minLength"),
    ({"type": "string", "maxLength": 5}, "", "maxLength"),
    ({"type": "integer", "minimum": 0}, "", "minimum"),
    ({"type": "number", "exclusiveMaximum": 1}, "", "exclusiveMaximum"),
    ({"type": "number", "multipleOf": 0.1}, "", "multipleOf"),
    ({"type": "boolean", "const": True, "minimum": 1}, "", "minimum"),
    ({"enum": ["a"], "pattern": "b"}, "", "pattern"),
    ({"type": "array"}, "", "items"),
    ({"type": "array", "items": STRING, "uniqueItems": True}, "", "uniqueItems"),
    ({"type": "array", "items": STRING, "prefixItems": []}, "", "prefixItems"),
    ({"type": "array", "items": STRING, "contains": STRING}, "", "contains"),
    ({"type": "array", "items": {"type": "string", "format": "uuid"}}, "/items", "format"),
    ({"type": "array", "items": [STRING]}, "/items", "schema"),
    ({"type": "array", "items": True}, "/items", "schema"),
    ({"type": "array", "items": STRING, "minItems": -1}, "", "minItems"),
    ({"type": "array", "items": STRING, "minItems": "2"}, "", "minItems"),
    ({"type": "array", "items": STRING, "maxItems": True}, "", "maxItems"),
    ({"type": "array", "items": STRING, "minItems": 3, "maxItems": 2}, "", "maxItems"),
    ({"type": "array", "items": STRING, "minItems": 10**9}, "", "minItems"),
    (
        {
            "type": "array",
            "items": {"type": "object", "properties": {}, "additionalProperties": False},
            "minItems": 10**9,
        },
        "",
        "minItems",
    ),
    (nested_arrays(20, 50), "/items" * 18, "minItems"),
    ({"type": "object"}, "", "additionalProperties"),
    ({"type": "object", "properties": {}}, "", "additionalProperties"),
    ({"type": "object", "additionalProperties": STRING}, "", "additionalProperties"),
    ({"type": "object", "properties": {"x": STRING}, "additionalProperties": STRING}, "", "additionalProperties"),
    ({"type": "object", "properties": {"x": STRING}, "patternProperties": {}}, "", "patternProperties"),
    ({"type": "object", "properties": {"x": STRING}, "dependentRequired": {}}, "", "dependentRequired"),
    ({"type": "object", "properties": {"x": STRING}, "required": ["y"]}, "", "required"),
    ({"type": "object", "properties": {"x": STRING}, "required": "x"}, "", "required"),
    ({"type": "object", "properties": {"x": STRING}, "required": [["x"]]}, "", "required"),
    ({"type": "object", "properties": {"x": STRING}, "required": None}, "", "required"),
    ({"type": "object", "properties": [STRING]}, "", "properties"),
    ({"type": "object", "properties": {1: STRING}}, "", "properties"),
    ({"type": "object", "properties": {"\ud800": STRING}}, "", "properties"),
    ({"type": "object", "properties": {"x~/": {"type": "string", "pattern": "."}}}, "/properties/x~0~1", "pattern"),
    (nested_schema(MAX_DEPTH + 5), "/properties/x" * MAX_DEPTH, "properties"),
    (
        {"type": "object", "properties": {str(index): STRING for index in range(MAX_LEAVES)}},
        f"/properties/{MAX_LEAVES - 3}",
        "properties",
    ),
    ({"type": "string", "enum": []}, "", "enum"),
    ({"enum": "abc"}, "", "enum"),
    ({"enum": {"a": 1}}, "", "enum"),
    ({"enum": 5, "const": 5}, "", "enum"),
    ({"enum": [str(index) for index in range(MAX_CHOICES + 1)]}, "", "enum"),
    ({"enum": [NAN]}, "", "enum"),
    ({"enum": ["\ud800"]}, "", "enum"),
    ({"const": float("inf")}, "", "const"),
    ({"const": nested_list(5000)}, "", "const"),
    ({"const": {1, 2}}, "", "const"),
    ({"const": True, "enum": [1]}, "", "const"),
    ({"const": "a", "enum": ["b"]}, "", "const"),
    ({"type": "string", "enum": [1, 2]}, "", "enum"),
    ({"type": "integer", "const": 1.5}, "", "const"),
    ({"type": ["string", "null"], "enum": ["a"]}, "", "type"),
    ({"type": "null"}, "", "type"),
    ({"type": ["string", "null"]}, "", "type"),
    ({"type": "text"}, "", "type"),
    ({"type": 7}, "", "type"),
    ({"type": None}, "", "type"),
    ({}, "", "type"),
    ({"description": "anything"}, "", "type"),
    (True, "", "schema"),
    (None, "", "schema"),
    ("string", "", "schema"),
    ([], "", "schema"),
    ({"type": "string", "nullable": True}, "", "nullable"),
    ({"type": "string", 3: 4}, "", "3"),
]


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("schema", "below", "keyword"), UNSUPPORTED, ids=[f"{i}-{row[2]}" for i, row in enumerate(UNSUPPORTED)]
)
def test_what_cannot_be_guaranteed_is_refused_by_name(schema: Any, below: str, keyword: str) -> None:
    parameters = {"type": "object", "properties": {"ok": STRING, "a/b": schema}, "required": ["a/b"]}
    with pytest.raises(UnsupportedSchemaError) as caught:
        compile_scaffold(schemas.tool(parameters, name="the tool"))
    error = caught.value
    assert (error.tool, error.pointer, error.keyword) == ("the tool", f"/properties/a~1b{below}", keyword)
    for part in ("'the tool'", repr(error.pointer), repr(keyword)):
        assert part in str(error)
    assert isinstance(error, ValueError)


@pytest.mark.parametrize(
    ("parameters", "keyword"),
    [
        ({"type": "string"}, "type"),
        ({"type": "array", "items": STRING}, "type"),
        ({"const": {}}, "type"),
        ([1], "schema"),
        ("object", "schema"),
        ({"type": "object", "$defs": {}}, "$defs"),
        ({"type": "object", "properties": {"a": STRING}, "required": ["b"]}, "required"),
        ({"type": "object", "additionalProperties": True}, "additionalProperties"),
    ],
)
def test_faults_at_the_root_are_refused(parameters: Any, keyword: str) -> None:
    with pytest.raises(UnsupportedSchemaError) as caught:
        compiled(parameters)
    assert (caught.value.pointer, caught.value.keyword) == ("", keyword)


@pytest.mark.timeout(20)
def test_many_required_arrays_are_refused_together() -> None:
    """Each array is within bounds, all of them are not."""
    arrays = {str(index): {"type": "array", "items": STRING, "minItems": 1000} for index in range(3)}
    compiled({"type": "object", "properties": arrays})
    with pytest.raises(UnsupportedSchemaError) as caught:
        compiled({"type": "object", "properties": arrays, "required": list(arrays)})
    assert caught.value.keyword == "required"


_keywords = st.sampled_from(
    [
        "type",
        "properties",
        "required",
        "items",
        "minItems",
        "maxItems",
        "enum",
        "const",
        "additionalProperties",
        "nullable",
        "description",
        "anyOf",
        "$ref",
        "pattern",
        "minimum",
        "uniqueItems",
        "maxLength",
        "default",
        "format",
        "not",
        "prefixItems",
    ]
)
_fragments = st.recursive(
    st.one_of(
        st.sampled_from(
            ["string", "integer", "object", "array", "number", "boolean", "null", "a", "ok", True, False, None]
        ),
        schemas.json_values,
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.one_of(_keywords, st.just("a")), inner, max_size=4)
    ),
    max_leaves=8,
)


@st.composite
def damaged_parameters(draw: Any) -> dict[str, Any]:
    """Parameters with one keyword somewhere set to anything."""
    parameters = draw(schemas.parameter_schemas)
    spots: list[dict[str, Any]] = []

    def collect(schema: Any) -> None:
        spots.append(schema)
        for inner in schema.get("properties", {}).values():
            collect(inner)
        if "items" in schema:
            collect(schema["items"])

    collect(parameters)
    draw(st.sampled_from(spots))[draw(_keywords)] = draw(_fragments)
    return parameters


@settings(quick, max_examples=400)
@given(damaged_parameters(), st.integers())
def test_a_schema_is_refused_or_kept_whatever_it_holds(parameters: dict[str, Any], seed: int) -> None:
    """Never another error, and never a text that the schema does not allow."""
    try:
        scaffold = compiled(parameters)
    except UnsupportedSchemaError:
        return
    try:
        Draft202012Validator.check_schema(parameters)
    except SchemaError:
        assume(False)  # what a malformed schema allows is not defined
    arguments = json.loads(walk(scaffold, random.Random(seed)))
    assert list(Draft202012Validator(parameters).iter_errors(arguments)) == []


# ------------------------------------------------------------------------------------------------- layouts


def texts_of(layout: Any, arguments: dict[str, Any]) -> list[str]:
    """A text for every slot: of the arguments where the slot is alive, rubbish where it is not."""
    return ["rubbish" if text is None else text for text in layout.texts(arguments)]


@settings(quick, max_examples=150)
@given(schemas.fitted_parameters(), st.integers(3, 6))
def test_assemble_inverts_texts(fitted: tuple[dict[str, Any], dict[str, Any]], budget: int) -> None:
    parameters, arguments = fitted
    layout = draft_layout(compiled(parameters), budget + 3)
    back = layout.assemble(texts_of(layout, arguments))
    assert json.dumps(back) == json.dumps(arguments)


@settings(quick, max_examples=100)
@given(schemas.fitted_parameters())
def test_every_beginning_of_a_call_is_observed_consistently(fitted: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """What is observed of a beginning is never wrong; once everything is written, everything is known."""
    parameters, arguments = fitted
    layout = draft_layout(compiled(parameters), 6)
    texts, written = layout.texts(arguments), json.dumps(arguments, ensure_ascii=False)
    for end in range(len(written) + 1):
        observed, beyond = layout.observe(written[:end])
        assert not beyond
        for text, known in zip(texts, observed, strict=True):
            if known is not None:
                assert text is not None
                assert text == known.text if known.complete else text.startswith(known.text)
    observed, _ = layout.observe(written + "}\n")
    for text, known in zip(texts, observed, strict=True):
        assert (known is None) == (text is None)
        assert known is None or (known.complete and known.text == text)


@quick
@given(st.lists(schemas.texts, min_size=1, max_size=6), st.integers(1, 4))
def test_arrays_beyond_the_budget_are_noticed(items: list[str], budget: int) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "array", "items": STRING}, "b": {"type": "boolean"}},
        "required": ["a"],
    }
    layout = draft_layout(compiled(schema), budget)
    arguments = {"a": items, "b": True}
    observed, beyond = layout.observe(json.dumps(arguments, ensure_ascii=False))
    assert beyond == (len(items) > budget)
    assert [known.text for known in observed[1 : 1 + budget] if known] == items[:budget]
    assert layout.assemble(texts_of(layout, arguments)) == {"a": items[:budget], "b": True}


@quick
@given(schemas.parameter_schemas, st.integers(1, 3))
def test_slots_stand_in_reading_order_and_depend_on_earlier_ones(parameters: dict[str, Any], budget: int) -> None:
    layout = draft_layout(compiled(parameters), budget)
    assert [piece for piece in layout.pieces if isinstance(piece, int)] == list(range(len(layout.slots)))
    for index, slot in enumerate(layout.slots):
        for control, least in slot.alive_if:
            assert control < index
            assert layout.slots[control].role != "value"
            assert least >= 0


@pytest.mark.timeout(20)
def test_a_layout_that_would_be_too_large_is_none() -> None:
    grid: dict[str, Any] = STRING
    for _ in range(6):
        grid = {"type": "array", "items": grid}
    assert draft_layout(compiled({"type": "object", "properties": {"grid": grid}}), 8) is None
    # No slot at all inside, and still much text.
    empty = {"type": "object", "properties": {}, "additionalProperties": False}
    rows = {"type": "array", "items": {"type": "array", "items": empty, "minItems": 2000, "maxItems": 2000}}
    wide = {"type": "object", "properties": {str(index): rows for index in range(500)}}
    assert draft_layout(compiled(wide), 4) is None


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"a": "x", "b": 1},
        {"a": "other"},
        {"a": "x", "c": "no list"},
        {"a": "x", "c": []},
        {"a": "x", "d": 1},
        {"a": 1},
        [],
    ],
)
def test_arguments_that_do_not_fit_have_no_texts(arguments: Any) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x"]}, "c": {"type": "array", "items": STRING, "minItems": 1}},
        "required": ["a"],
    }
    layout = draft_layout(compiled(schema), 2)
    with pytest.raises(ValueError, match=r"fit|required"):
        layout.texts(arguments)
    with pytest.raises(ValueError, match="slots"):
        layout.assemble([])


@quick
@given(schemas.texts)
def test_a_leaf_reads_back_what_it_writes(text: str) -> None:
    leaf = Leaf("string", "", quoted=True)
    assert leaf.value(leaf.text(text)) == text
    with pytest.raises(ValueError, match="JSON"):
        Leaf("number", "", quoted=False).text(NAN)
