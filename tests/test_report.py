"""The report: texts and pictures follow from the result files, and what is out of step is named."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results

from eval import report, report_tables
from eval.card import MODEL_NAME
from eval.decoding_ablation import RATES, TIMES
from eval.report_plots import PLOTS, Plot

VERSIONS = {"python": "3.11.7", "torch": "2.13.0"}
FRONT = "---\nlicense: apache-2.0\ntags:\n- tool-use\n---\n"


def spread(value: float) -> dict[str, float]:
    return {"mean": value, "p50": value, "p90": value, "p95": value, "p99": value}


def compared(forwards: float, ms: float, **more: Any) -> dict[str, Any]:
    counts: dict[str, Any] = {
        "requests": 4,
        "exact": 1,
        "calls_exact": 1,
        "calls_wanted": 4,
        "ast": 2,
        "ast_of": 4,
        "valid": 3,
    }
    counts |= {"calls_missing": 0, "calls_unwanted": 0, "cut": 0, "same_tokens_as_ar": None}
    costs = {"base_forwards_per_call": forwards, "base_forwards": spread(forwards), "head_forwards": spread(0)}
    return {**counts, **costs, "tokens": spread(20), "ms": spread(ms), "hallucination_rate": 0.125, **more}


def compare() -> dict[str, Any]:
    decodings = {
        "raw": compared(30, 300),
        "engine+jump": compared(12, 90),
        "engine+jump+lookup": compared(2.5, 95, valid=4),
        "engine": compared(31, 200),
        "ar": compared(14, 100, same_tokens_as_ar=4),
        "verified+head": compared(3, 120, same_tokens_as_ar=4),
    }
    counts = {"requests": 4, "left_out": 0, "answered_by_all_with_a_call": 3, "hallucinated_gold": 0.05}
    found = {**counts, "compile_ms": {"engine": spread(5)}, "decodings": decodings}
    return {"command": "python -m eval.compare --limit 4", "notes": {"costs": "A note."}, "sets": {"multiple": found}}


def bfcl() -> dict[str, Any]:
    row = {"requests": 8, "right": 6, "accuracy": 0.75, "interval": [0.5, 1.0], "called": 7, "refused": 0, "cut": 1}
    row |= {"calls_of_ar": 8, "base_forwards": 3.5, "head_forwards": 1.0, "median_ms": 80.0, "faults": {"value": 2}}
    return {
        "command": "python -m eval.bfcl",
        "data": "made up",
        "bootstrap_draws": 10,
        "categories": {"multiple": {"verified": row}},
        "groups": {"verified": {"overall": {"accuracy": 0.75, "interval": [0.5, 1.0], "of": ["multiple"]}}},
        "decisions": {"verified": {"called where wanted": [7, 8], "not called where unwanted": None}},
    }


def held_out() -> dict[str, Any]:
    rates = {"drafted_slots": 10, "accepted_slots": 4, "slot_acceptance": 0.4, "token_acceptance": 0.5}
    counts = {"requests": 5, "right": 4, "calls_wanted": 5, "calls_right": 4, "valid": 5, "values_right": 0.5}
    counts |= {"base_forwards_per_call": 2.5, "head_forwards_per_call": 1.0, "slots_accepted": 0.4, "median_ms": 70.0}
    kinds = {"accepted_by_kind": {"string": rates}, "right_by_kind": {"string": {"slots": 10, "exact_match": 0.5}}}
    return {"command": "python -m eval.held_out", "threads": 2, "sets": {"seen": {"verified": {**counts, **kinds}}}}


def bench_decoding() -> dict[str, Any]:
    row = {"requests": 6, "base_forwards": spread(4), "base_forwards_where_nobody_is_cut": None, "head_forwards": 1.0}
    row |= {"ms": spread(50), "times_ar": 0.5, "times_ar_behind_prefill": 0.4, "valid": 6, "same_arguments_as_ar": 6}
    row |= {"same_tokens_as_ar": 6, "accepted": 0.75, "cut": 0}
    sets = {"simple_python": {"requests": 6, "decodings": {"verified, head": row}}}
    return {"command": "python -m eval.bench_decoding", "counting": "How it was counted.", "sets": sets}


def latency() -> dict[str, Any]:
    def row(slots: int, decoding: str, ms: float) -> dict[str, Any]:
        cell = {"slots": slots, "decoding": decoding, "mode": "warm", "ms": {**spread(ms), "min": ms, "max": ms}}
        rates = {"calls_per_second": 9.0, "tokens_per_second": 99.0, "base_forwards": 2.0, "head_forwards": 4.0}
        return {**cell, **rates, "of_ar": None, "accepted": 1.0, "first_ms": 200.0, "phases_ms": {"draft": ms}}

    rows = [row(slots, name, ms * slots) for slots in (1, 4) for name, ms in (("verified", 5.0), ("ar", 20.0))]
    return {
        "command": "python -m eval.latency",
        "model": "a model",
        "device": "cpu",
        "dtype": "float32",
        "method": "How.",
        "versions": VERSIONS,
        "start": {"load_s": 1.0, "vocabulary_s": 0.5, "first_ms": 300.0},
        "left_out": {"mode CUDA graphs": "no CUDA device"},
        "not_compiled": {},
        "factors": {"slots": rows, "batch": []},
    }


def chat() -> dict[str, Any]:
    same, times = {"compared": 9, "different": 0}, {"model": 2.0, "base": 1.9, "ratio": 1.05}
    row = {
        "model": "as loaded",
        "group": "chat",
        "tools": "none",
        "prompts": 3,
        "ties": 0,
        "decisions": {"both talk": 3},
    }
    row |= {"forward": same, "steps": same, "tokens": same, "forward_ms": times, "reply_ms": times}
    whole = {"base": "its own", "prompts": 3, "differences": 0, "weights": {"as loaded": same}, "rows": [row]}
    return {"command": "python -m eval.chat", **whole}


def decision() -> dict[str, Any]:
    bins = [{"low": low, "high": low + 0.5, "count": 5, "confidence": low + 0.2, "accuracy": low} for low in (0.0, 0.5)]
    way: dict[str, Any] = {"auc": 0.9, "relevance": 0.8, "irrelevance": 0.7, "balanced_accuracy": 0.75, "ece_15": 0.1}
    way |= {"roc": [[0.0, 0.0], [0.2, 0.8], [1.0, 1.0]], "bins": bins}
    return {"command": "python -m eval.decision", "models": {".": {"sets": {"seen": {"prompts": 10, "0.5": way}}}}}


def decoding_ablation() -> dict[str, Any]:
    def choice(value: float, **more: Any) -> dict[str, Any]:
        cell = {"value": value, "interval": [value - 0.1, value + 0.1], **more}
        return {"broken_values": [0, 0], **dict.fromkeys((*RATES, *TIMES), cell)}

    other = {"difference": 0.1, "difference_interval": [0.05, 0.15]}
    choices = {"defaults": choice(0.5), "steps 8": choice(0.6, **other), "steps 1": choice(0.4, **other)}
    return {
        "command": "python -m eval.decoding_ablation",
        "defaults": {"num_diffusion_steps": 4},
        "sets": {"unseen": {"requests": 5, "choices": choices}},
        "together": {"requests": 5, "choices": choices},
    }


def ablation() -> dict[str, Any]:
    names = [f"{place}_{column}" for place in ("seen", "unseen") for column in ("acceptance", "slots_right")]
    heads = [{"name": name, "measures": dict.fromkeys(names, 0.5)} for name in ("defaults", "lr 0.02")]
    return {"command": "python -m eval.ablation", "versions": VERSIONS, "heads": heads}


def widget() -> dict[str, Any]:
    tool = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}
    asked = {"example_title": "A call", "messages": [{"role": "user", "content": "find it"}], "tools": [tool]}
    answer = {"text": "<tool_call>\n{}\n</tool_call>"}
    return {"command": "python -m eval.widget", "examples": [{**asked, "output": answer}]}


def audit() -> dict[str, Any]:
    counts = {"exact": 2, "near": 1, "shows": 4, "calls": 3, "twins": 1}
    drop = {"request": 3, "tool": 4}
    return {
        "command": "python -m training.audit overlap",
        "settings": {"ngram": 8},
        "totals": {"training_records": 1000, "evaluation_records": 50, **counts, "drop": drop},
        "training": {"train/a": {"records": 1000, **counts, "drop": drop}},
        "evaluation": {"dev/dev": {"records": 50, **counts, "shared_tools": ["find"]}},
    }


def of_another(module: str) -> dict[str, Any]:
    """A result whose tables are made, and tested, beside its command."""
    return {"command": f"python -m eval.{module} --limit 4", "made by": module}


RESULTS: dict[str, Callable[[], dict[str, Any]]] = {
    "compare": compare,
    "bfcl": bfcl,
    "held_out": held_out,
    "bench_decoding": bench_decoding,
    "latency": latency,
    "latency_smollm3_3b": latency,
    "footprint": lambda: of_another("footprint"),
    "footprint_compiled": lambda: of_another("footprint"),
    "load_test": lambda: of_another("load_test"),
    "tool_retrieval": lambda: of_another("tool_retrieval"),
    "chat": chat,
    "decision": decision,
    "decoding_ablation": decoding_ablation,
    "ablation": ablation,
    "widget": widget,
    "audit": audit,
}


def readme(front: str = FRONT) -> str:
    parts = [f"<!-- results: {name} -->\nold\n<!-- end of results: {name} -->" for name in report.in_card()]
    return front + "\n# A model\n\n" + "\n\n- kept  \n\n".join(parts) + "\n\nThe end,\twithout more\n"


@pytest.fixture(autouse=True, scope="module")
def _tables_of_others() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, make in RESULTS.items():
            if "made by" in make():
                section = replace(report.SECTIONS[name], body=lambda found: [f"Shown by {found['made by']}."])
                patch.setitem(report.SECTIONS, name, section)
        yield


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of a README and all results; pictures are empty files, which is faster."""
    monkeypatch.setattr(Plot, "save", lambda _plot, _numbers, path: touch(path))
    (tmp_path / "README.md").write_text(readme())
    for name, make in RESULTS.items():
        put(tmp_path, name, make())
    return tmp_path


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def put(root: Path, name: str, result: Any) -> None:
    path = root / "eval" / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result))


