"""Automata over the JSON texts of numbers: integers, decimals and exponents, in a range and as multiples.

Takes exact bounds, gives `ByteAutomaton`s of texts as `json.dumps` writes them. A bound holds for the exact decimal
value of a text and for the double that a reader makes of it. No tokens, no tensors, no schema.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from .byte_automata import MAX_STATES, AutomatonTooLarge, ByteAutomaton, finite, minimised

# A double holds any 15 significant digits exactly, so a text with at most 15 is the one that Python prints back; 17 are
# enough for every double (IEEE 754).
_EXACT_DIGITS, _REPR_DIGITS = 15, 17
# `repr` writes an exponent for magnitudes below 1e-4 and from 1e16 on.
_ZEROS_BEHIND_POINT, _WHOLE_DIGITS = 3, 16
_SMALL_EXPONENTS, _LARGE_EXPONENTS = range(-323, -4), range(16, 309)
# The only double with exponent -324; the others of that decade are rounded to it or to zero.
_SMALLEST = Fraction(5, 10**324)
# Magnitudes from here on round to infinity (half of the last place above the largest double).
_OVERFLOW = Fraction(2**1024 - 2**970)

# Longer bounds and steps make no automaton of a sensible size.
_MAX_BOUND_BITS, _MAX_STEP_BITS = 2048, 64
# Where digits need too many states, so many multiples are listed one by one.
_MAX_LISTED = 1000


def integer_automaton(
    minimum: int | None = None, maximum: int | None = None, multiple_of: int | None = None
) -> ByteAutomaton:
    """Integers as `json.dumps` writes them: no leading zero, no `-0`; of any length where no bound limits it.

    Args:
        minimum, maximum: inclusive bounds; None is none.
        multiple_of: what divides every integer, at least 1; None is 1.

    Returns:
        The minimal automaton, the same object for the same language; `.empty` where no integer is left.

    Raises:
        AutomatonTooLarge: it has more than `MAX_STATES` states, and more than 1000 multiples lie in the range.

    >>> fives = integer_automaton(minimum=10, multiple_of=5)
    >>> [number for number in range(23) if fives.accepts(str(number).encode())]
    [10, 15, 20]
    """
    return _integers(minimum, maximum, multiple_of or 1)


def number_automaton(
    minimum: Fraction | None = None,
    maximum: Fraction | None = None,
    exclusive_minimum: bool = False,
    exclusive_maximum: bool = False,
    multiple_of: Fraction | None = None,
    short: bool = False,
) -> ByteAutomaton:
    """Numbers as `json.dumps` writes ints and floats: `12`, `12.0`, `-0.5`, `1e-05`, `1.5e+16`.

    The `repr` of every finite float in the range is accepted, and every int. Texts have at most 17 significant digits
    (ints any number) and never stand for infinity. A text of 16 or 17 digits, or of a magnitude below 2.3e-308, need
    not be the shortest of its double. Decimals end in a digit other than 0 except for one 0 behind the point. A text
    keeps a bound when both its exact value and its double do; `-0.0` counts as 0.

    Args:
        minimum, maximum: bounds, as the decimals that the schema's author wrote: `Fraction("0.1")`, not
            `Fraction(0.1)`; None is none.
        exclusive_minimum, exclusive_maximum: the bound itself is left out.
        multiple_of: what every value is an exact multiple of, above 0. Such texts have at most 15 significant digits
            unless they are ints, and no exponent.
        short: at most 15 significant digits unless it is an int, and no exponent; then every text is canonical:
            `json.dumps(json.loads(text)) == text`.

    Returns:
        The minimal automaton, the same object for the same arguments; `.empty` where no number is left.

    Raises:
        AutomatonTooLarge: it has more than `MAX_STATES` states. With a whole `multiple_of`, texts such as `1994.0` are
            left out before this happens.
    """
    return _numbers(
        minimum,
        maximum,
        exclusive_minimum and minimum is not None,
        exclusive_maximum and maximum is not None,
        multiple_of,
        short or multiple_of is not None,
    )


def _built(
    start: Hashable, moves: Callable[[Any], Iterable[tuple[str, Hashable]]], accepts: Callable[[Any], bool]
) -> ByteAutomaton:
    """The minimal automaton of states that are reachable by (characters, next state) moves."""
    numbers: dict[Hashable, int] = {start: 0}
    order = [start]
    sources, codes, targets = list[int](), list[int](), list[int]()
    for number, state in enumerate(order):
        for characters, target in moves(state):
            if target not in numbers:
                if len(order) >= MAX_STATES:
                    raise AutomatonTooLarge(f"more than {MAX_STATES} states")
                numbers[target] = len(order)
                order.append(target)
            codes.extend(characters.encode())
            sources.extend([number] * len(characters))
            targets.extend([numbers[target]] * len(characters))
    transitions = np.full((len(order), 256), -1, dtype=np.int16)
    transitions[np.array(sources, dtype=int), np.array(codes, dtype=int)] = targets
    accepting = np.array([accepts(state) for state in order])
    return minimised(ByteAutomaton(transitions, accepting, np.ones(len(order), dtype=bool)))


# ---------------------------------------------------------------------------------------------------------------------
# Comparing digit by digit
# ---------------------------------------------------------------------------------------------------------------------

# So many digits can stand behind the point.
_DECIMALS = _ZEROS_BEHIND_POINT + _REPR_DIGITS


@dataclass(frozen=True, eq=False)
class _Digits:
    """The decimal digits of a bound, and how the digits read so far relate to them: -1 below, 0 the same, 1 above.

    Compared by identity, so that states are found fast.

    Args:
        whole: digits in front of the point.
        decimals: as many digits behind the point as a text can have.
        ends: places behind which all further ones are 0; more than a text can have where there are no such places.
    """

    whole: str
    decimals: tuple[int, ...] = ()
    ends: int = 0

    def whole_digit(self, relation: int, place: int, digit: int) -> int:
        """The relation with one more digit in front of the point; `place` were read before."""
        if place >= len(self.whole):
            return 1
        return relation or _compared(digit, int(self.whole[place]))

    def at_point(self, relation: int, places: int) -> int:
        """The relation when no more digits come in front of the point."""
        return -1 if places < len(self.whole) else relation

    def decimal(self, relation: int, place: int, digit: int) -> int:
        """The relation with one more digit behind the point."""
        return relation or _compared(digit, self.decimals[place])

    def at_end(self, relation: int, places: int) -> int:
        """The relation when no more digits come behind the point."""
        return -1 if relation == 0 and places < self.ends else relation


def _compared(one: int, other: int) -> int:
    return (one > other) - (one < other)


def _digits(value: Fraction | int) -> _Digits:
    whole, rest = divmod(value.numerator, value.denominator)
    if max(value.numerator, value.denominator).bit_length() > _MAX_BOUND_BITS:
        raise AutomatonTooLarge(f"a bound has more than {_MAX_BOUND_BITS} bits")
    decimals, ends = [], 0
    for place in range(_DECIMALS):
        ends = place + 1 if rest else ends
        digit, rest = divmod(10 * rest, value.denominator)
        decimals.append(digit)
    return _Digits(str(whole), tuple(decimals), _DECIMALS + 1 if rest else ends)


# ---------------------------------------------------------------------------------------------------------------------
# Integers
# ---------------------------------------------------------------------------------------------------------------------


class _Integer(NamedTuple):
    """An integer of one sign, partly read: its bounds, digits read (counted no further than they matter), relations to
    the bounds, and a remainder that stands for all that go on alike."""

    bounds: tuple[_Digits, _Digits | None]
    places: int
    low: int
    high: int
    remainder: int


@lru_cache(maxsize=1024)
def _integers(minimum: int | None, maximum: int | None, step: int) -> ByteAutomaton:
    try:
        return _integers_by_digits(minimum, maximum, step)
    except AutomatonTooLarge:
        if minimum is None or maximum is None or maximum // step - -(-minimum // step) >= _MAX_LISTED:
            raise
        if max(abs(minimum), abs(maximum)).bit_length() > _MAX_BOUND_BITS:
            raise
        values = range(-(-minimum // step) * step, maximum + 1, step)
        return minimised(finite(str(value).encode() for value in values))


def _integers_by_digits(minimum: int | None, maximum: int | None, step: int) -> ByteAutomaton:
    positive = _magnitudes(minimum, maximum)
    negative = _magnitudes(None if maximum is None else -maximum, None if minimum is None else -minimum)
    zero = (minimum is None or minimum <= 0) and (maximum is None or maximum >= 0)
    remainder = _remainders(step)

    def first(bounds: tuple[_Digits, _Digits | None] | None) -> Iterator[tuple[str, Hashable]]:
        if bounds is not None:
            yield from longer(_Integer(bounds, 0, 0, 0, 0), tuple("123456789"))

    def longer(state: _Integer, groups: tuple[str, ...]) -> Iterator[tuple[str, Hashable]]:
        low, high = state.bounds
        if high is not None and state.places == len(high.whole):
            return
        most = max(len(low.whole), len(high.whole) if high is not None else 0) + 1
        for digits in groups:
            digit = int(digits[0])
            below = low.whole_digit(state.low, state.places, digit)
            above = -1 if high is None else high.whole_digit(state.high, state.places, digit)
            after = remainder(10 * state.remainder + digit)
            yield digits, _Integer(state.bounds, min(state.places + 1, most), below, above, after)

    def moves(state: Hashable) -> Iterator[tuple[str, Hashable]]:
        if isinstance(state, _Integer):
            alike = step == 1 and state.low and state.high
            yield from longer(state, ("0123456789",) if alike else tuple("0123456789"))
        elif state == "start":
            yield "-", "minus"
            yield "0", "zero"
            yield from first(positive)
        elif state == "minus":
            yield from first(negative)

    def accepts(state: Hashable) -> bool:
        if not isinstance(state, _Integer):
            return state == "zero" and zero
        low, high = state.bounds
        above = -1 if high is None else high.at_point(state.high, state.places)
        return low.at_point(state.low, state.places) >= 0 and above <= 0 and state.remainder == 0

    return _built("start", moves, accepts)


def _magnitudes(low: int | None, high: int | None) -> tuple[_Digits, _Digits | None] | None:
    """Bounds of the magnitudes above 0 of one sign; None where there are none."""
    if high is not None and high < 1:
        return None
    return _digits(max(1, low if low is not None else 1)), None if high is None else _digits(high)


def _remainders(step: int) -> Callable[[int], int]:
    """Maps a number to one remainder that stands for all which become multiples of `step` by the same further digits.

    The set of those digits is told by the smallest numbers of 0, 1, 2, ... digits that do so, up to as many digits as
    `step` has: from there on every remainder has one, and equal ones stay equal.
    """
    if step.bit_length() > _MAX_STEP_BITS:
        raise AutomatonTooLarge(f"a step has more than {_MAX_STEP_BITS} bits")
    powers = [10**places for places in range(len(str(step)) + 1)]
    chosen: dict[tuple[int, ...], int] = {}
    known: dict[int, int] = {}

    def representative(number: int) -> int:
        rest = number % step
        if rest not in known:
            needs = (-rest * power % step for power in powers)
            look = tuple(need if need < power else -1 for need, power in zip(needs, powers, strict=True))
            known[rest] = chosen.setdefault(look, rest)
        return known[rest]

    return representative


# ---------------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def _numbers(
    minimum: Fraction | None,
    maximum: Fraction | None,
    exclusive_minimum: bool,
    exclusive_maximum: bool,
    step: Fraction | None,
    short: bool,
) -> ByteAutomaton:
    low = None if minimum is None else _Bound.of(minimum, exclusive_minimum)
    # A bound from above is one from below of the opposite numbers.
    high = None if maximum is None else _Bound.of(-maximum, exclusive_maximum)
    if step is None:
        return _with_decimals(low, high, None, short)
    # Of the multiples of 1/3, only the whole ones are decimals.
    step = Fraction(step.numerator, math.gcd(step.denominator, 10 ** step.denominator.bit_length()))
    try:
        return (
            _with_point_zero(_wholes(low, high, step))
            if step.denominator == 1
            else _with_decimals(low, high, step, True)
        )
    except AutomatonTooLarge:
        if low is not None and high is not None and -high.value - low.value < _MAX_LISTED * step:
            return _listed(low, high, step)
        if step.denominator == 1:
            return _wholes(low, high, step)
        raise


@dataclass(frozen=True)
class _Bound:
    """A bound from below.

    Args:
        value: what the exact value of a decimal text keeps to, so that its double keeps the bound as well.
        exclusive: `value` itself is left out.
        integer: the smallest int whose exact value and whose double keep the bound.
    """

    value: Fraction
    exclusive: bool
    integer: int

    @classmethod
    def of(cls, bound: Fraction, exclusive: bool) -> "_Bound":
        """Rounding keeps order, so an inclusive bound carries over to doubles; above an exclusive one, a text must not
        round onto the bound's own double: it lies beyond the middle to the next double."""
        try:
            nearest = float(bound)
        except OverflowError:  # no decimal is that far out
            return cls(bound, exclusive, math.floor(bound) + 1 if exclusive else math.ceil(bound))
        if not exclusive:
            return cls(bound, False, math.ceil(max(bound, Fraction(nearest))))
        beside = math.nextafter(nearest, math.inf)
        if math.isinf(beside):
            return cls(_OVERFLOW, True, int(_OVERFLOW))
        middle = (Fraction(nearest) + Fraction(beside)) / 2
        exclusive = float(middle) != beside
        return cls(middle, exclusive, math.floor(middle) + 1 if exclusive else math.ceil(middle))

    def admits(self, value: Fraction) -> bool:
        """Whether a decimal keeps the bound."""
        return value > self.value or (value == self.value and not self.exclusive)


