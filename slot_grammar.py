"""Token grammars of a call: what a model may write next, and the best string a slot can hold.

Takes scaffolds and a tokenizer, gives `Cursor`, the left-to-right grammar of a whole reply of calls that the
reference and the verification share, and `Canvas`, a drafter's slots with exact joint commits. Knows tensors, but no
torch module.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from .schema_scaffold import (
    ArrayNode,
    DraftSlot,
    Frame,
    Layout,
    Leaf,
    Option,
    Scaffold,
    SlotKind,
    SlotRole,
    argument_segments,
    first_options,
    next_options,
)
from .tokenization_utils import (
    CALL_OPENING,
    IM_END_TOKEN,
    TOOL_CALL_END_TOKEN,
    TOOL_CALL_TOKEN,
    call_segments,
    escape_content,
)

# Longer tokens (runs of spaces, rules of dashes) are never needed to spell a value and would only widen the tables.
MAX_TOKEN_BYTES = 48

NEGATIVE_INFINITY = float("-inf")


# ---------------------------------------------------------------------------------------------------------------------
# Byte automata of the open kinds
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ByteAutomaton:
    """A deterministic automaton over bytes, start state 0.

    Args:
        transitions: int16 [states, 256], next state or -1.
        accepting: bool [states].
    """

    transitions: np.ndarray
    accepting: np.ndarray

    def accepts(self, text: bytes) -> bool:
        """Whether the automaton accepts the whole text."""
        state = 0
        for byte in text:
            state = int(self.transitions[state, byte])
            if state < 0:
                return False
        return bool(self.accepting[state])


class _Builder:
    """Collects named states and edges; states get numbers in the order of their first mention."""

    def __init__(self) -> None:
        self.names: dict[Any, int] = {}
        self.edges: list[tuple[int, int, int]] = []
        self.accepting: set[int] = set()

    def state(self, name: Any, accepting: bool = False) -> int:
        number = self.names.setdefault(name, len(self.names))
        if accepting:
            self.accepting.add(number)
        return number

    def edge(self, source: Any, label: str | bytes | Iterable[int], target: Any) -> None:
        codes = label.encode("latin-1") if isinstance(label, str) else label
        start, end = self.state(source), self.state(target)
        self.edges.extend((start, code, end) for code in codes)

    def build(self) -> ByteAutomaton:
        transitions = np.full((len(self.names), 256), -1, dtype=np.int16)
        for source, code, target in self.edges:
            transitions[source, code] = target
        accepting = np.array([number in self.accepting for number in range(len(self.names))])
        return ByteAutomaton(transitions, accepting)


def _add_utf8(builder: _Builder, home: str) -> None:
    """Edges from and to `home` for every well-formed multi-byte character. Source: Unicode 15, table 3-7."""
    rows = [
        (range(0xC2, 0xE0), range(0x80, 0xC0), 0),
        (range(0xE0, 0xE1), range(0xA0, 0xC0), 1),
        (range(0xE1, 0xED), range(0x80, 0xC0), 1),
        (range(0xED, 0xEE), range(0x80, 0xA0), 1),
        (range(0xEE, 0xF0), range(0x80, 0xC0), 1),
        (range(0xF0, 0xF1), range(0x90, 0xC0), 2),
        (range(0xF1, 0xF4), range(0x80, 0xC0), 2),
        (range(0xF4, 0xF5), range(0x80, 0x90), 2),
    ]
    tail = {0: home, 1: "tail1", 2: "tail2"}
    for lead, second, rest in rows:
        name = f"lead{lead.start:x}"
        builder.edge(home, lead, name)
        builder.edge(name, second, tail[rest])
    builder.edge("tail1", range(0x80, 0xC0), home)
    builder.edge("tail2", range(0x80, 0xC0), "tail1")


@cache
def raw_string_automaton() -> ByteAutomaton:
    """Well-formed UTF-8 without NUL: what a string slot holds before `json.dumps` escapes it."""
    builder = _Builder()
    builder.state("text", accepting=True)
    builder.edge("text", range(1, 0x80), "text")
    _add_utf8(builder, "text")
    return builder.build()


@cache
def escaped_string_automaton() -> ByteAutomaton:
    """Contents of a JSON string exactly as `json.dumps(..., ensure_ascii=False)` writes them, NUL excluded."""
    builder = _Builder()
    builder.state("text", accepting=True)
    builder.edge("text", (code for code in range(0x20, 0x80) if chr(code) not in '"\\'), "text")
    _add_utf8(builder, "text")
    builder.edge("text", "\\", "escape")
    builder.edge("escape", '"\\nrtbf', "text")
    builder.edge("escape", "u", "u")
    builder.edge("u", "0", "u0")
    builder.edge("u0", "0", "u00")
    builder.edge("u00", "0", "u000")
    builder.edge("u00", "1", "u001")
    # json.dumps writes backspace, tab, newline, form feed and return with their short escapes.
    builder.edge("u000", "1234567bef", "text")
    builder.edge("u001", "0123456789abcdef", "text")
    return builder.build()


# A double holds any 15 significant digits exactly (IEEE 754), so a text with at most 15 is the one that Python prints
# back.
_SIGNIFICANT_DIGITS = 15


@cache
def integer_automaton() -> ByteAutomaton:
    """Integers of any length as `json.dumps` writes them: no leading zero, no `-0`."""
    builder = _Builder()
    builder.edge("start", "-", "minus")
    builder.edge("start", "0", "zero")
    builder.edge("start", "123456789", "digits")
    builder.edge("minus", "123456789", "digits")
    builder.edge("digits", "0123456789", "digits")
    builder.state("zero", accepting=True)
    builder.state("digits", accepting=True)
    return builder.build()


@cache
def number_automaton() -> ByteAutomaton:
    """Integers of any length, and decimals of at most 15 significant digits, exactly as `json.dumps` writes them.

    Decimals end in a digit other than 0 except for one 0 behind the point (`12.0`). Magnitudes below 1e-4 and above
    1e16 have an exponent in Python's JSON and are not in this grammar.
    """
    builder = _Builder()
    nonzero = "123456789"

    def digits(source: Any, count: int) -> None:
        """Edges for the next significant digit behind the point, `count` being written."""
        if count < _SIGNIFICANT_DIGITS:
            builder.edge(source, nonzero, ("fraction", count + 1))
            builder.edge(source, "0", ("zeros", count + 1))

    builder.edge("start", "-", "minus")
    for source, zero in (("start", "zero"), ("minus", "minus zero")):
        builder.edge(source, nonzero, ("integer", 1))
        builder.edge(source, "0", zero)
        builder.edge(zero, ".", "0.")
    builder.state("zero", accepting=True)
    builder.edge("0.", nonzero, ("fraction", 1))
    builder.edge("0.", "0", "0.0")
    builder.state("0.0", accepting=True)
    builder.edge("0.0", "0", "0.00")
    builder.edge("0.00", "0", "0.000")
    for source in ("0.0", "0.00", "0.000"):
        builder.edge(source, nonzero, ("fraction", 1))
    for count in range(1, _SIGNIFICANT_DIGITS + 1):
        builder.state(("integer", count), accepting=True)
        builder.state(("fraction", count), accepting=True)
        digits(("fraction", count), count)
        digits(("zeros", count), count)
        if count < _SIGNIFICANT_DIGITS:
            builder.edge(("integer", count), "0123456789", ("integer", count + 1))
            builder.edge(("integer", count), ".", ("point", count))
            builder.edge(("point", count), nonzero, ("fraction", count + 1))
            builder.edge(("point", count), "0", ("point zero", count + 1))
            builder.state(("point zero", count + 1), accepting=True)
            digits(("point zero", count + 1), count + 1)
    # The 0 of `123456789012345.0` is not significant.
    builder.edge(("integer", _SIGNIFICANT_DIGITS), ".", "last point")
    builder.edge("last point", "0", "last zero")
    builder.state("last zero", accepting=True)
    builder.edge(("integer", _SIGNIFICANT_DIGITS), "0123456789", "long integer")
    builder.edge("long integer", "0123456789", "long integer")
    builder.state("long integer", accepting=True)
    return builder.build()


_ESCAPED: dict[SlotKind, Callable[[], ByteAutomaton]] = {
    "string": escaped_string_automaton,
    "integer": integer_automaton,
    "number": number_automaton,
}
_RAW: dict[SlotKind, Callable[[], ByteAutomaton]] = _ESCAPED | {"string": raw_string_automaton}


# ---------------------------------------------------------------------------------------------------------------------
# Lifting to tokens
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TokenAutomaton:
    """A byte automaton lifted to a vocabulary; tokens with the same transitions from every state share a class.

    Args:
        token_class: int64 [vocab], class of each token id.
        transitions: int16 [states, classes], next state or -1; states that cannot reach acceptance are cut off.
        accepting: bool [states].
        distance: int64 [states], fewest tokens to an accepting state.
    """

    token_class: Tensor
    transitions: Tensor
    accepting: Tensor
    distance: Tensor

    @cached_property
    def next_state(self) -> Tensor:
        """int16 [states, vocab]: the next state of every token, or -1."""
        return self.transitions[:, self.token_class]

    def allowed(self, state: int, room: int) -> Tensor:
        """bool [vocab]: tokens after which acceptance is at most `room - 1` tokens away."""
        key = (state, min(room, self.farthest + 1))
        if key not in self._allowed:
            after = self.next_state[state].long()
            self._allowed[key] = (after >= 0) & (self.distance[after.clamp(min=0)] < room)
        return self._allowed[key]

    @cached_property
    def _allowed(self) -> dict[tuple[int, int], Tensor]:
        return {}

    @cached_property
    def farthest(self) -> int:
        """The largest distance; with more budget than this left, no token needs to be refused for lack of room."""
        return int(self.distance.max())


class Vocabulary:
    """A tokenizer seen as bytes, with what is compiled for it.

    Args:
        tokenizer: a fast tokenizer with byte-level decoding, made by `build_tokenizer` or `train_tokenizer`.
        size: width of the model's logits; at least the number of tokens.
        device: where masks and tables live.

    Raises:
        ValueError: the tokenizer is not byte-level, is larger than the model's vocabulary, or cannot spell every byte.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, size: int, device: torch.device | str = "cpu") -> None:
        if type(tokenizer.backend_tokenizer.decoder).__name__ != "ByteLevel":
            raise ValueError("The tokenizer is not byte-level BPE, whose tokens spell bytes: use a base that has one.")
        if len(tokenizer) > size:
            raise ValueError(
                f"The tokenizer has {len(tokenizer)} tokens, the model {size}: they do not belong together."
            )
        self.tokenizer = tokenizer
        self.size = size
        self.device = torch.device(device)
        self.bytes = _token_bytes(tokenizer, size)
        self._byte_tokens = {
            spelled: token for token, spelled in enumerate(self.bytes) if spelled and len(spelled) == 1
        }
        if missing := [
            code for code in range(0xF5) if bytes([code]) not in self._byte_tokens and code not in (0xC0, 0xC1)
        ]:
            raise ValueError(f"The tokenizer has no token for byte {missing[0]:#04x}: it cannot spell every value.")
        self.call_start, self.call_end, self.im_end = tokenizer.convert_tokens_to_ids(
            [TOOL_CALL_TOKEN, TOOL_CALL_END_TOKEN, IM_END_TOKEN]
        )
        self._lifted: dict[ByteAutomaton, TokenAutomaton] = {}
        self._encoded: dict[str, tuple[int, ...]] = {}

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of plain text; names of special tokens in it stay text."""
        if text not in self._encoded:
            if len(self._encoded) > 100_000:
                self._encoded.clear()
            ids = self.tokenizer(escape_content(text), add_special_tokens=False)["input_ids"]
            self._encoded[text] = tuple(ids)
        return self._encoded[text]

    def encode_bytes(self, text: bytes) -> list[int]:
        """Token ids of text that may start inside a character, whose remaining bytes are spelled one by one."""
        start = next((i for i, code in enumerate(text) if code & 0xC0 != 0x80), len(text))
        return [*(self._byte_tokens[text[i : i + 1]] for i in range(start)), *self.encode(text[start:].decode())]

    def spell(self, tokens: Iterable[int]) -> bytes:
        """The bytes that tokens stand for; special tokens, MASK and NULL stand for none."""
        return b"".join(self.bytes[token] or b"" for token in tokens if token < self.size)

    def lift(self, automaton: ByteAutomaton) -> TokenAutomaton:
        """The automaton over this vocabulary's tokens; built once, special tokens are never accepted."""
        if automaton not in self._lifted:
            self._lifted[automaton] = _lift(automaton, self.bytes, self.device)
        return self._lifted[automaton]


