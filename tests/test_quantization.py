"""A 4- or 8-bit base works under an unquantised head, which trains, and both kinds of checkpoint load."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from repo_package import ROOT
from tiny_models import SmolLMDiffusionForCausalLM, random_ids, tiny_text_config, training_batch

pytest.importorskip("bitsandbytes", reason="needs the quantization extra")

HEAD = {"head_hidden_size": 64, "head_num_layers": 2, "head_num_heads": 2}
BITS: dict[str, dict[str, Any]] = {
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "8bit": {"load_in_8bit": True},
}


@pytest.fixture(params=BITS)
def loaded(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, BitsAndBytesConfig]:
    """A model on a quantised base, and how it was quantised."""
    text_config = tiny_text_config()
    text_config.hidden_size, text_config.intermediate_size = 64, 128
    AutoModelForCausalLM.from_config(text_config).save_pretrained(tmp_path / "base")
    quantization = BitsAndBytesConfig(**BITS[request.param])
    model = SmolLMDiffusionForCausalLM.from_base(tmp_path / "base", quantization_config=quantization, **HEAD)
    return model, quantization


NEAR_TIE = 0.5
"""In logits; rounding to 16 bits moves them by less, and where a choice is clear they are much farther apart."""


def is_quantised(module: torch.nn.Module) -> bool:
    return any(parameter.dtype in (torch.uint8, torch.int8) for parameter in module.parameters())


def test_the_base_is_quantised_and_the_head_is_not(loaded: tuple[Any, BitsAndBytesConfig]) -> None:
    model, _ = loaded
    assert is_quantised(model.base)
    assert not is_quantised(model.diffusion_head)
    assert not any(parameter.requires_grad for parameter in model.base.parameters())


def test_the_head_trains_on_it(loaded: tuple[Any, BitsAndBytesConfig]) -> None:
    model, _ = loaded
    output = model.train()(**training_batch(model.config))
    output.loss.backward()
    assert output.loss.isfinite()
    assert all(parameter.grad is None for parameter in model.base.parameters())
    assert all(parameter.grad is not None for parameter in model.diffusion_head.parameters())


def test_head_only_checkpoint_loads_on_any_precision(loaded: tuple[Any, BitsAndBytesConfig], tmp_path: Path) -> None:
    model, quantization = loaded
    model.save_pretrained(tmp_path / "head", head_only=True)
    saved = load_file(tmp_path / "head" / "model.safetensors")
    assert all(key.startswith("diffusion_head.") for key in saved)
    full = SmolLMDiffusionForCausalLM.from_pretrained(tmp_path / "head")
    again = SmolLMDiffusionForCausalLM.from_pretrained(tmp_path / "head", quantization_config=quantization)
    assert not is_quantised(full.base)
    ids = random_ids(1, 6)
    assert torch.equal(again(ids).logits, model(ids).logits)
    for other in (full, again):
        for name, tensor in other.diffusion_head.state_dict().items():
            assert torch.equal(tensor, saved[f"diffusion_head.{name}"])


def test_self_contained_checkpoint_stays_quantised(loaded: tuple[Any, BitsAndBytesConfig], tmp_path: Path) -> None:
    model, _ = loaded
    model.save_pretrained(tmp_path / "full")
    again = SmolLMDiffusionForCausalLM.from_pretrained(tmp_path / "full")
    assert is_quantised(again.base)
    ids = random_ids(1, 6)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_base_that_was_saved_quantised_is_kept(loaded: tuple[Any, BitsAndBytesConfig], tmp_path: Path) -> None:
    _, quantization = loaded
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantization)
    plain.save_pretrained(tmp_path / "quantised")
    model = SmolLMDiffusionForCausalLM.from_base(tmp_path / "quantised", **HEAD)
    assert is_quantised(model.base)
    assert not is_quantised(model.diffusion_head)
    ids = random_ids(1, 6)
    assert torch.equal(model(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", BITS)
def test_head_and_embeddings_have_the_dtype_that_is_asked_for(bits: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        ROOT, trust_remote_code=True, dtype=dtype, quantization_config=BitsAndBytesConfig(**BITS[bits])
    )
    model.save_pretrained(tmp_path / f"saved_{bits}")
    for loaded in (model, SmolLMDiffusionForCausalLM.from_pretrained(tmp_path / f"saved_{bits}")):
        assert {parameter.dtype for parameter in loaded.diffusion_head.parameters()} == {dtype}
        embeddings, output = loaded.get_input_embeddings().weight, loaded.get_output_embeddings().weight
        assert embeddings.dtype == dtype
        assert embeddings.data_ptr() == output.data_ptr()
        layers = [module for module in loaded.base.model.modules() if isinstance(module, torch.nn.Linear)]
        assert layers
        assert all(is_quantised(layer) for layer in layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", BITS)
def test_verified_writes_what_ar_writes_but_for_near_ties(bits: str, dtype: torch.dtype) -> None:
    pytest.importorskip("evaluate", reason="eval.footprint needs the evaluation extra")
    from eval.footprint import logit_gap

    parameters = {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city", "days"],
    }
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": parameters}}]
    model = AutoModelForCausalLM.from_pretrained(
        ROOT, trust_remote_code=True, dtype=dtype, quantization_config=BitsAndBytesConfig(**BITS[bits])
    )
    tokenizer = AutoTokenizer.from_pretrained(ROOT, trust_remote_code=False)
    for text in ("Will it rain in Berlin in the next 3 days?", "weather, Santa Cruz, a week"):
        messages = [{"role": "user", "content": text}]
        replies = [
            model.respond(messages, tools=tools, tokenizer=tokenizer, tool_choice="required", decoding=decoding)
            for decoding in ("verified", "ar")
        ]
        for reply in replies:
            arguments = reply.message["tool_calls"][0]["function"]["arguments"]
            assert isinstance(arguments["city"], str)
            assert isinstance(arguments["days"], int)
        prompt = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=False)
        gap = logit_gap(model, prompt, *(reply.token_ids for reply in replies))
        assert gap is None or gap < NEAR_TIE


def test_the_code_of_the_documentation_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {}
    text = (ROOT / "docs" / "smaller.md").read_text(encoding="utf-8")
    for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        exec(block, names)
    assert float(capsys.readouterr().out.removesuffix(" MiB\n")) < 14
    assert names["model"].compiled_decoding is not None