def _wholes(low: _Bound | None, high: _Bound | None, step: Fraction | None) -> ByteAutomaton:
    """The ints among the numbers."""
    return integer_automaton(
        None if low is None else low.integer,
        None if high is None else -high.integer,
        None if step is None else step.numerator,
    )


def _listed(low: _Bound, high: _Bound, step: Fraction) -> ByteAutomaton:
    """The multiples in a narrow range, one by one."""
    texts: set[str] = set()
    for factor in range(math.floor(low.value / step), math.ceil(-high.value / step) + 1):
        value = factor * step
        if value.denominator == 1 and low.integer <= value <= -high.integer:
            texts.add(str(value.numerator))
        if low.admits(value) and high.admits(-value) and abs(value) < 10**_WHOLE_DIGITS:
            text = repr(float(value))
            exact = "e" not in text and Fraction(text) == value
            texts |= {text, "-0.0"} if value == 0 else {text} if exact and _written(text) else set()
    return minimised(finite(text.encode() for text in sorted(texts)))


def _written(text: str) -> bool:
    """Whether a decimal has few enough digits."""
    return len(text.strip("-").removesuffix(".0").replace(".", "").lstrip("0")) <= _EXACT_DIGITS


def _with_point_zero(wholes: ByteAutomaton) -> ByteAutomaton:
    """Integers, and those of at most 15 digits with `.0` behind them."""
    minus, zero = int(wholes.transitions[0, ord("-")]), wholes.accepts(b"0")

    def moves(state: Hashable) -> Iterator[tuple[str, Hashable]]:
        if isinstance(state, _Whole):
            for byte in np.flatnonzero(wholes.transitions[state.state] >= 0).tolist() if state.state >= 0 else ():
                digits = min(state.digits + (byte != ord("-")), _EXACT_DIGITS + 1)
                yield chr(byte), _Whole(int(wholes.transitions[state.state, byte]), digits)
            if state == _Whole(0, 0) and zero and minus < 0:
                yield "-", _Whole(minus, 0)
            if state == _Whole(minus, 0) and zero:
                yield "0", "-0"
            if state.state >= 0 and wholes.accepting[state.state] and state.digits <= _EXACT_DIGITS:
                yield ".", "point"
        elif state == "-0":
            yield ".", "point"
        elif state == "point":
            yield "0", "end"

    def accepts(state: Hashable) -> bool:
        return state == "end" or (isinstance(state, _Whole) and state.state >= 0 and wholes.accepting[state.state])

    return _built(_Whole(0, 0), moves, accepts)


