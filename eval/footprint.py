"""How small and how fast the model gets, and what that changes of its calls: `python -m eval.footprint`.

The model in float32, in bfloat16, on a base of 8 and of 4 bits (bitsandbytes; the head stays in 16 or 32 bits), and
with compiled forwards. Of each: bytes on disk and in memory, what one request takes on top, milliseconds and forwards
of a call, whether `verified` writes what `ar` writes, and how many replies are those of float32. Requests are of the
evaluation sets `seen` and `unseen` of `--data`, half each; without such data they are made up. Every request goes
through all variants before the next one, in an order drawn for it. A first pass over all requests is not counted. The
sizes of SmolLM3-3B's shape are computed, not measured. Compiling takes a minute for each of many shapes, so the
compiled variant is asked for: `--variants "float32, compiled" --limit 4 --out eval/results/footprint_compiled.json`.
"""

import argparse
import json
import logging
import os
import random
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import mean, median
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm
from transformers import AutoTokenizer, BitsAndBytesConfig, SmolLM3Config

from eval import held_out
from eval.bench_decoding import installed, quiet, threads
from eval.devices import check_device, device_name
from eval.held_out import Answer, Request
from eval.held_out_tables import markdown
from eval.load_metrics import load_metric
from eval.resumable import PartialResults, evaluation_parser, versions
from repo_package import load_repo_module
from training.data import evaluation_rows
from training.synthetic_calls import generate

configuration = load_repo_module("configuration_smollm_diffusion")
modeling = load_repo_module("modeling_smollm_diffusion")

DECODINGS = ("verified", "ar")
MADE_UP = 40
"""Made-up requests where `--limit` asks for all."""
BLOCK = 64
"""Weights that share a scale of float32 in 4 bits, bitsandbytes' default."""
CODE = 16
"""Values that a weight of 4 bits may have; each layer keeps the table of them in float32."""


@dataclass(frozen=True)
class Variant:
    """A way of holding the model.

    Args:
        name: of it.
        dtype: of everything that is not quantised: head, embeddings and norms.
        bits: of the base's linear layers, 8 or 4 (nf4), by bitsandbytes; None leaves them in `dtype`.
        compiled: its forwards are compiled.
    """

    name: str
    dtype: str
    bits: int | None = None
    compiled: bool = False

    def arguments(self, device: str) -> dict[str, Any]:
        """What `from_pretrained` is told.

        Args:
            device: where the model goes.
        """
        dtype = getattr(torch, self.dtype)
        if self.bits is None:
            return {"dtype": dtype}
        quantization = BitsAndBytesConfig(
            load_in_8bit=self.bits == 8,
            load_in_4bit=self.bits == 4,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
        )
        return {"dtype": dtype, "quantization_config": quantization, "device_map": {"": device}}


REFERENCE = "float32"
VARIANTS = {
    variant.name: variant
    for variant in (
        Variant(REFERENCE, "float32"),
        Variant("float32, compiled", "float32", compiled=True),
        Variant("bfloat16", "bfloat16"),
        Variant("8 bits, head float32", "float32", bits=8),
        Variant("8 bits, head bfloat16", "bfloat16", bits=8),
        Variant("4 bits, head float32", "float32", bits=4),
        Variant("4 bits, head bfloat16", "bfloat16", bits=4),
    )
}
"""By name."""


# ---------------------------------------------------------------------------------------------------------------------
# Sizes
# ---------------------------------------------------------------------------------------------------------------------


def opened(path: str, device: str, variant: Variant) -> Any:
    """Load a variant of a model.

    Args:
        path: folder or repo.
        device: where it goes.
        variant: how it is held.
    """
    model = modeling.SmolLMDiffusionForCausalLM.from_pretrained(path, **variant.arguments(device)).eval()
    if variant.bits is None:
        model = model.to(device)
    return model.compile_decoding() if variant.compiled else model


def bytes_in_memory(model: Any) -> int:
    """Bytes of a model's weights, scales of quantised ones among them; what is shared counts once."""
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in _tensors(model)}
    return sum(held.values())


