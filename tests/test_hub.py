"""Loading over the Hub's protocol, from a stand-in on the loopback interface: the repository itself, and a base."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from loopback_hub import commit_of, loopback_hub
from repo_package import ROOT
from tiny_models import tiny_text_config

REPO, BASE = "org/smollm-diffusion", "HuggingFaceTB/SmolLM3-3B"

LOAD = """
import sys, json, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
repo, base, commit, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(repo, trust_remote_code=False)
model = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True, revision="main", code_revision="main")
tool = {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
reply = model.respond([{"role": "user", "content": "weather in Lisbon"}], tools=[tool], tokenizer=tokenizer,
                      tool_choice="required", max_tool_calls=1)
other = type(model).from_base(base, revision=commit, head_hidden_size=32, head_num_layers=1, head_num_heads=2)
other.save_pretrained(out, head_only=True)
again = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
same = all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), again.state_dict().values(), strict=True))
print(json.dumps({"name": reply.message["tool_calls"][0]["function"]["name"], "same": same,
                  "revision": again.config.base_revision}))
"""


def run(endpoint: str, home: Path, offline: bool) -> dict[str, object]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HUB_OFFLINE": "1"} if offline else {}
    command = [sys.executable, "-c", LOAD, REPO, BASE, commit_of(BASE), str(home / f"head-{offline}")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, env=environment, cwd=home)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_model_and_base_load_from_a_hub_and_again_from_its_cache(tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_config(tiny_text_config())
    torch.nn.init.normal_(base.get_input_embeddings().weight)
    base.save_pretrained(tmp_path / "base")
    home = tmp_path / "home"
    home.mkdir()
    expected = {"name": "get_weather", "same": True, "revision": commit_of(BASE)}
    with loopback_hub({REPO: ROOT, BASE: tmp_path / "base"}) as (endpoint, requests):
        assert run(endpoint, home, offline=False) == expected
        assert f"{REPO}/resolve/main/model.safetensors" in {path.replace(commit_of(REPO), "main") for path in requests}
        assert not [path for path in requests if path.endswith((".bin", ".pkl", ".pt"))]
    assert run(endpoint, home, offline=True) == expected