def run(root: Path, *more: str) -> None:
    report.main(["--root", str(root), *more])


def out_of_step(root: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What `--check` prints where it ends with status 1."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run(root, "--check")
    assert ended.value.code == 1
    return capsys.readouterr().out


def test_every_result_has_a_section_with_its_command_and_is_in_step_afterwards(root: Path) -> None:
    assert RESULTS.keys() == report.SECTIONS.keys()
    run(root)
    text = (root / "docs" / "evaluation.md").read_text()
    assert "Not measured" not in text
    for name, section in report.SECTIONS.items():
        assert f"## {section.title}\n\n```console\n$ {RESULTS[name]()['command']}\n```" in text
    assert "Measured with python 3.11.7, torch 2.13.0, cpu, float32." in text
    assert text.count("<details>") == text.count("</details>")
    run(root, "--check")


def test_the_same_results_give_the_same_texts_and_pictures(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}

    run(root)
    first = files()
    pictures = [content for path, content in first.items() if path.suffix == ".png"]
    assert len(pictures) == len(PLOTS)
    assert all(content.startswith(b"\x89PNG") and len(content) > 5000 for content in pictures)
    run(root)
    assert files() == first


def test_the_readme_is_replaced_between_its_marks_only(root: Path) -> None:
    run(root)
    text = (root / "README.md").read_text()
    for name in report.in_card():
        part = report.block(text, name)
        assert "old" not in part[1]
        text = text[: part.start(1)] + "old\n" + text[part.end(1) :]
    assert text.partition("\n---\n")[2] == readme().partition("\n---\n")[2]


def test_what_is_out_of_step_is_named(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(root)
    changed = held_out()
    changed["sets"]["seen"]["verified"]["right"] = 3
    put(root, "held_out", changed)
    (root / "docs" / "plots" / "steps.png").unlink()
    said = out_of_step(root, capsys)
    assert "README.md: the part `held_out`" in said
    assert "README.md: the metadata" in said
    assert "docs/evaluation.md: Held-out requests" in said
    assert "docs/plots/steps.png is missing" in said
    assert "`compare`" not in said
    assert "Latency" not in said


def test_a_figure_typed_by_hand_is_found(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(root)
    path = root / "README.md"
    path.write_text(path.read_text().replace("| 4 of 5 |", "| 5 of 5 |", 1))
    assert "README.md: the part `held_out`" in out_of_step(root, capsys)
    run(root)
    path.write_text(path.read_text().replace("value: 0.75", "value: 0.95"))
    said = out_of_step(root, capsys)
    assert "README.md: the metadata" in said
    assert "the part" not in said


def test_an_answer_of_the_widget_that_the_model_did_not_give_is_found(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(root)
    path = root / "README.md"
    assert "    <tool_call>\n      {}\n" in path.read_text()
    path.write_text(path.read_text().replace("      {}\n", "      {1}\n"))
    assert "README.md: the metadata" in out_of_step(root, capsys)


def test_check_writes_nothing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "docs/evaluation.md: " in out_of_step(root, capsys)
    assert (root / "README.md").read_text() == readme()
    assert not (root / "docs").exists()


def test_a_missing_result_is_one_line_with_the_command_that_makes_it(root: Path) -> None:
    run(root)
    (root / "eval" / "results" / "compare.json").unlink()
    run(root)
    line = "Not measured: `python -m eval.compare` makes `eval/results/compare.json`."
    assert report.block((root / "README.md").read_text(), "compare")[1] == f"{line}\n"
    text = (root / "docs" / "evaluation.md").read_text()
    assert line in text
    assert "forwards.png" not in text
    assert not (root / "docs" / "plots" / "forwards.png").exists()


def test_a_broken_result_is_named_with_the_command_that_makes_it(root: Path) -> None:
    path = root / "eval" / "results" / "chat.json"
    path.write_text('{"rows": [')
    with pytest.raises(SystemExit, match=r"chat\.json is no JSON.*python -m eval\.chat"):
        run(root)
    put(root, "chat", {"rows": []})
    with pytest.raises(SystemExit, match=r"chat\.json lacks.*'weights'.*python -m eval\.chat"):
        run(root)
    assert (root / "README.md").read_text() == readme()


def test_a_readme_without_a_part_or_with_a_part_of_no_result_is_refused(root: Path) -> None:
    path = root / "README.md"
    path.write_text(readme().replace("<!-- end of results: compare -->", ""))
    with pytest.raises(SystemExit, match="0 parts between the lines <!-- results: compare -->"):
        run(root)
    path.write_text(readme() + "<!-- results: weather -->\n<!-- end of results: weather -->\n")
    with pytest.raises(SystemExit, match="parts of no result: weather"):
        run(root)


def test_the_model_index_holds_measured_values_that_the_hub_can_read(root: Path) -> None:
    run(root)
    data = metadata_load(root / "README.md")
    assert data is not None
    assert data["license"] == "apache-2.0"
    name, entries = model_index_to_eval_results(data["model-index"])
    assert name == MODEL_NAME
    values = {(entry.dataset_name, entry.metric_type): entry.metric_value for entry in entries}
    assert values == {
        ("BFCL v4 multiple", "accuracy"): 0.75,
        ("held-out requests, seen tools", "exact_match"): 0.8,
        ("held-out requests, seen tools", "validity"): 1.0,
        ("held-out requests, seen tools", "base_forwards"): 2.5,
    }


def test_nothing_measured_means_no_model_index() -> None:
    card = report.card(readme(), {})
    assert "model-index" not in card
    assert "model_name" not in card
    assert report.card(report.card(readme(), {"bfcl": bfcl()}), {}) == card


def test_the_summary_shows_a_rival_with_fewer_forwards_or_less_time_than_ours() -> None:
    table = report_tables.compare_summary(compare())[1]
    shown = [line.split(" | ")[0].strip("| `") for line in table.splitlines()[2:]]
    assert shown == ["raw", "engine+jump", "engine+jump+lookup", "ar", "verified+head"]
    assert "| `engine+jump+lookup` | 4 of 4 | 2 of 4 | 2.5 | 95 |" in table


def test_an_engine_that_refused_every_request_has_no_line_in_the_summary() -> None:
    result = compare()
    result["sets"]["multiple"]["decodings"]["engine"] = {"requests": 0, "refused": 4}
    assert "`engine`" not in report_tables.compare_summary(result)[1]
    assert "| multiple | `engine` |" in report_tables.compare_body(result)[1]


def test_the_steps_of_a_plot_are_in_order_and_the_defaults_are_among_them() -> None:
    numbers = PLOTS["steps"].read({"decoding_ablation": decoding_ablation()})
    points = numbers["values right"]["unseen"]
    assert [point[0] for point in points] == [1, 4, 8]
    assert points[1] == pytest.approx([4, 50, 40, 60])
    assert PLOTS["steps"].read({}) == {}


def test_a_plot_without_its_numbers_is_left_out() -> None:
    result = decision()
    del result["models"]["."]["sets"]["seen"]["0.5"]["bins"]
    assert PLOTS["calibration"].read({"decision": result}) == {}
    assert PLOTS["calibration"].read({"decision": decision()})["shipped model"]["seen"]["auc"] == 0.9
    assert all(plot.read({}) == {} for plot in PLOTS.values())