def _tensors(model: Any) -> Iterator[torch.Tensor]:
    return (value for value in model.state_dict().values() if isinstance(value, torch.Tensor))


def bytes_on_disk(model: Any) -> int:
    """Bytes of the weights that `save_pretrained` writes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def bytes_on_paper(model: Any, dtype: torch.dtype, bits: int | None) -> dict[str, int]:
    """Bytes that a model's weights take, without holding any of them.

    Args:
        model: the model, whose parameters may be on the meta device.
        dtype: of everything that is not quantised.
        bits: of the base's linear layers but for the output layer, 8 or 4; None leaves them in `dtype`.

    Returns:
        `base`, `head` and `all`. 8 bits have a scale of float32 for each output; 4 bits one for each 64 weights, and a
        table of 16 values for each layer.
    """
    output = model.get_output_embeddings()
    quantised = {
        id(layer.weight)
        for layer in model.base.modules()
        if bits is not None and isinstance(layer, nn.Linear) and layer is not output
    }

    def size(weight: nn.Parameter) -> int:
        count = weight.numel()
        if id(weight) not in quantised:
            return count * dtype.itemsize
        return count + 4 * weight.shape[0] if bits == 8 else count // 2 + 4 * (-(-count // BLOCK)) + 4 * CODE

    base = sum(map(size, model.base.parameters()))  # a weight that two layers share comes once
    whole = sum(map(size, model.parameters()))
    return {"base": base, "head": whole - base, "all": whole}


def smollm3_on_paper(variants: Sequence[Variant]) -> dict[str, Any]:
    """Weights of SmolLM3-3B with a head of the default size, and the bytes they take, by variant.

    transformers' defaults of `SmolLM3Config` are the 3B's, but for context and rotary base, which have no weights.

    Args:
        variants: how the model is held; compiled ones are left out, as they take the same bytes.
    """
    with torch.device("meta"):
        model = modeling.SmolLMDiffusionForCausalLM(configuration.SmolLMDiffusionConfig(text_config=SmolLM3Config()))
    sizes = {
        variant.name: bytes_on_paper(model, getattr(torch, variant.dtype), variant.bits)
        for variant in variants
        if not variant.compiled
    }
    return {
        "base_weights": sum(weight.numel() for weight in model.base.parameters()),
        "head_weights": sum(weight.numel() for weight in model.diffusion_head.parameters()),
        "bytes": sizes,
    }


def working_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """The most memory that torch holds for a piece of work at one time, on top of what was there.

    Args:
        work: what is run.
        device: where its tensors are.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    recorded = profiled.profiler.kineto_results
    events = [event for event in recorded.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


# ---------------------------------------------------------------------------------------------------------------------
# Replies
# ---------------------------------------------------------------------------------------------------------------------


def requests_of(options: argparse.Namespace, tokenizer: Any, room: int) -> tuple[str, list[Request]]:
    """The requests of the command, and what they are in words.

    Args:
        options: of the command line.
        tokenizer: the model's tokenizer.
        room: most tokens of a prompt.

    Raises:
        SystemExit: the model takes none of them.
    """
    if (options.data / "dev").is_dir():
        half = -(-options.limit // 2) or sys.maxsize
        found = [held_out.requests(name, options.data, tokenizer, room, half)[0] for name in held_out.OWN_SETS]
        label = ", ".join(f"{len(rows)} {name}" for name, rows in zip(held_out.OWN_SETS, found, strict=True))
        todo = [request for rows in found for request in rows]
    else:
        limit = options.limit or MADE_UP
        records = (one for one in generate(20 * limit, options.seed, names="dev") if len(one["calls"]) <= 1)
        rows = (row for record in records for row in evaluation_rows([record], tokenizer))
        todo = [Request(row) for row in islice((row for row in rows if len(row.prompt_ids) <= room), limit)]
        label = f"{len(todo)} made up"
    if not todo:
        raise SystemExit("eval.footprint: all requests are too long for this model; is it the one that was meant?")
    return label, todo


def answers(model: held_out.Model, request: Request, first: str) -> dict[str, Any]:
    """A request through both decodings.

    Args:
        model: a variant.
        request: the request.
        first: which decoding goes first.

    Returns:
        For each decoding calls, tokens of the reply (none where it does not call), forwards of the base and
        milliseconds; `gap` says how far apart the base found the tokens where the two first differ: the difference
        of their logits, None where they are the same or one of them does not call.
    """
    found: dict[str, dict[str, Any]] = {}
    for decoding in (first, *(name for name in DECODINGS if name != first)):
        answer: Answer = model.answer(request, decoding)
        found[decoding] = {
            "calls": answer.calls,
            "reply": answer.reply,
            "base_forwards": answer.base_forwards,
            "ms": 1000 * answer.seconds,
        }
    replies = [found[name]["reply"] for name in DECODINGS]
    return {**found, "gap": logit_gap(model.model, request.row.prompt_ids, *replies)}


@torch.no_grad()
def logit_gap(model: Any, prompt: Sequence[int], one: Sequence[int], other: Sequence[int]) -> float | None:
    """How much the base prefers one of two replies where they first differ.

    Args:
        model: the model.
        prompt: tokens in front of both.
        one, other: tokens of the replies.

    Returns:
        The distance of two logits; None where the replies are the same, or one ends where the other goes on.
    """
    place = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    if place is None:
        return None
    ids = torch.tensor([[*prompt, *one[:place]]], device=model.device)
    logits = model(ids).logits[0, -1].float()
    return float((logits[one[place]] - logits[other[place]]).abs())


def summary(
    rows: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]], todo: Sequence[Request]
) -> dict[str, Any]:
    """What a variant made of the requests.

    Args:
        rows: from `answers`, one a request.
        reference: of float32.
        todo: the requests.

    Returns:
        Counts of requests: `same_route` as float32 (calls or does not), `same_calls` as it, `valid` (no call breaks its
        schema), `same_tokens` (`verified` and `ar` write the same), with the largest `gap` of those that do not.
        Median milliseconds, median ratios to float32's `verified` and mean forwards of the base are over the
        `compared` requests: those that this variant and float32 answer with the same calls.
    """
    made = [row["verified"]["calls"] for row in rows]
    wanted = [row["verified"]["calls"] for row in reference]
    compared = [n for n, (calls, theirs) in enumerate(zip(made, wanted, strict=True)) if calls and calls == theirs]
    gaps = [row["gap"] for row in rows if row["gap"] is not None]
    valid = load_metric("call_validity").compute(
        predictions=[json.dumps(calls, ensure_ascii=False) for calls in made],
        tools=[json.dumps(held_out.normal_tools(request.row), ensure_ascii=False) for request in todo],
    )["valid"]
    found: dict[str, Any] = {
        "requests": len(rows),
        "same_route": sum(bool(calls) == bool(theirs) for calls, theirs in zip(made, wanted, strict=True)),
        "same_calls": sum(calls == theirs for calls, theirs in zip(made, wanted, strict=True)),
        "valid": round(valid * len(rows)),
        "same_tokens": sum(row["verified"]["reply"] == row["ar"]["reply"] for row in rows),
        "largest_gap": round(max(gaps), 4) if gaps else None,
        "compared": len(compared),
    }
    for decoding in DECODINGS:
        times = [rows[n][decoding]["ms"] for n in compared]
        ratios = [time / reference[n]["verified"]["ms"] for n, time in zip(compared, times, strict=True)]
        forwards = [rows[n][decoding]["base_forwards"] for n in compared]
        found[decoding] = {
            "ms": round(median(times), 1) if times else None,
            "of_float32": round(median(ratios), 2) if ratios else None,
            "base_forwards": round(mean(forwards), 2) if forwards else None,
        }
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f}"


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:g}"


