"""Compiled forwards give what ordinary ones give, for a bounded number of shapes, and never cost a request a reply."""

import copy
import logging
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, MistralConfig, StaticCache

from repo_package import load_repo_module
from test_batches import replies
from test_generation import CLOSED, TIME, WEATHER, prompt_of, respond
from test_generation import tiny_model as tool_model
from tiny_models import BASES, SmolLMDiffusionConfig, SmolLMDiffusionForCausalLM, random_ids, tiny_text_config
from tiny_tokenizer import tiny_tokenizer

batched_cache = load_repo_module("batched_cache")
compiled = load_repo_module("compiled_decoding")
prompt_cache = load_repo_module("prompt_cache")
Buckets, CompiledDecoding, StaticDecodingCache = (
    compiled.Buckets,
    compiled.CompiledDecoding,
    compiled.StaticDecodingCache,
)

# Few and small, so that tests meet their edges.
BUCKETS = Buckets(
    rows=(1, 2, 4), widths=(1, 8), columns=(16, 32, 64), prompt=(16, 32), scaffold=(8, 16), positions=(4, 8)
)
TOLERANCE: dict[str, Any] = {"atol": 2e-5, "rtol": 1e-4}


class Counter:
    """A backend of `torch.compile` that counts what is compiled and runs it as it is.

    Args:
        seconds: how long it pretends to compile.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self.graphs = 0
        self.seconds = seconds

    def __call__(self, graph: Any, inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
        self.graphs += 1
        time.sleep(self.seconds)
        return graph.forward


def small_model(base: str = "smollm3", **fields: Any) -> Any:
    """A random model of two layers, of which smollm3's second has no rotary embedding."""
    text = tiny_text_config(base).to_dict()
    text |= {"num_hidden_layers": 2, "n_layer": 2, "layer_types": None, "no_rope_layers": [1, 0]}
    config = type(tiny_text_config(base)).from_dict(text)
    head = {"head_hidden_size": 32, "head_num_layers": 2, "head_num_heads": 2, "initializer_range": 0.1}
    return SmolLMDiffusionForCausalLM(SmolLMDiffusionConfig(text_config=config, **head, **fields)).eval()


@pytest.fixture(scope="module")
def shared() -> Iterator[Any]:
    """One model for the tests that compile, which takes seconds; dynamo may keep one result for each code."""
    torch.manual_seed(0)
    with torch._dynamo.config.patch(recompile_limit=1):
        yield CompiledDecoding(small_model(), backend=Counter(), buckets=BUCKETS)
    torch._dynamo.reset()


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """Run what would be compiled as it is: padding, masks and caches are the same, and it takes no time to compile."""
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def warnings_of(module: Any) -> Iterator[list[str]]:
    """What the module logs while the block runs."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    module.logger.addHandler(handler)
    try:
        yield messages
    finally:
        module.logger.removeHandler(handler)


@torch.no_grad()
def prefilled(model: Any, rows: int, length: int) -> tuple[DynamicCache, Tensor]:
    """A cache of a random prompt, rows padded on the left by 0, 1, 2, ... columns, and its mask."""
    mask = torch.arange(length) >= torch.arange(rows)[:, None]
    cache = DynamicCache()
    model.base(
        input_ids=random_ids(rows, length),
        attention_mask=mask.long(),
        position_ids=positions_of(mask, length),
        past_key_values=cache,
        use_cache=True,
    )
    return cache, mask


def positions_of(mask: Tensor, width: int) -> Tensor:
    """Positions of the last columns."""
    return (mask.long().cumsum(1) - 1).clamp_min(0)[:, -width:]


def memory_of(model: Any, rows: int, length: int) -> Any:
    """The memory of random prompts, rows padded on the right by 0, 1, 2, ... positions."""
    ids = random_ids(rows, length)
    ids[:, 1::2] = 0  # what ids are usually padded with is a token like any other
    mask = torch.arange(length) < length - torch.arange(rows)[:, None]
    with torch.no_grad():
        states = model.base(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states
    return model.prompt_memory(states, ids, mask)


def step_of(model: Any, memory: Any, length: int, wanted: int) -> dict[str, Any]:
    """Inputs of a head step over canvases of which half is masked, rows padded by 0, 1, 2, ... positions."""
    rows = len(memory.mask)
    ids = random_ids(rows, length)
    # A piece of the prompt at the end: padding behind it must not look like what follows it there.
    ids[:, -3:] = memory.prompt_ids[:, :3]
    ids[torch.rand(rows, length) < 0.3] = model.config.mask_token_id
    return {
        "memory": memory,
        "scaffold_ids": ids,
        "scaffold_mask": torch.arange(length) < length - torch.arange(rows)[:, None],
        "slot_positions": torch.randint(0, max(1, length - rows), (rows, wanted)),
        "time": torch.rand(rows),
        "field_ids": torch.arange(length).expand(rows, -1) // 3 - 1,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Buckets and the static cache
# ---------------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 200))
def test_a_bucket_is_the_least_that_fits(size: int) -> None:
    fitting = BUCKETS.fitting("columns", size)
    assert fitting == min((bucket for bucket in (16, 32, 64) if bucket >= size), default=None)
    capacity = BUCKETS.capacity("columns", size)
    assert capacity == (fitting or -(-size // 64) * 64)


@pytest.mark.parametrize("sizes", [(), (0, 1), (4, 2), (2, 2)])
def test_buckets_must_ascend(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="Buckets of widths must be ascending"):
        Buckets(widths=sizes)


def random_layers(rows: int, length: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of two layers, whose values are wider than their keys."""
    return [(torch.randn(rows, 2, length, 4), torch.randn(rows, 2, length, 6)) for _ in range(2)]


