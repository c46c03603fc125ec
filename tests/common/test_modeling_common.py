"""transformers' own common tests of a model class (`ModelTesterMixin`), run against ours: an independent judge.

`make modeling-common-tests` fetches them first; without them this file is one skipped test.
"""

import importlib
import importlib.util
import sys
import types
import unittest
from typing import Any

import pytest
import torch

from fetch_transformers_tests import fetched_tests
from tiny_models import SmolLMDiffusionConfig, SmolLMDiffusionForCausalLM, random_ids, tiny_config, training_batch

if not fetched_tests().exists():
    pytest.skip(f"{fetched_tests()} is absent; run `make modeling-common-tests` to fetch it", allow_module_level=True)

PACKAGE = "transformers_common_tests"
# Modules that the tests import, but that the source distribution does not hold.
ABSENT = {
    "exporters": None,
    "exporters.test_export": "ExportTesterMixin",
    "generation": None,
    "generation.test_utils": "GenerationTesterMixin",
}


def load_common_tests() -> Any:
    """Import the fetched tests as a package, with empty stand-ins for what the distribution leaves out."""
    spec = importlib.util.spec_from_loader(PACKAGE, loader=None, is_package=True)
    assert spec is not None
    package = importlib.util.module_from_spec(spec)
    package.__path__ = [str(fetched_tests())]
    sys.modules[PACKAGE] = package
    for name, mixin in ABSENT.items():
        module: Any = types.ModuleType(f"{PACKAGE}.{name}")
        module.__path__ = []
        if mixin is not None:
            setattr(module, mixin, type(mixin, (), {}))
        sys.modules[module.__name__] = module
    return importlib.import_module(f"{PACKAGE}.test_modeling_common")


common = load_common_tests()


class ModelTester:
    """What the mixin asks of a model: a tiny config and inputs."""

    batch_size = 2
    seq_length = 7
    is_training = True
    num_hidden_layers = 2
    hidden_size = 32
    num_attention_heads = 4

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        ids = random_ids(self.batch_size, self.seq_length)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def get_config(self) -> Any:
        config = tiny_config()
        config.text_config.num_hidden_layers = self.num_hidden_layers
        config.text_config.layer_types = ["full_attention"] * self.num_hidden_layers
        config.feature_layers = (0, self.num_hidden_layers)
        return config


# What does not apply to a model whose base is frozen, and why.
NOT_APPLICABLE = {
    "test_retain_grad_hidden_states_attentions": "the base is frozen, so its hidden states have no gradient",
    "test_training_gradient_checkpointing": "looks at layers of the base, which stay in eval mode",
    "test_training_gradient_checkpointing_use_reentrant_false": "as test_training_gradient_checkpointing",
    "test_training_gradient_checkpointing_use_reentrant_true": "as test_training_gradient_checkpointing",
    "test_correct_missing_keys": "a plain base is loaded by from_base; from_pretrained refuses it",
}


class SmolLMDiffusionModelTest(
    common.ModelTesterMixin,  # type: ignore[name-defined]
    common.GenerationTesterMixin,  # type: ignore[name-defined]
    unittest.TestCase,
):
    all_model_classes = (SmolLMDiffusionForCausalLM,)
    config_class = SmolLMDiffusionConfig
    test_can_init_all_missing_weights_before_2023 = True
    _is_composite = True

    def setUp(self) -> None:
        torch.manual_seed(0)
        self.model_tester = ModelTester()
        if self._testMethodName in NOT_APPLICABLE:
            self.skipTest(NOT_APPLICABLE[self._testMethodName])

    def _prepare_for_class(self, inputs_dict: dict[str, Any], model_class: type, return_labels: bool = False) -> Any:
        """Training inputs are a scaffold, as language-model labels would only train the frozen base."""
        compares_two_forwards = self._testMethodName == "test_model_outputs_equivalence"  # the noise would differ
        return training_batch(tiny_config()) if return_labels and not compares_two_forwards else dict(inputs_dict)
