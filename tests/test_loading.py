"""Loading works from copies, in fresh processes, from plain bases and head-only checkpoints; it freezes the base."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, LlamaModel

from repo_package import ROOT
from tiny_models import BASES, SmolLMDiffusionConfig, SmolLMDiffusionForCausalLM, random_ids, tiny_model, training_batch

HEAD = {"head_hidden_size": 32, "head_num_layers": 2, "head_num_heads": 2}


def base_is_frozen(model: Any) -> bool:
    return not any(parameter.requires_grad for parameter in model.base.parameters()) and all(
        parameter.requires_grad for parameter in model.diffusion_head.parameters()
    )


def same_weights(first: Any, second: Any) -> bool:
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.fixture
def base_folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A plain base on disk, of the architecture that the test names (SmolLM3 if it names none)."""
    folder = tmp_path / "base"
    tiny_model(getattr(request, "param", "smollm3")).base.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("base", BASES)
def test_saved_equals_loaded(base: str, tmp_path: Path) -> None:
    model = tiny_model(base)
    model.save_pretrained(tmp_path)
    loaded = SmolLMDiffusionForCausalLM.from_pretrained(tmp_path)
    assert same_weights(model, loaded)
    assert base_is_frozen(loaded)
    assert not loaded.training
    ids, batch = random_ids(1, 6), training_batch(model.config)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    losses = [each(**batch, noise_generator=torch.Generator().manual_seed(0)).loss for each in (model, loaded)]
    assert torch.equal(*losses)


def test_tied_weights_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    tiny_model("smollm3").save_pretrained(tmp_path)
    assert not {"base.lm_head.weight"} & load_file(tmp_path / "model.safetensors").keys()
    loaded = SmolLMDiffusionForCausalLM.from_pretrained(tmp_path)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_from_config_freezes_the_base() -> None:
    assert base_is_frozen(SmolLMDiffusionForCausalLM._from_config(tiny_model().config))


@pytest.mark.parametrize("base_folder", BASES, indirect=True)
def test_any_causal_language_model_can_be_the_base(base_folder: Path) -> None:
    model = SmolLMDiffusionForCausalLM.from_base(base_folder, **HEAD, string_budget=9)
    plain = AutoModelForCausalLM.from_pretrained(base_folder)
    ids = random_ids(2, 7)
    assert torch.equal(model(ids).logits, plain(ids).logits)
    assert base_is_frozen(model)
    assert model.config.string_budget == 9
    assert model.config.base_model_name_or_path == str(base_folder)
    assert model.generation_config.eos_token_id == plain.generation_config.eos_token_id
    assert all(parameter.isfinite().all() for parameter in model.diffusion_head.parameters())


def test_a_fresh_head_is_initialised_like_a_built_one(base_folder: Path) -> None:
    fresh = SmolLMDiffusionForCausalLM.from_base(base_folder, **HEAD, initializer_range=0.1).diffusion_head
    built = tiny_model().diffusion_head
    for (name, one), two in zip(fresh.named_parameters(), built.parameters(), strict=True):
        assert torch.allclose(one.mean(), two.mean(), atol=0.05), name
        assert one.numel() == 1 or torch.allclose(one.std(), two.std(), atol=0.05), name


def test_the_dtype_of_the_base_can_be_chosen(base_folder: Path) -> None:
    model = SmolLMDiffusionForCausalLM.from_base(base_folder, dtype=torch.bfloat16, **HEAD)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(**training_batch(model.config)).loss.isfinite()


@pytest.mark.parametrize("base", ["smollm3", "gpt2"])
def test_a_checkpoint_of_the_body_alone_is_enough_when_the_output_layer_is_tied(base: str, tmp_path: Path) -> None:
    body = AutoModel.from_config(tiny_model(base).config.text_config)
    body.save_pretrained(tmp_path)
    model = SmolLMDiffusionForCausalLM.from_base(tmp_path, **HEAD)
    ids = random_ids(1, 6)
    assert torch.equal(model(ids).logits, AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits)
    assert base_is_frozen(model)


