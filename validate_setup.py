"""What this machine can do for the model: `python validate_setup.py`, with `--json` for programs.

Says in one line each: versions that are needed, devices, what is on or off and why, optional packages, the default
model's files, caches and memory. Ends with what to run next; the exit code is 1 where something needed is missing.
Starts on any Python 3.8 and without torch, to say that they are too old or missing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import struct
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eval.devices import Machine, Placement

ROOT = Path(__file__).resolve().parent
PYTHON = (3, 11)
NEEDED = {
    "torch": "2.7",
    "transformers": "5.17",
    "tokenizers": "",
    "safetensors": "",
    "numpy": "",
    "jinja2": "",
}
"""Least versions by package, as pyproject.toml has them; an empty text is any."""
OPTIONAL = {
    "bitsandbytes": "a base of 4 or 8 bits",
    "accelerate": "a base of 4 or 8 bits, several devices, training",
    "peft": "draft adapters (LoRA)",
    "llguidance": 'schemas that cannot be compiled, with on_unsupported="ar"',
    "datasets": "training, evaluation and batches of requests",
    "evaluate": "training and evaluation",
    "jsonschema": "evaluation: whether calls are valid",
    "matplotlib": "plots of results",
    "tensorboard": "curves of training",
    "ray": "serve.py, and batches of requests on several workers",
    "gradio": "the Space, app.py",
    "openai": "the examples of the OpenAI client",
    "smolagents": "the example of smolagents",
    "langchain-openai": "the example of LangChain",
    "sentence-transformers": "finding the tools that fit among hundreds",
}
"""What packages are for that nothing needs by itself."""
FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
LFS_POINTER = b"version https://git-lfs"
NEXT = (
    "python demo.py                # three requests and how they are answered",
    "python serve.py               # an OpenAI-compatible server",
    "python train_hf.py --help     # train a head of your own",
)
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        status: "ok", "on", "off" (nothing needs it), "note" (works, but read this) or "missing" (needed).
        topic: what it is about.
        text: what was found, and what to do about it.
    """

    status: str
    topic: str
    text: str


# ---------------------------------------------------------------------------------------------------------------------
# Versions
# ---------------------------------------------------------------------------------------------------------------------


