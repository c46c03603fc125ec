"""Devices: those that torch cannot use are refused by name, and waiting reaches the device that is meant."""

import pytest
import torch

from eval import devices


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
