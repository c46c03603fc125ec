"""The audit of training records: what it finds in evaluation sets, and splits by tool, on records made here."""

import gzip
import json
import random
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training import audit
from training.audit import RecordTools, RequestIndex, closest_subset
from training.data import DEFAULT_DATA
from training.records import Record, RecordFile

LONG = "Could you book me a table for four at the harbour tavern on Friday evening please"
OTHER = "Which of my unread letters mention the broken boiler in the cellar of number nine"


def record(name: str, text: str, tools: tuple[str, ...] = ("open_door",), calls: tuple[str, ...] = ()) -> Record:
    parameters = {"type": "object", "properties": {"place": {"type": "string"}}}
    return {
        "id": name,
        "source": "tiny",
        "messages": [{"role": "user", "content": text}],
        "tools": [{"type": "function", "function": {"name": tool, "parameters": parameters}} for tool in tools],
        "calls": [{"name": call, "arguments": {}} for call in calls],
    }


def write(path: Path, records: list[Record]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(item) + "\n" for item in records)
    return path


def read(path: Path) -> list[Record]:
    return [item for _, item in RecordFile(path).records()]


def overlap_of(folder: Path, train: list[Record], evaluation: list[Record], **settings: Any) -> audit.Overlap:
    files = [
        RecordFile(write(folder / name / "a.jsonl.gz", items)) for name, items in (("t", train), ("e", evaluation))
    ]
    return audit.overlap(files[:1], files[1:], RequestIndex(**settings))


def cell_of(result: audit.Overlap) -> audit.Cell:
    return result.cells["t/a", "e/a"]


# ---- Overlap

plain_words = st.lists(
    st.text(alphabet="abcdefgstuéßñ0123456789", min_size=1, max_size=6), min_size=5, max_size=12
)  # ß has two capitals, é two spellings
gaps = st.sampled_from([" ", "\t", "\n  ", ", ", " - ", "... ", "/", " (", "_", "\u00a0"])


@given(plain_words, st.data())
def test_case_punctuation_and_white_space_do_not_hide_a_duplicate(parts: list[str], data: st.DataObject) -> None:
    index = RequestIndex()
    index.add(" ".join(parts), 0, "e")
    changed = "".join(
        data.draw(st.sampled_from([part, part.upper(), part.title()])) + data.draw(gaps) for part in parts
    )
    assert [match.kind for match in index.matches(data.draw(gaps) + changed)] == ["exact"]


@given(st.lists(st.sampled_from(LONG.split()), min_size=5, max_size=30))
def test_a_request_inside_a_longer_text_is_a_near_duplicate(before: list[str]) -> None:
    index = RequestIndex()
    index.add(OTHER, 0, "e")
    assert [match[1:] for match in index.matches(f"{' '.join(before)}. {OTHER}! Thanks")] == [("near", 1.0)]


@given(st.lists(st.text(alphabet="abcd", min_size=1, max_size=3), min_size=5, max_size=20), st.integers(1, 9))
def test_the_share_is_that_of_the_requests_ngrams(parts: list[str], ngram: int) -> None:
    index = RequestIndex(ngram=ngram, threshold=0.01)
    index.add(" ".join(parts), 0, "e")
    text = parts[: len(parts) - 1]
    length = min(ngram, len(parts))

    def grams(found: list[str]) -> set[tuple[str, ...]]:
        return {tuple(found[i : i + length]) for i in range(len(found) - length + 1)}

    share = len(grams(text) & grams(parts)) / len(grams(parts))
    assert [match.share for match in index.matches(" ".join(text))] == ([pytest.approx(share)] if share else [])


