"""The device that a command runs on: whether torch can use it, what it is called, and waiting for its work."""

import platform

import torch


def check_device(name: str) -> None:
    """Refuse a device that torch cannot use.

    Args:
        name: as in `--device`, such as "cpu" or "cuda:1".

    Raises:
        ValueError: there is no such device here; says what to do.
    """
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"--device {name}: torch cannot use it here ({reason}). Use --device cpu.") from error


def device_name(device: torch.device) -> str:
    """What a device is called: the product on CUDA, processor family and vector instructions of a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"cpu ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})"
    return device.type


def wait_for(device: torch.device) -> None:
    """Wait until a device has done what it was asked for; a CPU has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
