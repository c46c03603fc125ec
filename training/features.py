"""The base's features of a finite set of prompts, computed once and kept on disk, so that later steps skip the base.

Takes a model and prompts; gives each prompt's features. Shards are safetensors files in a folder that is named after
the base's weights, so features of another base are never read. Knows no records and no training.
"""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from repo_package import load_repo_module

logger = logging.getLogger(__name__)

SHARD_PROMPTS = 64
"""Prompts of one file: what an interrupted run computes again at most."""
LOCK_FILE = ".lock"
"""Held by the process that removes and writes files of a folder."""

HEADS = load_repo_module("modeling_smollm_diffusion").HEAD_PREFIXES
"""Parts of a model that its features do not depend on, by the beginning of their parameters' names."""


def base_digest(model: torch.nn.Module) -> str:
    """Names a model's base, with its draft adapter if it has one, by weights and buffers: 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(HEADS):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def prompt_key(prompt_ids: Sequence[int]) -> str:
    """Names a prompt by its tokens: 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(list(map(int, prompt_ids))).encode()).hexdigest()


class FeatureCache:
    """Features of prompts on disk.

    Args:
        folder: where the caches of all bases are.
        model: a `SmolLMDiffusionForCausalLM` whose base is frozen.
        dtype: what features are stored in; that of the model loses nothing.

    Raises:
        ValueError: something in the base is trained, so its features would not stay true.
    """

    def __init__(self, folder: Path, model: Any, dtype: torch.dtype) -> None:
        if any(p.requires_grad for name, p in model.named_parameters() if not name.startswith(HEADS)):
            raise ValueError(
                "The base or an adapter on it is trained, so its features change from step to step; leave out "
                "feature_cache."
            )
        self.model, self.dtype = model, dtype
        layers = "-".join(map(str, model.config.feature_layers))
        name = str(dtype).removeprefix("torch.")
        self.folder = folder / f"{base_digest(model)[:16]}-{layers}-{name}"
        self._shard_of: dict[str, Any] = {}
        self.build_seconds = 0.0

    def ensure(self, prompts: Iterable[Sequence[int]]) -> None:
        """Compute what is missing of these prompts; whole shards that are there are read, all others made anew.

        Files of other prompts in the folder of this base are removed, so that it holds one set of prompts. Of several
        processes one computes, and the others wait for it and read.

        Args:
            prompts: token ids without padding.

        Raises:
            OSError: not enough space is left on the disk; the message says how much is needed.
        """
        known = {prompt_key(prompt): list(prompt) for prompt in prompts}
        # Prompts of similar length share a forward of the base.
        ordered = sorted(known, key=lambda key: (len(known[key]), key))
        shards = [ordered[i : i + SHARD_PROMPTS] for i in range(0, len(ordered), SHARD_PROMPTS)]
        self.folder.mkdir(parents=True, exist_ok=True)
        paths = [
            self.folder / f"{hashlib.sha256(''.join(keys).encode()).hexdigest()[:32]}.safetensors" for keys in shards
        ]
        lock = self.folder / LOCK_FILE
        with FileLock(lock):
            for stale in set(self.folder.iterdir()) - {*paths, lock}:
                stale.unlink(missing_ok=True)
            self._check_space(known, shards, paths)
            start = time.perf_counter()
            for keys, path in zip(tqdm(shards, desc="features", unit="shard", disable=None), paths, strict=True):
                if not _whole(path, keys):
                    self._write(path, {key: known[key] for key in keys})
                handle = safe_open(path, framework="pt")
                self._shard_of.update(dict.fromkeys(keys, handle))
            self.build_seconds = time.perf_counter() - start
        held = sum(path.stat().st_size for path in paths)
        logger.info("features of %d prompts, %.1f MiB, in %s", len(known), held / 2**20, self.folder)

    def get(self, prompt_ids: Sequence[int]) -> Tensor:
        """[prompt, feature_layers * base_width] of a prompt that was `ensure`d.

        Raises:
            KeyError: it was not.
        """
        key = prompt_key(prompt_ids)
        if key not in self._shard_of:
            raise KeyError(f"The prompt of {len(prompt_ids)} tokens is not among those that were computed beforehand.")
        features: Tensor = self._shard_of[key].get_tensor(key)
        return features

    def _check_space(self, known: dict[str, list[int]], shards: list[list[str]], paths: list[Path]) -> None:
        missing = [keys for keys, path in zip(shards, paths, strict=True) if not path.exists()]
        config = self.model.config
        width = len(config.feature_layers) * config.get_text_config().hidden_size * self.dtype.itemsize
        needed = sum(len(known[key]) for keys in missing for key in keys) * width
        free = shutil.disk_usage(self.folder).free
        if needed > 0.95 * free:
            raise OSError(
                f"Features of {len(known)} prompts need {needed / 2**30:.2f} GiB more in {self.folder}, where "
                f"{free / 2**30:.2f} GiB are free: lower cached_prompts or choose another feature_cache."
            )

    @torch.no_grad()
    def _features(self, prompts: list[list[int]]) -> Iterator[Tensor]:
        """Features of each prompt, from one forward of the base."""
        device, width = self.model.device, max(map(len, prompts))
        ids = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts], device=device)
        lengths = torch.tensor([[len(prompt)] for prompt in prompts], device=device)
        mask = (torch.arange(width, device=device) < lengths).long()
        features = self.model.base_features(ids, mask)
        for row, prompt in zip(features, prompts, strict=True):
            yield row[: len(prompt)].to(self.dtype).cpu().contiguous()

    def _write(self, path: Path, prompts: dict[str, list[int]]) -> None:
        """Write one shard; the file appears when it is complete."""
        tensors: dict[str, Tensor] = {}
        keys = list(prompts)
        for start in range(0, len(keys), 16):
            part = keys[start : start + 16]
            tensors |= {
                key: states.clone()
                for key, states in zip(part, self._features([prompts[key] for key in part]), strict=True)
            }
        partial_path = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            save_file(tensors, partial_path, {"sha256": _digest(tensors, keys)})
            partial_path.replace(path)
        finally:
            partial_path.unlink(missing_ok=True)


def _whole(path: Path, keys: Sequence[str]) -> bool:
    """Whether a shard is there, holds these prompts and is what was written."""
    if not path.exists():
        return False
    try:
        with safe_open(path, framework="pt") as shard:
            held = shard.keys()
            tensors = {key: shard.get_tensor(key) for key in held}
            whole = tensors.keys() == set(keys) and (shard.metadata() or {}).get("sha256") == _digest(tensors, keys)
    except (SafetensorError, OSError):
        whole = False
    if not whole:
        logger.warning("%s is damaged and is made anew", path)
    return whole


def _digest(tensors: dict[str, Tensor], keys: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for key in keys:
        digest.update(key.encode() + _bytes(tensors[key]))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
