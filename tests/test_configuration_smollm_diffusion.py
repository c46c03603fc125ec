"""The config validates every field, survives saving, and no field is read by nobody."""

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, SmolLM3Config

from repo_package import ROOT, load_repo_module
from tiny_models import SmolLMDiffusionConfig, tiny_config, tiny_text_config

configuration = load_repo_module("configuration_smollm_diffusion")


def test_defaults_are_those_of_smollm3() -> None:
    config = SmolLMDiffusionConfig()
    assert isinstance(config.text_config, SmolLM3Config)
    assert (config.mask_token_id, config.null_token_id) == (128256, 128257)
    assert config.feature_layers == (9, 18, 27, 36)
    assert config.field_mask == "full"
    assert config.head_intermediate_size == 5504
    assert config.get_text_config() is config.text_config


@pytest.mark.parametrize("layers", range(1, 50))
def test_spread_layers_are_increasing_and_end_at_the_last(layers: int) -> None:
    chosen = configuration.spread_layers(layers)
    assert list(chosen) == sorted(set(chosen))
    assert chosen[0] >= 1
    assert chosen[-1] == layers
    assert len(chosen) == min(4, layers)


@pytest.mark.parametrize(
    "text_config",
    [
        None,
        {"vocab_size": 77, "num_hidden_layers": 2},
        {"model_type": "gpt2", "vocab_size": 77},
        GPT2Config(vocab_size=77),
    ],
)
def test_text_config_may_be_absent_a_dict_or_a_config(text_config: Any) -> None:
    config = SmolLMDiffusionConfig(text_config=text_config)
    assert config.mask_token_id == (128256 if text_config is None else 77)


@pytest.mark.parametrize("base", ["smollm3", "llama", "gpt2"])
def test_saved_config_equals_loaded_config(base: str, tmp_path: Path) -> None:
    config = tiny_config(
        base,
        feature_layers=[0, 4],
        field_mask="isolated",
        string_budget=5,
        number_budget=6,
        array_budget=7,
        max_value_tokens=8,
        max_call_tokens=9,
        noise_schedule="cosine",
        noise_eps=0.01,
        loss_weighting="count",
        null_loss_weight=0,
        null_prediction_penalty=2.5,
        label_smoothing=0.2,
        decision_head=True,
        base_model_name_or_path="some/base",
        base_revision="abc",
        head_only_checkpoint=True,
    )
    config.save_pretrained(tmp_path)
    loaded = SmolLMDiffusionConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.feature_layers == (0, 4)
    assert type(loaded.text_config) is type(config.text_config)


def test_architectures_and_auto_map_survive_saving(tmp_path: Path) -> None:
    config = tiny_config(architectures=["SomethingElse"], auto_map={"AutoModel": "someone/repo--modeling.Other"})
    config.architectures = ["SmolLMDiffusionForCausalLM"]
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["architectures"] == ["AutoModelForCausalLM"]
    assert saved["auto_map"] == configuration.AUTO_MAP


def test_auto_map_names_existing_classes() -> None:
    for reference in configuration.AUTO_MAP.values():
        module, name = reference.split(".")
        assert inspect.isclass(getattr(load_repo_module(module), name))


POSITIVE_INTEGERS = [
    "head_hidden_size",
    "head_num_layers",
    "head_num_heads",
    "head_intermediate_size",
    "string_budget",
    "number_budget",
    "array_budget",
    "max_value_tokens",
    "max_call_tokens",
]
NUMBERS = ["noise_eps", "null_loss_weight", "null_prediction_penalty", "label_smoothing", "initializer_range"]
STRINGS = ["base_model_name_or_path", "base_revision"]


@pytest.mark.parametrize("name", POSITIVE_INTEGERS)
@pytest.mark.parametrize("value", [2.0, "4", True, [1]])
def test_whole_numbers_are_required(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=name):
        tiny_config(**{name: value})


@pytest.mark.parametrize("name", POSITIVE_INTEGERS)
@pytest.mark.parametrize("value", [0, -3])
def test_sizes_are_positive(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=name):
        tiny_config(**{name: value})


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["0.1", None, False])
def test_numbers_are_required(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=name):
        tiny_config(**{name: value})


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [-0.1, float("inf"), float("nan")])
def test_numbers_stay_in_range(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        tiny_config(**{name: value})


@pytest.mark.parametrize("name", STRINGS)
def test_names_are_strings(name: str) -> None:
    with pytest.raises(TypeError, match=name):
        tiny_config(**{name: 3})


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"noise_eps": 0.0}, "noise_eps"),
        ({"noise_eps": 1.0}, "noise_eps"),
        ({"label_smoothing": 1.5}, "label_smoothing"),
        ({"noise_schedule": "log-linear"}, "noise_schedule"),
        ({"loss_weighting": "1/t"}, "loss_weighting"),
        ({"field_mask": "causal"}, "field_mask"),
        ({"field_mask": None}, "field_mask"),
        ({"head_hidden_size": 34, "head_num_heads": 4}, "head_num_heads"),
        ({"head_hidden_size": 6, "head_num_heads": 2}, "even width"),
        ({"string_budget": 300}, "string_budget"),
        ({"number_budget": 300}, "number_budget"),
        ({"feature_layers": []}, "feature_layers"),
        ({"feature_layers": [2, 1]}, "feature_layers"),
        ({"feature_layers": [1, 1]}, "feature_layers"),
        ({"feature_layers": [-1]}, "feature_layers"),
        ({"feature_layers": [5]}, "feature_layers"),
        ({"head_only_checkpoint": True}, "base_model_name_or_path"),
    ],
)
def test_impossible_values_are_refused_by_name(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        tiny_config(**fields)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"feature_layers": 3}, "feature_layers"),
        ({"feature_layers": ["1"]}, "feature_layers"),
        ({"feature_layers": [1.0]}, "feature_layers"),
        ({"head_only_checkpoint": "yes"}, "head_only_checkpoint"),
        ({"decision_head": 1}, "decision_head"),
    ],
)
def test_wrong_types_are_refused_by_name(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(TypeError, match=named):
        tiny_config(**fields)


def test_text_config_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"text_config.*no-such-model"):
        SmolLMDiffusionConfig(text_config={"model_type": "no-such-model"})
    with pytest.raises(TypeError, match="text_config"):
        SmolLMDiffusionConfig(text_config="smollm3")


def test_fields_set_later_are_checked_before_saving(tmp_path: Path) -> None:
    config = tiny_config()
    config.string_budget = 0
    with pytest.raises(ValueError, match="string_budget"):
        config.save_pretrained(tmp_path)


def test_ids_follow_the_vocabulary() -> None:
    config = SmolLMDiffusionConfig(text_config=tiny_text_config())
    config.get_text_config().vocab_size = 333
    assert (config.mask_token_id, config.null_token_id) == (333, 334)


def test_every_field_is_read_by_some_code() -> None:
    modules = [path for path in ROOT.glob("*.py") if path.name != "configuration_smollm_diffusion.py"]
    text = "\n".join(path.read_text() for path in [*modules, *ROOT.glob("training/*.py")])
    fields = set(inspect.signature(SmolLMDiffusionConfig.__init__).parameters) - {"self", "kwargs"}
    assert {name for name in fields if not re.search(rf"\.{name}\b", text)} == set()
