"""A release over the Hub's protocol: what is uploaded, what never is, and that the result loads."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from loopback_hub import loopback_hub
from repo_package import ROOT
from tiny_models import tiny_model
from training.release import check_complete, release

REPO = "org/trained"

RELEASE = """
import sys
from pathlib import Path
from training.release import release
print(release(Path(sys.argv[1]), sys.argv[2]))
"""

LOAD = """
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[2], trust_remote_code=True)
print(sum(float(p.detach().sum()) for p in model.diffusion_head.parameters()))
"""


def in_hub(code: str, endpoint: str, home: Path, *arguments: str) -> str:
    """Run code in a fresh process that knows one Hub, and return the last line it prints."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "dummy"}
    environment |= {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, env=environment, cwd=home)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A folder like `output/final`, with what must not be uploaded beside it."""
    folder = tmp_path / "out" / "final"
    tiny_model().save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT, trust_remote_code=False).save_pretrained(folder)
    for name in ("checkpoint-2", "adapter"):
        (folder / name).mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    for name in ("checkpoint-2/optimizer.pt", "checkpoint-2/complete.json", "optimizer.pt", "old.bin", "old.pkl"):
        (folder / name).write_bytes(b"state")
    return folder


def test_a_release_loads_back_and_leaves_the_card_alone(tmp_path: Path, trained: Path) -> None:
    (tmp_path / "home").mkdir()
    with loopback_hub({}, tmp_path / "hub") as (endpoint, requests):
        address = in_hub(RELEASE, endpoint, tmp_path / "home", str(trained), REPO)
        assert address.startswith(f"{endpoint}/{REPO}/commit/")
        repo = tmp_path / "hub" / REPO
        uploaded = {str(path.relative_to(repo)) for path in repo.rglob("*") if path.is_file()}
        wanted = (".py", ".json", ".jinja", ".safetensors")
        kept = {str(path.relative_to(trained)) for path in trained.rglob("*") if path.suffix in wanted}
        assert uploaded == kept - {"checkpoint-2/complete.json"}
        assert {
            "config.json",
            "model.safetensors",
            "modeling_smollm_diffusion.py",
            "tokenizer.json",
            "adapter/adapter_config.json",
        } <= uploaded
        assert (repo / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()
        assert any(request.startswith("PUT lfs/") for request in requests)  # the weights are an LFS object

        card = b"---\nlicense: apache-2.0\n---\n# Written by hand\r\n"
        (repo / "README.md").write_bytes(card)
        (trained / "README.md").write_text("# Generated\n")
        tiny_model().save_pretrained(trained)
        loaded = float(in_hub(RELEASE + LOAD, endpoint, tmp_path / "home", str(trained), REPO))
        assert (repo / "README.md").read_bytes() == card
        assert (repo / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()

        head = type(tiny_model()).from_pretrained(trained).diffusion_head
        weights = sum(float(p.detach().sum()) for p in head.parameters())
        assert loaded == pytest.approx(weights, abs=1e-3)
        served = {request.rpartition("/")[2] for request in requests if "/resolve/" in request}
        assert {"modeling_smollm_diffusion.py", "model.safetensors"} <= served


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="nothing to release"):
        release(tmp_path, REPO)


def test_a_folder_without_its_code_is_refused(tmp_path: Path, trained: Path) -> None:
    check_complete(trained)
    (trained / "modeling_smollm_diffusion.py").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks modeling_smollm_diffusion\.py"):
        release(trained, REPO)


def test_a_head_on_a_base_of_this_machine_is_refused(tmp_path: Path, trained: Path) -> None:
    config = json.loads((trained / "config.json").read_text())
    config |= {"head_only_checkpoint": True, "base_model_name_or_path": "HuggingFaceTB/SmolLM3-3B"}
    (trained / "config.json").write_text(json.dumps(config))
    check_complete(trained)
    shutil.copytree(trained, tmp_path / "local")
    config["base_model_name_or_path"] = str(tmp_path)
    (tmp_path / "local" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is a folder of this machine"):
        release(tmp_path / "local", REPO)
