"""The algebra of byte automata agrees with sets of texts, and strings are exactly what JSON can hold."""

import functools
import itertools
import json
import math
import random
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from repo_package import load_repo_module

module = load_repo_module("byte_automata")
ByteAutomaton, AutomatonTooLarge, MAX_STATES = module.ByteAutomaton, module.AutomatonTooLarge, module.MAX_STATES
raw_string_automaton = module.raw_string_automaton

quick = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

# One, two and four bytes long, and two that JSON escapes in different ways.
CHARACTERS = ("a", "é", "🙂", '"', "\x1f")
TEXTS = ["".join(text) for length in range(5) for text in itertools.product(CHARACTERS, repeat=length)]


@st.composite
def languages(draw: Any) -> Any:
    """An automaton over whole characters of `CHARACTERS`: a few states, any edges between them."""
    states = draw(st.integers(1, 4))
    target = st.integers(-1, states - 1)
    edges = [draw(st.tuples(*[target] * len(CHARACTERS))) for _ in range(states)]
    accepting = [draw(st.booleans()) for _ in range(states)]
    return _over_characters(tuple(edges), tuple(accepting))


@functools.cache
def _over_characters(edges: tuple[tuple[int, ...], ...], accepting: tuple[bool, ...]) -> Any:
    # A state is a place between characters, or (place, bytes of the character read so far).
    codes = [(state, b"") for state in range(len(edges))]
    for state in range(len(edges)):
        codes += [(state, part) for part in _beginnings()]

    def row(code: int) -> np.ndarray:
        state, part = codes[code]
        result = np.full(256, -1)
        for character, target in zip(CHARACTERS, edges[state], strict=True):
            spelled = character.encode()
            if target >= 0 and spelled.startswith(part):
                longer = spelled[: len(part) + 1]
                result[longer[-1]] = target if longer == spelled else codes.index((state, longer))
        return result

    return module.explore(0, row, lambda code: not codes[code][1] and accepting[codes[code][0]])


def _beginnings() -> list[bytes]:
    return sorted({c.encode()[:size] for c in CHARACTERS for size in range(1, len(c.encode()))})


def texts_of(automaton: Any) -> set[str]:
    """The accepted ones of `TEXTS`."""
    return {text for text in TEXTS if automaton.accepts(text.encode())}


def lengths_of(automaton: Any, most: int) -> set[int]:
    """The numbers of characters, up to a most, that accepted texts have."""
    places, found = {0}, set()
    for length in range(most + 1):
        if any(automaton.accepting[place] for place in places):
            found.add(length)
        places = {after(automaton, place, character) for place in places for character in CHARACTERS} - {-1}
    return found


def after(automaton: Any, place: int, character: str) -> int:
    """The state behind a character, or -1."""
    for byte in character.encode():
        place = int(automaton.transitions[place, byte]) if place >= 0 else -1
    return place


def same_language(one: Any, other: Any) -> bool:
    return module.difference(one, other).empty and module.difference(other, one).empty


# --------------------------------------------------------------------------------------------- algebra


@settings(quick, max_examples=60)
@given(languages(), languages())
def test_set_operations_are_those_of_sets(one: Any, other: Any) -> None:
    left, right = texts_of(one), texts_of(other)
    assert texts_of(module.union(one, other)) == left | right
    assert texts_of(module.intersection(one, other)) == left & right
    assert texts_of(module.difference(one, other)) == left - right
    assert module.difference(one, one).empty
    assert module.intersection(one, module.finite([])).empty


@settings(quick, max_examples=60)
@given(languages(), st.integers(0, 5))
def test_lengths_count_characters(automaton: Any, count: int) -> None:
    texts = texts_of(automaton)
    assert texts_of(module.at_least(automaton, count)) == {text for text in texts if len(text) >= count}
    assert texts_of(module.at_most(automaton, count)) == {text for text in texts if len(text) <= count}


@settings(quick, max_examples=25)
@given(languages(), languages())
def test_minimised_automata_have_the_same_texts_and_fewest_states(one: Any, other: Any) -> None:
    # The union with itself has states to spare.
    wide = module.union(module.union(one, other), module.difference(other, one))
    small = module.minimised(wide)
    assert texts_of(small) == texts_of(wide)
    assert same_language(small, wide)
    assert len(module.minimised(small).accepting) == len(small.accepting)
    # Any two states are told apart by some text: groups of states that look alike split until each is alone.
    rows, groups = small.transitions.tolist(), [int(accepts) for accepts in small.accepting]
    for _ in rows:
        after = [*groups, -1]
        looks = [(group, *(after[to] for to in row)) for group, row in zip(groups, rows, strict=True)]
        groups = [looks.index(look) for look in looks]
    assert len({*groups}) == len(rows)


