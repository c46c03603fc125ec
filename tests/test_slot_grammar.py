"""Automata agree with Python's JSON, commits are the exact best strings, the cursor admits calls and nothing else."""

import itertools
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import schemas
from repo_package import load_repo_module
from tiny_tokenizer import tiny_tokenizer, tiny_vocabulary

scaffold_module = load_repo_module("schema_scaffold")
grammar_module = load_repo_module("slot_grammar")
tokenization = load_repo_module("tokenization_utils")
compile_scaffold, draft_layout = scaffold_module.compile_scaffold, scaffold_module.draft_layout
CanvasSlot, ReplyGrammar, Vocabulary = grammar_module.CanvasSlot, grammar_module.ReplyGrammar, grammar_module.Vocabulary
build_canvas, call_continuation = grammar_module.build_canvas, grammar_module.call_continuation
commit_slot = grammar_module.commit_slot

quick = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
NAN, INFINITY = float("nan"), float("inf")
STRING = {"type": "string"}

AUTOMATA = {
    "integer": grammar_module.integer_automaton,
    "number": grammar_module.number_automaton,
    "escaped": grammar_module.escaped_string_automaton,
    "raw": grammar_module.raw_string_automaton,
}

# ------------------------------------------------------------------------------------------------- bytes


def accepted_walk(automaton: Any, chance: random.Random, length: int) -> bytes:
    """Bytes along random edges; every state reaches acceptance within a few of them."""
    text, state = bytearray(), 0
    while len(text) < length or not automaton.accepting[state]:
        text.append(chance.choice(np.flatnonzero(automaton.transitions[state] >= 0).tolist() or [0]))
        state = int(automaton.transitions[state, text[-1]])
        if state < 0:  # a number of full length has no edge
            return bytes(text[:-1])
    return bytes(text)


def is_canonical(text: str, kinds: tuple[type, ...]) -> bool:
    """Whether a text is the one that `json.dumps` writes for a number of these kinds."""
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return type(value) in kinds and json.dumps(value) == text


@settings(quick, max_examples=500)
@given(st.text("-+.0123456789eE", max_size=20))
@example("-0")
@example("-0.0")
@example("1.50")
@example("01")
@example("0.00001")
@example("1e5")
@example("123456789012345.0")
@example("1234567890123456.0")
@example("1.")
def test_numbers_are_accepted_only_as_json_writes_them(text: str) -> None:
    if AUTOMATA["integer"]().accepts(text.encode()):
        assert is_canonical(text, (int,))
    if AUTOMATA["number"]().accepts(text.encode()):
        assert is_canonical(text, (int, float))


@pytest.mark.parametrize(("kind", "kinds"), [("integer", (int,)), ("number", (int, float))])
def test_every_accepted_number_is_canonical(kind: str, kinds: tuple[type, ...]) -> None:
    chance, automaton = random.Random(0), AUTOMATA[kind]()
    texts = {accepted_walk(automaton, chance, chance.randint(1, 24)).decode() for _ in range(5000)}
    accepted = [text for text in texts if automaton.accepts(text.encode())]
    assert len(accepted) > 2000
    assert [text for text in accepted if not is_canonical(text, kinds)] == []


@settings(quick, max_examples=300)
@given(st.one_of(st.integers(), st.integers(1, 4000).map(lambda digits: 10**digits - 1)), schemas.short_decimals())
@example(0, 0.0)
@example(-1, 1e-4)
@example(10**4000, 999999999999999.0)
def test_integers_of_any_length_and_short_decimals_are_accepted(integer: int, decimal: float) -> None:
    for kind in ("integer", "number"):
        assert AUTOMATA[kind]().accepts(str(integer).encode())
    assert AUTOMATA["number"]().accepts(json.dumps(decimal).encode())
    assert not AUTOMATA["integer"]().accepts(json.dumps(decimal).encode())


@settings(quick, max_examples=500)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
@example('"\\/\b\f\n\r\t\x1f\x7f\u2028\ufdd0🙂')
def test_strings_are_accepted_as_json_writes_them(text: str) -> None:
    assert AUTOMATA["escaped"]().accepts(json.dumps(text, ensure_ascii=False)[1:-1].encode())
    assert AUTOMATA["raw"]().accepts(text.encode())


def is_escaped_text(text: bytes) -> bool:
    try:
        decoded = text.decode()
        value = json.loads(f'"{decoded}"')
        return (
            "\0" not in value and json.dumps(value, ensure_ascii=False)[1:-1] == decoded and value.encode() is not None
        )
    except ValueError:
        return False