class _Whole(NamedTuple):
    """A state of an automaton of integers, and the digits read (counted to one more than have a `.0`)."""

    state: int
    digits: int


@dataclass(frozen=True)
class _Limit:
    """A bound of magnitudes, or of mantissas: its digits, and whether it is left out itself."""

    digits: _Digits
    exclusive: bool

    def admits(self, relation: int, sign: int) -> bool:
        """Whether numbers of a relation lie on the right side: above for sign 1, below for -1."""
        return relation == sign or (relation == 0 and not self.exclusive)


@dataclass(frozen=True, eq=False)
class _Side:
    """What may be written behind one sign. Compared by identity, and made once for both signs where they are alike.

    Args:
        near: least and largest magnitude, None where every text without exponent is above or below.
        lead: the same of mantissas, at the smallest and the largest exponent; None where no exponent is written.
        exponents: the smallest and the largest.
        smallest: whether `5e-324` may be written.
    """

    near: tuple[_Limit | None, _Limit | None]
    lead: tuple[_Limit, _Limit] | None
    exponents: tuple[int, int]
    smallest: bool

    def within(self, low: int, high: int) -> bool:
        """Whether relations to the bounds in `near` are those of a magnitude between them."""
        least, most = self.near
        return (least is None or least.admits(low, 1)) and (most is None or most.admits(high, -1))

    def powers(self, low: int, high: int, five: bool) -> frozenset[str]:
        """What may stand behind the `e`, by the mantissa's relations to those in `lead`; `five`: it is `5`."""
        assert self.lead is not None
        first = self.exponents[0] + (not self.lead[0].admits(low, 1))
        last = self.exponents[1] - (not self.lead[1].admits(high, -1))
        return _power_texts(first, last, five and self.smallest)


