"""The cursor admits every valid call of the tools and nothing else, and comes to an end under any logits."""

import json
import random
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator, FormatChecker

import schemas
from repo_package import load_repo_module
from tiny_tokenizer import tiny_tokenizer, tiny_vocabulary

grammar_module = load_repo_module("reply_grammar")
tokenization = load_repo_module("tokenization_utils")
scaffold_module = load_repo_module("schema_scaffold")
compile_scaffold, MAX_DEPTH = scaffold_module.compile_scaffold, scaffold_module.MAX_DEPTH
UnsupportedSchemaError = scaffold_module.UnsupportedSchemaError
ReplyGrammar, call_continuation = grammar_module.ReplyGrammar, grammar_module.call_continuation

quick = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
NAN, INFINITY = float("nan"), float("inf")
STRING = {"type": "string"}


def grammar_of(parameters: Any, limits: tuple[int, int, int] = (3, 10_000, 100_000), name: str = "act") -> Any:
    """The grammar of one tool; limits: calls, tokens of a value, tokens of a call."""
    return ReplyGrammar(tiny_vocabulary(), [compile_scaffold(schemas.tool(parameters, name))], *limits)


def parse(grammar: Any, tokens: Sequence[int]) -> list[dict[str, Any]]:
    """Calls of a reply behind the opening, split at the special tokens."""
    vocabulary, calls, start = grammar.vocabulary, [], 0
    tokens = [*grammar.opening(), *tokens]
    for index, token in enumerate(tokens):
        if token == vocabulary.call_start:
            start = index + 1
        if token == vocabulary.call_end:
            written = vocabulary.spell(tokens[start:index]).decode()
            assert written == "\n" + schemas.as_dumped(written) + "\n"
            calls.append(json.loads(written))
    return calls


def run(grammar: Any, logits_of: Callable[[Any], torch.Tensor], limit: int = 5000) -> tuple[list[int], Any]:
    """Decode a reply by constrained argmax, with the checks that hold at every step."""
    cursor, tokens = grammar.start(), []
    while not cursor.finished:
        forced, mask = cursor.forced(), cursor.mask()
        if forced is not None:
            assert mask.nonzero()[:, 0].tolist() == [forced]
        token = cursor.choose(logits_of(cursor))
        assert bool(mask[token])
        assert forced in (None, token)
        tokens.append(token)
        assert len(tokens) < limit, "the reply does not come to an end"
        cursor = cursor.advance(token)
        assert cursor is not None
    return tokens, cursor


def has_spliced_choices(schema: dict[str, Any]) -> bool:
    """Whether a closed set holds containers, or strings beside others: there the grammar cuts tokens in its own way."""
    values = [schema["const"]] if "const" in schema else schema.get("enum", [])
    strings = [isinstance(value, str) for value in values]
    if any(isinstance(value, (list, dict)) for value in values) or (any(strings) and not all(strings)):
        return True
    inner = [*schema.get("properties", {}).values(), *([schema["items"]] if "items" in schema else [])]
    return any(map(has_spliced_choices, inner))


@settings(quick, max_examples=150)
@given(schemas.fitted_parameters(), schemas.names.filter(str.strip))
def test_every_fitting_call_is_followed_to_its_end(fitted: tuple[dict[str, Any], dict[str, Any]], name: str) -> None:
    parameters, arguments = fitted
    grammar = grammar_of(parameters, name=name)
    vocabulary, start = grammar.vocabulary, len(grammar.opening())
    tokens = [vocabulary.call_start, *call_continuation(vocabulary, grammar.scaffolds[0], arguments, b"")]
    if not has_spliced_choices(parameters):
        assert tokens == tokenization.call_token_ids(tiny_tokenizer(), name, arguments)
    reply = [*tokens, *vocabulary.encode("\n"), *tokens, vocabulary.im_end][start:]
    assert grammar.start().follow(reply) == reply
    assert [json.dumps(call) for call in parse(grammar, reply)] == [
        json.dumps({"name": name, "arguments": arguments})
    ] * 2
    # No special token but those of the structure, whatever the texts say.
    special = set(tiny_tokenizer().added_tokens_decoder)
    assert [token for token in reply if token in special] == [
        vocabulary.call_end, vocabulary.call_start, vocabulary.call_end, vocabulary.im_end,
    ]  # fmt: skip


