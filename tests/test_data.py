"""Training rows on tiny records made here: what enters a row, what never does, what a draw depends on."""

import gzip
import json
import multiprocessing
import pickle
import random
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from repo_package import ROOT, load_repo_module
from tiny_records import record, tool
from training import data as rows_module
from training.augmentation import Augmentation
from training.data import PromptStyle, Row, RowStream, build_row
from training.records import Record, RecordError, is_simple

tokenization = load_repo_module("tokenization_utils")


def write(path: Path, records: list[Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(item) + "\n" for item in records)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrow files go to a folder of the test's own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(ROOT, trust_remote_code=False)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Data of a few natural calls, compositions that repeat some of them, refusals and chat."""
    natural = [record(index) for index in range(40)]
    both = [
        {
            **record(100 + i),
            "messages": [{"role": "user", "content": f"Hello. {natural[i]['messages'][0]['content']} And more"}],
        }
        for i in range(40)
    ]
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    write(tmp_path / "train" / "snips.jsonl.gz", natural)
    write(tmp_path / "train" / "compositions.jsonl.gz", both)
    write(tmp_path / "train" / "nocall_misc.jsonl.gz", [record(200 + i, calls=[]) for i in range(5)])
    write(tmp_path / "text" / "chatterbot_corpus.jsonl.gz", [record(300, messages=chat, tools=[], calls=[])])
    write(tmp_path / "dev" / "dev.jsonl.gz", [record(400 + i) for i in range(5)])
    sources = ("train/snips", "train/compositions", "train/nocall_misc", "text/chatterbot_corpus")
    monkeypatch.setattr(rows_module, "SOURCE_WEIGHTS", dict.fromkeys(sources, 1.0))
    monkeypatch.setattr(rows_module, "HELD_OUT_SOURCES", ("snips",))
    return tmp_path


# ---- Rows


def test_a_row_is_the_rendered_prompt_and_the_call_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    row = build_row(record(0), tokenizer, PromptStyle(), random.Random(0))
    assert row is not None
    expected = tokenizer.apply_chat_template(
        row.messages, tools=row.tools, add_generation_prompt=True, return_dict=False
    )
    assert row.prompt_ids == expected
    call = tokenization.call_token_ids(tokenizer, "get_weather", {"city": "Paris"})
    assert row.target_ids == [*call, tokenizer.eos_token_id]


def test_several_calls_are_joined_by_a_line_break(tokenizer: PreTrainedTokenizerFast) -> None:
    calls = [{"name": "get_weather", "arguments": {"city": city}} for city in ("Paris", "Rome")]
    row = build_row(record(0, calls=calls), tokenizer, PromptStyle(), random.Random(0))
    assert row is not None
    line = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "%s"}}\n</tool_call>'
    assert tokenizer.decode(row.target_ids) == f"{line % 'Paris'}\n{line % 'Rome'}<|im_end|>"


@pytest.mark.parametrize("answer", ["Which city? <|im_end|>", None])
def test_no_call_learns_the_answer_or_a_refusal(tokenizer: PreTrainedTokenizerFast, answer: str | None) -> None:
    fields = {"answer": answer} if answer else {}
    row = build_row(record(0, calls=[], **fields), tokenizer, PromptStyle(), random.Random(0))
    assert row is not None
    text = tokenizer.decode(row.target_ids[:-1])
    assert text == answer if answer else text in rows_module.REFUSALS
    assert row.target_ids.count(tokenizer.eos_token_id) == 1


def test_thought_is_learned_in_thinking_mode(tokenizer: PreTrainedTokenizerFast) -> None:
    row = build_row(record(0, think="It is the weather."), tokenizer, PromptStyle(), random.Random(0))
    assert row is not None
    assert "/think" in tokenizer.decode(row.prompt_ids)
    assert tokenizer.decode(row.target_ids).startswith("<think>\nIt is the weather.\n</think>\n<tool_call>")


