"""Compiled forwards of base and head: `torch.compile` over a bounded set of static shapes, CUDA graphs where CUDA is.

Takes what the base and `draft_log_probs` take and gives what they give, up to rounding: inputs are padded to the next
bucket, results are cut back. Whatever cannot be compiled runs as it did before, after one line in the log. Knows no
tools, drafts or sampling, and does not compile the prefill, whose length differs from request to request.
"""

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, fields
from functools import partial
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging

from .diffusion_head import PromptMemory

logger = logging.get_logger(__name__)

T = TypeVar("T")

# Attention that takes a mask of any form as a tensor; the others have kernels, and masks, of their own.
MASKED_ATTENTION = ("sdpa", "eager")
# Unused storages that are kept for the next requests.
KEPT_STORAGES = 4
# Kinds of device that forwards are compiled on.
COMPILED_DEVICES = ("cpu", "cuda")


def default_mode(device: str, backend: str | Callable[..., Any] = "inductor") -> str | None:
    """The mode of `torch.compile` on a kind of device: CUDA graphs where there are any, else torch's own default.

    Args:
        device: "cpu", "cuda" and so on.
        backend: of `torch.compile`; only the default one records CUDA graphs.
    """
    return "reduce-overhead" if device == "cuda" and backend == "inductor" else None


def _doubling(first: int, last: int) -> tuple[int, ...]:
    """first, 2 first, 4 first, ... up to `last`."""
    return (first, *_doubling(first * 2, last)) if first <= last else ()


