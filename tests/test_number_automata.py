"""Number automata accept exactly the texts of numbers that keep their bounds, judged by Python's own arithmetic."""

import json
import math
import random
import re
import time
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import schemas
from repo_package import load_repo_module

numbers_module = load_repo_module("number_automata")
integer_automaton, number_automaton = numbers_module.integer_automaton, numbers_module.number_automaton
bytes_module = load_repo_module("byte_automata")
AutomatonTooLarge, MAX_STATES = bytes_module.AutomatonTooLarge, bytes_module.MAX_STATES

quick = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
finite_floats = st.floats(allow_nan=False, allow_infinity=False)
usual_floats = st.one_of(st.floats(-1e30, 1e30), st.floats(-1e-3, 1e-3), st.floats(-1000, 1000))
LARGEST, SMALLEST = 1.7976931348623157e308, 5e-324

# The texts of ints and floats, as `repr` forms them; what is left is how many digits there are and what they stand for.
INTEGER = re.compile(r"0|-?[1-9]\d*", re.ASCII)
DECIMAL = re.compile(r"-?(?:0\.(?:0|0{0,3}[1-9]\d*)|[1-9]\d{0,15}\.\d+)(?<![^.]0)", re.ASCII)
EXPONENT = re.compile(
    r"-?[1-9](?:\.\d*[1-9])?e(?:-(?:0[5-9]|[1-9]\d|[1-3]\d\d)|\+(?:1[6-9]|[2-9]\d|[1-3]\d\d))", re.ASCII
)


def significant_digits(text: str) -> int:
    mantissa = text.strip("-").split("e")[0]
    digits = mantissa.replace(".", "").lstrip("0")
    # The 0 of `123456789012345.0` is counted only where it fits.
    return len(digits) - (mantissa.endswith(".0") and len(digits) == 16)


def is_number(text: str, short: bool = False) -> bool:
    """Whether a text has one of the forms that a number automaton without bounds is to accept."""
    if INTEGER.fullmatch(text):
        return True
    if short:
        return bool(DECIMAL.fullmatch(text)) and significant_digits(text) <= 15
    if not (DECIMAL.fullmatch(text) or EXPONENT.fullmatch(text)) or significant_digits(text) > 17:
        return False
    value = float(text)
    return math.isfinite(value) and (value != 0 or set(text) <= set("-0.")) and not _rounded_below_smallest(text)


def _rounded_below_smallest(text: str) -> bool:
    return text.endswith("e-324") and text.strip("-") != "5e-324"


def keeps(text: str, low: Fraction | None, high: Fraction | None, low_out: bool, high_out: bool) -> bool:
    """Whether the exact value of a text and the double that it parses to both keep the bounds."""
    exact, read = Fraction(text), json.loads(text)
    for value, of in ((exact, Fraction), (_double(exact), _double), (read, _double)):
        if low is not None and (value < of(low) or (low_out and value == of(low))):
            return False
        if high is not None and (value > of(high) or (high_out and value == of(high))):
            return False
    return True


def _double(value: Fraction) -> float | Fraction:
    """The double nearest to a value; the value itself where it is beyond all doubles."""
    try:
        return float(value)
    except OverflowError:
        return value


def is_canonical(text: str) -> bool:
    """Whether a text is the one that `json.dumps` writes for the number that it is."""
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return type(value) in (int, float) and json.dumps(value) == text


def walk(automaton: Any, chance: random.Random, length: int) -> str:
    """A text along random edges that is accepted, ended soon once it has a length."""
    text, state, needed = "", 0, automaton.chars_needed
    while len(text) < length or not automaton.accepting[state]:
        onwards = np.flatnonzero(automaton.transitions[state] >= 0).tolist()
        if not onwards:
            break
        byte = chance.choice(onwards)
        if len(text) >= length:
            byte = min(onwards, key=lambda code: needed[automaton.transitions[state, code]])
        text, state = text + chr(byte), int(automaton.transitions[state, byte])
    return text


def walks(automaton: Any, count: int, length: int = 26) -> list[str]:
    chance = random.Random(0)
    return [walk(automaton, chance, chance.randint(1, length)) for _ in range(count)]


