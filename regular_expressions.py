"""`pattern` and `format` of JSON Schema as automata over raw UTF-8 text.

A pattern is parsed into a tree; the tree becomes a nondeterministic machine over classes of characters that the pattern
does not tell apart; sets of its nodes become states; the fewest states are written out over bytes. What a lookahead
asks of the rest of the text is a small automaton that runs beside the nodes behind it. Formats are patterns.

Patterns are ECMA-262 with unicode semantics, and are found anywhere in the text unless anchored.
"""

import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise
from typing import NoReturn

import numpy as np

from .byte_automata import MAX_STATES, AutomatonTooLarge, ByteAutomaton, raw_string_automaton

# Bounds on hostile patterns. Work is counted, not timed, so that a pattern compiles everywhere or nowhere.
_MAX_PATTERN = 1 << 14
_MAX_DEPTH = 64
_MAX_NODES = 1 << 14
_MAX_SUBSETS = 2 * MAX_STATES
_MAX_WORK = 400_000


class UnsupportedPatternError(ValueError):
    """A pattern that is malformed, too large or uses what no automaton can do; says what, where and what to do."""


class _Budget:
    """Counts the work on one pattern."""

    def __init__(self) -> None:
        self.left = _MAX_WORK

    def spend(self, units: int) -> None:
        self.left -= units
        if self.left < 0:
            raise AutomatonTooLarge(f"more than {_MAX_WORK} steps")


# ---------------------------------------------------------------------------------------------------------------------
# Sets of characters
# ---------------------------------------------------------------------------------------------------------------------

# Inclusive ranges of code points: sorted, disjoint, and inside `_EVERY`.
_Ranges = tuple[tuple[int, int], ...]

# What UTF-8 text without NUL is made of.
_EVERY: _Ranges = ((0x1, 0xD7FF), (0xE000, 0x10FFFF))


def _ranges(parts: Iterable[tuple[int, int]]) -> _Ranges:
    """Normal form of any ranges."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(parts):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    inside = [
        (low if low > first else first, high if high < last else last)
        for low, high in merged
        for first, last in _EVERY
        if low <= last and high >= first
    ]
    return tuple(inside)


def _chars(text: str) -> _Ranges:
    return _ranges((ord(char), ord(char)) for char in text)


def _complement(ranges: _Ranges) -> _Ranges:
    ends = [(0, 0), *ranges, (0x110000, 0x110000)]
    return _ranges((before + 1, after - 1) for (_, before), (after, _) in pairwise(ends) if before + 1 < after)


_DIGIT = _ranges([(0x30, 0x39)])
_WORD = _ranges([(0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)])
# WhiteSpace and LineTerminator of ECMA-262; the first are tab to carriage return.
_SPACE = _ranges([(0x9, 0xD), (0x2000, 0x200A), *_chars(" \xa0\u1680\u2028\u2029\u202f\u205f\u3000\ufeff")])
_NO_LINE_TERMINATOR = _complement(_chars("\n\r\u2028\u2029"))

_CLASS_ESCAPES = {"d": _DIGIT, "w": _WORD, "s": _SPACE}
_CLASS_ESCAPES |= {letter.upper(): _complement(ranges) for letter, ranges in _CLASS_ESCAPES.items()}
_CONTROL_ESCAPES = {"t": "\t", "n": "\n", "v": "\v", "f": "\f", "r": "\r"}

# Long names of the general categories. Source: Unicode's PropertyValueAliases.txt.
_CATEGORY_NAMES = dict(
    re.findall(
        r"(\w+)=(\w+)",
        "Letter=L Cased_Letter=LC Uppercase_Letter=Lu Lowercase_Letter=Ll Titlecase_Letter=Lt Modifier_Letter=Lm "
        "Other_Letter=Lo Mark=M Combining_Mark=M Nonspacing_Mark=Mn Spacing_Mark=Mc Enclosing_Mark=Me Number=N "
        "Decimal_Number=Nd Letter_Number=Nl Other_Number=No Punctuation=P Connector_Punctuation=Pc Dash_Punctuation=Pd "
        "Open_Punctuation=Ps Close_Punctuation=Pe Initial_Punctuation=Pi Final_Punctuation=Pf Other_Punctuation=Po "
        "Symbol=S Math_Symbol=Sm Currency_Symbol=Sc Modifier_Symbol=Sk Other_Symbol=So Separator=Z Space_Separator=Zs "
        "Line_Separator=Zl Paragraph_Separator=Zp Other=C Control=Cc Format=Cf Surrogate=Cs Private_Use=Co "
        "Unassigned=Cn",
    )
)


@cache
def _categories() -> dict[str, list[tuple[int, int]]]:
    """Ranges of each general category, in the running Python's version of Unicode."""
    table: dict[str, list[tuple[int, int]]] = defaultdict(list)
    # Planes 4 to 13 are empty, and 15 and 16 are for private use but for their ends: not worth 0.3 s.
    for low, high in ((0, 0x40000), (0xE0000, 0xF0000)):
        codes = "".join(map(unicodedata.category, map(chr, range(low, high)))).encode()
        changes = np.flatnonzero(np.diff(np.frombuffer(codes, dtype=np.uint16))) + 1
        for start, end in pairwise([0, *changes.tolist(), high - low]):
            table[codes[2 * start : 2 * start + 2].decode()].append((low + start, low + end - 1))
    table["Cn"] += [(0x40000, 0xDFFFF), (0xFFFFE, 0xFFFFF), (0x10FFFE, 0x10FFFF)]
    table["Co"] += [(0xF0000, 0xFFFFD), (0x100000, 0x10FFFD)]
    return dict(table)