def _token_bytes(tokenizer: PreTrainedTokenizerFast, size: int) -> list[bytes | None]:
    """The bytes of every token id, None for added tokens, unused ids and over-long tokens."""
    # Byte-level BPE (GPT-2) writes bytes as printable characters: printable Latin-1 as itself, the others from U+0100
    # on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [code for code in range(256) if code not in set(printable)]
    code_of = {chr(code): code for code in printable} | {chr(256 + i): code for i, code in enumerate(others)}
    added = set(tokenizer.added_tokens_decoder)
    result: list[bytes | None] = [None] * size
    for token, index in tokenizer.get_vocab().items():
        if index not in added and len(token) <= MAX_TOKEN_BYTES and all(character in code_of for character in token):
            result[index] = bytes(code_of[character] for character in token)
    return result


def _lift(automaton: ByteAutomaton, vocabulary: Sequence[bytes | None], device: torch.device) -> TokenAutomaton:
    states = len(automaton.accepting)
    columns = _run_tokens(automaton, vocabulary)  # [states, vocab]
    distance = _distances(columns, automaton.accepting)
    dead = np.flatnonzero(distance < 0)
    columns[np.isin(columns, dead)] = -1
    classes, token_class = np.unique(columns, axis=1, return_inverse=True)
    assert classes.shape[0] == states
    return TokenAutomaton(
        torch.from_numpy(token_class.reshape(-1).astype(np.int64)).to(device),
        torch.from_numpy(classes).to(device),
        torch.from_numpy(automaton.accepting.copy()).to(device),
        torch.from_numpy(distance.astype(np.int64)).to(device),
    )