@lru_cache(maxsize=256)
def _power_texts(first: int, last: int, smallest: bool) -> frozenset[str]:
    """The exponents from one to another that are written."""
    texts = {f"-{-power:02d}" for power in _SMALL_EXPONENTS if first <= power <= last}
    texts |= {f"+{power}" for power in _LARGE_EXPONENTS if first <= power <= last}
    return frozenset(texts | ({"-324"} if smallest else set()))


@lru_cache(maxsize=64)
def _side(least: Fraction, least_out: bool, most: Fraction, most_out: bool, short: bool) -> _Side | None:
    """The side of the magnitudes from `least` to `most`, each of them left out or not; None where there are none."""
    if most < least or (most == least and (least_out or most_out)):
        return None
    low = _Limit(_digits(least), least_out) if least > 0 or least_out else None
    high = _Limit(_digits(most), most_out) if most < 10**_WHOLE_DIGITS else None
    if short or most < _SMALLEST:
        return _Side((low, high), None, (0, 0), False)
    # Below the second smallest double, only the smallest has a text.
    second = 2 * _SMALLEST
    first, first_digits = _mantissa(max(least, second))
    last, last_digits = _mantissa(most)
    lead = (_Limit(first_digits, least_out and least >= second), _Limit(last_digits, most_out))
    smallest = (least, least_out) <= (_SMALLEST, False) and (-most, most_out) <= (-_SMALLEST, False)
    return _Side((low, high), lead, (first, last), smallest)