@settings(quick, max_examples=60)
@given(st.lists(st.text(max_size=4), max_size=8))
def test_finite_languages_hold_their_texts_alone(texts: list[str]) -> None:
    encoded = {text.encode() for text in texts if not any("\ud800" <= c <= "\udfff" for c in text)}
    automaton = module.finite(sorted(encoded) * 2)
    assert all(automaton.accepts(text) for text in encoded)
    assert automaton.strings[0] == len(encoded)
    assert automaton.longest == max(map(len, encoded), default=0)
    assert automaton.empty == (not encoded)
    assert same_language(automaton, module.minimised(automaton))


@settings(quick, max_examples=60)
@given(languages())
def test_what_is_needed_to_the_end_is_the_least(automaton: Any) -> None:
    texts = texts_of(automaton)
    if automaton.empty:
        assert not texts
        assert not automaton.edges.size
    else:
        assert texts  # four states are passed within three characters
        shortest = min(texts, key=lambda text: (len(text), len(text.encode())))
        assert automaton.chars_needed[0] == len(shortest)
        assert automaton.bytes_needed[0] == len(shortest.encode())
        for source, target, begins, count in automaton.edges.tolist():
            byte = np.flatnonzero(automaton.transitions[source] == target)
            assert begins in (0, 1)
            assert 0 < count <= len(byte)
        assert automaton.edges[:, 3].sum() == (automaton.transitions >= 0).sum()


@settings(quick, max_examples=60)
@given(languages())
def test_beginnings_are_viable_and_completed_by_the_fewest_characters(automaton: Any) -> None:
    texts = texts_of(automaton)
    for text in sorted(texts)[:50]:
        spelled = text.encode()
        for end in range(len(spelled) + 1):
            assert automaton.viable(spelled[:end], complete=False)
            completed = automaton.completed(spelled[:end])
            assert completed.startswith(spelled[:end])
            assert automaton.accepts(completed)
            assert len(completed.decode()) <= len(text)
    for text in TEXTS[:150]:
        assert automaton.viable(text.encode(), complete=True) == (text in texts)
        if len(text) == 1:  # three more characters are enough to end in any state
            begins = any(longer.startswith(text) for longer in texts)
            assert automaton.viable(text.encode(), complete=False) == begins


@settings(quick, max_examples=60)
@given(languages())
def test_sizes_are_infinite_exactly_where_a_cycle_is_ahead(automaton: Any) -> None:
    texts = texts_of(automaton)
    if math.isinf(automaton.strings[0]):
        assert math.isinf(automaton.longest)
        # Pumping lemma, of at most 4 states: at least as many characters as states, and fewer than twice as many.
        assert lengths_of(automaton, 7) & set(range(4, 8))
    else:
        assert automaton.strings[0] == len(texts)
        assert automaton.longest == max((len(text.encode()) for text in texts), default=0)


@settings(quick, max_examples=60)
@given(languages())
def test_escaped_automata_accept_what_json_writes(automaton: Any) -> None:
    escaped = automaton.escaped
    for text in TEXTS:
        assert escaped.accepts(json.dumps(text, ensure_ascii=False)[1:-1].encode()) == automaton.accepts(text.encode())
    assert not escaped.accepts(b'"')
    assert not escaped.accepts(b"\x1f")
    if not automaton.empty:
        assert escaped.chars_needed[0] == automaton.chars_needed[0]  # an escape is one character


def test_many_texts_are_told_apart() -> None:
    texts = {str(number * 7919) for number in range(700)}
    automaton = module.minimised(module.finite(text.encode() for text in sorted(texts)))
    assert automaton.strings[0] == len(texts)
    others = {str(number) for number in range(0, 700 * 7919, 131)}
    assert {text for text in texts | others if automaton.accepts(text.encode())} == texts


