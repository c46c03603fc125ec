"""Layouts lose nothing: texts and values turn into each other, and the beginning of a call is never read wrongly."""

import json
import random
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

import schemas
from repo_package import load_repo_module
from schemas import one, walk

scaffold_module = load_repo_module("schema_scaffold")
layout_module = load_repo_module("scaffold_layout")
draft_layout, EXTRA_BUDGET, LINK_BUDGET = (
    layout_module.draft_layout,
    layout_module.EXTRA_BUDGET,
    layout_module.LINK_BUDGET,
)

# Hypothesis draws nested schemas and values; that is slow on a busy machine, and no fault.
quick = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
STRING, INTEGER, NUMBER, BOOLEAN = ({"type": name} for name in ("string", "integer", "number", "boolean"))


def compiled(parameters: Any, on_unsupported: str = "error") -> Any:
    return scaffold_module.compile_scaffold(schemas.tool(parameters), on_unsupported)


def laid_out(schema: Any, budget: int = 3) -> Any:
    layout = draft_layout(compiled(one(schema)), budget)
    assert layout is not None
    return layout


def filled(layout: Any, arguments: dict[str, Any]) -> list[str]:
    """A text for every slot: of the arguments where the slot is alive, rubbish where it is not."""
    return ["rubbish" if text is None else text for text in layout.texts(arguments)]


def is_alive(layout: Any, slot: Any, texts: list[str | None]) -> bool:
    """Whether the decisions of other slots let a slot matter."""
    for control, low, high in slot.alive_if:
        text = texts[control]
        if text is None or not low <= layout.slots[control].decision(text) <= high:
            return False
    return True


def check_beginnings(layout: Any, arguments: dict[str, Any]) -> None:
    """What is observed of a beginning is never wrong; once everything is written, everything is known."""
    texts, written = layout.texts(arguments), json.dumps(arguments, ensure_ascii=False)
    whole, beyond_at_all = layout.observe(written + "}\n")
    for end in range(len(written) + 1):
        observed, beyond = layout.observe(written[:end])
        assert beyond_at_all or not beyond, written[:end]
        for slot, text, known in zip(layout.slots, texts, observed, strict=True):
            if known is not None:
                assert text is not None, (written[:end], slot.path, slot.role, known)
                fits = text == known.text if known.complete else text.startswith(known.text)
                assert fits, (written[:end], slot.path, slot.role, known, text)
    if not beyond_at_all:
        assert layout.assemble(filled(layout, arguments)) == arguments
        for text, known in zip(texts, whole, strict=True):
            assert (known is None) == (text is None)
            assert known is None or (known.complete and known.text == text)


# ------------------------------------------------------------------------------------------------- any schema


@settings(quick, max_examples=100)
@given(schemas.fitted_parameters(), st.integers(3, 6))
def test_assemble_inverts_texts(fitted: tuple[dict[str, Any], dict[str, Any]], budget: int) -> None:
    parameters, arguments = fitted
    layout = draft_layout(compiled(parameters), budget + 3)
    back = layout.assemble(filled(layout, arguments))
    assert json.dumps(back) == json.dumps(arguments)


@settings(quick, max_examples=60)
@given(schemas.fitted_parameters())
def test_every_beginning_of_a_call_is_observed_consistently(fitted: tuple[dict[str, Any], dict[str, Any]]) -> None:
    parameters, arguments = fitted
    layout = draft_layout(compiled(parameters), 6)
    assert not layout.observe(json.dumps(arguments, ensure_ascii=False))[1]
    check_beginnings(layout, arguments)


@settings(quick, max_examples=80)
@given(schemas.rich_parameter_schemas, st.integers())
def test_beginnings_are_observed_consistently_through_unions_and_free_names(
    parameters: dict[str, Any], seed: int
) -> None:
    scaffold = compiled(parameters)
    layout = draft_layout(scaffold, 3)
    assume(layout is not None)
    check_beginnings(layout, json.loads(walk(scaffold, random.Random(seed), steps=12)))


@settings(quick, max_examples=80)
@given(schemas.rich_parameter_schemas, st.integers())
def test_slots_are_alive_exactly_where_they_have_a_text(parameters: dict[str, Any], seed: int) -> None:
    scaffold = compiled(parameters)
    layout = draft_layout(scaffold, 2)
    assume(layout is not None)
    texts = layout.texts(json.loads(walk(scaffold, random.Random(seed), steps=20)))
    for slot, text in zip(layout.slots, texts, strict=True):
        assert is_alive(layout, slot, texts) == (text is not None)
    # What was cut to the budgets stays as it is.
    assert layout.texts(layout.assemble([text or "" for text in texts])) == texts