@cache
def _property(name: str) -> _Ranges | None:
    """Characters of `\\p{name}`; None for a property that is not known."""
    if name == "Any":
        return _EVERY
    if name == "ASCII":
        return _ranges([(0, 0x7F)])
    if name == "Assigned":
        return _complement(_ranges(_categories()["Cn"]))
    short = name.removeprefix("General_Category=").removeprefix("gc=")
    short = _CATEGORY_NAMES.get(short, short)
    cased = ("Lu", "Ll", "Lt") if short == "LC" else ()
    chosen = [code for code in _categories() if short in (code, code[0]) or code in cased]
    return _ranges(part for code in chosen for part in _categories()[code]) if chosen else None


@cache
def _cases() -> tuple[list[int], list[list[int]]]:
    """The characters that have other cases, sorted; and all cases of each. Source: ECMA-262, simple case folding."""

    def folded(char: str) -> str:
        return next((form for form in (char.casefold(), char.lower()) if len(form) == 1), char)

    groups = defaultdict(list)
    for category in ("Lu", "Ll", "Lt", "Mn", "Nl", "So"):
        for low, high in _categories()[category]:
            for code in range(low, high + 1):
                groups[folded(chr(code))].append(code)
    cased = sorted((code, group) for group in groups.values() if len(group) > 1 for code in group)
    return [code for code, _ in cased], [group for _, group in cased]


@lru_cache(maxsize=256)
def _any_case(ranges: _Ranges) -> _Ranges:
    """The ranges together with the other cases of their characters."""
    codes, groups = _cases()
    parts = list(ranges)
    for low, high in ranges:
        for group in groups[bisect_left(codes, low) : bisect_right(codes, high)]:
            parts.extend((code, code) for code in group)
    return _ranges(parts)


# ---------------------------------------------------------------------------------------------------------------------
# Parsing
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Chars:
    """One character of a set. Equal ones are one in a parser."""

    ranges: _Ranges


@dataclass(frozen=True)
class _Sequence:
    parts: tuple["_Node", ...]


@dataclass(frozen=True)
class _Choice:
    options: tuple["_Node", ...]


@dataclass(frozen=True)
class _Repeat:
    body: "_Node"
    least: int
    most: int | None


@dataclass(frozen=True)
class _Start:
    """The beginning of the text."""


@dataclass(frozen=True)
class _Boundary:
    """Between a word character and another one or an end of the text; or, negated, anywhere else."""

    negated: bool


@dataclass(frozen=True, eq=False)
class _Look:
    """The rest of the text begins with the body; or, negated, does not. Equal ones are one in a parser."""

    body: "_Node"
    negated: bool


_Assertion = _Start | _Boundary | _Look
_Node = _Chars | _Sequence | _Choice | _Repeat | _Assertion

_ANY = _Chars(_EVERY)
_WORD_CHAR = _Chars(_WORD)
_END = _Look(_ANY, negated=True)
_WORD_FOLLOWS = _Look(_WORD_CHAR, negated=False)
_NO_WORD_FOLLOWS = _Look(_WORD_CHAR, negated=True)

_QUANTIFIER = re.compile(r"([*+?]|\{(?P<least>[0-9]+)(?P<open>,(?P<most>[0-9]+)?)?\})\??")
_WITHOUT_LEAST = re.compile(r"\{,[0-9]+\}")
_GROUP = re.compile(r"\((\?:|\?P?<[^\W\d]\w*>|(?P<look>\?[=!])|(?!\?))")
_CODE = re.compile(r"x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|u\{([0-9A-Fa-f]+)\}")
_LOW_SURROGATE = re.compile(r"\\u([dD][c-fC-F][0-9A-Fa-f]{2})")
_PROPERTY = re.compile(r"[pP]\{([^{}]*)\}")