def test_a_planted_near_duplicate_is_found_and_named(tmp_path: Path) -> None:
    near = LONG.replace("Friday evening", "Monday evening")
    result = overlap_of(tmp_path, [record("t0", OTHER), record("t1", near), record("t2", LONG)], [record("e0", LONG)])
    cell = cell_of(result)
    assert (cell.exact, cell.near, cell.short, cell.evaluation) == (1, 1, 0, 1)
    assert [(ours, theirs) for _, ours, theirs in cell.worst] == [("t2", "e0"), ("t1", "e0")]
    assert [(found.line, found.id, found.why) for found in result.drop] == [(2, "t1", "request"), (3, "t2", "request")]


def test_the_threshold_decides_what_is_near(tmp_path: Path) -> None:
    near = LONG.replace("Friday", "Monday")
    assert cell_of(overlap_of(tmp_path, [record("t", near)], [record("e", LONG)], threshold=1.0)).near == 0
    assert cell_of(overlap_of(tmp_path, [record("t", near)], [record("e", LONG)], threshold=0.3)).near == 1


def test_short_answers_count_apart_and_are_not_dropped(tmp_path: Path) -> None:
    result = overlap_of(tmp_path, [record("t", "yes, please!")], [record("e", "Yes please.")])
    assert (cell_of(result).exact, cell_of(result).short, result.drop) == (0, 1, [])


def test_a_duplicate_in_an_earlier_turn_is_found(tmp_path: Path) -> None:
    dialogue = record("t", "Which day?")
    dialogue["messages"] = [
        {"role": "user", "content": LONG},
        {"role": "assistant", "content": None},
        *dialogue["messages"],
    ]
    assert cell_of(overlap_of(tmp_path, [dialogue], [record("e", LONG)])).exact == 1


@given(st.lists(st.text(alphabet="abc ", max_size=30)), st.lists(st.text(alphabet="xyz ", max_size=30)))
def test_texts_without_a_common_word_never_match(ours: list[str], theirs: list[str]) -> None:
    index = RequestIndex(ngram=1, threshold=0.01, min_words=1)
    for text in theirs:
        index.add(text, 0, "e")
    assert not any(index.matches(text) for text in ours)


def test_disjoint_sets_give_zeros(tmp_path: Path) -> None:
    train = [record("t", LONG, ("book_table",), ("book_table",))]
    result = overlap_of(tmp_path, train, [record("e", OTHER, ("find_mail",), ("find_mail",))])
    assert cell_of(result) == audit.Cell()
    assert result.drop == []
    assert audit.overlap_table(result)[1:] == [
        "0 of 1 training records repeat a request of 1 evaluation records",
        "0 show a tool that an evaluation record calls, 0 call one, 0 show one with the same parameters",
        "0 training records are to be left out",
    ]


def test_tool_names_are_compared_exactly_loosely_and_with_their_parameters(tmp_path: Path) -> None:
    train = [record("t", LONG, ("get_mail", "lock", "findRoute"))]
    theirs = record("e", OTHER, ("get_mail", "lock", "find_route", "called_only"), ("called_only",))
    theirs["tools"][1]["function"] = {**theirs["tools"][1]["function"], "parameters": {"properties": {"door": {}}}}
    earlier = [{"role": "assistant", "tool_calls": [{"name": "called_only", "arguments": {}}]}]
    train.append(record("t2", LONG, ()) | {"messages": [*earlier, {"role": "user", "content": LONG}]})
    result = overlap_of(tmp_path, train, [theirs])
    cell = cell_of(result)
    assert (cell.names, cell.called, cell.signatures, cell.alike) == (3, 1, 1, 4)
    assert result.shared_tools == {"e/a": ["called_only"], audit.ALL: ["called_only"]}


def past_call(name: str, *tools: str) -> Record:
    """A record whose call is in an earlier turn."""
    item = record(f"past-{name}", OTHER, tools)
    call = {"type": "function", "function": {"name": name, "arguments": {}}}
    item["messages"] = [{"role": "assistant", "content": None, "tool_calls": [call]}, *item["messages"]]
    return item


