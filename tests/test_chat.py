"""The comparison with the plain base: nothing differs where nothing should, and what differs is found."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import SmolLM3ForCausalLM

from eval import chat
from eval.resumable import PartialResults
from tiny_models import SmolLMDiffusionConfig, SmolLMDiffusionForCausalLM, tiny_text_config
from tiny_tokenizer import tiny_tokenizer
from training.data import write_records

CHAT = chat.Prompt("c", "own chat", [{"role": "user", "content": "What is the weather?"}], thinks=False)
MATHS = chat.Prompt("m", "own maths", [{"role": "user", "content": "What is 12 + 3?"}], thinks=True)


def tiny_pair(new_tokens: int = 5) -> chat.Pair:
    """A random model around the tiny tokenizer, and its plain base."""
    torch.manual_seed(0)
    tokenizer, text_config = tiny_tokenizer(), tiny_text_config()
    text_config.vocab_size, text_config.max_position_embeddings = len(tokenizer) + 3, 8192
    limits = {"max_value_tokens": 4, "max_call_tokens": 20, "string_budget": 4, "number_budget": 4}
    head = {"head_hidden_size": 32, "head_num_layers": 1, "head_num_heads": 2}
    model = SmolLMDiffusionForCausalLM(SmolLMDiffusionConfig(text_config=text_config, **head, **limits)).eval()
    model.generation_config.tool_call_threshold = 1.0  # never calls of its own accord
    return chat.Pair(model, chat.plain_base(model, None, torch.float32, "cpu"), tokenizer, new_tokens)


@pytest.fixture(scope="module")
def pair() -> chat.Pair:
    """For tests that change nothing about it."""
    return tiny_pair()


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, pair: chat.Pair) -> chat.Pair:
    """The command with the tiny pair in place of what it would load, and one prompt."""
    pytest.importorskip("peft")
    monkeypatch.setattr(chat, "load_pair", lambda options: tiny_pair())
    monkeypatch.setattr(chat, "own_prompts", lambda count, seed: [CHAT])
    return pair


def different(found: dict[str, Any]) -> dict[str, int]:
    return {name: found[name][1] for name in chat.COMPARED if name in found}


# ------------------------------------------------------------------------------------------------------------- prompts


def test_own_prompts_are_the_same_for_a_seed_and_end_with_the_user() -> None:
    prompts = chat.own_prompts(9, seed=1)
    assert prompts == chat.own_prompts(9, seed=1)
    assert prompts != chat.own_prompts(9, seed=2)
    assert len({prompt.id for prompt in prompts}) == 18
    assert all(prompt.messages[-1]["role"] == "user" for prompt in prompts)
    assert [prompt.thinks for prompt in prompts] == [False] * 9 + [True] * 9
    assert {len(prompt.messages) for prompt in prompts} == {1, 2, 3}


def test_prompts_of_a_folder_stop_at_a_turn_of_the_user_and_are_never_long(tmp_path: Path) -> None:
    def record(name: str, *said: str, **fields: str) -> dict[str, Any]:
        roles = ("user", "assistant")
        messages = [{"role": roles[place % 2], "content": text} for place, text in enumerate(said)]
        return {"id": name, "messages": messages, "tools": [], "calls": [], **fields}

    chats = [record("a", "Hi", "Hello!", "How are you?", "Fine."), record("b", "x" * 3000, "no")]
    write_records(tmp_path / "text" / "talk.jsonl.gz", chats)
    maths = [record(f"m{number}", "1 + 1?", answer="2", think="It is 2.") for number in range(4)]
    write_records(tmp_path / "text" / "maths.jsonl.gz", maths)
    found = chat.text_prompts(tmp_path, limit=3)
    assert [prompt.group for prompt in found] == ["text chat"] + ["text maths"] * 3
    assert [message["content"] for message in found[0].messages] == ["Hi", "Hello!", "How are you?"]
    assert [prompt.thinks for prompt in found] == [False, True, True, True]
    assert len(chat.text_prompts(tmp_path, limit=0)) == 5
    assert chat.text_prompts(tmp_path / "elsewhere", limit=3) == []


# ---------------------------------------------------------------------------------------------------------- comparison


def test_logits_are_compared_by_their_bits() -> None:
    numbers = torch.tensor([0.0, 1.0, float("nan")])
    assert chat.differing(numbers, numbers.clone()) == 0
    assert chat.differing(numbers, torch.tensor([-0.0, 1.0, float("nan")])) == 1
    assert chat.differing(numbers, torch.nextafter(numbers, torch.tensor(2.0))) == 2
    assert chat.differing(numbers, numbers[:2]) == 3
    assert chat.differing(numbers.bfloat16(), numbers) == 3


def test_the_plain_base_is_a_model_of_transformers_with_the_same_weights(pair: chat.Pair) -> None:
    assert type(pair.base) is SmolLM3ForCausalLM
    assert pair.base is not pair.model.base
    tensors, differ = chat.compare_weights(pair)
    assert tensors == len(pair.model.base.state_dict())
    assert differ == 0


@pytest.mark.parametrize("prompt", [CHAT, MATHS], ids=["chat", "thinking"])
@pytest.mark.parametrize("shows_tools", [False, True], ids=["plain", "tools shown"])
def test_model_and_base_talk_alike_bit_for_bit(pair: chat.Pair, prompt: chat.Prompt, shows_tools: bool) -> None:
    found = chat.compare(pair, prompt, shows_tools, ours_first=True)
    assert not any(different(found).values())
    assert all(found[name][0] > 0 for name in different(found))
    assert ("steps" in found) is not shows_tools
    if shows_tools:
        assert found["decision"] == "both talk"
        least = 2 if not prompt.thinks else 5  # two replies, and what opens and closes a thought
        assert found["tokens"][0] >= least


def test_one_changed_weight_of_the_base_is_found() -> None:
    pair = tiny_pair()
    with torch.no_grad():
        weight = pair.base.model.layers[0].mlp.down_proj.weight
        weight[0, 0] += 0.5
    assert chat.compare_weights(pair)[1] == 1
    found = chat.compare(pair, CHAT, shows_tools=False, ours_first=False)
    assert found["forward"][1] > 0
    assert found["steps"][1] > 0


def test_another_base_may_be_named(tmp_path: Path, pair: chat.Pair) -> None:
    pair.model.base.save_pretrained(tmp_path / "published")
    base = chat.plain_base(None, str(tmp_path / "published"), torch.float32, "cpu")
    assert chat.compare_weights(chat.Pair(pair.model, base, pair.tokenizer, 5))[1] == 0


def test_tokens_that_one_reply_has_more_differ() -> None:
    assert chat._tokens([1, 2, 3], [1, 2, 3]) == [3, 0]
    assert chat._tokens([1, 2], [1, 3, 4]) == [3, 2]


def test_a_call_is_no_talk_and_is_counted_as_one() -> None:
    pair = tiny_pair()
    pair.model.generation_config.tool_call_threshold = 0.0  # always calls
    found = chat.compare(pair, CHAT, shows_tools=True, ours_first=True)
    assert found["decision"] == "model calls, base talks"
    assert found["tokens"] == [len(pair.base_writes(pair.encode(CHAT, chat.TOOLS))), 0]


def test_an_adapter_that_is_off_changes_nothing() -> None:
    pytest.importorskip("peft")
    pair = tiny_pair()
    assert chat.add_random_adapter(pair, seed=0)
    assert pair.model.has_draft_adapter
    assert chat.compare_weights(pair)[1] == 0
    for shows_tools in (False, True):
        assert not any(different(chat.compare(pair, CHAT, shows_tools, ours_first=True)).values())


# ------------------------------------------------------------------------------------------------------------- command


def test_a_run_writes_what_it_shows(alone: chat.Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "chat.json"
    chat.main(["--data", str(tmp_path), "--limit", "1", "--out", str(out)])
    shown = capsys.readouterr().out
    report = json.loads(out.read_text(encoding="utf-8"))
    assert report["differences"] == 0
    assert report["adapter"] == {"changes_drafts": True}
    assert list(report["weights"]) == list(chat.STATES)
    rows = [(row["model"], row["group"], row["tools"], row["prompts"]) for row in report["rows"]]
    assert rows == [(state, "own chat", tools, 1) for state in chat.STATES for tools in ("none", "shown")]
    for row in report["rows"]:
        assert str(row["forward"]["compared"]) in shown
        assert str(row["reply_ms"]["ratio"]) in shown
    assert "own prompts only" in shown
    assert [path.name for path in tmp_path.iterdir()] == ["chat.json"]


def test_an_interrupted_run_says_so_and_goes_on(
    alone: chat.Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, compare, asked = tmp_path / "chat.json", chat.compare, list[str]()

    def interrupted(pair: chat.Pair, prompt: chat.Prompt, shows_tools: bool, ours_first: bool) -> dict[str, Any]:
        asked.append(prompt.id)
        if len(asked) == 3:  # one of them warms up
            raise KeyboardInterrupt
        return compare(pair, prompt, shows_tools, ours_first)

    arguments = ["--data", str(tmp_path), "--limit", "1", "--out", str(out)]
    monkeypatch.setattr(chat, "compare", interrupted)
    with pytest.raises(SystemExit, match="1 results are kept"):
        chat.main(arguments)
    with pytest.raises(SystemExit, match="another new_tokens"):
        chat.main([*arguments, "--new-tokens", "3"])
    asked[:] = ["", "", ""]
    chat.main(arguments)
    assert len(asked) == 3 + 1 + 4 - 1
    assert json.loads(out.read_text(encoding="utf-8"))["differences"] == 0


def test_a_run_that_finds_a_difference_ends_with_status_1(
    alone: chat.Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = tiny_pair()
    with torch.no_grad():
        changed.base.model.norm.weight.mul_(1.5)
    monkeypatch.setattr(chat, "load_pair", lambda options: changed)
    out = tmp_path / "chat.json"
    with pytest.raises(SystemExit) as stopped:
        chat.main(["--data", str(tmp_path), "--out", str(out)])
    assert stopped.value.code == 1
    report = json.loads(out.read_text(encoding="utf-8"))
    assert report["weights"][chat.STATES[0]]["different"] == 1
    assert report["rows"][0]["forward"]["different"] > 0
    assert chat.differences(report) == report["differences"] > 1


def test_without_peft_the_adapter_is_left_out_by_name(
    pair: chat.Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: Any) -> bool:
        raise ImportError("A draft adapter needs the peft library")

    monkeypatch.setattr(chat, "add_random_adapter", missing)
    store = PartialResults(tmp_path / "chat.json", {})
    report = chat.measure(pair, [CHAT], store, seed=0)
    assert report["adapter"] == {"left_out": "A draft adapter needs the peft library"}
    assert [row["model"] for row in report["rows"]] == [chat.STATES[0]] * 2


def test_replies_that_part_where_both_tokens_are_as_likely_are_told_from_others(
    pair: chat.Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = pair.encode(CHAT, [])
    with torch.no_grad():
        likely = pair.base(torch.cat([ids, torch.tensor([[7]])], dim=1)).logits[0, -1].argsort(descending=True)
    first, second, last = (int(likely[place]) for place in (0, 1, -1))
    assert chat.near_tie(pair, ids, [7, first, 3], [7, first, 3]) is None
    assert chat.near_tie(pair, ids, [7, first], [7, last]) is None
    monkeypatch.setattr(chat, "NEAR_TIE", 1e9)
    assert chat.near_tie(pair, ids, [7, first, 3], [7, second]) == 1


def test_the_first_state_gets_all_prompts_and_the_next_the_first_of_each_group(
    pair: chat.Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = {"forward": [1, 0], "tokens": [1, 0], "seconds": {"forward": [1.0, 1.0], "reply": [1.0, 1.0]}}
    monkeypatch.setattr(chat, "compare", lambda *_, **__: same)
    monkeypatch.setattr(chat, "ADAPTER_PROMPTS", 2)
    for state, counts in ((chat.STATES, [3] * 4 + [2] * 4), (chat.STATES[1:], [3] * 4)):
        monkeypatch.setattr(chat, "states", lambda *_, state=state: iter(state))
        store = PartialResults(tmp_path / f"{len(state)}.json", {})
        report = chat.measure(pair, chat.own_prompts(3, seed=0), store, seed=0)
        assert [row["prompts"] for row in report["rows"]] == counts
    assert "adapter off/own-maths-1/True" in PartialResults(tmp_path / "2.json", {})
    assert "adapter off/own-maths-2/True" not in PartialResults(tmp_path / "2.json", {})


def test_a_wrong_device_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"eval\.chat: --device abacus: torch cannot use it here"):
        chat.main(["--device", "abacus", "--data", str(tmp_path), "--out", str(tmp_path / "chat.json")])
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_model_is_one_message(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    with pytest.raises(SystemExit, match=r"eval\.chat: --model .*nowhere: no model could be loaded"):
        chat.main(["--model", str(nowhere), "--data", str(tmp_path), "--out", str(tmp_path / "chat.json")])
    assert list(tmp_path.iterdir()) == []  # nothing that would refuse the right model