@settings(quick, max_examples=1000)
@given(st.one_of(st.binary(max_size=6), st.text('\\"u01efnab/x', max_size=10).map(str.encode)))
@example(b"\\u0000")
@example(b"\\u000a")
@example(b"\\u001F")
@example(b"\\/")
@example(b"\xed\xa0\x80")
@example(b"\xc0\x80")
def test_escaped_strings_are_exactly_what_json_writes(text: bytes) -> None:
    assert AUTOMATA["escaped"]().accepts(text) == is_escaped_text(text)


def test_every_accepted_string_is_exactly_what_json_writes() -> None:
    chance, automaton = random.Random(0), AUTOMATA["escaped"]()
    for _ in range(2000):
        assert is_escaped_text(accepted_walk(automaton, chance, chance.randint(0, 12)))


def test_raw_strings_are_exactly_utf8_without_nul() -> None:
    """Every edge of the ranges in Unicode's table of well-formed bytes, in sequences of up to four."""
    codes = (
        0x00,
        0x01,
        0x7F,
        0x80,
        0x8F,
        0x90,
        0x9F,
        0xA0,
        0xBF,
        0xC0,
        0xC1,
        0xC2,
        0xDF,
        0xE0,
        0xED,
        0xEF,
        0xF0,
        0xF4,
        0xF5,
    )
    automaton, wrong = AUTOMATA["raw"](), []
    for length in range(5):
        for sequence in itertools.product(codes, repeat=length):
            text = bytes(sequence)
            try:
                expected = "\0" not in text.decode()
            except UnicodeDecodeError:
                expected = False
            if automaton.accepts(text) != expected:
                wrong.append(text)
    assert wrong == []


# ------------------------------------------------------------------------------------------------- vocabulary


def test_tokens_spell_the_text_that_they_encode() -> None:
    vocabulary, tokenizer = tiny_vocabulary(), tiny_tokenizer()
    for text in (*schemas.HOSTILE_TEXTS, "New York", "日本🙂x"):
        assert vocabulary.spell(vocabulary.encode(text)) == text.encode()
        for start in range(len(text.encode())):
            assert vocabulary.spell(vocabulary.encode_bytes(text.encode()[start:])) == text.encode()[start:]
    for token in tokenizer.added_tokens_decoder:
        assert vocabulary.bytes[token] is None
    assert vocabulary.bytes[len(tokenizer) :] == [None] * 3


def test_names_of_special_tokens_are_plain_text() -> None:
    vocabulary = tiny_vocabulary()
    special = set(tiny_tokenizer().added_tokens_decoder)
    for name in (*tokenization.SPECIAL_TOKENS, *tokenization.MARKUP_TOKENS):
        assert not special & set(vocabulary.encode(f"a {name} b"))
        assert not special & set(vocabulary.encode_bytes(f"a {name} b".encode()))


def test_a_tokenizer_that_does_not_spell_bytes_is_refused() -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    with pytest.raises(ValueError, match="not byte-level"):
        Vocabulary(PreTrainedTokenizerFast(tokenizer_object=words), 10)
    words.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match="not byte-level"):
        Vocabulary(PreTrainedTokenizerFast(tokenizer_object=words), 10)
    letters = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    letters.pre_tokenizer, letters.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    with pytest.raises(ValueError, match="no token for byte 0x00"):
        Vocabulary(PreTrainedTokenizerFast(tokenizer_object=letters), 10)


def test_a_model_smaller_than_the_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match="do not belong together"):
        Vocabulary(tiny_tokenizer(), len(tiny_tokenizer()) - 1)


@pytest.mark.parametrize("kind", AUTOMATA)
def test_lifted_automata_run_tokens_as_the_bytes_run(kind: str) -> None:
    vocabulary, automaton = tiny_vocabulary(), AUTOMATA[kind]()
    lifted = vocabulary.lift(automaton)
    for state in range(len(automaton.accepting)):
        for token, spelled in enumerate(vocabulary.bytes):
            expected = state if spelled else -1
            for code in spelled or b"":
                expected = int(automaton.transitions[expected, code]) if expected >= 0 else -1
            if expected >= 0 and int(lifted.distance[expected]) < 0:
                expected = -1  # from there nothing is accepted any more (a zero that no digit can follow)
            assert int(lifted.next_state[state, token]) == expected
    assert bool(((lifted.distance == 0) == lifted.accepting).all())


# ------------------------------------------------------------------------------------------------- joint commits

# Few tokens, so that all strings of a slot can be tried; None stands for a special token.
SMALL: dict[str, list[bytes | None]] = {
    "integer": [b"0", b"1", b"-", b"10", None, b"-1", b"."],
    "number": [b"0", b"5", b"-", b".", b".0", b"0.", None],
    "raw": [b"a", "é".encode(), b"\xc3", b"\xa9", b"\x00", None, b"\xf0"],
}