@dataclass(frozen=True)
class Buckets:
    """The sizes that shapes are padded to; what is larger than the last of them is not compiled.

    Args:
        rows: rows of a batch.
        widths: new tokens of a row in one forward of the base.
        columns: columns of the base's cache.
        prompt: positions of a prompt's memory.
        scaffold: positions of a canvas.
        positions: canvas positions whose log-probabilities are wanted.
    """

    rows: tuple[int, ...] = _doubling(1, 32)
    widths: tuple[int, ...] = (1, *_doubling(8, 256))
    columns: tuple[int, ...] = _doubling(128, 32768)
    prompt: tuple[int, ...] = _doubling(128, 32768)
    scaffold: tuple[int, ...] = _doubling(16, 4096)
    positions: tuple[int, ...] = _doubling(16, 4096)

    def __post_init__(self) -> None:
        for part in fields(self):
            sizes = getattr(self, part.name)
            if not sizes or sizes[0] < 1 or list(sizes) != sorted(set(sizes)):
                raise ValueError(f"Buckets of {part.name} must be ascending whole numbers from 1 on, not {sizes!r}.")

    def fitting(self, part: str, size: int) -> int | None:
        """The least bucket that holds `size`; None where none does.

        Args:
            part: which buckets, a field of this class.
            size: what has to fit.
        """
        return next((bucket for bucket in getattr(self, part) if bucket >= size), None)

    def capacity(self, part: str, size: int) -> int:
        """As `fitting`; beyond the last bucket the next multiple of it, which is allocated but not compiled for."""
        last = getattr(self, part)[-1]
        return self.fitting(part, size) or -(-size // last) * last


# ---------------------------------------------------------------------------------------------------------------------
# The static cache
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Storage:
    """Keys and values of a batch at fixed addresses.

    Args:
        keys, values: one tensor [rows, heads, columns, dim] per layer.
        owner: the cache that uses it, from the moment it is taken; dead when the request is over, None when the cache
            has moved on.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    owner: "weakref.ref[StaticDecodingCache] | None" = None

    @property
    def in_use(self) -> bool:
        """Whether a living cache stands in it, or is about to be copied into it."""
        return self.owner is not None and self.owner() is not None

    def is_like(self, shapes: Sequence[tuple[Any, ...]]) -> bool:
        """Whether shape, dtype and device of every tensor are the given ones."""
        return [_nature(tensor) for tensor in (*self.keys, *self.values)] == list(shapes)


class StoragePool:
    """Storages that are used again by later requests, since CUDA graphs are bound to addresses.

    A storage is free as soon as its cache is gone or has moved on. It is cleared before it is used again, so nothing
    of one request is left for the next. Safe to share between threads.

    Args:
        buckets: the sizes of storages.
    """

    def __init__(self, buckets: Buckets | None = None) -> None:
        self.buckets = buckets or Buckets()
        self._storages: list[Storage] = []
        self._lock = threading.Lock()

    def take(
        self, owner: "StaticDecodingCache", like: Sequence[tuple[Tensor, Tensor]], rows: int, columns: int
    ) -> Storage:
        """Give a cache a cleared storage of the bucket that holds what it needs.

        Args:
            owner: who gets it.
            like: keys and values of each layer, [any, heads, any, dim]; heads, width, dtype and device are as theirs.
            rows: least number of rows.
            columns: least number of columns.
        """
        rows, columns = self.buckets.capacity("rows", rows), self.buckets.capacity("columns", columns)
        shapes = [_nature(pair[side], rows, columns) for side in (0, 1) for pair in like]
        with self._lock:
            found = next((one for one in self._storages if not one.in_use and one.is_like(shapes)), None)
            if found is None:
                found = _allocated(shapes)
                self._storages.append(found)
            else:
                for tensor in (*found.keys, *found.values):
                    tensor.zero_()
            found.owner = weakref.ref(owner)
            free = [one for one in self._storages if not one.in_use and one is not found]
            for storage in free[: max(0, len(free) - KEPT_STORAGES)]:
                self._storages.remove(storage)
        return found


def _nature(tensor: Tensor, rows: int | None = None, columns: int | None = None) -> tuple[Any, ...]:
    """Shape (with other rows and columns, if given), dtype and device of keys or values."""
    own_rows, heads, own_columns, dim = tensor.shape
    return (rows or own_rows, heads, columns or own_columns, dim), tensor.dtype, tensor.device


def _allocated(shapes: Sequence[tuple[Any, ...]]) -> Storage:
    """A new storage of zeros; what is masked must be finite, since attention multiplies it by 0."""
    with torch.inference_mode(False):  # it outlives the request, and an inference tensor could not be written later
        tensors = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in shapes]
    if tensors[0].is_cuda:
        for tensor in tensors:
            # CUDA graphs write into it in place, instead of into a copy.
            torch._dynamo.mark_static_address(tensor)
    half = len(tensors) // 2
    return Storage(tuple(tensors[:half]), tuple(tensors[half:]))


class _Filled:
    """The part of a buffer [rows, heads, columns, dim] that is filled from the first row and column on."""

    def __init__(self, buffer: Tensor, filled: Tensor) -> None:
        self.buffer = buffer
        self.set(filled)

    def set(self, states: Tensor) -> None:
        """Hold `states` [rows, heads, columns, dim] and nothing else."""
        rows, length = states.shape[0], states.shape[2]
        if rows > self.buffer.shape[0] or length > self.buffer.shape[2]:
            raise ValueError(
                f"{rows} rows of {length} columns do not fit into a static cache of {self.buffer.shape[0]} rows and "
                f"{self.buffer.shape[2]} columns: build a new one with StaticDecodingCache.from_dynamic."
            )
        own = states.untyped_storage().data_ptr() == self.buffer.untyped_storage().data_ptr()
        self.rows, self.length = rows, length
        self.view()[:] = states.clone() if own else states  # a view of the buffer may overlap with where it goes

    def append(self, states: Tensor) -> Tensor:
        """Add columns; gives all of them."""
        self.length += states.shape[2]
        self.view()[:, :, -states.shape[2] :] = states
        return self.view()

    def view(self) -> Tensor:
        """What is filled."""
        return self.buffer[: self.rows, :, : self.length]


class StaticDecodingLayer(CacheLayerMixin):
    """A layer of the static cache; like a `DynamicLayer` for whoever reads or replaces its keys and values."""

    is_sliding = False
    is_croppable = True
    is_initialized = True
    is_compileable = False  # transformers would compile whatever it is used with; here only our own forwards are

    def __init__(self, key_buffer: Tensor, value_buffer: Tensor, keys: Tensor, values: Tensor) -> None:
        self._keys, self._values = _Filled(key_buffer, keys), _Filled(value_buffer, values)

    @property
    def keys(self) -> Tensor:
        """[rows, heads, columns, dim], what is filled."""
        return self._keys.view()

    @keys.setter
    def keys(self, states: Tensor) -> None:
        self._keys.set(states)

    @property
    def values(self) -> Tensor:
        """[rows, heads, columns, dim], what is filled."""
        return self._values.view()

    @values.setter
    def values(self, states: Tensor) -> None:
        self._values.set(states)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: a layer is made from keys and values."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append columns, [rows, heads, width, dim]; gives all of them. The cache has made room."""
        return self._keys.append(key_states), self._values.append(value_states)

    def advance(self, columns: int) -> None:
        """Count columns as filled that a compiled forward has written."""
        self._keys.length += columns
        self._values.length += columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that a forward over `query_length` tokens sees, and the number of the first of them."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Filled columns."""
        return self._keys.length

    def get_max_length(self) -> int:
        """-1, since the cache grows."""
        return -1

    def reset(self) -> None:
        """Empty the layer."""
        self.advance(-self.get_seq_length())

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last columns; they are given as a negative number, as everywhere in transformers."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}) does not say what to remove: use crop(-n) to drop the last n columns."
            )
        self.advance(max(tokens_to_remove, -self.get_seq_length()))