def _run_tokens(automaton: ByteAutomaton, vocabulary: Sequence[bytes | None]) -> np.ndarray:
    """int16 [states, vocab]: where each token leads from each state; all tokens at once, byte by byte."""
    states = len(automaton.accepting)
    lengths = np.array([len(token or b"") for token in vocabulary])
    codes = np.zeros((len(vocabulary), MAX_TOKEN_BYTES), dtype=np.uint8)
    for index, token in enumerate(vocabulary):
        if token:
            codes[index, : len(token)] = np.frombuffer(token, dtype=np.uint8)
    # One more row stands for "rejected", so that -1 indexes it and stays -1.
    table = np.vstack([automaton.transitions, np.full((1, 256), -1, dtype=np.int16)])
    current = np.repeat(np.arange(states, dtype=np.int16)[:, None], len(vocabulary), axis=1)
    current[:, lengths == 0] = -1
    for position in range(int(lengths.max(initial=0))):
        active = lengths > position
        current[:, active] = table[current[:, active], codes[active, position]]
    return current


def _distances(columns: np.ndarray, accepting: np.ndarray) -> np.ndarray:
    """int64 [states]: fewest tokens to acceptance, -1 where there is no way."""
    distance = np.where(accepting, 0, -1)
    successors = [set(np.unique(row[row >= 0]).tolist()) for row in columns]
    for step in range(1, len(accepting) + 1):
        nearer = {state for state in range(len(accepting)) if distance[state] == step - 1}
        for state in range(len(accepting)):
            if distance[state] < 0 and successors[state] & nearer:
                distance[state] = step
    return distance


