"""The metadata of the model card: the YAML at the top of README.md, as the Hub reads it.

Takes the results of eval/results; gives the metadata and puts it into a card's text. `python -m eval.report` writes it
for this repository; a release of a head alone names its base with `with_base_model`. Nothing here loads a model.
"""

import re
from collections.abc import Mapping
from typing import Any

import yaml  # type: ignore[import-untyped]
from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index

Results = Mapping[str, Mapping[str, Any]]
"""Contents of the result files, by name; those that are not there are missing."""

MODEL_NAME = "smollm-diffusion"
"""In the `model-index`."""
HUB_BFCL = "gorilla-llm/Berkeley-Function-Calling-Leaderboard"

TRAINING_MINUTES = {"base": 255, "head": 60}
"""Wall time of the runs whose weights are in the model, by stage; the tables of training/README.md have each part."""
TRAINING_CORES = 2
WATTS_PER_CORE = 10
"""Assumed, not measured: what a server's processor draws by its data sheet, about 200 W, over its cores, about 24, and
its share of the memory."""
GRAMS_PER_KWH = 475
"""Assumed, since the place is not known: a world average of electricity, in grams of CO2 equivalents."""

METADATA: Mapping[str, Any] = {
    "license": "apache-2.0",
    "language": ["en"],
    "library_name": "transformers",
    "pipeline_tag": "text-generation",
    "tags": [
        "function-calling",
        "tool-use",
        "json-schema",
        "structured-generation",
        "diffusion",
        "constrained-decoding",
        "speculative-decoding",
        "custom_code",
    ],
    # Those of the sources in training/README.md that have an id on the Hub. There is no `base_model`: the base has the
    # architecture of SmolLM3, but its weights were trained from scratch.
    "datasets": [
        "google-research-datasets/schema_guided_dstc8",
        "clinc/clinc_oos",
        "google/Synthetic-Persona-Chat",
        "openai/gsm8k",
    ],
    "metrics": ["accuracy", "exact_match"],
}
"""What does not follow from results."""
OF_THESE_WEIGHTS = ("co2_eq_emissions", "widget", "model-index")
"""Keys that hold for the model of this repository alone."""


# ---------------------------------------------------------------------------------------------------------------------
# What follows from results
# ---------------------------------------------------------------------------------------------------------------------


def energy_kwh() -> float:
    """Estimate of the energy that the shipped weights took, in kWh: minutes measured, watts assumed."""
    return sum(TRAINING_MINUTES.values()) / 60 * TRAINING_CORES * WATTS_PER_CORE / 1000


def emissions() -> dict[str, Any]:
    """`co2_eq_emissions`, in grams, with what the estimate rests on.

    Source: the fields are those of https://huggingface.co/docs/hub/model-cards-co2.
    """
    hours = sum(TRAINING_MINUTES.values()) / 60
    return {
        "emissions": round(energy_kwh() * GRAMS_PER_KWH),
        "source": f"estimate: {hours:g} hours measured, {WATTS_PER_CORE} W a core and {GRAMS_PER_KWH} g/kWh assumed",
        "training_type": "pre-training",
        "hardware_used": f"{TRAINING_CORES} CPU cores (x86-64, AVX-512)",
    }


def widget(results: Results) -> list[dict[str, Any]]:
    """The examples of the Hub's widget: requests and what the shipped model answered them.

    The Hub shows the answers, since it does not run custom code. It reads `text` or `messages` and `output`; tools are
    kept beside the messages, for people and for tests.
    """
    examples = results.get("widget", {}).get("examples", [])
    return [{**one, "tools": [_OneLine(tool) for tool in one["tools"]]} if "tools" in one else one for one in examples]


def eval_results(results: Results) -> list[EvalResult]:
    """The entries of the `model-index`: what `verified`, the default decoding, was measured to do.

    Args:
        results: all results; those of BFCL's categories are the official checker's.
    """
    found = []
    for category, decodings in results.get("bfcl", {}).get("categories", {}).items():
        if row := decodings.get("verified"):
            name = f"official checker, {row['requests']} requests"
            dataset = {"dataset_type": HUB_BFCL, "dataset_name": f"BFCL v4 {category}", "dataset_config": category}
            found.append(_entry("accuracy", name, row["accuracy"], **dataset))
    for split, decodings in results.get("held_out", {}).get("sets", {}).items():
        if row := decodings.get("verified"):
            dataset = {
                "dataset_type": "held-out-requests",
                "dataset_name": f"held-out requests, {split} tools",
                "dataset_config": split,
            }
            count = row["requests"]
            right, valid = round(row["right"] / count, 4), round(row["valid"] / count, 4)
            found += [
                _entry("exact_match", f"right, {count} requests", right, **dataset),
                _entry("validity", "replies whose calls are all valid", valid, **dataset),
                _entry("base_forwards", "base forwards per call", row["base_forwards_per_call"], **dataset),
            ]
    return found


def _entry(metric: str, name: str, value: float, **dataset: Any) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        task_name="Function calling",
        metric_type=metric,
        metric_name=name,
        metric_value=value,
        **dataset,
    )


def metadata(results: Results) -> dict[str, Any]:
    """The whole metadata of this repository's card; what was not measured is left out."""
    entries = eval_results(results)
    made = {
        **METADATA,
        "co2_eq_emissions": emissions(),
        "widget": widget(results),
        "model-index": eval_results_to_model_index(MODEL_NAME, entries) if entries else None,
    }
    return {key: value for key, value in made.items() if value}


# ---------------------------------------------------------------------------------------------------------------------
# The card's text
# ---------------------------------------------------------------------------------------------------------------------

_FRONT = re.compile(r"---\n(.*?\n)---\n", re.DOTALL)


class _OneLine(dict[str, Any]):
    """A mapping that is written in one line, such as a tool."""


class _Dumper(yaml.SafeDumper):
    """YAML that people can read: texts of several lines as they are, no line broken, nothing by reference."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write what occurs twice twice."""
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


def _one_line(dumper: yaml.SafeDumper, mapping: _OneLine) -> yaml.MappingNode:
    return dumper.represent_mapping("tag:yaml.org,2002:map", mapping, flow_style=True)


_Dumper.add_representer(str, _text)
_Dumper.add_representer(_OneLine, _one_line)


def front_matter(card: str) -> str:
    """The YAML at the top of a card's text; empty where there is none."""
    found = _FRONT.match(card)
    return found[1] if found else ""


def with_metadata(card: str, data: Mapping[str, Any]) -> str:
    """A card's text with other metadata; the text below is as it was.

    Args:
        card: the text, with or without metadata.
        data: the metadata.
    """
    found = _FRONT.match(card)
    written = yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=float("inf"))
    return f"---\n{written}---\n{card[found.end() :] if found else card}"


def with_base_model(card: str, base: str) -> str:
    """A card for the release of a head alone: its metadata names the base, as an adapter's does.

    Results, examples and emissions of the shipped model, whose base has no name, are left out.

    Args:
        card: the text, with or without metadata.
        base: id of the base on the Hub, such as "HuggingFaceTB/SmolLM3-3B".

    Source: `base_model_relation` is one of adapter, finetune, merge and quantized on the Hub.
    """
    data = {
        key: value for key, value in (yaml.safe_load(front_matter(card)) or {}).items() if key not in OF_THESE_WEIGHTS
    }
    return with_metadata(card, {**data, "base_model": base, "base_model_relation": "adapter"})
