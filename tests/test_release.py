"""A release: what it is made of, that a fresh process must be able to use it, and how it gets into a Hub's repo."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, constants
from safetensors.torch import load_file, save_file

import release as command
from loopback_hub import ATTRIBUTES, TOKEN, LoopbackHub, serving
from release_models import CODE, answering_model, saved_model
from repo_package import ROOT
from tiny_tokenizer import tiny_tokenizer
from training.release import (
    Base,
    ReleaseError,
    check_complete,
    check_release,
    pinned_base,
    plain_card,
    push,
    release,
    stage,
    with_released_links,
)

REPO = "org/model"
OF_A_MODEL = {
    *("LICENSE", "README.md", "config.json", "generation_config.json", "model.safetensors"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def edit_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A saved tiny model with what lies about in folders and belongs to no release."""
    folder = saved_model(tmp_path / "model")
    for name in ("checkpoint-2/optimizer.pt", "checkpoint-2/model.safetensors", "training_args.bin", "app.py", "x.md"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("not released")
    return folder


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "target").mkdir()
    return tmp_path / "target"


# ---------------------------------------------------------------------- what it is made of


def test_a_release_holds_what_loading_needs_and_nothing_else(model: Path, target: Path) -> None:
    assert set(stage(model, target)) == names(target) == OF_A_MODEL | CODE
    assert (target / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    assert (target / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_an_adapter_is_released_when_the_config_has_one(model: Path, target: Path) -> None:
    (model / "adapter").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (model / "adapter" / name).write_text("{}")
    assert not any(name.startswith("adapter/") for name in stage(model, target))
    edit_config(model, draft_adapter=True)
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"} <= set(stage(model, target))
    (model / "adapter" / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks adapter/adapter_config\.json"):
        stage(model, target)


def test_weights_in_several_files_are_released_with_their_index(model: Path, target: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    half = len(tensors) // 2
    parts = {"a.safetensors": list(tensors)[:half], "b.safetensors": list(tensors)[half:]}
    for name, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, model / name)
    places = {key: name for name, keys in parts.items() for key in keys}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    shards = {"model.safetensors.index.json", *parts}
    assert set(stage(model, target)) == (OF_A_MODEL | CODE | shards) - {"model.safetensors"}


def test_a_release_of_the_head_alone_holds_its_keys_and_names_its_base(model: Path, target: Path) -> None:
    stage(model, target, Base("org/base", COMMIT))
    whole, head = load_file(model / "model.safetensors"), load_file(target / "model.safetensors")
    assert head.keys() == {key for key in whole if key.startswith("diffusion_head.")}
    assert all(torch.equal(head[key], whole[key]) for key in head)
    config = json.loads((target / "config.json").read_text())
    assert (config["base_model_name_or_path"], config["base_revision"]) == ("org/base", COMMIT)
    assert config["head_only_checkpoint"] is True
    card = ModelCard.load(target / "README.md").data
    assert (card.base_model, card["base_model_relation"]) == ("org/base", "adapter")


@pytest.mark.parametrize("missing", ["tokenizer.json", "chat_template.jinja", "generation_config.json"])
def test_a_folder_that_lacks_a_part_of_the_model_is_refused(missing: str, model: Path, target: Path) -> None:
    (model / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {re.escape(missing)}, so it is no complete model"):
        stage(model, target)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="nothing to release"):
        release(tmp_path, REPO)


def test_a_folder_without_its_code_is_refused(model: Path) -> None:
    check_complete(model)
    (model / "modeling_smollm_diffusion.py").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks modeling_smollm_diffusion\.py"):
        release(model, REPO)


def test_a_head_on_a_base_of_this_machine_is_refused(model: Path) -> None:
    edit_config(model, head_only_checkpoint=True, base_model_name_or_path="HuggingFaceTB/SmolLM3-3B")
    check_complete(model)
    edit_config(model, base_model_name_or_path=str(model))
    with pytest.raises(ValueError, match="is a folder of this machine"):
        release(model, REPO)


def test_the_base_of_a_head_must_be_known_at_a_revision(model: Path) -> None:
    with pytest.raises(ReleaseError, match=r"names no repo of its base.*--base_model"):
        pinned_base(model, None, COMMIT)
    with pytest.raises(ReleaseError, match=r"at which revision its base org/base is.*--base_revision"):
        pinned_base(model, "org/base", None)
    assert pinned_base(model, "org/base", COMMIT) == Base("org/base", COMMIT)
    edit_config(model, base_model_name_or_path="org/other", base_revision=COMMIT)
    assert pinned_base(model, None, None) == Base("org/other", COMMIT)


# ---------------------------------------------------------------------- its card


def test_a_card_takes_its_pictures_and_documents_along_and_no_dead_links(model: Path, target: Path) -> None:
    (model / "docs" / "plots").mkdir(parents=True)
    for name in ("docs/plots/a.png", "docs/moving.gif", "code.py"):
        (model / name).write_bytes(b"x")
    (model / "docs" / "page.md").write_text("![a](plots/a.png) [card](../README.md) [up](../../elsewhere.md)")
    text = (
        "---\nlicense: mit\nname: '[a](b)'\n---\n[page](docs/page.md#part) [web](https://example.org) [here](#use) "
        "[code](code.py)\n"
        '<img src="docs/moving.gif">\n```python\nx = [f](code.py)\n```\n`[g](code.py)` [gone](gone.md) [folder](docs)\n'
    )
    (model / "README.md").write_text(text)
    extra = {"docs/page.md", "docs/plots/a.png", "docs/moving.gif"}
    assert set(stage(model, target)) == OF_A_MODEL | CODE | extra
    expected = text.replace(" [code](code.py)\n", " code\n").replace("[gone](gone.md) [folder](docs)", "gone folder")
    assert (target / "README.md").read_text() == expected
    assert (target / "docs" / "page.md").read_text().endswith("[card](../README.md) up")


@pytest.mark.parametrize("shown", ["![a](gone.png)", '<img alt="a" src="gone.gif">', "[a](gone.png)"])
def test_a_card_with_a_dead_picture_is_refused(shown: str, model: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"shows gone\.(png|gif), which is not there"):
        with_released_links(shown, "README.md", model)


def test_a_model_without_a_card_gets_one_that_says_no_more_than_is_known() -> None:
    data = ModelCard(plain_card({}, "mine")).data.to_dict()
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    assert not {"base_model", "license", "model-index", "datasets"} & data.keys()
    tuned = ModelCard(plain_card({"base_model_name_or_path": "org/base"}, "mine")).data.to_dict()
    assert (tuned["base_model"], tuned["base_model_relation"]) == ("org/base", "finetune")


# ---------------------------------------------------------------------- the check


def test_what_no_release_holds_is_found(model: Path, target: Path) -> None:
    stage(model, target)
    (target / "weights.pkl").write_bytes(b"")
    with pytest.raises(ReleaseError, match=r"holds weights\.pkl, which no release holds"):
        check_release(target, model)


def test_a_release_that_fails_its_check_is_not_pushed(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Path) -> None:
        raise ReleaseError("It does not work.")

    monkeypatch.setattr(command, "check_release", fail)
    monkeypatch.setattr(command, "push", lambda *_, **__: pytest.fail("it was pushed"))
    with pytest.raises(SystemExit, match=r"^release\.py: It does not work\.$"):
        command.main(["--repo_id", REPO, "--model", str(model)])
    assert capsys.readouterr().out.startswith(f"staged {len(OF_A_MODEL | CODE)} files")


def break_code(release: Path) -> None:
    module = release / "noise_schedule.py"
    module.write_text(module.read_text() + "\nraise RuntimeError('of the test')\n")


def break_weights(release: Path) -> None:
    tensors = load_file(release / "model.safetensors")
    tensors["diffusion_head.final_norm.weight"] += 1
    save_file(tensors, release / "model.safetensors", metadata={"format": "pt"})


def lose_weights(release: Path) -> None:
    tensors = load_file(release / "model.safetensors")
    del tensors["diffusion_head.final_norm.weight"]
    save_file(tensors, release / "model.safetensors", metadata={"format": "pt"})


def lose_template(release: Path) -> None:
    config = json.loads((release / "tokenizer_config.json").read_text())
    del config["response_template"]
    (release / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_code, "RuntimeError: of the test"),
        (break_weights, r"diffusion_head\.final_norm\.weight differs from what is released"),
        (lose_weights, r"missing_keys are diffusion_head\.final_norm\.weight \(1 in all\)"),
        (lose_template, "the tokenizer has no response_template"),
    ],
)
def test_a_fresh_process_finds_what_is_wrong(
    damage: Callable[[Path], None], message: str, model: Path, target: Path
) -> None:
    stage(model, target)
    damage(target)
    with pytest.raises(ReleaseError, match=f"does not work in a fresh process, so nothing was pushed: .*{message}"):
        check_release(target, model)


# ---------------------------------------------------------------------- the push


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    """A Hub that this process talks to, and those that it starts."""
    hub = LoopbackHub()
    with serving(hub) as endpoint:
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        for name, value in {
            "ENDPOINT": endpoint,
            "HUB_DISABLE_XET": "1",
            "TOKEN": TOKEN,
            "HOME": str(tmp_path),
        }.items():
            monkeypatch.setenv(f"HF_{name}", value)
        yield hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a push sees of a release: one large file and small ones."""
    folder = tmp_path / "release"
    (folder / "docs").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(os.urandom(200_000))
    for name in ("README.md", "config.json", "modeling.py", "docs/page.md"):
        (folder / name).write_text(f"contents of {name}")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names(folder)}


def held(hub: LoopbackHub, revision: str = "main") -> dict[str, bytes]:
    return {name: content for name, content in hub.repos[REPO].tree(revision).items() if name != ATTRIBUTES}


def test_a_push_is_one_commit_and_its_tag(hub: LoopbackHub, folder: Path) -> None:
    pushed = push(folder, REPO, tag="v1")
    repo = hub.repos[REPO]
    assert len(repo.commits) == 2  # the first one is the Hub's own
    assert held(hub, "v1") == contents(folder)
    assert ATTRIBUTES in repo.tree()
    assert (repo.tags, pushed.commit) == ({"v1": repo.head}, repo.head)
    assert set(pushed.changed) == names(folder)
    assert pushed.url == f"{hub.endpoint}/{REPO}/tree/v1"


def test_the_same_push_again_changes_nothing(hub: LoopbackHub, folder: Path) -> None:
    first = push(folder, REPO, tag="v1")
    hub.requests.clear()
    for tag in ("v1", None):
        again = push(folder, REPO, tag=tag)
        assert (again.commit, again.changed, again.removed) == (first.commit, (), ())
    assert not [request for request in hub.requests if request.startswith(("PUT", "POST api/models"))]


def test_a_new_release_replaces_what_changed_and_removes_what_is_gone(hub: LoopbackHub, folder: Path) -> None:
    push(folder, REPO, tag="v1")
    before = held(hub)
    (folder / "old_module.py").write_text("gone in v3")
    push(folder, REPO, tag="v2")
    hub.requests.clear()
    (folder / "old_module.py").unlink()
    (folder / "config.json").write_text("new")
    pushed = push(folder, REPO, tag="v3")
    assert (pushed.changed, pushed.removed) == (("config.json",), ("old_module.py",))
    assert held(hub) == held(hub, "v3") == contents(folder)
    assert held(hub, "v1") == before
    assert len(hub.repos[REPO].commits) == 4
    assert not [request for request in hub.requests if request.startswith("PUT")]  # the weights were there


def test_a_tag_of_another_release_is_refused_before_anything_is_written(hub: LoopbackHub, folder: Path) -> None:
    push(folder, REPO, tag="v1")
    (folder / "model.safetensors").write_bytes(os.urandom(200_000))
    hub.requests.clear()
    with pytest.raises(ReleaseError, match=r"tag v1 of org/model is another release \(model\.safetensors differ\)"):
        push(folder, REPO, tag="v1")
    assert len(hub.repos[REPO].commits) == 2
    assert not [request for request in hub.requests if request.startswith("PUT")]


@pytest.mark.parametrize("at", [f"POST api/models/{REPO}/commit/", f"POST api/models/{REPO}/tag/"])
def test_an_interrupted_push_is_finished_by_the_same_command(hub: LoopbackHub, folder: Path, at: str) -> None:
    def cut(request: str) -> None:
        if request.startswith(at):
            raise ConnectionAbortedError

    hub.before = cut
    with pytest.raises(ReleaseError, match=r"cannot be reached.*Run the same command again"):
        push(folder, REPO, tag="v1")
    assert not hub.repos[REPO].tags
    assert [request[:8] for request in hub.requests if request.startswith("PUT")] == ["PUT lfs/"]
    hub.requests.clear()
    hub.before = lambda _: None
    push(folder, REPO, tag="v1")
    assert held(hub, "v1") == contents(folder)
    assert len(hub.repos[REPO].commits) == 2
    assert not [request for request in hub.requests if request.startswith("PUT")]  # the weights were there


KILLED = """
import sys
from pathlib import Path
from training.release import push
push(Path(sys.argv[1]), sys.argv[2], tag="v1")
"""


@pytest.mark.parametrize(
    "at", [f"POST {REPO}.git/info/lfs", f"POST api/models/{REPO}/commit", f"POST api/models/{REPO}/tag"]
)
@pytest.mark.slow
def test_a_killed_push_is_finished_by_the_same_command(hub: LoopbackHub, folder: Path, at: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(folder), REPO], env=environment)

    def kill(request: str) -> None:
        if request.startswith(at):
            process.kill()
            raise ConnectionAbortedError

    hub.before = kill
    assert process.wait(120) == -9
    hub.before = lambda _: None
    hub.requests.clear()
    push(folder, REPO, tag="v1")
    assert held(hub, "v1") == contents(folder)
    assert len(hub.repos[REPO].commits) == 2
    uploads = [request for request in hub.requests if request.startswith("PUT")]
    assert len(uploads) == (1 if "lfs" in at else 0)


def test_a_commit_of_somebody_else_meanwhile_is_not_written_over(hub: LoopbackHub, folder: Path) -> None:
    push(folder, REPO)
    (folder / "config.json").write_text("new")

    def meanwhile(request: str) -> None:
        if "/preupload/" in request:
            hub.commit(REPO, {**hub.repos[REPO].tree(), "theirs.md": b"theirs"})

    hub.before = meanwhile
    with pytest.raises(ReleaseError, match="Somebody else changed org/model meanwhile"):
        push(folder, REPO)
    assert held(hub)["theirs.md"] == b"theirs"


def test_a_card_of_the_repo_can_be_kept_with_all_that_is_no_model(hub: LoopbackHub, folder: Path) -> None:
    theirs = {"README.md": b"by hand", "docs/page.md": b"by hand", "data.csv": b"1", "old.py": b"", "a.bin": b""}
    hub.commit(REPO, theirs)
    pushed = push(folder, REPO, keep_card=True)
    assert set(pushed.changed) == {"config.json", "modeling.py", "model.safetensors"}
    assert set(pushed.removed) == {"old.py", "a.bin"}
    assert {name: held(hub)[name] for name in ("README.md", "docs/page.md", "data.csv")} == {
        name: theirs[name] for name in ("README.md", "docs/page.md", "data.csv")
    }
    assert held(hub)["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_a_repo_is_private_when_asked_for(hub: LoopbackHub, folder: Path) -> None:
    push(folder, REPO, private=True)
    assert hub.repos[REPO].private
    hub.repos[REPO].private = False
    with pytest.raises(ReleaseError, match="exists and is public"):
        push(folder, REPO, private=True)


@pytest.mark.parametrize(
    ("repo", "token", "message"),
    [
        (REPO, None, "knows no token of yours: run `hf auth login`"),
        (REPO, "of somebody else", "knows no token of yours"),
        ("strangers/model", TOKEN, "Your token may not do that to strangers/model"),
        ("no repo/id", TOKEN, "'no repo/id' is no repo id: it is like owner/name"),
    ],
)
def test_a_refusal_of_the_hub_is_one_sentence(
    hub: LoopbackHub, folder: Path, repo: str, token: str | None, message: str
) -> None:
    with pytest.raises(ReleaseError, match=message) as raised:
        push(folder, repo, api=HfApi(token=token or False))
    assert "\n" not in str(raised.value)
    assert not hub.repos


def test_a_hub_that_is_not_there_is_one_sentence(folder: Path, hub: LoopbackHub) -> None:
    with pytest.raises(ReleaseError, match=r"cannot be reached.*Run the same command again"):
        push(folder, REPO, api=HfApi(endpoint="http://127.0.0.1:9", token=TOKEN))


def test_offline_mode_is_named(folder: Path, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ReleaseError, match="HF_HUB_OFFLINE is set"):
        push(folder, REPO)


def test_a_branch_of_the_base_is_pinned_to_its_commit(hub: LoopbackHub, model: Path) -> None:
    commit = hub.commit("org/base", {"config.json": b"{}"})
    assert pinned_base(model, "org/base", "main") == Base("org/base", commit)
    with pytest.raises(ReleaseError, match="The Hub has no org/none at main, or does not show it"):
        pinned_base(model, "org/none", "main")
    with pytest.raises(ReleaseError, match="The Hub has no"):
        pinned_base(model, "org/base", "v9")


# ---------------------------------------------------------------------- the command


def test_the_command_checks_and_pushes_and_says_what_it_did(
    hub: LoopbackHub, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--repo_id", REPO, "--model", str(model), "--revision", "v1"]
    command.main(arguments)
    lines = capsys.readouterr().out.splitlines()
    checked = [line.split()[1].rstrip(":") for line in lines if line.startswith("checked ")]
    assert checked == ["files", "tokenizer", "model", "weights", "answer"]
    commit = hub.repos[REPO].head
    count = len(OF_A_MODEL | CODE)
    assert lines[-3:] == [
        f"pushed {REPO}: commit {commit[:12]}, {count} files written, 0 removed",
        "tagged v1",
        f"{hub.endpoint}/{REPO}/tree/v1",
    ]
    assert held(hub, "v1").keys() == OF_A_MODEL | CODE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either --repo_id, to push a release, or --folder"),
        (["--repo_id", REPO, "--folder", "out"], "either --repo_id"),
        (["--folder", "out", "--revision", "v1"], "leave them out with --folder"),
        (["--repo_id", REPO, "--base_model", "org/base"], "go with --head_only"),
        (["--repo_id", REPO, "--model", "not there"], "--model not there is no folder"),
        (["--repo_id", REPO, "--head_only"], "names no repo of its base"),
    ],
)
def test_a_wrong_option_is_one_sentence(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        command.main(arguments)


def test_a_folder_that_holds_something_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit, match="is not empty"):
        command.main(["--folder", str(tmp_path)])
    assert names(tmp_path) == {"mine.txt"}


@pytest.mark.slow
def test_a_head_is_released_onto_a_base_that_has_the_weights_it_was_trained_on(
    hub: LoopbackHub, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (0, 1):
        answering_model(seed).base.save_pretrained(tmp_path / f"base-{seed}")
        hub.serve_folder("org/base", tmp_path / f"base-{seed}")
    (first, _), (second, _) = hub.repos["org/base"].commits
    arguments = ["--repo_id", REPO, "--model", str(model), "--head_only", "--base_model", "org/base"]
    with pytest.raises(SystemExit, match="differs from what is released: the base has other weights"):
        command.main([*arguments, "--base_revision", second])
    assert REPO not in hub.repos
    command.main([*arguments, "--base_revision", first])
    assert json.loads(held(hub)["config.json"])["base_revision"] == first
    assert "checked weights: " in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_commands_of_the_docs_work_as_they_stand(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("loopback_hub.OWNERS", ("you",))
    text = (ROOT / "docs" / "release.md").read_text()
    blocks = re.findall(r"^```(bash|console|python)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert [kind for kind, _ in blocks] == ["console", "bash", "python", "python", "bash"]
    for kind, block in blocks:
        if kind == "python":
            program = block.replace('"."', repr(str(ROOT)))
            done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-3000:]
            continue
        line, _, shown = block.partition("\n")
        program, script, *arguments = shlex.split(line.removeprefix("$ "))
        assert (program, script) == ("python", "release.py")
        capfd.readouterr()
        command.main(arguments)
        if kind == "console":
            printed = capfd.readouterr().out
            kinds = [re.sub(r"[0-9a-f]{16}|[\d.]+", "N", one).splitlines() for one in (printed, shown)]
            assert kinds[0] == kinds[1]
    assert hub.repos.keys() == {"you/your-model", "you/your-base", "you/your-head"}
    assert hub.repos["you/your-model"].tags["v1.0"] == hub.repos["you/your-model"].head


@pytest.mark.slow
def test_a_plain_base_is_released_too(hub: LoopbackHub, tmp_path: Path) -> None:
    answering_model().base.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    command.main(["--repo_id", REPO, "--model", str(tmp_path / "base")])
    assert held(hub).keys() == OF_A_MODEL


@pytest.mark.slow
def test_the_shipped_model_is_released_and_loads_from_the_hub(hub: LoopbackHub, tmp_path: Path) -> None:
    command.main(["--repo_id", REPO, "--revision", "v1"])
    released = held(hub, "v1")
    assert released.keys() >= CODE
    assert {name for name in released if name.endswith(".py")} == CODE
    assert {Path(name).suffix for name in released} <= {
        "",
        ".py",
        ".json",
        ".jinja",
        ".safetensors",
        ".md",
        ".png",
        ".gif",
    }
    assert released["model.safetensors"] == (ROOT / "model.safetensors").read_bytes()
    program = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=False, revision="v1")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, revision="v1")
tool = {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
print(model.respond([{"role": "user", "content": "Weather in Lisbon?"}], tools=[tool], tokenizer=tokenizer).mode)
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", program, REPO],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-1] == "tool"