# ---------------------------------------------------------------------------------------------------------------------
# The grammar of a reply of calls, left to right
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Place:
    """A point between two texts of a reply.

    `name`: a tool's name is due; `arguments`: the name is written; `value`: a value is due; `gap`: one is finished,
    or an empty container is; `call end`: `</tool_call>` is written; `stop`: the reply is complete.
    """

    kind: str
    tool: Scaffold | None = None
    leaf: Leaf | None = None
    frame: Frame | None = None

    @cached_property
    def key(self) -> tuple[Any, ...]:
        """What the literal texts at this place depend on."""
        chain, frame = list[tuple[int, int]](), self.frame
        while frame is not None:
            done = frame.done
            if isinstance(frame.node, ArrayNode) and frame.node.max_items is None:
                # Behind its minimum an endless array offers the same texts after every item.
                done = min(done, frame.node.min_items + 1)
            chain.append((id(frame.node), done))
            frame = frame.parent
        return (self.kind, id(self.tool), id(self.leaf), *chain)


class _Trie:
    """Literal token sequences that share prefixes, and the places they lead to."""

    def __init__(self) -> None:
        self.children: dict[int, _Trie] = {}
        self.places: list[_Place] = []

    def add(self, tokens: Iterable[int], place: _Place) -> None:
        node = self
        for token in tokens:
            node = node.children.setdefault(token, _Trie())
        node.places.append(place)


@dataclass(frozen=True, eq=False)
class _Literal:
    """Somewhere inside literal text."""

    node: _Trie
    tool: Scaffold | None


@dataclass(frozen=True, eq=False)
class _Value:
    """Somewhere inside a value of an open kind, `used` tokens long so far."""

    place: _Place
    automaton: TokenAutomaton
    state: int
    used: int

    @property
    def tool(self) -> Scaffold | None:
        return self.place.tool


