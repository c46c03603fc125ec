"""Devices: what is chosen and on for any machine, refusals by name, and waiting for the device that is meant."""

from dataclasses import replace

import pytest
import torch

from eval import devices
from eval.devices import Accelerator, Machine

COMPLETE = {"bitsandbytes": "0.50", "accelerate": "1.15", "triton": "3.7", "flash-attn": "2.8"}
CPU = Machine("x86_64", "AVX2", 8, memory=16, free=8, packages=COMPLETE, compiler="/usr/bin/g++")
CUDA = replace(CPU, accelerators=(Accelerator("cuda", 0, "H100", 80, 79, (9, 0)), Accelerator("cuda", 1, "H100")))
OLD_CUDA = replace(CPU, accelerators=(Accelerator("cuda", 0, "T4", 16, 15, (7, 5)),))
MPS = replace(CPU, processor="arm64", accelerators=(Accelerator("mps", 0, "Apple GPU"),))
MACHINES = {"cpu": CPU, "cuda": CUDA, "old cuda": OLD_CUDA, "mps": MPS}


def state(machine: Machine) -> dict[str, bool]:
    """What is on."""
    return {feature.name: feature.on for feature in devices.features(machine)}


def reason(machine: Machine, name: str) -> str:
    return next(feature.reason for feature in devices.features(machine) if feature.name == name)


@pytest.mark.parametrize(
    ("name", "device", "dtype"),
    [
        ("cpu", "cpu", "float32"),
        ("cuda", "cuda:0", "bfloat16"),
        ("old cuda", "cuda:0", "float32"),
        ("mps", "mps", "float32"),
    ],
)
def test_a_gpu_is_chosen_where_there_is_one_and_16_bits_where_it_has_them(name: str, device: str, dtype: str) -> None:
    chosen = devices.placement(MACHINES[name])
    assert (chosen.device, chosen.dtype) == (device, dtype)
    assert chosen.kind == device.partition(":")[0]
    assert isinstance(getattr(torch, chosen.dtype), torch.dtype)


@pytest.mark.parametrize(
    ("name", "on"),
    [
        ("cpu", {"4- and 8-bit base", "torch.compile", "float64"}),
        ("cuda", {"4- and 8-bit base", "torch.compile", "CUDA graphs", "FlashAttention", "float64"}),
        ("old cuda", {"4- and 8-bit base", "torch.compile", "CUDA graphs", "float64"}),
        ("mps", set()),
    ],
)
def test_what_a_device_cannot_do_is_off_with_a_reason(name: str, on: set[str]) -> None:
    found = state(MACHINES[name])
    assert {feature for feature, is_on in found.items() if is_on} == on
    assert all(feature.reason for feature in devices.features(MACHINES[name]))


def test_what_is_missing_is_named_with_the_way_to_get_it() -> None:
    bare = replace(CUDA, packages={}, compiler=None)
    assert state(bare) == {**dict.fromkeys(state(CUDA), False), "float64": True}
    assert reason(bare, "4- and 8-bit base") == "pip install bitsandbytes accelerate"
    assert "install g++" in reason(bare, "torch.compile")
    assert "install g++" in reason(bare, "CUDA graphs")
    assert "pip install flash-attn" in reason(bare, "FlashAttention")
    assert "Python.h" in reason(replace(CPU, python_headers=False), "torch.compile")
    assert "pip install triton" in reason(replace(CUDA, packages={}), "torch.compile")
    assert state(replace(CPU, packages={}))["torch.compile"]  # triton is for GPUs


def test_what_is_on_is_what_the_model_really_compiles_on() -> None:
    compiling = devices.compiling
    assert compiling.default_mode("cuda") == "reduce-overhead"
    assert compiling.default_mode("cuda", "eager") is None
    assert compiling.default_mode("cpu") is None
    for machine in MACHINES.values():
        assert state(machine)["torch.compile"] == (devices.placement(machine).kind in compiling.COMPILED_DEVICES)


def test_this_machine_is_described_as_it_is() -> None:
    machine = devices.this_machine()
    assert machine.threads == torch.get_num_threads()
    assert machine.packages["torch"] == torch.__version__
    assert [gpu.kind for gpu in machine.accelerators].count("cuda") == torch.cuda.device_count()
    if machine.memory is not None and machine.free is not None:
        assert 0 < machine.free < machine.memory
    devices.check_device(devices.placement(machine).device)


def test_all_gpus_that_torch_knows_are_described(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "mem_get_info": lambda index: (10 + index, 20 + index),
        "get_device_name": lambda index: f"card {index}",
        "get_device_capability": lambda index: (9, index),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 30)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 10)
    first, second, apple = devices.this_machine().accelerators
    assert first == Accelerator("cuda", 0, "card 0", 20, 10, (9, 0))
    assert (second.device, second.free) == ("cuda:1", 11)
    assert (apple.device, apple.memory, apple.free) == ("mps", 30, 20)


@pytest.mark.parametrize("name", ["cpu", "meta"])
def test_a_device_that_torch_can_use_is_let_pass(name: str) -> None:
    devices.check_device(name)


@pytest.mark.parametrize("name", ["abacus", "cpu:x", f"cuda:{torch.cuda.device_count() + 7}"])
def test_a_device_that_torch_cannot_use_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^--device {name}: .*\. Use --device cpu\.$"):
        devices.check_device(name)


def test_a_cpu_is_called_by_its_family_and_instructions() -> None:
    name = devices.device_name(torch.device("cpu"))
    assert name.startswith("cpu (")
    assert torch.backends.cpu.get_cpu_capability() in name


def test_only_an_accelerator_is_waited_for_and_it_is_the_one_that_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    devices.wait_for(torch.device("cpu"))
    devices.wait_for(torch.device("cuda:1"))
    assert waited == [torch.device("cuda:1")]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
    assert devices.device_name(torch.device("cuda:1")) == "card 1"
    assert devices.device_name(torch.device("mps")) == "mps"
