"""Training of the head: what an example is, that lengths do not leak, that the base stays and the loss falls."""

import hashlib
import inspect
import json
import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import SmolLM3Config, SmolLM3ForCausalLM

from tiny_models import tiny_config
from tiny_tokenizer import tiny_tokenizer, tiny_vocabulary
from training import head as head_training
from training.data import Row, SingleCall
from training.head import GoldExamples, HeadCollator, HeadRun, head_example, kind_tokens, train_head
from training.records import RecordError

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "days": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["city"],
}


def base_config() -> SmolLM3Config:
    """A base as narrow as can be for the tiny tokenizer."""
    tokenizer = tiny_tokenizer()
    return SmolLM3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


class Ids:
    mask_token_id, null_token_id, null_loss_weight = tiny_vocabulary().size, tiny_vocabulary().size + 1, 0.1
    string_budget, number_budget, array_budget = 9, 5, 3


RUN = HeadRun(Path("unused"))


def example(arguments: dict[str, Any], seed: int = 0, run: HeadRun = RUN) -> Any:
    call = SingleCall([5, 6, 7], SCHEMA, "get_weather", arguments)
    return head_example(call, tiny_vocabulary(), Ids, random.Random(seed), run)


def test_an_example_holds_the_call_and_masks_its_values() -> None:
    made = example({"city": "New York", "days": 3})
    shown = tiny_vocabulary().spell(made.scaffold_ids.tolist()).decode()
    assert '"name": "get_weather"' in shown
    assert '"city": "New York"' in shown
    values = tiny_vocabulary().spell(made.scaffold_ids[made.slot_mask].tolist()).decode()
    assert values == "New Yorkfalsetrue3false"  # city, no unit, days, no tags


def test_the_width_of_a_slot_says_nothing_about_its_value() -> None:
    for seed in range(20):
        short, long = example({"city": "a"}, seed), example({"city": "New York and then some more of it"}, seed)
        assert short.slot_mask.tolist() == long.slot_mask.tolist()


def test_fields_are_the_slots_in_reading_order() -> None:
    made = example({"city": "New York", "days": 3})
    assert torch.equal(made.field_ids >= 0, made.slot_mask)
    fields = made.field_ids[made.slot_mask]
    assert (fields.diff() >= 0).all()
    city = fields == 0
    assert tiny_vocabulary().spell(made.scaffold_ids[made.slot_mask][city].tolist()).decode() == "New York"
    assert fields.unique().tolist() == list(range(int(fields.max()) + 1))


def test_the_end_of_a_value_counts_and_its_tail_is_sampled() -> None:
    made = example({"city": "New York"})
    content = len(tiny_vocabulary().encode("New York"))
    start = int(made.slot_mask.nonzero()[0])
    assert made.scaffold_ids[start + content] == Ids.null_token_id
    assert made.loss_weights[start + content] * Ids.null_loss_weight == pytest.approx(1)
    nulls = made.slot_mask & (made.scaffold_ids == Ids.null_token_id)
    assert set(made.loss_weights[nulls].tolist()) <= {0.0, 1.0, 10.0}
    assert (made.loss_weights[nulls] == 0).float().mean() > 0.5


def test_the_scored_share_of_the_tail_and_fixed_widths_are_options() -> None:
    whole = example({"city": "New York"}, run=replace(RUN, tail_share=1.0))
    assert (whole.loss_weights[whole.slot_mask] > 0).all()
    none = example({"city": "New York"}, run=replace(RUN, tail_share=0.0))
    alive = none.slot_mask & (none.scaffold_ids == Ids.null_token_id)
    assert set(none.loss_weights[alive].tolist()) == {0.0, 10.0}
    drawn = {len(example({"city": "a"}, seed).scaffold_ids) for seed in range(8)}
    fixed = [example({"city": "a"}, seed, replace(RUN, budgets="fixed")) for seed in range(8)]
    assert len(drawn) > 1
    assert len({len(one.scaffold_ids) for one in fixed}) == 1
    assert int((fixed[0].field_ids == 0).sum()) == Ids.string_budget