@settings(quick, max_examples=60)
@given(schemas.parameter_schemas, st.integers(0, 2**31))
def test_replies_of_random_logits_are_valid_and_end(parameters: dict[str, Any], seed: int) -> None:
    grammar, generator = grammar_of(parameters, (3, 8, 40)), torch.Generator().manual_seed(seed)
    size = grammar.vocabulary.size
    tokens, cursor = run(grammar, lambda _: torch.randn(size, generator=generator) * 4)
    calls = parse(grammar, tokens)
    assert 1 <= len(calls) == cursor.calls <= 3
    for call in calls:
        assert list(Draft202012Validator(parameters).iter_errors(call["arguments"])) == []


@settings(quick, max_examples=12)
@given(schemas.parameter_schemas, st.integers(0, 2**31))
def test_the_mask_is_what_can_be_advanced(parameters: dict[str, Any], seed: int) -> None:
    grammar, chance = grammar_of(parameters, (2, 4, 20)), random.Random(seed)
    cursor = grammar.start()
    for _ in range(25):
        mask = cursor.mask()
        able = [token for token in range(len(mask)) if cursor.advance(token) is not None]
        assert mask.nonzero()[:, 0].tolist() == able
        if cursor.finished:
            break
        assert able
        cursor = cursor.advance(chance.choice(able))


def test_hostile_logits_choose_an_allowed_token() -> None:
    grammar = grammar_of(
        {"type": "object", "properties": {"a": STRING, "b": {"enum": ["x", "y"]}}, "required": ["a", "b"]}, (1, 6, 40)
    )
    size = grammar.vocabulary.size
    for value in (NAN, INFINITY, -INFINITY):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            faulty = torch.full((size,), value, dtype=dtype)
            tokens, _ = run(grammar, lambda _, faulty=faulty: faulty)  # type: ignore[misc]
            assert len(parse(grammar, tokens)) == 1
    logits = torch.full((size,), NAN)
    logits[7] = -1e30  # the only number among them, but it may not stand there
    run(grammar, lambda _: logits)


_strings = {"type": "array", "items": STRING}
_tree = {"x": {"type": "array", "items": {"type": "integer"}}, "y": STRING}
ENDLESS = {
    "type": "object",
    "properties": {
        "grid": {"type": "array", "minItems": 1, "items": {"type": "array", "items": {"minItems": 1, **_strings}}},
        "n": {"type": "number"},
        "tree": {"type": "object", "properties": _tree, "required": ["y"]},
        "more": _strings,
    },
    "required": ["grid", "n", "tree"],
}


@pytest.mark.parametrize("loved", [b"\xf0", b"0", b"\\", b", ", b"["])
def test_calls_end_whatever_the_logits_want(loved: bytes) -> None:
    """Logits that love one token, hate every end, and never want the reply to stop."""
    grammar = grammar_of(ENDLESS, limits=(4, 9, 60))
    vocabulary = grammar.vocabulary
    logits = torch.tensor(
        [
            5.0 if spelled is None else 3.0 if loved in spelled else -5.0 if set(spelled) & set(b'"]}') else 0.0
            for spelled in vocabulary.bytes
        ]
    )
    logits[vocabulary.im_end] = logits[vocabulary.call_end] = -INFINITY
    tokens, cursor = run(grammar, lambda _: logits, limit=2000)
    calls = parse(grammar, tokens)
    assert len(calls) == 4
    for call in calls:
        assert list(Draft202012Validator(ENDLESS).iter_errors(call["arguments"])) == []
    # 60 tokens, and then what is required: three values with their keys and brackets.
    assert len(tokens) < 4 * (60 + 100)
    assert cursor.cut, "what was ended at a limit is reported"
    tree = "/properties/tree/properties"
    values = {"/properties/n", f"{tree}/x/items", f"{tree}/y", "/properties/more/items"}
    assert set(cursor.cut) <= {"", "/properties/grid/items/items/items", *values}


