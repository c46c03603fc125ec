"""Tiny models that can answer, saved whole with their tokenizer, as what a release is made of."""

from pathlib import Path
from typing import Any

import torch
from transformers.dynamic_module_utils import get_relative_import_files

from repo_package import ROOT
from tiny_models import SmolLMDiffusionConfig, SmolLMDiffusionForCausalLM, answering_text_config
from tiny_tokenizer import tiny_tokenizer

MODELING = ROOT / "modeling_smollm_diffusion.py"
CODE = {MODELING.name, *(Path(path).name for path in get_relative_import_files(MODELING))}
"""The modules that `trust_remote_code` loads."""


def answering_model(seed: int = 0) -> Any:
    """A random model around the tiny tokenizer."""
    torch.manual_seed(seed)
    text_config = answering_text_config(64)
    fields = {"head_hidden_size": 64, "head_num_layers": 1, "head_num_heads": 2}
    return SmolLMDiffusionForCausalLM(SmolLMDiffusionConfig(text_config=text_config, **fields)).eval()


def saved_model(folder: Path, seed: int = 0) -> Path:
    """Save such a model with its tokenizer; returns the folder."""
    answering_model(seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