def body(results: Mapping[str, Any]) -> list[str]:
    """The tables of a result file.

    Args:
        results: what the command wrote.

    Returns:
        Markdown paragraphs.
    """
    whole = results["variants"][REFERENCE]["memory"]
    sizes, speeds = [], []
    for name, row in results["variants"].items():
        share = f"{row['memory'] / whole:.0%}"
        sizes.append([name, _mib(row["disk"]), _mib(row["memory"]), share, _mib(row["working"])])
        counts = [f"{row[part]} of {row['requests']}" for part in ("same_tokens", "same_route", "same_calls", "valid")]
        verified, ar = row["verified"], row["ar"]
        numbers = (verified["ms"], verified["of_float32"], ar["ms"], verified["base_forwards"], ar["base_forwards"])
        speeds.append([name, *map(_shown, numbers), counts[0], _shown(row["largest_gap"]), *counts[1:]])
    compared = ", ".join(f"{row['compared']} ({name})" for name, row in results["variants"].items())
    return [
        "Sizes in MiB; a request is the longest of the prompts, and takes its memory on top of the weights.",
        markdown(["variant", "on disk", "in memory", "of float32", "a request"], sizes),
        f"Speed and agreement on {results['requests']} requests. Times are medians, ratios those of one request to "
        "`verified` in float32.",
        markdown(
            [
                "variant",
                "ms, `verified`",
                "of float32",
                "ms, `ar`",
                "base forwards, `verified`",
                "`ar`",
                "`verified` as `ar`",
                "largest gap",
                "route as float32",
                "calls as float32",
                "valid",
            ],
            speeds,
        ),
        "Gap: how far apart the logits of the two tokens were where `verified` and `ar` first differ. Times and "
        f"forwards are over the requests with the same calls as float32: {compared}.",
        *_compilation(results),
        *_paper(results["smollm3_3b"]),
    ]