def test_training_records_count_that_show_or_call_a_tool_of_which_an_evaluation_record_asks_a_call(
    tmp_path: Path,
) -> None:
    train = [
        record("shows", OTHER, ("Open.Door", "own")),
        record("calls", OTHER, ("open_door", "own"), ("open_door",)),
        past_call("openDoor", "openDoor"),
        record("shows-what-is-not-called", OTHER, ("lock_door", "own"), ("own",)),
        record("other-parameters", OTHER, ("open_door",)),
    ]
    train[-1]["tools"][0]["function"]["parameters"] = {"properties": {"door": {}}}
    evaluation = [record("e", LONG, ("open_door", "lock_door"), ("open_door",))]
    result = overlap_of(tmp_path, train, evaluation)
    cell = cell_of(result)
    assert (cell.shows, cell.calls, cell.twins) == (4, 2, 1)
    assert result.drop == [("t/a", line, train[line - 1]["id"], "tool") for line in (1, 2, 3, 5)]


def test_a_tool_of_the_past_is_called_by_an_evaluation_record_only_where_it_is_still_shown(tmp_path: Path) -> None:
    train = [record("t", OTHER, ("open_door",))]
    assert cell_of(overlap_of(tmp_path, train, [past_call("open_door", "other", "open_door")])).shows == 1
    assert cell_of(overlap_of(tmp_path, train, [past_call("open_door", "other")])).shows == 0


def test_a_training_record_that_calls_what_it_does_not_show_is_left_out_too(tmp_path: Path) -> None:
    result = overlap_of(tmp_path, [past_call("open_door", "own")], [record("e", LONG, calls=("open_door",))])
    assert (cell_of(result).shows, cell_of(result).calls, len(result.drop)) == (0, 1, 1)


def test_totals_count_each_record_once(tmp_path: Path) -> None:
    """Both training files repeat the request that both evaluation files have, and show its tool."""
    train = [
        RecordFile(
            write(tmp_path / "t" / f"{name}.jsonl.gz", [record("r0", LONG), record("r1", LONG), record("r2", OTHER)])
        )
        for name in "ab"
    ]
    evaluation = [
        RecordFile(write(tmp_path / "e" / f"{name}.jsonl.gz", [record(name, LONG, calls=("open_door",))]))
        for name in "ab"
    ]
    result = audit.overlap(train, evaluation, RequestIndex())
    for labels, exact, owners, shows in (
        (("t/a", "e/b"), 2, 1, 3),
        (("t/a", audit.ALL), 2, 2, 3),
        ((audit.ALL, "e/b"), 4, 1, 6),
        ((audit.ALL, audit.ALL), 4, 2, 6),
    ):
        cell = result.cells[labels]
        assert (cell.exact, cell.evaluation, cell.shows, cell.called, cell.signatures) == (exact, owners, shows, 1, 1)
    assert [found.why for found in result.drop] == ["request", "request", "tool"] * 2


# ---- Split

tool_names = st.sampled_from(["get_a", "getA", "Get.A", "b", "c", "d", "e", "f", "g", "h", "i", "___", "日本", ""])
record_lists = st.lists(
    st.builds(
        lambda shown, called: record("r", "x", tuple(shown), tuple(called)),
        st.lists(tool_names, max_size=3),
        st.lists(tool_names, max_size=2),
    ),
    max_size=25,
)


def names_of(item: Record) -> set[str]:
    return {*audit.shown_names(item), *audit.called_names(item)}


@given(record_lists, st.floats(0, 1), st.integers(0, 5), st.sampled_from(["shown", "called"]))
def test_no_tool_ever_stands_on_both_sides(items: list[Record], share: float, seed: int, by: str) -> None:
    result = audit.split([audit.record_tools(item) for item in items], share, seed, by)
    assert len(result.held_out) == len(items)
    sides: list[set[str]] = [set(), set()]
    for item, held_out in zip(items, result.held_out, strict=True):
        kept = audit.trimmed(item, result.tools, held_out) if by == "called" else item
        assert set(audit.called_names(kept)) == set(audit.called_names(item))
        assert kept["tools"] or not item["tools"] or item["calls"]
        sides[held_out] |= names_of(kept)
    assert not sides[0] & sides[1]
    assert not {audit.tool_key(name) for name in sides[0]} & {audit.tool_key(name) for name in sides[1]}


