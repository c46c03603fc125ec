"""A head that reads the base's hidden states at the masked scaffold: in training and in drafts."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import test_generation
from repo_package import load_repo_module
from test_generation import WEATHER, prompt_of, respond
from tiny_models import BASES, tiny_model, training_batch
from tiny_tokenizer import tiny_tokenizer

compiling = load_repo_module("compiled_decoding")


def scaffold_model(base: str = "smollm3", /, **fields: Any) -> Any:
    """A tiny model whose head reads the base's features of the scaffold, and not with a weight of zero as at first."""
    model = tiny_model(base, scaffold_features="base", loss_weighting="none", **fields)
    torch.nn.init.normal_(model.diffusion_head.scaffold_proj.weight, std=0.2)
    return model


def test_a_fresh_head_with_features_of_the_scaffold_starts_as_one_without() -> None:
    torch.manual_seed(0)
    model = tiny_model(scaffold_features="base", loss_weighting="none")
    plain = tiny_model(loss_weighting="none")
    state = model.state_dict()
    del state["diffusion_head.scaffold_proj.weight"]
    plain.load_state_dict(state)
    batch = training_batch(model.config)
    both = [one(**batch, noise_generator=torch.Generator().manual_seed(0)).loss for one in (model, plain)]
    assert torch.equal(*both)
    assert not any("scaffold_proj" in name for name in plain.state_dict())


@pytest.mark.parametrize("base", BASES)
def test_features_of_the_scaffold_reach_the_loss_and_hide_the_values(base: str) -> None:
    model = scaffold_model(base)
    batch = training_batch(model.config)
    loss = model(**batch, noise_generator=torch.Generator().manual_seed(0)).loss
    with torch.no_grad():
        model.diffusion_head.scaffold_proj.weight.zero_()
    assert model(**batch, noise_generator=torch.Generator().manual_seed(0)).loss != loss
    inputs = [batch["input_ids"], batch["attention_mask"].bool()]
    mask, slots = batch["scaffold_mask"].bool(), batch["slot_mask"].bool()
    first = model.scaffold_features(*inputs, batch["scaffold_ids"], mask, slots)
    other = model.scaffold_features(*inputs, batch["scaffold_ids"].masked_fill(slots, 9), mask, slots)
    assert torch.equal(first, other)
    fixed = batch["scaffold_ids"].masked_fill(~slots, 9)
    assert not torch.allclose(first, model.scaffold_features(*inputs, fixed, mask, slots), atol=1e-3)


@pytest.mark.parametrize("base", BASES)
def test_features_of_a_scaffold_do_not_depend_on_padding(base: str) -> None:
    model = scaffold_model(base)
    batch = training_batch(model.config)
    names = ("input_ids", "attention_mask", "scaffold_ids", "scaffold_mask", "slot_mask")
    prompt, prompt_mask, scaffold, mask, slots = (batch[name] for name in names)
    together = model.scaffold_features(prompt, prompt_mask.bool(), scaffold, mask.bool(), slots.bool())
    for row in range(3):
        real, shown = prompt_mask[row].bool(), mask[row].bool()
        alone = model.scaffold_features(
            prompt[row, real][None],
            torch.ones(1, int(real.sum()), dtype=torch.bool),
            scaffold[row, shown][None],
            torch.ones(1, int(shown.sum()), dtype=torch.bool),
            slots[row, shown][None].bool(),
        )
        assert torch.allclose(together[row, shown], alone[0], atol=1e-4)


@torch.no_grad()
def test_a_draft_reads_the_scaffold_once_for_all_steps() -> None:
    model = scaffold_model()
    batch = training_batch(model.config, rows=2)
    states = model.base(batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
    memory = model.prompt_memory(states.hidden_states, batch["input_ids"], batch["attention_mask"])
    slots = batch["slot_mask"].bool()
    fields = torch.where(slots, 0, -1)
    runs: list[int] = []
    model.base.register_forward_hook(lambda *_: runs.append(1))

    def draft(ids: Tensor, guidance: float = 0.0) -> Tensor:
        positions = slots.nonzero()[:, 1].view(2, -1)
        return model.draft_log_probs(
            memory, ids, batch["scaffold_mask"], positions, torch.ones(2), fields, guidance_scale=guidance
        )

    masked = batch["scaffold_ids"].masked_fill(slots, model.config.mask_token_id)
    first = draft(masked)
    partly = masked.clone()
    partly[:, 2] = 9
    draft(partly)
    assert torch.equal(draft(masked), first)
    assert len(runs) == 1  # what is committed in slots does not change what the base reads
    draft(masked, guidance=1.0)
    assert len(runs) == 2
    changed = masked.clone()
    changed[:, 0] = 9
    assert not torch.allclose(draft(changed), first)
    assert len(runs) == 3
    with pytest.raises(ValueError, match="field_ids"):
        model.draft_log_probs(memory, masked, batch["scaffold_mask"], slots.nonzero()[:, 1].view(2, -1), torch.ones(2))


def test_training_with_features_of_the_scaffold_leaves_the_base() -> None:
    model = scaffold_model().train()
    before = copy.deepcopy(model.base.state_dict())
    model(**training_batch(model.config), noise_samples=2).loss.backward()
    assert model.diffusion_head.scaffold_proj.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.base.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.base.state_dict().items())


def drafting_model(seed: int) -> Any:
    """A random model that drafts calls with features of the scaffold."""
    model = test_generation.tiny_model(seed, scaffold_features="base")
    torch.nn.init.normal_(model.diffusion_head.scaffold_proj.weight, std=0.5)
    return model


@pytest.mark.parametrize("seed", range(3))
def test_verified_replies_are_the_references_and_every_forward_is_counted(seed: int) -> None:
    model = drafting_model(seed)
    reference = respond(model, [WEATHER], decoding="ar", max_tool_calls=2)
    runs: list[int] = []
    hook = model.base.register_forward_hook(lambda *_: runs.append(1))
    verified = respond(model, [WEATHER], decoding="verified", drafter="head", max_tool_calls=2)
    hook.remove()
    assert verified.token_ids == reference.token_ids
    assert verified.stats.base_forwards == len(runs)
    assert verified.stats.head_forwards > 0


def test_what_the_base_reads_of_the_scaffold_changes_the_draft() -> None:
    model = drafting_model(0)
    first = respond(model, [WEATHER], decoding="diffusion", drafter="head", max_tool_calls=1)
    with torch.no_grad():
        model.diffusion_head.scaffold_proj.weight.neg_()
    second = respond(model, [WEATHER], decoding="diffusion", drafter="head", max_tool_calls=1)
    assert first.token_ids != second.token_ids


def test_rows_of_a_batch_get_what_they_get_alone() -> None:
    model = drafting_model(1)
    messages = [[{"role": "user", "content": text}] for text in ("weather in Paris", "and the weather in New York now")]
    prompts = [prompt_of([WEATHER], turns) for turns in messages]
    ids, mask = test_generation.padded(prompts)
    options = {"tools": [WEATHER], "tokenizer": tiny_tokenizer(), "tool_choice": "required", "max_tool_calls": 1}
    together = model.generate(ids, attention_mask=mask, **options)
    for row, prompt in zip(together, prompts, strict=True):
        alone = model.generate(prompt, **options)[0, prompt.shape[1] :].tolist()
        assert row[ids.shape[1] :].tolist()[: len(alone)] == alone


def test_such_a_head_is_not_compiled() -> None:
    assert "scaffold" in compiling.uncompilable_parts(drafting_model(0))["head"]
    assert "head" not in compiling.uncompilable_parts(test_generation.tiny_model())
