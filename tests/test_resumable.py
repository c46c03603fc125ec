"""Tests of the results that an interrupted evaluation keeps."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.resumable import PartialResults, evaluation_parser

OPTIONS = {"model": "m", "limit": 3}


def test_an_interrupted_run_goes_on_with_what_it_has(tmp_path: Path) -> None:
    first = PartialResults(tmp_path / "a.json", OPTIONS)
    first.put("1", {"right": True, "text": "Zürich\n"})
    second = PartialResults(tmp_path / "a.json", OPTIONS)
    assert len(second) == 1
    assert "1" in second
    assert second["1"] == {"right": True, "text": "Zürich\n"}
    assert "2" not in second


def test_a_finished_run_leaves_the_result_alone(tmp_path: Path) -> None:
    store = PartialResults(tmp_path / "new" / "a.json", OPTIONS)
    store.put("1", 1)
    store.finish({"rows": [1]})
    assert json.loads((tmp_path / "new" / "a.json").read_text(encoding="utf-8")) == {"rows": [1]}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.json"]
    assert len(PartialResults(tmp_path / "new" / "a.json", OPTIONS)) == 0


def test_other_options_are_refused_by_name_and_nothing_is_lost(tmp_path: Path) -> None:
    store = PartialResults(tmp_path / "a.json", OPTIONS)
    store.put("1", 1)
    with pytest.raises(ValueError, match="another limit"):
        PartialResults(tmp_path / "a.json", OPTIONS | {"limit": 4})
    assert PartialResults(tmp_path / "a.json", OPTIONS)["1"] == 1


@given(cut=st.integers(1, 30), texts=st.lists(st.text(), min_size=1, max_size=4))
def test_a_line_cut_off_anywhere_costs_that_part_only(
    cut: int, texts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path_factory.mktemp("cut") / "a.json"
    store = PartialResults(out, OPTIONS)
    for number, text in enumerate(texts):
        store.put(str(number), text)
    whole = store.path.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    store.path.write_bytes(whole[: max(last + 1, len(whole) - cut)])
    again = PartialResults(out, OPTIONS)
    assert [again[str(number)] for number in range(len(again))] == texts[: len(texts) - 1]
    again.put(str(len(texts) - 1), texts[-1])
    assert len(PartialResults(out, OPTIONS)) == len(texts)


def test_a_run_stopped_before_its_first_line_starts_afresh(tmp_path: Path) -> None:
    (tmp_path / "a.partial.jsonl").write_text('{"opt', encoding="utf-8")
    assert len(PartialResults(tmp_path / "a.json", OPTIONS)) == 0


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    store = PartialResults(tmp_path / "a.json", OPTIONS)
    store.path.write_text(
        store.path.read_text(encoding="utf-8") + "nonsense\n" + '{"key": "1", "value": 1}\n', encoding="utf-8"
    )
    with pytest.raises(ValueError, match=r"a\.partial\.jsonl is broken"):
        PartialResults(tmp_path / "a.json", OPTIONS)


def test_all_commands_have_the_same_options() -> None:
    options = evaluation_parser("bfcl", "What it does.", limit=50).parse_args([])
    assert options.limit == 50
    assert options.out.name == "bfcl.json"
    assert {"model", "data", "limit", "seed", "threads", "device", "out"} == set(vars(options))


def test_an_interruption_is_one_message_that_says_what_is_kept(tmp_path: Path) -> None:
    store = PartialResults(tmp_path / "made.json", {})
    store.put("one", 1)
    message = r"Interrupted: 1 answers are kept in .*made\.partial\.jsonl"
    with pytest.raises(SystemExit, match=message), store.kept_when_interrupted("answers"):
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="other"), store.kept_when_interrupted():
        raise ValueError("other")
    assert PartialResults(tmp_path / "made.json", {})["one"] == 1
