"""A LoRA adapter on the frozen base that acts in the draft pass and nowhere else.

peft lays it out, initialises it and defines its files. Here it is kept beside the base, not inside: hooks add it to the
base's layers for as long as one pass takes, and for the thread of that pass only. At any other time the base holds no
trace of it, so its logits, the names of its weights and its checkpoints are those of the base without an adapter.
"""

import copy
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from threading import get_ident
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import cached_file

from .compiled_decoding import beside_no_compiler

# Not the root of a checkpoint: an adapter_config.json there makes transformers load the plain base in place of ours.
ADAPTER_FOLDER = "adapter"
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# Of the names of weights in the state dict of the model, and in the files of peft.
ADAPTER_PREFIX = "draft_adapter."
_PEFT_PREFIX = "base_model.model."
# What peft calls the only adapter of a model.
_NAME = "default"
# Fields of a LoRA config that may be chosen; the rest stand for methods that change more than the output of a layer.
_FREE_FIELDS = {
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "lora_bias"),
    *("peft_type", "peft_version", "task_type", "inference_mode", "auto_mapping", "base_model_name_or_path"),
    "revision",
}
# The other ways of initialising read or change the weights of the base.
_INITS = (True, False, "gaussian")


class LowRank(nn.Module):
    """What is added to the output of one layer: `scaling * up(down(dropout(x)))`. Source: LoRA (arXiv 2106.09685).

    Args:
        down: to the rank, [r, in].
        up: from the rank, [out, r].
        dropout: of the input, while training.
        scaling: factor.
    """

    def __init__(self, down: nn.Linear, up: nn.Linear, dropout: nn.Module, scaling: float) -> None:
        super().__init__()
        self.lora_A, self.lora_B = down, up  # as peft names them
        self.dropout = dropout
        self.scaling = scaling

    def forward(self, inputs: Tensor) -> Tensor:
        """Map [..., in] to [..., out], in the dtype of the adapter."""
        inputs = self.dropout(inputs.to(self.lora_A.weight.dtype))
        return self.lora_B(self.lora_A(inputs)) * self.scaling


class DraftAdapter(nn.Module):
    """The adapter of one base.

    Args:
        lora_config: peft's `LoraConfig`.
        text_config: config of the base.

    Raises:
        ImportError: peft is not installed.
        ValueError: the config asks for more than plain LoRA on linear layers, or names layers that the base lacks.
    """

    def __init__(self, lora_config: Any, text_config: PreTrainedConfig) -> None:
        super().__init__()
        _check_config(lora_config)
        self.lora_config, layers = _lay_out(lora_config, text_config)
        self.names = tuple(layers)  # of the base's layers
        self.layers = nn.ModuleList(layers.values())
        self._acting: set[int] = set()  # threads

    # --------------------------------------------------------------- acting

    @contextmanager
    def acting_on(self, base: nn.Module) -> Iterator[None]:
        """Add the adapter to the base's layers in the forwards that this thread runs in the block.

        Args:
            base: the base.

        Raises:
            ValueError: the base, or a part of it, is compiled, and so would not see the adapter come and go.
        """
        thread = get_ident()
        if thread in self._acting:  # a block in a block
            yield
            return
        if any(module._compiled_call_impl is not None for module in base.modules()):
            raise ValueError(
                "The base is compiled, so that its draft adapter cannot be switched: leave it uncompiled and call "
                "compile_decoding() of the model."
            )
        with ExitStack() as stack:
            # What is compiled in another thread meanwhile would keep the adapter in.
            stack.enter_context(beside_no_compiler())
            self._acting.add(thread)
            stack.callback(self._acting.discard, thread)
            for name, layer in zip(self.names, self.layers, strict=True):
                hook = base.get_submodule(name).register_forward_hook(partial(_add, layer, thread))
                stack.callback(hook.remove)
            yield

    def move_beside(self, base: nn.Module, like: Tensor) -> None:
        """Bring every layer to the device of the base's layer.

        Args:
            base: the base.
            like: a parameter whose dtype the adapter takes, and its device where the base's layer is offloaded.
        """
        for name, layer in zip(self.names, self.layers, strict=True):
            device = next(base.get_submodule(name).parameters()).device
            layer.to(device=like.device if device.type == "meta" else device, dtype=like.dtype)

    # --------------------------------------------------------------- files

    def save(self, folder: str | os.PathLike, state: Mapping[str, Tensor] | None = None) -> None:
        """Write `adapter/` in peft's format.

        Args:
            folder: of the checkpoint.
            state: state dict of the whole model, for one that is spread over processes; None = the weights held here.
        """
        if state is None:
            state = {ADAPTER_PREFIX + key: tensor for key, tensor in self.state_dict().items()}
        tensors = {name: state[ADAPTER_PREFIX + key].detach().contiguous() for name, key in self._peft_keys().items()}
        fields = {**self.lora_config.to_dict(), "inference_mode": True}
        # Sets have another order in every process.
        fields = {name: sorted(value) if isinstance(value, set) else value for name, value in fields.items()}
        path = Path(folder) / ADAPTER_FOLDER
        path.mkdir(parents=True, exist_ok=True)
        (path / CONFIG_FILE).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        save_file(tensors, path / WEIGHTS_FILE, metadata={"format": "pt"})

    @classmethod
    def load(cls, source: Any, text_config: PreTrainedConfig, **lookup: Any) -> "DraftAdapter":
        """Load `adapter/` of a checkpoint.

        Args:
            source: folder or repo of the checkpoint.
            text_config: config of the base.
            lookup: where it is looked up, as in transformers' `cached_file`.

        Raises:
            ImportError: peft is not installed.
            ValueError: a file is missing or damaged, or does not fit the base.
        """
        config_file, weights_file = (_file(source, name, lookup) for name in (CONFIG_FILE, WEIGHTS_FILE))
        try:
            lora_config = _peft().LoraConfig.from_peft_type(**json.loads(Path(config_file).read_bytes()))
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{config_file} does not describe a LoRA adapter ({error!r}): save it again.") from error
        adapter = cls(lora_config, text_config)
        try:
            tensors = load_file(weights_file)
        except SafetensorError as error:
            raise ValueError(f"{weights_file} is damaged ({error}): fetch or save it again.") from error
        keys, own = adapter._peft_keys(), adapter.state_dict()
        faults = sorted(keys.keys() ^ tensors.keys())
        faults = faults or [name for name, key in keys.items() if tensors[name].shape != own[key].shape]
        if faults:
            raise ValueError(
                f"{weights_file} does not hold the adapter that {CONFIG_FILE} describes for this base: {len(faults)} "
                f"weights are missing, unknown or of another shape, such as {faults[0]}."
            )
        adapter.load_state_dict({key: tensors[name] for name, key in keys.items()})
        return adapter

    def _peft_keys(self) -> dict[str, str]:
        """Names of the weights in peft's files, and those in the state dict of this module."""
        return {
            f"{_PEFT_PREFIX}{name}.{key}": f"layers.{index}.{key}"
            for index, (name, layer) in enumerate(zip(self.names, self.layers, strict=True))
            for key in layer.state_dict()
        }


