"""The maths task and its scoring, and, where lm_eval is installed, the model under the harness."""

import importlib
import json
import subprocess
import sys
from decimal import Decimal
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml  # type: ignore[import-untyped]

from eval.chat import plain_base
from eval.resumable import PartialResults
from eval.tasks import maths_think
from repo_package import ROOT
from training.data import PROBLEMS, held_out_problems, read_records, write_records

needs_harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason='needs pip install "lm_eval[hf]"')


@pytest.fixture(scope="module")
def adapter() -> Any:
    return importlib.import_module("eval.lm_eval_adapter")


@pytest.fixture(scope="module")
def model(adapter: Any) -> Any:
    """The shipped model under the harness, in think mode."""
    torch.set_num_threads(1)
    return adapter.SmolLMDiffusionLM(dtype="float32", device="cpu", batch_size=1, enable_thinking=True)


@pytest.fixture(scope="module")
def base(model: Any) -> Any:
    """The shipped model's base as transformers alone loads it."""
    return plain_base(model.model, None, torch.float32, "cpu")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with three problems."""
    problems = [
        {
            "id": f"problem-{number}",
            "messages": [{"role": "user", "content": f"What is {number} plus {number}?"}],
            "tools": [],
            "calls": [],
            "answer": str(2 * number),
            "think": f"{number} + {number} = {2 * number}.",
        }
        for number in (1, 600, 7)
    ]
    write_records(tmp_path / f"{PROBLEMS}.jsonl.gz", problems)
    return tmp_path


def instance(kind: str, *arguments: Any) -> Any:
    """A request of the harness."""
    return importlib.import_module("lm_eval.api.instance").Instance(kind, {}, arguments, 0)


def request(context: str, tokens: int = 6, **options: Any) -> Any:
    """A request for a reply."""
    asked = {"until": ["<|im_end|>"], "max_gen_toks": tokens, "do_sample": False, **options}
    return instance("generate_until", context, asked)


# ----------------------------------------------------------------------------------------------------------- the task


@pytest.mark.parametrize(
    ("reply", "number"),
    [
        ("72", 72),
        ("It is 1,234.50 dollars.", Decimal("1234.5")),
        ("$-3", -3),
        ("12 apples and 7 pears", 7),
        ("<think>\n3 * 4 = 12\n</think>\nThe answer is 12.", 12),
        ("<think>\n3 * 4 = 12\n</think>\n", None),
        ("<think>\n3 * 4 = 12", None),
        ("no number", None),
        ("", None),
        ("1,23", 23),
        (".5", Decimal("0.5")),
    ],
)
def test_the_last_number_behind_the_thought_counts(reply: str, number: Any) -> None:
    assert maths_think.final_number(reply) == number


@pytest.mark.parametrize(
    ("reply", "exact", "answered"), [("1200", 1, 1), ("1,200.0", 1, 1), ("120", 0, 1), ("none", 0, 0)]
)
def test_a_reply_is_right_when_its_number_is(reply: str, exact: float, answered: float) -> None:
    assert maths_think.score({"answer": "1200"}, [reply]) == {"exact_match": exact, "answered": answered}


def test_problems_come_in_an_order_that_the_file_does_not_decide(data: Path) -> None:
    pytest.importorskip("datasets")
    found = maths_think.problems(data, version=1.0)["test"]
    assert sorted(found["answer"]) == ["1200", "14", "2"]
    assert found.column_names == ["id", "question", "answer"]
    path = data / f"{PROBLEMS}.jsonl.gz"
    write_records(path, list(read_records(path))[::-1])
    assert maths_think.problems(data)["test"]["id"] == found["id"]


def test_the_problems_are_those_that_training_holds_out(data: Path) -> None:
    path = data / f"{PROBLEMS}.jsonl.gz"
    (problem, *_) = read_records(path)
    write_records(path, [{**problem, "id": f"problem-{number}"} for number in range(310)])
    held_out = [record["id"] for record in held_out_problems(data)]
    assert len(held_out) == 300
    assert maths_think.problems(data)["test"]["id"] == held_out


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gsm8k_train.*--data"):
        maths_think.problems(tmp_path)


def test_the_task_says_that_the_shipped_base_may_have_seen_its_problems() -> None:
    class Loader(yaml.SafeLoader):
        """Reads `!function` as a name."""

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    task = yaml.load((ROOT / "eval" / "tasks" / "maths_think.yaml").read_text(encoding="utf-8"), Loader)
    assert "trained before these problems were held out" in task["metadata"]["note"]
    functions = [task["custom_dataset"], task["process_results"]]
    assert all(hasattr(maths_think, name.removeprefix("maths_think.")) for name in functions)
    assert {metric["metric"] for metric in task["metric_list"]} == set(maths_think.score({"answer": "1"}, ["1"]))


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm_eval is installed")
def test_without_the_harness_the_command_says_what_to_install() -> None:
    command = [sys.executable, "-m", "eval.lm_eval_adapter"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert 'pip install "lm_eval[hf]"' in done.stderr
    assert "Traceback" not in done.stderr


# -------------------------------------------------------------------------------------------------- under the harness


@needs_harness
def test_the_harness_knows_the_model_by_its_name(adapter: Any) -> None:
    registry = importlib.import_module("lm_eval.api.registry")
    assert registry.get_model("smollm_diffusion") is adapter.SmolLMDiffusionLM


@needs_harness
def test_replies_are_those_of_the_plain_base_and_as_long_as_the_task_asks(model: Any, base: Any) -> None:
    prompt = model.apply_chat_template([{"role": "user", "content": "hello"}])
    ids = model.tokenizer(prompt, return_tensors="pt")["input_ids"]
    ends = {"eos_token_id": model.tokenizer.eos_token_id, "pad_token_id": model.tokenizer.pad_token_id}
    for tokens in (3, 9):
        (reply,) = model.generate_until([request(prompt, tokens)], disable_tqdm=True)
        expected = base.generate(ids, max_new_tokens=tokens, do_sample=False, **ends)[0, ids.shape[1] :]
        assert expected.shape[0] <= tokens
        whole = model.tokenizer.decode(expected, skip_special_tokens=True)
        assert reply == whole.split("</think>")[-1].lstrip() if "</think>" in whole else reply == whole


@needs_harness
def test_likelihoods_are_those_of_the_plain_base(model: Any, base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "enable_thinking", False)  # the harness takes no likelihoods in think mode
    prompt = model.apply_chat_template([{"role": "user", "content": "hello"}])
    context = model.tokenizer(prompt, return_tensors="pt")["input_ids"]
    greedy = model.tokenizer.decode(base.generate(context, max_new_tokens=3, do_sample=False)[0, context.shape[1] :])
    texts = [greedy, "yes", "No, not on 12 May."]
    found = model.loglikelihood([instance("loglikelihood", prompt, text) for text in texts], disable_tqdm=True)
    assert [is_greedy for _, is_greedy in found] == [True, False, False]
    for text, (chance, _) in zip(texts, found, strict=True):
        whole = model.tokenizer(prompt + text, return_tensors="pt")["input_ids"]
        told = whole[0, context.shape[1] :]
        assert whole[0, : context.shape[1]].tolist() == context[0].tolist()
        with torch.no_grad():
            chances = base(whole).logits.log_softmax(-1)[0, context.shape[1] - 1 : -1]
        assert chance == pytest.approx(chances.gather(-1, told[:, None]).sum().item(), abs=1e-4)


@needs_harness
def test_think_mode_is_asked_for(model: Any) -> None:
    prompt = model.apply_chat_template([{"role": "user", "content": "hello"}])
    assert "/think" in prompt
    assert prompt.endswith("<|im_start|>assistant\n")


@needs_harness
def test_results_that_are_kept_are_not_run_again(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "enable_thinking", False)  # the harness takes no likelihoods in think mode
    prompts = [model.apply_chat_template([{"role": "user", "content": text}]) for text in ("hello", "2 + 2?", "bye")]
    asked = [request(prompt) for prompt in prompts]
    choices = [instance("loglikelihood", prompts[0], word) for word in ("yes", "no")]
    replies = [reply for one in asked for reply in model.generate_until([one], disable_tqdm=True)]
    chances = model.loglikelihood(choices, disable_tqdm=True)
    monkeypatch.setattr(model, "_kept", None)  # put back behind the test
    monkeypatch.setattr(model, "cache_hook", model.cache_hook)
    model.keep_in(PartialResults(tmp_path / "a.json", {}))
    assert model.generate_until(asked[:2], disable_tqdm=True) == replies[:2]
    assert model.loglikelihood(choices, disable_tqdm=True) == chances
    store = PartialResults(tmp_path / "a.json", {})
    assert len(store) == 4
    model.keep_in(store)
    runs = list[int]()
    harness: Any = type(model).__mro__[1]
    generate = harness.generate_until

    def counted(self: Any, requests: Any, disable_tqdm: bool = False) -> Any:
        runs.append(len(requests))
        return generate(self, requests, disable_tqdm)

    monkeypatch.setattr(harness, "generate_until", counted)
    assert model.generate_until(asked, disable_tqdm=True) == replies
    assert runs == [1]
    assert model.loglikelihood(choices, disable_tqdm=True) == chances
    model.generate_until([request(prompts[0], do_sample=True, temperature=1.0)], disable_tqdm=True)
    assert runs == [1, 1]
    assert len(PartialResults(tmp_path / "a.json", {})) == 5


@needs_harness
def test_a_run_of_the_local_task(
    adapter: Any, model: Any, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The shipped model, and one that always answers 14."""
    monkeypatch.setattr(adapter, "SmolLMDiffusionLM", lambda *_, **__: model)
    monkeypatch.setattr(model, "_kept", None)
    monkeypatch.setattr(model, "cache_hook", model.cache_hook)
    answers = iter(["<think>\n7 + 7\n</think>\n14", "<think>\n14", "The answer is 14."])

    def always(self: Any, requests: Any, disable_tqdm: bool = False) -> list[str]:
        return [next(answers).split("</think>")[-1].lstrip() for _ in requests]

    monkeypatch.setattr(type(model).__mro__[1], "generate_until", always)
    out = data / "result.json"
    adapter.main(["--data", str(data), "--limit", "0", "--out", str(out)])
    report = json.loads(out.read_text(encoding="utf-8"))["tasks"]["maths_think"]
    assert report["documents"] == 3
    assert report["metrics"]["answered,none"] == pytest.approx(2 / 3)
    assert report["metrics"]["exact_match,none"] in (0.0, pytest.approx(1 / 3))
    assert "before these problems were held out" in report["note"]
    assert "before these problems were held out" in capsys.readouterr().out
    assert not list(data.glob("*.partial.jsonl"))


@needs_harness
def test_an_unknown_task_and_missing_data_are_one_message_each(
    adapter: Any, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter, "SmolLMDiffusionLM", lambda *_, **__: model)
    monkeypatch.setattr(model, "_kept", None)
    monkeypatch.setattr(model, "cache_hook", model.cache_hook)
    manager = adapter.TaskManager  # which would read all tasks of the harness to know a name that is none of ours
    monkeypatch.setattr(adapter, "TaskManager", lambda **given: manager(**given | {"include_defaults": False}))
    options = ["--data", str(tmp_path), "--out", str(tmp_path / "a.json")]
    with pytest.raises(SystemExit, match="There is no task nonsense"):
        adapter.main([*options, "--tasks", "nonsense"])
    with pytest.raises(SystemExit, match="gsm8k_train"):
        adapter.main(options)
    assert not list(tmp_path.iterdir())
