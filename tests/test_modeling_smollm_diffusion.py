"""The model is its base without a scaffold, trains only the head with one, and its loss is the one in the paper."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from repo_package import load_repo_module
from tiny_models import BASES, VOCAB, SmolLMDiffusionForCausalLM, random_ids, tiny_config, tiny_model, training_batch

modeling = load_repo_module("modeling_smollm_diffusion")
noise = load_repo_module("noise_schedule")
loss_parts = load_repo_module("denoising_loss")


def noise_seed(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("base", BASES)
def test_without_a_scaffold_forward_is_the_base(base: str) -> None:
    model, ids = tiny_model(base), random_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    arguments = {"input_ids": ids, "attention_mask": mask, "labels": ids, "output_hidden_states": True}
    ours, theirs = model(**arguments), model.base(**arguments)
    assert type(ours) is type(theirs)
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.loss, theirs.loss)
    assert all(torch.equal(a, b) for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True))


@pytest.mark.parametrize("base", BASES)
def test_without_a_scaffold_generation_is_the_base(base: str) -> None:
    model, ids = tiny_model(base), random_ids(2, 7)
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    ours = model.generate(ids, output_logits=True, return_dict_in_generate=True, **arguments)
    theirs = model.base.generate(ids, output_logits=True, return_dict_in_generate=True, **arguments)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert all(torch.equal(a, b) for a, b in zip(ours.logits, theirs.logits, strict=True))


@pytest.mark.parametrize("keep", [0, 1, 3, torch.tensor([2, 5])])
def test_logits_to_keep_reaches_the_base(keep: Any) -> None:
    model, ids = tiny_model(), random_ids(1, 7)
    assert torch.equal(model(ids, logits_to_keep=keep).logits, model.base(ids, logits_to_keep=keep).logits)


def test_cached_equals_uncached() -> None:
    model, ids = tiny_model(), random_ids(1, 8)
    first = model(ids[:, :5], use_cache=True)
    second = model(ids[:, 5:], past_key_values=first.past_key_values, use_cache=True)
    assert torch.allclose(second.logits, model(ids).logits[:, 5:], atol=1e-5)


@pytest.mark.parametrize("base", BASES)
def test_training_changes_the_head_and_never_the_base(base: str) -> None:
    model = tiny_model(base).train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model(**training_batch(model.config)).loss.backward()
        optimizer.step()
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before if key.startswith("base."))
    assert any(not torch.equal(before[key], after[key]) for key in before if key.startswith("diffusion_head."))
    assert all(parameter.grad is None for parameter in model.base.parameters())


def test_only_the_head_is_trainable_and_the_base_stays_in_eval_mode() -> None:
    model = tiny_model("gpt2").train()  # GPT-2 has dropout
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"diffusion_head"}
    assert model.training
    assert model.diffusion_head.training
    assert not any(module.training for module in model.base.modules())


def test_a_few_steps_learn_one_example() -> None:
    model = tiny_model(label_smoothing=0.0, null_loss_weight=1.0, loss_weighting="none").train()
    batch = training_batch(model.config, rows=2)
    optimizer = torch.optim.AdamW(model.diffusion_head.parameters(), lr=4e-3)
    for _ in range(120):
        loss = model(**batch, noise_samples=2).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    result = model.eval()(**batch, noise_samples=8, noise_generator=noise_seed())
    assert result.real_token_accuracy > 0.9
    assert result.null_accuracy > 0.9


def captured_loss(model: Any, batch: dict[str, Tensor], **kwargs: Any) -> tuple[Any, Tensor, Tensor, Tensor]:
    """One training forward, and what went into the loss: log-probabilities, the masked positions and the times."""
    seen: dict[str, Any] = {}
    original = modeling.score

    def spy(config: Any, log_probs: Tensor, targets: Any) -> Any:
        seen["log_probs"] = log_probs
        return original(config, log_probs, targets)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling, "score", spy)
        output = model(**batch, noise_generator=noise_seed(3), **kwargs)
    generator = noise_seed(3)
    slots = batch["slot_mask"].bool() & batch["scaffold_mask"].bool()
    schedule = noise.build_schedule(model.config.noise_schedule, model.config.noise_eps)
    times = noise.sample_times(len(slots), model.config.noise_eps, generator=generator)
    return output, seen["log_probs"], noise.sample_mask(slots, times, schedule, generator), times


@pytest.mark.parametrize("weighting", ["schedule", "count", "none"])
@pytest.mark.parametrize("schedule", ["log_linear", "cosine", "linear"])
def test_the_loss_is_the_documented_sum(weighting: str, schedule: str) -> None:
    model = tiny_model(loss_weighting=weighting, noise_schedule=schedule)
    config, batch = model.config, training_batch(model.config)
    weights = torch.rand(batch["scaffold_ids"].shape) + 0.5
    output, log_probs, masked, times = captured_loss(model, batch, loss_weights=weights)
    slots = batch["slot_mask"].bool()
    total, normaliser, plain = 0.0, 0.0, 0.0
    predictions = iter(log_probs)
    row_weight = noise.build_schedule(schedule, config.noise_eps).loss_weight(times)
    for row, position in slots.nonzero().tolist():
        target = batch["scaffold_ids"][row, position].item()
        is_null = target == config.null_token_id
        weight = weights[row, position].item() * (config.null_loss_weight if is_null else 1.0)
        if weighting != "none" or masked[row, position]:
            normaliser += weight
        if not masked[row, position]:
            continue
        prediction = next(predictions)
        weight *= {
            "schedule": row_weight[row].item(),
            "count": (slots[row].sum() / masked[row].sum()).item(),
            "none": 1.0,
        }[weighting]
        others = torch.cat([prediction[:VOCAB], prediction[VOCAB + 1 :]])
        loss = -(1 - config.label_smoothing) * prediction[target] - config.label_smoothing * others.mean()
        if not is_null:
            loss = loss + config.null_prediction_penalty * prediction[config.null_token_id].exp()
        total += weight * loss.item()
        plain -= weight * prediction[target].item()
    assert output.loss.item() == pytest.approx(total / normaliser, rel=1e-4)
    assert output.diffusion_loss.item() == pytest.approx(plain / normaliser, rel=1e-4)
    assert output.masked_slots == masked.sum()


def test_the_output_can_be_a_tuple() -> None:
    model = tiny_model()
    batch = training_batch(model.config)
    output = model(**batch, noise_generator=noise_seed())
    as_tuple = model(**batch, noise_generator=noise_seed(), return_dict=False)
    assert as_tuple[0] == output.loss
    assert len(as_tuple) == len(output)


def test_null_weight_zero_ignores_null_and_penalty_lowers_it() -> None:
    batch = training_batch(tiny_config())
    batch["slot_mask"] = batch["slot_mask"] & (batch["scaffold_ids"] == tiny_config().null_token_id)
    assert tiny_model(null_loss_weight=0.0)(**batch).loss == 0
    model = tiny_model(label_smoothing=0.0)
    content = training_batch(model.config)
    plain = model(**content, noise_generator=noise_seed()).loss
    model.config.null_prediction_penalty = 5.0
    assert model(**content, noise_generator=noise_seed()).loss > plain


def test_a_batch_without_slots_gives_a_zero_loss_that_can_be_backpropagated() -> None:
    model = tiny_model().train()
    batch = training_batch(model.config)
    batch["slot_mask"] = torch.zeros_like(batch["slot_mask"])
    loss = model(**batch).loss
    loss.backward()
    assert loss == 0


def test_the_clean_target_does_not_leak_into_masked_positions() -> None:
    model = tiny_model()
    batch = training_batch(model.config)
    _, log_probs, masked, _ = captured_loss(model, batch)
    changed = batch["scaffold_ids"].masked_fill(masked, 9)
    _, other, _, _ = captured_loss(model, {**batch, "scaffold_ids": changed})
    assert masked.any()
    assert torch.equal(log_probs, other)


def test_noise_samples_equal_a_repeated_batch() -> None:
    model = tiny_model()
    batch = training_batch(model.config)
    shared = model(**batch, noise_samples=3, noise_generator=noise_seed())
    repeated = {name: tensor.repeat_interleave(3, dim=0) for name, tensor in batch.items()}
    assert torch.allclose(shared.loss, model(**repeated, noise_generator=noise_seed()).loss, rtol=1e-4)


def test_noise_samples_share_one_pass_of_the_base() -> None:
    model, calls = tiny_model(), []
    model.base.register_forward_hook(lambda *_: calls.append(1))
    model(**training_batch(model.config), noise_samples=4)
    assert len(calls) == 1


def test_cached_features_equal_fresh_ones() -> None:
    model = tiny_model()
    batch = training_batch(model.config)
    mask = batch["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    states = model.base(batch["input_ids"], attention_mask=mask, position_ids=positions, output_hidden_states=True)
    features = model.prompt_features_of(states.hidden_states)
    fresh = model(**batch, noise_generator=noise_seed()).loss
    assert torch.equal(model(**batch, prompt_features=features, noise_generator=noise_seed()).loss, fresh)


def given_noise(model: Any, batch: dict[str, Tensor], samples: int, own_share: float = 0.0) -> dict[str, Any]:
    """The keyword arguments of noise that is drawn outside of the model, example by example."""
    schedule = noise.build_schedule(model.config.noise_schedule, model.config.noise_eps)
    slots = batch["slot_mask"].bool() & batch["scaffold_mask"].bool()
    drawn = [
        noise.example_noise(row, samples, schedule, model.config.noise_eps, 0.3 * index, index, own_share)
        for index, row in enumerate(slots)
    ]
    return {
        "noise_samples": samples,
        "noise_times": torch.cat([one.times for one in drawn]),
        "noise_mask": torch.cat([one.masked for one in drawn]),
        "own_mask": torch.cat([one.own for one in drawn]),
    }


def test_noise_drawn_outside_is_the_noise_of_the_loss() -> None:
    model = tiny_model(loss_weighting="schedule")
    batch = training_batch(model.config)
    generator = noise_seed(3)
    slots = batch["slot_mask"].bool() & batch["scaffold_mask"].bool()
    times = noise.sample_times(len(slots), model.config.noise_eps, generator=generator)
    masked = noise.sample_mask(slots, times, noise.LogLinear(model.config.noise_eps), generator)
    inside = model(**batch, noise_generator=noise_seed(3))
    outside = model(**batch, noise_times=times, noise_mask=masked)
    assert torch.equal(inside.loss, outside.loss)


@pytest.mark.parametrize("weighting", ["schedule", "count", "none"])
def test_parts_of_a_batch_with_its_normaliser_add_up_to_the_batch(weighting: str) -> None:
    model = tiny_model(loss_weighting=weighting, null_prediction_penalty=0.5)
    batch = training_batch(model.config, rows=4)
    drawn = given_noise(model, batch, samples=2)
    whole = model(**batch, **drawn)
    total = whole.sums["weight"]
    parts = []
    for rows in (slice(0, 1), slice(1, 4)):
        draws = slice(2 * rows.start, 2 * rows.stop)
        noisy = {name: drawn[name][draws] for name in ("noise_times", "noise_mask", "own_mask")}
        part = {name: tensor[rows] for name, tensor in batch.items()}
        parts.append(model(**part, **noisy, noise_samples=2, loss_normaliser=total))
    assert torch.allclose(parts[0].loss + parts[1].loss, whole.loss, rtol=1e-5)
    added = loss_parts.add_sums(parts[0].sums, parts[1].sums)
    assert added.keys() == whole.sums.keys()
    for name, value in whole.sums.items():
        assert torch.allclose(added[name], value, rtol=1e-4), name
    assert loss_parts.summary(added)["loss"] == pytest.approx(whole.loss.item(), rel=1e-4)


def test_the_heads_own_draft_is_context_and_only_that() -> None:
    torch.manual_seed(0)
    model = tiny_model(loss_weighting="none")
    batch = training_batch(model.config)
    drawn = given_noise(model, batch, samples=3, own_share=1.0)
    assert drawn["own_mask"].any()
    seen: list[Tensor] = []
    model.diffusion_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with_own = model(**batch, **drawn)
    earlier, noisy = seen
    rows = torch.arange(3).repeat_interleave(3)
    gold, mask_id = batch["scaffold_ids"][rows], model.config.mask_token_id
    asked = drawn["own_mask"].any(-1)
    assert (earlier[drawn["own_mask"][asked]] == mask_id).all()
    assert torch.equal(noisy == mask_id, drawn["noise_mask"])
    elsewhere = ~drawn["own_mask"] & ~drawn["noise_mask"]
    assert torch.equal(noisy[elsewhere], gold[elsewhere])
    # An untrained head is hardly ever right, so its own tokens differ from the gold ones.
    assert (noisy != gold)[drawn["own_mask"]].float().mean() > 0.5
    plain = model(**batch, **{**drawn, "own_mask": None})
    assert with_own.masked_slots == plain.masked_slots
    assert with_own.loss != plain.loss
    assert float(with_own.sums["own_positions"]) == int(drawn["own_mask"].sum())
    assert float(plain.sums["own_positions"]) == 0


def test_own_drafts_of_a_row_do_not_depend_on_the_batch() -> None:
    model = tiny_model(loss_weighting="none")
    batch = training_batch(model.config)
    drawn = given_noise(model, batch, samples=2, own_share=1.0)
    whole = model(**batch, **drawn)
    losses = []
    for row in range(3):
        noisy = {name: drawn[name][2 * row : 2 * row + 2] for name in ("noise_times", "noise_mask", "own_mask")}
        part = {name: tensor[row : row + 1] for name, tensor in batch.items()}
        losses.append(model(**part, **noisy, noise_samples=2, loss_normaliser=whole.sums["weight"]).loss)
    assert torch.allclose(torch.stack(losses).sum(), whole.loss, rtol=1e-4)


def test_the_constraint_loss_asks_for_kinds_and_teaches_them() -> None:
    # With such a weight next to nothing but the constraint is taught.
    model = tiny_model(label_smoothing=0.0, loss_weighting="none", constraint_loss_weight=100.0).train()
    batch = training_batch(model.config, rows=2)
    with pytest.raises(ValueError, match="slot_kinds"):
        model(**batch)
    allowed = torch.zeros(2, VOCAB + 2, dtype=torch.bool)
    allowed[0] = True
    allowed[1, 100:200] = True
    kinds = {"slot_kinds": batch["slot_mask"], "kind_tokens": allowed}
    first = model(**batch, **kinds, noise_samples=4, noise_generator=noise_seed()).constraint_loss
    optimizer = torch.optim.AdamW(model.diffusion_head.parameters(), lr=4e-3)
    for _ in range(30):
        optimizer.zero_grad()
        model(**batch, **kinds, noise_samples=4).loss.backward()
        optimizer.step()
    assert model(**batch, **kinds, noise_samples=4, noise_generator=noise_seed()).constraint_loss < 0.7 * first
    free = {**kinds, "slot_kinds": torch.zeros_like(batch["slot_mask"])}
    assert model(**batch, **free, noise_generator=noise_seed()).constraint_loss.abs() < 1e-5


def test_a_teacher_that_is_sure_of_the_gold_token_changes_nothing() -> None:
    model = tiny_model(distill_weight=0.7)
    batch = training_batch(model.config)
    ids = batch["scaffold_ids"][..., None].repeat(1, 1, 2)
    sure = torch.tensor([1.0, 0.0]).expand(*batch["scaffold_ids"].shape, 2)
    plain = model(**batch, noise_generator=noise_seed()).loss
    taught = model(**batch, soft_ids=ids, soft_probs=sure, noise_generator=noise_seed()).loss
    assert torch.allclose(taught, plain, rtol=1e-5)
    silent = model(**batch, soft_ids=ids, soft_probs=torch.zeros_like(sure), noise_generator=noise_seed()).loss
    assert torch.equal(silent, plain)
    other = model(**batch, soft_ids=ids * 0 + 9, soft_probs=sure, noise_generator=noise_seed()).loss
    assert not torch.allclose(other, plain, rtol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise_times": torch.rand(3)}, "belong together"),
        ({"noise_times": torch.rand(2), "noise_mask": torch.ones(3, 16, dtype=torch.bool)}, r"\[3\]"),
        ({"noise_times": torch.rand(3), "noise_mask": torch.ones(3, 9, dtype=torch.bool)}, "noise masks"),
        ({"own_mask": torch.ones(3, 16, dtype=torch.bool)}, "belong together"),
        ({"soft_ids": torch.zeros(3, 16, 2, dtype=torch.long)}, "soft_probs"),
    ],
)
def test_noise_and_targets_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        model(**training_batch(model.config), **change)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_prompt_padding_does_not_change_the_draft(base: str, side: str) -> None:
    model, ids, scaffold = tiny_model(base), random_ids(1, 8), random_ids(1, 6)
    scaffold[0, 2:5] = model.config.mask_token_id
    padding, ones = torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 8, dtype=torch.long)
    left = side == "left"
    padded = torch.cat([padding, ids] if left else [ids, padding], dim=1)
    mask = torch.cat([padding, ones] if left else [ones, padding], dim=1)

    def draft(prompt: Tensor, prompt_mask: Tensor) -> Tensor:
        states = model._prompt_hidden_states(prompt, prompt_mask, None)
        memory = model.prompt_memory(states, prompt, prompt_mask)
        positions = torch.tensor([[2, 3, 4]])
        return model.draft_log_probs(memory, scaffold, torch.ones_like(scaffold), positions, torch.ones(1))

    assert torch.allclose(draft(padded, mask), draft(ids, ones), atol=1e-4)


@pytest.mark.parametrize("base", BASES)
def test_a_reply_extends_the_memory_of_its_prompt(base: str) -> None:
    model, ids, scaffold = tiny_model(base), random_ids(1, 11), random_ids(1, 6)
    scaffold[0, 2:5] = model.config.mask_token_id
    mask = torch.ones_like(ids)
    first = model.base(ids[:, :8], use_cache=True, output_hidden_states=True)
    second = model.base(ids[:, 8:], past_key_values=first.past_key_values, output_hidden_states=True)
    memory = model.prompt_memory(first.hidden_states, ids[:, :8], mask[:, :8])
    reply = model.prompt_memory(second.hidden_states, ids[:, 8:], mask[:, 8:], offset=memory.lengths)
    whole = model.prompt_memory(model._prompt_hidden_states(ids, mask, None), ids, mask)
    extended, encoded = [
        model.draft_log_probs(known, scaffold, torch.ones_like(scaffold), torch.tensor([[2, 3, 4]]), torch.ones(1))
        for known in (memory.extend(reply), whole)
    ]
    assert torch.allclose(extended, encoded, atol=1e-4)


def test_fields_reach_the_training_loss() -> None:
    model = tiny_model(field_mask="isolated")
    batch = training_batch(model.config)
    fields = torch.full_like(batch["scaffold_ids"], -1)
    fields[:, 2:6], fields[:, 8:12] = 0, 1
    _, before, masked, _ = captured_loss(model, batch, field_ids=fields)
    changed = torch.where((fields == 1) & ~masked, 9, batch["scaffold_ids"])
    _, after, _, _ = captured_loss(model, {**batch, "scaffold_ids": changed}, field_ids=fields)
    first = (fields == 0)[masked]
    assert (changed != batch["scaffold_ids"]).any()
    assert first.any()
    assert torch.equal(before[first], after[first])
    assert not torch.equal(before[~first], after[~first])


def test_noise_samples_repeat_the_fields_too() -> None:
    model = tiny_model(field_mask="block_causal")
    batch = training_batch(model.config)
    batch["field_ids"] = torch.where(batch["slot_mask"].bool(), torch.arange(16) // 7, -1)
    shared = model(**batch, noise_samples=2, noise_generator=noise_seed())
    repeated = {name: tensor.repeat_interleave(2, dim=0) for name, tensor in batch.items()}
    assert torch.allclose(shared.loss, model(**repeated, noise_generator=noise_seed()).loss, rtol=1e-4)


def test_training_under_a_field_mask_needs_fields() -> None:
    model = tiny_model(field_mask="isolated")
    with pytest.raises(ValueError, match="field_ids"):
        model(**training_batch(model.config))


def test_feature_layers_select_hidden_states_in_order() -> None:
    model = tiny_model(feature_layers=[0, 3])
    states = tuple(torch.full((1, 2, 32), float(index)) for index in range(5))
    features = model.prompt_features_of(states)
    assert features.shape == (1, 2, 64)
    assert features[0, 0, ::32].tolist() == [0.0, 3.0]


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = tiny_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.diffusion_head.layers[0].gradient_checkpointing
        model(**training_batch(model.config), noise_generator=noise_seed()).loss.backward()
        gradients.append([p.grad for p in model.diffusion_head.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_resizing_moves_mask_and_null_and_keeps_everything_else() -> None:
    model, ids = tiny_model(), random_ids(1, 5)
    before = model(ids).logits
    model.resize_token_embeddings(VOCAB + 20)
    assert (model.config.mask_token_id, model.config.null_token_id) == (VOCAB + 20, VOCAB + 21)
    assert torch.equal(model(ids).logits[..., :VOCAB], before)
    assert not any(p.requires_grad for p in model.base.parameters())
    output = model.train()(**training_batch(model.config))
    assert output.loss.isfinite()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slot_mask": None}, "slot_mask"),
        ({"input_ids": None}, "input_ids"),
        ({"slot_mask": torch.ones(3, 5)}, "shape"),
        ({"noise_samples": 0}, "noise_samples"),
    ],
)
def test_incomplete_scaffold_inputs_are_refused(change: dict[str, Any], message: str) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        model(**{**training_batch(model.config), **change})


def test_fields_set_to_nonsense_later_are_refused_when_a_model_is_built() -> None:
    config = tiny_config()
    config.label_smoothing = 2.0
    with pytest.raises(ValueError, match="label_smoothing"):
        SmolLMDiffusionForCausalLM(config)


def test_an_adapter_on_the_base_gets_gradients() -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model().train()
    model.base.add_adapter(peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    model.base.eval()
    model(**training_batch(model.config)).loss.backward()
    trained = {name for name, p in model.base.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained
    assert all("lora" in name for name in trained)


def test_the_model_builds_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = SmolLMDiffusionForCausalLM(tiny_config())
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.gpu
def test_training_runs_in_bfloat16_on_a_gpu() -> None:
    model = tiny_model().to("cuda", torch.bfloat16).train()
    batch = {name: tensor.cuda() for name, tensor in training_batch(model.config).items()}
    loss = model(**batch, noise_samples=2).loss
    loss.backward()
    assert loss.isfinite()
    ids = batch["input_ids"]
    assert torch.equal(model(ids).logits, model.base(ids).logits)