@settings(quick, max_examples=60)
@given(st.one_of(schemas.parameter_schemas, schemas.rich_parameter_schemas), st.integers(1, 3))
def test_slots_stand_in_reading_order_and_depend_on_earlier_ones(parameters: dict[str, Any], budget: int) -> None:
    layout = draft_layout(compiled(parameters), budget)
    assume(layout is not None)
    assert [piece for piece in layout.pieces if isinstance(piece, int)] == list(range(len(layout.slots)))
    for index, slot in enumerate(layout.slots):
        for control, low, high in slot.alive_if:
            assert control < index
            assert layout.slots[control].role not in ("value", "key")
            assert 0 <= low <= high


def test_pieces_and_texts_spell_a_call_in_which_nothing_is_left_out() -> None:
    schema = {
        "type": "object",
        "properties": {"x": STRING, "n": INTEGER, "ok": BOOLEAN},
        "required": ["x", "n", "ok"],
    }
    array = {"type": "array", "items": schema, "minItems": 2, "maxItems": 2}
    layout = laid_out(array)
    arguments = {"a": [{"x": 'a "b"', "n": 10**20, "ok": True}, {"x": "\n", "n": -1, "ok": False}]}
    texts = layout.texts(arguments)
    spelled = [
        piece if isinstance(piece, str) else layout.slots[piece].leaf.text(layout.slots[piece].leaf.value(texts[piece]))
        for piece in layout.pieces
        if isinstance(piece, str) or layout.slots[piece].leaf.kind != "string"
    ]
    assert len(layout.slots) == 6
    strings = ["" if isinstance(piece, str) else texts[piece] for piece in layout.pieces]
    assert strings.count('a "b"') == 1, "strings stand raw in their slots"
    assert "".join(spelled) == json.dumps(arguments).replace('a \\"b\\"', "").replace("\\n", "")


# ------------------------------------------------------------------------------------------------- unions


def kinds(*names: str) -> dict[str, Any]:
    """Objects that are told apart by their first property."""
    return {
        "anyOf": [
            {
                "type": "object",
                "properties": {"kind": {"const": name}, name: STRING, "n": INTEGER},
                "required": ["kind"],
            }
            for name in names
        ]
    }


@pytest.mark.parametrize(
    ("schema", "choices", "values"),
    [
        ({"type": ["string", "null"]}, ("string", "null"), ["s", None]),
        ({"anyOf": [STRING, INTEGER, {"enum": [True, "no"]}]}, ("string", "integer", "choice"), ["s", 3, True]),
        ({"anyOf": [INTEGER, NUMBER]}, ("integer", "number"), [1, 1.5]),
        ({"anyOf": [{"type": "array", "items": STRING}, STRING]}, ("array", "string"), [["s", "t"], "s"]),
        (kinds("p", "q"), ("object", "object 2"), [{"kind": "p", "p": "s"}, {"kind": "q", "q": "s", "n": 1}]),
    ],
)
def test_a_union_is_one_decision_between_its_branches(schema: Any, choices: tuple[str, ...], values: list[Any]) -> None:
    layout = laid_out(schema)
    (branch,) = [index for index, slot in enumerate(layout.slots) if slot.role == "branch"]
    assert layout.slots[branch].leaf.choices == choices
    for index, value in enumerate(values):
        texts = layout.texts({"a": value})
        assert texts[branch] == choices[index]
        assert layout.slots[branch].decision(texts[branch]) == index
        for slot, text in zip(layout.slots, texts, strict=True):
            if (branch, index, index) not in slot.alive_if and slot.role != "branch":
                assert text is None
        assert layout.assemble(filled(layout, {"a": value})) == {"a": value}


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        (kinds("p", "q"), {"kind": "q", "q": "s"}),
        (kinds("p", "pp", "ppp"), {"kind": "pp", "pp": "s", "n": 12}),
        (kinds("p", "q"), {"kind": "q"}),
        ({"anyOf": [INTEGER, NUMBER]}, 12.5),
        ({"anyOf": [INTEGER, NUMBER]}, 12),
        ({"anyOf": [{"enum": [1, 12]}, INTEGER]}, 123),
        ({"anyOf": [{"enum": ["ab", "abc"]}, {"type": "string", "minLength": 4}]}, "abcd"),
        ({"anyOf": [{"enum": ["ab", 1]}, {"type": "string", "minLength": 3}]}, "abc"),
        ({"type": "string", "anyOf": [{"pattern": "^a+$"}, {"pattern": "^a+b$"}]}, "aab"),
        ({"type": "string", "anyOf": [{"maxLength": 2}, {"minLength": 2}]}, "abc"),
        ({"anyOf": [{"type": "array", "items": INTEGER}, {"type": "array", "items": STRING}]}, ["s"]),
        ({"anyOf": [{"type": "array", "items": INTEGER}, {"type": "array", "items": NUMBER}]}, [1, 2, 2.5]),
        ({"type": "array", "items": {"type": ["string", "null"]}}, ["s", None, ""]),
        ({"anyOf": [STRING, {"type": "object", "additionalProperties": INTEGER}]}, {"k": 1}),
    ],
)
def test_a_branch_is_known_once_no_other_fits_what_is_written(schema: Any, value: Any) -> None:
    """The beginnings of two branches may be alike."""
    layout = laid_out(schema)
    assert not layout.observe(json.dumps({"a": value}))[1]
    check_beginnings(layout, {"a": value})