def test_what_the_scaffold_does_not_support_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    call = SingleCall([5], {"type": "object", "properties": {"a": {"anyOf": []}}}, "f", {"a": 1})
    assert head_example(call, tiny_vocabulary(), Ids, random.Random(0), RUN) is None
    assert example({"city": 3}) is None
    monkeypatch.setattr(head_training, "MAX_SCAFFOLD", 20)
    assert example({"city": "a"}) is None


def test_data_without_a_call_that_can_be_drafted_end_the_run_instead_of_halting_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}
    wrong = Row("r", "tiny", [5], [], [tool], [{"name": "get_weather", "arguments": {"city": 3}}], [])
    monkeypatch.setattr(OneRow, "row", wrong, raising=False)
    monkeypatch.setattr(head_training, "RowStream", OneRow)
    monkeypatch.setattr(head_training, "MAX_MISSES", 5)
    gold = GoldExamples(RUN, tiny_tokenizer(), tiny_vocabulary(), Ids)
    with pytest.raises(RecordError, match="of 5 drawn calls"):
        gold(random.Random(0), 0.0)
    gold.rows = [wrong]
    with pytest.raises(RecordError, match="of 5 drawn calls"):
        gold(random.Random(0), 0.0)


def test_kinds_allow_what_their_slots_can_hold() -> None:
    allowed, size = kind_tokens(tiny_vocabulary()), tiny_vocabulary().size
    (digit,), (letter,), (line,), (quote,) = (tiny_vocabulary().encode(text) for text in ("3", "z", "\n", '"'))
    special = [tiny_vocabulary().call_end, tiny_vocabulary().im_end]
    shown = dict(zip(head_training.SLOT_KINDS, allowed, strict=True))
    assert all(row[size + 1] and not row[size] for row in shown.values())  # NULL ends every kind, MASK is no token
    assert shown["any"][:size].all()
    assert shown["string"][[digit, letter, line, quote]].all()  # raw text, which is escaped later
    assert not shown["string"][special].any()
    for kind in ("integer", "number"):
        assert shown[kind][digit]
        assert not shown[kind][[letter, line, quote]].any()
    made = example({"city": "New York", "days": 3})
    held = (
        shown["string"][made.scaffold_ids[made.slot_kinds == 1]],
        shown["integer"][made.scaffold_ids[made.slot_kinds == 2]],
    )
    assert all(len(part) and part.all() for part in held)


CONFIG = tiny_config(loss_weighting="none")


def wide_model(**fields: Any) -> Any:
    """A random model with the ids of the examples above."""
    text_config = base_config()
    text_config.vocab_size = tiny_vocabulary().size
    sizes = {"head_hidden_size": 32, "head_num_layers": 1, "head_num_heads": 2}
    config = head_training.modeling.SmolLMDiffusionConfig(text_config=text_config, **sizes, **fields)
    return head_training.modeling.SmolLMDiffusionForCausalLM(config).eval()


def test_a_batch_has_what_the_models_forward_takes() -> None:
    collate = HeadCollator(CONFIG, pad_id=0, noise_samples=2, own_draft_share=1.0, kinds=kind_tokens(tiny_vocabulary()))
    batch = collate([example({"city": "a"}), example({"city": "a"}, seed=3)])
    taken = set(inspect.signature(head_training.modeling.SmolLMDiffusionForCausalLM.forward).parameters)
    assert batch.keys() <= taken
    shapes = {name: tuple(value.shape) for name, value in batch.items() if isinstance(value, torch.Tensor)}
    assert shapes["input_ids"] == shapes["attention_mask"] == (2, 3)
    of_scaffold = ("scaffold_ids", "scaffold_mask", "slot_mask", "loss_weights", "field_ids", "slot_kinds")
    assert len({shapes[name] for name in of_scaffold}) == 1
    assert shapes["noise_mask"] == shapes["own_mask"] == (4, shapes["scaffold_ids"][1])
    assert not batch["slot_mask"][~batch["scaffold_mask"]].any()
    assert (batch["field_ids"][~batch["slot_mask"]] == -1).all()