class StaticDecodingCache(Cache):
    """A cache of a bucketed number of rows and columns, at addresses that stay while it does not outgrow them.

    Does what a `DynamicCache` of full attention does: it can be appended to by any forward of the base, cropped, and
    reduced to some of its rows. It moves to the next bucket when it is full. Build one with `from_dynamic`.

    Args:
        pool: where storages come from.
        layers: keys and values of each layer, [rows, heads, columns, dim]; they are copied.
        columns: columns to have room for at least.
    """

    def __init__(self, pool: StoragePool, layers: Sequence[tuple[Tensor, Tensor]], columns: int) -> None:
        super().__init__(layers=[])
        self.pool = pool
        self.storage: Storage | None = None
        self._move(layers, columns)

    @classmethod
    def from_dynamic(cls, cache: Cache, columns: int = 0, pool: StoragePool | None = None) -> "StaticDecodingCache":
        """Copy a prefilled cache.

        Args:
            cache: a cache whose layers all keep every column, such as the `DynamicCache` of a base with full attention.
            columns: columns to have room for; the bucket that holds them, and what is cached, is taken.
            pool: where storages come from; None is a pool of its own.

        Raises:
            ValueError: the cache is empty, or a layer of it does not keep every column.
        """
        if not can_be_static(cache):
            kinds = sorted({type(layer).__name__ for layer in cache.layers}) or ["none"]
            raise ValueError(
                f"Only a prefilled cache of full attention can be made static; this one's layers are: "
                f"{', '.join(kinds)}. Keep decoding with the cache as it is."
            )
        layers = [(layer.keys, layer.values) for layer in cache.layers]
        return cls(pool or StoragePool(), layers, columns)

    @property
    def rows(self) -> int:
        """Rows that are filled."""
        return self.layers[0].keys.shape[0]

    @property
    def length(self) -> int:
        """Columns that are filled."""
        return self.layers[0].get_seq_length()

    @property
    def capacity(self) -> tuple[int, int]:
        """Rows and columns there is room for."""
        assert self.storage is not None
        rows, _, columns, _ = self.storage.keys[0].shape
        return rows, columns

    def reserve(self, columns: int) -> None:
        """Make room for more columns; moves to a larger storage if need be.

        Args:
            columns: how many behind what is filled.
        """
        if self.length + columns > self.capacity[1]:
            self._move([(layer.keys, layer.values) for layer in self.layers], self.length + columns)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append columns to a layer, as a forward of the base does.

        Args:
            key_states, value_states: [rows, heads, width, dim].
            layer_idx: which layer.

        Returns:
            All keys and values of the layer.
        """
        if layer_idx == 0:
            self.reserve(key_states.shape[2])
        return self.layers[layer_idx].update(key_states, value_states)

    def advance(self, columns: int) -> None:
        """Count columns as filled that a compiled forward has written.

        Args:
            columns: how many.
        """
        for layer in self.layers:
            layer.advance(columns)

    def select(self, indices: Tensor) -> "StaticDecodingCache":
        """Some of the rows as a cache of their own; this one stays as it is.

        Args:
            indices: long [rows] or bool [all rows].
        """
        layers = [(layer.keys[indices], layer.values[indices]) for layer in self.layers]
        return StaticDecodingCache(self.pool, layers, self.capacity[1])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only some of the rows.

        Args:
            indices: long [rows] or bool [all rows].
        """
        layers = [(layer.keys[indices], layer.values[indices]) for layer in self.layers]
        if self.pool.buckets.capacity("rows", layers[0][0].shape[0]) != self.capacity[0]:
            self._move(layers, self.capacity[1])
            return
        for layer, (keys, values) in zip(self.layers, layers, strict=True):
            layer.keys, layer.values = keys, values

    def _move(self, layers: Sequence[tuple[Tensor, Tensor]], columns: int) -> None:
        """Copy keys and values into another storage and stay there."""
        rows, length = layers[0][0].shape[0], layers[0][0].shape[2]
        # The new storage is held from here on, and the old one let go at the end: what is copied may lie in it.
        storage = self.pool.take(self, layers, rows, max(columns, length))
        self.layers = [
            StaticDecodingLayer(key_buffer, value_buffer, *states)
            for key_buffer, value_buffer, states in zip(storage.keys, storage.values, layers, strict=True)
        ]
        if self.storage is not None:
            self.storage.owner = None
        self.storage = storage


