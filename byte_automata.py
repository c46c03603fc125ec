"""Automata over bytes: languages of texts, their algebra, and the texts of strings.

Pure numpy: no tokens, no tensors, no schema. Strings are automata over the raw UTF-8 text of the value;
`ByteAutomaton.escaped` turns one into the automaton of its JSON text.
"""

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from itertools import pairwise

import numpy as np

# A bound on hostile patterns: building stops at this many states instead of eating time and memory.
MAX_STATES = 4096

_CONTINUATION = (np.arange(256) & 0xC0) == 0x80


class AutomatonTooLarge(ValueError):
    """An automaton would need more than `MAX_STATES` states."""


@dataclass(frozen=True, eq=False)
class ByteAutomaton:
    """A deterministic automaton over bytes, start state 0. Compared by identity, so share instances.

    Args:
        transitions: int16 [states, 256], next state or -1.
        accepting: bool [states].
        counting: bool [states], whether a byte that is read here and begins a character counts as one; False inside
            the escapes of JSON text, whose backslash has counted already.
    """

    transitions: np.ndarray
    accepting: np.ndarray
    counting: np.ndarray

    def state(self, text: bytes) -> int:
        """The state behind a text, or -1 where nothing accepted begins with it."""
        state = 0
        for byte in text:
            state = int(self.transitions[state, byte])
            if state < 0:
                break
        return state

    def accepts(self, text: bytes) -> bool:
        """Whether the automaton accepts the whole text."""
        state = self.state(text)
        return state >= 0 and bool(self.accepting[state])

    def viable(self, text: bytes, complete: bool) -> bool:
        """Whether a text is accepted or, unless it is complete, may become one that is."""
        return self.accepts(text) if complete else self.state(text) >= 0

    def completed(self, text: bytes) -> bytes:
        """A text that accepted ones begin with, brought to acceptance with as few characters as possible."""
        state, written = self.state(text), bytearray(text)
        while not self.accepting[state]:
            after = self.transitions[state]
            begins = (self.counting[state] & ~_CONTINUATION).astype(np.int64)
            needed = (begins + self.chars_needed[after]) * (1 << 20) + self.bytes_needed[after]
            byte = int(np.where(after >= 0, needed, np.iinfo(np.int64).max).argmin())
            written.append(byte)
            state = int(after[byte])
        return bytes(written)

    @property
    def empty(self) -> bool:
        """Whether it accepts nothing (every automaton that leaves this module is trimmed)."""
        return not bool(self.accepting.any())

    @cached_property
    def edges(self) -> np.ndarray:
        """int64 [edges, 4]: source, target, whether a character begins, number of bytes; without repetitions."""
        states = len(self.accepting)
        source, byte = np.nonzero(self.transitions >= 0)
        begins = self.counting[source] & ~_CONTINUATION[byte]
        # One number an edge: sorting numbers is many times faster than sorting rows.
        packed, count = np.unique((source * states + self.transitions[source, byte]) * 2 + begins, return_counts=True)
        return np.stack([packed // 2 // states, packed // 2 % states, packed % 2, count], axis=1)

    @cached_property
    def _needed(self) -> tuple[np.ndarray, np.ndarray]:
        far = 1 << 40
        best = [(far, far)] * len(self.accepting)
        into: dict[int, list[tuple[int, int]]] = {}
        for source, target, begins, _ in self.edges.tolist():
            into.setdefault(target, []).append((source, begins))
        queue = [(0, 0, int(state)) for state in np.flatnonzero(self.accepting)]
        for _, _, state in queue:
            best[state] = (0, 0)
        while queue:
            chars, size, state = heapq.heappop(queue)
            if (chars, size) > best[state]:
                continue
            for source, begins in into.get(state, []):
                candidate = (chars + begins, size + 1)
                if candidate < best[source]:
                    best[source] = candidate
                    heapq.heappush(queue, (*candidate, source))
        table = np.array(best, dtype=np.int64)
        return table[:, 0], table[:, 1]

    @property
    def chars_needed(self) -> np.ndarray:
        """int64 [states]: fewest further characters to acceptance."""
        return self._needed[0]

    @property
    def bytes_needed(self) -> np.ndarray:
        """int64 [states]: fewest bytes of a completion that has `chars_needed` characters."""
        return self._needed[1]

    @cached_property
    def _sizes(self) -> tuple[list[float], list[float]]:
        """Number and longest length in bytes of the completions of each state; infinite where a cycle is reachable."""
        count = [float("inf")] * len(self.accepting)
        longest = [float("inf")] * len(self.accepting)
        leaving: dict[int, list[tuple[int, int]]] = {}
        into: dict[int, list[int]] = {}
        for source, target, _, times in self.edges.tolist():
            leaving.setdefault(source, []).append((target, times))
            into.setdefault(target, []).append(source)
        waiting = {state: len(leaving.get(state, [])) for state in range(len(count))}
        ready = [state for state, left in waiting.items() if left == 0]
        while ready:
            state = ready.pop()
            count[state] = float(self.accepting[state]) + sum(n * count[to] for to, n in leaving.get(state, []))
            longest[state] = max([0.0, *(1 + longest[to] for to, _ in leaving.get(state, []))])
            for source in into.get(state, []):
                waiting[source] -= 1
                if waiting[source] == 0:
                    ready.append(source)
        return count, longest

    @property
    def strings(self) -> list[float]:
        """How many texts lead from each state to acceptance, the empty one included; may be infinite."""
        return self._sizes[0]

    def has_more(self, state: int, chars: int, count: int) -> bool:
        """Whether more than `count` texts lead from a state to acceptance, of at most so many further characters."""
        reached, found = {(state, 0): 1}, 0
        while reached:
            found += sum(ways for (place, _), ways in reached.items() if self.accepting[place])
            if found > count:
                return True
            after: dict[tuple[int, int], int] = {}
            for (place, used), ways in reached.items():
                for target, begins, times in self._leaving[place]:
                    if used + begins + self.chars_needed[target] <= chars:
                        key = (target, used + begins)
                        after[key] = min(after.get(key, 0) + ways * times, count + 1)
            reached = after
        return False

    @cached_property
    def _leaving(self) -> list[list[tuple[int, int, int]]]:
        """Of each state: targets, whether a character begins, number of bytes."""
        found: list[list[tuple[int, int, int]]] = [[] for _ in self.accepting]
        for source, target, begins, times in self.edges.tolist():
            found[source].append((target, begins, times))
        return found

    @property
    def longest(self) -> float:
        """Bytes of the longest accepted text; may be infinite."""
        return self._sizes[1][0]

    @cached_property
    def escaped(self) -> "ByteAutomaton":
        """The contents of the JSON strings, as `json.dumps(..., ensure_ascii=False)` writes them, of the raw texts."""
        return _escaped(self)


# ---------------------------------------------------------------------------------------------------------------------
# Building
# ---------------------------------------------------------------------------------------------------------------------


def explore(
    start: int,
    row: Callable[[int], np.ndarray],
    accepts: Callable[[int], bool],
    counts: Callable[[int], bool] = lambda code: True,
) -> ByteAutomaton:
    """Build the automaton that is reachable from a start state.

    Args:
        start: code of the start state, any non-negative int.
        row: int64 [256], code of the next state for each byte or -1, of a state's code.
        accepts: whether a state accepts.
        counts: whether characters that begin in a state are counted.

    Returns:
        The automaton, trimmed: without states that cannot reach acceptance.

    Raises:
        AutomatonTooLarge: it has more than `MAX_STATES` states.
    """
    numbers = {start: 0}
    order = [start]
    rows = np.full((64, 256), -1, dtype=np.int16)
    for done, state in enumerate(order):
        if done == len(rows):
            rows = np.concatenate([rows, np.full_like(rows, -1)])
        codes = row(state)
        # Neighbouring bytes mostly lead to the same state: look each run of them up once.
        changes = (np.flatnonzero(codes[1:] != codes[:-1]) + 1).tolist()
        for first, last in pairwise([0, *changes, 256]):
            code = int(codes[first])
            if code >= 0:
                if code not in numbers:
                    if len(order) >= MAX_STATES:
                        raise AutomatonTooLarge(f"more than {MAX_STATES} states")
                    numbers[code] = len(order)
                    order.append(code)
                rows[done, first:last] = numbers[code]
    accepting = np.array([accepts(code) for code in order])
    return _trim(rows[: len(order)], accepting, np.array([counts(code) for code in order]))


def _trim(transitions: np.ndarray, accepting: np.ndarray, counting: np.ndarray) -> ByteAutomaton:
    """Cut off what cannot be reached or cannot reach acceptance; the start state stays."""
    states = len(accepting)
    source, byte = np.nonzero(transitions >= 0)
    source, target = np.divmod(np.unique(source * states + transitions[source, byte]), states)
    alive = _reached(states, [0], source, target)
    alive &= _reached(states, np.flatnonzero(accepting).tolist(), target, source)
    number = np.append(np.where(alive, np.cumsum(alive) - 1, -1), -1)
    alive[0] = True  # also where nothing is accepted, and no edge is left
    return ByteAutomaton(number[transitions[alive]].astype(np.int16), accepting[alive], counting[alive])


def _reached(states: int, start: list[int], source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """bool [states]: what some states lead to along edges."""
    order = np.argsort(source, kind="stable")
    first = np.searchsorted(source[order], np.arange(states + 1)).tolist()
    after = target[order].tolist()
    reached = [False] * states
    waiting = list(start)
    while waiting:
        state = waiting.pop()
        if not reached[state]:
            reached[state] = True
            waiting.extend(after[first[state] : first[state + 1]])
    return np.array(reached)


def minimised(automaton: ByteAutomaton) -> ByteAutomaton:
    """The same language with the fewest states. Source: Moore's partition refinement."""
    _, distinct = np.unique(_numbered(automaton.transitions.T), return_index=True)
    columns = automaton.transitions[:, distinct]
    kind = automaton.accepting * 2 + automaton.counting
    # Hashes of rows sort many times faster than rows. Equal rows have equal hashes, so that nothing is split in vain;
    # rows whose hashes are equal by chance are told apart by the rows themselves at the end.
    weights = np.random.default_rng(0).integers(2**63, size=columns.shape[1] + 1, dtype=np.int64)
    group = _refined(_numbered(kind), lambda group: group * weights[0] + np.append(group, -1)[columns] @ weights[1:])
    group = _numbered(np.stack([kind, group], axis=1))
    group = _refined(group, lambda group: np.concatenate([group[:, None], np.append(group, -1)[columns]], axis=1))
    _, member = np.unique(group, return_index=True)
    order = np.argsort(member)  # the group of the start state comes first
    number = np.append(np.argsort(order)[group], -1)
    chosen = member[order]
    return _trim(
        number[automaton.transitions[chosen]].astype(np.int16), automaton.accepting[chosen], automaton.counting[chosen]
    )


def _refined(group: np.ndarray, looks: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Groups of states, split until those of one group look alike; all int64 [states], looks [states] or wider."""
    while True:
        finer = _numbered(looks(group))
        if finer.max() == group.max():
            return group
        group = finer


def _numbered(keys: np.ndarray) -> np.ndarray:
    """int64 [rows]: a number for each different row."""
    if keys.ndim == 1:
        return np.unique(keys, return_inverse=True)[1]
    numbers: dict[bytes, int] = {}
    return np.array([numbers.setdefault(row.tobytes(), len(numbers)) for row in keys])


def _product(a: ByteAutomaton, b: ByteAutomaton, accept: Callable[[bool, bool], bool]) -> ByteAutomaton:
    """Run both side by side; a state of either may be dead."""
    width = len(b.accepting) + 1

    def row(code: int) -> np.ndarray:
        left, right = divmod(code, width)
        first = a.transitions[left - 1].astype(np.int64) + 1 if left else np.zeros(256, dtype=np.int64)
        second = b.transitions[right - 1].astype(np.int64) + 1 if right else np.zeros(256, dtype=np.int64)
        # Where only one may go on, follow only what can still be accepted.
        alive = np.ones(256, dtype=bool)
        alive &= (first > 0) | accept(False, True)
        alive &= (second > 0) | accept(True, False)
        alive &= (first > 0) | (second > 0)
        return np.where(alive, first * width + second, -1)

    def accepts(code: int) -> bool:
        left, right = divmod(code, width)
        return accept(bool(left and a.accepting[left - 1]), bool(right and b.accepting[right - 1]))

    return explore(width + 1, row, accepts)


@lru_cache(maxsize=1024)
def intersection(a: ByteAutomaton, b: ByteAutomaton) -> ByteAutomaton:
    """Texts of both languages. Raises `AutomatonTooLarge`."""
    return _product(a, b, lambda left, right: left and right)


@lru_cache(maxsize=1024)
def union(a: ByteAutomaton, b: ByteAutomaton) -> ByteAutomaton:
    """Texts of either language. Raises `AutomatonTooLarge`."""
    return _product(a, b, lambda left, right: left or right)


@lru_cache(maxsize=1024)
def difference(a: ByteAutomaton, b: ByteAutomaton) -> ByteAutomaton:
    """Texts of the first language that are not in the second. Raises `AutomatonTooLarge`."""
    return _product(a, b, lambda left, right: left and not right)


@lru_cache(maxsize=1024)
def at_least(automaton: ByteAutomaton, chars: int) -> ByteAutomaton:
    """Raw texts of a language with at least so many characters (code points). Raises `AutomatonTooLarge`."""
    if chars > MAX_STATES:  # each count is a state of its own
        if automaton.longest < chars:
            return finite([])
        raise AutomatonTooLarge(f"more than {MAX_STATES} states")
    width = chars + 1

    def row(code: int) -> np.ndarray:
        state, count = divmod(code, width)
        counts = np.where(_CONTINUATION, count, min(count + 1, chars))
        target = automaton.transitions[state].astype(np.int64)
        return np.where(target >= 0, target * width + counts, -1)

    return explore(0, row, lambda code: bool(automaton.accepting[code // width]) and code % width == chars)


@lru_cache(maxsize=1024)
def at_most(automaton: ByteAutomaton, chars: int) -> ByteAutomaton:
    """Raw texts of a language with at most so many characters (code points). Raises `AutomatonTooLarge`."""
    if automaton.longest <= chars:
        return automaton
    if chars > MAX_STATES:  # each count is a state of its own
        raise AutomatonTooLarge(f"more than {MAX_STATES} states")
    width = chars + 1

    def row(code: int) -> np.ndarray:
        state, count = divmod(code, width)
        counts = np.where(_CONTINUATION, count, count + 1)
        target = automaton.transitions[state].astype(np.int64)
        return np.where((target >= 0) & (counts <= chars), target * width + counts, -1)

    return explore(0, row, lambda code: bool(automaton.accepting[code // width]))


def finite(texts: Iterable[bytes]) -> ByteAutomaton:
    """Exactly the given texts. Raises `AutomatonTooLarge`."""
    children: list[dict[int, int]] = [{}]
    ends = set()
    for text in texts:
        node = 0
        for code in text:
            if code not in children[node]:
                if len(children) >= MAX_STATES:
                    raise AutomatonTooLarge(f"more than {MAX_STATES} states")
                children[node][code] = len(children)
                children.append({})
            node = children[node][code]
        ends.add(node)

    def row(code: int) -> np.ndarray:
        result = np.full(256, -1, dtype=np.int64)
        for byte, target in children[code].items():
            result[byte] = target
        return result

    return explore(0, row, lambda code: code in ends)


_SHORT_ESCAPES = {'"': '"', "\\": "\\", "n": "\n", "r": "\r", "t": "\t", "f": "\f", "b": "\b"}


def _escaped(raw: ByteAutomaton) -> ByteAutomaton:
    """Seven states for each raw one: plain text, and behind `\\`, `\\u`, `\\u0`, `\\u00`, `\\u000` or `\\u001`."""
    plain, slash, u, u0, u00, u000, u001 = range(7)
    states = len(raw.accepting)
    here, after = np.arange(states, dtype=np.int16), raw.transitions
    table = np.full((7, states, 256), -1, dtype=np.int16)
    table[plain, :, 0x20:] = after[:, 0x20:]
    table[plain, :, ord('"')] = -1
    table[plain, :, ord("\\")] = slash * states + here
    for letter, char in _SHORT_ESCAPES.items():
        table[slash, :, ord(letter)] = after[:, ord(char)]
    for source, label, target in ((slash, "u", u), (u, "0", u0), (u0, "0", u00), (u00, "0", u000), (u00, "1", u001)):
        table[source, :, ord(label)] = target * states + here
    # json.dumps writes backspace, tab, newline, form feed and return with their short escapes.
    for source, base, digits in ((u000, 0x00, "1234567bef"), (u001, 0x10, "0123456789abcdef")):
        for digit in digits:
            table[source, :, ord(digit)] = after[:, base + int(digit, 16)]
    accepting, counting = np.zeros((2, 7, states), dtype=bool)
    accepting[plain], counting[plain] = raw.accepting, True
    return _trim(table.reshape(7 * states, 256), accepting.reshape(-1), counting.reshape(-1))


# ---------------------------------------------------------------------------------------------------------------------
# Strings
# ---------------------------------------------------------------------------------------------------------------------

# Well-formed characters of several bytes: lead bytes, second bytes, bytes behind those. Source: Unicode 15, table 3-7.
_UTF8 = (
    (0xC2, 0xDF, 0x80, 0xBF, 0),
    (0xE0, 0xE0, 0xA0, 0xBF, 1),
    (0xE1, 0xEC, 0x80, 0xBF, 1),
    (0xED, 0xED, 0x80, 0x9F, 1),
    (0xEE, 0xEF, 0x80, 0xBF, 1),
    (0xF0, 0xF0, 0x90, 0xBF, 2),
    (0xF1, 0xF3, 0x80, 0xBF, 2),
    (0xF4, 0xF4, 0x80, 0x8F, 2),
)


@cache
def raw_string_automaton() -> ByteAutomaton:
    """Well-formed UTF-8 without NUL: what a string slot holds before `json.dumps` escapes it."""
    # State 0 is between characters, 1 and 2 have so many continuation bytes before them, the others are behind a lead.
    transitions = np.full((3 + len(_UTF8), 256), -1, dtype=np.int16)
    transitions[0, 0x01:0x80] = 0
    transitions[1, 0x80:0xC0] = 0
    transitions[2, 0x80:0xC0] = 1
    for state, (lead, last_lead, second, last_second, behind) in enumerate(_UTF8, start=3):
        transitions[0, lead : last_lead + 1] = state
        transitions[state, second : last_second + 1] = behind
    accepting = np.arange(len(transitions)) == 0
    return minimised(ByteAutomaton(transitions, accepting, np.ones_like(accepting)))