def _mantissa(value: Fraction) -> tuple[int, _Digits]:
    """Exponent and mantissa (at least 1, below 10) of a number above 0."""
    exponent = len(str(value.numerator)) - len(str(value.denominator))
    exponent -= value < Fraction(10) ** exponent
    return exponent, _digits(value / Fraction(10) ** exponent)


def _sides(low: _Bound | None, high: _Bound | None, short: bool) -> tuple[_Side | None, _Side | None]:
    """The sides of the numbers from 0 up, and from 0 down."""
    zero, end = (Fraction(0), False), (_OVERFLOW, True)
    least = [zero if bound is None else (bound.value, bound.exclusive) for bound in (low, high)]
    most = [end if bound is None else (-bound.value, bound.exclusive) for bound in (high, low)]
    positive, negative = (
        _side(*max(low, zero, key=itemgetter(0)), *min(end, high, key=itemgetter(0)), short)
        for low, high in zip(least, most, strict=True)
    )
    return positive, negative


class _Decimal(NamedTuple):
    """A number without exponent so far, partly read.

    Args:
        side: of its sign.
        digits: significant digits.
        places: digits behind the point, counted no further than they matter; -1 in front of it.
        zero: the last digit is a 0 behind the point.
        near: relations to the bounds in `side.near`; None once they are broken.
        lead: relations to those in `side.lead`, where one digit in front of the point can still become a mantissa.
        five: all that was read is `5`.
        rest: remainder of the multiples.
    """

    side: _Side
    digits: int
    places: int
    zero: bool
    near: tuple[int, int] | None
    lead: tuple[int, int] | None
    five: bool
    rest: int

    @property
    def tight(self) -> bool:
        """Whether what was read is the beginning of a bound, so that the next digit decides."""
        return 0 in (self.near or ()) or 0 in (self.lead or ())


