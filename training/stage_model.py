"""How a stage holds a model and asks it: its base in float32 or quantised, a GPU where there is one, saved in bfloat16.

Knows no data and no objective.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig

from .trainer import Throughput, own_device

QUANTIZATIONS = ("none", "4bit", "8bit")


def check_quantization(name: str) -> None:
    """Refuse what no base can be quantised to here.

    Args:
        name: of `QUANTIZATIONS`.

    Raises:
        ValueError: there is no such quantisation, or the package for it is missing.
    """
    if name not in QUANTIZATIONS:
        raise ValueError(f"quantization must be one of {', '.join(QUANTIZATIONS)}, got {name!r}.")
    if name != "none" and find_spec("bitsandbytes") is None:
        raise ValueError(f"quantization={name!r} needs a package that is missing: pip install bitsandbytes.")


def loading_arguments(quantization: str, bf16: bool = False) -> dict[str, Any]:
    """What `from_base` and `from_pretrained` are to be told.

    Args:
        quantization: of `QUANTIZATIONS`; the head is never quantised.
        bf16: a 4-bit base computes in bfloat16 instead of float32.
    """
    arguments: dict[str, Any] = {"dtype": torch.float32}
    if quantization == "4bit":
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16 if bf16 else torch.float32,
        )
    elif quantization == "8bit":
        arguments["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    return arguments


def is_quantised(model: Any) -> bool:
    """Whether the model was loaded on a quantised base."""
    return bool(getattr(model, "is_quantized", False))


def on_device(model: Any) -> Any:
    """Move a model to the GPU of this process if there is one."""
    return model.to(own_device())


def left_padded(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts of different lengths as one batch whose ends stand side by side.

    Args:
        rows: tokens.
        pad_id: token at padding.
        device: where the result lives.

    Returns:
        Ids and attention mask, int64 [rows, width].
    """
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), pad_id), torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = torch.tensor(row)
        mask[index, width - len(row) :] = 1
    return ids.to(device), mask.to(device)


def to_saved_precision(model: Any) -> Any:
    """Turn base, head and draft adapter into bfloat16, in which checkpoints hold them.

    A `decision_head` stays in float32, since the threshold was chosen on what it says there, and a quantised base stays
    as it is.
    """
    parts = (None if is_quantised(model) else model.base, model.diffusion_head, model.draft_adapter)
    for part in parts:
        if part is not None:
            part.to(torch.bfloat16)
    return model


def rates(throughput: Throughput) -> dict[str, float]:
    """Rates since the last call and the peak memory of work that has no forward and backward to tell apart."""
    return {name: value for name, value in throughput.flush().items() if not name.startswith("percent_")}


@contextmanager
def trained_beside_its_base(model: Any) -> Iterator[None]:
    """While a `Trainer` is made for it, a model on a quantised base does not say that it is quantised: transformers
    knows of no trainable parts beside such a base but peft's adapters, and refuses all others."""
    quantised = is_quantised(model)
    if quantised:
        model.is_quantized = False
    try:
        yield
    finally:
        if quantised:
            model.is_quantized = True