def accepts(automaton: Any, text: str) -> bool:
    return automaton.accepts(text.encode())


# --------------------------------------------------------------------------------------------- without bounds

TEXTS = st.one_of(
    st.text("-+.0123456789eE", max_size=22),
    finite_floats.map(repr),
    st.integers().map(str),
    st.from_regex(re.compile(r"\A-?\d{1,17}(\.\d{1,18})?(e[+-]\d{2,3})?\Z", re.ASCII), fullmatch=True),
)


@settings(quick, max_examples=400)
@given(TEXTS)
@example("-0")
@example("-0.0")
@example("1.50")
@example("01")
@example("0.00001")
@example("0.00012")
@example("1e5")
@example("1e+15")
@example("1e-4")
@example("1e-04")
@example("12e-07")
@example("0.5e-07")
@example("1.0e-07")
@example("123456789012345.0")
@example("1234567890123456.0")
@example("1234567890123456.5")
@example("12345678901234567.0")
@example("0.12345678901234567")
@example("0.123456789012345678")
@example("1.")
@example("1e+309")
@example("1.7976931348623158e+308")
@example("1.7976931348623159e+308")
@example("2e+308")
@example("5e-324")
@example("2e-324")
@example("1e-323")
def test_numbers_are_exactly_the_texts_that_json_writes(text: str) -> None:
    assert accepts(integer_automaton(), text) == bool(INTEGER.fullmatch(text))
    assert accepts(number_automaton(), text) == is_number(text)
    assert accepts(number_automaton(short=True), text) == is_number(text, short=True)


@settings(quick, max_examples=400)
@given(finite_floats)
@example(LARGEST)
@example(SMALLEST)
@example(2.2250738585072014e-308)
@example(2251799813685248.5)
@example(9007199254740993.0)
@example(0.1 + 0.2)
@example(1e16)
@example(9999999999999998.0)
@example(1e-4)
@example(9.999999999999999e-05)
@example(1e23)
def test_the_repr_of_every_finite_float_is_accepted(value: float) -> None:
    assert accepts(number_automaton(), json.dumps(value))
    assert accepts(number_automaton(), json.dumps(-value))


def test_the_repr_of_random_bit_patterns_is_accepted() -> None:
    patterns = np.random.default_rng(0).integers(0, 2**64, size=20_000, dtype=np.uint64)
    values = [value for value in patterns.view(np.float64).tolist() if math.isfinite(value)]
    assert len(values) > 19_000
    assert [value for value in values if not accepts(number_automaton(), repr(value))] == []


@settings(quick, max_examples=100)
@given(st.one_of(st.integers(), st.integers(1, 4000).map(lambda digits: 10**digits - 1)), schemas.short_decimals())
@example(0, 0.0)
@example(-1, 1e-4)
@example(10**4000, 999999999999999.0)
def test_integers_of_any_length_and_short_decimals_are_accepted(integer: int, decimal: float) -> None:
    for automaton in (integer_automaton(), number_automaton(), number_automaton(short=True)):
        assert accepts(automaton, str(integer))
    assert accepts(number_automaton(short=True), json.dumps(decimal))
    assert not accepts(integer_automaton(), json.dumps(decimal))


def test_every_accepted_text_is_a_finite_number() -> None:
    texts = walks(number_automaton(), 4000)
    assert len({*texts}) > 2000
    assert [text for text in texts if not accepts(number_automaton(), text)] == []
    for kind in ("e+", "e-", "."):
        assert sum(kind in text for text in texts) > 100
    assert [text for text in texts if not is_number(text)] == []


@pytest.mark.parametrize("automaton", [integer_automaton(), number_automaton(short=True)], ids=["integer", "short"])
def test_every_accepted_short_number_is_canonical(automaton: Any) -> None:
    texts = walks(automaton, 4000, 20)
    assert len({*texts}) > 2000
    assert [text for text in texts if not is_canonical(text)] == []


def test_few_states_are_enough() -> None:
    assert len(integer_automaton().accepting) == 4
    assert len(number_automaton(short=True).accepting) < 100
    assert len(number_automaton().accepting) < 200