class _Parser:
    """Recursive descent; `place` is the index of the next character."""

    def __init__(self, pattern: str, budget: _Budget) -> None:
        self.pattern = pattern
        self.budget = budget
        # No flag of ECMA-262, but of most who write patterns for Python, Rust or Java.
        self.ignore_case = pattern.startswith("(?i)")
        self.place = len("(?i)") if self.ignore_case else 0
        self.depth = 0
        self.sets: dict[_Ranges, _Chars] = {_EVERY: _ANY}
        self.looks: dict[tuple[_Node, bool], _Look] = {}

    def fail(self, what: str, advice: str, place: int | None = None) -> NoReturn:
        where = self.place if place is None else place
        raise UnsupportedPatternError(f"pattern {_quoted(self.pattern)}: {what} at character {where}; {advice}")

    def peek(self, ahead: int = 0) -> str:
        """The next character, or nothing at the end."""
        return self.pattern[self.place + ahead : self.place + ahead + 1]

    def skip(self, text: str) -> bool:
        """Step over a text if it comes next."""
        found = self.pattern.startswith(text, self.place)
        self.place += len(text) * found
        return found

    def whole(self) -> _Node:
        node = self.choice()
        if self.peek():
            self.fail("unmatched )", r"write \)")
        return node

    def choice(self) -> _Node:
        options = [self.sequence()]
        while self.skip("|"):
            options.append(self.sequence())
        return options[0] if len(options) == 1 else _Choice(tuple(options))

    def sequence(self) -> _Node:
        parts = []
        while self.peek() not in ("", "|", ")"):
            parts.append(self.quantified())
        return parts[0] if len(parts) == 1 else _Sequence(tuple(parts))

    def quantified(self) -> _Node:
        if _QUANTIFIER.match(self.pattern, self.place):
            self.fail("quantifier with nothing to repeat", "escape it with a backslash")
        start = self.place
        node = self.atom()
        if _WITHOUT_LEAST.match(self.pattern, self.place):
            # `a{,5}` is at most five letters in Python, and one letter with four signs behind it in ECMA-262.
            self.fail("quantifier without its least number", r"write {0,n}, or \{ for the character")
        found = _QUANTIFIER.match(self.pattern, self.place)
        if not found:
            return node
        # An anchor alone in a group may be repeated.
        if self.pattern[start] in "^$" or self.pattern.startswith(("\\b", "\\B"), start):
            self.fail("quantifier behind an anchor", "remove it")
        least, most = _bounds(found)
        if most is not None and most < least:
            self.fail("quantifier with its numbers out of order", "write the lesser one first")
        self.place = found.end()
        if _QUANTIFIER.match(self.pattern, self.place):
            self.fail("quantifier behind a quantifier", "put what it repeats into a group")
        return _Repeat(node, least, most)

    def atom(self) -> _Node:
        char = self.peek()
        if char == "(":
            return self.group()
        if char == "[":
            return self.char_class()
        if char == "\\":
            return self.escaped_atom()
        if self.skip("."):
            return self.chars(_NO_LINE_TERMINATOR)
        if self.skip("^"):
            return _Start()
        if self.skip("$"):
            return _END
        code = self.literal()
        return self.chars([(code, code)])

    def group(self) -> _Node:
        start = self.place
        found = _GROUP.match(self.pattern, start)
        if not found:
            advice = "use (...), (?:...), (?<name>...), (?=...), (?!...) or (?i) in front of the whole pattern"
            self.fail(f"group of a kind that is not supported ({self.pattern[start : start + 4]}...)", advice)
        if self.depth == _MAX_DEPTH:
            self.fail(f"groups nested deeper than {_MAX_DEPTH}", "simplify the pattern")
        self.place = found.end()
        self.depth += 1
        node = self.choice()
        self.depth -= 1
        if not self.skip(")"):
            self.fail("group without its )", r"close it, or write \(", start)
        if not found["look"]:
            return node
        negated = found["look"] == "?!"
        return self.looks.setdefault((node, negated), _Look(node, negated))

    def chars(self, parts: Iterable[tuple[int, int]], negated: bool = False) -> _Chars:
        """The node of a set, which is widened to every case before it is negated."""
        ranges = _ranges(parts)
        if self.ignore_case:
            ranges = _any_case(ranges)
        if negated:
            ranges = _complement(ranges)
        self.budget.spend(1 + 3 * len(ranges))
        if ranges not in self.sets:
            # Each set makes the bit masks longer by which sets are told apart.
            self.budget.spend(len(self.sets) // 64)
            self.sets[ranges] = _Chars(ranges)
        return self.sets[ranges]

    def char_class(self) -> _Node:
        start = self.place
        self.skip("[")
        negated = self.skip("^")
        parts: list[tuple[int, int]] = []
        while not self.skip("]"):
            first = self.class_atom(start)
            if self.peek() == "-" and self.peek(1) not in ("", "]"):
                self.skip("-")
                last = self.class_atom(start)
                if isinstance(first, int) and isinstance(last, int):
                    if last < first:
                        self.fail("range out of order", "write the lesser character first", self.place)
                    first = ((first, last),)
                else:
                    # As in Annex B, a hyphen beside `\w` or its like is a character.
                    parts.extend([*_part(last), (ord("-"), ord("-"))])
            parts.extend(_part(first))
        self.budget.spend(len(parts))
        return self.chars(parts, negated)

    def class_atom(self, start: int) -> int | _Ranges:
        if not self.peek():
            self.fail("class without its ]", r"close it, or write \[", start)
        if self.skip(r"\b"):
            return ord("\b")
        return self.escape() if self.peek() == "\\" else self.literal()

    def literal(self) -> int:
        code = ord(self.peek())
        if 0xD800 <= code < 0xE000:
            self.fail("half of a surrogate pair", "write the whole character")
        self.place += 1
        return code

    def escaped_atom(self) -> _Node:
        if self.peek(1) in ("b", "B"):
            self.sets[_WORD] = _WORD_CHAR
            self.place += 2
            return _Boundary(negated=self.pattern[self.place - 1] == "B")
        return self.chars(_part(self.escape()))

    def escape(self) -> int | _Ranges:
        """The character, or the set of them, that an escape stands for."""
        start = self.place
        self.skip("\\")
        letter = self.peek()
        if letter in ("x", "u"):
            return self.code(start)
        if letter in ("p", "P"):
            return self.property(start)
        if letter == "":
            self.fail("backslash at the end", r"write \\", start)
        if letter in "123456789k":
            self.fail(f"backreference \\{letter}", "write out what it may repeat", start)
        self.place += 1
        if self.ignore_case and letter in ("w", "W"):
            return _any_case(_WORD) if letter == "w" else _complement(_any_case(_WORD))
        if letter in _CLASS_ESCAPES:
            return _CLASS_ESCAPES[letter]
        if letter in _CONTROL_ESCAPES:
            return ord(_CONTROL_ESCAPES[letter])
        if letter == "0" and self.peek() not in tuple("0123456789"):
            return 0
        if letter == "c" and self.peek().isascii() and self.peek().isalpha():
            self.place += 1
            return ord(self.pattern[self.place - 1]) % 32
        if letter.isascii() and letter.isalnum():
            self.fail(f"escape \\{letter}", "use ^ and $ as anchors, and the escapes of ECMA-262", start)
        self.place -= 1
        return self.literal()

    def code(self, start: int) -> int:
        """The character of `\\xHH`, `\\uHHHH`, a pair of these or `\\u{...}`."""
        found = _CODE.match(self.pattern, self.place)
        if not found:
            self.fail("incomplete escape", r"write \xHH, \uHHHH or \u{...} in hexadecimal digits", start)
        self.place = found.end()
        code = int(found[1] or found[2] or found[3], 16)
        low = _LOW_SURROGATE.match(self.pattern, self.place)
        if found[2] and 0xD800 <= code < 0xDC00 and low:
            self.place = low.end()
            code = 0x10000 + ((code - 0xD800) << 10) + (int(low[1], 16) - 0xDC00)
        if 0xD800 <= code < 0xE000 or code > 0x10FFFF:
            self.fail("escape of what is no character", r"write the whole character, as \u{1F600}", start)
        return code

    def property(self, start: int) -> _Ranges:
        found = _PROPERTY.match(self.pattern, self.place)
        ranges = _property(found[1]) if found else None
        if not found or ranges is None:
            advice = r"use a general category such as \p{L}, or write the characters out"
            self.fail(f"property {found[0] if found else 'without braces'}", advice, start)
        self.place = found.end()
        return ranges if found[0][0] == "p" else _complement(ranges)


def _part(item: int | _Ranges) -> _Ranges:
    return ((item, item),) if isinstance(item, int) else item


def _bounds(quantifier: re.Match[str]) -> tuple[int, int | None]:
    """Least and most repetitions."""
    if quantifier["least"] is None:
        return {"*": (0, None), "+": (1, None), "?": (0, 1)}[quantifier[1]]
    # Ten digits are too many for any budget, and Python refuses to read thousands.
    least, most = (int((digits or "0").lstrip("0")[:10] or 0) for digits in quantifier.group("least", "most"))
    if quantifier["open"] is None:
        return least, least
    return least, None if quantifier["most"] is None else most


def _quoted(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 60 else pattern[:60] + "...")


# ---------------------------------------------------------------------------------------------------------------------
# Machines over classes of characters
# ---------------------------------------------------------------------------------------------------------------------


class _Alphabet:
    """Classes of characters that no set of a pattern tells apart; a set of classes is a bit mask.

    Args:
        sets: the sets of the pattern, `_ANY` among them.
    """

    def __init__(self, sets: Iterable[_Chars]) -> None:
        toggles: dict[int, int] = {0: 0}
        for number, chars in enumerate(sets):
            for low, high in chars.ranges:
                toggles[low] = toggles.get(low, 0) ^ 1 << number
                toggles[high + 1] = toggles.get(high + 1, 0) ^ 1 << number
        self.starts = sorted(toggles)
        # For each stretch of code points its class, or -1 where there are no characters.
        self.labels: list[int] = []
        numbers: dict[int, int] = {0: -1}
        inside = 0
        for start in self.starts:
            inside ^= toggles[start]
            self.labels.append(numbers.setdefault(inside, len(numbers) - 1))
        self.size = len(numbers) - 1
        self.found: dict[_Chars, set[int]] = {}

    def label(self, code: int) -> int:
        """The class of a code point, or -1."""
        return self.labels[bisect_right(self.starts, code) - 1]

    def classes(self, chars: _Chars) -> set[int]:
        """The classes that make up a set of the pattern."""
        if chars not in self.found:
            self.found[chars] = {
                label
                for low, high in chars.ranges
                for label in self.labels[bisect_left(self.starts, low) : bisect_right(self.starts, high)]
            }
        return self.found[chars]


@dataclass(frozen=True, eq=False)
class _States:
    """A deterministic automaton over classes, start state 0: for each state and class the next state or -1."""

    rows: list[list[int]]
    accepting: list[bool]


# What stands before a place of the text, as far as an assertion can tell.
_AT_START, _AFTER_OTHER, _AFTER_WORD = range(3)

# The first node has found what is sought, and reads whatever follows.
_FOUND = 0

# Duties are states of the automata of lookaheads, all of which the rest of the text has to satisfy. A subset gives
# for each set of duties the nodes, as a bit mask, that are reached under them.
_Duties = frozenset[int]
_Reached = dict[_Duties, int]
_Subset = frozenset[tuple[_Duties, int]]
_NO_DUTIES: _Duties = frozenset()
_DEAD: _Subset = frozenset()

# In place of a duty that whatever follows satisfies, or that nothing can satisfy.
_DONE, _BROKEN = -1, -2


class _Machine:
    """The nondeterministic automaton of a pattern, with the deterministic automata of its lookaheads.

    Source: Thompson, "Regular expression search algorithm" (1968), and the subset construction of Rabin and Scott
    (1959), here over nodes that hold under conjunctions of lookaheads.
    """

    def __init__(self, sets: Collection[_Chars], budget: _Budget) -> None:
        self.budget = budget
        self.alphabet = _Alphabet(sets)
        word = self.alphabet.classes(_WORD_CHAR) if _WORD_CHAR in set(sets) else set()
        self.contexts = [_AFTER_WORD if label in word else _AFTER_OTHER for label in range(self.alphabet.size)]
        # A node either reads a character and goes on to one node, or branches under assertions.
        self.follower: list[int | None] = []
        self.branches: list[list[tuple[_Assertion | None, int]]] = []
        # For each class the nodes that read it.
        self.readers = [0] * self.alphabet.size
        # For each duty the next one of each class, and whether the end of the text satisfies it.
        self.duty_rows: list[list[int]] = []
        self.duty_accepting: list[bool] = []
        self.first_duties: dict[tuple[_Look, int], int] = {}
        # What has been found already.
        self.closures: dict[tuple[int, int], _Reached] = {}
        self.moves: dict[tuple[int, tuple[tuple[_Duties, int], ...]], _Subset] = {}
        self.next_duties: dict[tuple[_Duties, int], _Duties | None] = {}
        self.reading(_ANY, _FOUND)

    # Building

    def add(self, follower: int | None, branches: list[tuple[_Assertion | None, int]]) -> int:
        if len(self.follower) == _MAX_NODES:
            raise AutomatonTooLarge(f"more than {_MAX_NODES} characters with repetitions written out")
        self.follower.append(follower)
        self.branches.append(branches)
        return len(self.follower) - 1

    def reading(self, chars: _Chars, follower: int) -> int:
        node = self.add(follower, [])
        classes = self.alphabet.classes(chars)
        self.budget.spend(1 + len(classes) // 4)
        for label in classes:
            self.readers[label] |= 1 << node
        return node

    def branching(self, branches: list[tuple[_Assertion | None, int]]) -> int:
        return self.add(None, branches)

    def build(self, tree: _Node, after: int) -> int:
        """The node at which a tree begins that is followed by a node."""
        self.budget.spend(1)
        match tree:
            case _Chars():
                return self.reading(tree, after)
            case _Sequence():
                for part in reversed(tree.parts):
                    after = self.build(part, after)
                return after
            case _Choice():
                return self.branching([(None, self.build(option, after)) for option in tree.options])
            case _Repeat():
                return self.build_repeat(tree, after)
            case _:
                return self.branching([(tree, after)])

    def build_repeat(self, tree: _Repeat, after: int) -> int:
        copies = tree.least
        if tree.most is None:
            loop = self.branching([(None, after)])
            body = self.build(tree.body, loop)
            self.branches[loop].append((None, body))
            after = body if copies else loop
            copies = max(copies - 1, 0)
        else:
            end = after
            for _ in range(tree.most - tree.least):
                after = self.branching([(None, self.build(tree.body, after)), (None, end)])
        for _ in range(copies):
            after = self.build(tree.body, after)
        return after

    def searching(self, node: int) -> int:
        """A node from which the other one is reached anywhere in the text."""
        if not any(self.closure(node, context) for context in (_AFTER_OTHER, _AFTER_WORD)):
            return node  # anchored
        loop = self.branching([(None, node)])
        self.branches[loop].append((None, self.reading(_ANY, loop)))
        return loop

    # Running

    def closure(self, node: int, context: int) -> _Reached:
        """The reading nodes that are reached without reading, and under which duties."""
        if (node, context) not in self.closures:
            reached: _Reached = {}
            stack = [(node, _NO_DUTIES)]
            seen = set(stack)
            while stack:
                here, duties = stack.pop()
                # Masks are as long as there are nodes.
                self.budget.spend(1 + len(duties) // 4 + len(self.follower) // 1024)
                if self.follower[here] is not None:
                    reached[duties] = reached.get(duties, 0) | 1 << here
                for assertion, target in self.branches[here]:
                    under = self.assume(assertion, duties, context)
                    if under is not None and (target, under) not in seen:
                        seen.add((target, under))
                        stack.append((target, under))
            self.closures[node, context] = reached
        return self.closures[node, context]

    def assume(self, assertion: _Assertion | None, duties: _Duties, context: int) -> _Duties | None:
        """The duties under which an assertion holds as well; None if it does not hold."""
        if assertion is None:
            return duties
        if isinstance(assertion, _Start):
            return duties if context == _AT_START else None
        if isinstance(assertion, _Boundary):
            word_follows = (context == _AFTER_WORD) == assertion.negated
            assertion = _WORD_FOLLOWS if word_follows else _NO_WORD_FOLLOWS
        duty = self.first_duty(assertion, context)
        if duty == _BROKEN:
            return None
        return duties if duty == _DONE else duties | {duty}

    def first_duty(self, look: _Look, context: int) -> int:
        if (look, context) not in self.first_duties:
            states = _fewest(self.determined(self.build(look.body, _FOUND), context), self.budget)
            first = len(self.duty_rows)
            never, always = (_DONE, _BROKEN) if look.negated else (_BROKEN, _DONE)
            duties = list(range(first, first + len(states.rows)))
            for state, (row, accepting) in enumerate(zip(states.rows, states.accepting, strict=True)):
                # There are fewest states, so only one accepts everything; only the start can be dead.
                if accepting and set(row) == {state}:
                    duties[state] = always
            if not any(states.accepting):
                duties = [never]
            for row, accepting in zip(states.rows, states.accepting, strict=True):
                self.duty_rows.append([never if target < 0 else duties[target] for target in row])
                self.duty_accepting.append(accepting != look.negated)
            self.first_duties[look, context] = duties[0]
        return self.first_duties[look, context]

    def step(self, subset: _Subset, label: int) -> _Subset:
        """The subset behind a character of a class."""
        reading = []
        for duties, nodes in subset:
            hit = nodes & self.readers[label]
            if hit:
                kept = self.keep(duties, label) if duties else duties
                if kept is not None:
                    reading.append((kept, hit))
        if not reading:
            return _DEAD
        # Classes are alike in most subsets.
        move = (self.contexts[label], tuple(reading))
        if move not in self.moves:
            self.moves[move] = self.move(*move)
        return self.moves[move]

    def keep(self, duties: _Duties, label: int) -> _Duties | None:
        """The duties behind a character of a class; None if one is broken."""
        if (duties, label) not in self.next_duties:
            self.budget.spend(len(duties))
            kept = {self.duty_rows[duty][label] for duty in duties}
            self.next_duties[duties, label] = None if _BROKEN in kept else frozenset(kept - {_DONE})
        return self.next_duties[duties, label]

    def move(self, context: int, reading: tuple[tuple[_Duties, int], ...]) -> _Subset:
        """The subset behind the characters that nodes read under duties."""
        reached: _Reached = {}
        for kept, nodes in reading:
            while nodes:
                self.budget.spend(1 + len(self.follower) // 512)
                lowest = nodes & -nodes
                nodes ^= lowest
                follower = self.follower[lowest.bit_length() - 1]
                assert follower is not None
                for added, targets in self.closure(follower, context).items():
                    under = added | kept
                    reached[under] = reached.get(under, 0) | targets
        return self.settled(reached)

    def settled(self, reached: _Reached) -> _Subset:
        """Without the nodes that are reached under fewer duties as well, or behind which it is found already."""
        groups: list[tuple[_Duties, int]] = []
        for duties, nodes in sorted(reached.items(), key=lambda item: len(item[0])):
            self.budget.spend(len(groups))
            for fewer, others in groups:
                if fewer <= duties:
                    nodes = 0 if others >> _FOUND & 1 else nodes & ~others
            if nodes:
                groups.append((duties, 1 << _FOUND if nodes >> _FOUND & 1 else nodes))
        return frozenset(groups)

    def accepts(self, subset: _Subset) -> bool:
        fulfilled = [nodes for duties, nodes in subset if all(self.duty_accepting[duty] for duty in duties)]
        return any(nodes >> _FOUND & 1 for nodes in fulfilled)

    def determined(self, node: int, context: int) -> _States:
        """The deterministic automaton of what is found from a node on."""
        start = self.settled(self.closure(node, context))
        numbers = {start: 0, _DEAD: -1}
        order = [start]
        rows = []
        for subset in order:
            self.budget.spend(1 + self.alphabet.size * (1 + len(subset)) * (1 + len(self.follower) // 1024) // 2)
            row = []
            for label in range(self.alphabet.size):
                target = self.step(subset, label)
                if target not in numbers:
                    if len(order) == _MAX_SUBSETS:
                        raise AutomatonTooLarge(f"more than {_MAX_SUBSETS} states")
                    numbers[target] = len(order)
                    order.append(target)
                row.append(numbers[target])
            rows.append(row)
        return _States(rows, [self.accepts(subset) for subset in order])


def _fewest(states: _States, budget: _Budget) -> _States:
    """The same language with the fewest states; a dead start state stays.

    Source: Hopcroft, "An n log n algorithm for minimizing states in a finite automaton" (1971), for partial automata.
    """
    into: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for source, row in enumerate(states.rows):
        for label, target in enumerate(row):
            if target >= 0:
                into[target].append((label, source))
    accepting = {state for state, accepts in enumerate(states.accepting) if accepts}
    alive = set(accepting)
    stack = list(accepting)
    while stack:
        for _, source in into[stack.pop()]:
            if source not in alive:
                alive.add(source)
                stack.append(source)
    if 0 not in alive:
        return _States([[-1] * len(states.rows[0])], [False])

    blocks = [block for block in (accepting, alive - accepting) if block]
    block_of = {state: number for number, block in enumerate(blocks) for state in block}
    waiting = set(range(len(blocks)))
    while waiting:
        sources: dict[int, list[int]] = defaultdict(list)
        for target in blocks[waiting.pop()]:
            budget.spend(1 + len(into[target]) // 16)
            for label, source in into[target]:
                if source in alive:
                    sources[label].append(source)
        for members in sources.values():
            touched: dict[int, set[int]] = defaultdict(set)
            for state in members:
                touched[block_of[state]].add(state)
            for number, part in touched.items():
                if len(part) < len(blocks[number]):
                    # The smaller part goes, so that the work on a state is logarithmic.
                    smaller = part if 2 * len(part) <= len(blocks[number]) else blocks[number] - part
                    blocks[number] -= smaller
                    block_of.update(dict.fromkeys(smaller, len(blocks)))
                    waiting.add(len(blocks))
                    blocks.append(smaller)
    return _quotient(states, blocks, block_of)


def _quotient(states: _States, blocks: list[set[int]], block_of: dict[int, int]) -> _States:
    """One state for each block, in the order in which they are reached."""
    members = [next(iter(block)) for block in blocks]
    order = [block_of[0]]
    numbers = {order[0]: 0}
    rows = []
    for block in order:
        row = []
        for target in states.rows[members[block]]:
            found = block_of.get(target)
            if found is not None and found not in numbers:
                numbers[found] = len(order)
                order.append(found)
            row.append(-1 if found is None else numbers[found])
        rows.append(row)
    return _States(rows, [states.accepting[members[block]] for block in order])


# ---------------------------------------------------------------------------------------------------------------------
# Bytes
# ---------------------------------------------------------------------------------------------------------------------


class _Utf8:
    """Writes an automaton over classes out over UTF-8, with as few states inside characters as can be.

    What follows a lead byte is a tree of continuation bytes with classes as leaves. Trees are numbered: 0 leads
    nowhere, then come the classes, then trees of 64 smaller trees; equal ones are one. `targets[tree]` is the state
    behind the tree's root for each state in which the character begins.
    """

    def __init__(self, states: _States, alphabet: _Alphabet) -> None:
        # Classes on which all states agree are one from here on.
        columns, merged = np.unique(np.array(states.rows, dtype=np.int64), axis=1, return_inverse=True)
        self.accepting = states.accepting
        self.alphabet = alphabet
        self.leaves = [*(merged.reshape(-1) + 1).tolist(), 0]
        self.targets = [np.full(len(columns), -1), *columns.T]
        self.trees: dict[tuple[int, ...], int] = {}
        # The states inside characters by their 64 targets.
        self.inner: dict[bytes, int] = {}

    def automaton(self) -> ByteAutomaton:
        outer = len(self.accepting)
        first_bytes = [self.leaves[self.alphabet.label(code)] for code in range(0x80)] + [0] * 0x80
        for lead in range(0xC2, 0xE0):
            first_bytes[lead] = self.tree(1, (lead & 0x1F) << 6)
        for lead in range(0xE0, 0xF0):
            first_bytes[lead] = self.tree(2, (lead & 0xF) << 12, least=0x800)
        for lead in range(0xF0, 0xF5):
            first_bytes[lead] = self.tree(3, (lead & 0x7) << 18, least=0x10000)
        transitions = np.full((outer + len(self.inner), 256), -1, dtype=np.int16)
        transitions[:outer] = np.stack([self.targets[tree] for tree in first_bytes], axis=1)
        for row, number in self.inner.items():
            transitions[number, 0x80:0xC0] = np.frombuffer(row, dtype=np.int64)
        accepting = np.array(self.accepting + [False] * len(self.inner))
        return ByteAutomaton(transitions, accepting, np.ones(len(accepting), dtype=bool))

    def tree(self, level: int, base: int, least: int = 0) -> int:
        """The tree of the 64 ** level code points from a base on, without those below the least (overlong forms)."""
        if level == 0:
            return self.leaves[self.alphabet.label(base)]
        step = 64 ** (level - 1)
        start = bisect_right(self.alphabet.starts, base)
        uniform = start == len(self.alphabet.starts) or self.alphabet.starts[start] >= base + 64 * step
        if uniform and base >= least:
            smaller: tuple[int, ...] = (self.tree(level - 1, base),) * 64
        else:
            bases = range(base, base + 64 * step, step)
            smaller = tuple(0 if code < least else self.tree(level - 1, code) for code in bases)
        if not any(smaller):
            return 0
        if smaller not in self.trees:
            self.trees[smaller] = len(self.targets)
            self.targets.append(self.roots(smaller))
        return self.trees[smaller]

    def roots(self, smaller: tuple[int, ...]) -> np.ndarray:
        """int64 [states in which the character begins]: the states inside it, which are made where they are new."""
        rows = np.stack([self.targets[tree] for tree in smaller], axis=1)
        result = np.full(len(rows), -1)
        for state in np.flatnonzero((rows >= 0).any(axis=1)).tolist():
            number = len(self.accepting) + len(self.inner)
            result[state] = self.inner.setdefault(rows[state].tobytes(), number)
        if len(self.accepting) + len(self.inner) > MAX_STATES:
            raise AutomatonTooLarge(f"more than {MAX_STATES} states")
        return result


@lru_cache(maxsize=256)
def pattern_automaton(pattern: str) -> ByteAutomaton:
    """The texts in which a pattern is found.

    Args:
        pattern: regular expression of ECMA-262 (2024) with unicode semantics, searched anywhere in the text. `^` and
            `$` mean the two ends of the text; `\\d`, `\\w`, `\\b` know ASCII only, `\\s` all of Unicode's white space.
            Of Annex B, `{`, `}` and `]` may stand for themselves, as may any escaped sign. Beyond ECMA-262: `(?i)` in
            front, and `(?P<name>...)`. Not supported: backreferences, lookbehind, other flags, and properties other
            than general categories.

    Returns:
        The automaton with the fewest states over raw text; it accepts nothing where no text fits.

    Raises:
        UnsupportedPatternError: the pattern is malformed, not supported, or too large.

    >>> pattern_automaton("^[a-z]+-[0-9]{2}$").accepts(b"gate-07")
    True
    """
    if len(pattern) > _MAX_PATTERN:
        raise UnsupportedPatternError(
            f"pattern {_quoted(pattern)}: {len(pattern)} characters; at most {_MAX_PATTERN} are supported"
        )
    budget = _Budget()
    parser = _Parser(pattern, budget)
    try:
        tree = parser.whole()
        machine = _Machine(parser.sets.values(), budget)
        node = machine.searching(machine.build(tree, _FOUND))
        states = _fewest(machine.determined(node, _AT_START), budget)
        if states.accepting == [True] and set(states.rows[0]) == {0}:
            return raw_string_automaton()
        return _Utf8(states, machine.alphabet).automaton()
    except AutomatonTooLarge as error:
        advice = "use smaller repetitions, fewer lookaheads, or minLength and maxLength"
        raise UnsupportedPatternError(f"pattern {_quoted(pattern)}: it takes {error}; {advice}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Formats
# ---------------------------------------------------------------------------------------------------------------------


def _ipv6(ipv4: str) -> str:
    """Source: RFC 3986, section 3.2.2, `IPv6address`."""
    group = "[0-9A-Fa-f]{1,4}"
    last_two = f"(?:{group}:{group}|{ipv4})"
    options = [f"(?:{group}:){{6}}{last_two}", f"::(?:{group}:){{5}}{last_two}"]
    for before in range(7):
        left = f"(?:(?:{group}:){{0,{before}}}{group})?::"
        right = [f"(?:{group}:){{{4 - before}}}{last_two}", group, ""][max(0, before - 4)]
        options.append(left + right)
    return f"(?:{'|'.join(options)})"


def _uri(ipv4: str, ipv6: str) -> tuple[str, str]:
    """`URI` and `relative-ref`. Source: RFC 3986, appendix A."""
    plain = r"[\w.~!$&'()*+,;=-]"
    escape = "%[0-9A-Fa-f]{2}"
    path_char = f"(?:{plain}|[:@]|{escape})"
    host = rf"(?:\[(?:{ipv6}|v[0-9A-Fa-f]+\.(?:{plain}|:)+)\]|{ipv4}|(?:{plain}|{escape})*)"
    authority = f"(?:(?:{plain}|:|{escape})*@)?{host}(?::[0-9]*)?"
    rooted = f"//{authority}(?:/{path_char}*)*|/(?:{path_char}+(?:/{path_char}*)*)?"
    rest = rf"(?:\?(?:{path_char}|[/?])*)?(?:#(?:{path_char}|[/?])*)?"
    uri = rf"[A-Za-z][A-Za-z0-9+.-]*:(?:{rooted}|{path_char}+(?:/{path_char}*)*|){rest}"
    relative = f"(?:{rooted}|(?:{plain}|@|{escape})+(?:/{path_char}*)*|){rest}"
    return uri, relative


def _format_patterns() -> dict[str, str]:
    # Years 0001 to 9999: Python's dates know no year 0. Source: RFC 3339, sections 5.6 and 5.7, without leap seconds,
    # which most checkers refuse.
    even_fours = "(?:0[48]|[2468][048]|[13579][26])"
    days = (
        "[0-9]{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|1[0-9]|2[0-8])",
        "[0-9]{4}-(?:0[13-9]|1[0-2])-(?:29|30)",
        "[0-9]{4}-(?:0[13578]|1[02])-31",
        f"(?:[0-9]{{2}}{even_fours}|(?:{even_fours}|00)00)-02-29",
    )
    date = f"(?!0000)(?:{'|'.join(days)})"
    minute = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
    time = rf"{minute}:[0-5][0-9](?:\.[0-9]+)?(?:Z|[+-]{minute})"
    # Source: RFC 3339, appendix A: no unit between others may be left out.
    clock = "T(?:[0-9]+H(?:[0-9]+M(?:[0-9]+S)?)?|[0-9]+M(?:[0-9]+S)?|[0-9]+S)"
    calendar = "(?:[0-9]+Y(?:[0-9]+M(?:[0-9]+D)?)?|[0-9]+M(?:[0-9]+D)?|[0-9]+D)"
    # Source: RFC 1123, section 2.1, and RFC 1035, section 2.3.1.
    label = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
    hostname = rf"{label}(?:\.{label})*"
    # Source: RFC 5321, section 4.1.2, without quoted local parts and address literals; section 4.5.3.1.1 for the 64.
    atom = r"[\w!#$%&'*+/=?^`{|}~-]+"
    byte = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
    ipv4 = rf"{byte}(?:\.{byte}){{3}}"
    ipv6 = _ipv6(ipv4)
    uri, relative = _uri(ipv4, ipv6)
    return {
        "date": date,
        "time": time,
        "date-time": f"{date}T{time}",
        "duration": f"P(?:{calendar}(?:{clock})?|{clock}|[0-9]+W)",
        "email": rf"(?=[^@]{{1,64}}@){atom}(?:\.{atom})*@{hostname}",
        "hostname": hostname,
        "ipv4": ipv4,
        "ipv6": ipv6,
        "json-pointer": "(?:/(?:[^~/]|~[01])*)*",
        "uri": uri,
        "uri-reference": f"(?:{uri}|{relative})",
        "uuid": "[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}",
    }


_FORMAT_PATTERNS = _format_patterns()

# In characters. Source: RFC 1035, section 2.3.4, less what only its wire form has; RFC 5321, section 4.5.3.1.3.
_FORMAT_MAX_LENGTHS = {"hostname": 253, "email": 254}

FORMATS = frozenset(_FORMAT_PATTERNS)


@cache
def format_automaton(name: str) -> ByteAutomaton:
    """The texts of a format, but for the longest of them, see `format_max_length`.

    Every one of them is valid by the RFCs, and passes `jsonschema.Draft202012Validator.FORMAT_CHECKER`.

    Args:
        name: one of `FORMATS`.

    Returns:
        The automaton with the fewest states over raw text.

    Raises:
        KeyError: the name is not in `FORMATS`.
    """
    return pattern_automaton(f"^(?:{_FORMAT_PATTERNS[name]})$")


def format_max_length(name: str) -> int | None:
    """How many characters a text of a format may have, or None: what its automaton leaves to a counter."""
    return _FORMAT_MAX_LENGTHS.get(name)