def test_noise_is_a_function_of_the_batch_and_times_are_spread_over_it() -> None:
    """Batches are drawn whole, whatever process trains on them, so that is all that repeatable runs need."""
    collate = HeadCollator(CONFIG, pad_id=0, noise_samples=3, own_draft_share=0.5)
    examples = [example({"city": "a", "days": seed}, seed=seed) for seed in range(8)]
    first, again = collate(examples), collate(examples)
    for name in ("noise_times", "noise_mask", "own_mask"):
        assert torch.equal(first[name], again[name])
    gaps = first["noise_times"].sort().values.diff()
    assert gaps.max() < 3 / 24  # independent draws leave larger holes nearly always
    # What stands behind an example in the batch changes nothing of it; where it stands shifts its times.
    width = len(examples[0].scaffold_ids)
    assert torch.equal(first["noise_mask"][:3, :width], collate(examples[:1])["noise_mask"])
    assert not torch.equal(first["noise_times"][3:6], collate(examples[1:2])["noise_times"])


def test_another_pass_over_a_record_draws_other_budgets_and_other_noise() -> None:
    rng = random.Random(0)
    call = SingleCall([5, 6, 7], SCHEMA, "get_weather", {"city": "New York"})
    made = (head_example(call, tiny_vocabulary(), Ids, rng, RUN) for _ in range(12))
    passes = [one for one in made if one is not None]
    assert len(passes) == 12
    assert len({len(made.scaffold_ids) for made in passes}) > 3
    assert len({made.seed for made in passes}) == 12


def test_the_collated_normaliser_is_what_the_loss_would_divide_by_itself() -> None:
    for weighting in ("none", "count", "schedule"):
        model = wide_model(loss_weighting=weighting)
        examples = [example({"city": "a"}), example({"city": "New York"}, seed=3)]
        batch = HeadCollator(model.config, 0, noise_samples=2)(examples)
        assert torch.equal(model(**batch).loss, model(**{**batch, "loss_normaliser": None}).loss)


def test_examples_with_and_without_a_teacher_share_a_batch() -> None:
    taught, plain = example({"city": "a"}), example({"city": "a", "days": 3}, seed=3)
    count = len(taught.scaffold_ids)
    taught = replace(taught, soft_ids=torch.ones(count, 2, dtype=torch.long), soft_probs=torch.full((count, 2), 0.5))
    batch = HeadCollator(CONFIG, 0, noise_samples=1)([taught, plain])
    assert batch["soft_ids"].shape == (*batch["scaffold_ids"].shape, 2)
    assert (batch["soft_probs"][0, :count] == 0.5).all()
    assert (batch["soft_probs"][1] == 0).all()
    assert "soft_ids" not in HeadCollator(CONFIG, 0, noise_samples=1)([plain])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"own_draft_share": 1.5}, "own_draft_share"),
        ({"tail_share": -0.1}, "tail_share"),
        ({"budgets": "wide"}, "budgets"),
        ({"quantization": "2bit"}, "quantization"),
        ({"noise_samples": 0}, "noise_samples"),
        ({"null_loss_weight": 0.0}, "null_loss_weight"),
    ],
)
def test_options_out_of_range_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HeadRun(tmp_path, **change)


def weights_hash(module: torch.nn.Module) -> str:
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in module.parameters())).hexdigest()


class OneRow:
    """Stands in for the stream of rows: the same request every time."""

    row: Row
    skipped: dict[str, int] = {}

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def draw(self, style: Any, rng: random.Random) -> Row:
        return self.row


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SmolLM3ForCausalLM:
    """A random base saved under `base`, and one request to train and to evaluate on."""
    tokenizer = tiny_tokenizer()
    base = SmolLM3ForCausalLM(base_config())
    base.save_pretrained(tmp_path / "base")
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}
    prompt = list(tiny_vocabulary().encode("weather in New York"))
    call = {"name": "get_weather", "arguments": {"city": "New York"}}
    row = Row("r", "tiny", prompt, [], [tool], [call], [])
    monkeypatch.setattr(OneRow, "row", row, raising=False)
    monkeypatch.setattr(head_training, "RowStream", OneRow)
    monkeypatch.setattr(head_training, "evaluation_sets", lambda *_: {"seen": [row, row], "unseen": [row]})
    assert tokenizer.pad_token_id is not None
    return base