@given(record_lists, st.floats(0, 1), st.integers(0, 5), st.sampled_from(["shown", "called"]))
def test_the_seed_alone_decides(items: list[Record], share: float, seed: int, by: str) -> None:
    tools = [audit.record_tools(item) for item in items]
    assert audit.split(tools, share, seed, by) == audit.split(tools, share, seed, by)


@given(st.lists(st.integers(1, 9), max_size=9), st.integers(0, 40), st.integers(0, 3))
def test_no_other_choice_of_components_comes_closer(sizes: list[int], target: int, seed: int) -> None:
    chosen = closest_subset(sizes, target, random.Random(seed))
    assert len(set(chosen)) == len(chosen)
    sums = [sum(sizes[i] for i in some) for n in range(len(sizes) + 1) for some in combinations(range(len(sizes)), n)]
    assert abs(sum(sizes[i] for i in chosen) - target) == min(abs(total - target) for total in sums)


def test_different_seeds_hold_out_different_tools() -> None:
    tools = [RecordTools((f"tool{i}",), ()) for i in range(40)]
    choices = {tuple(audit.split(tools, 0.25, seed).held_out) for seed in range(5)}
    assert len(choices) == 5
    assert all(sum(choice) == 10 for choice in choices)


def test_chains_of_shared_tools_stay_together() -> None:
    chain = [RecordTools((f"t{i}",), (f"t{i + 1}",)) for i in range(6)]
    assert len(set(audit.split(chain, 0.5).held_out)) == 1
    assert sum(audit.split(chain, 0.5, by="called").held_out) == 3


def test_one_component_is_never_parted_and_the_command_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.jsonl.gz", [record(f"r{i}", LONG, ("all", f"own{i}"), (f"own{i}",)) for i in range(10)])
    assert audit.main(["split", "--train", str(path)]) == 0
    assert "nothing could be held out" in capsys.readouterr().out
    assert audit.main(["split", "--train", str(path), "--by", "called", "--share", "0.3"]) == 0
    assert "held out of these: 3\n" in capsys.readouterr().out


def test_a_wrong_share_is_refused() -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        audit.split([], 1.5)


# ---- Commands


def test_the_overlap_command_prints_writes_and_fails_above(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "train" / "a.jsonl.gz", [record("t0", LONG), record("t\n1", LONG.upper()), record("t2", OTHER)])
    write(tmp_path / "dev" / "dev.jsonl.gz", [record("e0", LONG)])
    out, drop = tmp_path / "out" / "overlap.json", tmp_path / "out" / "drop.jsonl"
    paths = ["--train", str(tmp_path / "train"), "--evaluation", str(tmp_path / "dev")]
    command = ["overlap", *paths, "--out", str(out), "--drop", str(drop), "--fail-above"]
    assert audit.main([*command, "2"]) == 0
    assert audit.main([*command, "1"]) == 1
    printed = capsys.readouterr().out
    assert "2 of 3 training records repeat a request of 1 evaluation records" in printed
    report = json.loads(out.read_text())
    assert report["command"].startswith("python -m training.audit overlap --train ")
    (pair,) = report["pairs"]
    assert (pair["training_file"], pair["evaluation_file"]) == ("train/a", "dev/dev")
    for counts in (pair, report["totals"], report["training"]["train/a"], report["evaluation"]["dev/dev"]):
        assert (counts["exact"], counts["evaluation"]) == (2, 1)
    assert report["totals"]["training_records"] == report["training"]["train/a"]["records"] == 3
    assert report["totals"]["evaluation_records"] == report["evaluation"]["dev/dev"]["records"] == 1
    assert report["totals"]["drop"] == report["training"]["train/a"]["drop"] == {"request": 2, "tool": 0}
    assert LONG.lower() not in out.read_text().lower()
    assert [json.loads(line) for line in drop.read_text().splitlines()] == [
        {"file": "train/a", "line": 1, "id": "t0", "why": "request"},
        {"file": "train/a", "line": 2, "id": "t\n1", "why": "request"},
    ]
    assert audit.main(["overlap", *paths, "--ngram", "0"]) == 2