def test_a_value_ends_at_its_limit_and_is_reported() -> None:
    grammar = grammar_of({"type": "object", "properties": {"a": STRING}, "required": ["a"]}, (1, 5, 1000))
    letter = grammar.vocabulary.encode("x")[0]
    logits = torch.zeros(grammar.vocabulary.size)
    logits[letter] = 1.0
    tokens, cursor = run(grammar, lambda _: logits)
    assert parse(grammar, tokens)[0]["arguments"] == {"a": "xxxxx"}
    assert cursor.cut == ("/properties/a",)
    for written, cut in (("xx", ()), ("xxxxxx", None)):
        call = call_continuation(grammar.vocabulary, grammar.scaffolds[0], {"a": written}, b"")
        reply = [*call[len(grammar.opening()) - 1 :], grammar.vocabulary.im_end]
        followed = grammar.start().follow(reply)
        assert (followed == reply) == (cut == ())


def test_names_that_begin_alike_or_look_special_are_told_apart() -> None:
    names = [
        "get",
        "get_weather",
        "get_weather_now",
        "ge",
        "<tool_call>",
        "</tool_call>",
        'a"b',
        "a",
        "act\\",
        "🙂",
        "🙂🙂",
    ]
    scaffolds = [compile_scaffold(schemas.tool({"type": "object", "properties": {}}, name)) for name in names]
    grammar = ReplyGrammar(tiny_vocabulary(), scaffolds, 2, 10, 100)
    for scaffold in scaffolds:
        tokens = call_continuation(grammar.vocabulary, scaffold, {}, b"")[len(grammar.opening()) - 1 :]
        reply = [*tokens, grammar.vocabulary.im_end]
        assert grammar.start().follow(reply) == reply
        assert parse(grammar, reply) == [{"name": scaffold.tool, "arguments": {}}]
    assert grammar.start().tool is None
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(60):
        tokens, _ = run(grammar, lambda _: torch.randn(grammar.vocabulary.size, generator=generator))
        seen |= {call["name"] for call in parse(grammar, tokens)}
    assert seen <= set(names)
    assert len(seen) > 6


def test_the_empty_text_is_a_choice_like_any_other() -> None:
    parameters = {
        "type": "object",
        "properties": {"a": {"const": ""}, "b": {"enum": ["", "x"]}, "c": {"enum": ["", "x"]}},
        "required": ["a", "b", "c"],
    }
    grammar = grammar_of(parameters)
    for arguments in ({"a": "", "b": "", "c": "x"}, {"a": "", "b": "x", "c": ""}):
        tokens = call_continuation(grammar.vocabulary, grammar.scaffolds[0], arguments, b"")[
            len(grammar.opening()) - 1 :
        ]
        assert grammar.start().follow(tokens) == tokens
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        run(grammar, lambda _: torch.randn(grammar.vocabulary.size, generator=generator))


@settings(quick, max_examples=40)
@given(schemas.fitted_parameters(), st.sampled_from(["act", "é🙂"]))
def test_a_call_is_completed_from_any_cut(fitted: tuple[dict[str, Any], dict[str, Any]], name: str) -> None:
    """Also inside a character or an escape: the bytes are the rest of the text."""
    parameters, arguments = fitted
    vocabulary, scaffold = tiny_vocabulary(), compile_scaffold(schemas.tool(parameters, name))
    text = "\n" + json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False) + "\n"
    whole = text.encode()
    for end in range(len(whole) + 1):
        tokens = call_continuation(vocabulary, scaffold, arguments, whole[:end])
        assert tokens[-1] == vocabulary.call_end
        assert vocabulary.spell(tokens) == whole[end:]
    assert call_continuation(vocabulary, scaffold, arguments, whole + b"x") == []
    assert call_continuation(vocabulary, scaffold, arguments, b"\n{ ") == []


@settings(quick, max_examples=30)
@given(st.text(min_size=1, max_size=6), st.text(max_size=4))
def test_a_completion_is_followed_inside_a_value(text: str, other: str) -> None:
    """Wherever the reference stands in a string, byte tokens included, the grammar takes the completion."""
    if any(0xD800 <= ord(character) < 0xE000 or character == "\0" for character in text + other):
        return
    grammar = grammar_of({"type": "object", "properties": {"a": STRING, "b": STRING}, "required": ["a", "b"]})
    vocabulary = grammar.vocabulary
    opening = b'\n{"name": "act", "arguments": {"a": "'
    escaped = json.dumps(text, ensure_ascii=False)[1:-1].encode()
    cursor = grammar.start()
    for token in call_continuation(vocabulary, grammar.scaffolds[0], {"a": text, "b": other}, b"")[
        len(grammar.opening()) - 1 :
    ]:
        cursor = cursor.advance(token)
        if any(type(way).__name__ == "_Value" for way in cursor.ways):
            break
    for end in range(len(escaped)):
        completion = call_continuation(
            vocabulary, grammar.scaffolds[0], {"a": text, "b": other}, opening + escaped[:end]
        )
        assert cursor.follow(completion) == completion
        cursor = cursor.advance(
            vocabulary.encode_bytes(escaped[end : end + 1])[0] if escaped[end] & 0xC0 == 0x80 else _byte(escaped[end])
        )