def release(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with: (2, 13, 0) of "2.13.0+cpu"."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found.group().split(".")) if found else ()


def needed(python: tuple[int, ...], packages: Mapping[str, str]) -> list[Finding]:
    """Whether Python and the packages that everything needs are there and new enough.

    Args:
        python: version of the interpreter.
        packages: versions of installed packages by name.
    """
    shown, least = ".".join(map(str, python[:3])), ".".join(map(str, PYTHON))
    text = f"{shown} ({least} or newer)" if python >= PYTHON else f"{shown} is too old: install Python {least} or newer"
    found = [Finding("ok" if python >= PYTHON else "missing", "python", text)]
    for name, minimum in NEEDED.items():
        version = packages.get(name)
        wanted = f'"{name}>={minimum}"' if minimum else name
        if version is None:
            found.append(Finding("missing", name, f"is not installed: pip install {wanted}"))
        elif release(version) < release(minimum):
            found.append(Finding("missing", name, f"{version} is too old: pip install --upgrade {wanted}"))
        else:
            found.append(Finding("ok", name, f"{version} ({minimum} or newer)" if minimum else version))
    return found


def versions(names: Iterator[str]) -> dict[str, str]:
    """Versions of those packages that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def optional(packages: Mapping[str, str]) -> list[Finding]:
    """What further packages are there, what they are for, and how to get the others.

    Args:
        packages: versions of installed packages by name.
    """
    return [
        Finding("on", name, f"{packages[name]}: {purpose}")
        if name in packages
        else Finding("off", name, f"{purpose}: pip install {name}")
        for name, purpose in OPTIONAL.items()
    ]


# ---------------------------------------------------------------------------------------------------------------------
# The machine
# ---------------------------------------------------------------------------------------------------------------------


def devices(machine: Machine, chosen: Placement) -> list[Finding]:
    """The CPU, the GPUs, and which of them is used.

    Args:
        machine: the machine.
        chosen: where a model runs when the user does not say.
    """
    memory = _share(machine.free, machine.memory)
    threads = f"{machine.threads} thread{'s' if machine.threads != 1 else ''}"
    found = [Finding("ok", "cpu", f"{machine.processor}, {machine.instructions}, {threads}{memory}")]
    for gpu in machine.accelerators:
        capability = f", compute capability {'.'.join(map(str, gpu.capability))}" if gpu.capability else ""
        found.append(Finding("ok", gpu.device, f"{gpu.name}{capability}{_share(gpu.free, gpu.memory)}"))
    return [*found, Finding("ok", "chosen", f"{chosen.device} in {chosen.dtype}: {chosen.reason}")]


def _share(free: int | None, memory: int | None) -> str:
    return "" if free is None or memory is None else f", {free / GIB:.1f} of {memory / GIB:.1f} GiB free"


def memory(machine: Machine, chosen: Placement, parameters: int) -> Finding:
    """Whether the model fits into what is free on the chosen device.

    Args:
        machine: the machine.
        chosen: where the model runs.
        parameters: of the model.
    """
    size = parameters * (4 if chosen.dtype == "float32" else 2)
    gpu = next((one for one in machine.accelerators if one.device == chosen.device), None)
    free = machine.free if gpu is None else gpu.free
    text = f"{parameters / 1e6:.1f}M weights take {_size(size)} in {chosen.dtype}"
    if free is None:
        return Finding("note", "memory", f"{text}; how much is free is not known")
    if size > free:
        return Finding("note", "memory", f"{text}, but only {_size(free)} are free: close programs, or use 4 bits")
    return Finding("ok", "memory", f"{text}; {_size(free)} are free on {chosen.device}")


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB / 2 else f"{count / 2**20:.0f} MiB"


def caches(folders: Mapping[str, Path]) -> list[Finding]:
    """Whether folders that Hugging Face libraries write to can be written to.

    Args:
        folders: by the environment variable that names another one.
    """
    found = []
    for variable, folder in folders.items():
        there = next(one for one in (folder, *folder.parents) if one.exists())
        if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
            found.append(Finding("ok", "cache", f"{folder} can be written to"))
        else:
            advice = f"make {there} a writable folder, or name another folder in {variable}"
            found.append(Finding("missing", "cache", f"{folder} cannot be written to: {advice}"))
    return found


def cache_folders(environment: Mapping[str, str]) -> dict[str, Path]:
    """Where downloads, and copies of a model's code, are kept, by the variable that names another folder.

    Args:
        environment: the environment's variables.
    """
    home = environment.get("HF_HOME") or os.path.join(environment.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    places = {"HF_HUB_CACHE": "hub", "HF_MODULES_CACHE": "modules"}
    return {
        variable: Path(environment.get(variable) or os.path.join(home, name)).expanduser()
        for variable, name in places.items()
    }


# ---------------------------------------------------------------------------------------------------------------------
# The default model's files
# ---------------------------------------------------------------------------------------------------------------------


def model_files(folder: Path) -> list[Finding]:
    """Whether a model's folder has all of its files, and its code and weights are whole.

    Args:
        folder: of the model.
    """
    absent = [name for name in FILES if not (folder / name).is_file()]
    if absent:
        return [Finding("missing", "model", f"{folder} lacks {', '.join(absent)}: get the repository again")]
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        modules = code_of(folder, config)
        counts = weights_of(folder, head_only=config.get("head_only_checkpoint", False))
    except (OSError, ValueError) as error:
        return [Finding("missing", "model", f"{error}: get the repository again")]
    return [
        Finding("ok", "model", f"{len(FILES)} files of settings and tokenizer, {len(modules)} modules of code"),
        Finding("ok", "weights", f"{len(counts)} tensors of {sum(counts.values()) / 1e6:.1f}M weights, whole"),
    ]


def code_of(folder: Path, config: Mapping[str, Any]) -> set[str]:
    """Names of the modules that loading the model imports.

    Args:
        folder: of the model.
        config: contents of its config.json.

    Raises:
        ValueError: one is not there; says which.
    """
    todo = [str(place).partition(".")[0] for place in config.get("auto_map", {}).values()]
    found: set[str] = set()
    while todo:
        name = todo.pop()
        if name in found:
            continue
        path = folder / f"{name}.py"
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        found.add(name)
        todo += re.findall(r"^from \.(\w+) import", path.read_text(encoding="utf-8"), re.MULTILINE)
    return found


def weights_of(folder: Path, head_only: bool) -> dict[str, int]:
    """Sizes of a model's tensors by name, out of the headers of its files, which must be as long as those say.

    Args:
        folder: of the model.
        head_only: whether the base's weights are elsewhere.

    Raises:
        ValueError: a file is missing, cut off or no weights at all, or lacks tensors; says which.
    """
    index = folder / INDEX
    if index.is_file():
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = {name: header_of(folder / name) for name in sorted(set(places.values()))}
        lost = sorted(tensor for tensor, name in places.items() if tensor not in shards[name])
        if lost:
            raise ValueError(f"{INDEX} names {len(lost)} tensors that are not where it says, such as {lost[0]}")
        found = {tensor: shards[name][tensor] for tensor, name in places.items()}
    else:
        found = header_of(folder / WEIGHTS)
    for part in ("diffusion_head.",) if head_only else ("base.", "diffusion_head."):
        if not any(name.startswith(part) for name in found):
            raise ValueError(f"the weights in {folder} have no tensor of {part.rstrip('.')}")
    return found


def header_of(path: Path) -> dict[str, int]:
    """How many numbers each tensor of a safetensors file has. Source: the format's description, safetensors 0.4.

    Args:
        path: the file.

    Raises:
        ValueError: there is no such file, it is no safetensors file, or it is shorter or longer than its header says.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    with path.open("rb") as file:
        start = file.read(len(LFS_POINTER))
        if start == LFS_POINTER:
            raise ValueError(f"{path} is a pointer of Git LFS and holds no weights (git lfs pull)")
        try:
            (length,) = struct.unpack("<Q", start[:8])
            file.seek(8)
            header = json.loads(file.read(min(length, path.stat().st_size)))
            header.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
            sizes = {name: _product(entry["shape"]) for name, entry in header.items()}
        except (struct.error, ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{path} is no safetensors file") from None
    if path.stat().st_size != 8 + length + end:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, its header says {8 + length + end}")
    return sizes


def _product(shape: list[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def look() -> list[Finding]:
    """Look at everything; what needs torch is left out where what is needed is not there."""
    found = needed(sys.version_info[:3], versions(iter(NEEDED)))
    if any(one.status == "missing" for one in found):
        return found
    try:
        from eval import devices as machines
    except (ImportError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return [*found, Finding("missing", "import", f"torch or transformers cannot be imported ({reason})")]
    machine = machines.this_machine()
    chosen = machines.placement(machine)
    found += devices(machine, chosen)
    found += [Finding("on" if one.on else "off", one.name, one.reason) for one in machines.features(machine)]
    found += optional(machine.packages)
    files = model_files(ROOT)
    found += files
    if all(one.status == "ok" for one in files):
        config = json.loads((ROOT / "config.json").read_text(encoding="utf-8"))
        weights = weights_of(ROOT, config.get("head_only_checkpoint", False))
        found.append(memory(machine, chosen, sum(weights.values())))
    return [*found, *caches(cache_folders(os.environ))]


def shown(findings: list[Finding]) -> str:
    """The lines that are printed.

    Args:
        findings: all of them.
    """
    width = max(len(one.topic) for one in findings)
    lines = [f"{one.status:8}{one.topic:{width}}  {one.text}" for one in findings]
    missing = [one.topic for one in findings if one.status == "missing"]
    if missing:
        return "\n".join(
            [*lines, "", f"Missing: {', '.join(missing)}. Do what the lines above say, then run this again."]
        )
    return "\n".join([*lines, "", "Ready. Next:", *(f"  {command}" for command in NEXT)])


def main(arguments: list[str] | None = None) -> int:
    """Run the command; gives its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    options = parser.parse_args(arguments)
    findings = look()
    ready = all(one.status != "missing" for one in findings)
    report = {"ready": ready, "findings": [asdict(one) for one in findings]}
    print(json.dumps(report, indent=1) if options.json else shown(findings))
    return 0 if ready else 1


if __name__ == "__main__":
    sys.exit(main())