# Digits that need not be told apart, where only zeros are, and where all are.
_ALL_ALIKE, _ALL_APART = ("0", "123456789"), tuple("0123456789")


def _with_decimals(low: _Bound | None, high: _Bound | None, step: Fraction | None, short: bool) -> ByteAutomaton:
    """Ints, decimals and exponents side by side. States: (that of the int or -1, that of the others or None)."""
    wholes = _wholes(low, high, step)
    table = [
        {chr(byte): int(row[byte]) for byte in np.flatnonzero(row >= 0).tolist()} for row in wholes.transitions
    ] + [{}]
    reader = _Reader(*_sides(low, high, short), step, _EXACT_DIGITS if short else _REPR_DIGITS)

    def moves(state: tuple[int, Hashable]) -> Iterator[tuple[str, tuple[int, Hashable]]]:
        whole = table[state[0]]
        other = {character: after for characters, after in reader.moves(state[1]) for character in characters}
        for character in whole | other:
            yield character, (whole.get(character, -1), other.get(character))

    def accepts(state: tuple[int, Hashable]) -> bool:
        return (state[0] >= 0 and bool(wholes.accepting[state[0]])) or reader.accepts(state[1])

    return _built((0, "start"), moves, accepts)


class _Reader:
    """Reads decimals and numbers with an exponent, character by character.

    States are `"start"`, `"minus"`, a `_Decimal`, the set of texts that may stand behind the rest of an `e`, and None.

    Args:
        positive, negative: what may be written behind each sign.
        step: what every number is a multiple of, a decimal; None is no demand.
        most: most significant digits.
    """

    def __init__(self, positive: _Side | None, negative: _Side | None, step: Fraction | None, most: int) -> None:
        self.positive, self.negative = positive, negative
        self.step = step
        self.most = most
        self.most_whole = min(most, _WHOLE_DIGITS)
        self.most_decimals = _DECIMALS
        if step is not None:
            fitting = (places for places in range(_DECIMALS) if 10**places % step.denominator == 0)
            self.most_decimals = next(fitting, _DECIMALS)

    def moves(self, state: Hashable) -> Iterator[tuple[str, Hashable]]:
        """What may come next, and where it leads."""
        if state == "start":
            if self.negative is not None:
                yield "-", "minus"
            yield from self._first(self.positive)
        elif state == "minus":
            yield from self._first(self.negative)
        elif isinstance(state, frozenset):
            rests: dict[str, set[str]] = {}
            for text in filter(None, state):
                rests.setdefault(text[0], set()).add(text[1:])
            yield from ((character, frozenset(texts)) for character, texts in rests.items())
        elif isinstance(state, _Decimal):
            for digits in _ALL_ALIKE if self.step is None and not state.tight else _ALL_APART:
                digit = int(digits[0])
                after = self._whole_digit(state, digit) if state.places < 0 else self._decimal(state, digit)
                if after is not None:
                    yield digits, after
            if state.places < 0:
                yield ".", self._point(state)
            if powers := self._powers(state):
                yield "e", powers

    def accepts(self, state: Hashable) -> bool:
        """Whether a number may end here."""
        if isinstance(state, frozenset):
            return "" in state
        if not isinstance(state, _Decimal) or state.places < 1 or (state.zero and state.places > 1):
            return False
        if state.near is None or state.rest:
            return False
        return state.side.within(*_each(state.side.near, state.near, _Digits.at_end, state.places))

    def _first(self, side: _Side | None) -> Iterator[tuple[str, _Decimal]]:
        """The first digit of a number."""
        for digit in range(10 if side is not None else 0):
            assert side is not None
            near = _each(side.near, (0, 0), _Digits.whole_digit, 0, digit)
            lead = None
            if digit and side.lead is not None:
                lead = _each(side.lead, (0, 0), _Digits.whole_digit, 0, digit)
            five = digit == 5 and side.smallest
            yield str(digit), _Decimal(side, int(digit > 0), -1, False, near, lead, five, self._rest(0, digit, 0))

    def _whole_digit(self, state: _Decimal, digit: int) -> _Decimal | None:
        """One more digit in front of the point."""
        if state.digits in (0, self.most_whole) or state.near is None:
            return None
        near = _each(state.side.near, state.near, _Digits.whole_digit, state.digits, digit)
        rest = self._rest(state.rest, digit, 0)
        return _Decimal(state.side, state.digits + 1, -1, False, near, None, False, rest)

    def _point(self, state: _Decimal) -> _Decimal:
        assert state.near is not None
        near = _each(state.side.near, state.near, _Digits.at_point, max(1, state.digits))
        return state._replace(places=0, near=near, five=False)

    def _decimal(self, state: _Decimal, digit: int) -> _Decimal | None:
        """One more digit behind the point."""
        side, places = state.side, state.places + 1
        digits = state.digits + (state.digits > 0 or digit > 0)
        if digits > self.most:
            if (places, digit) != (1, 0):  # the 0 of `123456789012345.0` is not significant
                return None
            digits = self.most
        if places > self.most_decimals or (digits == 0 and places > _ZEROS_BEHIND_POINT):
            return None
        near, lead = state.near, state.lead
        if near is not None:
            near = _each(side.near, near, _Digits.decimal, places - 1, digit)
            if not side.within(*near) and 0 not in near:
                near = None
        if lead is not None:
            lead = _each(side.lead, lead, _Digits.decimal, places - 1, digit)
        if near is None and lead is None:
            return None
        rest = self._rest(state.rest, digit, places)
        after = _Decimal(side, digits, places, digit == 0, near, lead, False, rest)
        if self.step is None and digits > 0 and not after.tight:
            # Only the one 0 behind the point is still told apart.
            return after._replace(places=1 if (places, digit) == (1, 0) else 2)
        return after

    def _rest(self, rest: int, digit: int, places: int) -> int:
        """The remainder with one more digit, `places` digits behind the point then."""
        if self.step is None:
            return 0
        return (10 * rest + digit * self.step.denominator) % (10**places * self.step.numerator)

    def _powers(self, state: _Decimal) -> frozenset[str]:
        """What may stand behind an `e` that comes next."""
        if state.lead is None or state.places == 0 or state.zero:
            return frozenset()
        relations = _each(state.side.lead, state.lead, _Digits.at_end, max(0, state.places))
        return state.side.powers(*relations, state.five)


def _each(
    limits: tuple[_Limit | None, _Limit | None] | None,
    relations: tuple[int, int],
    how: Callable[..., int],
    *arguments: int,
) -> tuple[int, int]:
    """New relations to two limits; to one that is none they are what all keep."""
    assert limits is not None
    low, high = limits
    return (
        1 if low is None else how(low.digits, relations[0], *arguments),
        -1 if high is None else how(high.digits, relations[1], *arguments),
    )