class ReplyGrammar:
    """Every reply that calls one or more of the given tools, as tokens behind the forced opening of the first call.

    Args:
        vocabulary: the tokens.
        scaffolds: the tools that may be called; at least one.
        max_tool_calls: most calls in one reply.
        max_value_tokens: most tokens of one value; at the limit a value may only end (see `Cursor.cut`).
        max_call_tokens: from this many tokens on, a call only takes what the schema requires, so that it ends.
        max_reply_tokens: behind this many tokens no further call begins; None is no limit.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        scaffolds: Sequence[Scaffold],
        max_tool_calls: int,
        max_value_tokens: int,
        max_call_tokens: int,
        max_reply_tokens: int | None = None,
    ) -> None:
        self.vocabulary = vocabulary
        self.scaffolds = tuple(scaffolds)
        self.max_tool_calls = max_tool_calls
        self.max_value_tokens = max_value_tokens
        self.max_call_tokens = max_call_tokens
        self.max_reply_tokens = max_reply_tokens
        self._tries: dict[tuple[Any, ...], tuple[_Trie, _Place]] = {}

    def start(self) -> "Cursor":
        """The cursor behind `<tool_call>\\n{"name": "` of the first call."""
        return Cursor(self, self._enter(_Place("name"), closing=False, more=True))

    def opening(self) -> list[int]:
        """Tokens of the forced opening of a call."""
        return [self.vocabulary.call_start, *self.vocabulary.encode(CALL_OPENING)]

    def _enter(self, place: _Place, closing: bool, more: bool) -> list[_Literal | _Value]:
        """The ways on from a place; `closing`: only what the schema requires, `more`: another call may follow."""
        if place.kind == "stop":
            return []
        if place.kind == "value" and place.leaf is not None and place.leaf.kind != "choice":
            automaton = self.vocabulary.lift(_ESCAPED[place.leaf.kind]())
            return self._at_value(_Value(place, automaton, 0, 0), closing)
        trie = self._trie(place, closing, more)
        ways: list[_Literal | _Value] = [_Literal(trie, place.tool)] if trie.children else []
        for target in trie.places:  # the empty text among the choices is complete at once
            ways.extend(self._enter(target, closing, more))
        return ways

    def _at_value(self, value: _Value, closing: bool) -> list[_Literal | _Value]:
        ways: list[_Literal | _Value] = [value]
        if value.automaton.accepting[value.state]:
            ways.append(_Literal(self._trie(replace(value.place, kind="gap"), closing), value.tool))
        return ways

    def _trie(self, place: _Place, closing: bool, more: bool = True) -> _Trie:
        key = (*place.key, closing, more)
        if key not in self._tries:
            trie = _Trie()
            for tokens, target in self._texts(place, closing, more):
                trie.add(tokens, target)
            self._tries[key] = trie, place  # the place keeps alive the objects whose ids are in the key
        return self._tries[key][0]

    def _texts(self, place: _Place, closing: bool, more: bool) -> list[tuple[Sequence[int], _Place]]:
        """The literal token sequences that may come at a place, and where each leads."""
        encode, tool = self.vocabulary.encode, place.tool
        if place.kind == "name":
            return [
                (encode(call_segments(scaffold.tool, {})[2]), _Place("arguments", scaffold))
                for scaffold in self.scaffolds
            ]
        if place.kind == "call end":
            texts: list[tuple[Sequence[int], _Place]] = [([self.vocabulary.im_end], _Place("stop"))]
            if more:
                texts.append(([*encode("\n"), *self.opening()], _Place("name")))
            return texts
        assert tool is not None
        if place.kind == "value":
            assert place.leaf is not None
            return [(encode(choice), replace(place, kind="gap")) for choice in place.leaf.choices]
        options = first_options(tool) if place.kind == "arguments" else next_options(place.leaf, place.frame)
        prefix = '", "arguments": ' if place.kind == "arguments" else ""
        return [self._option(tool, prefix, option) for option in options if not (closing and option.avoidable)]

    def _option(self, tool: Scaffold, prefix: str, option: Option) -> tuple[Sequence[int], _Place]:
        text = prefix + option.text
        if option.leads_to == "end":
            return [*self.vocabulary.encode(text + "}\n"), self.vocabulary.call_end], _Place("call end")
        return self.vocabulary.encode(text), _Place(option.leads_to, tool, option.leaf, option.frame)


@dataclass(frozen=True, eq=False)
class Cursor:
    """A position in a reply of calls: which tokens may come next, and what the reply holds so far. Immutable.

    Args:
        grammar: the grammar it moves in.
        ways: alternatives that are still open.
        calls: calls finished so far.
        total: tokens of the reply so far, the forced opening left out.
        written: tokens of the call that is being written.
        cut: JSON pointers (in the schema) of values that reached the limit of their length and had to end there; an
            empty pointer for a call that reached its own.
    """

    grammar: ReplyGrammar
    ways: Sequence[_Literal | _Value]
    calls: int = 0
    total: int = 0
    written: int = 0
    cut: tuple[str, ...] = ()

    @property
    def finished(self) -> bool:
        """Whether the reply is complete, `<|im_end|>` included."""
        return not self.ways

    @cached_property
    def tool(self) -> Scaffold | None:
        """The tool of the call being written, once its name leaves only one."""
        tools = {id(way.tool): way.tool for way in self.ways}
        return next(iter(tools.values())) if len(tools) == 1 else None

    @property
    def _closing(self) -> bool:
        return self.written >= self.grammar.max_call_tokens

    def _room(self, value: _Value) -> int:
        """How many tokens a value may still take; in a call that has to end, no more than it needs."""
        room = self.grammar.max_value_tokens - value.used
        return min(room, int(value.automaton.distance[value.state])) if self._closing else room

    @cached_property
    def _literal_tokens(self) -> tuple[int, ...]:
        return tuple(sorted({token for way in self.ways if isinstance(way, _Literal) for token in way.node.children}))

    @cached_property
    def _value_masks(self) -> list[Tensor]:
        """bool [vocab] of each open value that may still grow."""
        values = (way for way in self.ways if isinstance(way, _Value))
        return [value.automaton.allowed(value.state, room) for value in values if (room := self._room(value)) > 0]

    def mask(self) -> Tensor:
        """bool [vocab]: the tokens that may come next; at least one unless finished."""
        vocabulary = self.grammar.vocabulary
        mask = torch.zeros(vocabulary.size, dtype=torch.bool, device=vocabulary.device)
        for allowed in self._value_masks:
            mask |= allowed
        mask[list(self._literal_tokens)] = True
        return mask

    def forced(self) -> int | None:
        """The next token where the grammar leaves no choice, else None."""
        if self._value_masks or len(self._literal_tokens) != 1:
            return None
        return self._literal_tokens[0]

    def choose(self, logits: Tensor) -> int:
        """The constrained argmax.

        Args:
            logits: [vocab], any float dtype; NaN counts as the lowest value.

        Returns:
            The allowed token of the largest logit, the smallest id among equals.
        """
        if not self._value_masks:
            tokens = self._literal_tokens
            return tokens[int(logits[list(tokens)].float().nan_to_num(nan=NEGATIVE_INFINITY).argmax())]
        scores = logits.float().nan_to_num(nan=torch.finfo(torch.float32).min, neginf=torch.finfo(torch.float32).min)
        return int(scores.masked_fill(~self.mask(), NEGATIVE_INFINITY).argmax())

    def advance(self, token: int) -> "Cursor | None":
        """The cursor behind one more token, or None where the grammar does not allow it."""
        ways: list[_Literal | _Value] = []
        grammar, calls, cut, alive = self.grammar, self.calls, self.cut, False
        closing = self.written + 1 >= grammar.max_call_tokens
        room = grammar.max_reply_tokens is None or self.total + 1 < grammar.max_reply_tokens
        more = room and calls + 1 < grammar.max_tool_calls
        for way in self.ways:
            if isinstance(way, _Literal):
                node = way.node.children.get(token)
                if node is None:
                    continue
                alive = True
                if node.children:
                    ways.append(_Literal(node, way.tool))
                for place in node.places:
                    calls += place.kind == "call end"
                    ways.extend(grammar._enter(place, closing, more))
            elif (left := self._room(way)) > 0 and bool(way.automaton.allowed(way.state, left)[token]):
                alive = True
                grown = replace(way, state=int(way.automaton.next_state[way.state, token]), used=way.used + 1)
                ways.extend(grammar._at_value(grown, closing))
                if grown.used == grammar.max_value_tokens and way.place.leaf is not None:
                    cut = (*cut, way.place.leaf.path)
        if not alive:
            return None
        if self.written + 1 == grammar.max_call_tokens and calls == self.calls:
            cut = (*cut, "")
        return Cursor(grammar, ways, calls, self.total + 1, 0 if calls > self.calls else self.written + 1, cut)

    def follow(self, tokens: Iterable[int]) -> list[int]:
        """The longest prefix of `tokens` that the grammar allows from here."""
        cursor, followed = self, []
        for token in tokens:
            advanced = cursor.advance(token)
            if advanced is None:
                break
            cursor = advanced
            followed.append(token)
        return followed


def call_continuation(
    vocabulary: Vocabulary, scaffold: Scaffold, arguments: Mapping[str, Any], written: bytes
) -> list[int]:
    """Tokens that complete a call which is partly written, as the grammar spells them.

    Args:
        vocabulary: the tokens.
        scaffold: the tool.
        arguments: all arguments of the call.
        written: bytes of the call so far, from behind `<tool_call>`.

    Returns:
        The remaining tokens up to `</tool_call>`; empty where the call does not begin with what is written.
    """
    tokens: list[int] = []
    first, *inner, last = argument_segments(scaffold, arguments)
    for segment in [*call_segments(scaffold.tool, {})[1:3], '", "arguments": ' + first, *inner, last + "}\n"]:
        text = segment.encode()
        if written:
            if not written.startswith(text[: len(written)]):
                return []
            text, written = text[len(written) :], written[len(text) :]
        tokens += vocabulary.encode_bytes(text)
    return [] if written else [*tokens, vocabulary.call_end]


# ---------------------------------------------------------------------------------------------------------------------
# The canvas of a drafter, and joint commits
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class CanvasSlot:
    """A slot of the layout as positions of the canvas.

    Args:
        slot: what it is.
        start, length: its positions are `start .. start + length - 1`.
        automaton: raw-text automaton of an open kind, else None.
        choices: int64 [choices, length], token ids of each choice padded with NULL; None for an open kind.
    """

    slot: DraftSlot
    start: int
    length: int
    automaton: TokenAutomaton | None
    choices: Tensor | None

    @property
    def positions(self) -> slice:
        return slice(self.start, self.start + self.length)


@dataclass(frozen=True)
class SlotView:
    """A slot as a viewer shows it.

    Args:
        path, role: of the slot.
        tokens: text of each position, `""` for NULL, None where it is masked.
    """

    path: str
    role: SlotRole
    tokens: tuple[str | None, ...]


@dataclass(frozen=True, eq=False)
class Canvas:
    """One call laid out as tokens, its slots masked.

    Args:
        vocabulary: the tokens.
        layout: the texts and slots.
        token_ids: int64 [positions]: fixed tokens, MASK inside the slots.
        slots: one for each slot of the layout.
        mask_id, null_id: ids of MASK and NULL, at or above the vocabulary's size.
    """

    vocabulary: Vocabulary
    layout: Layout
    token_ids: Tensor
    slots: tuple[CanvasSlot, ...]
    mask_id: int
    null_id: int

    def text(self, slot: CanvasSlot, tokens: Tensor) -> str:
        """The text of a slot's tokens; NULL is nothing."""
        return self.vocabulary.spell(tokens.tolist()).decode()

    def view(self, ids: Tensor) -> list[str | SlotView]:
        """Fixed texts and slots of a filled or partly filled canvas (int64 [positions]), in reading order."""
        tokens, shown, place = ids.tolist(), list[str | SlotView](), 0
        for slot in self.slots:
            shown.append(self.vocabulary.spell(tokens[place : slot.start]).decode())
            held = (self.vocabulary.spell([token]).decode(errors="replace") for token in tokens[slot.positions])
            masked = (token == self.mask_id for token in tokens[slot.positions])
            texts = tuple(None if hidden else text for hidden, text in zip(masked, held, strict=True))
            shown.append(SlotView(slot.slot.path, slot.slot.role, texts))
            place = slot.start + slot.length
        return [*shown, self.vocabulary.spell(tokens[place:]).decode()]

    def overflows(self, slot: CanvasSlot, tokens: Tensor) -> bool:
        """Whether a value of an open kind fills its slot to the last position, so that it may go on behind it."""
        return slot.automaton is not None and int(tokens[-1]) < self.vocabulary.size

    def tokens_of(self, slot: CanvasSlot, text: str | None) -> Tensor:
        """int64 [length]: a text as the slot holds it, cut at the slot's end, padded with NULL; None is all NULL."""
        tokens = list(self.vocabulary.encode(text))[: slot.length] if text is not None else []
        return torch.tensor(tokens + [self.null_id] * (slot.length - len(tokens)), dtype=torch.long)


