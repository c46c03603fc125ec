"""What `validate_setup.py` says of versions, devices, files, caches and memory, and how it ends."""

import json
import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import validate_setup
from eval.devices import Accelerator, Machine, placement
from repo_package import ROOT
from validate_setup import Finding

GOOD = {"torch": "2.13.0+cpu", "transformers": "5.23.0", **dict.fromkeys(("tokenizers", "safetensors"), "0.9")}
GOOD |= {"numpy": "2.4.6", "jinja2": "3.1.6"}
CPU = Machine("x86_64", "AVX2", 1, memory=4 * 2**30, free=2**30)
CUDA = replace(CPU, accelerators=(Accelerator("cuda", 0, "H100", 80 * 2**30, 79 * 2**30, (9, 0)),))


def missing(findings: list[Finding]) -> dict[str, str]:
    """What is missing, by topic."""
    return {one.topic: one.text for one in findings if one.status == "missing"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with the files of a model."""
    for name in validate_setup.FILES:
        (tmp_path / name).write_text("{}")
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "modeling_x.Model"}}))
    (tmp_path / "modeling_x.py").write_text("from .head_x import head\n")
    (tmp_path / "head_x.py").write_text("")
    save_file({"base.a": torch.zeros(2, 3), "diffusion_head.b": torch.zeros(4)}, tmp_path / "model.safetensors")
    return tmp_path


# --------------------------------------------------------------- versions


def test_good_versions_lack_nothing() -> None:
    found = validate_setup.needed((3, 11, 7), GOOD)
    assert not missing(found)
    assert Finding("ok", "torch", "2.13.0+cpu (2.7 or newer)") in found


def test_old_and_missing_versions_are_named_with_the_command_that_helps() -> None:
    packages = {**GOOD, "transformers": "5.9.1"}
    del packages["torch"]
    assert missing(validate_setup.needed((3, 10, 2), packages)) == {
        "python": "3.10.2 is too old: install Python 3.11 or newer",
        "torch": 'is not installed: pip install "torch>=2.7"',
        "transformers": '5.9.1 is too old: pip install --upgrade "transformers>=5.17"',
    }


def test_the_least_versions_are_those_that_the_project_declares() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = (re.fullmatch(r"([\w-]+)(?:>=([\d.]+))?", one) for one in project["dependencies"])
    assert {one.group(1): one.group(2) or "" for one in declared if one} == validate_setup.NEEDED
    assert project["requires-python"] == f">={'.'.join(map(str, validate_setup.PYTHON))}"


def test_optional_packages_say_what_they_are_for_and_how_to_get_them() -> None:
    found = {one.topic: one for one in validate_setup.optional({"peft": "0.21"})}
    assert found["peft"] == Finding("on", "peft", "0.21: draft adapters (LoRA)")
    assert found["gradio"] == Finding("off", "gradio", "the Space, app.py: pip install gradio")


# --------------------------------------------------------------- the machine


def test_devices_are_described_with_what_they_have() -> None:
    cpu, chosen = validate_setup.devices(CPU, placement(CPU))
    assert cpu.text == "x86_64, AVX2, 1 thread, 1.0 of 4.0 GiB free"
    assert chosen.text.startswith("cpu in float32: ")
    _, gpu, chosen = validate_setup.devices(CUDA, placement(CUDA))
    assert (gpu.topic, gpu.text) == ("cuda:0", "H100, compute capability 9.0, 79.0 of 80.0 GiB free")
    assert chosen.text.startswith("cuda:0 in bfloat16: ")
    unknown, _ = validate_setup.devices(replace(CPU, free=None, threads=2), placement(CPU))
    assert unknown.text == "x86_64, AVX2, 2 threads"


def test_a_model_that_does_not_fit_is_a_note() -> None:
    fits = validate_setup.memory(CPU, placement(CPU), 10_000_000)
    assert fits == Finding("ok", "memory", "10.0M weights take 38 MiB in float32; 1.0 GiB are free on cpu")
    large = validate_setup.memory(CPU, placement(CPU), 3_000_000_000)
    assert (large.status, "11.2 GiB in float32, but only 1.0 GiB" in large.text) == ("note", True)
    assert validate_setup.memory(CUDA, placement(CUDA), 3_000_000_000).text.endswith("79.0 GiB are free on cuda:0")
    assert validate_setup.memory(replace(CPU, free=None), placement(CPU), 1).status == "note"


def test_a_cache_that_cannot_be_written_to_is_missing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folders = {"HF_HUB_CACHE": tmp_path / "new" / "hub", "HF_MODULES_CACHE": tmp_path / "file" / "modules"}
    good, bad = validate_setup.caches(folders)
    assert good.status == "ok"
    assert bad.status == "missing"
    assert "HF_MODULES_CACHE" in bad.text


def test_caches_are_where_the_libraries_put_them(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("HF_HUB_CACHE", "HF_MODULES_CACHE")
    assert validate_setup.cache_folders({"HF_HOME": "/h"}) == {names[0]: Path("/h/hub"), names[1]: Path("/h/modules")}
    own = dict.fromkeys(names, "/own")
    assert set(validate_setup.cache_folders(own).values()) == {Path("/own")}
    assert validate_setup.cache_folders({})[names[0]] == Path.home() / ".cache" / "huggingface" / "hub"


# --------------------------------------------------------------- files


def test_a_whole_model_is_counted(model: Path) -> None:
    files, weights = validate_setup.model_files(model)
    assert files.text.endswith("2 modules of code")
    assert weights.text == "2 tensors of 0.0M weights, whole"
    assert validate_setup.weights_of(model, head_only=False) == {"base.a": 6, "diffusion_head.b": 4}


def test_the_shipped_model_is_whole() -> None:
    assert [one.status for one in validate_setup.model_files(ROOT)] == ["ok", "ok"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer.json", None, "lacks tokenizer.json"),
        ("config.json", b"{", "Expecting"),
        ("head_x.py", None, "head_x.py is missing"),
        ("model.safetensors", None, "model.safetensors is missing"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("model.safetensors", b"<html>not found</html>", "no safetensors file"),
        ("model.safetensors", b"", "no safetensors file"),
    ],
)
def test_a_missing_or_broken_file_is_named(name: str, content: bytes | None, says: str, model: Path) -> None:
    (model / name).unlink()
    if content is not None:
        (model / name).write_bytes(content)
    assert says in missing(validate_setup.model_files(model))["model"]


@pytest.mark.parametrize("change", [b"", b"more"])
def test_weights_of_another_length_than_their_header_says_are_not_whole(change: bytes, model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes() + change if change else path.read_bytes()[:-1])
    assert "its header says" in missing(validate_setup.model_files(model))["model"]


def test_weights_in_several_files_must_be_where_their_index_says(model: Path) -> None:
    (model / "model.safetensors").rename(model / "one.safetensors")
    save_file({"base.c": torch.zeros(5)}, model / "two.safetensors")
    places = {"base.a": "one.safetensors", "diffusion_head.b": "one.safetensors", "base.c": "two.safetensors"}
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert sum(validate_setup.weights_of(model, head_only=False).values()) == 15
    index.write_text(json.dumps({"weight_map": {**places, "base.d": "two.safetensors"}}))
    with pytest.raises(ValueError, match=r"1 tensors .* such as base\.d"):
        validate_setup.weights_of(model, head_only=False)


def test_weights_without_the_base_are_whole_only_in_a_head_only_repo(model: Path) -> None:
    save_file({"diffusion_head.b": torch.zeros(4)}, model / "model.safetensors")
    assert validate_setup.weights_of(model, head_only=True) == {"diffusion_head.b": 4}
    with pytest.raises(ValueError, match="no tensor of base"):
        validate_setup.weights_of(model, head_only=False)


# --------------------------------------------------------------- the command


def test_the_command_ends_well_here_and_says_what_to_run_next(capsys: pytest.CaptureFixture[str]) -> None:
    assert validate_setup.main([]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^ok +torch +\d", printed, re.MULTILINE)
    assert re.search(r"^(on|off) +CUDA graphs", printed, re.MULTILINE)
    assert printed.rstrip().splitlines()[-len(validate_setup.NEXT) :] == [f"  {one}" for one in validate_setup.NEXT]
    for command in validate_setup.NEXT:
        assert (ROOT / command.split()[1]).is_file()


def test_json_holds_the_same_findings(capsys: pytest.CaptureFixture[str]) -> None:
    assert validate_setup.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ready"] is True
    assert {"torch", "cpu", "chosen", "torch.compile", "model", "memory"} <= {
        one["topic"] for one in report["findings"]
    }


def test_a_python_without_torch_gets_sentences(tmp_path: Path) -> None:
    command = [sys.executable, "-I", "-S", str(ROOT / "validate_setup.py")]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (1, "")
    assert 'pip install "torch>=2.7"' in ended.stdout
    assert "Missing: torch, transformers" in ended.stdout


def test_a_torch_that_cannot_be_imported_gets_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "eval.devices", None)
    monkeypatch.delattr("eval.devices")
    assert "cannot be imported" in missing(validate_setup.look())["import"]