def dynamic_cache(rows: int, length: int) -> DynamicCache:
    cache = DynamicCache()
    for number, (keys, values) in enumerate(random_layers(rows, length)):
        cache.update(keys, values, number)
    return cache


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 30)),
        st.tuples(st.just("crop"), st.integers(0, 20)),
        st.tuples(st.just("rows"), st.lists(st.integers(0, 100), min_size=1, max_size=6)),
        st.tuples(st.just("replace"), st.integers(1, 10)),
    ),
    max_size=8,
)


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 6), length=st.integers(1, 40), operations=OPERATIONS)
def test_a_static_cache_holds_what_a_dynamic_cache_holds(
    rows: int, length: int, operations: list[tuple[str, Any]]
) -> None:
    dynamic = dynamic_cache(rows, length)
    static = StaticDecodingCache.from_dynamic(dynamic, pool=compiled.StoragePool(BUCKETS))
    for name, value in operations:
        rows, length = static.rows, static.length
        if name == "append":
            for number, (keys, values) in enumerate(random_layers(rows, value)):
                got = static.update(keys, values, number)
                assert all(map(torch.equal, got, dynamic.update(keys, values, number)))
        elif name == "crop":
            for cache in (dynamic, static):
                cache.crop(-min(value, length - 1))
        elif name == "rows":
            for cache in (dynamic, static):
                cache.batch_select_indices(torch.tensor(value) % rows)
        else:  # move columns together, by hand as a user of a dynamic cache does
            for cache in (dynamic, static):
                for layer in cache.layers:
                    layer.keys = layer.keys[:, :, -value:]
                    layer.values = layer.values[:, :, -value:]
        assert static.get_seq_length() == static.length == dynamic.get_seq_length()
        assert static.get_mask_sizes(3, 0) == dynamic.get_mask_sizes(3, 0)
        for ours, theirs in zip(static.layers, dynamic.layers, strict=True):
            assert torch.equal(ours.keys, theirs.keys)
            assert torch.equal(ours.values, theirs.values)
        assert static.capacity[1] % 16 == 0
        assert static.capacity >= (static.rows, 0)
        assert static.capacity[1] >= static.length


def test_a_full_cache_moves_to_the_next_bucket() -> None:
    static = StaticDecodingCache.from_dynamic(dynamic_cache(3, 10), pool=compiled.StoragePool(BUCKETS))
    assert static.capacity == (4, 16)
    static.reserve(6)
    assert static.capacity == (4, 16)
    static.reserve(7)
    assert static.capacity == (4, 32)
    static.reserve(100)
    assert static.capacity == (4, 128)  # a multiple of the last bucket


def test_fewer_rows_move_to_a_smaller_bucket() -> None:
    static = StaticDecodingCache.from_dynamic(dynamic_cache(4, 10), pool=compiled.StoragePool(BUCKETS))
    static.batch_select_indices(torch.tensor([3, 0, 1]))
    assert static.capacity == (4, 16)
    static.batch_select_indices(torch.tensor([True, False, True]))
    assert static.capacity == (2, 16)
    assert static.rows == 2


def test_selected_rows_are_a_cache_of_their_own() -> None:
    static = StaticDecodingCache.from_dynamic(dynamic_cache(3, 5), pool=compiled.StoragePool(BUCKETS))
    before = static.layers[1].values.clone()
    chosen = static.select(torch.tensor([2]))
    assert torch.equal(chosen.layers[1].values, before[2:])
    for number, (keys, values) in enumerate(random_layers(1, 2)):
        chosen.update(keys, values, number)
    chosen.layers[1].values = torch.zeros(1, 2, 7, 6)
    assert torch.equal(static.layers[1].values, before)
    assert static.length == 5


def test_a_reset_cache_is_empty() -> None:
    static = StaticDecodingCache.from_dynamic(dynamic_cache(2, 5))
    static.reset()
    assert static.length == 0
    for number, (keys, values) in enumerate(random_layers(2, 3)):
        assert torch.equal(static.update(keys, values, number)[0], keys)


def test_a_static_cache_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(ValueError, match="layers are: none"):
        StaticDecodingCache.from_dynamic(DynamicCache())
    sliding = LlamaConfig(num_hidden_layers=2, sliding_window=4)
    with pytest.raises(ValueError, match="DynamicSlidingWindowLayer"):
        StaticDecodingCache.from_dynamic(DynamicCache(config=sliding))
    with pytest.raises(ValueError, match="StaticLayer"):
        StaticDecodingCache.from_dynamic(StaticCache(LlamaConfig(num_hidden_layers=2), max_cache_len=8))
    static = StaticDecodingCache.from_dynamic(dynamic_cache(2, 5), pool=compiled.StoragePool(BUCKETS))
    with pytest.raises(ValueError, match=r"use crop\(-n\)"):
        static.crop(2)
    with pytest.raises(ValueError, match="do not fit into a static cache of 2 rows and 16 columns"):
        static.layers[0].keys = torch.zeros(2, 2, 17, 4)
    assert static.length == 5


def test_a_storage_is_used_again_when_its_cache_is_gone_and_nothing_is_left_in_it() -> None:
    pool = compiled.StoragePool(BUCKETS)
    first = StaticDecodingCache.from_dynamic(dynamic_cache(2, 12), pool=pool)
    address = first.storage.keys[0].data_ptr()
    second = StaticDecodingCache.from_dynamic(dynamic_cache(2, 12), pool=pool)
    assert second.storage.keys[0].data_ptr() != address, "a storage was taken from a living cache"
    del first
    third = StaticDecodingCache.from_dynamic(dynamic_cache(2, 3), pool=pool)
    assert third.storage.keys[0].data_ptr() == address
    assert not third.storage.keys[0][:, :, 3:].any()
    assert not third.storage.values[1][:, :, 3:].any()


