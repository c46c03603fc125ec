"""The device that a command runs on: what this machine has, what is used of it and why, and waiting for its work.

`this_machine` describes the machine as data. `placement` says where a model runs and in which dtype, `features` what is
on and off there; both read nothing but the description, so machines that are not at hand can be asked about as well.
"""

import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch

from repo_package import load_repo_module

compiling = load_repo_module("compiled_decoding")
grammar = load_repo_module("slot_grammar")

FLASH_CAPABILITY = (8, 0)
"""CUDA devices from this compute capability on have bfloat16 and FlashAttention kernels."""
QUANTISED_DEVICES = ("cpu", "cuda")
"""Kinds of device that a quantised base is used on; on others bitsandbytes downloads its kernels."""


# ---------------------------------------------------------------------------------------------------------------------
# What there is
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Accelerator:
    """A GPU that torch can use.

    Args:
        kind: "cuda" or "mps".
        index: its number among those of its kind.
        name: what the product is called.
        memory: bytes it has for torch; None where that is not known.
        free: bytes of it that are free; None where that is not known.
        capability: CUDA's compute capability; None on others.
    """

    kind: str
    index: int
    name: str
    memory: int | None = None
    free: int | None = None
    capability: tuple[int, int] | None = None

    @property
    def device(self) -> str:
        """Its name for torch."""
        return f"{self.kind}:{self.index}" if self.kind == "cuda" else self.kind


@dataclass(frozen=True)
class Machine:
    """What decides where a model runs and what is on.

    Args:
        processor: family of the CPU, such as "x86_64".
        instructions: its vector instructions as torch names them, such as "AVX512".
        threads: that torch uses on it.
        memory, free: bytes of memory, and those available; None where that is not known.
        accelerators: the GPUs, best kind first.
        packages: versions of installed packages by name.
        compiler: path of the C++ compiler that `torch.compile` calls on a CPU; None where there is none.
        python_headers: whether Python.h is there, which what it compiles includes.
    """

    processor: str
    instructions: str
    threads: int
    memory: int | None = None
    free: int | None = None
    accelerators: tuple[Accelerator, ...] = ()
    packages: Mapping[str, str] = field(default_factory=dict)
    compiler: str | None = None
    python_headers: bool = True


def this_machine() -> Machine:
    """Describe the machine that this runs on."""
    memory, free = _memory()
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    return Machine(
        processor=platform.machine(),
        instructions=torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(),
        memory=memory,
        free=free,
        accelerators=(*_cuda_devices(), *_mps_devices()),
        packages=installed_packages(),
        compiler=shutil.which(compiler),
        python_headers=Path(sysconfig.get_path("include"), "Python.h").exists(),
    )


def installed_packages() -> dict[str, str]:
    """Versions of all installed packages by name, in lower case and with hyphens."""
    found = ((one.metadata["Name"], one.version) for one in metadata.distributions())
    return {name.lower().replace("_", "-"): version for name, version in found if name}


