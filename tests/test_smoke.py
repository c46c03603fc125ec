"""The small training run from end to end, and what its command makes of a check that fails."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from repo_package import ROOT
from training import smoke
from training.data import RowStream, held_out_records
from training.head_evaluation import evaluation_sets
from training.smoke import Check


@pytest.mark.slow
@pytest.mark.timeout(1800)  # two minutes on two idle cores
def test_everything_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert smoke.main(["--output", str(tmp_path)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("PASS", "FAIL"))]
    assert len(lines) == 8
    assert all(line.startswith("PASS") for line in lines)


def test_the_best_checkpoint_is_chosen_by_requests_of_seen_tools_that_are_not_trained_on(tmp_path: Path) -> None:
    smoke.make_data(tmp_path, train_records=60, dev_records=30)
    tokenizer = AutoTokenizer.from_pretrained(ROOT, trust_remote_code=False)
    sets = evaluation_sets([tmp_path], tokenizer, 5)
    assert [(name, len(rows)) for name, rows in sets.items()] == [("seen", 5), ("unseen", 5)]
    held_out = {record["messages"][0]["content"] for record in held_out_records(tmp_path)}
    stream = RowStream(tmp_path, tokenizer)
    assert stream.skipped["held out"] >= len(held_out)
    drawable = [stream.dataset[int(index)]["messages"] for pool in stream.pools.values() for index in pool]
    assert drawable
    assert not any(text in str(messages) for text in held_out for messages in drawable)


def test_a_check_that_fails_is_shown_and_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [Check("this holds", True, "1"), Check("that holds", False, "0 of 2")]
    monkeypatch.setattr(smoke, "smoke", lambda folder: iter(found))
    assert smoke.main([]) == 1
    assert "PASS  this holds: 1\nFAIL  that holds: 0 of 2\n1 of 2 hold" in capsys.readouterr().out


def test_a_folder_with_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit):
        smoke.main(["--output", str(tmp_path)])