def test_a_storage_is_held_before_anything_is_copied_into_it_and_let_go_by_a_move() -> None:
    """Another thread may ask for one between the two."""
    pool = compiled.StoragePool(BUCKETS)
    first = StaticDecodingCache.from_dynamic(dynamic_cache(2, 5), pool=pool)
    others = [StaticDecodingCache.__new__(StaticDecodingCache) for _ in range(2)]
    taken = [pool.take(other, random_layers(2, 5), 2, 5) for other in others]
    assert len({id(storage) for storage in (first.storage, *taken)}) == 3
    left = first.storage
    first.reserve(20)
    assert not left.in_use
    assert first.storage.in_use


def test_few_unused_storages_are_kept() -> None:
    pool = compiled.StoragePool(BUCKETS)
    caches = [StaticDecodingCache.from_dynamic(dynamic_cache(1, 5), pool=pool) for _ in range(9)]
    assert len(pool._storages) == 9
    del caches
    StaticDecodingCache.from_dynamic(dynamic_cache(4, 60), pool=pool)
    assert len(pool._storages) <= compiled.KEPT_STORAGES + 1


# ---------------------------------------------------------------------------------------------------------------------
# The base
# ---------------------------------------------------------------------------------------------------------------------


def decode_both_ways(decoding: Any, rows: int, length: int, turns: Sequence[tuple[int, int]], hidden: bool) -> None:
    """Several turns of a batch on a dynamic and on a static cache: blocks with holes, crops, fewer rows at last."""
    model = decoding.model
    dynamic, mask = prefilled(model, rows, length)
    static = decoding.static_cache(dynamic)
    assert isinstance(static, StaticDecodingCache)
    for turn, (width, crop) in enumerate(turns):
        if turn == len(turns) - 1 and rows > 1:
            kept = torch.arange(1, rows)
            dynamic.batch_select_indices(kept)
            static.batch_select_indices(kept)
            mask = mask[kept]
        block = torch.arange(width) < torch.randint(1, width + 1, (len(mask), 1))
        mask = torch.cat([mask, block], dim=1)
        inputs = {
            "input_ids": random_ids(len(mask), width),
            "attention_mask": mask.long(),
            "position_ids": positions_of(mask, width),
            "output_hidden_states": hidden,
        }
        with torch.no_grad():
            expected = model.base(past_key_values=dynamic, use_cache=True, **inputs)
        output = decoding.verify(past_key_values=static, **inputs)
        assert decoding.off == {}
        assert output.past_key_values is static
        torch.testing.assert_close(output.logits[block], expected.logits[block], **TOLERANCE)
        for ours, theirs in zip(output.hidden_states or (), expected.hidden_states or (), strict=True):
            torch.testing.assert_close(ours[block], theirs[block], **TOLERANCE)
        assert (output.hidden_states is not None) == hidden
        crop = min(crop, width)
        dynamic.crop(-crop)
        static.crop(-crop)
        mask = mask[:, : mask.shape[1] - crop]
        assert static.length == dynamic.get_seq_length() == mask.shape[1]


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("base", BASES)
@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 5),
    length=st.integers(6, 20),
    turns=st.lists(st.tuples(st.integers(1, 10), st.integers(0, 9)), min_size=1, max_size=5),
    hidden=st.booleans(),
)
def test_verify_equals_the_base_on_a_dynamic_cache(
    base: str, rows: int, length: int, turns: list[tuple[int, int]], hidden: bool
) -> None:
    decode_both_ways(CompiledDecoding(small_model(base), buckets=BUCKETS), rows, length, turns, hidden)


def test_compiled_verify_equals_the_base_and_compiles_no_bucket_twice(shared: Any) -> None:
    for rows, length in ((4, 9), (3, 12), (4, 15)):
        decode_both_ways(shared, rows, length, [(5, 2), (3, 3), (8, 5), (2, 0)], hidden=True)
    # 32 columns, of 4 rows and of 2 where one of 3 was dropped; all blocks are at most 8 wide.
    shapes = {key[1:4] for key in shared._graphs if key[0] == "base" and key[4]}
    assert shapes == {(4, 32, 8), (2, 32, 8)}
    assert shared.graphs == shared.backend.graphs


@pytest.mark.parametrize("base", [base for base in BASES if base != "smollm3"])
def test_other_bases_compile_as_well(base: str) -> None:
    decoding = CompiledDecoding(small_model(base), backend=Counter(), buckets=BUCKETS)
    decode_both_ways(decoding, 1, 15, [(5, 2), (3, 3), (8, 0)], hidden=False)
    assert decoding.graphs == decoding.backend.graphs == 1


@pytest.mark.usefixtures("uncompiled")
def test_eager_attention_is_masked_as_well() -> None:
    model = small_model()
    model.base.set_attn_implementation("eager")
    decode_both_ways(CompiledDecoding(model, buckets=BUCKETS), 3, 8, [(5, 2), (3, 0), (8, 8), (2, 1)], hidden=False)


@pytest.mark.usefixtures("uncompiled")
def test_a_missing_mask_means_that_all_is_real() -> None:
    model = small_model()
    decoding = CompiledDecoding(model, buckets=BUCKETS)
    dynamic = DynamicCache()
    with torch.no_grad():
        model.base(input_ids=random_ids(2, 9), past_key_values=dynamic, use_cache=True)
        static, ids = decoding.static_cache(dynamic), random_ids(2, 5)
        expected = model.base(input_ids=ids, past_key_values=dynamic, use_cache=True).logits
    torch.testing.assert_close(decoding.verify(ids, static).logits, expected, **TOLERANCE)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("keep", [0, 1, 3, torch.tensor([4, 0])])
def test_only_asked_logits_are_given(keep: int | Tensor) -> None:
    model = small_model()
    decoding = CompiledDecoding(model, buckets=BUCKETS)
    dynamic, _ = prefilled(model, 1, 9)
    static, ids = decoding.static_cache(dynamic), random_ids(1, 5)
    with torch.no_grad():
        expected = model.base(input_ids=ids, past_key_values=dynamic, use_cache=True, logits_to_keep=keep).logits
    logits = decoding.verify(ids, static, logits_to_keep=keep).logits
    assert logits.shape == expected.shape
    torch.testing.assert_close(logits, expected, **TOLERANCE)


