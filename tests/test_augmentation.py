"""Changed records: calls still fit their tools, what is asked stays, and negatives are no positives in disguise."""

import copy
import json
from random import Random
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.augmentation import Augmentation, Renaming, augment, without_called_tools
from training.records import Record, bare_call, parse_record
from training.synthetic_calls import example

EVERYTHING = [
    Augmentation(1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0),
    Augmentation(0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0),
    Augmentation(0.3, 0.3, 0.3, 0.3, 0.5, 0.3, 0.3),
]


def tool(name: str, description: str = "", **properties: Record) -> Record:
    parameters = {"type": "object", "properties": properties, "required": list(properties)[:1]}
    described = {"description": description} if description else {}
    return {"type": "function", "function": {"name": name, **described, "parameters": parameters}}


def record(tools: list[Record], calls: list[Record], text: str = "Do it", **fields: Any) -> Record:
    return {"id": "r", "messages": [{"role": "user", "content": text}], "tools": tools, "calls": calls, **fields}


CITY = {"type": "string", "description": "Where it is"}
WEATHER = tool("get_weather", "Sunshine and rain of a place", cityName=CITY, days={"type": "integer"})
HOTEL = tool("book_hotel", "Rooms for a night", city=CITY)
CALL = {"name": "get_weather", "arguments": {"cityName": "Oslo", "days": 2}}


def names_of(item: Record) -> list[str]:
    return [one["function"]["name"] for one in item["tools"]]


def schema_of(item: Record, name: str) -> Record:
    schema: Record = next(one["function"]["parameters"] for one in item["tools"] if one["function"]["name"] == name)
    return schema


# ---- What is changed


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 10**6), st.sampled_from(EVERYTHING), st.booleans())
def test_calls_of_changed_records_still_fit_their_tools(
    index: int, seed: int, shares: Augmentation, described: bool
) -> None:
    given_record = example(index, 0).record
    earlier = [{"role": "assistant", "content": "", "tool_calls": copy.deepcopy(given_record["calls"])}] * bool(
        given_record["calls"]
    )
    given_record["messages"] = [*given_record["messages"], *earlier, {"role": "user", "content": "Again"}]
    before = copy.deepcopy(given_record)
    changed, renaming = augment(given_record, shares, Random(seed), described)
    assert given_record == before
    names = names_of(changed)
    assert len(set(names)) == len(names) == len(before["tools"])
    calls = [*changed["calls"], *(call for one in changed["messages"] for call in one.get("tool_calls", ()))]
    assert len(calls) == 2 * len(before["calls"])
    for call, old in zip(calls, [*before["calls"]] * 2, strict=True):
        schema = schema_of(changed, call["name"])
        jsonschema.Draft202012Validator.check_schema(schema)
        jsonschema.Draft202012Validator(schema).validate(call["arguments"])
        assert call == renaming.call(old)
        assert list(call["arguments"].values()) == list(old["arguments"].values())
        assert set(call["arguments"]) <= set(schema["properties"])
    for one, old in zip(changed["tools"], before["tools"], strict=True):
        assert len(one["function"]["parameters"]["properties"]) == len(old["function"]["parameters"]["properties"])
    assert [one["content"] for one in changed["messages"]] == [one["content"] for one in before["messages"]]


def test_the_same_state_gives_the_same_record() -> None:
    item = record([WEATHER, HOTEL], [CALL])
    shares = EVERYTHING[2]
    assert all(augment(item, shares, Random(seed)) == augment(item, shares, Random(seed)) for seed in range(20))
    assert len({tuple(names_of(augment(item, shares, Random(seed))[0])) for seed in range(20)}) > 3


def test_nothing_is_changed_where_all_shares_are_zero() -> None:
    item = record([WEATHER, HOTEL], [CALL])
    for seed in range(5):
        assert augment(item, Augmentation.none(), Random(seed)) == (item, Renaming())


def test_names_go_to_one_other_style() -> None:
    item = record([WEATHER, HOTEL], [CALL])
    shares = Augmentation(1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0)
    seen = {tuple(names_of(augment(item, shares, Random(seed))[0])) for seed in range(40)}
    assert seen == {
        ("get_weather", "book_hotel"),
        ("getWeather", "bookHotel"),
        ("GetWeather", "BookHotel"),
        ("get-weather", "book-hotel"),
        ("get.weather", "book.hotel"),
    }
    keys = {tuple(augment(item, shares, Random(seed))[0]["calls"][0]["arguments"]) for seed in range(40)}
    assert keys == {("cityName", "days"), ("city_name", "days"), ("CityName", "Days"), ("city-name", "days")}


def test_masked_names_hide_what_descriptions_tell_and_nothing_else() -> None:
    item = record([WEATHER, HOTEL, tool("plain_one", "", x={"type": "string"})], [CALL])
    shares = Augmentation(0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0)
    for seed in range(20):
        changed, _ = augment(item, shares, Random(seed))
        names = names_of(changed)
        assert names[2] == "plain_one"
        assert not {"get_weather", "book_hotel"} & set(names)
        # Of the two parameters one is described; the other's name is all that is known of it.
        assert list(changed["calls"][0]["arguments"])[1] == "days"
        assert next(iter(changed["calls"][0]["arguments"])) != "cityName"
        assert changed["tools"][0]["function"]["description"] == WEATHER["function"]["description"]
        shown, _ = augment(item, shares, Random(seed), described=False)
        assert names_of(shown) == ["get_weather", "book_hotel", "plain_one"]