def lora_config_of(lora_config: Any = None, **options: Any) -> Any:
    """peft's config of an adapter.

    Args:
        lora_config: a `LoraConfig`; then there are no options.
        options: fields of one; without `target_modules` it acts on all linear layers but the output layer.

    Raises:
        ImportError: peft is not installed.
        ValueError: both are given.
    """
    if lora_config is None:
        return _peft().LoraConfig(**{"target_modules": "all-linear", **options})
    if options:
        raise ValueError(f"A LoRA config and options of one ({', '.join(options)}) are given: give one of the two.")
    return lora_config


def remove_saved(folder: str | os.PathLike) -> None:
    """Remove what `save` has written into a folder, so that a model without adapter does not find an old one there.

    Args:
        folder: of the checkpoint.
    """
    path = Path(folder) / ADAPTER_FOLDER
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (path / name).unlink(missing_ok=True)
    with suppress(OSError):  # there is none, or it holds other files
        path.rmdir()


def _add(layer: nn.Module, thread: int, _module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
    """A forward hook: the output with the adapter's part; unchanged in other threads, which share the module."""
    return output + layer(inputs[0]).to(output.dtype) if get_ident() == thread else None


def _peft() -> Any:
    """The peft library."""
    try:
        import peft
    except ImportError as error:
        raise ImportError("A draft adapter needs the peft library: pip install peft.") from error
    return peft


def _check_config(lora_config: Any) -> None:
    """Refuse what is not plain LoRA."""
    peft = _peft()
    if not isinstance(lora_config, peft.LoraConfig):
        raise ValueError(f"A draft adapter is described by a peft.LoraConfig, not by {type(lora_config).__name__}.")
    plain, fields = peft.LoraConfig().to_dict(), lora_config.to_dict()
    others = sorted(name for name in fields.keys() - _FREE_FIELDS if fields[name] != plain.get(name))
    if others:
        raise ValueError(
            f"A draft adapter is plain LoRA on linear layers, and {', '.join(others)} of the LoRA config ask for more: "
            "leave them at their defaults."
        )
    if lora_config.init_lora_weights not in _INITS:
        raise ValueError(
            f"init_lora_weights={lora_config.init_lora_weights!r} would read or change the base's weights: use one of "
            f"{', '.join(map(repr, _INITS))}."
        )


def _lay_out(lora_config: Any, text_config: PreTrainedConfig) -> tuple[Any, dict[str, LowRank]]:
    """Let peft say what an adapter consists of, on a copy of the base without weights.

    Returns:
        The config with the layers it means by name, and freshly initialised parts by the name of the base's layer.
    """
    peft, lora_config = _peft(), copy.deepcopy(lora_config)
    lora_config.inference_mode = False
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(copy.deepcopy(text_config))
    output_layer = skeleton.get_output_embeddings()
    peft.inject_adapter_in_model(lora_config, skeleton, _NAME)
    layers = {}
    for name, module in skeleton.named_modules():
        if not isinstance(module, peft.tuners.lora.LoraLayer):
            continue
        if not isinstance(module, peft.tuners.lora.Linear) or module.base_layer is output_layer:
            raise ValueError(
                f"target_modules of the LoRA config mean {name!r}, which is not a linear layer in front of the hidden "
                "states that the head reads: name others."
            )
        down, up = (part[_NAME].float().to_empty(device="cpu") for part in (module.lora_A, module.lora_B))
        down.reset_parameters()
        up.reset_parameters()
        if lora_config.init_lora_weights:
            module.reset_lora_parameters(_NAME, lora_config.init_lora_weights)
        layers[name] = LowRank(down, up, module.lora_dropout[_NAME], module.scaling[_NAME])
    return lora_config, layers


def _file(source: Any, name: str, lookup: Mapping[str, Any]) -> str:
    """Path of a file of a checkpoint's adapter, fetched if need be."""
    found = cached_file(source, f"{ADAPTER_FOLDER}/{name}", _raise_exceptions_for_missing_entries=False, **lookup)
    if found is None:
        raise ValueError(
            f"The config of {source} says that it has a draft adapter, but {ADAPTER_FOLDER}/{name} is missing: save "
            "the model again. (Pickled weights, such as adapter_model.bin, are never loaded.)"
        )
    return str(found)