def can_be_static(cache: Any) -> bool:
    """Whether a cache is prefilled and every layer of it keeps every column."""
    layers = getattr(cache, "layers", None)
    if not layers or getattr(cache, "offloading", False):
        return False
    return all(
        isinstance(layer, StaticDecodingLayer) or (type(layer) is DynamicLayer and layer.is_initialized)
        for layer in layers
    )


# ---------------------------------------------------------------------------------------------------------------------
# What is compiled
# ---------------------------------------------------------------------------------------------------------------------


class _TracedCache(Cache):
    """The cache as it is inside a compiled forward: whole storages, written at given columns."""

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor], columns: Tensor) -> None:
        super().__init__(layers=[])
        self.buffers = (keys, values)
        self.columns = columns

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write [rows, heads, width, dim] in place; gives the whole storage of the layer."""
        keys, values = (side[layer_idx] for side in self.buffers)
        keys.index_copy_(2, self.columns, key_states)
        values.index_copy_(2, self.columns, value_states)
        return keys, values


def _base_step(
    base: Any,
    ids: Tensor,
    mask: Tensor,
    positions: Tensor,
    start: Tensor,
    keys: tuple[Tensor, ...],
    values: tuple[Tensor, ...],
    hidden: bool,
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """The base over a block of columns.

    Args:
        base: the base.
        ids: long [rows, width].
        mask: bool [rows, columns of the storage], real ones.
        positions: long [rows, width].
        start: long [1], the block's first column.
        keys, values: the storage.
        hidden: give the hidden states too.

    Returns:
        Logits [rows, width, vocab] and hidden states, each [rows, width, base_width].
    """
    block = start + torch.arange(ids.shape[1], device=ids.device)
    columns = torch.arange(mask.shape[1], device=ids.device)
    earlier, itself = columns <= block[:, None], columns == block[:, None]  # [width, columns]
    # Every token sees itself, padding too: an empty row of attention has no defined result.
    visible = mask[:, None, None, :] & earlier | itself
    if base.config._attn_implementation == "eager":  # it adds the mask to the scores
        dtype = keys[0].dtype
        visible = torch.zeros(visible.shape, dtype=dtype, device=ids.device).masked_fill(
            ~visible, torch.finfo(dtype).min
        )
    # `forward` itself: hooks on the base are run by the caller, outside of what is compiled.
    output = base.forward(
        input_ids=ids,
        attention_mask=visible,
        position_ids=positions,
        past_key_values=_TracedCache(keys, values, block),
        use_cache=True,
        **({"output_hidden_states": True} if hidden else {}),
    )
    return output.logits, output.hidden_states if hidden else None


def _head_step(model: "_Hookless", *arguments: Any) -> Tensor:
    """`draft_log_probs` of a model."""
    return type(model.wrapped).draft_log_probs(model, *arguments)


class _Hookless:
    """A module, or the model with its head, whose hooks are not run when it is called.

    A compiled forward would keep the hooks of the day it was made.
    """

    def __init__(self, wrapped: Any, **parts: Any) -> None:
        self.wrapped = wrapped
        self.parts = parts

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.wrapped.forward(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        parts = self.__dict__["parts"]
        return parts[name] if name in parts else getattr(self.__dict__["wrapped"], name)


def _own_code(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A copy of a function with a code object of its own.

    `torch.compile` keeps its results, and its limit of recompilations, by code object; with one for each shape the
    right result is found at once and the limit is never met.
    """
    assert isinstance(function, FunctionType)
    code = function.__code__.replace(co_name=name, co_qualname=name)
    return FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)


class _Graph:
    """`torch.compile` of a function for one shape, set up at the first call, so that its errors come from there.

    Args:
        function: what is compiled; it has a code object of its own.
        backend, mode: of `torch.compile`.
        cuda: whether it may be a CUDA graph.
    """

    def __init__(
        self, function: Callable[..., Any], backend: str | Callable[..., Any], mode: str | None, cuda: bool
    ) -> None:
        self.function, self.backend, self.mode, self.cuda = function, backend, mode, cuda
        self.compiled: Callable[..., Any] | None = None

    def __call__(self, *arguments: Any) -> Any:
        if self.cuda:
            # What an earlier replay gave has been copied, so its memory may be used again.
            torch.compiler.cudagraph_mark_step_begin()
        if self.compiled is not None:
            return self.compiled(*arguments)
        compiled = torch.compile(self.function, backend=self.backend, mode=self.mode, fullgraph=True, dynamic=False)
        result = compiled(*arguments)
        self.compiled = compiled
        return result


