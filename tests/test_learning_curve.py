"""The learning curve of a run: which evaluations it shows, at what cost, and what its command writes."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from eval import learning_curve
from eval.learning_curve import curve, state_file, table


def log_line(step: int, rows_per_second: float = 2.0, tokens_per_second: int = 100) -> dict[str, Any]:
    rates = {"rows_per_second": rows_per_second, "tokens_per_second": tokens_per_second}
    return {"step": step, "loss": 1.0, "reply_loss": 0.9, **rates}


def evaluation(step: int, loss: float, **others: float) -> dict[str, Any]:
    return {"step": step, "eval_seconds": 3.0, "eval_seen_loss": loss, **others}


def state(steps: int, *lines: dict[str, Any]) -> dict[str, Any]:
    return {"global_step": steps, "log_history": list(lines)}


FIRST = state(
    20, log_line(10), evaluation(10, 2.0), log_line(20, 4.0, 300), evaluation(20, 1.5), {"step": 20, "train_loss": 1.0}
)
SECOND = state(10, log_line(10, 1.0, 50), evaluation(10, 1.23456, eval_unseen_exact=0.25))


def written(folder: Path, content: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "trainer_state.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_seconds_and_tokens_add_up_over_runs() -> None:
    found = curve([FIRST, SECOND], [12, 6])
    # 10 steps of 12 rows at 2 and at 4 rows a second are 60 and 30 s; 10 of 6 rows at 1 row a second are 60 s.
    assert [(point.run, point.step, point.minutes) for point in found.points] == [
        (0, 10, 1),
        (0, 20, 1.5),
        (1, 30, 2.5),
    ]
    assert [point.tokens for point in found.points] == [6000, 15000, 18000]
    assert (found.steps, found.tokens, found.minutes) == (30, 18000, 2.5)
    assert found.points[0].metrics == {"seen_loss": 2.0}, "the seconds of an evaluation are no measure of the model"
    assert found.points[2].metrics == {"seen_loss": 1.2346, "unseen_exact": 0.25}


def test_the_steps_behind_the_last_evaluation_count_in_the_totals() -> None:
    found = curve([state(25, log_line(10), evaluation(10, 2.0), log_line(25))], [12])
    assert (found.points[-1].minutes, found.minutes, found.steps) == (1, 2.5, 25)


def test_without_the_rows_of_a_step_neither_time_nor_tokens_are_told() -> None:
    found = curve([FIRST], None)
    assert (found.tokens, found.minutes, found.points[0].tokens) == (None, None, None)
    assert table(found).splitlines()[0] == "| step | seen loss |"
    assert table(found).splitlines()[-1] == "In all 20 steps."


def test_the_table_shows_every_measure_and_leaves_a_gap_where_one_is_missing() -> None:
    assert table(curve([FIRST, SECOND], [12, 6])).splitlines() == [
        "| step | tokens | minutes | seen loss | unseen exact |",
        "|---|---|---|---|---|",
        "| 10 | 0.01M | 1 | 2.000 |  |",
        "| 20 | 0.01M | 2 | 1.500 |  |",
        "| 30 | 0.02M | 2 | 1.235 | 0.250 |",
        "",
        "In all 30 steps, 0.02M tokens, 2 minutes.",
    ]


def test_log_lines_without_a_rate_are_an_error_that_names_the_step() -> None:
    with pytest.raises(ValueError, match="Run 0, step 10: rows_per_second is 0"):
        curve([state(10, log_line(10, 0.0))], [12])


def test_a_run_that_goes_on_is_read_at_its_newest_checkpoint_and_a_finished_one_at_its_end(tmp_path: Path) -> None:
    for step in (800, 1000, 90):
        written(tmp_path / f"checkpoint-{step}", FIRST)
    assert state_file(tmp_path).parent.name == "checkpoint-1000"
    end = written(tmp_path, FIRST)
    assert state_file(tmp_path) == state_file(end) == end
    with pytest.raises(FileNotFoundError, match=r"there is no trainer_state\.json"):
        state_file(tmp_path / "elsewhere")


def test_the_command_prints_the_table_and_writes_the_points(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    runs = [str(written(tmp_path / name, content)) for name, content in (("a", FIRST), ("b", SECOND))]
    out, png = tmp_path / "out" / "curve.json", tmp_path / "curve.png"
    learning_curve.main([*runs, "--rows_per_step", "12", "6", "--out", str(out), "--png", str(png)])
    printed = capsys.readouterr()
    assert printed.out.rstrip("\n") == table(curve([FIRST, SECOND], [12, 6]))
    assert "pip install matplotlib" in printed.err
    assert not png.exists()
    found = json.loads(out.read_text(encoding="utf-8"))
    assert (found["rows_per_step"], found["steps"], found["tokens"], found["minutes"]) == ([12, 6], 30, 18000, 2.5)
    last = {"run": 1, "step": 30, "tokens": 18000, "minutes": 2.5, "seen_loss": 1.2346, "unseen_exact": 0.25}
    assert found["points"][-1] == last


@pytest.mark.parametrize("rows", [["0"], ["1", "2"], ["1", "2", "3", "4"]])
def test_other_counts_of_rows_are_refused(tmp_path: Path, rows: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    path = str(written(tmp_path, FIRST))
    with pytest.raises(SystemExit):
        learning_curve.main([path, path, path, "--rows_per_step", *rows])
    assert "--rows_per_step takes one number from 1 on" in capsys.readouterr().err


def test_a_run_without_an_evaluation_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        learning_curve.main([str(written(tmp_path, state(10, log_line(10))))])
    assert "there is no evaluation yet" in capsys.readouterr().err


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "docs" / "curve.png"
    assert learning_curve.picture(curve([FIRST, SECOND], [12, 6]), path)
    assert path.read_bytes().startswith(b"\x89PNG")