def _byte(code: int) -> int:
    return tiny_vocabulary().bytes.index(bytes([code]))


# ------------------------------------------------------------------------------------------------- lengths and patterns


def reply_of(grammar: Any, arguments: Any, like: Any = None) -> list[int]:
    """Tokens of a reply with one call, as the grammar spells them; `like`: parameters that the arguments fit."""
    scaffold = grammar.scaffolds[0] if like is None else compile_scaffold(schemas.tool(like))
    call = call_continuation(grammar.vocabulary, scaffold, arguments, b"")
    return [*call[len(grammar.opening()) - 1 :], grammar.vocabulary.im_end]


def follows(grammar: Any, arguments: Any, like: Any = None) -> bool:
    reply = reply_of(grammar, arguments, like)
    return grammar.start().follow(reply) == reply


def noisy(logits: torch.Tensor, seed: int, noise: float = 1.0) -> Callable[[Any], torch.Tensor]:
    """Logits that differ at every step."""
    generator = torch.Generator().manual_seed(seed)
    return lambda _: logits + noise * torch.randn(logits.shape, generator=generator)


def at_value(grammar: Any) -> Any:
    """The cursor where the first value begins, along what is forced."""
    cursor = grammar.start()
    while not any(type(way).__name__ == "_Value" for way in cursor.ways):
        cursor = cursor.advance(cursor.forced())
    return cursor


def ends_behind(cursor: Any, value: str, after: str) -> bool:
    """Whether a value may be spelled byte by byte, and the call then ends with the text behind it."""
    vocabulary = cursor.grammar.vocabulary
    rest = [*map(_byte, value.encode()), *vocabulary.encode(after), vocabulary.call_end]
    return cursor.follow(rest) == rest


@settings(quick, max_examples=60)
@given(st.text('ab"\\\n\x01é日🙂', max_size=5), st.sampled_from([(0, 3), (2, 3), (3, 3), (1, 4)]))
def test_lengths_count_characters_however_they_are_spelled(text: str, bounds: tuple[int, int]) -> None:
    low, high = bounds
    grammar = grammar_of(schemas.one({"type": "string", "minLength": low, "maxLength": high}))
    fits = low <= len(text) <= high
    assert follows(grammar, {"a": text}, like=schemas.one(STRING)) == fits
    escaped = json.dumps(text, ensure_ascii=False)[1:-1]
    assert ends_behind(at_value(grammar), escaped, '"}}\n') == fits


@pytest.mark.parametrize(("low", "high"), [(0, 2), (3, 3), (0, 40), (33, 40)])
def test_lengths_hold_whatever_the_logits_want(low: int, high: int) -> None:
    parameters = schemas.one({"type": "string", "minLength": low, "maxLength": high})
    vocabulary, lengths = tiny_vocabulary(), set()
    for seed in range(6):
        # Tokens of many characters and halves of characters are what is wanted most.
        wanted = torch.tensor([len(spelled or b"") + (spelled == b"\xf0") * 9.0 for spelled in vocabulary.bytes])
        grammar = grammar_of(parameters, (1, 50 if seed % 2 else 3, 100))
        tokens, _ = run(grammar, noisy(wanted, seed, 3.0))
        ((arguments,)) = [call["arguments"] for call in parse(grammar, tokens)]
        assert low <= len(arguments["a"]) <= high
        lengths.add(len(arguments["a"]))
    assert high in lengths