def build_canvas(
    vocabulary: Vocabulary, layout: Layout, budgets: Mapping[SlotKind, int] | Sequence[int], mask_id: int, null_id: int
) -> Canvas:
    """Lay a call out as tokens.

    Args:
        vocabulary: the tokens.
        layout: texts and slots of the tool.
        budgets: positions of an open slot by its kind, or one number for every slot of the layout (closed slots
            ignore theirs).
        mask_id, null_id: ids of MASK and NULL.

    Returns:
        The canvas of the whole call, `<tool_call>` to `</tool_call>`.
    """
    tokens: list[int] = [vocabulary.call_start, *vocabulary.encode(CALL_OPENING)]
    tokens += vocabulary.encode(call_segments(layout.scaffold.tool, {})[2])
    slots: list[CanvasSlot] = []
    pieces = ['", "arguments": ' + str(layout.pieces[0]), *layout.pieces[1:-1], str(layout.pieces[-1]) + "}\n"]
    if len(layout.pieces) == 1:
        pieces = ['", "arguments": ' + str(layout.pieces[0]) + "}\n"]
    for piece in pieces:
        if isinstance(piece, str):
            tokens += vocabulary.encode(piece)
            continue
        slot = layout.slots[piece]
        choices = _choice_table(vocabulary, slot.leaf.choices, null_id) if slot.leaf.kind == "choice" else None
        automaton = None if choices is not None else vocabulary.lift(_RAW[slot.leaf.kind]())
        if choices is not None:
            length = choices.shape[1]
        else:
            length = budgets[slot.leaf.kind] if isinstance(budgets, Mapping) else budgets[piece]
        slots.append(CanvasSlot(slot, len(tokens), length, automaton, choices))
        tokens += [mask_id] * length
    tokens.append(vocabulary.call_end)
    ids = torch.tensor(tokens, dtype=torch.long, device=vocabulary.device)
    return Canvas(vocabulary, layout, ids, tuple(slots), mask_id, null_id)