class _Gate:
    """Keeps forwards of other threads from running while one compiles.

    Transformers collects hidden states in a variable of the context, but in a global one while torch compiles anything
    in any thread; a forward beside a compiler would lose them, or get those of another.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside: Counter[int] = Counter()  # forwards by thread, one inside of another counted too
        self._compiling: int | None = None  # the thread

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run forwards; waits while another thread compiles."""
        thread = threading.get_ident()
        with self._changed:
            self._changed.wait_for(lambda: self._compiling in (None, thread))
            self._inside[thread] += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside[thread] -= 1
                if not self._inside[thread]:
                    del self._inside[thread]

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Compile, if no other thread runs a forward; says whether that is so. Never waits."""
        thread = threading.get_ident()
        with self._changed:
            granted = self._compiling is None and not set(self._inside) - {thread}
            if granted:
                self._compiling = thread
        try:
            yield granted
        finally:
            if granted:
                with self._changed:
                    self._compiling = None
                    self._changed.notify_all()


# One for the process, as the compiler's state is.
_GATE = _Gate()


def beside_no_compiler() -> AbstractContextManager[None]:
    """A context to run forwards of any model in, which waits while another thread compiles one for decoding."""
    return _GATE.running()


# ---------------------------------------------------------------------------------------------------------------------
# Running it
# ---------------------------------------------------------------------------------------------------------------------


class CompiledDecoding:
    """The compiled forwards of one model. `verify` stands in for the base, `head_step` for `draft_log_probs`.

    Each shape is compiled when it is first met while no other thread runs a forward in `beside_no_compiler`; it takes
    seconds to minutes, and forwards of other threads wait for it there. Requests whose shapes fall into the same
    buckets share it. Parts that cannot be compiled are named in `off` with the reason, and run as before.

    Args:
        model: the model.
        backend: of `torch.compile`, a name or a callable.
        mode: of `torch.compile`; None is `"reduce-overhead"` (CUDA graphs) on CUDA with the default backend.
        buckets: what shapes are padded to; None is the default.
        max_graphs: most shapes that are compiled; further ones run as before.

    Raises:
        ValueError: `max_graphs` is no positive number.
    """

    def __init__(
        self,
        model: Any,
        backend: str | Callable[..., Any] = "inductor",
        mode: str | None = None,
        buckets: Buckets | None = None,
        max_graphs: int = 64,
    ) -> None:
        if max_graphs < 1:
            raise ValueError(f"max_graphs={max_graphs!r} leaves nothing to compile: use a number from 1 on.")
        self.model = model
        self.backend = backend
        self.mode = mode
        self.buckets = buckets or Buckets()
        self.max_graphs = max_graphs
        self.off: dict[str, str] = {}
        self._start()
        for part, reason in uncompilable_parts(model).items():
            self._switch_off(part, reason)

    def _start(self) -> None:
        """Set up what belongs to this process and is never copied."""
        self.pool = StoragePool(self.buckets)
        self._graphs: dict[tuple[Any, ...], _Graph] = {}
        self._padded_memories: weakref.WeakKeyDictionary[PromptMemory, PromptMemory] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()
        self._told_of_limit = False

    def __getstate__(self) -> dict[str, Any]:
        kept = ("model", "backend", "mode", "buckets", "max_graphs", "off")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    @property
    def graphs(self) -> int:
        """Shapes compiled so far."""
        return len(self._graphs)

    # --------------------------------------------------------------- the base

    def static_cache(self, cache: Any, columns: int = 0) -> Any:
        """The cache that `verify` is compiled for.

        Args:
            cache: a prefilled cache.
            columns: columns to have room for, where it is known.

        Returns:
            A copy of it as a `StaticDecodingCache`; the cache itself where the base is not compiled or it is static
            already.
        """
        if "base" in self.off or isinstance(cache, StaticDecodingCache) or not can_be_static(cache):
            return cache
        # Room for one more block, so that the first forward does not have to move.
        columns = max(columns, cache.get_seq_length() + self.buckets.widths[-1] // 4)
        try:
            return StaticDecodingCache.from_dynamic(cache, columns, self.pool)
        except torch.OutOfMemoryError as error:  # the cache as it is takes no more
            self._switch_off("base", f"there is no room for its cache ({_in_one_line(error)})")
            return cache

    @torch.no_grad()
    def verify(
        self,
        input_ids: Tensor,
        past_key_values: Any,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool = True,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool = False,
    ) -> Any:
        """A cached forward of the base over a block of columns; the cache then holds them.

        Forward hooks on the base are run as if it had been called; with a hook in front of it, it really is.

        Args:
            input_ids: long [rows, width].
            past_key_values: what is cached; anything but a `StaticDecodingCache` goes to the base as it is.
            attention_mask: [rows, cached columns + width], 0 or False where a row has no token; None = all are real.
            position_ids: long [rows, width]; None = as many as are cached, and on.
            use_cache: as in the base; without it nothing is compiled.
            logits_to_keep: columns of the block whose logits are given: their indices, or how many of the last (0 =
                all).
            output_hidden_states: give the hidden states too.

        Returns:
            The base's output: logits [rows, kept, vocab], hidden states [rows, width, base_width] each.

        Raises:
            ValueError: ids or mask do not have the shape that the static cache asks for.
        """
        inputs = {"input_ids": input_ids, "past_key_values": past_key_values, "use_cache": use_cache}
        inputs |= {"attention_mask": attention_mask, "position_ids": position_ids}
        # What is left at its default is not passed, as some bases lack it.
        if not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            inputs["logits_to_keep"] = logits_to_keep
        if output_hidden_states:
            inputs["output_hidden_states"] = True
        inputs = {name: value for name, value in inputs.items() if value is not None}
        uncompiled = partial(self.model.base, **inputs)
        cache = past_key_values
        wide = self.buckets.fitting("widths", input_ids.shape[1])
        if "base" in self.off or wide is None or not use_cache or not isinstance(cache, StaticDecodingCache):
            return uncompiled()
        if self.model.base._forward_pre_hooks:  # they may change what goes in
            return uncompiled()
        cache.reserve(wide)
        attention = self.model.base.config._attn_implementation
        rows, columns = cache.capacity
        compilable = rows in self.buckets.rows and columns in self.buckets.columns and attention in MASKED_ATTENTION
        key = ("base", rows, columns, wide, output_hidden_states, attention) if compilable else None
        mask, positions = _mask_and_positions(cache, input_ids, attention_mask, position_ids)
        compiled = partial(
            self._run_base, cache, wide, input_ids, mask, positions, logits_to_keep, output_hidden_states
        )
        output, was_compiled = self._attempt(key, _base_step, compiled, uncompiled)
        return _with_hooks(self.model.base, inputs, output) if was_compiled else output

    def _run_base(
        self,
        cache: StaticDecodingCache,
        wide: int,
        ids: Tensor,
        mask: Tensor,
        positions: Tensor,
        logits_to_keep: int | Tensor,
        hidden: bool,
        run: Callable[..., Any],
    ) -> CausalLMOutputWithPast:
        """`verify` with a compiled `_base_step`, for a block that is padded to `wide`."""
        (rows, width), capacity, storage = ids.shape, cache.capacity, cache.storage
        assert storage is not None
        logits, states = run(
            self.model.base,
            _padded(ids, (capacity[0], wide), 0),
            _padded(mask, capacity, False),
            _padded(positions, (capacity[0], wide), 0),
            torch.full((1,), cache.length, device=ids.device),
            storage.keys,
            storage.values,
            hidden,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        output = CausalLMOutputWithPast(
            logits=_kept(logits[:rows, :width][:, keep]),
            past_key_values=cache,
            hidden_states=tuple(_kept(layer[:rows, :width]) for layer in states) if hidden else None,
        )
        # The block's padding stays in the storage, where the next block is written over it.
        cache.advance(width)
        return output

    # --------------------------------------------------------------- the head

    @torch.no_grad()
    def head_step(
        self,
        memory: PromptMemory,
        scaffold_ids: Tensor,
        scaffold_mask: Tensor,
        slot_positions: Tensor,
        time: Tensor,
        field_ids: Tensor | None = None,
        guidance_scale: float = 0.0,
    ) -> Tensor:
        """`draft_log_probs` of the model, compiled.

        Forward hooks on the head are run with the log-probabilities as its output; what they return is not used. With a
        hook in front of the head it is not compiled.

        Args:
            memory: from `prompt_memory`; if it is the same object in all steps of a draft, it is padded once.
            scaffold_ids: long [batch, scaffold].
            scaffold_mask: [batch, scaffold], 0 or False at padding.
            slot_positions: long [batch, positions].
            time: float [batch].
            field_ids: long [batch, scaffold], or None.
            guidance_scale: strength of classifier-free guidance; each value is compiled by itself.

        Returns:
            Float32 log-probabilities [batch, positions, vocab + 2].
        """
        inputs = (memory, scaffold_ids, scaffold_mask, slot_positions, time, field_ids, guidance_scale)
        sizes = {"rows": len(scaffold_ids), "prompt": memory.mask.shape[1]}
        sizes |= {"scaffold": scaffold_ids.shape[1], "positions": slot_positions.shape[1]}
        shape = [bucket for part, size in sizes.items() if (bucket := self.buckets.fitting(part, size)) is not None]
        hooked = bool(self.model.diffusion_head._forward_pre_hooks)  # they may change what goes in
        compilable = "head" not in self.off and len(shape) == len(sizes) and not hooked
        key = ("head", *shape, field_ids is None, guidance_scale) if compilable else None
        compiled = partial(self._run_head, shape, *inputs)
        log_probs, was_compiled = self._attempt(key, _head_step, compiled, partial(self.model.draft_log_probs, *inputs))
        if was_compiled:
            _with_hooks(self.model.diffusion_head, {}, log_probs)
        return log_probs

    def _run_head(
        self,
        shape: Sequence[int],
        memory: PromptMemory,
        scaffold_ids: Tensor,
        scaffold_mask: Tensor,
        slot_positions: Tensor,
        time: Tensor,
        field_ids: Tensor | None,
        guidance_scale: float,
        run: Callable[..., Any],
    ) -> Tensor:
        """`head_step` with a compiled `_head_step`, for inputs that are padded to `shape`."""
        rows, prompt, scaffold, positions = shape
        batch, wanted = slot_positions.shape
        mask = _padded(scaffold_mask.bool(), (rows, scaffold), False)
        mask[batch:] = True  # an empty row of attention has no defined result
        log_probs = run(
            _Hookless(self.model, diffusion_head=_Hookless(self.model.diffusion_head)),
            self._memory(memory, rows, prompt),
            # MASK is in no prompt, so padding is no neighbour that a prompt's token could match.
            _padded(scaffold_ids, (rows, scaffold), self.model.config.mask_token_id),
            mask,
            _padded(slot_positions, (rows, positions), 0),
            _padded(time, (rows,), 1.0),
            None if field_ids is None else _padded(field_ids, (rows, scaffold), -1),
            guidance_scale,
        )
        return _kept(log_probs[:batch, :wanted])

    def _memory(self, memory: PromptMemory, rows: int, prompt: int) -> PromptMemory:
        """A memory padded to [rows, prompt]; kept while the memory lives, for its next step."""
        padded = self._padded_memories.get(memory)
        if padded is None or padded.mask.shape != (rows, prompt):
            padded = self._padded_memories[memory] = _padded_memory(memory, rows, prompt)
        return padded

    # --------------------------------------------------------------- both

    def _attempt(
        self,
        key: tuple[Any, ...] | None,
        function: Callable[..., Any],
        compiled: Callable[[Callable[..., Any]], T],
        uncompiled: Callable[[], T],
    ) -> tuple[T, bool]:
        """Run the compiled forward of a shape, or the ordinary one where there is none or it fails.

        Args:
            key: part and shape; None runs the ordinary forward.
            function: what is compiled.
            compiled: runs what is compiled, which it is given.
            uncompiled: the ordinary forward.

        Returns:
            The result, and whether it comes from the compiled forward.
        """
        graph = None if key is None else self._graph(key, function)
        if key is None or graph is None:
            return uncompiled(), False
        with ExitStack() as stack:
            if graph.compiled is None and not stack.enter_context(_GATE.alone()):
                return uncompiled(), False  # it is compiled at a later call
            try:
                with _outside_inference_mode():
                    return compiled(graph), True
            except Exception as error:
                reason = f"it failed with {_in_one_line(error)}"
        # A faulty request fails here again, and then compilation is not to blame and stays on.
        result = uncompiled()
        self._switch_off(key[0], reason)
        return result, False

    def _graph(self, key: tuple[Any, ...], function: Callable[..., Any]) -> _Graph | None:
        """The compiled function of a shape; None where no more may be made."""
        with self._lock:
            if key in self._graphs:
                return self._graphs[key]
            if len(self._graphs) >= self.max_graphs:
                if not self._told_of_limit:
                    self._told_of_limit = True
                    logger.warning(
                        f"{self.max_graphs} shapes are compiled, the limit; further ones run uncompiled. Raise "
                        "max_graphs, or use fewer buckets."
                    )
                return None
            own = _own_code(function, f"{function.__name__}_{len(self._graphs)}")
            cuda = self.model.device.type == "cuda"
            mode = self.mode or default_mode(self.model.device.type, self.backend)
            graph = self._graphs[key] = _Graph(own, self.backend, mode, cuda)
            return graph

    def _switch_off(self, part: str, reason: str) -> None:
        """Run a part uncompiled from now on, and say so once."""
        if part not in self.off:
            self.off[part] = reason
            logger.warning(f"Compiled decoding is off for the {part}: {reason}. It runs uncompiled.")


def uncompilable_parts(model: Any) -> dict[str, str]:
    """Which parts of a model cannot be compiled, and why.

    Args:
        model: the model.

    Returns:
        A reason for each of `"base"` and `"head"` that is left out.
    """
    reason = None
    quantised = any(
        getattr(part, "hf_quantizer", None) or getattr(part.config, "quantization_config", None)
        for part in (model, model.base)
    )
    if model.device.type not in COMPILED_DEVICES:
        reason = f"torch.compile is used on CPU and CUDA, not on {model.device.type}"
    elif quantised:
        reason = "the base is quantised"
    elif any(len(set((getattr(part, "hf_device_map", None) or {}).values())) > 1 for part in (model, model.base)):
        reason = "the model is spread over several devices"
    if reason is not None:
        return {"base": reason, "head": reason}
    off = {"head": "it reads the base's features of the scaffold"} if model.diffusion_head.reads_scaffold else {}
    layers = DynamicCache(config=model.config.get_text_config()).layers
    if not layers or any(type(layer) is not DynamicLayer for layer in layers):
        return {**off, "base": "not all of its layers are full attention"}
    attention = model.base.config._attn_implementation
    if attention not in MASKED_ATTENTION:
        return {**off, "base": f"its attention is {attention!r}, which is none of {', '.join(MASKED_ATTENTION)}"}
    return off


def _in_one_line(error: BaseException) -> str:
    """What went wrong in the end; the compiler wraps the errors of what it calls, and prints programs into them."""
    while isinstance(inner := getattr(error, "inner_exception", None), BaseException):
        error = inner
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


@contextmanager
def _outside_inference_mode() -> Iterator[None]:
    """Leave inference mode, whose tensors would be compiled for by themselves; gradients stay off."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _with_hooks(module: Any, inputs: dict[str, Any], output: Any) -> Any:
    """Run a module's forward hooks, as calling it does; gives the output that they leave."""
    for number, hook in list(module._forward_hooks.items()):
        arguments: tuple[Any, ...] = ((), inputs) if number in module._forward_hooks_with_kwargs else ((),)
        changed = hook(module, *arguments, output)
        output = output if changed is None else changed
    return output