@pytest.mark.usefixtures("uncompiled")
def test_what_no_bucket_holds_runs_on_the_static_cache_uncompiled() -> None:
    decoding = CompiledDecoding(small_model(), buckets=BUCKETS)
    decode_both_ways(decoding, 5, 12, [(9, 2), (20, 3), (4, 0)], hidden=True)  # too wide twice, too many rows
    graphs = decoding.graphs
    decode_both_ways(decoding, 2, 60, [(8, 2), (8, 0)], hidden=False)  # too many columns
    assert graphs == 1
    assert decoding.graphs == 1


@pytest.mark.usefixtures("uncompiled")
def test_any_other_cache_goes_to_the_base_as_it_is() -> None:
    model = small_model()
    decoding = CompiledDecoding(model, buckets=BUCKETS)
    ids, cache, other = random_ids(2, 9), DynamicCache(), DynamicCache()
    output = decoding.verify(ids, cache, output_hidden_states=True)
    with torch.no_grad():
        expected = model.base(input_ids=ids, past_key_values=other, use_cache=True, output_hidden_states=True)
    assert torch.equal(output.logits, expected.logits)
    assert cache.get_seq_length() == 9
    assert decoding.graphs == 0


def test_a_request_that_does_not_fit_the_cache_is_refused() -> None:
    decoding = CompiledDecoding(small_model(), buckets=BUCKETS)
    static = decoding.static_cache(prefilled(decoding.model, 2, 9)[0])
    with pytest.raises(ValueError, match="The cache has 2 rows, input_ids 3"):
        decoding.verify(random_ids(3, 4), static)
    with pytest.raises(ValueError, match=r"it must cover what is cached and the new tokens, \[2, 13\]"):
        decoding.verify(random_ids(2, 4), static, attention_mask=torch.ones(2, 4))
    assert decoding.off == {}


# ---------------------------------------------------------------------------------------------------------------------
# The head
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("uncompiled")
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 5),
    prompt=st.integers(5, 34),
    length=st.integers(3, 18),
    wanted=st.integers(1, 9),
    guidance=st.sampled_from([0.0, 1.5]),
    field_mask=st.sampled_from(["full", "block_causal", "isolated"]),
)
def test_a_head_step_equals_draft_log_probs(
    rows: int, prompt: int, length: int, wanted: int, guidance: float, field_mask: str
) -> None:
    assume(rows <= length)  # no row is padding alone: what an attention that sees nothing gives has no meaning
    model = small_model(field_mask=field_mask)
    step = step_of(model, memory_of(model, rows, prompt), length, wanted) | {"guidance_scale": guidance}
    with torch.no_grad():
        expected = model.draft_log_probs(**step)
    decoding = CompiledDecoding(model, buckets=BUCKETS)
    log_probs = decoding.head_step(**step)
    assert decoding.off == {}
    assert log_probs.shape == expected.shape
    torch.testing.assert_close(log_probs.exp(), expected.exp(), **TOLERANCE)
    assert bool((log_probs[..., model.config.mask_token_id] == -torch.inf).all())


def test_compiled_head_steps_are_shared_by_requests_of_the_same_buckets(shared: Any) -> None:
    before = shared.graphs
    for rows, prompt, length, wanted in ((2, 20, 12, 7), (2, 31, 16, 5), (2, 17, 9, 8)):
        memory = memory_of(shared.model, rows, prompt)
        for _ in range(2):
            step = step_of(shared.model, memory, length, wanted)
            with torch.no_grad():
                expected = shared.model.draft_log_probs(**step)
            torch.testing.assert_close(shared.head_step(**step).exp(), expected.exp(), **TOLERANCE)
        assert shared.graphs == shared.backend.graphs == before + 1
    assert shared.off == {}


@pytest.mark.usefixtures("uncompiled")
def test_a_memory_is_padded_once_for_all_steps_and_let_go_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    decoding = CompiledDecoding(small_model(), buckets=BUCKETS)
    padded, pad = [], compiled._padded_memory

    def counted(*args: Any) -> Any:
        padded.append(args[1:])
        return pad(*args)

    monkeypatch.setattr(compiled, "_padded_memory", counted)
    memory = memory_of(decoding.model, 1, 7)
    for _ in range(3):
        decoding.head_step(**step_of(decoding.model, memory, 6, 2))
    assert padded == [(1, 16)]
    assert len(decoding._padded_memories) == 1
    del memory
    assert len(decoding._padded_memories) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Bounds, failures, neighbours
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("uncompiled")
def test_no_more_shapes_are_compiled_than_allowed() -> None:
    model = small_model()
    decoding = CompiledDecoding(model, buckets=BUCKETS, max_graphs=1)
    with warnings_of(compiled) as messages:
        decode_both_ways(decoding, 1, 9, [(1, 0), (5, 0), (1, 0), (8, 0)], hidden=False)
    assert decoding.graphs == 1
    assert messages == [
        "1 shapes are compiled, the limit; further ones run uncompiled. Raise max_graphs, or use fewer buckets."
    ]
    with pytest.raises(ValueError, match="leaves nothing to compile"):
        CompiledDecoding(model, max_graphs=0)