def _compilation(results: Mapping[str, Any]) -> list[str]:
    """What compiling took, and what could not be compiled."""
    texts = []
    for name, row in results["variants"].items():
        if "graphs" not in row:
            continue
        off = "; ".join(f"the {part} is not: {reason}" for part, reason in row["off"].items())
        texts.append(
            f"{name}: {row['graphs']} shapes were compiled in the first pass, which took {row['first_pass_s']:.0f} s; "
            f"the pass that counts took {row['second_pass_s']:.0f} s{f' ({off})' if off else ''}."
        )
    return texts


def _paper(paper: Mapping[str, Any]) -> list[str]:
    """The sizes of SmolLM3-3B with its head."""
    rows = [
        [name, *(f"{found[part] / 2**30:.2f}" for part in ("base", "head", "all"))]
        for name, found in paper["bytes"].items()
    ]
    weights = (
        f"{paper['base_weights'] / 1e6:,.0f}M weights of the base, {paper['head_weights'] / 1e6:,.0f}M of the head"
    )
    return [
        f"SmolLM3-3B with a head of the default size ({weights}), computed from the shapes, in GiB:",
        markdown(["variant", "base", "head", "all"], rows),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def cold_compiler() -> Iterator[None]:
    """Let torch compile into an empty cache while the block runs, so that compiling takes what it takes at first."""
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, {"TORCHINDUCTOR_CACHE_DIR": folder}):
        yield


