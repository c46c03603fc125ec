"""How stages hold a model: quantisation is asked for clearly, and what is saved has the precision it was chosen in."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from test_head_training import base, options  # noqa: F401
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer
from training import stage_model
from training.head import train_head
from training.stage_model import check_quantization, left_padded, loading_arguments, to_saved_precision


def test_a_missing_package_and_an_unknown_name_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_model, "find_spec", lambda name: None)
    check_quantization("none")
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        check_quantization("4bit")
    with pytest.raises(ValueError, match="none, 4bit, 8bit, got '2bit'"):
        check_quantization("2bit")


def test_a_base_is_loaded_in_float32_unless_it_is_quantised() -> None:
    assert loading_arguments("none") == {"dtype": torch.float32}
    four, eight = (loading_arguments(name)["quantization_config"] for name in ("4bit", "8bit"))
    assert four.load_in_4bit
    assert four.bnb_4bit_compute_dtype == torch.float32
    assert loading_arguments("4bit", bf16=True)["quantization_config"].bnb_4bit_compute_dtype == torch.bfloat16
    assert eight.load_in_8bit


def test_prompts_stand_at_the_right_under_a_mask_of_their_own() -> None:
    ids, mask = left_padded([[1, 2, 3], [4]], 9, torch.device("cpu"))
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_a_probe_is_saved_in_the_precision_that_its_threshold_was_chosen_in() -> None:
    model = tiny_model()
    model.set_decision_head(torch.full((model.config.get_text_config().hidden_size,), 1 / 3), 0.1)
    weight = model.decision_head.weight.clone()
    to_saved_precision(model)
    assert torch.equal(model.decision_head.weight, weight)
    assert {parameter.dtype for parameter in model.base.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.diffusion_head.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_a_head_trains_on_a_quantised_base_and_is_saved(quantization: str, tmp_path: Path, base: Any) -> None:  # noqa: F811
    pytest.importorskip("bitsandbytes", reason="needs the quantization extra")
    run = options(tmp_path, max_steps=2, eval_steps=2, acceptance_rows=0, quantization=quantization)
    model = train_head(run, tiny_tokenizer())
    quantised = (torch.uint8, torch.int8)
    assert any(parameter.dtype in quantised for parameter in model.base.parameters())
    assert json.loads((run.output / "final" / "config.json").read_text())["quantization_config"]