def failing_graph(graph: Any, inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
    """A backend whose graphs run, which writes into the cache, and fail then."""

    def run(*args: Any) -> Any:
        graph.forward(*args)
        raise RuntimeError("out of graphs\nand a long program")

    return run


@pytest.mark.parametrize(
    ("backend", "says"),
    [
        (failing_graph, "it failed with RuntimeError: out of graphs"),
        ("no_such_compiler", "it failed with InvalidBackend"),
    ],
)
def test_a_failing_compiler_costs_nothing_but_one_line(backend: Any, says: str) -> None:
    model = small_model()
    decoding = CompiledDecoding(model, backend=backend, buckets=BUCKETS)
    dynamic, _ = prefilled(model, 1, 9)
    static = decoding.static_cache(dynamic)
    with warnings_of(compiled) as messages, torch.no_grad():
        for _ in range(3):
            ids = random_ids(1, 4)
            expected = model.base(input_ids=ids, past_key_values=dynamic, use_cache=True).logits
            torch.testing.assert_close(decoding.verify(ids, static).logits, expected, **TOLERANCE)
    assert static.length == dynamic.get_seq_length() == 21
    assert list(decoding.off) == ["base"]
    assert len(messages) == 1
    assert messages[0].startswith(f"Compiled decoding is off for the base: {says}")
    assert "\n" not in messages[0]
    assert decoding.static_cache(dynamic) is dynamic


def test_a_failing_head_step_is_run_uncompiled() -> None:
    model = small_model()
    decoding = CompiledDecoding(model, backend="no_such_compiler", buckets=BUCKETS)
    step = step_of(model, memory_of(model, 1, 6), 5, 2)
    with warnings_of(compiled) as messages, torch.no_grad():
        for _ in range(2):
            assert torch.equal(decoding.head_step(**step), model.draft_log_probs(**step))
    assert list(decoding.off) == ["head"]
    assert len(messages) == 1


@pytest.mark.usefixtures("uncompiled")
def test_a_faulty_request_gets_its_own_error_and_switches_nothing_off() -> None:
    model = small_model(field_mask="isolated")
    decoding = CompiledDecoding(model, buckets=BUCKETS)
    step = step_of(model, memory_of(model, 1, 6), 5, 2)
    with pytest.raises(ValueError, match="needs field_ids"):
        decoding.head_step(**{**step, "field_ids": None})
    static = decoding.static_cache(prefilled(model, 1, 9)[0])
    with pytest.raises(IndexError):
        decoding.verify(random_ids(1, 2) + 1000, static)
    assert static.length == 9
    assert decoding.off == {}


def quantised(model: Any) -> Any:
    model.base.config.quantization_config = {"quant_method": "bitsandbytes"}
    return model


def spread(model: Any) -> Any:
    model.hf_device_map = {"base": 0, "diffusion_head": 1}
    return model


def with_sliding_window(model: Any) -> Any:
    model.config.get_text_config().sliding_window = 4
    model.config.get_text_config().layer_types = ["full_attention", "sliding_attention"]
    return model


def with_flex_attention(model: Any) -> Any:
    model.base.config._attn_implementation = "flex_attention"
    return model


@pytest.mark.parametrize(
    ("change", "parts", "says"),
    [
        (lambda model: model.to("meta"), ["base", "head"], "not on meta"),
        (quantised, ["base", "head"], "the base is quantised"),
        (spread, ["base", "head"], "spread over several devices"),
        (with_sliding_window, ["base"], "not all of its layers are full attention"),
        (with_flex_attention, ["base"], "'flex_attention', which is none of sdpa, eager"),
    ],
)
def test_what_cannot_be_compiled_is_said_at_once(change: Callable[[Any], Any], parts: list[str], says: str) -> None:
    with warnings_of(compiled) as messages:
        decoding = CompiledDecoding(change(small_model()))
    assert list(decoding.off) == parts
    assert [f"off for the {part}" in message and says in message for part, message in zip(parts, messages, strict=True)]
    dynamic = dynamic_cache(1, 4)
    assert decoding.static_cache(dynamic) is dynamic


def test_hooks_see_every_forward_once_and_only_while_they_are_there(shared: Any) -> None:
    model = shared.model
    static = shared.static_cache(prefilled(model, 1, 5)[0])
    step = step_of(model, memory_of(model, 2, 20), 12, 6)
    counts = []
    for _ in range(3):
        seen: list[str] = []
        hooks = [
            model.base.register_forward_hook(lambda *_, seen=seen: seen.append("base")),
            model.diffusion_head.register_forward_hook(lambda *_, seen=seen: seen.append("head")),
        ]
        shared.verify(random_ids(1, 2), static)
        shared.head_step(**step)
        shared.head_step(**step)
        for hook in hooks:
            hook.remove()
        counts.append(seen)
        shared.head_step(**step)
        static.crop(-2)
    assert counts == [["base", "head", "head"]] * 3
    assert shared.graphs == shared.backend.graphs


def test_a_hook_on_the_base_may_change_what_it_gives(shared: Any) -> None:
    static = shared.static_cache(prefilled(shared.model, 1, 5)[0])

    def prefer(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        assert kwargs["input_ids"].shape == (1, 3)
        output.logits[..., 7] = 1e4
        return output

    hook = shared.model.base.register_forward_hook(prefer, with_kwargs=True)
    chosen = shared.verify(random_ids(1, 3), static).logits.argmax(-1)
    hook.remove()
    assert (chosen == 7).all()


def test_requests_in_inference_mode_and_outside_share_what_is_compiled(shared: Any) -> None:
    def request() -> None:
        decode_both_ways(shared, 1, 6, [(3, 1), (4, 4)], hidden=False)
        shared.head_step(**step_of(shared.model, memory_of(shared.model, 2, 20), 12, 6))

    with torch.inference_mode():
        request()
    request()
    assert shared.off == {}
    assert shared.graphs == shared.backend.graphs


def run_in_threads(tasks: Sequence[Callable[[], None]]) -> None:
    """Run tasks at the same time, taking turns as often as possible; what fails in one fails here."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(len(tasks)) as pool:
            for done in [pool.submit(task) for task in tasks]:
                done.result()
    finally:
        sys.setswitchinterval(interval)


def test_threads_share_what_is_compiled_and_keep_their_caches_apart(shared: Any) -> None:
    prompts = [prefilled(shared.model, 1, 6)[0] for _ in range(4)]
    blocks = [random_ids(1, 3) for _ in prompts]
    shared.verify(blocks[0], shared.static_cache(prompts[0]))
    results: dict[int, Tensor] = {}

    def run(number: int) -> None:
        static = shared.static_cache(prompts[number])
        for _ in range(5):
            results[number] = shared.verify(blocks[number], static).logits
            static.crop(-3)

    run_in_threads([partial(run, number) for number in range(len(prompts))])
    for number, (prompt, block) in enumerate(zip(prompts, blocks, strict=True)):
        with torch.no_grad():
            expected = shared.model.base(input_ids=block, past_key_values=prompt, use_cache=True).logits
        torch.testing.assert_close(results[number], expected, **TOLERANCE)
    assert shared.off == {}


@pytest.mark.usefixtures("uncompiled")
def test_a_model_that_holds_it_can_be_copied() -> None:
    model = small_model()
    model.decoding = CompiledDecoding(model, buckets=BUCKETS, max_graphs=3)
    decode_both_ways(model.decoding, 1, 6, [(3, 1)], hidden=False)
    copied = copy.deepcopy(model)
    assert copied.decoding.model is copied
    assert (copied.decoding.graphs, copied.decoding.max_graphs, copied.decoding.buckets) == (0, 3, BUCKETS)
    decode_both_ways(copied.decoding, 1, 6, [(3, 1)], hidden=False)


# ---------------------------------------------------------------------------------------------------------------------
# Generation
# ---------------------------------------------------------------------------------------------------------------------

EVERYONE = (["weather in Paris", "hello", "é🙂 日本"], [[WEATHER], [CLOSED, WEATHER, TIME], [TIME]])


# So few that a test which truly compiles compiles two shapes of the base and one of the head.
COARSE = Buckets(rows=(1, 4), widths=(1, 64), columns=(1024,), prompt=(1024,), scaffold=(128,), positions=(64,))


def plain_and_compiled(model: Any, run: Callable[[], Any], **options: Any) -> tuple[Any, Any]:
    """What `run` gives before and after `compile_decoding`, which is taken back, and which both parts have survived."""
    plain = run()
    assert model.compile_decoding(**options) is model
    try:
        after = run()
        assert model.compiled_decoding.off == {}
    finally:
        model.compiled_decoding = None
    return plain, after


@pytest.mark.usefixtures("uncompiled")
@settings(max_examples=15, deadline=None)
@given(st.data())
def test_replies_stay_what_they_are(data: Any) -> None:
    """Batches of several calls, under every decoding, greedy and drawn."""
    model = tool_model(seed=data.draw(st.integers(0, 30)), scale=data.draw(st.sampled_from([2.0, 6.0])))
    rows = data.draw(st.lists(st.sampled_from(range(3)), min_size=1, max_size=4))
    options = {
        "decoding": data.draw(st.sampled_from(["verified", "diffusion", "ar"])),
        "tool_choice": data.draw(st.sampled_from(["auto", "required"])),
        "max_tool_calls": data.draw(st.integers(1, 3)),
        "drafter": data.draw(st.sampled_from(["head", "head", "lookup"])),
        "guidance_scale": data.draw(st.sampled_from([0.0, 1.5])),
        "do_sample": data.draw(st.booleans()),
        "temperature": 0.7,
    }
    if all(EVERYONE[1][row] != [WEATHER] and options["tool_choice"] == "auto" for row in rows):
        rows[0] = 0

    def run() -> Any:
        torch.manual_seed(5)
        return replies(model, [EVERYONE[0][row] for row in rows], [EVERYONE[1][row] for row in rows], **options)

    (plain, before), (after, output) = plain_and_compiled(model, run)
    assert after == plain
    for old, new in zip(before.stats, output.stats, strict=True):
        assert (new.base_forwards, new.head_forwards, new.calls) == (old.base_forwards, old.head_forwards, old.calls)
        assert (new.drafted_slots, new.accepted_slots) == (old.drafted_slots, old.accepted_slots)


@pytest.mark.usefixtures("uncompiled")
def test_drafts_and_checks_of_a_call_go_through_what_is_compiled_and_prompts_do_not() -> None:
    model = tool_model(seed=3)
    model.compile_decoding()
    reply = respond(model, [WEATHER], max_tool_calls=1)
    assert reply.stats.head_forwards > 0
    assert {key[0] for key in model.compiled_decoding._graphs} == {"base", "head"}
    # The prompt is read by the base itself: what is compiled takes less than it at a time.
    widest = max(key[3] for key in model.compiled_decoding._graphs if key[0] == "base")
    assert widest <= 64 < prompt_of([WEATHER]).shape[1]
    before = model.compiled_decoding.graphs
    respond(model, [WEATHER], max_tool_calls=1)
    assert model.compiled_decoding.graphs == before


@pytest.mark.parametrize("decoding", ["ar", "verified", "diffusion"])
def test_stats_of_compiled_calls_count_what_a_hook_counts(decoding: str) -> None:
    """Truly compiled, by a backend that runs what it is given."""
    model, seen = tool_model(seed=1), {"base": 0, "head": 0}

    def count(part: str, *_: Any) -> None:
        seen[part] += 1

    def run() -> Any:
        return respond(model, [WEATHER], decoding=decoding, max_tool_calls=2)

    backend = Counter()
    plain, after = plain_and_compiled(model, run, backend=backend, buckets=COARSE)
    assert backend.graphs > 0
    assert after.token_ids == plain.token_ids
    model.compile_decoding(backend=backend, buckets=COARSE)
    hooks = [
        module.register_forward_hook(partial(count, part))
        for part, module in (("base", model.base), ("head", model.diffusion_head))
    ]
    stats = run().stats
    for hook in hooks:
        hook.remove()
    assert (stats.base_forwards, stats.head_forwards) == (seen["base"], seen["head"])
    assert (stats.base_forwards, stats.head_forwards) == (plain.stats.base_forwards, plain.stats.head_forwards)
    assert (stats.head_forwards == 0) == (decoding == "ar")
    torch._dynamo.reset()


def tool_model_of(text_config: Any) -> Any:
    """A random model around a base of any architecture and the tiny tokenizer."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    fields = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "max_position_embeddings": 512}
    text_config.update(fields)
    limits = {"string_budget": 5, "number_budget": 5, "max_value_tokens": 8, "max_call_tokens": 40}
    head = {"head_hidden_size": 32, "head_num_layers": 2, "head_num_heads": 2, "initializer_range": 0.1}
    return SmolLMDiffusionForCausalLM(SmolLMDiffusionConfig(text_config=text_config, **limits, **head)).eval()


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_calls_of_other_bases_stay_what_they_are(base: str) -> None:
    model = tool_model_of(tiny_text_config(base))
    for decoding in ("verified", "diffusion"):
        plain, after = plain_and_compiled(model, partial(respond, model, [WEATHER], decoding=decoding))
        assert after.token_ids == plain.token_ids


@pytest.mark.usefixtures("uncompiled")
def test_a_prompt_cache_and_compiled_calls_leave_each_other_alone() -> None:
    """Stored prompts are not written to by calls that follow them, and serve compiled and uncompiled requests alike."""
    model, kept = tool_model(seed=4), prompt_cache.PromptCache()
    texts, tools = EVERYONE
    plain, _ = replies(model, texts, tools, tool_choice="required")
    model.compile_decoding()
    for turn in range(3):
        again, _ = replies(model, texts, tools, tool_choice="required", prompt_cache=kept)
        assert again == plain, turn
    assert kept.stats.hits >= 2 * len(texts)
    model.compiled_decoding = None
    assert replies(model, texts, tools, tool_choice="required", prompt_cache=kept)[0] == plain


@lru_cache(None)
def small_base() -> Any:
    torch.manual_seed(0)
    return small_model().base.requires_grad_(False)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5),
    turns=st.lists(st.tuples(st.integers(1, 30), st.integers(0, 30)), max_size=7),
    seed=st.integers(0, 1000),
)
def test_a_batched_cache_is_static_or_dynamic(rows: int, turns: list[tuple[int, int]], seed: int) -> None:
    """Blocks, what is taken back of each row, and fewer rows: the same tokens stand in both."""
    chance = random.Random(seed)
    base, device = small_base(), torch.device("cpu")
    dynamic = batched_cache.BatchedCache(rows, device)
    prompts = [[chance.randrange(300) for _ in range(chance.randint(1, 9))] for _ in range(rows)]
    dynamic.forward(base, prompts, left=True)
    copied = StaticDecodingCache.from_dynamic(dynamic.cache, pool=compiled.StoragePool(BUCKETS))
    static = batched_cache.BatchedCache(rows, device, copied, dynamic.mask.clone())
    for width, back in turns:
        tokens = [[chance.randrange(300) for _ in range(chance.randint(0, width))] for _ in dynamic.mask]
        tokens[0] = tokens[0] or [7]
        forgotten = [min(chance.randint(0, back), len(added)) for added in tokens]
        for cache in (dynamic, static):
            cache.forward(base, tokens)
            cache.forget(forgotten)
        if len(dynamic.mask) > 1 and chance.random() < 0.3:
            chosen = sorted(chance.sample(range(len(dynamic.mask)), chance.randint(1, len(dynamic.mask))))
            dynamic, static = dynamic.select(chosen), static.select(chosen)
        assert isinstance(static.cache, StaticDecodingCache)
        assert torch.equal(static.mask, dynamic.mask)
        for ours, theirs in zip(static.cache.layers, dynamic.cache.layers, strict=True):
            used = dynamic.mask[:, None, :, None].expand_as(theirs.keys)
            torch.testing.assert_close(ours.keys[used], theirs.keys[used], **TOLERANCE)
            torch.testing.assert_close(ours.values[used], theirs.values[used], **TOLERANCE)


