"""Features of the base on disk: what is read is what the base gives, whatever happened to the files."""

import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny_models import random_ids, tiny_model
from tiny_tokenizer import tiny_vocabulary
from training import features
from training.data import SingleCall
from training.features import FeatureCache, base_digest
from training.head import HeadCollator, HeadExample, HeadRun, head_example

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}


@pytest.fixture
def model() -> Any:
    return tiny_model(loss_weighting="none")


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    torch.manual_seed(seed)
    return [random_ids(5 + index % 7).tolist() for index in range(count)]


def filled(folder: Path, model: Any, wanted: list[list[int]]) -> FeatureCache:
    cache = FeatureCache(folder, model, torch.float32)
    cache.ensure(wanted)
    return cache


def shards(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def base_runs(model: Any) -> list[int]:
    """Grows by one with each forward of the base."""
    runs: list[int] = []
    model.base.register_forward_hook(lambda *_: runs.append(1))
    return runs


def test_cached_features_are_those_of_the_base(tmp_path: Path, model: Any) -> None:
    wanted = prompts(20)
    cache = filled(tmp_path, model, wanted)
    for prompt in wanted:
        ids = torch.tensor([prompt])
        assert torch.allclose(cache.get(prompt), model.base_features(ids, torch.ones_like(ids))[0], atol=1e-5)


def test_a_second_run_reads_instead_of_running_the_base(tmp_path: Path, model: Any) -> None:
    first = filled(tmp_path, model, prompts(70))
    runs = base_runs(model)
    second = filled(tmp_path, model, prompts(70)[::-1])
    assert runs == []
    for prompt in prompts(70):
        assert torch.equal(first.get(prompt), second.get(prompt))
    assert len(shards(tmp_path)) == 2


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 0x40
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [cut, flip, empty, remove])
def test_damaged_shards_are_made_anew_and_whole_ones_kept(tmp_path: Path, model: Any, damage: Any) -> None:
    wanted = prompts(70)
    whole = filled(tmp_path, model, wanted)
    expected = [whole.get(prompt).clone() for prompt in wanted]
    damaged, kept = shards(tmp_path)
    written = kept.stat().st_mtime_ns
    damage(damaged)
    again = filled(tmp_path, model, wanted)
    assert all(torch.equal(again.get(prompt), one) for prompt, one in zip(wanted, expected, strict=True))
    assert kept.stat().st_mtime_ns == written


def test_what_an_interrupted_write_left_is_removed(tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(tensors: dict[str, Tensor], path: Path, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(features, "save_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            filled(tmp_path, model, prompts(3))
    cache = filled(tmp_path, model, prompts(3))
    kept = {path.name for path in cache.folder.iterdir()} - {features.LOCK_FILE}
    assert [Path(name).suffix for name in kept] == [".safetensors"]


def test_processes_that_make_the_same_features_wait_for_each_other(
    tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one starts when the first has half of a file; alone it would take that for a leftover."""
    usual, others = features.save_file, []

    def writing(tensors: dict[str, Tensor], path: Path, metadata: Any) -> None:
        usual(tensors, path, metadata)
        others.append(threads.submit(filled, tmp_path, model, prompts(3)))
        time.sleep(0.5)

    monkeypatch.setattr(features, "save_file", writing)
    with ThreadPoolExecutor(1) as threads:
        first = filled(tmp_path, model, prompts(3))
        (second,) = [other.result(timeout=30) for other in others]
    assert all(torch.equal(first.get(prompt), second.get(prompt)) for prompt in prompts(3))


def test_another_base_has_features_of_its_own(tmp_path: Path, model: Any) -> None:
    filled(tmp_path, model, prompts(3))
    before = base_digest(model)
    with torch.no_grad():
        next(model.base.parameters()).view(-1)[0] += 1
    assert base_digest(model) != before
    filled(tmp_path, model, prompts(3))
    assert len(list(tmp_path.iterdir())) == 2


def test_a_changed_head_reads_the_same_features(tmp_path: Path, model: Any) -> None:
    before = base_digest(model)
    with torch.no_grad():
        next(model.diffusion_head.parameters()).view(-1)[0] += 1
    assert base_digest(model) == before


def test_the_folder_holds_the_last_set_of_prompts_only(tmp_path: Path, model: Any) -> None:
    filled(tmp_path, model, prompts(70))
    cache = filled(tmp_path, model, prompts(3, seed=1))
    assert len(shards(tmp_path)) == 1
    with pytest.raises(KeyError, match="not among"):
        cache.get(prompts(70)[0])


def test_features_can_be_kept_at_half_the_size(tmp_path: Path, model: Any) -> None:
    wanted = prompts(3)
    exact = filled(tmp_path, model, wanted)
    cache = FeatureCache(tmp_path, model, torch.bfloat16)
    cache.ensure(wanted)
    assert cache.get(wanted[0]).dtype == torch.bfloat16
    assert torch.equal(cache.get(wanted[0]), exact.get(wanted[0]).bfloat16())


def test_a_trained_base_is_refused(tmp_path: Path, model: Any) -> None:
    next(model.base.parameters()).requires_grad_(True)
    with pytest.raises(ValueError, match="trained"):
        FeatureCache(tmp_path, model, torch.float32)


def test_too_small_a_disk_is_named_before_anything_is_written(
    tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        free = 10

    monkeypatch.setattr(features.shutil, "disk_usage", lambda _: Full)
    with pytest.raises(OSError, match="cached_prompts"):
        filled(tmp_path, model, prompts(3))
    assert not shards(tmp_path)


def wide_model() -> Any:
    """A random model with as many tokens as the examples' vocabulary."""
    model = tiny_model(loss_weighting="none")
    model.resize_token_embeddings(tiny_vocabulary().size)
    return model.train()


def examples(config: Any, count: int) -> Iterator[HeadExample]:
    for seed, prompt in enumerate(prompts(count)):
        call = SingleCall(prompt, SCHEMA, "f", {"city": "Rome"})
        made = head_example(call, tiny_vocabulary(), config, random.Random(seed), HeadRun(Path()))
        assert made is not None
        yield made


@pytest.mark.parametrize("rows", [1, 5])
def test_a_step_with_cached_features_is_the_step_without(tmp_path: Path, rows: int) -> None:
    """Bit for bit in float32, since the shard was computed as the batch that the step computes."""
    model = wide_model()
    made = list(examples(model.config, rows))
    cache = filled(tmp_path, model, [example.prompt_ids.tolist() for example in made])
    made.sort(key=lambda example: (len(example.prompt_ids), features.prompt_key(example.prompt_ids.tolist())))
    results = []
    for held in (None, cache):
        model.zero_grad()
        output = model(**HeadCollator(model.config, 0, noise_samples=2, features=held)(made))
        output.loss.backward()
        results.append((output.loss, [p.grad.clone() for p in model.diffusion_head.parameters() if p.grad is not None]))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(first, second) for first, second in zip(results[0][1], results[1][1], strict=True))


def test_a_step_with_cached_features_runs_no_base(tmp_path: Path) -> None:
    model = wide_model()
    made = list(examples(model.config, 3))
    cache = filled(tmp_path, model, [example.prompt_ids.tolist() for example in made])
    runs = base_runs(model)
    model(**HeadCollator(model.config, 0, noise_samples=2, features=cache)(made)).loss.backward()
    assert runs == []