def _choice_table(vocabulary: Vocabulary, choices: Sequence[str], null_id: int) -> Tensor:
    rows = [vocabulary.encode(choice) for choice in choices]
    # One position at least, so that the choice among a single empty text still has a place.
    length = max(1, max(map(len, rows)))
    return torch.tensor([[*row, *[null_id] * (length - len(row))] for row in rows], device=vocabulary.device)


@dataclass(frozen=True, eq=False)
class Commit:
    """The best string of a slot.

    Args:
        tokens: int64 [length], content and then NULL.
        confidence: float32 [length], probability of each position's token; for closed slots that of the whole choice
            among the choices.
        score: sum of the log-probabilities along the string.
    """

    tokens: Tensor
    confidence: Tensor
    score: float


def commit_slot(slot: CanvasSlot, log_probs: Tensor, fixed: Tensor, null_id: int) -> Commit | None:
    """The exact best string of a slot, never an independent argmax per position.

    Args:
        slot: the slot.
        log_probs: float [length, vocab + 2], log-probabilities of every position; any values, NaN counts as impossible.
        fixed: int64 [length], a token or NULL where the position is committed, -1 where it is free.
        null_id: id of NULL.

    Returns:
        The commit, or None where no string of the slot has the fixed positions.
    """
    scores = log_probs.float().nan_to_num(nan=-1e4).clamp(-1e4, 1e4)
    if slot.choices is not None:
        return _commit_choice(slot.choices, scores, fixed)
    assert slot.automaton is not None
    return _commit_open(slot.automaton, scores, fixed, null_id)