@pytest.mark.parametrize(
    "fields",
    [
        {"text": "Please run get_weather for me"},
        {"answer": "`get_weather` says rain"},
        {"think": "I need get_weather."},
    ],
)
def test_a_name_that_is_spoken_of_stays(fields: dict[str, str]) -> None:
    item = record([WEATHER, HOTEL], [CALL], **fields)
    changed, _ = augment(item, Augmentation(0.0, 1.0, 0.0, 0.0), Random(0))
    assert names_of(changed)[0] == "get_weather"
    assert names_of(changed)[1] != "book_hotel"


def test_an_ordinary_word_is_no_mention_of_a_tool() -> None:
    item = record([tool("search", "Looks for pages", query=CITY)], [], "I want to search for shoes")
    assert names_of(augment(item, Augmentation(0.0, 1.0, 0.0, 0.0), Random(0))[0]) != ["search"]


@pytest.mark.parametrize(
    "more",
    [
        {"dependentRequired": {"cityName": ["days"]}},
        {"patternProperties": {"^c": {"type": "string"}}},
        {"properties": {"cityName": CITY, "days": {"$ref": "#/properties/cityName"}}},
    ],
)
def test_parameters_stay_where_the_schema_says_more_about_their_names(more: Record) -> None:
    item = record([copy.deepcopy(WEATHER)], [])
    item["tools"][0]["function"]["parameters"].update(more)
    changed, _ = augment(item, Augmentation(0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0), Random(1))
    assert changed["tools"] == item["tools"]


def test_no_new_name_meets_an_old_one() -> None:
    item = record([tool("getWeather", "a b"), tool("get_weather", "c d"), tool("GetWeather", "e f")], [])
    for seed in range(20):
        names = names_of(augment(item, Augmentation(1.0, 0.0), Random(seed))[0])
        assert len(set(names)) == 3


def test_wrapped_earlier_calls_are_renamed_too() -> None:
    item = record([WEATHER], [])
    wrapped = {"type": "function", "function": {"name": "get_weather", "arguments": {"cityName": "Rome"}}}
    item["messages"] = [
        *item["messages"],
        {"role": "assistant", "content": None, "tool_calls": [wrapped]},
        {"role": "tool", "content": "rain"},
    ]
    changed, _ = augment(item, Augmentation(0.0, 1.0, 0.0, 1.0), Random(0))
    call = changed["messages"][1]["tool_calls"][0]
    assert call["type"] == "function"
    assert bare_call(call)["name"] == names_of(changed)[0] != "get_weather"
    assert set(bare_call(call)["arguments"]) < set(schema_of(changed, names_of(changed)[0])["properties"])


def test_descriptions_are_shortened_or_left_out_but_not_under_masked_names() -> None:
    item = record([WEATHER], [CALL])
    bare, _ = augment(item, Augmentation(0, 0, 0, 0, 0, 0, 1.0), Random(0))
    assert "description" not in str(bare["tools"])
    masked, _ = augment(item, Augmentation(0, 1.0, 0, 0, 0, 0, 1.0), Random(0))
    assert "Sunshine" in str(masked["tools"])
    short, _ = augment(item, Augmentation(0, 0, 0, 0, 0, 1.0, 0), Random(1))
    text = short["tools"][0]["function"]["description"]
    assert WEATHER["function"]["description"].startswith(text)


@pytest.mark.parametrize(
    "wrong",
    [
        {"mask_functions": -0.1},
        {"shuffle_properties": 1.1},
        {"restyle_functions": 0.6, "mask_functions": 0.6},
        {"restyle_parameters": 0.6, "mask_parameters": 0.6},
        {"shorten_descriptions": 0.6, "drop_descriptions": 0.6},
    ],
)
def test_shares_outside_their_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Augmentation(**wrong)


# ---- Negatives


def test_a_negative_lacks_the_called_tools_and_those_like_them() -> None:
    same = tool("weather_forecast", "Tells the coming days", place=CITY)  # by its name
    told = tool("outlook", "Rain and sunshine of any place", where=CITY)  # by its description
    item = record([WEATHER, same, told, HOTEL], [CALL], answer="old", think="old")
    negative = without_called_tools(item)
    assert negative is not None
    assert names_of(negative) == ["book_hotel"]
    assert negative["calls"] == []
    assert negative["id"] == "r-removed"
    assert negative["messages"] == item["messages"]
    assert not {"answer", "think"} & negative.keys()
    assert len(item["tools"]) == 4


def test_tools_with_the_same_parameters_are_alike() -> None:
    fields = {"start": CITY, "end": CITY, "seats": CITY}
    item = record([tool("rent_car", "Wheels", **fields), tool("hire_van", "Transport", **fields), HOTEL], [])
    item["calls"] = [{"name": "rent_car", "arguments": {}}]
    negative = without_called_tools(item)
    assert negative is not None
    assert names_of(negative) == ["book_hotel"]


@pytest.mark.parametrize(
    "item",
    [
        record([WEATHER, HOTEL], []),
        record([WEATHER], [CALL]),
        record([WEATHER, tool("get_weather_now", "Rain of a place", city=CITY)], [CALL]),
        record([WEATHER, HOTEL], [CALL])
        | {"messages": [{"role": role, "content": "Well"} for role in ("user", "assistant", "user")]},
        record([WEATHER, HOTEL], [CALL])
        | {"messages": [{"role": "user", "content": "Well"}, {"role": "tool", "content": "done"}]},
    ],
    ids=["no call", "no other tool", "only one like it", "a dialogue", "a result"],
)
def test_no_negative_is_made_where_it_could_be_wrong(item: Record) -> None:
    assert without_called_tools(item) is None


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_negatives_are_records(index: int) -> None:
    item = example(index, 1).record
    negative = without_called_tools(item)
    if negative is not None:
        assert parse_record(json.dumps(negative).encode()) == negative
        assert not {call["name"] for call in item["calls"]} & set(names_of(negative))
        assert negative["tools"]