def test_records_with_a_called_tool_are_left_out_unless_asked_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "train" / "a.jsonl.gz", [record("t0", LONG), record("t1", OTHER), record("t2", OTHER, ("own",))])
    write(tmp_path / "dev" / "dev.jsonl.gz", [record("e0", LONG, calls=("open_door",))])
    out, drop = tmp_path / "overlap.json", tmp_path / "drop.jsonl"
    paths = ["--train", str(tmp_path / "train"), "--evaluation", str(tmp_path / "dev")]
    command = ["overlap", *paths, "--out", str(out), "--drop", str(drop), "--fail-above", "1"]
    for more, status, whys in (([], 1, ["request", "tool"]), (["--drop-tools", "none"], 0, ["request"])):
        assert audit.main([*command, *more]) == status
        assert [json.loads(line)["why"] for line in drop.read_text().splitlines()] == whys
        assert json.loads(out.read_text())["totals"]["drop"] == {"request": 1, "tool": len(whys) - 1}
        assert f"{len(whys)} training records are to be left out" in capsys.readouterr().out


def test_two_files_of_one_name_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("x", "y"):
        write(tmp_path / folder / "train" / "a.jsonl.gz", [record("r", LONG)])
    assert audit.main(["split", "--train", str(tmp_path)]) == 2
    assert "more than one file is called train/a" in capsys.readouterr().err


@pytest.mark.parametrize("by", ["shown", "called"])
def test_the_split_command_writes_every_record_to_one_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], by: str
) -> None:
    calls = [record(f"r{i}", LONG, (f"tool{i % 10}", f"shown{i % 10}"), (f"tool{i % 10}",)) for i in range(40)]
    chat = [record("chat", OTHER, ())]
    write(tmp_path / "data" / "train" / "a.jsonl.gz", calls)
    write(tmp_path / "data" / "text" / "b.jsonl.gz", chat)
    out = tmp_path / "out"
    command = ["split", "--train", str(tmp_path / "data"), "--share", "0.2", "--by", by, "--out"]
    assert audit.main([*command, str(out)]) == 0
    assert "10 components over 40 records; largest: 4, 4" in capsys.readouterr().out
    kept, held = read(out / "train" / "a.jsonl.gz"), read(out / "dev" / "dev.jsonl.gz")
    assert len(held) == 8
    assert sorted(item["id"] for item in kept + held) == sorted(item["id"] for item in calls)
    assert not set().union(*map(names_of, kept)) & set().union(*map(names_of, held))
    assert read(out / "text" / "b.jsonl.gz") == chat
    assert json.loads((out / "split.json").read_text())["records"] == [33, 8]
    if by == "shown":
        assert all(item in calls for item in kept + held)
    assert audit.main([*command, str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "dev" / "dev.jsonl.gz").read_bytes() == (out / "dev" / "dev.jsonl.gz").read_bytes()
    assert audit.main([*command, str(out)]) == 2
    assert "nothing is written over" in capsys.readouterr().err


@pytest.mark.skipif(not (DEFAULT_DATA / "dev").is_dir(), reason="the record files are not beside the repository")
def test_the_evaluation_set_of_unseen_tools_calls_no_tool_of_a_training_file() -> None:
    files = audit.record_files([DEFAULT_DATA / "train" / "home_assistant.jsonl.gz", DEFAULT_DATA / "dev"])
    result = audit.overlap(files[:1], files[1:], RequestIndex())
    cell = result.cells["train/home_assistant", "dev/dev"]
    assert (cell.exact, cell.called) == (0, 0)