def _kept(tensor: Tensor) -> Tensor:
    """A result that outlives the next replay of a CUDA graph, whose memory is used again."""
    return tensor.clone() if tensor.is_cuda else tensor


def _mask_and_positions(
    cache: StaticDecodingCache, ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Bool mask [rows, cached columns + width] and positions [rows, width] of a block, made where they are missing."""
    rows, width = ids.shape
    end = cache.length + width
    if rows != cache.rows:
        raise ValueError(f"The cache has {cache.rows} rows, input_ids {rows}: select the rows of the cache first.")
    if attention_mask is None:
        attention_mask = torch.ones(rows, end, dtype=torch.bool, device=ids.device)
    elif attention_mask.shape != (rows, end):
        raise ValueError(
            f"The attention mask is {list(attention_mask.shape)}; it must cover what is cached and the new tokens, "
            f"{[rows, end]}."
        )
    if position_ids is None:
        position_ids = torch.arange(cache.length, end, device=ids.device).expand(rows, -1)
    return attention_mask.bool(), position_ids.expand(rows, -1)


def _padded(tensor: Tensor, shape: tuple[int, ...], fill: float) -> Tensor:
    """A copy of a tensor with more of `fill` at the end of its dimensions; always a fresh one."""
    result = torch.full(shape, fill, dtype=tensor.dtype, device=tensor.device)
    result[tuple(slice(size) for size in tensor.shape)] = tensor
    return result


def _padded_memory(memory: PromptMemory, rows: int, prompt: int) -> PromptMemory:
    """A memory with padding behind its prompts, and rows that are all padding."""
    missing = rows - memory.mask.shape[0]

    def nothing(states: Tensor) -> Tensor:
        return states.new_zeros(missing, *states.shape[1:-2], prompt, states.shape[-1])

    padding = PromptMemory(
        keys=tuple(nothing(layer) for layer in memory.keys),
        values=tuple(nothing(layer) for layer in memory.values),
        copy_keys=nothing(memory.copy_keys),
        copy_values=nothing(memory.copy_values),
        prompt_ids=memory.prompt_ids.new_zeros(missing, prompt),
        mask=memory.mask.new_zeros(missing, prompt),
        lengths=memory.lengths.new_zeros(missing),
    )
    return PromptMemory.stack([memory, padding])