def small_slot(kind: str, length: int) -> tuple[Any, list[bytes | None]]:
    tokens = SMALL[kind]
    lifted = grammar_module._lift(AUTOMATA[kind](), tokens, torch.device("cpu"))
    return CanvasSlot(None, 0, length, lifted, None), tokens


def strings_of(kind: str, tokens: Sequence[bytes | None], length: int) -> Iterator[tuple[int, ...]]:
    """Every string of a slot, by trying them all: tokens that the byte automaton accepts, then NULL."""
    null = len(tokens) + 1
    for used in range(length + 1):
        for content in itertools.product(range(len(tokens)), repeat=used):
            spelled = [tokens[token] for token in content]
            if None not in spelled and AUTOMATA[kind]().accepts(b"".join(part or b"" for part in spelled)):
                yield (*content, *[null] * (length - used))


def best_of(strings: Sequence[Sequence[int]], scores: torch.Tensor, fixed: Sequence[int]) -> float | None:
    """The largest score of a string that has the fixed positions, which themselves count nothing."""
    fitting = [
        string for string in strings if all(want in (-1, token) for token, want in zip(string, fixed, strict=True))
    ]
    totals = [
        sum(float(scores[place, token]) for place, token in enumerate(string) if fixed[place] < 0) for string in fitting
    ]
    return max(totals, default=None)


def random_scores(generator: torch.Generator, length: int, width: int, hostile: bool) -> torch.Tensor:
    scores = torch.randn(length, width, generator=generator) * 3
    if hostile:
        scores[torch.rand(length, width, generator=generator) < 0.3] = NAN
        scores[torch.rand(length, width, generator=generator) < 0.2] = -INFINITY
        scores[torch.rand(length, width, generator=generator) < 0.1] = INFINITY
    return scores


@pytest.mark.parametrize("hostile", [False, True])
@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("length", [1, 2, 4])
def test_open_commits_equal_brute_force(kind: str, length: int, hostile: bool) -> None:
    slot, tokens = small_slot(kind, length)
    strings, null = list(strings_of(kind, tokens, length)), len(tokens) + 1
    generator, chance, contradictions = torch.Generator().manual_seed(length), random.Random(length), 0
    for _ in range(40):
        log_probs = random_scores(generator, length, null + 1, hostile)
        anything = [chance.choice([-1, -1, chance.randrange(len(tokens)), null]) for _ in range(length)]
        known = chance.choice(strings)
        sensible = [chance.choice([-1, token]) for token in known]
        for fixed in ([-1] * length, sensible, anything):
            commit = commit_slot(slot, log_probs, torch.tensor(fixed), null)
            # What is infinite or not a number counts as an extreme, finite score.
            finite = log_probs.nan_to_num(nan=-1e4, posinf=1e4, neginf=-1e4).clamp(-1e4, 1e4)
            best = best_of(strings, finite, fixed)
            if best is None:
                assert commit is None
                contradictions += 1
                continue
            assert commit is not None
            found = tuple(commit.tokens.tolist())
            assert found in strings
            assert all(want in (-1, token) for token, want in zip(found, fixed, strict=True))
            total = sum(float(finite[place, token]) for place, token in enumerate(found) if fixed[place] < 0)
            assert math.isclose(total, best, rel_tol=1e-4, abs_tol=1e-3)
            assert math.isclose(commit.score, best, rel_tol=1e-4, abs_tol=1e-3)
    assert contradictions > 0 or length == 1


@pytest.mark.parametrize("hostile", [False, True])
def test_choice_commits_equal_brute_force(hostile: bool) -> None:
    vocabulary, null = tiny_vocabulary(), tiny_vocabulary().size + 1
    choices = ("celsius", "cel", "kelvin", "", "c", 'a"b', "<tool_call>")
    table = grammar_module._choice_table(vocabulary, choices, null)
    slot = CanvasSlot(None, 0, table.shape[1], None, table)
    strings, chance = [tuple(row) for row in table.tolist()], random.Random(0)
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        log_probs = random_scores(generator, slot.length, null + 1, hostile)
        finite = log_probs.nan_to_num(nan=-1e4, posinf=1e4, neginf=-1e4).clamp(-1e4, 1e4)
        fixed = [chance.choice([-1, -1, token]) for token in chance.choice(strings)]
        commit = commit_slot(slot, log_probs, torch.tensor(fixed), null)
        assert commit is not None
        found = tuple(commit.tokens.tolist())
        assert found in strings
        assert all(want in (-1, token) for token, want in zip(found, fixed, strict=True))
        # Positions that are fixed are the same in all that fit, so counting them changes no comparison.
        fitting = [row for row in strings if all(want in (-1, token) for token, want in zip(row, fixed, strict=True))]
        totals = {row: sum(float(finite[place, token]) for place, token in enumerate(row)) for row in fitting}
        assert math.isclose(totals[found], max(totals.values()), rel_tol=1e-4, abs_tol=1e-3)
        assert 0 <= float(commit.confidence[0]) <= 1
    impossible = torch.full((slot.length,), null + 5)
    assert commit_slot(slot, torch.zeros(slot.length, null + 1), impossible, null) is None


