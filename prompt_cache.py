"""Keys and values of prompts seen before, so that what two prompts begin with, such as a block of tools, is run once.

Takes a prompt's tokens and what a request has computed of them; gives the longest stored beginning of another prompt,
as long as nothing about the model has changed. Knows no tools and no decoding, and never runs the model.
"""

import itertools
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils.rnn import pad_sequence
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.utils import logging

from .diffusion_head import PromptMemory

logger = logging.get_logger(__name__)

# Shorter beginnings save less than looking them up costs; every chat template makes a few tokens that always agree.
MIN_PREFIX_TOKENS = 16


@dataclass(frozen=True, eq=False)
class Prefix:
    """The stored beginning of a prompt. Its tensors are views of what is stored: read them, do not write to them.

    Args:
        length: tokens of the prompt that are covered.
        keys_values: per layer of the base, keys and values [heads, length, head_dim].
        memory: the head's memory of these tokens, one row without padding; None if none was stored.
    """

    length: int
    keys_values: Sequence[tuple[Tensor, Tensor]]
    memory: PromptMemory | None


@dataclass(frozen=True)
class PromptCacheStats:
    """What a cache holds and has done.

    Args:
        hits, misses: look-ups that found a beginning, and those that did not.
        reused_tokens: tokens that did not have to be run, over all hits.
        bytes: what the stored tensors and tokens take now.
        entries: prompts stored now.
    """

    hits: int
    misses: int
    reused_tokens: int
    bytes: int
    entries: int


# ---------------------------------------------------------------------------------------------------------------------
# The cache
# ---------------------------------------------------------------------------------------------------------------------


