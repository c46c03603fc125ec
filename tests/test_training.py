"""Training data and base pre-training on tiny records made here: what enters a row, what never does, what resumes."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast, SmolLM3ForCausalLM

import train_hf
from repo_package import ROOT, load_repo_module
from training import base as pretraining
from training import data as rows_module
from training.data import PromptStyle, Record, Row, RowStream, build_row
from training.optimizers import MuonAdamW, orthogonalise, trapezoid

tokenization = load_repo_module("tokenization_utils")
CITIES = ["Paris", "Rome", "Oslo", "Lima", "Cairo", "Quito", "Bern", "Delhi"]


def tool(name: str) -> Record:
    parameters = {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "The city that is asked about"}},
        "required": ["city"],
    }
    function = {"name": name, "description": f"What {name} does, told at length", "parameters": parameters}
    return {"type": "function", "function": function}


def record(index: int, **fields: Any) -> Record:
    city = CITIES[index % len(CITIES)]
    return {
        "id": f"r{index}",
        "source": "tiny",
        "messages": [{"role": "user", "content": f"Weather number {index} in {city}?"}],
        "tools": [tool("get_weather"), tool("find_hotel"), tool("play_music")],
        "calls": [{"name": "get_weather", "arguments": {"city": city}}],
        **fields,
    }


def write(path: Path, records: list[Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(item) + "\n" for item in records)


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


# ---- Which records


def test_held_out_requests_never_enter_training(
    folder: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out = rows_module.held_out_records(folder, count=10)
    monkeypatch.setattr(rows_module, "held_out_records", lambda data, count=200: held_out)
    requests = [item["messages"][0]["content"] for item in held_out]
    stream = RowStream(folder, tokenizer, weights=rows_module.SOURCE_WEIGHTS, follow_ups=3)
    for _ in range(100):
        row = stream.draw(PromptStyle())
        text = tokenizer.decode([token for span in row.spans() for part in span for token in part])
        assert not any(request in text for request in requests)
    assert stream.skipped["held out"] == 20
    trained = " ".join(rows_module.tokenizer_texts(folder))
    assert not any(item in trained.split("And more") for item in requests)


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
    stream = RowStream(folder, tokenizer, weights={"train/snips": 1.0}, follow_ups=2)
    rows = [stream.draw(PromptStyle()) for _ in range(30)]
    assert {len(row.follow_ups) for row in rows} == {0, 1, 2}
    row = max(rows, key=lambda row: len(row.follow_ups))
    context, reply = row.follow_ups[0]
    assert tokenizer.decode(context).endswith("<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n")
    assert tokenizer.decode(reply).startswith('<tool_call>\n{"name": "get_weather"')
    assert len(row) == sum(len(context) + len(reply) for context, reply in row.spans())


# ---- Batches and loss


def make_row(prompt: int, target: int, follow_ups: int = 0) -> Row:
    extra = [([5] * 3, [6] * 2)] * follow_ups
    return Row("r", "s", [3] * prompt, [4] * target, [], [], [], extra)


def test_collating_predicts_whole_replies_and_a_share_of_the_prompt() -> None:
    generator = torch.Generator().manual_seed(0)
    batch = pretraining.collate([make_row(400, 4, 1), make_row(3, 2)], 0, 0.25, 0.5, generator)
    assert batch.input_ids.shape == (2, 409)
    assert batch.is_target.sum().item() == 4 + 2 + 2
    labels = batch.input_ids[:, 1:]
    assert set(labels[batch.is_target].tolist()) == {4, 6}
    assert set(batch.weights[batch.is_target].tolist()) == {1.0}
    drawn = (batch.weights == 0.5).float().sum().item()
    assert 60 < drawn < 140
    assert batch.weights[labels == 0].sum() == 0


def test_batches_hold_similar_lengths_within_the_token_budget() -> None:
    class Stream:
        rng = random.Random(0)

        def draw(self, style: PromptStyle) -> Row:
            return make_row(self.rng.randint(5, 200), 3)

    groups = list(pretraining.batches(Stream(), PromptStyle(), 1000, random.Random(0)))  # type: ignore[arg-type]
    assert sum(map(len, groups)) == 256
    assert max(len(group) * max(map(len, group)) for group in groups) <= 1000


def test_padding_does_not_change_a_rows_loss(tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    model = SmolLM3ForCausalLM(pretraining.base_config(tokenizer))
    rows = [row for i in range(3) if (row := build_row(record(i), tokenizer, PromptStyle(i + 1), random.Random(i)))]
    together = pretraining.evaluate(model, rows, tokenizer.pad_token_id)["loss"]
    alone = [pretraining.evaluate(model, [row], tokenizer.pad_token_id)["loss"] * len(row.target_ids) for row in rows]
    assert together == pytest.approx(sum(alone) / sum(len(row.target_ids) for row in rows), rel=1e-5)


def test_planted_heads_copy_before_any_training(tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    model = SmolLM3ForCausalLM(pretraining.base_config(tokenizer))
    batch = pretraining.repeated_tokens(len(tokenizer), 4, 128, torch.Generator().manual_seed(1))

    def accuracy() -> float:
        with torch.no_grad():
            logits, labels, _, _ = pretraining.selected_logits(model, batch)
        return (logits.argmax(-1) == labels).float().mean().item()

    assert accuracy() < 0.02
    pretraining.plant_induction(model, torch.Generator().manual_seed(0))
    assert accuracy() > 0.25


# ---- Optimizer and schedule


def test_orthogonalised_updates_have_singular_values_near_one() -> None:
    for shape in [(3, 16, 40), (2, 40, 16)]:
        values = torch.linalg.svdvals(orthogonalise(torch.randn(*shape)))
        assert values.min() > 0.4
        assert values.max() < 1.3


def test_matrices_go_to_muon_and_the_rest_to_adamw() -> None:
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(4, 3), "mix": torch.nn.Linear(3, 5)})
    optimizer = MuonAdamW(model.named_parameters())
    kinds = {group["kind"]: [tuple(p.shape) for p in group["params"]] for group in optimizer.param_groups}
    assert kinds == {"muon": [(5, 3)], "adamw": [(4, 3), (5,)]}
    target = torch.randn(8, 5)
    inputs = torch.randint(0, 4, (8,))
    losses = []
    for _ in range(60):
        loss = (model["mix"](model["embed"](inputs)) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] * 0.9


def test_the_learning_rate_rises_holds_and_ends_at_zero() -> None:
    factors = [trapezoid(progress, warmup=0.1, hold=0.5) for progress in (0.0, 0.05, 0.1, 0.5, 0.75, 1.0, 1.1)]
    assert factors == pytest.approx([0, 0.5, 1, 1, 0.5, 0, 0])


# ---- The run


def test_a_run_saves_a_loadable_base_and_resumes(
    folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = pretraining.base_config(tokenizer)
    tiny.update({"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2})
    tiny.head_dim = 16
    monkeypatch.setattr(pretraining, "base_config", lambda tokenizer: tiny)
    monkeypatch.setattr(rows_module, "held_out_records", lambda data, count=200: [record(999)])
    monkeypatch.setattr(pretraining, "held_out_records", lambda data: [record(999)])
    output = tmp_path / "out"
    arguments = ["--stage", "base", "--data", str(folder), "--output", str(output), "--tokenizer", str(ROOT)]
    arguments += ["--warm_minutes", "0.001", "--tokens_per_batch", "512", "--threads", "1", "--max_minutes"]
    train_hf.main([*arguments, "0.02"])
    model = SmolLM3ForCausalLM.from_pretrained(output / "final")
    assert model.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(output / "final").chat_template == tokenizer.chat_template
    counters = json.loads((output / "checkpoint" / "counters.json").read_text())
    train_hf.main([*arguments, str(counters["spent"] / 60 + 0.05)])
    resumed = json.loads((output / "checkpoint" / "counters.json").read_text())
    assert resumed["step"] > counters["step"]
    entries = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert set(entries[-1]["evaluation"]) == {"seen tools", "unseen tools"}


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
