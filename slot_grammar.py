"""Tokens seen as bytes, automata over tokens, and the best string that each slot of a drafted call can hold.

Takes a tokenizer and layouts. Gives `Vocabulary`, which lifts byte automata to tokens (kept on disk where that is
dear), `Canvas`, a call laid out as tokens with masked slots, exact joint commits of slots and their exact marginals.
Knows tensors, but no torch module.
"""

import codecs
import hashlib
import itertools
import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import constants as hub
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_safetensors
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from .byte_automata import AutomatonTooLarge, ByteAutomaton
from .scaffold_layout import DraftSlot, Layout, SlotRole
from .schema_scaffold import Leaf, SlotKind
from .tokenization_utils import (
    CALL_OPENING,
    IM_END_TOKEN,
    THINK_END_TOKEN,
    THINK_TOKEN,
    TOOL_CALL_END_TOKEN,
    TOOL_CALL_TOKEN,
    call_segments,
    escape_content,
)

logger = logging.get_logger(__name__)

# Longer tokens (runs of spaces, rules of dashes) are never needed to spell a value and would only widen the tables.
MAX_TOKEN_BYTES = 48

NEGATIVE_INFINITY = float("-inf")
# Kinds of device that have no float64.
NO_FLOAT64 = ("mps",)


# ---------------------------------------------------------------------------------------------------------------------
# Automata over tokens
# ---------------------------------------------------------------------------------------------------------------------

# A mask is as wide as the vocabulary and takes a fraction of a millisecond to make: keep the last few.
_MAX_MASKS = 16


@dataclass(frozen=True, eq=False)
class TokenAutomaton:
    """A byte automaton lifted to a vocabulary, start state 0; tokens that do the same in every state share a class.

    Args:
        token_class: int32 [vocab], class of each token id; class 0 is accepted nowhere.
        transitions: int16 [states, classes], next state or -1.
        chars: int8 [states, classes], characters that a token of the class begins there.
        accepting: bool [states].
        chars_needed, bytes_needed: int64 [states], as of the byte automaton.
        device: where masks are made.
    """

    token_class: np.ndarray
    transitions: np.ndarray
    chars: np.ndarray
    accepting: np.ndarray
    chars_needed: np.ndarray
    bytes_needed: np.ndarray
    device: torch.device

    def step(self, state: int, token: int) -> tuple[int, int]:
        """The state behind one more token, or -1, and the characters that the token begins."""
        label = self.token_class[token]
        return int(self.transitions[state, label]), int(self.chars[state, label])

    def accepts(self, state: int) -> bool:
        """Whether a value may end in a state."""
        return bool(self.accepting[state])

    def grows(self, state: int, chars_left: int | None) -> bool:
        """Whether any token may follow in a state, with so many characters left (None: any number)."""
        return bool(self._allowed_classes(state, None, chars_left).any())

    def allowed(self, state: int, room: int, chars_left: int | None) -> Tensor:
        """The tokens that may come next in a value whose length is limited.

        A value without room may only finish, on a shortest way.

        Args:
            state: where it is.
            room: how many tokens the value may still take; may be negative.
            chars_left: how many characters it may still begin, at least `chars_needed[state]`; None is no limit.

        Returns:
            bool [vocab], shared: do not change it. Empty where the state accepts and no room is left.
        """
        limit = max(room - 1, int(self.bytes_needed[state]) - 1)
        if chars_left is not None and chars_left >= self._chars_at_most[state]:
            chars_left = None
        key = (state, min(limit, self._farthest), chars_left)
        if key not in self._masks:
            if len(self._masks) >= _MAX_MASKS:
                self._masks.clear()
            classes = torch.from_numpy(self._allowed_classes(state, limit, chars_left)).to(self.device)
            self._masks[key] = classes.index_select(0, self._class_index)
        return self._masks[key]

    def _allowed_classes(self, state: int, limit: int | None, chars_left: int | None) -> np.ndarray:
        """bool [classes]: what leads to a state with `bytes_needed` up to the limit, within the characters left."""
        after = self.transitions[state]
        allowed = after >= 0
        if limit is not None:
            allowed &= self.bytes_needed[after] <= limit
        if chars_left is not None:
            allowed &= self.chars[state] + self.chars_needed[after] <= chars_left
        return allowed

    @property
    def nbytes(self) -> int:
        """Bytes of memory held, with the masks and tables made so far."""
        own = [self.token_class, self.transitions, self.chars, self.accepting, self.chars_needed, self.bytes_needed]
        made = [self.__dict__[name] for name in ("labels", "counted_labels", "steps") if name in self.__dict__]
        return sum(held.nbytes for held in [*own, *self._masks.values(), *made])

    @cached_property
    def _masks(self) -> dict[tuple[int, int, int | None], Tensor]:
        return {}

    @cached_property
    def _class_index(self) -> Tensor:
        return torch.from_numpy(self.token_class).to(self.device)

    @cached_property
    def _farthest(self) -> int:
        return int(self.bytes_needed.max())

    @cached_property
    def _chars_at_most(self) -> np.ndarray:
        """int64 [states]: with so many characters left, no token is refused for their sake."""
        most = self.chars + self.chars_needed[self.transitions]
        return np.where(self.transitions >= 0, most, 0).max(axis=1)

    @cached_property
    def longest_token(self) -> int:
        """Most characters that a token begins."""
        return int(self.chars.max())

    @cached_property
    def labels(self) -> "_Labels":
        """Groups of tokens that lead to the same states, whatever characters they begin."""
        table, label = _distinct(self.transitions)
        return _labels(self, label, table)

    @cached_property
    def steps(self) -> "_Steps":
        """What one position of a slot can do."""
        return _plain_steps(self)

    @cached_property
    def counted_labels(self) -> "_Labels":
        """Groups of tokens that lead to the same states and begin the same characters: the classes."""
        return _labels(self, np.arange(self.transitions.shape[1]), self.transitions)