def _memory() -> tuple[int | None, int | None]:
    """Bytes of memory, and those available; None where Linux does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None, None
    sizes = {name: 1024 * int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    return sizes.get("MemTotal"), sizes.get("MemAvailable")


def _cuda_devices() -> tuple[Accelerator, ...]:
    if not torch.cuda.is_available():
        return ()
    found = []
    for index in range(torch.cuda.device_count()):
        free, memory = torch.cuda.mem_get_info(index)
        name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
        found.append(Accelerator("cuda", index, name, memory, free, capability))
    return tuple(found)


def _mps_devices() -> tuple[Accelerator, ...]:
    if not torch.backends.mps.is_available():
        return ()
    memory = torch.mps.recommended_max_memory()
    return (Accelerator("mps", 0, "Apple GPU", memory, memory - torch.mps.driver_allocated_memory()),)


# ---------------------------------------------------------------------------------------------------------------------
# What is used of it
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Placement:
    """Where a model runs.

    Args:
        device: its name for torch.
        dtype: name of the dtype, for example "float32".
        reason: why.
    """

    device: str
    dtype: str
    reason: str

    @property
    def kind(self) -> str:
        """Kind of the device."""
        return self.device.partition(":")[0]


@dataclass(frozen=True)
class Feature:
    """Something that a device may or may not do.

    Args:
        name: of it.
        on: whether it is used, or can be asked for.
        reason: why, and how to ask for it.
    """

    name: str
    on: bool
    reason: str


def placement(machine: Machine) -> Placement:
    """Choose where a model runs when the user does not say: the first GPU, else the CPU.

    Args:
        machine: the machine.
    """
    if not machine.accelerators:
        return Placement(
            "cpu", "float32", "no GPU was found, and bfloat16 is slower than float32 on the CPUs that were measured"
        )
    gpu = machine.accelerators[0]
    if gpu.kind != "cuda":
        return Placement(gpu.device, "float32", "16 bits are not tested on this kind of GPU")
    if (gpu.capability or (0, 0)) >= FLASH_CAPABILITY:
        return Placement(gpu.device, "bfloat16", "this GPU computes in bfloat16")
    return Placement(gpu.device, "float32", "this GPU is older than bfloat16")


def features(machine: Machine) -> list[Feature]:
    """What is on where `placement` puts a model, and what is off and why.

    Args:
        machine: the machine.
    """
    kind = placement(machine).kind
    compiled = _compilation(machine, kind)
    return [
        _quantisation(machine, kind),
        compiled,
        _cuda_graphs(compiled, kind),
        _flash_attention(machine, kind),
        _float64(kind),
    ]


def _quantisation(machine: Machine, kind: str) -> Feature:
    name = "4- and 8-bit base"
    if kind not in QUANTISED_DEVICES:
        return Feature(name, False, f"on {kind} bitsandbytes downloads its kernels, which is not tested")
    missing = [package for package in ("bitsandbytes", "accelerate") if package not in machine.packages]
    if missing:
        return Feature(name, False, f"pip install {' '.join(missing)}")
    return Feature(name, True, "pass quantization_config=BitsAndBytesConfig(...); see docs/smaller.md")


def _compilation(machine: Machine, kind: str) -> Feature:
    name = "torch.compile"
    if kind not in compiling.COMPILED_DEVICES:
        return Feature(name, False, f"used on {' and '.join(compiling.COMPILED_DEVICES)}, not on {kind}")
    if machine.compiler is None:
        return Feature(name, False, "no C++ compiler was found: install g++ (clang++ on macOS), or name one in CXX")
    if not machine.python_headers:
        return Feature(name, False, "Python.h is missing: install the headers of this Python (python3-dev)")
    if kind == "cuda" and "triton" not in machine.packages:
        return Feature(name, False, "triton is missing: pip install triton")
    return Feature(name, True, "call model.compile_decoding(); each new shape takes seconds to minutes, once")


def _cuda_graphs(compiled: Feature, kind: str) -> Feature:
    name = "CUDA graphs"
    if compiling.default_mode(kind) is None:
        return Feature(name, False, "they need a CUDA device")
    if not compiled.on:
        return Feature(name, False, f"they come with torch.compile: {compiled.reason}")
    return Feature(name, True, "come with model.compile_decoding()")


def _flash_attention(machine: Machine, kind: str) -> Feature:
    name = "FlashAttention"
    instead = "torch's own attention (sdpa) is used"
    if kind != "cuda":
        return Feature(name, False, f"it needs a CUDA device; {instead}")
    if (machine.accelerators[0].capability or (0, 0)) < FLASH_CAPABILITY:
        return Feature(name, False, f"it needs compute capability {'.'.join(map(str, FLASH_CAPABILITY))}; {instead}")
    if "flash-attn" not in machine.packages:
        return Feature(name, False, f"{instead}; for the package itself: pip install flash-attn")
    return Feature(name, True, 'pass attn_implementation="flash_attention_2"; decoding is then not compiled')


def _float64(kind: str) -> Feature:
    if kind in grammar.NO_FLOAT64:
        return Feature("float64", False, f"{kind} has none; remasking by entropy or margin needs it, on the CPU")
    return Feature("float64", True, "exact marginals of remasking by entropy or margin are computed on the device")


# ---------------------------------------------------------------------------------------------------------------------
# A device that was chosen
# ---------------------------------------------------------------------------------------------------------------------


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