@settings(quick, max_examples=60)
@given(
    st.sampled_from(["^[ab]{2,3}$", "b", "^(?!ab)\\w*$", '"', "\\\\", "^é+$|🙂", "\\s$"]),
    st.text('ab"\\\né🙂 ', max_size=4),
)
def test_patterns_hold_for_the_value_and_not_for_its_json(pattern: str, text: str) -> None:
    parameters = schemas.one({"type": "string", "pattern": pattern})
    fits = bool(re.search(pattern.replace("$", "\\Z"), text, re.ASCII))
    grammar = grammar_of(parameters)
    assert follows(grammar, {"a": text}, like=schemas.one(STRING)) == fits
    assert ends_behind(at_value(grammar), json.dumps(text, ensure_ascii=False)[1:-1], '"}}\n') == fits


OPEN_VALUES: list[dict[str, Any]] = [
    {"type": "string", "pattern": '^["\\\\]+$'},
    {"type": "string", "pattern": "🙂", "minLength": 4},
    {"type": "string", "format": "date-time"},
    {"type": "string", "format": "ipv6"},
    {"type": "integer", "minimum": -12, "maximum": 305, "multipleOf": 7},
    {"type": "integer", "minimum": 10**20},
    {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1e-05},
    {"type": "number", "multipleOf": 0.25, "minimum": -1},
    {"type": ["number", "string"], "maxLength": 2},
    {"type": "string", "not": {"enum": ["", "a"]}},
]


@pytest.mark.parametrize("schema", OPEN_VALUES, ids=lambda schema: json.dumps(schema)[:60])
@pytest.mark.parametrize("value_tokens", [1, 6, 60])
def test_values_fit_their_schema_at_any_limit(schema: dict[str, Any], value_tokens: int) -> None:
    parameters = schemas.one(schema)
    validator = Draft202012Validator(parameters, format_checker=FormatChecker())
    grammar = grammar_of(parameters, (1, value_tokens, 200))
    for seed in range(4):
        tokens, _ = run(grammar, noisy(torch.zeros(grammar.vocabulary.size), seed))
        (call,) = parse(grammar, tokens)
        assert [error.message for error in validator.iter_errors(call["arguments"])] == []


# ------------------------------------------------------------------------------------------------- no value twice


def wanting(*loved: bytes, hated: bytes = b"") -> torch.Tensor:
    """Logits that love tokens with some texts in them, and hate those with some bytes."""
    scores = []
    for spelled in tiny_vocabulary().bytes:
        love = any(text in (spelled or b"") for text in loved)
        scores.append(6.0 * love - 6.0 * bool(set(spelled or b"") & set(hated)))
    return torch.tensor(scores)


WANTS = {
    "chance": wanting(),
    "more items": wanting(b", ", b'", "', b'": ', hated=b"]}"),
    "the same again": wanting(b"1", b"a", hated=b"]}"),
    "short values": wanting(b'"', hated=b"abcdefghijklmnopqrstuvwxyz]}"),
}


def unique(items: Any, **words: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, "uniqueItems": True, **words}


