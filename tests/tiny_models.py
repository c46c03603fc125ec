"""Tiny random bases of several architectures and models around them, for tests; built in milliseconds, no files."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, LlamaConfig, PreTrainedConfig, SmolLM3Config

from repo_package import load_repo_module
from tiny_tokenizer import tiny_tokenizer

SmolLMDiffusionConfig = load_repo_module("configuration_smollm_diffusion").SmolLMDiffusionConfig
SmolLMDiffusionForCausalLM = load_repo_module("modeling_smollm_diffusion").SmolLMDiffusionForCausalLM

VOCAB = 300
BASES = ("smollm3", "llama", "gpt2")
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # Wide enough that random models differ clearly from one input to another.
    "initializer_range": 0.2,
}


def tiny_text_config(base: str = "smollm3") -> PreTrainedConfig:
    """Config of a tiny base: "smollm3" (tied embeddings), "llama" (untied) or "gpt2" (no rotary, dropout)."""
    if base == "smollm3":
        return SmolLM3Config(**_SHAPE, intermediate_size=64, num_key_value_heads=2)
    if base == "llama":
        return LlamaConfig(**_SHAPE, intermediate_size=64, num_key_value_heads=2, tie_word_embeddings=False)
    return GPT2Config(**_SHAPE)


def answering_text_config(hidden_size: int) -> PreTrainedConfig:
    """Config of a tiny base around the tiny tokenizer, with room for a conversation."""
    tokenizer = tiny_tokenizer()
    return SmolLM3Config(
        vocab_size=len(tokenizer) + 3,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def tiny_config(base: str = "smollm3", /, **fields: Any) -> Any:
    """Config of a tiny model; `fields` override."""
    defaults = {"head_hidden_size": 32, "head_num_layers": 2, "head_num_heads": 2, "initializer_range": 0.1}
    return SmolLMDiffusionConfig(text_config=tiny_text_config(base), **{**defaults, **fields})


def tiny_model(base: str = "smollm3", /, **fields: Any) -> Any:
    """A tiny random model in eval mode."""
    return SmolLMDiffusionForCausalLM(tiny_config(base, **fields)).eval()


def random_ids(*shape: int) -> Tensor:
    """Random token ids that are no special tokens."""
    return torch.randint(3, VOCAB, shape)


def training_batch(config: Any, rows: int = 3) -> dict[str, Tensor]:
    """Prompts padded on the left and scaffolds padded on the right, each with two slots that end in NULL."""
    prompt, prompt_mask = random_ids(rows, 12), torch.ones(rows, 12, dtype=torch.long)
    scaffold, scaffold_mask = random_ids(rows, 16), torch.ones(rows, 16, dtype=torch.long)
    slots = torch.zeros(rows, 16, dtype=torch.long)
    slots[:, 2:6] = slots[:, 8:12] = 1
    scaffold[:, 4:6] = scaffold[:, 11] = config.null_token_id
    prompt_mask[0, :3] = 0
    scaffold_mask[-1, 14:] = 0
    return {
        "input_ids": prompt,
        "attention_mask": prompt_mask,
        "scaffold_ids": scaffold,
        "scaffold_mask": scaffold_mask,
        "slot_mask": slots,
    }


@contextmanager
def drafted_over(model: Any) -> Iterator[list[Any]]:
    """What the head has read when it drafts, while the block runs."""
    memories, draft = list[Any](), model.draft_log_probs

    def noted(memory: Any, *args: Any) -> Tensor:
        memories.append(memory)
        return draft(memory, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "draft_log_probs", noted)
        yield memories