def test_states_beyond_the_bound_are_refused() -> None:
    row = np.full(256, -1)

    def counting(code: int) -> np.ndarray:
        row[ord("a")] = code + 1
        return row

    with pytest.raises(AutomatonTooLarge):
        module.explore(0, counting, lambda code: True)
    with pytest.raises(AutomatonTooLarge):
        module.finite([b"a" * MAX_STATES])
    assert len(module.finite([b"a" * (MAX_STATES - 1)]).accepting) == MAX_STATES


def test_huge_lengths_are_refused_or_trivial() -> None:
    raw, few = raw_string_automaton(), module.finite([b"a", b"bc"])
    for count in (MAX_STATES + 1, 10**18, 10**30):
        with pytest.raises(AutomatonTooLarge):
            module.at_most(raw, count)
        with pytest.raises(AutomatonTooLarge):
            module.at_least(raw, count)
        assert module.at_most(few, count) is few
        assert module.at_least(few, count).empty


def test_long_automata_are_built_soon() -> None:
    start = time.process_time()
    long = module.at_least(raw_string_automaton(), 450)
    small = module.minimised(long)
    assert small.accepts("é".encode() * 450)
    assert not small.accepts("é".encode() * 449)
    assert len(small.accepting) > 3000
    assert len(long.escaped.accepting) > MAX_STATES  # escapes are not charged to the bound
    assert time.process_time() - start < 2


# --------------------------------------------------------------------------------------------- strings


def accepted_walk(automaton: Any, chance: random.Random, length: int) -> bytes:
    """Bytes along random edges; every state reaches acceptance within a few of them."""
    text, state = bytearray(), 0
    while len(text) < length or not automaton.accepting[state]:
        text.append(chance.choice(np.flatnonzero(automaton.transitions[state] >= 0).tolist()))
        state = int(automaton.transitions[state, text[-1]])
    return bytes(text)


def is_escaped_text(text: bytes) -> bool:
    """Whether a text is what `json.dumps` writes between the quotes for a string without NUL."""
    try:
        decoded = text.decode()
        value = json.loads(f'"{decoded}"')
        return (
            "\0" not in value and json.dumps(value, ensure_ascii=False)[1:-1] == decoded and value.encode() is not None
        )
    except ValueError:
        return False


@settings(quick, max_examples=500)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
@example('"\\/\b\f\n\r\t\x1f\x7f\u2028\ufdd0🙂')
def test_strings_are_accepted_as_json_writes_them(text: str) -> None:
    assert raw_string_automaton().escaped.accepts(json.dumps(text, ensure_ascii=False)[1:-1].encode())
    assert raw_string_automaton().accepts(text.encode())


@settings(quick, max_examples=500)
@given(st.one_of(st.binary(max_size=6), st.text('\\"u01efnab/x', max_size=10).map(str.encode)))
@example(b"\\u0000")
@example(b"\\u000a")
@example(b"\\u001F")
@example(b"\\/")
@example(b"\xed\xa0\x80")
@example(b"\xc0\x80")
def test_escaped_strings_are_exactly_what_json_writes(text: bytes) -> None:
    assert raw_string_automaton().escaped.accepts(text) == is_escaped_text(text)


def test_every_escape_is_the_one_that_json_writes() -> None:
    automaton = raw_string_automaton().escaped
    texts = [f"\\u{code:04{form}}" for code in range(0x100) for form in "xX"] + [
        f"\\{chr(code)}" for code in range(0x80)
    ]
    assert [text for text in texts if automaton.accepts(text.encode()) != is_escaped_text(text.encode())] == []


def test_every_accepted_string_is_exactly_what_json_writes() -> None:
    chance, automaton = random.Random(0), raw_string_automaton().escaped
    texts = [accepted_walk(automaton, chance, chance.randint(0, 12)) for _ in range(2000)]
    assert [text for text in texts if not is_escaped_text(text)] == []
    assert len({*texts}) > 1000


# The edges of the ranges in Unicode's table of well-formed bytes.
EDGES = bytes.fromhex("00017f808f909fa0bfc0c1c2dfe0edeff0f4f5")


def test_raw_strings_are_exactly_utf8_without_nul() -> None:
    automaton, wrong = raw_string_automaton(), []
    for length in range(5):
        for sequence in itertools.product(EDGES, repeat=length):
            text = bytes(sequence)
            try:
                expected = "\0" not in text.decode()
            except UnicodeDecodeError:
                expected = False
            if automaton.accepts(text) != expected:
                wrong.append(text)
    assert wrong == []
