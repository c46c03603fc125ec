"""The head gives proper distributions, does not see padding, and points where it should."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from repo_package import load_repo_module
from tiny_models import VOCAB, random_ids, tiny_config, tiny_model

head_module = load_repo_module("diffusion_head")
ROWS, PROMPT, SCAFFOLD = 2, 10, 12


@pytest.fixture
def model() -> Any:
    return tiny_model()


def features_of(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Hidden states that depend on each token alone, so that the base's own handling of padding plays no part."""
    table = torch.randn(VOCAB, len(model.config.feature_layers) * 32, generator=torch.Generator().manual_seed(1))
    features = table[ids]
    return features if mask is None else features.masked_fill(~mask[..., None], torch.nan)


def memory_of(model: Any, ids: Tensor, mask: Tensor | None = None) -> Any:
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    return model.diffusion_head.encode_prompt(features_of(model, ids, mask), ids, mask)


def draft(model: Any, memory: Any, scaffold: Tensor, mask: Tensor | None = None, time: float = 0.5) -> Tensor:
    mask = torch.ones_like(scaffold, dtype=torch.bool) if mask is None else mask
    positions = torch.arange(scaffold.shape[1])[None].expand_as(scaffold)
    return model.draft_log_probs(memory, scaffold, mask, positions, torch.full((len(scaffold),), time))


def masked_scaffold(model: Any, rows: int = ROWS) -> Tensor:
    scaffold = random_ids(rows, SCAFFOLD)
    scaffold[:, 3:7] = model.config.mask_token_id
    scaffold[:, 6] = model.config.null_token_id
    return scaffold


def test_memory_is_frozen_and_has_the_promised_shapes(model: Any) -> None:
    memory = memory_of(model, random_ids(ROWS, PROMPT))
    assert len(memory.keys) == len(memory.values) == model.config.head_num_layers
    assert memory.keys[0].shape == memory.values[0].shape == (ROWS, 2, PROMPT, 16)
    assert memory.copy_keys.shape == memory.copy_values.shape == (ROWS, PROMPT, 8)
    assert memory.lengths.tolist() == [PROMPT, PROMPT]
    with pytest.raises(dataclasses.FrozenInstanceError):
        memory.keys = ()


def test_log_probs_are_a_distribution_without_mask(model: Any) -> None:
    log_probs = draft(model, memory_of(model, random_ids(ROWS, PROMPT)), masked_scaffold(model))
    assert log_probs.shape == (ROWS, SCAFFOLD, VOCAB + 2)
    assert log_probs.dtype == torch.float32
    assert torch.allclose(log_probs.exp().sum(-1), torch.ones(ROWS, SCAFFOLD), atol=1e-5)
    assert (log_probs[..., model.config.mask_token_id] == -torch.inf).all()
    assert log_probs[..., model.config.null_token_id].isfinite().all()
    assert not log_probs.isnan().any()