def integers(low: int, high: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": low, "maximum": high}


def keyed(number: Any) -> dict[str, Any]:
    """Objects whose last required string tells them apart."""
    properties = {"n": number, "id": {"type": "string", "pattern": "^a*$"}}
    return {"type": "object", "properties": properties, "required": ["n", "id"]}


ONE = integers(1, 1)
DISTINCT: dict[str, dict[str, Any]] = {
    "strings": unique(STRING, minItems=3),
    "all of a small range": unique(integers(1, 3), minItems=3),
    "all of a range of two lengths": unique(integers(8, 12), minItems=5),
    "a small range without a minimum": unique(integers(1, 3)),
    "all of an enum": unique({"enum": ["a", "ab", "abc", "b"]}, minItems=4),
    "an enum without a minimum": unique({"enum": ["a", "ab", 1, None]}),
    "one and one again": unique({"enum": [1, 1.0, 2]}),
    "numbers": unique({"type": "number"}, minItems=3),
    "few texts": unique({"type": "string", "pattern": "^a?b?$"}, minItems=4),
    "a short and a long text": unique({"type": "string", "pattern": "^(a|bbbbb)$"}, minItems=2),
    "texts of one length": unique({"type": "string", "minLength": 36, "maxLength": 36}, minItems=3),
    "texts of one letter": unique({"type": "string", "pattern": "^a*$", "maxLength": 40}, minItems=3),
    "all texts of one letter": unique({"type": "string", "pattern": "^a*$", "maxLength": 34}, minItems=35),
    "a string or null": unique({"type": ["string", "null"]}, minItems=3),
    "a string or one number": unique({"anyOf": [{"enum": [1]}, STRING]}, minItems=3),
    "ranges that overlap": unique({"anyOf": [integers(1, 3), integers(2, 4)]}),
    "ranges that overlap, all of them": unique({"anyOf": [integers(1, 3), integers(2, 4)]}, minItems=4),
    "one as a constant and as an integer": unique({"anyOf": [{"enum": [1.0]}, integers(0, 12)]}),
    "keyed objects": unique(keyed(integers(1, 2)), minItems=3),
    "objects with a number that has two texts": unique(keyed({"anyOf": [{"enum": [1.0]}, ONE]}), minItems=2),
    "two free names": {"type": "object", "additionalProperties": ONE, "minProperties": 2},
    "names of a pattern": {"type": "object", "patternProperties": {"^[ab]$": ONE}, "additionalProperties": False},
    "names of a list": {"type": "object", "propertyNames": {"enum": ["a", "ab", "b"]}, "additionalProperties": {}},
    "names beside declared ones": {
        "type": "object",
        "properties": {"a": ONE, "aa": ONE},
        "patternProperties": {"^a{1,3}$": ONE},
        "additionalProperties": False,
    },
    "names of one length": {
        "type": "object",
        "propertyNames": {"minLength": 36, "maxLength": 36},
        "additionalProperties": ONE,
        "minProperties": 2,
    },
}  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize("want", WANTS)
@pytest.mark.parametrize("name", DISTINCT)
def test_distinct_values_never_repeat_and_never_run_out(name: str, want: str) -> None:
    parameters = schemas.one(DISTINCT[name])
    validator = Draft202012Validator(parameters)
    try:
        scaffold = compile_scaffold(schemas.tool(parameters))
    except UnsupportedSchemaError:
        if name not in REFUSABLE:
            raise
        return
    # The last one has to end at once.
    for seed, limits in enumerate([(1, 40, 200), (1, 5, 60), (1, 40, 1)]):
        grammar = ReplyGrammar(tiny_vocabulary(), [scaffold], *limits)
        tokens, _ = run(grammar, noisy(WANTS[want], seed))
        (call,) = parse(grammar, tokens)
        assert [error.message for error in validator.iter_errors(call["arguments"])] == []


# Where it is an honest answer that the schema cannot be guaranteed.
REFUSABLE = {
    "a string or null",
    "all texts of one letter",
    "a string or one number",
    "ranges that overlap",
    "ranges that overlap, all of them",
    "one as a constant and as an integer",
    "objects with a number that has two texts",
    "names of one length",
}


def test_a_text_that_only_begins_like_another_is_no_repetition() -> None:
    grammar = grammar_of(schemas.one(unique(STRING)))
    for items in (["a", "ab", "", "abc"], ["ab", "a"], ['"', '""', "\\"], ["日", "日本", "日本語"]):
        assert follows(grammar, {"a": items})
        again = reply_of(grammar, {"a": [*items, items[0]]}, like=schemas.one({"type": "array", "items": STRING}))
        assert len(grammar.start().follow(again)) < len(again)


def test_what_was_written_leaves_nothing_behind_that_grows() -> None:
    """The literal texts that are kept for a tool do not depend on the values of its calls."""
    kept = []
    for count in (10, 40):
        scaffold = compile_scaffold(schemas.tool(schemas.one(unique(STRING), title=str(count))))
        grammar = ReplyGrammar(tiny_vocabulary(), [scaffold], 1, 100, 10_000)
        assert follows(grammar, {"a": [f"v{i}" for i in range(count)]})
        kept.append(sum(map(len, scaffold.memo.values())))
    assert kept[1] < 2 * kept[0]


# ------------------------------------------------------------------------------------------------- several ways at once

OVERLAPPING: dict[str, Any] = {"anyOf": [{"type": "integer"}, {"type": "number"}]}
EITHER = {
    "type": "object",
    "properties": {"p": STRING, "q": STRING},
    "anyOf": [{"required": ["p"]}, {"required": ["q"]}, {"maxProperties": 2}],
}


@pytest.mark.parametrize(
    ("parameters", "arguments"),
    [
        (schemas.one(OVERLAPPING), {"a": 1}),
        (schemas.one({"type": "array", "items": OVERLAPPING}), {"a": [1] * 12}),
        (schemas.one({"type": "array", "items": EITHER}), {"a": [{"p": "s", "q": "t"}] * 6}),
        (EITHER, {"p": "s", "q": "t"}),
        (schemas.one({"anyOf": [EITHER, OVERLAPPING, {"type": "object"}]}), {"a": {"p": "s", "q": "t"}}),
        (
            {"type": "object", "properties": {f"p{i}": OVERLAPPING for i in range(12)}},
            {f"p{i}": i for i in range(12)},
        ),
    ],
)
def test_a_text_that_fits_several_alternatives_is_one_call(parameters: Any, arguments: Any) -> None:
    grammar = grammar_of(parameters, (3, 100, 1000))
    reply = reply_of(grammar, arguments)
    cursor, most = grammar.start(), 0
    for token in reply[:-1]:
        cursor = cursor.advance(token)
        assert cursor is not None
        most = max(most, len(cursor.ways))
    assert cursor.calls == 1
    assert most <= 16, "ways that lead to the same are one"
    # Three calls may be made, and each of them counts once.
    following = [*grammar.vocabulary.encode("\n"), *grammar.opening(), *reply[:-1]]
    for calls in (2, 3):
        assert cursor.follow(following) == following
        for token in following:
            cursor = cursor.advance(token)
        assert cursor.calls == calls
    assert cursor.forced() == grammar.vocabulary.im_end


def test_a_value_that_is_cut_is_reported_once() -> None:
    grammar = grammar_of(schemas.one(OVERLAPPING), (1, 5, 1000))
    tokens, cursor = run(grammar, lambda _: wanting(b"1", hated=b"}"))
    assert len(str(parse(grammar, tokens)[0]["arguments"]["a"])) >= 5
    assert cursor.cut == ("/properties/a",)


# ------------------------------------------------------------------------------------------------- calls end

_ref = {"$ref": "#/$defs/x"}
ENDLESS_VALUES: dict[str, Any] = {
    "anything": {},
    "a list": {"type": "object", "properties": {"v": STRING, "next": _ref}, "required": ["v"]},
    "a nullable list": schemas.one({"anyOf": [_ref, {"type": "null"}]}),
    "a tree": {"type": "object", "properties": {"v": STRING, "kids": {"type": "array", "items": _ref}}},
    "arrays": {"type": "array", "items": _ref},
    "pairs": {"anyOf": [STRING, {"type": "array", "items": _ref, "minItems": 2, "maxItems": 2}]},
    "free names": {"type": "object", "additionalProperties": _ref},
    "a named part": {"type": "object", "additionalProperties": _ref, "minProperties": 1, "properties": {"v": STRING}},
    "matches": {"anyOf": [{"type": "integer"}, {"type": "array", "contains": _ref}]},
    "unique strings": {"type": "array", "items": STRING, "uniqueItems": True, "minItems": 2},
}  # fmt: skip
ENDLESS_VALUES["a named part"] = {"anyOf": [STRING, ENDLESS_VALUES["a named part"]]}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("loved", [b"[", b"{", b", ", b": ", b'": ', b"\xf0", b"0"])
@pytest.mark.parametrize("name", ENDLESS_VALUES)
def test_calls_of_recursive_schemas_end(name: str, loved: bytes) -> None:
    parameters = schemas.one(_ref, **{"$defs": {"x": ENDLESS_VALUES[name]}})
    grammar = grammar_of(parameters, (1, 6, 150))
    logits = wanting(loved, hated=b"]}")
    tokens, cursor = run(grammar, lambda _: logits, limit=1000)
    (call,) = parse(grammar, tokens)
    assert list(Draft202012Validator(parameters).iter_errors(call["arguments"])) == []
    assert cursor.finished


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["anything", "a list", "a tree", "arrays", "free names"])
def test_long_calls_of_recursive_schemas_stay_shallow(name: str) -> None:
    """Python cannot read JSON that is nested a thousand levels deep."""
    parameters = schemas.one(_ref, **{"$defs": {"x": ENDLESS_VALUES[name]}})
    grammar = grammar_of(parameters, (1, 2, 1200))
    logits = wanting(b"[", b"{", b": ", b"next", b"kids", hated=b"]}")
    tokens, _ = run(grammar, noisy(logits, 0))
    (call,) = parse(grammar, tokens)
    deepest, pending = 0, [(call["arguments"], 0)]
    while pending:
        value, depth = pending.pop()
        deepest = max(deepest, depth)
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        pending += [(item, depth + 1) for item in inner]
    assert deepest <= MAX_DEPTH + 4