def test_what_is_common_to_all_branches_leaves_the_choice_open() -> None:
    layout = laid_out(kinds("p", "q"))
    branch = next(index for index, slot in enumerate(layout.slots) if slot.role == "branch")
    for written, known in (('{"a": {"ki', None), ('{"a": {"kind": "q', "object 2"), ('{"a": {"kind": "p"', "object")):
        observed = layout.observe(written)[0][branch]
        assert (observed and observed.text) == known


# ------------------------------------------------------------------------------------------------- arrays, free names


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
    assert layout.assemble(filled(layout, arguments)) == {"a": items[:budget], "b": True}


@pytest.mark.parametrize(
    ("array", "counts", "open_ended"),
    [
        ({}, ("0", "1", "2", "3"), True),
        ({"minItems": 2}, ("2", "3"), True),
        ({"minItems": 2, "maxItems": 3}, ("2", "3"), False),
        ({"maxItems": 9}, ("0", "1", "2", "3"), True),
        ({"maxItems": 1}, ("0", "1"), False),
        ({"minItems": 5, "maxItems": 6}, (), None),
        ({"contains": {"const": "s"}, "minContains": 2}, ("2", "3"), True),
    ],
)
def test_the_length_of_an_array_is_one_decision(array: Any, counts: tuple[str, ...], open_ended: bool | None) -> None:
    layout = laid_out({"type": "array", "items": STRING, **array})
    lengths = [slot for slot in layout.slots if slot.role == "length"]
    assert [slot.leaf.choices for slot in lengths] == ([counts] if counts else [])
    assert [slot.open_ended for slot in lengths] == ([open_ended] if counts else [True] if open_ended else [])


@settings(quick, max_examples=60)
@given(st.dictionaries(schemas.names.filter(lambda name: name not in ("x", "y")), st.integers(0, 99), max_size=4))
@example({"k": 1, "l": 2, "m": 3})
def test_freely_named_properties_are_a_count_and_pairs(extras: dict[str, int]) -> None:
    schema = {"type": "object", "properties": {"x": STRING}, "additionalProperties": INTEGER}
    layout = laid_out(schema)
    count, *slots = [slot for slot in layout.slots if slot.path != "/a/x"]
    assert (count.role, count.open_ended) == ("length", True)
    assert count.leaf.choices == tuple(str(number) for number in range(EXTRA_BUDGET + 1))
    assert [slot.role for slot in slots] == ["key", "value"] * EXTRA_BUDGET
    for declared in ({}, {"x": "s"}):
        arguments = {"a": {**declared, **extras}}
        within = dict(list(extras.items())[:EXTRA_BUDGET])
        assert layout.assemble(filled(layout, arguments)) == {"a": {**declared, **within}}
        observed, beyond = layout.observe(json.dumps(arguments, ensure_ascii=False))
        assert beyond == (len(extras) > EXTRA_BUDGET)
        texts = [known.text for slot, known in zip(layout.slots, observed, strict=True) if known and slot.role == "key"]
        assert texts == list(within)
        check_beginnings(layout, arguments)


