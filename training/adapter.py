"""Training of a draft adapter: LoRA on the base, in the draft pass only, together with the head that reads it.

Takes a model with a trained head; gives it back with the adapter in the folder `adapter/`. The objective, the examples
and the evaluation are those of `training.head`.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from repo_package import load_repo_module

from .head import ObjectiveRun, fit_head
from .stage_model import loading_arguments

modeling = load_repo_module("modeling_smollm_diffusion")


@dataclass(frozen=True)
class AdapterRun(ObjectiveRun):
    """Options of one run; each is an argument of `train_hf.py --stage adapter`. `gradient_checkpointing` covers the
    head alone: the base stays in eval mode, and its activations are kept for the adapter's gradients.

    Args:
        model: folder or repo of the model with a trained head; its adapter is trained further if it has one.
        lora_r: rank of a fresh adapter.
        lora_alpha: its updates are scaled by `lora_alpha / lora_r`.
        lora_dropout: dropout of the adapter's input while training.
        target_modules: ends of the names of the base's layers that it acts on, such as q_proj; empty = all linear ones.
        optimizer: AdamW by default. Muon takes steps of one size in every direction of a matrix, and an adapter, which
            starts at zero, is to stay small against the weights that it is added to.
        adam_lr: peak learning rate of AdamW, lower than for a fresh head.
    """

    model: str = ""
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    target_modules: list[str] = field(default_factory=list)
    optimizer: str = "adamw"
    adam_lr: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_r < 1 or self.lora_alpha <= 0 or not 0 <= self.lora_dropout < 1:
            raise ValueError(
                f"lora_r ({self.lora_r}) and lora_alpha ({self.lora_alpha}) must be positive and lora_dropout "
                f"({self.lora_dropout}) from 0 to below 1."
            )


def train_adapter(run: AdapterRun, tokenizer: PreTrainedTokenizerFast) -> Any:
    """Train a draft adapter and the head further with it, and save the model as `train_head` does.

    Args:
        run: the options.
        tokenizer: tokenizer of the model.

    Returns:
        The trained model.

    Raises:
        ValueError: the run names no model, or the base has no layers of these names.
        ImportError: peft is not installed.
    """
    if not run.model:
        raise ValueError("An adapter is added to a model with a trained head: pass --model with its folder or repo.")
    model = modeling.SmolLMDiffusionForCausalLM.from_pretrained(
        run.model, **loading_arguments(run.quantization, run.bf16)
    )
    if not model.has_draft_adapter:
        torch.manual_seed(run.seed)
        model.add_draft_adapter(
            r=run.lora_r,
            lora_alpha=run.lora_alpha,
            lora_dropout=run.lora_dropout,
            target_modules=run.target_modules or "all-linear",
        )
    return fit_head(model, run, tokenizer)