def test_chat_learns_one_of_the_assistants_turns(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [{"role": role, "content": f"{role} {i}"} for i in range(3) for role in ("user", "assistant")]
    for seed in range(6):
        chat = record(0, messages=turns, tools=[], calls=[])
        row = build_row(chat, tokenizer, PromptStyle(), random.Random(seed))
        assert row is not None
        assert row.messages[0]["role"] == row.messages[-1]["role"] == "user"
        turn = row.messages[-1]["content"].split()[-1]
        assert tokenizer.decode(row.target_ids) == f"assistant {turn}<|im_end|>"


def test_the_needed_tool_is_never_dropped(tokenizer: PreTrainedTokenizerFast) -> None:
    wide = build_row(record(0), tokenizer, PromptStyle(max_tools=3, description_chars=0), random.Random(0))
    assert wide is not None
    for seed in range(20):
        style = PromptStyle(max_tools=3, description_chars=0, max_prompt_tokens=len(wide.prompt_ids) - 1)
        row = build_row(record(0), tokenizer, style, random.Random(seed))
        assert row is not None
        assert "get_weather" in [item["function"]["name"] for item in row.tools]
        assert len(row.prompt_ids) <= style.max_prompt_tokens


def test_what_does_not_fit_is_left_out_instead_of_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    assert build_row(record(0), tokenizer, PromptStyle(max_prompt_tokens=20), random.Random(0)) is None
    assert build_row(record(0), tokenizer, PromptStyle(max_target_tokens=5), random.Random(0)) is None


def test_descriptions_are_cut_at_words_and_values_of_that_name_are_not() -> None:
    schema: dict[str, Any] = {
        "description": "a long description",
        "parameters": {
            "properties": {"description": {"type": "string", "description": "words and words"}},
            "enum": [{"description": "stays as it is"}],
        },
    }
    short = rows_module.shorten(schema, 8)
    assert short["description"] == "a long"
    assert short["parameters"]["properties"]["description"] == {"type": "string", "description": "words"}
    assert short["parameters"]["enum"] == schema["parameters"]["enum"]
    bare = rows_module.shorten(schema, 0)
    assert "description" not in bare
    assert bare["parameters"]["properties"]["description"] == {"type": "string"}


def test_a_single_call_gives_what_the_head_trains_on(tokenizer: PreTrainedTokenizerFast) -> None:
    row = build_row(record(0), tokenizer, PromptStyle(), random.Random(0))
    assert row is not None
    call = rows_module.single_call(row)
    assert call is not None
    assert (call.name, call.arguments) == ("get_weather", {"city": "Paris"})
    assert call.schema["required"] == ["city"]
    assert call.prompt_ids == row.prompt_ids
    refusal = build_row(record(0, calls=[]), tokenizer, PromptStyle(), random.Random(0))
    assert refusal is not None
    assert rows_module.single_call(refusal) is None


def test_arguments_are_learned_in_the_order_of_the_schema(tokenizer: PreTrainedTokenizerFast) -> None:
    inner = {"type": "object", "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}}}
    properties = {"city": {"type": "string"}, "at": inner, "all": {"type": "array", "items": inner}}
    place = tool("go")
    place["function"]["parameters"] = {"type": "object", "properties": properties}
    turned = {"all": [{"y": 2, "x": 1}], "more": {"y": 0, "x": 0}, "at": {"y": 4, "x": 3}, "city": "Oslo"}
    call = {"name": "go", "arguments": turned}
    earlier = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
    user, result = {"role": "user", "content": "Go"}, {"role": "tool", "content": "done"}
    row = build_row(
        record(0, tools=[place], calls=[call], messages=[user, earlier, result, user]),
        tokenizer,
        PromptStyle(max_prompt_tokens=500),
        random.Random(0),
    )
    assert row is not None
    text = '{"city": "Oslo", "at": {"x": 3, "y": 4}, "all": [{"x": 1, "y": 2}], "more": {"y": 0, "x": 0}}'
    assert text in tokenizer.decode(row.target_ids)
    assert text in tokenizer.decode(row.prompt_ids)
    assert row.calls == [call]
    assert list(call["arguments"]) == ["all", "more", "at", "city"]


# ---- Prompts that are too long


def conversation(turns: int, **fields: Any) -> Record:
    """A system message, exchanges with a call and its result each, and a last request."""
    messages: list[Record] = [{"role": "system", "content": "Be brief."}]
    for index in range(turns):
        messages += [
            {"role": "user", "content": f"Hotel number {index}?"},
            {"role": "assistant", "content": "", "tool_calls": [{"name": "find_hotel", "arguments": {"city": "Rome"}}]},
            {"role": "tool", "content": f"result {index}"},
            {"role": "assistant", "content": f"Hotel {index} it is."},
        ]
    return record(0, **{"messages": [*messages, {"role": "user", "content": "And the weather in Paris?"}], **fields})


def fitted(item: Record, tokenizer: PreTrainedTokenizerFast, tokens: int, seed: int = 0) -> Row | None:
    style = PromptStyle(max_tools=3, max_prompt_tokens=tokens)
    return build_row(item, tokenizer, style, random.Random(seed))


def test_distractors_go_before_turns_and_the_oldest_exchange_goes_first(tokenizer: PreTrainedTokenizerFast) -> None:
    item = conversation(4)
    seen: list[tuple[int, int]] = []
    limit = 2000
    while (row := fitted(item, tokenizer, limit, seed=1)) is not None:
        names = {shown["function"]["name"] for shown in row.tools}
        users = [message["content"] for message in row.messages if message["role"] == "user"]
        assert len(row.prompt_ids) <= limit
        assert row.messages[0]["role"] == "system"
        assert users == [*(f"Hotel number {i}?" for i in range(4 - len(users) + 1, 4)), "And the weather in Paris?"]
        # Nothing is shown half: each exchange is whole, and what was called is among the tools.
        assert [message["role"] for message in row.messages[1:-1]] == ["user", "assistant", "tool", "assistant"] * (
            len(users) - 1
        )
        assert names >= ({"get_weather", "find_hotel"} if len(users) > 1 else {"get_weather"})
        if ("play_music" in names) and seen:
            assert len(users) == 5
        seen.append((len(users), len(row.tools)))
        limit = len(row.prompt_ids) - 1
    assert [users for users, _ in seen] == sorted((users for users, _ in seen), reverse=True)
    assert {users for users, _ in seen} == {5, 4, 3, 2, 1}
    assert seen[-1] == (1, 1)


def test_a_result_that_is_still_to_be_answered_keeps_its_call(tokenizer: PreTrainedTokenizerFast) -> None:
    item = conversation(3, calls=[], answer="There are two.")
    item["messages"] = item["messages"][:-2]  # the last result is not answered yet
    rows = [row for tokens in range(60, 700, 5) if (row := fitted(item, tokenizer, tokens)) is not None]
    assert {len(row.messages) for row in rows} == {1 + 3, 1 + 3 + 4, 1 + 3 + 8}
    for row in rows:
        assert [message["role"] for message in row.messages[-3:]] == ["user", "assistant", "tool"]
        assert "find_hotel" in {shown["function"]["name"] for shown in row.tools}


def test_a_learned_turn_of_a_chat_starts_with_a_user_and_shows_no_result_without_its_call(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    item = conversation(3, calls=[])
    item["messages"] = item["messages"][1:-1]
    for seed in range(20):
        row = fitted(item, tokenizer, 700, seed)
        assert row is not None
        assert row.messages[0]["role"] == "user"
        assert tokenizer.decode(row.target_ids).startswith("Hotel ")


# ---- Which records


def test_held_out_requests_never_enter_training(
    folder: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out = rows_module.held_out_records(folder, count=10)
    monkeypatch.setattr(rows_module, "held_out_records", lambda data, count=200: held_out)
    requests = [item["messages"][0]["content"] for item in held_out]
    stream = RowStream(folder, tokenizer, follow_ups=3)
    for seed in range(100):
        row = stream.draw(PromptStyle(), random.Random(seed))
        text = tokenizer.decode([token for span in row.spans() for part in span for token in part])
        assert not any(request in text for request in requests)
    assert stream.skipped["held out"] == 20
    trained = " ".join(rows_module.tokenizer_texts(folder))
    assert not any(item in trained.split("And more") for item in requests)


def test_the_requests_of_every_folders_evaluation_are_left_out(
    folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each folder's own choice, not that of all together: evaluation reads one of them."""
    usual = rows_module.held_out_records
    monkeypatch.setattr(rows_module, "held_out_records", lambda data: usual(data, count=10))
    more = tmp_path / "more"
    write(more / "train" / "snips.jsonl.gz", [record(500 + i) for i in range(400)])
    stream = RowStream([folder, more], tokenizer, weights={"train/snips": 1.0})
    assert stream.skipped["held out"] == 20
    left = {row["id"] for row in (stream.dataset[int(i)] for i in stream.pools["train/snips"])}
    assert len(left) == 420
    trained = set(rows_module.tokenizer_texts([folder, more]))
    assert any(f"Weather number {i} in Rome?" in trained for i in range(500, 900))
    for part in (folder, more):
        held_out = usual(part, count=10)
        assert not left & {item["id"] for item in held_out}
        assert not trained & {item["messages"][0]["content"] for item in held_out}


def test_held_out_problems_are_never_drawn(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    problems = [
        record(
            1000 + i, messages=[{"role": "user", "content": f"What is {i} plus {i}?"}], tools=[], calls=[], think="x"
        )
        for i in range(320)
    ]
    write(folder / f"{rows_module.PROBLEMS}.jsonl.gz", problems)
    held_out = rows_module.held_out_problems(folder)
    assert len(held_out) == 300
    assert rows_module.held_out_problems(folder, count=10) == held_out[:10]
    assert {item["messages"][0]["content"] for item in held_out} <= set(rows_module.held_out_requests(folder))
    stream = RowStream(folder, tokenizer, weights={rows_module.PROBLEMS: 1.0})
    left = {row["id"] for row in (stream.dataset[int(i)] for i in stream.pools[rows_module.PROBLEMS])}
    assert left == {item["id"] for item in problems} - {item["id"] for item in held_out}
    assert drawn(stream, 0).id in left
    trained = set(rows_module.tokenizer_texts(folder))
    said = {item["id"]: item["messages"][0]["content"] for item in problems}
    assert {name for name in said if said[name] in trained} == left


def test_the_order_of_a_file_does_not_decide_which_problems_are_held_out(folder: Path) -> None:
    problems = [record(i, tools=[], calls=[]) for i in range(8)]
    path = folder / f"{rows_module.PROBLEMS}.jsonl.gz"
    assert rows_module.held_out_problems(folder) == []
    write(path, problems)
    first = rows_module.held_out_problems(folder, count=3)
    write(path, problems[::-1])
    assert rows_module.held_out_problems(folder, count=3) == first


def test_evaluation_sets_are_the_same_each_time(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    for records in (rows_module.held_out_records(folder, count=10), rows_module.dev_records(folder)):
        assert all(rows_module.is_simple(item) for item in records)
        first, second = (rows_module.evaluation_rows(records, tokenizer) for _ in range(2))
        assert [row.prompt_ids for row in first] == [row.prompt_ids for row in second]
    assert rows_module.held_out_records(folder, count=10) == rows_module.held_out_records(folder, count=20)[:10]


def test_follow_ups_ask_for_the_tools_of_the_row(
    folder: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "held_out_records", lambda data, count=200: [record(999)])
    plain: dict[str, Any] = {"augmentation": Augmentation.none(), "negative_share": 0.0}
    stream = RowStream(folder, tokenizer, weights={"train/snips": 1.0}, follow_ups=2, **plain)
    rows = [stream.draw(PromptStyle(), random.Random(seed)) for seed in range(30)]
    assert {len(row.follow_ups) for row in rows} == {0, 1, 2}
    row = max(rows, key=lambda row: len(row.follow_ups))
    context, reply = row.follow_ups[0]
    assert tokenizer.decode(context).endswith("<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n")
    assert tokenizer.decode(reply).startswith('<tool_call>\n{"name": "get_weather"')
    assert len(row) == sum(len(context) + len(reply) for context, reply in row.spans())


def test_follow_ups_call_the_tools_by_their_new_names(
    folder: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "held_out_records", lambda data, count=200: [record(999)])
    masked = Augmentation(0.0, 1.0, 0.0, 1.0, 1.0)
    stream = RowStream(folder, tokenizer, weights={"train/snips": 1.0}, follow_ups=2, augmentation=masked)
    rows = [stream.draw(PromptStyle(), random.Random(seed)) for seed in range(30)]
    checked = 0
    for row in rows:
        shown = {item["function"]["name"]: item["function"]["parameters"]["properties"] for item in row.tools}
        assert "get_weather" not in shown
        for _, reply in row.follow_ups:
            text = tokenizer.decode(reply).split("<tool_call>")[1].split("</tool_call>")[0]
            call = json.loads(text)
            assert set(call["arguments"]) == set(shown[call["name"]])
            checked += 1
    assert checked


# ---- Draws


@pytest.fixture
def stream(folder: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> RowStream:
    monkeypatch.setattr(rows_module, "held_out_records", lambda data, count=200: [record(999)])
    return RowStream(folder, tokenizer, follow_ups=2, negative_share=0.3)


def drawn(stream: RowStream, seed: int) -> Row:
    return stream.draw(PromptStyle(), random.Random(seed))


def draw_elsewhere(stream: bytes, seeds: list[int], results: Any) -> None:
    results.put([drawn(pickle.loads(stream), seed) for seed in seeds])


def test_a_row_is_a_function_of_the_random_state_alone(stream: RowStream) -> None:
    seeds = list(range(20))
    rows = [drawn(stream, seed) for seed in seeds]
    assert [drawn(stream, seed) for seed in reversed(seeds)] == rows[::-1]
    assert len({row.id for row in rows}) > 5
    first, second = random.Random(3), random.Random(3)
    stream.draw(PromptStyle(), first)
    stream.draw(PromptStyle(), second)
    assert first.getstate() == second.getstate()
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    worker = context.Process(target=draw_elsewhere, args=(pickle.dumps(stream), seeds, results))
    worker.start()
    assert results.get(timeout=60) == rows
    worker.join(timeout=60)


def test_negatives_are_drawn_in_their_share_and_pass_the_filter(
    folder: Path, stream: RowStream, tokenizer: PreTrainedTokenizerFast
) -> None:
    only = {"train/snips": 1.0}
    always = RowStream(folder, tokenizer, weights=only, negative_share=1.0)
    row = drawn(always, 0)
    assert row.id.endswith("-removed")
    assert row.calls == []
    assert "get_weather" not in {item["function"]["name"] for item in row.tools}
    some = RowStream(folder, tokenizer, weights=only, negative_share=0.3)
    share = sum(drawn(some, seed).id.endswith("-removed") for seed in range(200)) / 200
    assert 0.2 < share < 0.4
    simple = RowStream(folder, tokenizer, weights=only, negative_share=1.0, keep=is_simple)
    assert all(drawn(simple, seed).calls for seed in range(10))


def test_talk_is_shown_beside_tools_that_nobody_asked_for(
    folder: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "held_out_records", lambda data, count=200: [record(999)])
    weights = {"train/snips": 1e-9, "text/chatterbot_corpus": 1.0}
    always = RowStream(folder, tokenizer, weights=weights, beside_tools_share=1.0)
    row = drawn(always, 0)
    assert row.id.endswith("-beside-tools")
    assert row.tools
    assert row.calls == []
    assert tokenizer.decode(row.target_ids) == "Hello<|im_end|>"
    never = RowStream(folder, tokenizer, weights=weights, beside_tools_share=0.0)
    assert not any(drawn(never, seed).tools for seed in range(10))
    alone = RowStream(folder, tokenizer, weights={"text/chatterbot_corpus": 1.0}, beside_tools_share=1.0)
    assert not any(drawn(alone, seed).tools for seed in range(10))


def test_files_are_drawn_by_weight_and_several_folders_are_one_mixture(
    folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "held_out_records", lambda data, count=200: [record(999)])
    more = tmp_path / "more"
    write(more / "train" / "snips.jsonl.gz", [record(500 + i) for i in range(40)])
    write(more / "train" / "own.jsonl.gz", [record(600)])
    weights = {"train/snips": 3.0, "train/own": 1.0, "text/chatterbot_corpus": 0.0}
    stream = RowStream([folder, more], tokenizer, weights=weights)
    rows = [drawn(stream, seed) for seed in range(200)]
    counts = Counter(row.source for row in rows)
    assert set(counts) == {"train/snips", "train/own"}
    assert 2 < counts["train/snips"] / counts["train/own"] < 4.5
    assert {int(row.id[1:].split("-")[0]) >= 500 for row in rows if row.source == "train/snips"} == {True, False}
    default = RowStream([folder, more], tokenizer, talk_weight=2.0)
    shares = dict(zip(default.pools, default.shares, strict=True))
    assert shares == {
        "train/snips": 1.0,
        "train/own": rows_module.OTHER_WEIGHT,
        "train/compositions": 1.0,
        "train/nocall_misc": 2.0,
        "text/chatterbot_corpus": 2.0,
    }


@pytest.mark.parametrize("keep", [is_simple, lambda record: len(record["messages"]) == 1 == len(record["calls"])])
def test_the_filter_sees_records(
    folder: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, keep: Any
) -> None:
    monkeypatch.setattr(rows_module, "held_out_records", lambda data, count=200: [record(999)])
    stream = RowStream(folder, tokenizer, keep=keep)
    assert {label: len(pool) for label, pool in stream.pools.items()} == {"train/compositions": 40, "train/snips": 40}
    assert all(len(drawn(stream, seed).calls) == 1 for seed in range(10))


def test_records_of_an_audit_are_left_out(
    folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "held_out_records", lambda data, count=200: [record(999)])
    path = tmp_path / "drop.jsonl"
    keep = {5, 17}
    lines = [{"file": "train/snips", "line": i + 1, "id": f"r{i}", "why": "tool"} for i in range(40) if i not in keep]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    stream = RowStream(folder, tokenizer, weights={"train/snips": 1.0}, leave_out=path, negative_share=0.0)
    assert {drawn(stream, seed).id for seed in range(30)} == {"r5", "r17"}
    assert stream.skipped["left out as asked"] == 38
    for wrong, message in (
        ({"file": "train/snips", "line": 1, "id": "r3"}, "1 of 1 records are not where it says"),
        ({"file": "train/snips"}, r"drop\.jsonl:1: not a record to leave out"),
    ):
        path.write_text(json.dumps(wrong) + "\n")
        with pytest.raises(RecordError, match=message):
            RowStream(folder, tokenizer, weights={"train/snips": 1.0}, leave_out=path)


def test_what_cannot_be_drawn_is_refused_at_the_start(
    folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (folder, {"weights": {"train/snips": 1.0, "train/toolace": 1.0}}, "no file for train/toolace; there are text/"),
        (folder, {"keep": lambda record: False}, "mixture of .* is empty; left out: 80 held out"),
        (folder, {"weights": {"train/snips": 0.0}}, "is empty"),
        (tmp_path / "nothing", {}, "nothing: the mixture is empty; train/ or text/"),
        ([], {}, "no folder: the mixture is empty"),
    ]
    for data, options, message in cases:
        with pytest.raises(RecordError, match=message):
            RowStream(data, tokenizer, **options)
    for options, message in (
        ({"weights": {"train/snips": -1.0}}, "weights must be 0 or more"),
        ({"talk_weight": -1.0}, "talk_weight"),
        ({"negative_share": 2.0}, "negative_share is a share"),
        ({"beside_tools_share": -0.1}, "beside_tools_share is a share"),
    ):
        with pytest.raises(ValueError, match=message):
            RowStream(folder, tokenizer, **options)


def test_a_corrupt_line_is_refused_or_counted(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = folder / "train" / "nocall_misc.jsonl.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + b"{\n"))
    with pytest.raises(RecordError, match=r"nocall_misc\.jsonl\.gz:6: not JSON"):
        RowStream(folder, tokenizer)
    assert RowStream(folder, tokenizer, on_error="skip").skipped["corrupt"] == 1


def test_records_that_fit_no_prompt_are_counted_and_the_draw_ends(
    stream: RowStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "MAX_MISSES", 20)
    with pytest.raises(RecordError, match="of 20 records none fits"):
        stream.draw(PromptStyle(max_prompt_tokens=3), random.Random(0))
    assert stream.skipped["too long"] == 20


@pytest.mark.slow
def test_the_real_evaluation_sets_fit_their_style(tokenizer: PreTrainedTokenizerFast) -> None:
    data = ROOT.parent / "shared" / "data"
    if not data.exists():
        pytest.skip(f"needs the development data in {data}")
    held_out = rows_module.held_out_records(data)
    assert len(rows_module.evaluation_rows(held_out, tokenizer)) > 180
    simple = [item for item in rows_module.dev_records(data) if rows_module.is_simple(item)]
    assert len(rows_module.evaluation_rows(simple, tokenizer)) > 450
    seen = {call["name"] for item in held_out for call in item["calls"]}
    assert not seen & {call["name"] for item in simple for call in item["calls"]}


def test_a_folder_without_an_evaluation_set_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"dev\.jsonl is missing .*--eval_rows 0"):
        rows_module.dev_records(tmp_path)
    (tmp_path / "dev").mkdir()
    record = {"id": "1", "messages": [{"role": "user", "content": "hi"}], "tools": [], "calls": []}
    (tmp_path / "dev" / "dev.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    assert [found["id"] for found in rows_module.dev_records(tmp_path)] == ["1"]
