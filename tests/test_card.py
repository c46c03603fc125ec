"""The metadata of the card: what the Hub reads, what the shipped model really answers, no base it was not made of."""

import json
import re
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData, metadata_load
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval import card
from eval.report import read_results
from eval.widget import EXAMPLES, answered, body
from repo_package import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
BODY = "\n# A model\n\n---\nA rule above,\ttabs and spaces  \n"


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    found = metadata_load(ROOT / "README.md")
    assert found is not None
    return found


def test_the_metadata_is_complete(data: dict[str, Any]) -> None:
    plain = ("license", "language", "library_name", "pipeline_tag", "tags", "datasets", "metrics")
    assert all(data[name] for name in (*plain, "co2_eq_emissions", "widget", "model-index"))
    assert len(set(data["tags"])) == len(data["tags"])
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").lstrip().startswith("Apache License")


def test_the_shipped_weights_name_no_base(data: dict[str, Any]) -> None:
    config = json.loads((ROOT / "config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] is None
    assert not {"base_model", "base_model_relation"} & data.keys()


def test_the_model_in_this_repository_answers_the_widgets_examples_as_the_card_says(data: dict[str, Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ROOT, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(ROOT, trust_remote_code=True, dtype=torch.float32).eval()
    assert [answered(model, tokenizer, example) for example in EXAMPLES] == data["widget"]


def test_every_example_is_one_that_the_hub_shows(data: dict[str, Any]) -> None:
    for example in data["widget"]:
        assert ("messages" in example) != ("text" in example)
        assert all(isinstance(message["content"], str) for message in example.get("messages", []))
        assert isinstance(example["output"]["text"], str)
        assert "<|im_end|>" not in example["output"]["text"]
    called = [one["output"]["text"] for one in data["widget"] if "<tool_call>" in one["output"]["text"]]
    assert len(called) >= 3
    assert len(called) < len(data["widget"])


def test_the_table_of_the_examples_shows_requests_tools_and_answers() -> None:
    table = body(read_results(ROOT)["widget"])[1]
    answer = '`<tool_call> {"name": "get_weather", "arguments": {"city": "Lisbon"}} </tool_call>`'
    assert f"| A call | What is the weather in Lisbon? | `get_weather` | {answer} |" in table
    assert len(table.splitlines()) == 2 + len(EXAMPLES)


def test_the_minutes_behind_the_emissions_are_those_of_the_training_tables() -> None:
    text = (ROOT / "training" / "README.md").read_text(encoding="utf-8")
    base = [int(minutes) for minutes in re.findall(r"^\| base, \w+ \| [\d.]+M \| (\d+) \|", text, re.MULTILINE)]
    head = re.findall(r"^\| head \| +\| ([\d +]+) \|", text, re.MULTILINE)
    assert {"base": sum(base), "head": sum(map(int, head[0].split(" + ")))} == card.TRAINING_MINUTES


def test_emissions_follow_from_minutes_and_the_stated_assumptions() -> None:
    made = card.emissions()
    hours = sum(card.TRAINING_MINUTES.values()) / 60
    assert card.energy_kwh() == pytest.approx(hours * 2 * 10 / 1000)
    assert made["emissions"] == round(hours * 2 * 10 / 1000 * 475)
    assert all(word in made["source"] for word in ("estimate", f"{hours:g} hours", "10 W", "475 g/kWh", "assumed"))


@pytest.mark.parametrize("front", ["", "---\ntags:\n- old\n---\n"])
def test_metadata_is_replaced_and_the_text_stays(front: str) -> None:
    prompt = "<|im_start|>system\n\n  two  spaces\n"
    made = card.with_metadata(front + BODY, {"license": "mit", "widget": [{"text": prompt}], "one": "a: b"})
    loaded = ModelCard(made)
    assert loaded.text == BODY
    assert loaded.data.to_dict() == {"license": "mit", "widget": [{"text": prompt}], "one": "a: b"}
    assert "text: |\n" in made
    assert card.with_metadata(made, loaded.data.to_dict()) == made


def test_tools_take_one_line_each_and_texts_as_many_as_they_have() -> None:
    tool = {"type": "function", "function": {"name": "find", "parameters": {"enum": ["a, b", "c: d", "é"]}}}
    example = {"messages": [{"role": "user", "content": "x"}], "tools": [tool, tool], "output": {"text": "a\nb"}}
    made = card.with_metadata("", card.metadata({"widget": {"examples": [example]}}))
    lines = [line for line in made.splitlines() if "function: {" in line]
    assert len(lines) == 2
    assert "text: |-\n      a\n      b\n" in made
    assert ModelCard(made).data.to_dict()["widget"] == [example]


def test_a_release_of_a_head_names_its_base_and_claims_nothing_of_the_shipped_model() -> None:
    made = card.with_base_model(README, "HuggingFaceTB/SmolLM3-3B")
    loaded, shipped = ModelCard(made), ModelCard(README)
    assert isinstance(loaded.data, ModelCardData)
    assert loaded.text == shipped.text
    data = loaded.data.to_dict()
    assert data["base_model"] == "HuggingFaceTB/SmolLM3-3B"
    assert data["base_model_relation"] == "adapter"
    assert data["pipeline_tag"] == "text-generation"
    assert not set(card.OF_THESE_WEIGHTS) & data.keys()
    assert card.with_base_model(made, "other/base") == made.replace("HuggingFaceTB/SmolLM3-3B", "other/base", 1)


def test_a_card_without_metadata_can_name_a_base_too() -> None:
    assert ModelCard(card.with_base_model(BODY, "a/b")).data.to_dict() == {
        "base_model": "a/b",
        "base_model_relation": "adapter",
    }


def test_nothing_measured_means_no_results_and_no_examples() -> None:
    assert not {"widget", "model-index"} & card.metadata({}).keys()