def test_a_name_that_is_drafted_twice_keeps_its_first_value() -> None:
    layout = laid_out({"type": "object", "additionalProperties": INTEGER})
    assert layout.assemble(["2", "k", "1", "k", "2"]) == {"a": {"k": 1}}


# ------------------------------------------------------------------------------------------------- limits


def test_links_are_followed_a_few_times() -> None:
    node = {
        "type": "object",
        "properties": {"v": INTEGER, "next": {"$ref": "#/properties/a"}},
        "required": ["v"],
    }
    layout = laid_out(node)
    value: Any = {"v": 0}
    for depth in range(LINK_BUDGET + 1):
        value = {"v": depth + 1, "next": value}
    assert layout.assemble(filled(layout, {"a": value})) == {"a": value}
    check_beginnings(layout, {"a": value})
    deeper = {"a": {"v": 9, "next": value}}
    with pytest.raises(ValueError, match="laid out"):
        layout.texts(deeper)
    observed, beyond = layout.observe(json.dumps(deeper))
    assert beyond
    assert observed[0] == layout_module.Observed("9", True)


def test_what_has_to_link_further_than_the_budget_is_not_drafted() -> None:
    chain = {f"d{index}": one({"$ref": f"#/$defs/d{index + 1}"}) for index in range(3)}
    ends = {"anyOf": [{"type": "array", "items": {"$ref": "#/$defs/x"}, "minItems": 1}, INTEGER]}
    layout = draft_layout(compiled(one({"$ref": "#/$defs/x"}, **{"$defs": {**chain, "d3": STRING, "x": ends}})), 2)
    assert layout.assemble(filled(layout, {"a": [[1]]})) == {"a": [[1]]}
    with pytest.raises(ValueError, match="laid out"):
        layout.texts({"a": [[[[[1]]]]]})


def test_guided_values_are_left_to_others() -> None:
    hard = {"type": "string", "pattern": "(a|b)*a(a|b){20}"}
    assert draft_layout(compiled(one(hard), "ar"), 2) is None
    assert draft_layout(compiled(one({"type": "array", "items": hard, "minItems": 1}), "ar"), 2) is None
    optional = {"type": "object", "properties": {"x": STRING, "y": hard, "z": {"type": "array", "items": hard}}}
    layout = draft_layout(compiled(one(optional), "ar"), 2)
    assert all(slot.path not in ("/a/y", "/a/z/0") for slot in layout.slots)
    assert layout.assemble(filled(layout, {"a": {"x": "s", "z": []}})) == {"a": {"x": "s", "z": []}}
    observed, beyond = layout.observe('{"a": {"x": "s", "y": "a')
    assert beyond
    assert [known.text for known in observed if known] == ["true", "s"]


@pytest.mark.timeout(20)
def test_a_layout_that_would_be_too_large_is_none() -> None:
    grid: dict[str, Any] = STRING
    for _ in range(6):
        grid = {"type": "array", "items": grid}
    assert draft_layout(compiled({"type": "object", "properties": {"grid": grid}}), 8) is None
    # No slot at all inside, and still much text.
    empty = {"type": "object", "properties": {}, "additionalProperties": False}
    rows = {"type": "array", "items": {"type": "array", "items": empty, "minItems": 30, "maxItems": 30}, "minItems": 30}
    wide = {"type": "object", "properties": {str(index): rows for index in range(300)}}
    assert draft_layout(compiled(wide), 4) is None


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"a": "x", "b": 1},
        {"a": "other"},
        {"a": "x", "c": "no list"},
        {"a": "x", "c": []},
        {"a": "x", "c": [1]},
        {"a": "x", "d": 1},
        {"a": "x", "u": 1.5},
        {"a": "x", "f": {"k": "s"}},
        {"a": 1},
        [],
        None,
    ],
)
def test_arguments_that_do_not_fit_have_no_texts(arguments: Any) -> None:
    schema = {
        "type": "object",
        "properties": {
            "a": {"enum": ["x"]},
            "c": {"type": "array", "items": STRING, "minItems": 1},
            "u": {"anyOf": [STRING, INTEGER]},
            "f": {"type": "object", "additionalProperties": INTEGER},
        },
        "required": ["a"],
    }
    layout = draft_layout(compiled(schema), 2)
    with pytest.raises(ValueError, match=r"fit|required|laid out"):
        layout.texts(arguments)
    with pytest.raises(ValueError, match="slots"):
        layout.assemble([])
