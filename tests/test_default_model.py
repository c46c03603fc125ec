"""The model that the repository ships: loads every way a user loads it, calls, talks, and is what the README says."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

from repo_package import ROOT

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a place",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Name of the city"},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
                "days": {"type": "integer"},
            },
            "required": ["city"],
        },
    },
}
REQUEST = [{"role": "user", "content": "What is the weather in Lisbon?"}]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(ROOT, trust_remote_code=False)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(ROOT, trust_remote_code=True, dtype=torch.float32).eval()


def test_every_auto_class_loads_the_repository(model: Any) -> None:
    config = AutoConfig.from_pretrained(ROOT, trust_remote_code=True)
    other = AutoModel.from_pretrained(ROOT, trust_remote_code=True)
    assert config.model_type == "smollm_diffusion"
    assert config.text_config.model_type == "smollm3"
    assert type(other).__name__ == type(model).__name__ == "SmolLMDiffusionForCausalLM"


def test_the_checkpoint_is_small_and_safe() -> None:
    assert (ROOT / "model.safetensors").stat().st_size <= 40e6
    assert not [path for pattern in ("*.bin", "*.pt", "*.pth", "*.pkl") for path in ROOT.glob(pattern)]


CHILD = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, tools, messages = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
reply = model.respond(messages, tools=tools, tokenizer=tokenizer, tool_choice="required", max_tool_calls=1)
print(json.dumps({"ids": reply.token_ids, "trained": sum(p.requires_grad for p in model.base.parameters())}))
"""


def test_a_copy_and_a_saved_model_answer_the_same_in_a_fresh_process(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    copied, saved = tmp_path / "a-copy", tmp_path / "saved"
    copied.mkdir()
    for path in ROOT.iterdir():
        if path.suffix in (".py", ".json", ".jinja", ".safetensors"):
            shutil.copy(path, copied)
    model.save_pretrained(saved)
    tokenizer.save_pretrained(saved)
    here = model.respond(REQUEST, tools=[WEATHER], tokenizer=tokenizer, tool_choice="required", max_tool_calls=1)
    for folder in (copied, saved):
        command = [sys.executable, "-c", CHILD, str(folder), json.dumps([WEATHER]), json.dumps(REQUEST)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        there = json.loads(done.stdout.splitlines()[-1])
        assert there == {"ids": here.token_ids, "trained": 0}


def test_verified_equals_ar_and_calls_validate(model: Any, tokenizer: Any) -> None:
    texts = ["weather in Oslo for 3 days", "How warm is it in New York in celsius?", 'say "hi" to São Paulo\n', ""]
    for text in texts:
        messages = [{"role": "user", "content": text}]
        replies = [
            model.respond(messages, tools=[WEATHER], tokenizer=tokenizer, tool_choice="required", decoding=decoding)
            for decoding in ("ar", "verified", "diffusion")
        ]
        assert replies[0].token_ids == replies[1].token_ids
        for reply in replies:
            for call in reply.message["tool_calls"]:
                jsonschema.validate(call["function"]["arguments"], WEATHER["function"]["parameters"])  # type: ignore[index]


def test_generate_and_parse_response_give_the_call(model: Any, tokenizer: Any) -> None:
    inputs = tokenizer.apply_chat_template(
        REQUEST, tools=[WEATHER], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    ids = model.generate(**inputs, tools=[WEATHER], tokenizer=tokenizer, tool_choice="required")
    prompt_length = inputs["input_ids"].shape[1]
    prompt, reply = (tokenizer.decode(part) for part in (ids[0, :prompt_length], ids[0, prompt_length:]))
    message = tokenizer.parse_response(reply, prefix=prompt)
    expected = model.respond(REQUEST, tools=[WEATHER], tokenizer=tokenizer, tool_choice="required").message
    assert message["tool_calls"] == expected["tool_calls"]


def test_the_pipeline_calls_a_tool(model: Any) -> None:
    pipe = pipeline("text-generation", model=str(ROOT), trust_remote_code=True, dtype=torch.float32)
    answer = pipe(REQUEST, tools=[WEATHER], tool_choice="required")
    message = answer[0]["generated_text"][-1]
    assert message["role"] == "assistant"
    assert message["tool_calls"][0]["function"]["name"] == "get_weather"


def test_without_tools_it_is_its_base_bit_for_bit(model: Any, tokenizer: Any) -> None:
    inputs = tokenizer.apply_chat_template(REQUEST, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, model.base(**inputs).logits)
    ours = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    theirs = model.base.generate(**inputs, max_new_tokens=20, do_sample=False)
    assert torch.equal(ours, theirs)