# --------------------------------------------------------------------------------------------- integers in a range

whole_bounds = st.one_of(st.none(), st.integers(-1100, 1100), st.integers(), st.integers(10**20, 10**21))
steps = st.one_of(st.none(), st.integers(1, 64), st.sampled_from([100, 1000, 10**18]))


@settings(quick, max_examples=100)
@given(whole_bounds, whole_bounds, steps, st.lists(st.integers(-1200, 1200), max_size=20), st.data())
@example(5, 4, None, [4, 5], None)
@example(1, 6, 7, [0, 7], None)
@example(0, 0, 7, [0], None)
@example(-100, -10, None, [-100, -10, -9, -101, 10, 100], None)
def test_integers_keep_bounds_and_are_multiples(
    low: int | None, high: int | None, step: int | None, values: list[int], data: st.DataObject | None
) -> None:
    automaton = integer_automaton(low, high, step)
    divisor = step or 1
    if data is not None:
        near = [0, *(bound for bound in (low, high) if bound is not None)]
        around = st.builds(
            lambda bound, off, round_: (bound // divisor * divisor + off * divisor) if round_ else bound + off,
            st.sampled_from(near),
            st.integers(-12, 12),
            st.booleans(),
        )
        values = values + data.draw(st.lists(around, max_size=20))
    for value in values:
        fits = (low is None or value >= low) and (high is None or value <= high) and value % divisor == 0
        assert accepts(automaton, str(value)) == fits, value
    texts = [] if automaton.empty else walks(automaton, 20, 24)
    for text in texts:
        value = int(text)
        assert str(value) == text
        assert value % divisor == 0
        assert low is None or value >= low
        assert high is None or value <= high


@pytest.mark.parametrize("step", [None, 1, 2, 3, 7, 10, 12, 64])
def test_small_ranges_are_exact(step: int | None) -> None:
    for low, high in ((0, 0), (-1, 1), (-30, 130), (7, 1005), (99, 101), (-1000, -1), (5, 4)):
        automaton = integer_automaton(low, high, step)
        expected = {value for value in range(low, high + 1) if value % (step or 1) == 0}
        assert {value for value in range(-1100, 1100) if accepts(automaton, str(value))} == expected
        assert automaton.strings[0] == len(expected)
        assert automaton.empty == (not expected)


def test_equal_ranges_share_one_automaton() -> None:
    assert integer_automaton() is integer_automaton(None, None, 1)
    assert integer_automaton(minimum=1) is integer_automaton(1, None)
    assert number_automaton() is number_automaton(None, None, True, True)
    assert number_automaton(Fraction(1)) is number_automaton(minimum=Fraction(1))
    assert number_automaton(multiple_of=Fraction(1)) is number_automaton(multiple_of=Fraction(1), short=True)


def test_round_steps_need_few_states() -> None:
    assert len(integer_automaton(None, None, 10**6).accepting) == 10
    assert len(integer_automaton(0, None, 5).accepting) == 4


def test_too_large_ranges_are_refused_and_few_multiples_listed() -> None:
    for arguments in ((None, None, 4099), (0, 10**4000, None), (0, 10**300, 997), (None, None, 2**61 - 1)):
        start = time.process_time()
        with pytest.raises(AutomatonTooLarge):
            integer_automaton(*arguments)
        assert time.process_time() - start < 2
    listed = integer_automaton(0, 10**7, 99_991)
    assert listed.strings[0] == 101
    assert accepts(listed, "9999100")
    assert not accepts(listed, "9999101")
    assert integer_automaton(1, 10**9, 10**12).empty


# --------------------------------------------------------------------------------------------- numbers in a range

decimals = st.one_of(
    schemas.short_decimals().map(lambda value: Fraction(repr(value))),
    usual_floats.map(lambda value: Fraction(repr(value))),
    st.integers(-200, 200).map(Fraction),
    st.builds(lambda digits, power: digits * Fraction(10) ** power, st.integers(-99, 99), st.integers(-9, 19)),
    st.sampled_from([Fraction(1, 3), Fraction("0.1234567890123456789"), Fraction(10**23), Fraction(2**53 + 1)]),
)
bounds = st.one_of(st.none(), decimals)


def neighbours(value: Fraction) -> list[str]:
    """Texts around a value: the doubles beside it, and decimals that differ in the last digits."""
    nearest = float(value)
    found = {nearest, math.nextafter(nearest, math.inf), math.nextafter(nearest, -math.inf), nearest / 2, 2 * nearest}
    texts = [json.dumps(item) for item in found if math.isfinite(item)]
    whole = math.floor(value)
    texts += [str(item) for item in range(whole - 1, whole + 3)]
    for digits in (3, 15, 16, 17):
        written = f"{Decimal(value.numerator) / Decimal(value.denominator):.{digits - 1}e}"
        mantissa, power = written.split("e")
        for last in range(-2, 3):
            shifted = Decimal(mantissa) + last * Decimal(10) ** (1 - digits)
            texts.append(_as_repr(shifted * Decimal(10) ** int(power)))
    return [text for text in texts if is_number(text)]


def _as_repr(value: Decimal) -> str:
    """A decimal in the form that `repr` would choose by its magnitude."""
    if value == 0:
        return "0.0"
    value = value.normalize()
    power = value.adjusted()
    if -4 <= power < 16:
        text = f"{value:f}"
        return text if "." in text else text + ".0"
    sign, digits, _ = value.as_tuple()
    mantissa = str(digits[0]) + ("." + "".join(map(str, digits[1:])) if len(digits) > 1 else "")
    return f"{'-' if sign else ''}{mantissa}e{'-' if power < 0 else '+'}{abs(power):02d}"


@settings(quick, max_examples=80)
@given(bounds, bounds, st.booleans(), st.booleans(), st.booleans(), st.lists(TEXTS, max_size=20))
@example(Fraction(0), Fraction(1), True, True, False, ["0", "0.0", "-0.0", "1", "1.0", "5e-324", "0.99999999999999995"])
@example(Fraction(0), None, True, False, False, ["5e-324", "0", "0.0", "1e+308", "-5e-324"])
@example(None, Fraction(0), False, False, False, ["0", "0.0", "-0.0", "-5e-324", "5e-324"])
@example(Fraction(2**53), None, True, False, False, ["9007199254740993", "9007199254740992", "9007199254740994"])
@example(None, Fraction(10**23), False, False, False, ["1e+23", "1" + "0" * 23, "9" * 23])
@example(None, Fraction("1.0000000000000001e23"), False, True, False, ["1e+23", "1.0000000000000001e+23"])
@example(Fraction(1, 10**6), Fraction(1), False, False, False, ["1e-06", "9.9e-07", "1.5e-06", "0.0001"])
@example(Fraction("1.5e20"), None, False, False, False, ["1.5e+20", "1.4e+20", "2e+20", "1e+21", "16e+19"])
@example(Fraction(10**400), None, False, False, False, ["1e+308", "1" + "0" * 400, "9" * 400])
@example(Fraction(1), Fraction(0), False, False, False, ["0", "1", "0.5"])
def test_numbers_keep_their_bounds_exactly_and_as_doubles(
    low: Fraction | None, high: Fraction | None, low_out: bool, high_out: bool, short: bool, texts: list[str]
) -> None:
    automaton = number_automaton(low, high, low_out, high_out, short=short)
    for bound in (low, high):
        if bound is not None and abs(bound) < 10**300:
            texts = texts + neighbours(bound)
    for text in texts:
        fits = is_number(text, short) and keeps(text, low, high, low_out, high_out)
        assert accepts(automaton, text) == fits, text
    if not automaton.empty:
        for text in walks(automaton, 20):
            assert is_number(text, short), text
            assert keeps(text, low, high, low_out, high_out), text


@settings(quick, max_examples=80)
@given(usual_floats, usual_floats, st.booleans(), st.booleans(), usual_floats)
def test_the_repr_of_every_float_in_a_range_is_accepted(
    one: float, other: float, low_out: bool, high_out: bool, value: float
) -> None:
    low, high = sorted((one, other))
    automaton = number_automaton(Fraction(repr(low)), Fraction(repr(high)), low_out, high_out)
    inside = (low, math.nextafter(low, math.inf), high, math.nextafter(high, -math.inf), low / 2 + high / 2, value)
    for item in inside:
        fits = (low < item or (low == item and not low_out)) and (item < high or (item == high and not high_out))
        assert accepts(automaton, repr(item)) == fits


def test_no_number_is_left_between_neighbouring_doubles() -> None:
    one = Fraction(1)
    assert number_automaton(one, one, True).empty
    assert number_automaton(one, Fraction(repr(math.nextafter(1.0, 2))), True, True).empty
    only = number_automaton(one, one)
    assert only.strings[0] == 2
    assert all(accepts(only, text) for text in ("1", "1.0"))
    zero = number_automaton(Fraction(0), Fraction(0))
    assert zero.strings[0] == 3
    assert all(accepts(zero, text) for text in ("0", "0.0", "-0.0"))


# --------------------------------------------------------------------------------------------- multiples

decimal_steps = st.sampled_from(
    [Fraction(text) for text in ("0.01", "0.5", "2.5", "3", "1", "10", "0.25", "0.07", "0.001", "100", "1e-10", "1/3")]
)
money = st.builds(lambda cents: f"{'-' * (cents < 0)}{abs(cents) // 100}.{abs(cents) % 100:02d}", st.integers())


@settings(quick, max_examples=60)
@given(decimal_steps, bounds, bounds, st.booleans(), st.lists(st.one_of(TEXTS, money), max_size=10), st.data())
def test_multiples_are_exact_decimals(
    step: Fraction, low: Fraction | None, high: Fraction | None, low_out: bool, texts: list[str], data: st.DataObject
) -> None:
    automaton = number_automaton(low, high, low_out, False, step)
    near = [Fraction(0), *(bound for bound in (low, high) if bound is not None and abs(bound) < 10**15)]
    for start, factor in data.draw(st.lists(st.tuples(st.sampled_from(near), st.integers(-500, 500)), max_size=10)):
        value = (start // step + factor) * step
        exact = Decimal(value.numerator) / Decimal(value.denominator)
        texts = [*texts, _as_repr(exact), str(value.numerator)]
    for text in texts:
        fits = (
            is_number(text, short=True)
            and (Fraction(text) / step).denominator == 1
            and keeps(text, low, high, low_out, False)
        )
        assert accepts(automaton, text) == fits, text
    if not automaton.empty:
        for text in walks(automaton, 20):
            assert is_canonical(text)
            assert (Fraction(text) / step).denominator == 1
            assert keeps(text, low, high, low_out, False)


def test_large_steps_are_listed_or_leave_decimals_out_or_are_refused() -> None:
    listed = number_automaton(Fraction(0), Fraction(10**7), multiple_of=Fraction("79190.1"))
    assert listed.strings[0] == 127 + 13 + 1  # decimals and 0.0, the whole ones among them also as ints, and -0.0
    assert all(accepts(listed, text) for text in ("79190.1", "791901", "791901.0", "0", "-0.0"))
    assert not accepts(listed, "79190.2")
    wholes = number_automaton(multiple_of=Fraction(997))
    assert accepts(wholes, "1994")
    with pytest.raises(AutomatonTooLarge):
        number_automaton(multiple_of=Fraction(7919))
    with pytest.raises(AutomatonTooLarge):
        number_automaton(multiple_of=Fraction("0.7919"))


@pytest.mark.parametrize(
    ("low", "high", "step"), [(0, 1, None), (-90, 90, None), (0, None, None), (0, 100, Fraction(1, 100))]
)
def test_usual_ranges_are_small_and_soon_built(low: int, high: int | None, step: Fraction | None) -> None:
    build = numbers_module._numbers.__wrapped__
    arguments = (Fraction(low), None if high is None else Fraction(high), False, False, step, step is not None)
    start = time.process_time()
    automaton = build(*arguments)
    assert time.process_time() - start < 0.25
    assert len(automaton.accepting) < 220