def _distinct(columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different columns of a table in the order of their first place, and the number of each column in it."""
    numbers: dict[bytes, int] = {}
    rows = np.ascontiguousarray(columns.T)
    number = np.array([numbers.setdefault(row.tobytes(), len(numbers)) for row in rows], dtype=np.int64)
    _, first = np.unique(number, return_index=True)
    return columns[:, first], number


# ---------------------------------------------------------------------------------------------------------------------
# Lifting to tokens
# ---------------------------------------------------------------------------------------------------------------------

# A bound on hostile patterns: lifting stops when its tables have so many cells, some 16 MB.
MAX_LIFT_CELLS = 1 << 22


@dataclass(frozen=True, eq=False)
class _Level:
    """The distinct prefixes of one length of all tokens.

    Args:
        parent: int64 [nodes], place of each prefix without its last byte in the level above.
        byte: uint8 [nodes], its last byte.
        whole, token: int64 [tokens], prefixes that are whole tokens, and their ids.
    """

    parent: np.ndarray
    byte: np.ndarray
    whole: np.ndarray
    token: np.ndarray


def _trie(tokens: Sequence[bytes | None]) -> list[_Level]:
    """The prefixes of a vocabulary, level by level; None stands for tokens that spell nothing."""
    ids = np.array([index for index, token in enumerate(tokens) if token], dtype=np.int64)
    lengths = np.array([len(token) for token in tokens if token], dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    codes = np.frombuffer(b"".join(token for token in tokens if token), dtype=np.uint8)
    node, levels = np.zeros(len(ids), dtype=np.int64), []
    for depth in range(int(lengths.max(initial=0))):
        longer = lengths > depth
        ids, lengths, starts, node = ids[longer], lengths[longer], starts[longer], node[longer]
        keys, node = np.unique(node << 8 | codes[starts + depth], return_inverse=True)
        whole = lengths == depth + 1
        levels.append(_Level(keys >> 8, (keys & 0xFF).astype(np.uint8), node[whole], ids[whole]))
    return levels


class _Columns:
    """What texts do in every state of an automaton at once, each different effect with a number of its own.

    Number 0 is no way on from any state, number 1 the effect of the empty text.
    """

    def __init__(self, automaton: ByteAutomaton) -> None:
        begins = (np.arange(256) & 0xC0) != 0x80
        by_byte, self.class_of = _distinct(np.vstack([automaton.transitions, begins.astype(np.int16)]))
        # One more row stands for "rejected", so that -1 indexes it and stays -1.
        self.table = np.vstack([by_byte[:-1], np.full((1, by_byte.shape[1]), -1, dtype=np.int16)])
        self.begins = by_byte[-1].astype(bool)
        self.counting = np.append(automaton.counting, False)
        states = len(automaton.accepting)
        # [columns, states]: next state, characters begun. One row a column, so that a column is contiguous.
        self.next = np.full((2, states), -1, dtype=np.int16)
        self.next[1] = np.arange(states)
        self.chars = np.zeros((2, states), dtype=np.int8)
        self.numbers = {self._key(self.next[number], self.chars[number]): number for number in (0, 1)}
        self.after = np.full((2, len(self.begins)), -1, dtype=np.int32)
        self.after[0] = 0

    @staticmethod
    def _key(after: np.ndarray, chars: np.ndarray) -> bytes:
        return after.tobytes() + chars.tobytes()

    def extend(self, column: np.ndarray, byte: np.ndarray) -> np.ndarray:
        """int64 [n]: the columns of texts (int64 [n]) that have one more byte (uint8 [n])."""
        label = self.class_of[byte]
        found = self.after[column, label]
        if (missing := found < 0).any():
            asked = np.zeros(self.after.shape, dtype=bool)
            asked[column[missing], label[missing]] = True
            columns, labels = np.nonzero(asked)
            # In parts, so that the bound is met before the memory is full.
            for part in range(0, len(columns), size := max(1, MAX_LIFT_CELLS // self.next.shape[1])):
                self._learn(columns[part : part + size], labels[part : part + size])
            found = self.after[column, label]
        return found

    def _learn(self, columns: np.ndarray, labels: np.ndarray) -> None:
        """Fill in `after` for pairs of a column and a class of bytes; int64 [pairs] each."""
        before = self.next[columns]
        after = self.table[before, labels[:, None]]
        begun = self.counting[before] & self.begins[labels, None]
        chars = np.where(after >= 0, self.chars[columns] + begun, 0).astype(np.int8)
        known, fresh = len(self.numbers), list[int]()
        result = np.empty(len(columns), dtype=np.int64)
        for index, key in enumerate(map(self._key, after, chars)):
            result[index] = self.numbers.setdefault(key, len(self.numbers))
            if result[index] == known + len(fresh):
                fresh.append(index)
        self.after[columns, labels] = result
        self.next = np.concatenate([self.next, after[fresh]])
        self.chars = np.concatenate([self.chars, chars[fresh]])
        self.after = np.concatenate([self.after, np.full((len(fresh), self.after.shape[1]), -1, dtype=np.int32)])
        if self.next.size + self.after.size > MAX_LIFT_CELLS:
            raise AutomatonTooLarge(
                f"over the tokens of the vocabulary the automaton of {self.next.shape[1]} states takes more than "
                f"{MAX_LIFT_CELLS} cells: simplify the pattern"
            )


def _lift(automaton: ByteAutomaton, levels: Sequence[_Level], size: int) -> dict[str, np.ndarray]:
    """The tables of a `TokenAutomaton` that depend on the vocabulary; it has `size` tokens."""
    columns = _Columns(automaton)
    token_column = np.zeros(size, dtype=np.int64)
    column = np.ones(1, dtype=np.int64)
    for level in levels:
        column = columns.extend(column[level.parent], level.byte)
        token_column[level.token] = column[level.whole]
    occurs = np.bincount(token_column, minlength=len(columns.next)) > 0
    occurs[0] = True  # class 0 stays that of the tokens that are accepted nowhere, also where there are none
    used, number = np.flatnonzero(occurs), np.cumsum(occurs) - 1
    return {
        "token_class": number[token_column].astype(np.int32),
        "transitions": np.ascontiguousarray(columns.next[used].T),
        "chars": np.ascontiguousarray(columns.chars[used].T),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Lifts on disk
# ---------------------------------------------------------------------------------------------------------------------

CACHE_VARIABLE = "SMOLLM_DIFFUSION_CACHE"
_FORMAT = "1"
# States x vocabulary from which on a lift takes about 20 ms or more, and a file of half a megabyte a tenth of that.
_MIN_STORED = 1 << 20
# The oldest files go when there are more.
_MAX_FILES = 512


def _cache_folder() -> Path | None:
    """Where lifts are kept: named by the environment variable (empty: nowhere), else below the Hugging Face home."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen is None:
        return Path(hub.HF_HOME) / "smollm_diffusion"
    return Path(chosen).expanduser() if chosen else None


def _lift_key(automaton: ByteAutomaton, vocabulary_digest: bytes) -> str:
    """Names what a lift depends on."""
    digest = hashlib.sha256(f"{_FORMAT} {len(automaton.accepting)} ".encode() + vocabulary_digest)
    for table, dtype in ((automaton.transitions, "<i2"), (automaton.accepting, "|b1"), (automaton.counting, "|b1")):
        digest.update(table.astype(dtype).tobytes())
    return digest.hexdigest()


def _checksum(key: str, tables: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(key.encode())
    for name in sorted(tables):
        digest.update(f"{name} {tables[name].dtype.str} {tables[name].shape} ".encode())
        digest.update(tables[name].tobytes())
    return digest.hexdigest()


def _read_lift(path: Path, key: str) -> dict[str, np.ndarray] | None:
    """The tables of a file, or None where there is none or it is not what was written for this key."""
    try:
        with safe_open(path, framework="np") as file:
            tables = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            checksum = (file.metadata() or {}).get("checksum")
    except (OSError, SafetensorError, ValueError, TypeError, KeyError):
        return None
    return tables if checksum == _checksum(key, tables) else None


def _write_lift(path: Path, key: str, tables: dict[str, np.ndarray]) -> None:
    """Put a file into its place at once, so that others see all of it or nothing."""
    content = to_safetensors(tables, {"checksum": _checksum(key, tables)})
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            temporary = file.name
            file.write(content)
        os.replace(temporary, path)
        _drop_oldest(path.parent)
    except OSError as error:
        logger.warning_once(f"Token automata are not kept in {path.parent}: {error}. Set {CACHE_VARIABLE}.")
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _drop_oldest(folder: Path) -> None:
    """Keep the newest files; another process may do the same."""
    ages = []
    for path in folder.iterdir():
        try:
            ages.append((path.stat().st_mtime, path))
        except FileNotFoundError:
            continue
    for _, path in sorted(ages)[:-_MAX_FILES]:
        path.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# The vocabulary
# ---------------------------------------------------------------------------------------------------------------------

_MAX_ENCODED = 100_000
# Lifts of that size altogether stay in memory, half a megabyte or more each at 128,000 tokens; then the longest unused
# go.
_LIFTED_BYTES = 256 << 20


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
        self._tokens = {spelled: token for token, spelled in enumerate(self.bytes) if spelled}
        # Bytes that UTF-8 never uses need no token.
        if missing := [code for code in range(0xF5) if bytes([code]) not in self._tokens and code not in (0xC0, 0xC1)]:
            raise ValueError(f"The tokenizer has no token for byte {missing[0]:#04x}: it cannot spell every value.")
        self.call_start, self.call_end, self.im_end = tokenizer.convert_tokens_to_ids(
            [TOOL_CALL_TOKEN, TOOL_CALL_END_TOKEN, IM_END_TOKEN]
        )
        self.think_start, self.think_end = tokenizer.convert_tokens_to_ids([THINK_TOKEN, THINK_END_TOKEN])
        self._levels = _trie(self.bytes)
        self._lifted: dict[ByteAutomaton, TokenAutomaton] = {}
        self._encoded: dict[str, tuple[int, ...]] = {}

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of plain text; names of special tokens in it stay text."""
        if text not in self._encoded:
            if len(self._encoded) >= _MAX_ENCODED:
                self._encoded.clear()
            ids = self.tokenizer(escape_content(text), add_special_tokens=False)["input_ids"]
            self._encoded[text] = tuple(ids)
        return self._encoded[text]

    def encode_bytes(self, text: bytes) -> list[int]:
        """Token ids of text that may start inside a character, whose remaining bytes are spelled one by one."""
        start = next((i for i, code in enumerate(text) if code & 0xC0 != 0x80), len(text))
        return [*(self._tokens[text[i : i + 1]] for i in range(start)), *self.encode(text[start:].decode())]

    def prefix_tokens(self, text: bytes) -> list[tuple[int, int]]:
        """Id and number of bytes of every token that spells a beginning of the text, the shortest first."""
        lengths = range(1, min(len(text), MAX_TOKEN_BYTES) + 1)
        return [(token, n) for n in lengths if (token := self._tokens.get(text[:n])) is not None]

    def spell(self, tokens: Iterable[int]) -> bytes:
        """The bytes that tokens stand for; special tokens, MASK and NULL stand for none."""
        return b"".join(self.bytes[token] or b"" for token in tokens if token < self.size)

    def lift(self, automaton: ByteAutomaton) -> TokenAutomaton:
        """The automaton over this vocabulary's tokens, which accepts no special token; the same object while in use.

        Raises:
            AutomatonTooLarge: its table over the tokens has more than `MAX_LIFT_CELLS` cells.
        """
        lifted = self._lifted.pop(automaton, None)
        if lifted is None:
            tables = self._lift_tables(automaton)
            needed = automaton.chars_needed, automaton.bytes_needed
            lifted = TokenAutomaton(
                **tables,
                accepting=automaton.accepting,
                chars_needed=needed[0],
                bytes_needed=needed[1],
                device=self.device,
            )
            held = sum(other.nbytes for other in self._lifted.values())
            while self._lifted and held + lifted.nbytes > _LIFTED_BYTES:
                held -= self._lifted.pop(next(iter(self._lifted))).nbytes
        self._lifted[automaton] = lifted  # the last used stands last
        return lifted

    def _lift_tables(self, automaton: ByteAutomaton) -> dict[str, np.ndarray]:
        folder = _cache_folder()
        if folder is None or len(automaton.accepting) * self.size < _MIN_STORED:
            return _lift(automaton, self._levels, self.size)
        key = _lift_key(automaton, self._digest)
        path = folder / f"{key}.safetensors"
        tables = _read_lift(path, key)
        if tables is None:
            tables = _lift(automaton, self._levels, self.size)
            _write_lift(path, key, tables)
        return tables

    @cached_property
    def _digest(self) -> bytes:
        """Tells vocabularies apart by what their tokens spell."""
        digest = hashlib.sha256(str(self.size).encode())
        for level in self._levels:
            for held in (level.parent, level.byte, level.whole, level.token):
                digest.update(held.data)
        return digest.digest()


def _token_bytes(tokenizer: PreTrainedTokenizerFast, size: int) -> list[bytes | None]:
    """The bytes of every token id, None for added tokens, unused ids and over-long tokens."""
    # Byte-level BPE (GPT-2) writes bytes as printable characters: printable Latin-1 as itself, the others from U+0100
    # on. What stands for no byte becomes a character that Latin-1 does not have.
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [code for code in range(256) if code not in printable]
    byte_of = {256 + index: code for index, code in enumerate(others)} | dict.fromkeys(others, 0xFFFF)
    added = set(tokenizer.added_tokens_decoder)
    result: list[bytes | None] = [None] * size
    for token, index in tokenizer.get_vocab().items():
        if index not in added and len(token) <= MAX_TOKEN_BYTES:
            try:
                result[index] = token.translate(byte_of).encode("latin-1") or None
            except UnicodeEncodeError:
                continue
    return result


# ---------------------------------------------------------------------------------------------------------------------
# The canvas of a drafter
# ---------------------------------------------------------------------------------------------------------------------

BUDGET_BUCKETS = (8, 16, 32, 64)
"""Widths of the slots that a finite language gets, in positions."""


@dataclass(frozen=True, eq=False)
class CanvasSlot:
    """A slot of the layout as positions of the canvas.

    Args:
        slot: what it is.
        start, length: its positions are `start .. start + length - 1`.
        automaton: raw-text automaton of an open kind, else None.
        choices: int64 [choices, length], token ids of each choice padded with NULL; None for an open kind.
        max_length: most characters of an open kind; None is no limit.
    """

    slot: DraftSlot
    start: int
    length: int
    automaton: TokenAutomaton | None
    choices: Tensor | None
    max_length: int | None = None

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
        """The text of a slot's tokens; NULL is nothing, and so is a last character that goes on behind the slot."""
        return codecs.utf_8_decode(self.vocabulary.spell(tokens.tolist()), "strict", False)[0]

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
        """Whether a value of an open kind fills its slot to the last position and may go on behind it."""
        if slot.automaton is None or int(tokens[-1]) >= self.vocabulary.size:
            return False
        return _overflows(slot.automaton, tokens.tolist(), slot.max_length)

    def tokens_of(self, slot: CanvasSlot, text: str | None) -> Tensor:
        """int64 [length]: a text as the slot holds it, cut at the slot's end, padded with NULL; None is all NULL."""
        tokens = list(self.vocabulary.encode(text))[: slot.length] if text is not None else []
        return torch.tensor(tokens + [self.null_id] * (slot.length - len(tokens)), dtype=torch.long)


def _longest_text(leaf: Leaf) -> float:
    """Bytes of the longest text of an open kind; may be infinite."""
    assert leaf.automaton is not None
    limit = float("inf") if leaf.max_length is None else 4 * leaf.max_length  # a character has four bytes at most
    return min(limit, leaf.automaton.longest)


def slot_budget(leaf: Leaf, default: int) -> int:
    """Positions for a slot of an open kind.

    Args:
        leaf: what it holds.
        default: positions of a slot whose language has no end, or holds texts wider than the widest bucket.

    Returns:
        The smallest bucket that holds every text of the language, whatever tokens spell it, else the default.
    """
    longest = _longest_text(leaf)
    return next((bucket for bucket in BUDGET_BUCKETS if bucket >= longest), default)


def build_canvas(
    vocabulary: Vocabulary, layout: Layout, budgets: Mapping[SlotKind, int] | Sequence[int], mask_id: int, null_id: int
) -> Canvas:
    """Lay a call out as tokens.

    Args:
        vocabulary: the tokens.
        layout: texts and slots of the tool.
        budgets: positions of an open slot by its kind, or one number for every slot of the layout (closed slots
            ignore theirs). A slot gets fewer where its language needs no more.
        mask_id, null_id: ids of MASK and NULL.

    Returns:
        The canvas of the whole call, `<tool_call>` to `</tool_call>`.

    Raises:
        AutomatonTooLarge: the language of a slot has too large a table over the tokens.
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
        if slot.leaf.kind == "choice":
            choices = _choice_table(vocabulary, slot.leaf.choices, null_id)
            slots.append(CanvasSlot(slot, len(tokens), choices.shape[1], None, choices))
        else:
            assert slot.leaf.automaton is not None
            budget = budgets[slot.leaf.kind] if isinstance(budgets, Mapping) else budgets[piece]
            length = min(budget, slot_budget(slot.leaf, budget))
            automaton = vocabulary.lift(slot.leaf.automaton)
            slots.append(CanvasSlot(slot, len(tokens), length, automaton, None, slot.leaf.max_length))
        tokens += [mask_id] * slots[-1].length
    tokens.append(vocabulary.call_end)
    ids = torch.tensor(tokens, dtype=torch.long, device=vocabulary.device)
    return Canvas(vocabulary, layout, ids, tuple(slots), mask_id, null_id)


def _choice_table(vocabulary: Vocabulary, choices: Sequence[str], null_id: int) -> Tensor:
    rows = [vocabulary.encode(choice) for choice in choices]
    # One position at least, so that the choice among a single empty text still has a place.
    length = max(1, max(map(len, rows)))
    return torch.tensor([[*row, *[null_id] * (length - len(row))] for row in rows], device=vocabulary.device)


def _overflows(automaton: TokenAutomaton, tokens: Iterable[int], max_length: int | None) -> bool:
    """Whether something may follow behind the tokens of a value, which fill its slot."""
    state, used = _walk(automaton, tokens)
    return state >= 0 and automaton.grows(state, None if max_length is None else max_length - used)


def _walk(automaton: TokenAutomaton, tokens: Iterable[int]) -> tuple[int, int]:
    """Where the tokens of a value lead, -1 where they are refused, and the characters that they begin."""
    state, used = 0, 0
    for token in tokens:
        state, begun = automaton.step(state, token)
        if state < 0:
            break
        used += begun
    return state, used


# ---------------------------------------------------------------------------------------------------------------------
# Joint commits
# ---------------------------------------------------------------------------------------------------------------------

# Scores are kept within these bounds, so that impossible tokens still compare and sums stay finite.
_EXTREME = 1e4
# Steps between pairs of a state and the characters so far; where a slot has more, its long tokens are left out.
_MAX_COUNTED = 1 << 20


@dataclass(frozen=True, eq=False)
class Commit:
    """The best string of a slot.

    Args:
        tokens: int64 [length], content and then NULL.
        confidence: float32 [length], probability of each position's token, 1 where it was fixed; for closed slots
            that of the whole choice among the choices.
        score: sum of the log-probabilities along the string, fixed positions of open slots left out.
        overflow: the value fills the slot to the last position and may go on behind it; where the automaton does not
            accept it, it must.
    """

    tokens: Tensor
    confidence: Tensor
    score: float
    overflow: bool = False


def commit_slot(slot: CanvasSlot, log_probs: Tensor, fixed: Tensor, null_id: int) -> Commit | None:
    """The exact best string of a slot; see `commit_slots`.

    Args:
        slot: the slot.
        log_probs: float [length, vocab + 2].
        fixed: int64 [length].
        null_id: id of NULL.

    Returns:
        The commit, or None where no string of the slot has the fixed positions.
    """
    return commit_slots([slot], [log_probs], [fixed], null_id)[0]


def commit_slots(
    slots: Sequence[CanvasSlot], log_probs: Sequence[Tensor], fixed: Sequence[Tensor], null_id: int
) -> list[Commit | None]:
    """The exact best string of each slot, never an independent argmax per position.

    Source: Viterbi 1967, over (position, state) or (position, state, characters so far). NULL follows only where the
    automaton accepts, and then to the end; behind the last position nothing is asked, so a value may also go on there.

    Args:
        slots: the slots.
        log_probs: one float [length, vocab + 2] a slot, log-probabilities of every position; any values, NaN counts
            as the lowest.
        fixed: one int64 [length] a slot, a token or NULL where the position is committed, -1 where it is free.
        null_id: id of NULL.

    Returns:
        One commit a slot; None where no string of the slot has the fixed positions. Among equal tokens the smallest id
        stands. (A slot whose `max_length` would need more than a million steps leaves out long tokens where they could
        exceed it.)
    """
    if not slots:
        return []
    known = _split(torch.cat(list(fixed)).cpu().numpy(), slots)
    found: list[_Found | None] = [None] * len(slots)
    groups: dict[tuple[TokenAutomaton, int], list[int]] = {}
    for index, slot in enumerate(slots):
        if slot.automaton is None:
            found[index] = _commit_choice(slot, log_probs[index], known[index])
        else:
            groups.setdefault((slot.automaton, slot.length), []).append(index)
    for (automaton, _), members in groups.items():
        rows = [log_probs[index].detach().float() for index in members]
        limits = [slots[index].max_length for index in members]
        commits = _commit_open(automaton, rows, [known[index] for index in members], limits, null_id)
        for index, commit in zip(members, commits, strict=True):
            found[index] = commit
    return _as_commits(slots, found, fixed[0].device)


def _split(values: np.ndarray, slots: Sequence[CanvasSlot]) -> list[np.ndarray]:
    return np.split(values, list(itertools.accumulate(slot.length for slot in slots))[:-1])


# What a commit comes to before it goes to the device: tokens, confidence, score, overflow.
_Found = tuple[np.ndarray, np.ndarray, float, bool]


def _as_commits(
    slots: Sequence[CanvasSlot], found: Sequence[_Found | None], device: torch.device
) -> list[Commit | None]:
    """Tokens and confidences go to the device in one piece."""
    nothing = [(np.zeros(slot.length), np.zeros(slot.length), 0.0, False) for slot in slots]
    lengths = [slot.length for slot in slots]
    tokens, surety = (
        np.concatenate([(one or empty)[part] for one, empty in zip(found, nothing, strict=True)]) for part in (0, 1)
    )
    all_tokens = torch.from_numpy(tokens.astype(np.int64)).to(device).split(lengths)
    all_surety = torch.from_numpy(surety.astype(np.float32)).to(device).split(lengths)
    return [
        None if one is None else Commit(ids, confidence, one[2], one[3])
        for one, ids, confidence in zip(found, all_tokens, all_surety, strict=True)
    ]


def _clean(scores: np.ndarray) -> np.ndarray:
    """float64, within the bounds; NaN becomes the lowest."""
    return np.fmin(np.fmax(scores.astype(np.float64), -_EXTREME), _EXTREME)


def _commit_choice(slot: CanvasSlot, log_probs: Tensor, known: np.ndarray) -> _Found | None:
    assert slot.choices is not None
    choices = slot.choices.cpu().numpy()
    possible = ((known < 0) | (choices == known)).all(axis=1)  # [choices]
    if not possible.any():
        return None
    scores = log_probs.detach().float().gather(1, slot.choices.T).cpu().numpy()  # [length, choices]
    totals = np.where(possible, _clean(scores).sum(axis=0), NEGATIVE_INFINITY)
    best = int(totals.argmax())
    surety = 1 / np.exp(totals - totals[best]).sum()
    return choices[best], np.full(slot.length, surety), float(totals[best]), False


def _commit_open(
    automaton: TokenAutomaton,
    rows: Sequence[Tensor],
    known: Sequence[np.ndarray],
    limits: Sequence[int | None],
    null_id: int,
) -> list[_Found | None]:
    """Slots of one automaton and length."""
    found = _best_strings(automaton, None, rows, known, null_id)
    for index, limit in enumerate(limits):
        # The best string of any length is the best short one where it is short, which it nearly always is.
        if (one := found[index]) is not None and limit is not None and _chars(automaton, one[0]) > limit:
            found[index] = _best_strings(automaton, limit, [rows[index]], [known[index]], null_id)[0]
    result: list[_Found | None] = []
    for limit, one in zip(limits, found, strict=True):
        overflow = one is not None and one[0][-1] != null_id and _overflows(automaton, one[0].tolist(), limit)
        result.append(None if one is None else (*one, overflow))
    return result


def _chars(automaton: TokenAutomaton, tokens: np.ndarray) -> int:
    """Fewest characters of a value with these tokens, NULL among them."""
    state, used = _walk(automaton, tokens[tokens < len(automaton.token_class)].tolist())
    return used + int(automaton.chars_needed[state])


def _best_strings(
    automaton: TokenAutomaton, limit: int | None, rows: Sequence[Tensor], known: Sequence[np.ndarray], null_id: int
) -> list[tuple[np.ndarray, np.ndarray, float] | None]:
    """Tokens, confidence and score of the best strings of one automaton and length, with at most so many characters."""
    labels, steps = _labels_and_steps(automaton, limit, len(known[0]))
    best = [_best_tokens(automaton, labels, row, null_id) for row in rows]
    scores = np.stack(
        [_pinned(automaton, labels, one.scores, fixed, null_id) for one, fixed in zip(best, known, strict=True)]
    )
    found: list[tuple[np.ndarray, np.ndarray, float] | None] = []
    for index, path in enumerate(_viterbi(steps, scores)):
        if path is None:
            found.append(None)
            continue
        chosen, total = path
        tokens, surety = known[index].copy(), np.ones(len(chosen))
        for place in np.flatnonzero(tokens < 0).tolist():
            label = chosen[place]
            tokens[place] = null_id if label == labels.null else best[index].token(place, label)
            surety[place] = math.exp(min(best[index].scores[place, label], 0.0))
        found.append((tokens, surety, total))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The best token of every label: the only work as wide as the vocabulary
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Labels:
    """Tokens in groups between which a slot makes no difference.

    Args:
        transitions: int16 [states, labels], next state or -1; label 0 is accepted nowhere.
        of_class: int64 [classes], label of each class of the automaton.
        common: the label of more than half of all tokens, or 0.
        others: int64 [n], the other labels that are accepted somewhere, in order.
        starts: int64 [n], where the tokens of each begin among those of `others`.
        order: int32 [m], ids of the tokens of `others`, by label and then by id. Where a label is common, those that
            are accepted nowhere stand before them and those of the common label behind.
        refused, split: how many of `order` are accepted nowhere, and where `others` end in it.
        index: `order` on the device.
        live, lengths: int64 [n], the labels that are accepted somewhere in the order of their tokens, and how many
            tokens each has.
    """

    transitions: np.ndarray
    of_class: np.ndarray
    common: int
    others: np.ndarray
    starts: np.ndarray
    order: np.ndarray
    refused: int
    split: int
    index: Tensor
    live: np.ndarray
    lengths: np.ndarray

    @cached_property
    def bounds(self) -> dict[int, tuple[int, int]]:
        """Where the tokens of each of `others` begin and end among them."""
        ends = np.append(self.starts[1:], self.split - self.refused)
        return dict(zip(self.others.tolist(), zip(self.starts.tolist(), ends.tolist(), strict=True), strict=True))

    @property
    def null(self) -> int:
        """The label of NULL, behind those of the tokens."""
        return self.transitions.shape[1]

    @property
    def nbytes(self) -> int:
        arrays = [self.transitions, self.of_class, self.others, self.starts, self.order]
        on_device = 0 if self.index.device.type == "cpu" else self.index.nbytes
        return sum(held.nbytes for held in arrays) + on_device


def _labels(automaton: TokenAutomaton, of_class: np.ndarray, transitions: np.ndarray) -> _Labels:
    of_token = of_class[automaton.token_class]
    sizes = np.bincount(of_token, minlength=transitions.shape[1])
    refused = int(sizes[0])
    sizes[0] = 0
    common = int(sizes.argmax()) if sizes.max() * 2 > len(of_token) else 0
    rank = np.where(of_token == common, transitions.shape[1], of_token) if common else of_token
    order = np.argsort(rank, kind="stable").astype(np.int32)
    split = len(order) - (int(sizes[common]) if common else 0)
    others, starts = np.unique(of_token[order[refused:split]], return_index=True)
    if not common:
        order, refused, split = order[refused:].copy(), 0, split - refused
    index = torch.from_numpy(order).to(automaton.device)
    live = np.append(others, common) if common else others
    return _Labels(transitions, of_class, common, others, starts, order, refused, split, index, live, sizes[live])


class _BestTokens:
    """The best token of every label at every position of a slot.

    Args:
        automaton: whose tokens.
        labels: the labels.
        rows: float32 [length, vocab + 2].
        null_id: id of NULL.

    `scores` is float64 [length, labels + 1], -inf for label 0, NULL last; not clean yet.
    """

    def __init__(self, automaton: TokenAutomaton, labels: _Labels, rows: Tensor, null_id: int) -> None:
        self.labels = labels
        self.scores = np.full((len(rows), labels.null + 1), NEGATIVE_INFINITY)
        self.scores[:, labels.null] = rows[:, null_id].cpu().numpy()
        self.gathered = rows.index_select(1, labels.index[labels.refused : labels.split]).cpu().numpy()
        if len(labels.others):
            self.scores[:, labels.others] = np.maximum.reduceat(self.gathered, labels.starts, axis=1)
        if labels.common:
            self.common = _common_tokens(automaton, labels, rows)
            place = torch.from_numpy(self.common).to(rows.device)
            self.scores[:, labels.common] = rows.gather(1, place[:, None])[:, 0].cpu().numpy()

    def token(self, place: int, label: int) -> int:
        """The best token of a label at a position, the smallest id among equals."""
        if label == self.labels.common:
            return int(self.common[place])
        start, end = self.labels.bounds[label]
        return int(self.labels.order[self.labels.refused + start + self.gathered[place, start:end].argmax()])


def _best_tokens(automaton: TokenAutomaton, labels: _Labels, rows: Tensor, null_id: int) -> _BestTokens:
    best = _BestTokens(automaton, labels, rows, null_id)
    if np.isnan(best.scores).any():
        best = _BestTokens(automaton, labels, rows.nan_to_num(nan=-_EXTREME), null_id)
    best.scores = _clean(best.scores)
    return best


def _common_tokens(automaton: TokenAutomaton, labels: _Labels, rows: Tensor) -> np.ndarray:
    """int64 [length]: the best token of the common label in each row, which is nearly always the best of all."""
    vocab = len(automaton.token_class)
    best = _argmax(rows, vocab)
    wrong = np.flatnonzero(labels.of_class[automaton.token_class[best]] != labels.common)
    if len(wrong):
        refused = labels.index[: labels.split].long()
        rows = rows[torch.from_numpy(wrong).to(rows.device)].index_fill_(1, refused, NEGATIVE_INFINITY)
        best[wrong] = _argmax(rows, vocab)
    # Where all of the label are -inf, the first token of all was found.
    found = labels.of_class[automaton.token_class[best]] == labels.common
    return np.where(found, best, labels.order[labels.split])


def _argmax(rows: Tensor, width: int) -> np.ndarray:
    """int64 [rows]: place of the first maximum among the first `width` columns, or of a NaN."""
    if rows.device.type != "cpu":
        return rows[:, :width].argmax(dim=1).cpu().numpy()
    # On the CPU numpy is ten times as fast as torch, row by row because it would copy columns that are left out.
    return np.array([row[:width].argmax() for row in rows.numpy()])


def _pinned(
    automaton: TokenAutomaton, labels: _Labels, scores: np.ndarray, fixed: np.ndarray, null_id: int
) -> np.ndarray:
    """Scores (float64 [length, labels + 1]) in which fixed positions have their own label only, for nothing."""
    scores = scores.copy()
    for place in np.flatnonzero(fixed >= 0).tolist():
        token, label = int(fixed[place]), 0  # which no step takes
        if token < len(automaton.token_class):
            label = int(labels.of_class[automaton.token_class[token]])
        elif token == null_id:
            label = labels.null
        scores[place] = NEGATIVE_INFINITY
        scores[place, label] = 0.0
    return scores


# ---------------------------------------------------------------------------------------------------------------------
# Steps of a slot, and the sums over them
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Steps:
    """What one position of a slot can do, in the order of the nodes that it leads to.

    Nodes are states, or pairs of a state and the characters so far; the last node is the tail of NULLs. All labels
    that lead from one node to another are one move, and moves of the same labels are the same.

    Args:
        nodes: how many.
        source, move, target: int64 [steps].
        span: int64 [nodes + 1], the steps into each node are `span[node] .. span[node + 1] - 1`.
        labels: int64 [m], the labels of each move, move by move.
        starts: int64 [moves], where the labels of each begin.
    """

    nodes: int
    source: np.ndarray
    move: np.ndarray
    target: np.ndarray
    span: np.ndarray
    labels: np.ndarray
    starts: np.ndarray

    @property
    def nbytes(self) -> int:
        arrays = (self.source, self.move, self.target, self.span, self.labels, self.starts)
        return sum(held.nbytes for held in arrays)

    @cached_property
    def reached(self) -> np.ndarray:
        """int64 [n]: the nodes that any step leads to."""
        return np.unique(self.target)

    @cached_property
    def first(self) -> np.ndarray:
        """int64 [n]: the first step into each of them."""
        return self.span[self.reached]

    @cached_property
    def reverse(self) -> "_Steps":
        """The same steps backwards."""
        return _ordered(self.nodes, self.target, self.move, self.source, self.labels, self.starts)

    def labels_of(self, move: int) -> np.ndarray:
        """int64 [n]: the labels of a move."""
        end = self.starts[move + 1] if move + 1 < len(self.starts) else len(self.labels)
        return self.labels[self.starts[move] : end]


def _ordered(
    nodes: int, source: np.ndarray, move: np.ndarray, target: np.ndarray, labels: np.ndarray, starts: np.ndarray
) -> _Steps:
    order = np.argsort(target, kind="stable")
    span = np.searchsorted(target[order], np.arange(nodes + 1))
    return _Steps(nodes, source[order], move[order], target[order], span, labels, starts)


def _labels_and_steps(automaton: TokenAutomaton, limit: int | None, length: int) -> tuple[_Labels, _Steps]:
    """What a slot of so many positions works with; it counts characters only where the limit can matter."""
    if limit is None or limit >= length * automaton.longest_token:
        return automaton.labels, automaton.steps
    return automaton.counted_labels, _counted_steps(automaton, limit, length)


def _plain_steps(automaton: TokenAutomaton) -> _Steps:
    """Nodes are states."""
    labels, states = automaton.labels, len(automaton.accepting)
    source, label = np.nonzero(labels.transitions >= 0)
    target = labels.transitions[source, label].astype(np.int64)
    first, move, members, starts = _moves(source * states + target, label)
    return _with_tail(
        source[first], move, target[first], np.flatnonzero(automaton.accepting), states, labels.null, members, starts
    )


@lru_cache(maxsize=16)
def _counted_steps(automaton: TokenAutomaton, limit: int, length: int) -> _Steps:
    """Nodes are pairs of a state and the characters so far, without those that `length` tokens do not reach."""
    labels, states, width = automaton.counted_labels, len(automaton.accepting), limit + 1
    source, label = np.nonzero(labels.transitions >= 0)
    target = labels.transitions[source, label].astype(np.int64)
    chars = automaton.chars[source, label].astype(np.int64)
    first, move, members, starts = _moves((source * states + target) * (MAX_TOKEN_BYTES + 1) + chars, label)
    source, target, chars = source[first], target[first], chars[first]
    # All of them, or those of the shorter tokens where that would be too many.
    up_to = np.cumsum(np.bincount(chars)) * width
    short = chars < np.searchsorted(up_to, _MAX_COUNTED, side="right")
    source, move, target, chars = source[short], move[short], target[short], chars[short]
    # What cannot end within the limit any more is left out.
    step, before = np.nonzero(np.arange(width) + (chars + automaton.chars_needed[target])[:, None] <= limit)
    source, move, target = source[step] * width + before, move[step], target[step] * width + before + chars[step]
    ends = (np.flatnonzero(automaton.accepting)[:, None] * width + np.arange(width)).reshape(-1)
    reached = np.zeros(states * width, dtype=bool)
    reached[0] = True
    for _ in range(length):
        reached[target[reached[source]]] = True
    number, kept = np.cumsum(reached) - 1, reached[source]
    return _with_tail(
        number[source[kept]],
        move[kept],
        number[target[kept]],
        number[ends[reached[ends]]],
        int(number[-1]) + 1,
        labels.null,
        members,
        starts,
    )


def _moves(key: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Bring transitions of the same effect together.

    Args:
        key: int64 [transitions], what a transition does.
        label: int64 [transitions], its label.

    Returns:
        Of each effect the place of one transition and the number of its move; then the labels of all moves, and where
        those of each begin.
    """
    order = np.lexsort((label, key))
    begins = np.flatnonzero(np.append(True, np.diff(key[order]) != 0)) if len(key) else np.zeros(0, dtype=np.int64)
    numbers: dict[bytes, int] = {}
    groups = np.split(label[order], begins[1:])[: len(begins)]
    move = np.array([numbers.setdefault(group.tobytes(), len(numbers)) for group in groups], dtype=np.int64)
    members = [np.frombuffer(held, dtype=np.int64) for held in numbers]
    starts = np.cumsum([0, *map(len, members)])[:-1]
    return order[begins], move, np.concatenate([np.zeros(0, dtype=np.int64), *members]), starts


def _with_tail(
    source: np.ndarray,
    move: np.ndarray,
    target: np.ndarray,
    ends: np.ndarray,
    tail: int,
    null: int,
    labels: np.ndarray,
    starts: np.ndarray,
) -> _Steps:
    """Add the moves of NULL, from the nodes `ends` and from the tail itself, which is the last node."""
    leaving = np.append(ends, tail)
    return _ordered(
        tail + 1,
        np.concatenate([source, leaving]),
        np.concatenate([move, np.full(len(leaving), len(starts))]),
        np.concatenate([target, np.full(len(leaving), tail)]),
        np.append(labels, null),
        np.append(starts, len(labels)),
    )


def _viterbi(steps: _Steps, scores: np.ndarray) -> list[tuple[list[int], float] | None]:
    """The best path from node 0 of each slot, to any node.

    Args:
        steps: the steps.
        scores: float64 [slots, length, labels + 1].

    Returns:
        Labels along the path and their total; None where there is no path.
    """
    slots, length, _ = scores.shape
    moves = np.maximum.reduceat(scores.take(steps.labels, axis=2), steps.starts, axis=2)
    best = np.full((length + 1, slots, steps.nodes), NEGATIVE_INFINITY)
    best[0, :, 0] = 0.0
    for place in range(length):
        arriving = best[place].take(steps.source, axis=1) + moves[:, place].take(steps.move, axis=1)
        best[place + 1][:, steps.reached] = np.maximum.reduceat(arriving, steps.first, axis=1)
    return [_trace_back(steps, best[:, slot], moves[slot], scores[slot]) for slot in range(slots)]


def _trace_back(
    steps: _Steps, best: np.ndarray, moves: np.ndarray, scores: np.ndarray
) -> tuple[list[int], float] | None:
    node = int(best[-1].argmax())
    total = float(best[-1, node])
    if total == NEGATIVE_INFINITY:
        return None
    chosen = []
    for place in reversed(range(len(scores))):
        start, end = steps.span[node], steps.span[node + 1]
        arriving = best[place, steps.source[start:end]] + moves[place, steps.move[start:end]]
        step = start + int(arriving.argmax())
        node = int(steps.source[step])
        labels = steps.labels_of(int(steps.move[step]))
        chosen.append(int(labels[scores[place, labels].argmax()] if len(labels) > 1 else labels[0]))
    return chosen[::-1], total


# ---------------------------------------------------------------------------------------------------------------------
# Marginals
# ---------------------------------------------------------------------------------------------------------------------


def slot_marginals(slot: CanvasSlot, log_probs: Tensor, fixed: Tensor, null_id: int) -> Tensor | None:
    """Exact probabilities of each position's token, given that the slot holds one of its strings.

    A string counts with the product of its probabilities; a value that goes on behind the slot counts with what of it
    stands in the slot. Source: forward-backward, Baum et al. 1970, in log space.

    Args:
        slot: the slot.
        log_probs: float [length, vocab + 2], as for `commit_slots`.
        fixed: int64 [length], as for `commit_slots`.
        null_id: id of NULL.

    Returns:
        float32 [length, vocab + 2], rows sum to 1; None where no string of the slot has the fixed positions. On the
        device of `log_probs`; on the CPU where that has no float64.
    """
    rows, known = log_probs.detach().float(), fixed.cpu().numpy()
    if slot.automaton is None:
        return _choice_marginals(slot, _where_float64_is(rows), known)
    labels, steps = _labels_and_steps(slot.automaton, slot.max_length, slot.length)
    best = _best_tokens(slot.automaton, labels, rows, null_id).scores
    rows = _where_float64_is(rows)
    tokens = labels.index[labels.refused :].to(rows.device)
    lengths = torch.from_numpy(labels.lengths).to(rows.device)
    spread = partial(torch.repeat_interleave, repeats=lengths, dim=1)  # from labels to their tokens
    # Each token's share of its label, relative to the label's best token, so that nothing underflows.
    tops = torch.from_numpy(best[:, labels.live]).to(rows.device, torch.float32)
    scores = rows.index_select(1, tokens).nan_to_num(nan=-_EXTREME).clamp(-_EXTREME, _EXTREME)
    shares = (scores - spread(tops)).exp()
    running = shares.double().cumsum(dim=1)[:, lengths.cumsum(dim=0) - 1]
    sums = running.diff(dim=1, prepend=running.new_zeros(len(rows), 1))
    best[:, labels.live] += sums.log().cpu().numpy()
    taken = _forward_backward(steps, _pinned(slot.automaton, labels, best, known, null_id))
    if taken is None:
        return None
    of_label = torch.from_numpy(taken[:, labels.live]).to(rows.device)
    result = torch.zeros_like(rows)
    result.index_copy_(1, tokens.long(), shares * spread((of_label / sums).float()))
    result[:, null_id] = torch.from_numpy(taken[:, labels.null]).to(rows.device)
    for place in np.flatnonzero(known >= 0).tolist():
        result[place] = 0.0
        result[place, known[place]] = 1.0
    return result


def _choice_marginals(slot: CanvasSlot, rows: Tensor, known: np.ndarray) -> Tensor | None:
    assert slot.choices is not None
    fixed, choices = torch.from_numpy(known).to(rows.device), slot.choices.to(rows.device)
    possible = ((fixed < 0) | (choices == fixed)).all(dim=1)  # [choices]
    if not bool(possible.any()):
        return None
    scores = rows.gather(1, choices.T).double().nan_to_num(nan=-_EXTREME).clamp(-_EXTREME, _EXTREME)
    shares = scores.sum(dim=0).masked_fill(~possible, NEGATIVE_INFINITY).softmax(dim=0)
    return torch.zeros_like(rows).scatter_add_(1, choices.T, shares.float().expand(slot.length, -1))


def _where_float64_is(rows: Tensor) -> Tensor:
    """The rows on a device that knows float64, which Apple's MPS does not."""
    return rows.cpu() if rows.device.type in NO_FLOAT64 else rows


def _forward_backward(steps: _Steps, scores: np.ndarray) -> np.ndarray | None:
    """Probability of each label at each position, on paths from node 0 to any node.

    Args:
        steps: the steps.
        scores: float64 [length, labels + 1], log-weights.

    Returns:
        float64 [length, labels + 1]; None where there is no path.
    """
    length, width = scores.shape
    moves = _log_sums(scores.take(steps.labels, axis=1), steps.starts)
    ahead = np.full((length + 1, steps.nodes), NEGATIVE_INFINITY)
    behind = np.full((length + 1, steps.nodes), NEGATIVE_INFINITY)
    ahead[0, 0], behind[length] = 0.0, 0.0
    for place in range(length):
        arriving = ahead[place][steps.source] + moves[place][steps.move]
        ahead[place + 1][steps.reached] = _log_sums(arriving, steps.first)
    for place in reversed(range(length)):
        leaving = behind[place + 1][steps.reverse.source] + moves[place][steps.reverse.move]
        behind[place][steps.reverse.reached] = _log_sums(leaving, steps.reverse.first)
    if behind[0, 0] == NEGATIVE_INFINITY:
        return None
    move_of = np.repeat(np.arange(len(steps.starts)), np.diff(np.append(steps.starts, len(steps.labels))))
    taken = np.empty((length, width))
    for place in range(length):
        weights = ahead[place][steps.source] + moves[place][steps.move] + behind[place + 1][steps.target]
        of_move = np.bincount(steps.move, np.exp(weights - behind[0, 0]), minlength=len(steps.starts))
        within = scores[place][steps.labels] - np.where(of_move > 0, moves[place], np.inf)[move_of]
        taken[place] = np.bincount(steps.labels, of_move[move_of] * np.exp(within), minlength=width)
    return taken


def _log_sums(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Log of the summed exponentials of consecutive groups along the last axis, each of one value or more."""
    largest = np.maximum.reduceat(values, starts, axis=-1)
    largest = np.where(np.isfinite(largest), largest, 0.0)
    lengths = np.diff(np.append(starts, values.shape[-1]))
    sums = np.add.reduceat(np.exp(values - np.repeat(largest, lengths, axis=-1)), starts, axis=-1)
    with np.errstate(divide="ignore"):
        return largest + np.log(sums)