def options(tmp_path: Path, **change: Any) -> HeadRun:
    fields = {
        "output": tmp_path / "out",
        "base": str(tmp_path / "base"),
        "rows_per_batch": 4,
        "noise_samples": 2,
        "head_hidden_size": 32,
        "head_num_layers": 1,
        "head_num_heads": 2,
        "max_steps": 100,
        "logging_steps": 10,
        "eval_steps": 50,
        "threads": 1,
    }
    return HeadRun(**{**fields, **change})


def history(run: HeadRun) -> list[dict[str, float]]:
    return json.loads((run.output / "trainer_state.json").read_text())["log_history"]


def test_a_run_trains_the_head_and_leaves_the_base(tmp_path: Path, base: Any) -> None:
    run = options(tmp_path, field_mask="block_causal", acceptance_rows=1, max_value_tokens=64, max_call_tokens=256)
    model = train_head(run, tiny_tokenizer())
    assert weights_hash(model.base.float()) == weights_hash(base.bfloat16().float())
    losses = [entry["diffusion_loss"] for entry in history(run) if "diffusion_loss" in entry]
    assert losses[-1] < losses[0] * 0.7
    loaded = head_training.modeling.SmolLMDiffusionForCausalLM.from_pretrained(tmp_path / "out" / "final")
    assert loaded.generation_config.decoding == "verified"
    assert loaded.config.field_mask == "block_causal"
    assert (loaded.config.max_value_tokens, loaded.config.max_call_tokens) == (64, 256)
    assert loaded.config.base_model_name_or_path is None  # the base is in the checkpoint
    assert getattr(loaded.config, "use_cache", True)  # training turned it off for itself only

    first, last = (entry for entry in history(run) if "eval_loss" in entry)
    assert last["eval_loss"] < first["eval_loss"]
    assert last["eval_seen_slots_right_string"] == 1  # what is learned by heart is drafted in one step
    assert last["eval_calls_right"] == 1
    for name in ("acceptance", "slots_right_presence", "calibration_error", "draft_calibration_error"):
        assert 0 <= last[f"eval_seen_{name}"] <= 1
    # What is learned by heart ends where it should; "New York" is one length, what is not alive another.
    assert last["eval_seen_draft_null_recall"] > first["eval_seen_draft_null_recall"]
    assert last["eval_seen_draft_null_recall_length_0"] > 0.9
    content = len(tiny_vocabulary().encode("New York"))
    bucket = next(name for name, top in (("1", 1), ("2-4", 4), ("5-8", 8), ("9-16", 16)) if content <= top)
    assert last[f"eval_seen_draft_null_precision_length_{bucket}"] == 1
    assert last["eval_seen_base_forwards"] >= 1


def test_a_head_goes_on_from_a_trained_one_and_refuses_another_shape(tmp_path: Path, base: Any) -> None:
    first = options(tmp_path, max_steps=1, eval_steps=1, eval_rows=0)
    train_head(first, tiny_tokenizer())
    trained = head_training.modeling.SmolLMDiffusionForCausalLM.from_pretrained(
        first.output / "final", dtype=torch.float32
    )
    again = head_training.fresh_model(options(tmp_path, seed=9, head_from=str(first.output / "final")))
    assert weights_hash(again.diffusion_head) == weights_hash(trained.diffusion_head)
    assert weights_hash(again.base) == weights_hash(base)
    with pytest.raises(ValueError, match="has another shape than this run's"):
        head_training.fresh_model(options(tmp_path, head_num_layers=2, head_from=str(first.output / "final")))


def test_a_whole_model_is_trained_on_with_its_own_size_and_defaults(tmp_path: Path, base: Any) -> None:
    first = options(tmp_path, max_steps=1, eval_steps=1, eval_rows=0)
    model = train_head(first, tiny_tokenizer())
    model.generation_config.tool_call_threshold = 0.25
    model.save_pretrained(first.output / "final")
    source = {"base": "", "head_from": str(first.output / "final"), "output": tmp_path / "second"}
    train_head(options(tmp_path, max_steps=2, eval_steps=2, eval_rows=0, **source), tiny_tokenizer())
    load = partial(head_training.modeling.SmolLMDiffusionForCausalLM.from_pretrained, dtype=torch.float32)
    before, after = load(first.output / "final"), load(tmp_path / "second" / "final")
    assert after.generation_config.tool_call_threshold == 0.25
    assert after.config.head_hidden_size == before.config.head_hidden_size
    assert weights_hash(after.base) == weights_hash(before.base)
    assert weights_hash(after.diffusion_head) != weights_hash(before.diffusion_head)
    with pytest.raises(ValueError, match="has head_num_layers 1, not 2: leave it out"):
        head_training.fresh_model(options(tmp_path, head_num_layers=2, **source))
    with pytest.raises(ValueError, match="pass --base"):
        head_training.fresh_model(options(tmp_path, base=""))