def test_a_base_without_its_output_layer_is_refused(tmp_path: Path) -> None:
    LlamaModel(tiny_model("llama").config.text_config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not hold the base"):
        SmolLMDiffusionForCausalLM.from_base(tmp_path, **HEAD)


# ---------------------------------------------------------------------- head-only checkpoints


@pytest.mark.parametrize("base_folder", BASES, indirect=True)
def test_head_only_checkpoint_holds_the_head_and_loads_the_base(base_folder: Path, tmp_path: Path) -> None:
    model = SmolLMDiffusionForCausalLM.from_base(base_folder, **HEAD)
    head = tmp_path / "head"
    model.generation_config.max_new_tokens = 77
    model.save_pretrained(head, head_only=True)
    assert all(key.startswith("diffusion_head.") for key in load_file(head / "model.safetensors"))
    saved = json.loads((head / "config.json").read_text())
    assert (saved["base_model_name_or_path"], saved["head_only_checkpoint"]) == (str(base_folder), True)
    loaded, info = SmolLMDiffusionForCausalLM.from_pretrained(head, output_loading_info=True)
    assert same_weights(model, loaded)
    assert base_is_frozen(loaded)
    assert not info["missing_keys"]
    assert loaded.generation_config.max_new_tokens == 77
    assert loaded.config.name_or_path == str(head)


def test_a_head_only_model_saves_self_contained_and_head_only_again(base_folder: Path, tmp_path: Path) -> None:
    model = SmolLMDiffusionForCausalLM.from_base(base_folder, **HEAD)
    model.save_pretrained(tmp_path / "head", head_only=True)
    loaded = SmolLMDiffusionForCausalLM.from_pretrained(tmp_path / "head")
    loaded.save_pretrained(tmp_path / "full")
    loaded.save_pretrained(tmp_path / "again", head_only=True)
    shutil.move(base_folder, tmp_path / "elsewhere")
    full = SmolLMDiffusionForCausalLM.from_pretrained(tmp_path / "full")
    again = SmolLMDiffusionForCausalLM.from_pretrained(
        tmp_path / "again", base_model_name_or_path=str(tmp_path / "elsewhere"), dtype=torch.float32
    )
    assert same_weights(model, full)
    assert same_weights(model, again)


def test_a_whole_checkpoint_names_no_folder_of_this_machine(base_folder: Path, tmp_path: Path) -> None:
    model = SmolLMDiffusionForCausalLM.from_base(base_folder, **HEAD)
    model.save_pretrained(tmp_path / "full")
    assert str(base_folder) not in (tmp_path / "full" / "config.json").read_text()
    assert model.config.base_model_name_or_path == str(base_folder)
    assert model.config.text_config.name_or_path == str(base_folder)
    model.config.base_model_name_or_path = "somebody/base"
    model.save_pretrained(tmp_path / "named")
    assert json.loads((tmp_path / "named" / "config.json").read_text())["base_model_name_or_path"] == "somebody/base"


def test_a_head_only_checkpoint_whose_base_is_gone_says_which(base_folder: Path, tmp_path: Path) -> None:
    SmolLMDiffusionForCausalLM.from_base(base_folder, **HEAD).save_pretrained(tmp_path / "head", head_only=True)
    shutil.rmtree(base_folder)
    with pytest.raises(OSError, match=str(base_folder)):
        SmolLMDiffusionForCausalLM.from_pretrained(tmp_path / "head")


@pytest.mark.parametrize("fault", ["missing", "unexpected"])
def test_head_only_keys_are_strict(fault: str, base_folder: Path, tmp_path: Path) -> None:
    head = tmp_path / "head"
    SmolLMDiffusionForCausalLM.from_base(base_folder, **HEAD).save_pretrained(head, head_only=True)
    weights = load_file(head / "model.safetensors")
    if fault == "missing":
        del weights["diffusion_head.input_proj.weight"]
    else:
        weights["diffusion_head.other.weight"] = torch.zeros(1)
    save_file(weights, head / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{fault} .*diffusion_head"):
        SmolLMDiffusionForCausalLM.from_pretrained(head)


def test_head_only_saving_needs_a_base_to_point_at(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="base_model_name_or_path"):
        tiny_model().save_pretrained(tmp_path, head_only=True)


def test_revision_of_the_base_is_recorded(base_folder: Path, tmp_path: Path) -> None:
    model = SmolLMDiffusionForCausalLM.from_base(base_folder, revision="main", **HEAD)
    model.save_pretrained(tmp_path / "head", head_only=True)
    assert SmolLMDiffusionConfig.from_pretrained(tmp_path / "head").base_revision == "main"
    assert same_weights(model, SmolLMDiffusionForCausalLM.from_pretrained(tmp_path / "head"))


# ---------------------------------------------------------------------- remote code, in fresh processes

IN_A_FRESH_PROCESS = """
import sys, torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
copied, head, out = sys.argv[1:4]
ids = torch.arange(3, 10)[None]
causal = AutoModelForCausalLM.from_pretrained(copied, trust_remote_code=True)
auto = AutoModel.from_pretrained(copied, trust_remote_code=True)
assert type(causal).__name__ == type(auto).__name__ == "SmolLMDiffusionForCausalLM"
assert AutoConfig.from_pretrained(copied, trust_remote_code=True).architectures == ["AutoModelForCausalLM"]
built = AutoModelForCausalLM.from_config(causal.config, trust_remote_code=True)
from_head = AutoModelForCausalLM.from_pretrained(head, trust_remote_code=True)
for model in (causal, auto, built, from_head):
    assert not any(parameter.requires_grad for parameter in model.base.parameters())
    assert all(parameter.requires_grad for parameter in model.diffusion_head.parameters())
assert torch.equal(causal(ids).logits, auto(ids).logits)
assert torch.equal(causal(ids).logits, causal.base(ids).logits)
causal.save_pretrained(out)
again = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
torch.save({"logits": again(ids).logits, "state": again.state_dict()}, out + "/result.pt")
"""


def test_remote_code_loads_from_a_copied_folder_and_after_saving_elsewhere(base_folder: Path, tmp_path: Path) -> None:
    model = SmolLMDiffusionForCausalLM.from_base(base_folder, **HEAD)
    model.save_pretrained(tmp_path / "saved")
    model.save_pretrained(tmp_path / "head-only", head_only=True)
    copied = shutil.copytree(tmp_path / "saved", tmp_path / "A copy, under another-name")
    (tmp_path / "workdir").mkdir()
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    folders = [str(copied), str(tmp_path / "head-only"), str(tmp_path / "out")]
    command = [sys.executable, "-c", IN_A_FRESH_PROCESS, *folders]
    result = subprocess.run(command, cwd=tmp_path / "workdir", env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    found = torch.load(tmp_path / "out" / "result.pt")
    assert torch.equal(found["logits"], model(torch.arange(3, 10)[None]).logits)
    assert found["state"].keys() == model.state_dict().keys()


def test_saving_into_the_folder_of_the_code_keeps_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modeling = sys.modules[SmolLMDiffusionForCausalLM.__module__]
    monkeypatch.setattr(modeling, "__file__", str(tmp_path / "modeling_smollm_diffusion.py"))
    tiny_model().save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))  # nothing was copied
    assert (tmp_path / "model.safetensors").exists()
    assert SmolLMDiffusionForCausalLM._auto_class == "AutoModelForCausalLM"


def test_saved_folder_holds_all_code_that_the_model_needs(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    for path in tmp_path.glob("*.py"):
        assert path.read_text() == (ROOT / path.name).read_text()
    assert {"modeling_smollm_diffusion.py", "configuration_smollm_diffusion.py", "diffusion_head.py"} <= {
        path.name for path in tmp_path.glob("*.py")
    }


def test_a_plain_base_is_pointed_to_from_base(base_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"'smollm3'.*from_base"):
        SmolLMDiffusionForCausalLM.from_pretrained(base_folder)