@dataclass
class Measurement:
    """All variants side by side.

    Args:
        models: the variants by name.
        todo: the requests.
        seed: of the order of variants.
        found: where results are kept.
    """

    models: Mapping[str, held_out.Model]
    todo: Sequence[Request]
    seed: int
    found: PartialResults

    def sizes(self) -> dict[str, dict[str, Any]]:
        """Bytes of each variant; the longest prompt is what a request's memory is measured with."""
        longest = max(self.todo, key=lambda request: len(request.row.prompt_ids))
        found = {}
        for name, held in tqdm(self.models.items(), "sizes", unit="variant"):
            working = working_bytes(lambda held=held: held.answer(longest, "verified"), held.model.device)  # type: ignore[misc]
            found[name] = {
                "disk": bytes_on_disk(held.model),
                "memory": bytes_in_memory(held.model),
                "working": working,
            }
        return found

    def first_pass(self) -> dict[str, float]:
        """Seconds that each variant takes for all requests at first, compiling among them."""
        seconds = {}
        for name, held in self.models.items():
            start = time.perf_counter()
            for request in tqdm(self.todo, f"first pass, {name}", unit="request", leave=False):
                answers(held, request, DECODINGS[0])
            seconds[name] = time.perf_counter() - start
        return seconds

    def second_pass(self) -> None:
        """Answer all requests that an earlier run has not, each by all variants."""
        for number, request in enumerate(tqdm(self.todo, "requests", unit="request")):
            if str(number) in self.found:
                continue
            chance = random.Random(f"{self.seed} {number}")
            order = chance.sample(list(self.models), len(self.models))
            first = DECODINGS[number % 2]
            self.found.put(str(number), {name: answers(self.models[name], request, first) for name in order})

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Answers of a variant, in the order of the requests."""
        return [self.found[str(number)][name] for number in range(len(self.todo))]


def report(measurement: Measurement) -> dict[str, dict[str, Any]]:
    """Measure all variants; gives what is said of each, by name."""
    with cold_compiler():
        first = measurement.first_pass()
        sizes = measurement.sizes()
        measurement.second_pass()
    found = {}
    for name, held in measurement.models.items():
        rows = measurement.rows(name)
        found[name] = {
            **sizes[name],
            **summary(rows, measurement.rows(REFERENCE), measurement.todo),
            "first_pass_s": round(first[name], 1),
            "second_pass_s": round(sum(row[decoding]["ms"] for row in rows for decoding in DECODINGS) / 1000, 1),
        }
        compiled = held.model.compiled_decoding
        if compiled is not None:
            found[name] |= {"graphs": compiled.graphs, "off": dict(compiled.off)}
    return found


def run(options: argparse.Namespace, command: str) -> None:
    """Measure, print the tables and write the result.

    Args:
        options: of the command line.
        command: how it was called, for the result.

    Raises:
        SystemExit: nothing can be measured, or the run was interrupted; says what to do.
    """
    try:
        check_device(options.device)
        tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=False)
        models = {
            name: held_out.Model(opened(options.model, options.device, VARIANTS[name]), tokenizer, None)
            for name in (REFERENCE, *(name for name in options.variants if name != REFERENCE))
        }
        deciding = ("model", "data", "limit", "seed", "threads", "device", "variants")
        found = PartialResults(options.out, {name: getattr(options, name) for name in deciding})
    except (OSError, ValueError, ImportError) as error:
        raise SystemExit(f"eval.footprint: {error}") from error
    label, todo = requests_of(options, tokenizer, models[REFERENCE].room)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of its casts to float16 at every layer
    with found.kept_when_interrupted("requests"), quiet():
        measured = report(Measurement(models, todo, options.seed, found))
    results = {
        "command": command,
        "versions": {**versions(), **installed(["bitsandbytes"])},
        "threads": torch.get_num_threads(),
        "device": device_name(torch.device(options.device)),
        "seed": options.seed,
        "requests": label,
        "variants": measured,
        "smollm3_3b": smollm3_on_paper([VARIANTS[name] for name in models]),
    }
    print("\n\n".join(body(results)))
    found.finish(results)
    print(f"\n{options.out}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = evaluation_parser("footprint", __doc__, limit=40)
    plain = [name for name, variant in VARIANTS.items() if not variant.compiled]
    parser.add_argument(
        "--variants", nargs="+", default=plain, choices=list(VARIANTS), help="float32 is always measured"
    )
    options = parser.parse_args(arguments)
    if options.limit < 0:
        parser.error("--limit must be at least 0")
    command = shlex.join(["python", "-m", "eval.footprint", *(sys.argv[1:] if arguments is None else arguments)])
    with threads(options.threads or torch.get_num_threads()):
        run(options, command)


if __name__ == "__main__":
    main()