@pytest.mark.usefixtures("uncompiled")
def test_a_base_with_sliding_windows_is_left_as_it_is_and_its_head_is_compiled() -> None:
    sizes = tiny_text_config("llama").to_dict() | {"model_type": "mistral", "sliding_window": 16}
    model = tool_model_of(MistralConfig.from_dict(sizes))
    plain = respond(model, [WEATHER])
    with warnings_of(compiled) as messages:
        model.compile_decoding()
        assert respond(model, [WEATHER]).token_ids == plain.token_ids
    assert list(model.compiled_decoding.off) == ["base"]
    assert {key[0] for key in model.compiled_decoding._graphs} == {"head"}
    assert len(messages) == 1


def failing(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("out of memory\nand more")


@pytest.mark.parametrize(
    ("change", "options", "parts"),
    [
        (lambda model: model, {"backend": failing}, ["base", "head"]),
        (lambda model: model, {"backend": "no_such_compiler"}, ["base", "head"]),
        (quantised, {}, ["base", "head"]),
        (with_flex_attention, {}, ["base"]),
    ],
)
def test_a_request_never_suffers_from_what_cannot_be_compiled(
    change: Callable[[Any], Any], options: dict[str, Any], parts: list[str]
) -> None:
    model = tool_model(seed=2)
    plain = respond(model, [WEATHER])
    attention = model.base.config._attn_implementation
    with warnings_of(compiled) as messages, torch._dynamo.config.patch(suppress_errors=False):
        change(model).compile_decoding(**options)
        model.base.config._attn_implementation = attention
        with torch.compiler.set_stance("default" if options else "force_eager"):
            replies_given = [respond(model, [WEATHER]) for _ in range(2)]
    assert [reply.token_ids for reply in replies_given] == [plain.token_ids] * 2
    assert sorted(model.compiled_decoding.off) == parts
    assert len(messages) == len(parts)
    assert all(message.startswith("Compiled decoding is off for the ") for message in messages)


@pytest.mark.usefixtures("uncompiled")
def test_a_cache_that_finds_no_room_stays_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tool_model(seed=2)
    plain = respond(model, [WEATHER])
    model.compile_decoding()
    monkeypatch.setattr(compiled, "_allocated", failing)
    with warnings_of(compiled) as messages:
        assert respond(model, [WEATHER]).token_ids == plain.token_ids
    assert list(model.compiled_decoding.off) == ["base"]
    assert messages == [
        "Compiled decoding is off for the base: there is no room for its cache (OutOfMemoryError: out of memory). "
        "It runs uncompiled."
    ]


@pytest.mark.usefixtures("uncompiled")
def test_what_stands_in_front_of_a_module_is_run() -> None:
    """A hook in front of base or head may change what goes in, so the module is really called."""
    model, seen = tool_model(seed=2), []
    model.compile_decoding()
    hooks = [
        module.register_forward_pre_hook(lambda *_, part=part: seen.append(part))
        for part, module in (("base", model.base), ("head", model.diffusion_head))
    ]
    stats = respond(model, [WEATHER]).stats
    for hook in hooks:
        hook.remove()
    assert (seen.count("base"), seen.count("head")) == (stats.base_forwards, stats.head_forwards)
    assert model.compiled_decoding.graphs == 0


def test_requests_of_several_threads_give_their_own_replies() -> None:
    model = tool_model(seed=1)
    texts, tools = ["weather in Paris", "hello", "weather in Rome", "it rains"], [[WEATHER]]
    options = {"tool_choice": "required", "max_tool_calls": 1}
    expected = [replies(model, [text], tools, **options) for text in texts]
    model.compile_decoding(backend=Counter(seconds=0.5), buckets=COARSE)
    given_replies: dict[int, Any] = {}

    def run(number: int) -> None:
        for _ in range(2):
            given_replies[number] = replies(model, [texts[number]], tools, **options)

    run_in_threads([partial(run, number) for number in range(len(texts))])
    for number, (reply, output) in enumerate(expected):
        own_reply, own = given_replies[number]
        assert own_reply == reply
        assert own.stats[0].base_forwards == output.stats[0].base_forwards
        assert own.stats[0].head_forwards == output.stats[0].head_forwards
    assert model.compiled_decoding.off == {}
    torch._dynamo.reset()


def test_nothing_is_compiled_beside_a_forward_of_another_thread_and_forwards_wait_for_the_compiler() -> None:
    """Hidden states get lost where transformers collects them while torch compiles in another thread."""
    model, other, order = small_model(), tool_model(), list[str]()
    inside, leave, compiling = threading.Event(), threading.Event(), threading.Event()
    other.base.register_forward_hook(lambda *_: order.append("ran"))
    prompt = prompt_of([WEATHER])

    def backend(graph: Any, inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
        compiling.set()
        for waiter in waiters:
            waiter.start()
        for waiter in waiters:
            waiter.join(0.5)  # what does not wait ends meanwhile
        order.append("compiled")
        return graph.forward

    def hold() -> None:
        with compiled.beside_no_compiler():
            inside.set()
            leave.wait(60)

    def request(**options: Any) -> None:
        other.generate(prompt, tokenizer=tiny_tokenizer(), max_new_tokens=2, **options)

    decoding = CompiledDecoding(model, backend=backend, buckets=BUCKETS)
    static = decoding.static_cache(prefilled(model, 1, 5)[0])
    holder = threading.Thread(target=hold)
    waiters = [threading.Thread(target=request, kwargs={"tools": tools}) for tools in ([], [WEATHER])]
    holder.start()
    assert inside.wait(60)
    with compiled.beside_no_compiler():  # a forward of this thread is not in its own way
        beside = decoding.verify(ids := random_ids(1, 3), static).logits
        assert not compiling.is_set()
        leave.set()
        holder.join()
        static.crop(-3)
        torch.testing.assert_close(decoding.verify(ids, static).logits, beside, **TOLERANCE)
    assert compiling.is_set()
    for waiter in waiters:
        waiter.join()
    assert order[0] == "compiled"
    assert order.count("ran") >= 4
    assert decoding.off == {}
    torch._dynamo.reset()


@pytest.mark.usefixtures("uncompiled")
def test_a_compiled_model_is_saved_as_any_other(tmp_path: Any) -> None:
    model = tool_model(seed=1).compile_decoding()
    respond(model, [WEATHER])
    model.save_pretrained(tmp_path)
    loaded = SmolLMDiffusionForCausalLM.from_pretrained(tmp_path)
    assert loaded.compiled_decoding is None
    assert respond(loaded, [WEATHER]).token_ids == respond(model, [WEATHER]).token_ids


def decode_and_draft(decoding: Any) -> None:
    """Three requests, so that graphs are recorded and replayed, and storages used again."""
    for _ in range(3):
        decode_both_ways(decoding, 2, 6, [(3, 1), (5, 2), (8, 0)], hidden=True)
        for guidance in (0.0, 1.0):
            step = step_of(decoding.model, memory_of(decoding.model, 2, 6), 5, 2) | {"guidance_scale": guidance}
            with torch.no_grad():
                expected = decoding.model.draft_log_probs(**step)
            first = decoding.head_step(**step)
            again = decoding.head_step(**step)
            torch.testing.assert_close(first.exp(), expected.exp(), **TOLERANCE)
            torch.testing.assert_close(first, again)
    assert decoding.off == {}
    torch._dynamo.reset()


@pytest.mark.slow
def test_the_default_compiler_gives_what_base_and_head_give() -> None:
    decode_and_draft(CompiledDecoding(small_model(), buckets=BUCKETS))


@pytest.mark.gpu
@pytest.mark.slow
def test_cuda_graphs_give_what_base_and_head_give() -> None:
    with torch.device("cuda"):
        model = small_model().cuda()
        decode_and_draft(CompiledDecoding(model, buckets=BUCKETS))
