"""The model card: its metadata can be read, and its figures are those that the committed measurement wrote."""

import json
import re

from huggingface_hub import ModelCard

from eval.held_out_tables import tables
from repo_package import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
COSTS = json.loads((ROOT / "eval" / "results" / "bench_decoding.json").read_text(encoding="utf-8"))
RESULTS = json.loads((ROOT / "eval" / "results" / "held_out.json").read_text(encoding="utf-8"))


def test_the_card_has_the_metadata_that_the_hub_reads() -> None:
    data = ModelCard.load(ROOT / "README.md").data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "text-generation", "apache-2.0")


def test_the_tables_of_held_out_requests_are_those_that_its_command_prints() -> None:
    """`python -m eval.held_out --markdown` prints them; no other table of the card is of their kind."""
    printed = tables(RESULTS)
    shown = re.findall(r"(?:^\|.*\|$\n?)+", README, re.MULTILINE)
    kinds = ("| set", "| category")
    assert printed
    assert [table.rstrip("\n") for table in shown if table.startswith(kinds)] == printed


def test_the_costs_are_those_that_were_measured() -> None:
    decodings = COSTS["sets"]["simple_python"]["decodings"]
    lines = [line.strip("| ").split(" | ") for line in README.splitlines()]
    shown = {cells[0]: cells[1:] for cells in lines if cells[0] in decodings and len(cells) == 7}
    assert shown == {
        name: [
            f"{row['base_forwards']['mean']:.1f}",
            f"{row['base_forwards']['p50']}",
            f"{row['head_forwards']:.1f}",
            f"{row['times_ar']:.2f}",
            f"{row['valid']} of {row['requests']}",
            f"{row['same_arguments_as_ar']}",
        ]
        for name, row in decodings.items()
    }


def test_the_commands_of_the_measurements_are_shown() -> None:
    assert RESULTS["command"] in README
    assert COSTS["command"] in README
    for path in (ROOT / "eval" / "results").glob("bench_decoding_simulation*.json"):
        assert json.loads(path.read_text(encoding="utf-8"))["command"] in README


def test_no_placeholder_is_left() -> None:
    assert not re.findall(r"@@\w+@@", README)
