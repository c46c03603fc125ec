"""Pushing as people push: `model.push_to_hub`, `tokenizer.push_to_hub`, `Trainer.push_to_hub` give repos that load."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, constants
from transformers import Trainer, TrainingArguments
from transformers.utils import hub as transformers_hub

from loopback_hub import TOKEN, LoopbackHub, serving
from release_models import CODE, answering_model, saved_model
from tiny_models import training_batch
from tiny_tokenizer import tiny_tokenizer
from training import trainer as training_trainer
from training.trainer import BlockDataset, RunOptions, StageTrainer

PUSHED, TRAINED, STAGE = "org/pushed", "org/trained", "org/stage"
NEEDED = {*CODE, "config.json", "generation_config.json", "model.safetensors"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}

LOAD = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
tool = {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
results = {}
for repo in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(repo, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True)
    reply = model.respond([{"role": "user", "content": "Weather?"}], tools=[tool], tokenizer=tokenizer,
                          tool_choice="required", max_tool_calls=1)
    results[repo] = [sum(float(p.detach().double().sum()) for p in model.parameters()), reply.mode]
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[LoopbackHub]:
    """A Hub that this process talks to, through huggingface_hub and through transformers."""
    hub = LoopbackHub()
    with serving(hub) as endpoint, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", endpoint)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setattr(transformers_hub, "_hf_api", HfApi(endpoint=endpoint, token=TOKEN))
        yield hub


def plain_trainer(folder: Path) -> Any:
    """transformers' own `Trainer` after one step on our model's head."""
    model = answering_model(seed=1)
    rows = [training_batch(model.config, rows=2)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        hub_model_id=TRAINED,
        hub_token=TOKEN,
        max_steps=1,
        learning_rate=1e-3,
        per_device_train_batch_size=1,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=lambda batches: batches[0],
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def loaded(hub: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, list[Any]]]:
    """Of each repo the model that was pushed, and what a fresh process says of the one that it loads."""
    place = tmp_path_factory.mktemp("push")
    model = answering_model()
    model.push_to_hub(PUSHED)
    tiny_tokenizer().push_to_hub(PUSHED)
    trainer = plain_trainer(place / "run")
    trainer.push_to_hub()
    (place / "home").mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(place / "home"), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", LOAD, PUSHED, TRAINED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, env=environment, cwd=place / "home")
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])
    return {PUSHED: (model, results[PUSHED]), TRAINED: (trainer.model, results[TRAINED])}


@pytest.mark.parametrize("repo", [PUSHED, TRAINED])
def test_what_was_pushed_loads_and_calls(repo: str, loaded: dict[str, tuple[Any, list[Any]]]) -> None:
    model, (weights, mode) = loaded[repo]
    assert weights == pytest.approx(sum(float(p.detach().double().sum()) for p in model.parameters()), rel=1e-6)
    assert mode == "tool"


def test_model_and_tokenizer_push_their_own_files(hub: LoopbackHub, loaded: dict[str, Any]) -> None:
    files = hub.repos[PUSHED].tree().keys() - {".gitattributes"}
    assert files == NEEDED | TOKENIZER | {"README.md"}


def test_the_trainer_of_transformers_pushes_its_options_as_the_only_pickle(
    hub: LoopbackHub, loaded: dict[str, Any]
) -> None:
    files = hub.repos[TRAINED].tree().keys()
    assert files >= NEEDED | TOKENIZER
    assert {name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl"))} == {"training_args.bin"}


def stage_trainer(output: Path, repo: str | None) -> Any:
    dataset = BlockDataset[int](lambda rng, progress: 0, lambda example: 1.0, 1, 16, seed=0)
    options = RunOptions(output=output, max_steps=1, push_to_hub=repo)
    return StageTrainer(torch.nn.Linear(1, 1), options, dataset, lambda rows: {})


def test_our_trainer_releases_what_its_stage_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released: list[tuple[Path, str]] = []
    monkeypatch.setattr(training_trainer, "release", lambda *what: released.append(what))
    stage_trainer(tmp_path, STAGE).push_to_hub()
    stage_trainer(tmp_path, None).push_to_hub("org/other")
    assert released == [(tmp_path / "final", STAGE), (tmp_path / "final", "org/other")]
    with pytest.raises(ValueError, match="No repo to push to is named"):
        stage_trainer(tmp_path, None).push_to_hub()


@pytest.mark.slow
def test_our_trainer_pushes_no_pickle_and_leaves_the_card_of_the_repo(hub: LoopbackHub, tmp_path: Path) -> None:
    saved_model(tmp_path / "final")
    hub.commit(STAGE, {"README.md": b"by hand", "training_args.bin": b"of transformers' Trainer"})
    stage_trainer(tmp_path, STAGE).push_to_hub()
    tree = hub.repos[STAGE].tree()
    assert tree.keys() == NEEDED | TOKENIZER | {"README.md"}
    assert tree["README.md"] == b"by hand"
    assert len(hub.repos[STAGE].commits) == 2