# ------------------------------------------------------------------------------------------------- refused late


def test_a_value_that_needs_too_large_a_table_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_repo_module("slot_grammar"), "MAX_LIFT_CELLS", 10)
    schema = {"type": "string", "pattern": "^only here [a-z]+$"}
    with pytest.raises(UnsupportedSchemaError) as caught:
        at_value(grammar_of(schemas.one({"type": "array", "items": schema, "minItems": 1})))
    error = caught.value
    assert (error.tool, error.pointer, error.keyword) == ("act", "/properties/a/items", "pattern")


HARD = {"type": "string", "pattern": "(a|b)*a(a|b){20}"}  # two million states
# More alternatives than are worked out here.
MANY = {
    "anyOf": [
        {"type": "object", "properties": {f"k{i}": STRING}, "required": [f"k{i}"], "additionalProperties": False}
        for i in range(70)
    ]
}


def guided_grammar(parameters: Any, limits: tuple[int, int, int] = (1, 12, 60)) -> Any:
    pytest.importorskip("llguidance")
    return ReplyGrammar(tiny_vocabulary(), [compile_scaffold(schemas.tool(parameters), "ar")], *limits)


def test_guided_values_are_followed_where_they_fit() -> None:
    items = guided_grammar(schemas.one({"type": "array", "items": HARD}), (1, 100, 1000))
    for values in ([], ["a" * 21], ["b" + "ab" * 11, "x" + "a" * 21]):
        assert follows(items, {"a": values})
    grammar = guided_grammar(schemas.one(HARD), (1, 100, 1000))
    for value, fits in (("a" * 21, True), ("x" + "ab" * 11, True), ("a" * 20, False), ("b" * 21, False), ("", False)):
        assert ends_behind(at_value(grammar), f'"{value}"', "}}\n") == fits
    grammar = guided_grammar(schemas.one(MANY), (1, 100, 1000))
    for text, fits in (('{"k69": "say \\"é\\""}', True), ('{"k69": 1}', False), ('{"k7": "", "k8": ""}', False)):
        # What llguidance knows to come has to be spelled as the tokenizer does.
        tokens = [*grammar.vocabulary.encode(text), *grammar.vocabulary.encode("}}\n"), grammar.vocabulary.call_end]
        assert (at_value(grammar).follow(tokens) == tokens) == fits