def test_a_head_trains_beside_a_quantised_base_which_is_saved_as_it_is(
    tmp_path: Path, base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base that only says it is quantised, since transformers' Trainer goes by that; its dtype must not change."""

    def load(*args: Any, **kwargs: Any) -> Any:
        model = from_base(*args, **kwargs)
        model.is_quantized = True
        return model

    kind = head_training.modeling.SmolLMDiffusionForCausalLM
    from_base = kind.from_base
    monkeypatch.setattr(kind, "from_base", load)
    model = train_head(options(tmp_path, max_steps=2, eval_steps=2, acceptance_rows=0), tiny_tokenizer())
    assert model.is_quantized
    assert {parameter.dtype for parameter in model.base.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in model.diffusion_head.parameters()} == {torch.bfloat16}


def test_every_part_of_the_objective_trains(tmp_path: Path, base: Any) -> None:
    run = options(
        tmp_path,
        max_steps=2,
        eval_steps=2,
        loss_weighting="schedule",
        constraint_loss_weight=0.5,
        label_smoothing=0.1,
        null_prediction_penalty=0.3,
        own_draft_share=0.5,
        acceptance_rows=0,
    )
    model = train_head(run, tiny_tokenizer())
    assert model.config.constraint_loss_weight == 0.5
    assert model.config.loss_weighting == "schedule"
    measured = next(entry for entry in history(run) if "eval_loss" in entry)
    assert measured["eval_seen_constraint_loss"] > 0
    assert "eval_acceptance" not in measured


def test_a_head_alone_is_saved_when_asked(tmp_path: Path, base: Any) -> None:
    train_head(options(tmp_path, max_steps=1, acceptance_rows=0, head_only=True), tiny_tokenizer())
    names = load_file(tmp_path / "out" / "final" / "model.safetensors").keys()
    assert all(name.startswith("diffusion_head.") for name in names)
    assert head_training.modeling.SmolLMDiffusionForCausalLM.from_pretrained(tmp_path / "out" / "final")


def test_a_run_can_read_features_from_the_disk(
    tmp_path: Path, base: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "training.head")
    monkeypatch.setattr(head_training, "evaluation_sets", lambda *_: {})
    run = options(tmp_path, max_steps=2, feature_cache=tmp_path / "features", cached_prompts=2)
    train_head(run, tiny_tokenizer())
    assert len(list((tmp_path / "features").rglob("*.safetensors"))) == 1
    assert "pays after" in caplog.text


def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path: Path, base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_training, "evaluation_sets", lambda *_: {})
    short = {"max_steps": 4, "eval_steps": 2, "own_draft_share": 0.5, "rows_per_batch": 2}
    whole = train_head(options(tmp_path, **short), tiny_tokenizer())

    class Stopped(Exception):
        pass

    def stop(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 3:
            raise Stopped
        return step(self, *args, **kwargs)

    trainer = head_training.StageTrainer
    step = trainer.training_step
    monkeypatch.setattr(trainer, "training_step", stop)
    with pytest.raises(Stopped):
        train_head(options(tmp_path, **short, output=tmp_path / "cut"), tiny_tokenizer())
    monkeypatch.setattr(trainer, "training_step", step)
    assert not (tmp_path / "cut" / "final").exists()
    resumed = train_head(options(tmp_path, **short, output=tmp_path / "cut"), tiny_tokenizer())
    assert weights_hash(resumed.float()) == weights_hash(whole.float())


def test_a_run_without_a_base_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--base"):
        train_head(options(tmp_path, base=""), tiny_tokenizer())