def test_only_chosen_positions_are_predicted(model: Any) -> None:
    memory, scaffold = memory_of(model, random_ids(ROWS, PROMPT)), masked_scaffold(model)
    positions = torch.tensor([[5, 3], [4, 4]])
    time = torch.full((ROWS,), 0.5)
    chosen = model.draft_log_probs(memory, scaffold, torch.ones_like(scaffold), positions, time)
    everything = draft(model, memory, scaffold)
    assert torch.allclose(chosen, everything.gather(1, positions[..., None].expand(-1, -1, VOCAB + 2)), atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_the_prompt_changes_nothing(model: Any, side: str) -> None:
    ids, scaffold = random_ids(1, PROMPT), masked_scaffold(model, 1)
    padding, real = random_ids(1, 5), torch.ones(1, PROMPT, dtype=torch.bool)
    order = (lambda pad, own: [pad, own]) if side == "left" else (lambda pad, own: [own, pad])
    padded = torch.cat(order(padding, ids), dim=1)
    mask = torch.cat(order(torch.zeros(1, 5, dtype=torch.bool), real), dim=1)
    expected = draft(model, memory_of(model, ids), scaffold)
    assert torch.allclose(draft(model, memory_of(model, padded, mask), scaffold), expected, atol=1e-5)


def test_padding_of_the_scaffold_changes_nothing(model: Any) -> None:
    memory, scaffold = memory_of(model, random_ids(1, PROMPT)), masked_scaffold(model, 1)
    padded = torch.cat([scaffold, random_ids(1, 4)], dim=1)
    mask = torch.cat([torch.ones(1, SCAFFOLD), torch.zeros(1, 4)], dim=1).bool()
    slots = slice(3, 7)
    expected = draft(model, memory, scaffold)[:, slots]
    assert torch.allclose(draft(model, memory, padded, mask)[:, slots], expected, atol=1e-5)


def test_batched_equals_single(model: Any) -> None:
    ids, scaffold = random_ids(3, PROMPT), masked_scaffold(model, 3)
    mask = torch.ones(3, PROMPT, dtype=torch.bool)
    mask[1, :4] = False
    batched = draft(model, memory_of(model, ids, mask), scaffold)
    for row in range(3):
        single = draft(model, memory_of(model, ids[row, mask[row]][None]), scaffold[row, None])
        assert torch.allclose(batched[row, None], single, atol=1e-5)


def test_empty_rows_stay_finite(model: Any) -> None:
    ids, scaffold = random_ids(ROWS, PROMPT), masked_scaffold(model)
    mask = torch.ones(ROWS, PROMPT, dtype=torch.bool)
    scaffold_mask = torch.ones_like(scaffold, dtype=torch.bool)
    mask[1], scaffold_mask[1] = False, False
    log_probs = draft(model, memory_of(model, ids, mask), scaffold, scaffold_mask)
    assert not log_probs.isnan().any()


def test_selected_rows_draft_the_same(model: Any) -> None:
    memory, scaffold = memory_of(model, random_ids(ROWS, PROMPT)), masked_scaffold(model)
    rows = torch.tensor([1, 0, 1])
    selected = draft(model, memory.select(rows), scaffold[rows])
    assert torch.allclose(selected, draft(model, memory, scaffold)[rows], atol=1e-5)


def test_attention_is_bidirectional_and_reads_the_prompt(model: Any) -> None:
    ids, scaffold = random_ids(1, PROMPT), masked_scaffold(model, 1)
    before = draft(model, memory_of(model, ids), scaffold)
    later, other = scaffold.clone(), ids.clone()
    later[0, -1] = (later[0, -1] + 1) % VOCAB
    other[0, 0] = (other[0, 0] + 1) % VOCAB
    assert not torch.allclose(draft(model, memory_of(model, ids), later)[:, 3], before[:, 3], atol=1e-5)
    assert not torch.allclose(draft(model, memory_of(model, other), scaffold)[:, 3], before[:, 3], atol=1e-5)


def test_time_conditions_the_prediction(model: Any) -> None:
    memory, scaffold = memory_of(model, random_ids(1, PROMPT)), masked_scaffold(model, 1)
    assert not torch.allclose(
        draft(model, memory, scaffold, time=0.1), draft(model, memory, scaffold, time=0.9), atol=1e-4
    )


def test_mask_and_null_are_told_apart(model: Any) -> None:
    memory, scaffold = memory_of(model, random_ids(1, PROMPT)), masked_scaffold(model, 1)
    swapped = scaffold.clone()
    swapped[0, 6] = model.config.mask_token_id
    assert not torch.allclose(draft(model, memory, scaffold)[:, 3], draft(model, memory, swapped)[:, 3], atol=1e-5)


@pytest.mark.parametrize("gate", [-100.0, 100.0])
def test_the_gate_decides_between_writing_and_copying(model: Any, gate: float) -> None:
    ids = random_ids(1, PROMPT)
    torch.nn.init.constant_(model.diffusion_head.copy_gate.bias, gate)
    probabilities = draft(model, memory_of(model, ids), masked_scaffold(model, 1)).exp()
    in_prompt = torch.zeros(VOCAB + 2, dtype=torch.bool)
    in_prompt[ids[0]] = True
    copied = probabilities[..., in_prompt].sum(-1)
    assert torch.allclose(copied, torch.ones_like(copied), atol=1e-5) if gate > 0 else (copied < 0.9).all()
    assert not probabilities.isnan().any()


def test_the_gate_starts_neutral(model: Any) -> None:
    assert not model.diffusion_head.copy_gate.weight.any()
    assert not model.diffusion_head.copy_gate.bias.any()


def test_padding_is_never_copied(model: Any) -> None:
    ids = torch.arange(10, 20)[None]
    mask = torch.ones(1, 10, dtype=torch.bool)
    mask[:, :3] = False
    torch.nn.init.constant_(model.diffusion_head.copy_gate.bias, 100.0)
    log_probs = draft(model, memory_of(model, ids, mask), masked_scaffold(model, 1))
    assert (log_probs[..., 10:13] < -50).all()


def test_neighbours_match_left_and_right() -> None:
    prompt = torch.tensor([[5, 6, 7, 8]])
    memory = memory_stub(prompt, torch.tensor([[False, True, True, True]]))
    scaffold = torch.tensor([[6, VOCAB, 8, 5]])
    left = head_module.neighbours_match(scaffold, memory, 1)[0]
    right = head_module.neighbours_match(scaffold, memory, -1)[0]
    assert left.nonzero().tolist() == [[1, 2]]  # after 6 comes what follows 6
    assert right.nonzero().tolist() == [[1, 2]]  # before 8 comes what precedes 8; 5 is padding and matches nothing


def memory_stub(prompt: Tensor, mask: Tensor) -> Any:
    """A memory of which only ids and mask are read."""
    nothing = torch.empty(0)
    return head_module.PromptMemory((), (), nothing, nothing, prompt, mask, mask.sum(-1))


def test_a_match_is_carried_along_the_diagonal(model: Any) -> None:
    reader = model.diffusion_head.copy_reader
    with torch.no_grad():
        for parameter in reader.parameters():
            parameter.zero_()
        reader.stride_gates.bias.fill_(20.0)
        reader.neighbour_weights.bias[0] = 10.0  # left neighbours only
    prompt = torch.arange(100, 120)[None]
    scaffold = torch.full((1, 8), model.config.mask_token_id)
    scaffold[0, 0] = 104
    pointer, _ = reader(torch.zeros(1, 8, 32), scaffold, memory_of(model, prompt))
    assert prompt[0, pointer[0, 1:].argmax(-1)].tolist() == [105, 106, 107, 108, 109, 110, 111]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_finite_and_close(model: Any, dtype: torch.dtype) -> None:
    ids, scaffold = random_ids(ROWS, PROMPT), masked_scaffold(model)
    expected = draft(model, memory_of(model, ids), scaffold)
    model.to(dtype)
    memory = memory_of(model, ids)
    half = draft(model, memory, scaffold)
    assert memory.keys[0].dtype == dtype
    assert half.dtype == torch.float32
    assert not half.isnan().any()
    assert (half.exp() - expected.exp()).abs().max() < 0.05


def test_a_float32_head_works_on_a_bfloat16_base(model: Any) -> None:
    model.base.to(torch.bfloat16)
    assert not draft(model, memory_of(model, random_ids(1, PROMPT)), masked_scaffold(model, 1)).isnan().any()


def test_large_inputs_do_not_overflow(model: Any) -> None:
    ids = random_ids(1, PROMPT)
    mask = torch.ones_like(ids, dtype=torch.bool)
    memory = model.diffusion_head.encode_prompt(features_of(model, ids) * 1e8, ids, mask)
    assert not draft(model, memory, masked_scaffold(model, 1)).isnan().any()


def test_every_parameter_gets_a_finite_gradient(model: Any) -> None:
    for name in ("copy_gate", "null_output"):  # they start at zero and would block each other's gradients
        torch.nn.init.normal_(getattr(model.diffusion_head, name).weight)
    log_probs = draft(model, memory_of(model, random_ids(ROWS, PROMPT)), masked_scaffold(model))
    torch.where(log_probs.isfinite(), log_probs, 0.0)[..., ::3].square().sum().backward()
    for name, parameter in model.diffusion_head.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_the_head_has_no_vocabulary_matrix(model: Any) -> None:
    assert all(VOCAB not in parameter.shape for parameter in model.diffusion_head.parameters())
    assert not list(model.diffusion_head.buffers())


def test_one_layer_is_enough() -> None:
    model = tiny_model(head_num_layers=1)
    assert not draft(model, memory_of(model, random_ids(1, PROMPT)), masked_scaffold(model, 1)).isnan().any()


def test_real_positions_count_real_tokens_only() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [1, 0, 1, 1]]).bool()
    assert head_module.real_positions(mask)[mask].tolist() == [0, 1, 0, 1, 0, 1, 2]


def test_residual_outputs_start_smaller_than_projections() -> None:
    config = tiny_config(head_num_layers=8, head_hidden_size=64)
    block = load_repo_module("modeling_smollm_diffusion").SmolLMDiffusionForCausalLM(config).diffusion_head.layers[0]
    assert block.attention_out.weight.std() < block.qkv_proj.weight.std() / 3
    assert block.qkv_proj.weight.std().item() == pytest.approx(config.initializer_range, rel=0.1)