@pytest.mark.parametrize("schema", [HARD, MANY, {"type": "string", "minLength": 600}], ids=["hard", "many", "long"])
@pytest.mark.parametrize(
    "want", [wanting(), wanting(b"e", hated=b'"'), wanting(b"0", hated=b'"}'), wanting(b'"', hated=b"}")]
)
@pytest.mark.timeout(60)
def test_guided_values_are_valid_and_end(schema: dict[str, Any], want: torch.Tensor) -> None:
    parameters = schemas.one(schema)
    grammar = guided_grammar(parameters)
    try:
        tokens, _ = run(grammar, noisy(want, 0), limit=2000)
    except UnsupportedSchemaError:
        # Nobody knows the shortest way to the end of a guided value, and this model never came upon any.
        assert schema is not MANY
        return
    (call,) = parse(grammar, tokens)
    assert list(Draft202012Validator(parameters).iter_errors(call["arguments"])) == []


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"x": STRING}, "unevaluatedProperties": False},
        {"type": "string", "format": "iri"},
        {"$ref": "https://example.com/elsewhere"},
        {"not": {"type": "string", "format": "date"}},
    ],
)
def test_what_nobody_can_guide_is_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedSchemaError) as caught:
        guided_grammar(schemas.one(schema))
    assert (caught.value.tool, caught.value.pointer) == ("act", "/properties/a")
    assert "llguidance" in str(caught.value)


def test_guided_values_ask_for_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    scaffold = compile_scaffold(schemas.tool(schemas.one(HARD)), "ar")
    with pytest.raises(ImportError, match="pip install llguidance"):
        ReplyGrammar(tiny_vocabulary(), [scaffold], 1, 10, 100)