class PromptCache:
    """Keeps what was computed of prompts, for later prompts that begin with the same tokens.

    Pass one to every `generate` or `respond`. The prompts used last are kept, within the limits. A token takes
    `2 * layers * key_value_heads * head_dim` numbers in the base's dtype, and where the head drafts, a little more than
    `2 * head_num_layers * head_hidden_size` in the head's: 0.14 MB with SmolLM3-3B in bfloat16 and the default head.
    Of a model with a draft adapter the head's part is not kept: it comes from a pass of its own over the whole prompt.

    What is stored serves the same model only, and only while its weights, buffers, adapters, attention implementation
    and autocast are what they were; otherwise it is dropped, as it is after a step of any optimizer of torch. Two kinds
    of change cannot be seen, and `clear` has to be called after them: writes that torch does not count, such as those
    into `parameter.data` in place, and changes of code, such as forward hooks. Weights must not change while a request
    runs. Several threads may share a cache; on CUDA they must use the same stream, as they do by default.

    A stored prompt is used only where it agrees token for token, so no request can read the text of another. But a
    reply that starts sooner tells that somebody has sent a prompt with the same beginning: share a cache only between
    users who may know that.

    Args:
        max_bytes: most bytes kept; a prompt that takes more by itself is not stored.
        max_entries: most prompts kept.

    Raises:
        ValueError: a limit is below 1.
    """

    def __init__(self, max_bytes: int = 256 << 20, max_entries: int = 64) -> None:
        for name, limit in (("max_bytes", max_bytes), ("max_entries", max_entries)):
            if limit < 1:
                raise ValueError(f"{name}={limit!r} leaves no room: use a whole number from 1, or pass no cache.")
        self.max_bytes = max_bytes
        self.max_entries = max_entries
        self._lock = threading.Lock()
        self._clock = itertools.count()
        # Entries go with their model: they neither outlive it nor keep it alive.
        self._shelves: weakref.WeakKeyDictionary[nn.Module, _Shelf] = weakref.WeakKeyDictionary()
        self._hits = self._misses = self._reused_tokens = 0

    def match(self, model: Any, prompt_ids: Sequence[int], needs_memory: bool = False) -> Prefix | None:
        """Look up the longest beginning of a prompt that is stored.

        Args:
            model: the model, in the state (adapters, autocast) in which the prompt is to be run.
            prompt_ids: the prompt's tokens without padding.
            needs_memory: only what was stored with the head's memory will do.

        Returns:
            At most all tokens but the last, which must be run for its logits; None if fewer than `MIN_PREFIX_TOKENS`
            agree.
        """
        tokens = np.asarray(prompt_ids, dtype=np.int64)[:-1]
        with self._lock:
            shelf = self._valid_shelf(model)
            entries = [] if shelf is None else shelf.entries
            usable = [entry for entry in entries if entry.memory is not None or not needs_memory]
            found = [(_agreeing(entry.tokens, tokens), entry.used, entry) for entry in usable]
            length, _, entry = max(found, key=lambda each: each[:2], default=(0, 0, None))
            if entry is None or length < MIN_PREFIX_TOKENS:
                self._misses += 1
                return None
            entry.used = next(self._clock)
            self._hits += 1
            self._reused_tokens += length
        return entry.prefix(length)

    def store(
        self,
        model: Any,
        prompt_ids: Sequence[int],
        cache: DynamicCache,
        row: int,
        columns: Tensor | slice,
        memory: PromptMemory | None,
    ) -> None:
        """Keep a copy of what was computed of a prompt.

        A prompt that a stored one begins with is not stored again, but counts as used; stored ones that this prompt
        begins with are replaced. Caches with layers of other kinds than full attention are not stored.

        Args:
            model: the model, in the state in which the prompt was run.
            prompt_ids: the prompt's tokens without padding.
            cache: keys and values of a batch, which may hold more than the prompt.
            row: the prompt's row in it.
            columns: the columns of these tokens, in order: a slice, indices, or bool [columns].
            memory: the head's memory of the same batch, or of this row alone, which may go on behind the prompt.

        Raises:
            ValueError: columns or memory do not fit the prompt.
        """
        tokens = np.array(prompt_ids, dtype=np.int64)
        if len(tokens) < MIN_PREFIX_TOKENS or not _is_plain(cache):
            return
        with self._lock:
            shelf = self._valid_shelf(model) or self._new_shelf(model)
            if shelf is None or self._refreshed(shelf, tokens, memory is not None):
                return
        if _copied_bytes(tokens, cache, memory) > self.max_bytes:
            logger.warning_once(
                f"A prompt takes more than the {self.max_bytes} bytes of its PromptCache and is not kept: "
                "give the cache a larger max_bytes."
            )
            return
        # Copying takes long, so other threads may go on meanwhile.
        entry = _copied_entry(tokens, cache, row, columns, memory)
        with self._lock:
            # What another thread has found stale stays dropped, and what it has stored is not stored twice.
            if self._shelves.get(model) is shelf and not self._refreshed(shelf, tokens, memory is not None):
                entry.used = next(self._clock)
                kept = [old for old in shelf.entries if not entry.covers(old.tokens, old.memory is not None)]
                shelf.entries = [*kept, entry]
                self._evict()

    def clear(self) -> None:
        """Drop all entries; what was counted stays."""
        with self._lock:
            self._shelves.clear()

    @property
    def stats(self) -> PromptCacheStats:
        """What the cache holds and has done so far."""
        with self._lock:
            entries = [entry for shelf in self._shelves.values() for entry in shelf.entries]
            size = sum(entry.nbytes for entry in entries)
            return PromptCacheStats(self._hits, self._misses, self._reused_tokens, size, len(entries))

    def _valid_shelf(self, model: Any) -> "_Shelf | None":
        """The entries of a model; drops those that its changes have made stale."""
        shelf = self._shelves.get(model)
        if shelf is None:
            return None
        if shelf.base_setting != _base_setting(model) or not shelf.base.still_is(model.base):
            del self._shelves[model]
            return None
        if shelf.head_setting != _head_setting(model) or not shelf.head.still_is(model.diffusion_head):
            head = _Watch.of(model.diffusion_head)
            if head is None:
                del self._shelves[model]
                return None
            without_memory = [entry for entry in shelf.entries if entry.memory is None]
            shelf = _Shelf(shelf.base, head, shelf.base_setting, _head_setting(model), without_memory)
            self._shelves[model] = shelf
        return shelf

    def _new_shelf(self, model: Any) -> "_Shelf | None":
        """An empty shelf; None where changes of the model could not be seen."""
        base, head = _Watch.of(model.base), _Watch.of(model.diffusion_head)
        if base is None or head is None:
            logger.warning_once(
                "Prompts of this model are not kept, because changes of its weights cannot be seen: "
                "load the model outside of torch.inference_mode()."
            )
            return None
        shelf = self._shelves[model] = _Shelf(base, head, _base_setting(model), _head_setting(model))
        return shelf

    def _refreshed(self, shelf: "_Shelf", tokens: np.ndarray, has_memory: bool) -> bool:
        """Whether a prompt is stored already, which then counts as used."""
        covering = [entry for entry in shelf.entries if entry.covers(tokens, has_memory)]
        if covering:
            max(covering, key=lambda entry: entry.used).used = next(self._clock)
        return bool(covering)

    def _evict(self) -> None:
        """Drop what was used least recently, of whatever model, until the limits hold."""
        held = [(entry.used, shelf, entry) for shelf in self._shelves.values() for entry in shelf.entries]
        held.sort(key=lambda each: each[0], reverse=True)
        size = sum(entry.nbytes for _, _, entry in held)
        while held and (size > self.max_bytes or len(held) > self.max_entries):
            _, shelf, oldest = held.pop()
            shelf.entries = [entry for entry in shelf.entries if entry is not oldest]
            size -= oldest.nbytes