def test_commits_out_of_order_over_four_steps_are_always_valid() -> None:
    """Positions are committed in any order, under scores that change at every step; the slot stays a value."""
    vocabulary, null, chance = tiny_vocabulary(), tiny_vocabulary().size + 1, random.Random(0)
    kinds: dict[str, Callable[[str], bool]] = {
        "integer": lambda text: is_canonical(text, (int,)),
        "number": lambda text: is_canonical(text, (int, float)),
        "raw": lambda text: "\0" not in text,
    }
    runs = 0
    for kind, valid in kinds.items():
        for _ in range(140):
            length = chance.randint(1, 9)
            slot = CanvasSlot(None, 0, length, vocabulary.lift(AUTOMATA[kind]()), None)
            fixed = torch.full((length,), -1)
            for step in range(4):
                commit = commit_slot(slot, torch.randn(length, null + 1) * 4, fixed, null)
                assert commit is not None
                free = (fixed < 0).nonzero()[:, 0].tolist()
                chosen = chance.sample(free, math.ceil(len(free) / (4 - step)))
                fixed[chosen] = commit.tokens[chosen]
            tokens = fixed.tolist()
            content = list(itertools.takewhile(lambda token: token != null, tokens))
            assert set(tokens[len(content) :]) <= {null}, "NULL never precedes content"
            assert valid(vocabulary.spell(content).decode())
            runs += 1
    assert runs >= 400


# ------------------------------------------------------------------------------------------------- the cursor


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
            call = json.loads(written)
            assert written == "\n" + json.dumps(call, ensure_ascii=False) + "\n"
            calls.append(call)
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


# ------------------------------------------------------------------------------------------------- the canvas


@settings(quick, max_examples=60)
@given(schemas.fitted_parameters())
def test_a_canvas_holds_fixed_text_and_slots_in_reading_order(fitted: tuple[dict[str, Any], dict[str, Any]]) -> None:
    parameters, arguments = fitted
    vocabulary = tiny_vocabulary()
    mask, null = vocabulary.size, vocabulary.size + 1
    layout = draft_layout(compile_scaffold(schemas.tool(parameters)), 6)
    canvas = build_canvas(vocabulary, layout, {"string": 40, "integer": 40, "number": 40}, mask, null)
    ids = canvas.token_ids.tolist()
    assert ids[0] == vocabulary.call_start
    assert ids[-1] == vocabulary.call_end
    place = 0
    for slot in canvas.slots:
        assert mask not in ids[place : slot.start]
        assert ids[slot.positions] == [mask] * slot.length
        place = slot.start + slot.length
    assert mask not in ids[place:]
    texts = layout.texts(arguments)
    for slot, text in zip(canvas.slots, texts, strict=True):
        tokens = canvas.tokens_of(slot, text)
        assert len(tokens) == slot.length
        if canvas.overflows(slot, tokens):
            assert slot.slot.leaf.kind != "choice"
        elif text is not None:
            assert canvas.text(slot, tokens) == text
            # What is known is what is committed, whatever the scores say.
            commit = commit_slot(slot, torch.zeros(slot.length, null + 1), tokens, null)
            assert commit is not None
            assert commit.tokens.tolist() == tokens.tolist()


@settings(quick, max_examples=40)
@given(schemas.parameter_schemas)
def test_random_commits_assemble_to_valid_arguments(parameters: dict[str, Any]) -> None:
    vocabulary = tiny_vocabulary()
    null = vocabulary.size + 1
    layout = draft_layout(compile_scaffold(schemas.tool(parameters)), 3)
    canvas = build_canvas(vocabulary, layout, {"string": 6, "integer": 5, "number": 5}, vocabulary.size, null)
    texts = []
    for slot in canvas.slots:
        commit = commit_slot(slot, torch.randn(slot.length, null + 1) * 3, torch.full((slot.length,), -1), null)
        texts.append(canvas.text(slot, commit.tokens))
    assert list(Draft202012Validator(parameters).iter_errors(layout.assemble(texts))) == []