def _commit_choice(choices: Tensor, scores: Tensor, fixed: Tensor) -> Commit | None:
    possible = ((fixed < 0) | (choices == fixed)).all(dim=1)  # [choices]
    if not bool(possible.any()):
        return None
    totals = scores.gather(1, choices.T).sum(dim=0).masked_fill(~possible, NEGATIVE_INFINITY)  # [choices]
    best = int(totals.argmax())
    confidence = torch.softmax(totals, dim=0)[best]
    return Commit(choices[best], confidence.expand(choices.shape[1]), float(totals[best]))


def _commit_open(automaton: TokenAutomaton, scores: Tensor, fixed: Tensor, null_id: int) -> Commit | None:
    """Viterbi over (position, state); the last state is the tail of NULLs, entered from accepting ones, never left."""
    length, states, vocab = len(fixed), len(automaton.accepting), automaton.token_class.shape[0]
    free = fixed < 0
    only = torch.full_like(scores, NEGATIVE_INFINITY).scatter(1, fixed.clamp(min=0)[:, None], 0.0)
    scores = torch.where(free[:, None], scores, only)
    steps = scores.new_full((length, states + 1, states + 1), NEGATIVE_INFINITY)
    steps[:, :states, :states] = _best_by_step(automaton, scores[:, :vocab])
    null = scores[:, null_id, None]
    steps[:, :states, states] = torch.where(automaton.accepting, null, NEGATIVE_INFINITY)
    steps[:, states, states] = null[:, 0]

    best = scores.new_full((states + 1,), NEGATIVE_INFINITY)
    best[0] = 0.0
    origins = []
    for position in range(length):
        best, came_from = (best[:, None] + steps[position]).max(dim=0)
        origins.append(came_from)
    best[:states].masked_fill_(~automaton.accepting, NEGATIVE_INFINITY)
    state = int(best.argmax())
    total = float(best[state])
    if total == NEGATIVE_INFINITY:
        return None
    tokens = fixed.new_full((length,), null_id)
    for position in reversed(range(length)):
        origin = int(origins[position][state])
        if state < states:
            fits = automaton.next_state[origin] == state
            tokens[position] = scores[position, :vocab].masked_fill(~fits, NEGATIVE_INFINITY).argmax()
        state = origin
    confidence = scores.gather(1, tokens[:, None])[:, 0].exp()
    return Commit(tokens, confidence, total)


def _best_by_step(automaton: TokenAutomaton, scores: Tensor) -> Tensor:
    """float32 [length, states, states]: the best score of any token that leads from one state to another."""
    states, classes = automaton.transitions.shape
    by_class = scores.new_full((len(scores), classes), NEGATIVE_INFINITY)
    by_class.scatter_reduce_(1, automaton.token_class.expand(len(scores), -1), scores, "amax")
    source, label = torch.nonzero(automaton.transitions >= 0, as_tuple=True)
    pair = source * states + automaton.transitions[source, label]
    steps = scores.new_full((len(scores), states * states), NEGATIVE_INFINITY)
    steps.scatter_reduce_(1, pair.expand(len(scores), -1), by_class[:, label], "amax")
    return steps.view(-1, states, states)