def assemble(prefixes: Sequence[Prefix | None]) -> tuple[DynamicCache, Tensor]:
    """Put the beginnings of several prompts into one cache, to run the rest of all of them as a batch.

    Args:
        prefixes: one a row, all of one model; None where nothing was found.

    Returns:
        A cache of its own copies, rows padded on the left with zeros (empty if nothing was found for any row), and bool
        [rows, columns] on the CPU, True where a column holds a token.
    """
    cache = DynamicCache()
    lengths = [0 if prefix is None else prefix.length for prefix in prefixes]
    columns = torch.arange(max(lengths, default=0))
    mask = columns >= len(columns) - torch.tensor(lengths, dtype=torch.long)[:, None]
    first = next((prefix for prefix in prefixes if prefix is not None), None)
    for index in range(0 if first is None else len(first.keys_values)):
        pairs = [None if prefix is None else prefix.keys_values[index] for prefix in prefixes]
        keys = _left_padded([None if pair is None else pair[0] for pair in pairs])
        values = _left_padded([None if pair is None else pair[1] for pair in pairs])
        cache.update(keys, values, index)
    return cache, mask


def _left_padded(rows: Sequence[Tensor | None]) -> Tensor:
    """Stack [heads, length, dim] of several rows to [rows, heads, longest, dim]; at least one row is there."""
    some = next(states for states in rows if states is not None)
    absent = some.new_empty(0, some.shape[0], some.shape[2])
    sequences = [absent if states is None else states.transpose(0, 1) for states in rows]
    return pad_sequence(sequences, batch_first=True, padding_side="left").transpose(1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Entries
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Entry:
    """One stored prompt; `used` is when it was last of use."""

    tokens: np.ndarray  # int64 [length]
    keys_values: list[tuple[Tensor, Tensor]]  # per layer, [heads, length, head_dim]
    memory: PromptMemory | None
    used: int = 0

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors and tokens."""
        tensors = [*itertools.chain.from_iterable(self.keys_values), *_memory_tensors(self.memory)]
        return self.tokens.nbytes + sum(tensor.nbytes for tensor in tensors)

    def covers(self, tokens: np.ndarray, has_memory: bool) -> bool:
        """Whether a prompt with such tokens, and the head's memory of them or not, adds nothing to this one."""
        known = self.tokens[: len(tokens)]
        return (self.memory is not None or not has_memory) and np.array_equal(known, tokens)

    def prefix(self, length: int) -> Prefix:
        """The first tokens, as views."""
        keys_values = [(keys[:, :length], values[:, :length]) for keys, values in self.keys_values]
        return Prefix(length, keys_values, None if self.memory is None else self.memory.prefix(length))


def _agreeing(known: np.ndarray, tokens: np.ndarray) -> int:
    """How many tokens two prompts have in common at their beginning."""
    length = min(len(known), len(tokens))
    equal = known[:length] == tokens[:length]
    return length if equal.all() else int(equal.argmin())


def _is_plain(cache: Any) -> bool:
    """Whether every layer holds keys and values of every column, where the model left them."""
    layers = getattr(cache, "layers", None)
    if not layers or getattr(cache, "offloading", False):
        return False
    return all(type(layer) is DynamicLayer and layer.get_seq_length() > 0 for layer in layers)


def _memory_tensors(memory: PromptMemory | None) -> list[Tensor]:
    """All that a memory holds, each with a place per row."""
    if memory is None:
        return []
    own = [memory.copy_keys, memory.copy_values, memory.prompt_ids, memory.mask, memory.lengths]
    return [*memory.keys, *memory.values, *own]


def _copied_bytes(tokens: np.ndarray, cache: DynamicCache, memory: PromptMemory | None) -> int:
    """What an entry will take, known before it is made."""
    states = [states for layer in cache.layers for states in (layer.keys, layer.values)]
    per_token = sum(states.nbytes // (states.shape[0] * states.shape[2]) for states in states)
    total = tokens.nbytes + len(tokens) * per_token
    if memory is not None:
        *positional, lengths = _memory_tensors(memory)
        places = memory.mask.numel()
        total += lengths.element_size() + len(tokens) * sum(tensor.nbytes // places for tensor in positional)
    return total


def _copied_entry(
    tokens: np.ndarray, cache: DynamicCache, row: int, columns: Tensor | slice, memory: PromptMemory | None
) -> _Entry:
    """Copy a prompt's part out of a batch, so that the entry keeps nothing else alive and never changes."""
    # Copies made in inference mode would be refused by whoever uses them outside of it.
    with torch.inference_mode(False), torch.no_grad():
        pairs = [
            (_own(layer.keys[row].detach(), columns), _own(layer.values[row].detach(), columns))
            for layer in cache.layers
        ]
        for states in itertools.chain.from_iterable(pairs):
            if states.shape[1] != len(tokens):
                raise ValueError(
                    f"The columns hold {states.shape[1]} tokens, the prompt has {len(tokens)}: give the columns of the "
                    "prompt's own tokens, without padding and without the reply."
                )
        return _Entry(tokens, pairs, None if memory is None else _own_memory(memory, row, len(tokens)))


def _own(states: Tensor, columns: Tensor | slice) -> Tensor:
    """A compact copy of some columns of [heads, columns, dim]."""
    chosen = states[:, columns]
    return chosen if isinstance(columns, Tensor) else chosen.clone(memory_format=torch.contiguous_format)


def _own_memory(memory: PromptMemory, row: int, length: int) -> PromptMemory:
    """A compact copy of the first real positions of one row of a memory, itself one row."""
    row = row if len(memory.mask) > 1 else 0
    real = memory.mask[row].nonzero()[:length, 0]
    if len(real) < length:
        raise ValueError(
            f"The head's memory holds {len(real)} tokens of this row, the prompt has {length}: give the memory of the "
            "whole prompt, or None."
        )

    def own(tensor: Tensor, dim: int) -> Tensor:
        return tensor[row].detach().index_select(dim, real)[None]

    return PromptMemory(
        keys=tuple(own(layer, 1) for layer in memory.keys),
        values=tuple(own(layer, 1) for layer in memory.values),
        copy_keys=own(memory.copy_keys, 0),
        copy_values=own(memory.copy_values, 0),
        prompt_ids=own(memory.prompt_ids, 0),
        mask=own(memory.mask, 0),
        lengths=torch.full_like(memory.lengths[:1], length),
    )


# ---------------------------------------------------------------------------------------------------------------------
# What a model is at the moment
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Shelf:
    """The entries of one model, and what they depend on."""

    base: "_Watch"
    head: "_Watch"
    base_setting: tuple[Any, ...]
    head_setting: tuple[Any, ...]
    entries: list[_Entry] = field(default_factory=list)


class _OptimizerSteps:
    """Counts the steps of all optimizers, because fused ones write to parameters without torch counting it."""

    count = 0

    @classmethod
    def add(cls, *_: Any) -> None:
        """One more step was taken."""
        cls.count += 1


register_optimizer_step_post_hook(_OptimizerSteps.add)


def _base_setting(model: Any) -> tuple[Any, ...]:
    """What keys and values depend on besides what can be seen of the base's tensors."""
    kind = model.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return model.base.config.get_text_config()._attn_implementation, autocast, _OptimizerSteps.count


def _head_setting(model: Any) -> tuple[Any, ...]:
    """What the head's memory depends on besides its tensors and the base."""
    return tuple(model.config.feature_layers)


class _Watch:
    """Tells whether a module is still what it was when this was made.

    Looks at the tree of modules, at every parameter and buffer (which memory it reads, and torch's counter of writes to
    it), at training modes and at the state of adapters. Refers to modules and memory weakly, so that neither is kept
    alive; while a weak reference stands, the number of a storage is not given to a new one.

    Args:
        module: what to watch.

    Raises:
        RuntimeError: it has tensors whose writes are not counted.
    """

    def __init__(self, module: nn.Module) -> None:
        modules: list[Any] = list(module.modules())
        # A check has to be fast, so it looks for each thing only where it was found.
        self._parents = [index for index, each in enumerate(modules) if each._modules]
        self._owners = [index for index, each in enumerate(modules) if each._parameters or each._buffers]
        self._adapted = [index for index, each in enumerate(modules) if _is_adapted(each)]
        self._modules = [weakref.ref(each) for each in modules]
        self._storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in self._tensors(modules)]
        self._state = self._state_of(modules)

    @classmethod
    def of(cls, module: nn.Module) -> "_Watch | None":
        """Watch a module; None where that is not possible."""
        try:
            return cls(module)
        except RuntimeError:
            return None

    def still_is(self, module: nn.Module) -> bool:
        """Whether this is the module that is watched, unchanged; takes about 0.7 ms for 400 tensors."""
        modules = [reference() for reference in self._modules]
        if modules[0] is not module or any(each is None for each in modules):
            return False
        try:
            return self._state_of(modules) == self._state
        except RuntimeError:
            return False

    def _state_of(self, modules: Sequence[Any]) -> tuple[list[Any], ...]:
        """Everything that is compared, in lists of plain values."""
        tensors = self._tensors(modules)
        return (
            [id(child) for index in self._parents for child in modules[index]._modules.values()],
            [tensor.untyped_storage()._cdata for tensor in tensors],
            [tensor._version for tensor in tensors],
            [tensor.storage_offset() for tensor in tensors],
            [tensor.numel() for tensor in tensors],
            [tensor.dtype for tensor in tensors],
            [module.training for module in modules],
            [_adapter_state(modules[index]) for index in self._adapted],
        )

    def _tensors(self, modules: Sequence[Any]) -> list[Tensor]:
        """All parameters and buffers, in the order of the modules."""
        owners = [modules[index] for index in self._owners]
        held = itertools.chain.from_iterable(
            (*owner._parameters.values(), *owner._buffers.values()) for owner in owners
        )
        return [tensor for tensor in held if tensor is not None]


def _is_adapted(module: nn.Module) -> bool:
    """Whether this is a layer that peft has put around another; models have methods of the same names."""
    return isinstance(getattr(type(module), "disable_adapters", None), property)


def _adapter_state(layer: Any) -> tuple[Any, ...]:
    """Which adapters of a peft layer act, and how strongly."""
    scaling = getattr(layer, "scaling", None)
    kept = dict(scaling) if isinstance(scaling, dict) else scaling
    return layer.disable_adapters, tuple(layer.active_adapters), tuple(getattr(layer, "merged_adapters", ())), kept
