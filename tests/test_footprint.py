"""Sizes are counted as they are, agreement is counted request by request, and the command measures from end to end."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from repo_package import ROOT
from training.data import Row

# The metrics are an extra of the evaluation environment.
pytest.importorskip("evaluate")

from eval import footprint
from eval.footprint import VARIANTS, Variant
from eval.held_out import Request

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def call(city: Any) -> dict[str, Any]:
    return {"name": "get_weather", "arguments": {"city": city}}


def answered(calls: list[Any], ms: float, same: bool = True, gap: float | None = None) -> dict[str, Any]:
    """What a variant made of a request; `ar` needs twice the time and one forward more."""
    reply = [1, 2] if calls else []
    return {
        "verified": {"calls": calls, "reply": reply, "base_forwards": 2, "ms": ms},
        "ar": {"calls": calls, "reply": reply if same else [1, 3], "base_forwards": 3, "ms": 2 * ms},
        "gap": gap,
    }


# --------------------------------------------------------------- sizes


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if not variant.compiled])
def test_sizes_on_paper_are_those_in_memory_and_on_disk(name: str) -> None:
    variant = VARIANTS[name]
    if variant.bits:
        pytest.importorskip("bitsandbytes")
    with torch.device("meta"):
        config = footprint.configuration.SmolLMDiffusionConfig.from_pretrained(ROOT)
        empty = footprint.modeling.SmolLMDiffusionForCausalLM(config)
    paper = footprint.bytes_on_paper(empty, getattr(torch, variant.dtype), variant.bits)
    model = footprint.opened(str(ROOT), "cpu", variant)
    assert paper["all"] == paper["base"] + paper["head"]
    assert footprint.bytes_in_memory(model) == pytest.approx(paper["all"], rel=0.005)
    assert footprint.bytes_on_disk(model) == pytest.approx(paper["all"], rel=0.01)


def test_the_3b_has_the_weights_that_it_is_known_for() -> None:
    paper = footprint.smollm3_on_paper(list(VARIANTS.values()))
    assert paper["base_weights"] == 3_075_098_624
    assert paper["bytes"]["float32"]["base"] == 4 * paper["base_weights"]
    assert paper["bytes"]["bfloat16"]["head"] == 2 * paper["head_weights"]
    assert "float32, compiled" not in paper["bytes"]
    sizes = [paper["bytes"][name]["base"] for name in ("bfloat16", "8 bits, head bfloat16", "4 bits, head bfloat16")]
    assert sizes == sorted(sizes, reverse=True)


def test_memory_of_a_piece_of_work_is_the_most_that_it_holds_at_one_time() -> None:
    def work() -> None:
        first = torch.zeros(1_000_000)
        second = torch.zeros(2_000_000)
        del first, second
        torch.zeros(2_500_000)

    assert footprint.working_bytes(work, torch.device("cpu")) == 12_000_000


# --------------------------------------------------------------- replies


def test_agreement_and_ratios_are_those_of_single_requests() -> None:
    todo = [Request(Row(str(n), "test", [1], [], [TOOL], [], [])) for n in range(4)]
    reference = [answered([call("Oslo")], 100), answered([call("Rome")], 10), answered([], 10), answered([], 10)]
    rows = [
        answered([call("Oslo")], 150),
        answered([call("Paris")], 900, same=False, gap=0.25),
        answered([], 10),
        answered([call(7)], 10),
    ]
    found = footprint.summary(rows, reference, todo)
    assert (found["requests"], found["same_route"], found["same_calls"], found["valid"]) == (4, 3, 2, 3)
    assert (found["same_tokens"], found["largest_gap"], found["compared"]) == (3, 0.25, 1)
    assert found["verified"] == {"ms": 150, "of_float32": 1.5, "base_forwards": 2}
    assert found["ar"] == {"ms": 300, "of_float32": 3.0, "base_forwards": 3}


def test_times_are_left_out_where_no_call_can_be_compared() -> None:
    todo = [Request(Row("0", "test", [1], [], [TOOL], [], []))]
    found = footprint.summary([answered([], 5)], [answered([call("Oslo")], 5)], todo)
    assert found["verified"] == {"ms": None, "of_float32": None, "base_forwards": None}


def test_the_gap_is_that_of_the_tokens_where_replies_first_differ() -> None:
    seen = []

    def model(ids: torch.Tensor) -> Any:
        seen.append(ids.tolist())
        return SimpleNamespace(logits=torch.tensor([[[0.0, 1.0, 4.0, 2.5]]]))

    model.device = "cpu"  # type: ignore[attr-defined]
    assert footprint.logit_gap(model, [9], [5, 2, 6], [5, 3, 7]) == 1.5
    assert seen == [[[9, 5]]]
    assert footprint.logit_gap(model, [9], [5, 2], [5, 2]) is None
    assert footprint.logit_gap(model, [9], [5, 2], []) is None


# --------------------------------------------------------------- the command


def test_the_command_measures_made_up_requests_where_there_are_no_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("bitsandbytes")
    out, name = tmp_path / "found.json", "4 bits, head bfloat16"
    footprint.main(["--data", str(tmp_path), "--limit", "1", "--variants", name, "--threads", "1", "--out", str(out)])
    results = json.loads(out.read_text())
    assert results["requests"] == "1 made up"
    assert list(results["variants"]) == ["float32", name]
    reference, small = results["variants"].values()
    assert reference["same_tokens"] == reference["same_calls"] == reference["valid"] == small["valid"] == 1
    assert small["memory"] < 0.4 * reference["memory"]
    printed = capsys.readouterr().out
    assert all(paragraph in printed for paragraph in footprint.body(results))
    assert not list(tmp_path.glob("*.partial.jsonl"))


def test_tables_say_what_compiling_took_and_what_was_not_compiled() -> None:
    row = {"disk": 2**20, "memory": 2**20, "working": 0, "first_pass_s": 90.4, "second_pass_s": 2.0}
    row |= footprint.summary(
        [answered([call("Oslo")], 5)],
        [answered([call("Oslo")], 5)],
        [Request(Row("0", "test", [1], [], [TOOL], [], []))],
    )
    compiled = {**row, "graphs": 3, "off": {"head": "no compiler"}}
    paper = footprint.smollm3_on_paper([VARIANTS["float32"]])
    text = "\n".join(
        footprint.body(
            {"variants": {"float32": row, "float32, compiled": compiled}, "requests": "1 made up", "smollm3_3b": paper}
        )
    )
    assert "3 shapes were compiled in the first pass, which took 90 s" in text
    assert "the head is not: no compiler" in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["--device", "abacus"], "--device abacus"), (["--model", "/nowhere"], "nowhere"), (["--limit", "-1"], "2")],
)
def test_what_cannot_be_measured_is_refused_in_words(arguments: list[str], says: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=says):
        footprint.main(["--data", str(tmp_path), "--out", str(tmp_path / "found.json"), *arguments])


def test_a_variant_says_how_a_user_asks_for_it() -> None:
    arguments = Variant("", "bfloat16", bits=4).arguments("cpu")
    assert arguments["dtype"] is torch.bfloat16
    assert arguments["quantization_config"].load_in_4bit
    assert Variant("", "float32").arguments("cpu") == {"dtype": torch.float32}


def test_the_docs_say_what_was_measured() -> None:
    result = json.loads((ROOT / "eval" / "results" / "footprint.json").read_text(encoding="utf-8"))
    page = " ".join((ROOT / "docs" / "smaller.md").read_text(encoding="utf-8").split())
    found = result["variants"]
    changed = {name: row["requests"] - row["same_calls"] for name, row in found.items()}
    eight, four = ([f"{bits} bits, head {head}" for head in ("float32", "bfloat16")] for bits in (8, 4))
    assert len({changed[name] for name in four}) == 1
    said = f"bfloat16 changed the calls of {changed['bfloat16']}, 8 bits those of {changed[eight[0]]} and "
    assert f"Of 24 requests {said}{changed[eight[1]]}, 4 bits those of {changed[four[0]]}," in page
    times = [f"{found[name]['verified']['of_float32']:.1f}" for name in ("bfloat16", *eight, *four)]
    assert f"bfloat16 took {times[0]} times as long, 8 bits {times[1]} and {times[2]} times" in page
    assert f"4 bits {times[3]} and {times[4]} times" in page
