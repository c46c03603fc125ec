"""The model card: its metadata can be read, and its figures are those that the committed measurements wrote."""

import json
import re

from huggingface_hub import ModelCard, metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results

from eval import card, report
from repo_package import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
COSTS = (ROOT / "docs" / "costs.md").read_text(encoding="utf-8")


def test_the_card_has_the_metadata_that_the_hub_reads() -> None:
    data = ModelCard.load(ROOT / "README.md").data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "text-generation", "apache-2.0")


def test_the_results_of_the_metadata_are_those_that_were_measured() -> None:
    measured = card.eval_results(report.read_results(ROOT))
    data = metadata_load(ROOT / "README.md")
    assert data is not None
    assert measured
    assert model_index_to_eval_results(data["model-index"]) == (card.MODEL_NAME, measured)


def test_tables_are_in_step_with_the_committed_results() -> None:
    """`python -m eval.report` brings them in step."""
    assert report.differences(ROOT, report.read_results(ROOT)) == []


def test_all_figures_of_a_result_stand_in_one_place() -> None:
    """A table that was left where it was typed would not be brought in step."""
    outside = README
    for name in report.in_card():
        outside = outside.replace(report.block(README, name)[0], "")
    assert not re.findall(r"^\|.*\| `?(?:verified|diffusion|ar)\b.*\|.*\d+ of \d+", outside, re.MULTILINE)


def test_the_commands_of_the_simulations_are_shown() -> None:
    for path in (ROOT / "eval" / "results").glob("bench_decoding_simulation*.json"):
        assert json.loads(path.read_text(encoding="utf-8"))["command"] in COSTS


def test_no_placeholder_is_left() -> None:
    assert not re.findall(r"@@\w+@@", README)
