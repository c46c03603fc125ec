"""The ablation: what a choice changes, that results of other options are refused, and what the table says."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from eval import ablation
from eval.decoding_ablation import SHUT
from test_head_training import base  # noqa: F401
from tiny_tokenizer import tiny_tokenizer
from training import distill as distillation
from training.distill import DistillRun
from training.head import HeadRun


def words(tmp_path: Path, *more: str) -> list[str]:
    return [
        *("--base", str(tmp_path / "base"), "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out.json")),
        *("--steps", "1", "--rows", "2", "--prompts", "2", "--eval-rows", "1", "--seeds", "1", *more),
    ]


def arguments(tmp_path: Path, *more: str) -> Any:
    return ablation.parse_arguments(words(tmp_path, *more))


def test_every_choice_changes_an_option_and_only_what_it_says(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    known = {field.name for kind in (HeadRun, DistillRun) for field in fields(kind)} | set(ablation.MODEL_OPTIONS)
    plain = ablation.options_of(ablation.DEFAULTS, 0, args)
    assert plain["rows_per_batch"] == 2
    assert "noise_samples" not in plain  # the defaults are those of the class
    for name, changes in ablation.VARIANTS.items():
        options = ablation.options_of(name, 0, args)
        assert options.keys() <= known
        differing = {key for key in options if options[key] != plain.get(key)}
        assert differing == changes.keys(), name
        for key, value in changes.items():
            if key not in plain and key in HeadRun.__dataclass_fields__:
                assert getattr(HeadRun, key) != value, f"{name} is the default"


def test_unknown_choices_are_named() -> None:
    with pytest.raises(ValueError, match="Unknown choices: warp"):
        ablation.names_of(["warp"])
    assert ablation.names_of(["lr 0.02", "budgets fixed"]) == ["budgets fixed", "lr 0.02"]
    assert ablation.names_of([]) == list(ablation.VARIANTS)


def test_a_finished_head_is_read_back_and_one_of_other_options_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[Any] = []

    def train(options: dict[str, Any], targets: Path) -> None:
        runs.append(options)
        history = [{"eval_loss": 1.5, "eval_seen_acceptance": 0.25}, {"loss": 2.0}]
        (options["output"] / "trainer_state.json").write_text(json.dumps({"log_history": history}))

    monkeypatch.setattr(ablation, "train", train)
    first = ablation.trial("lr 0.02", 0, arguments(tmp_path))
    assert first["measures"] == {"loss": 1.5, "seen_acceptance": 0.25}
    assert ablation.trial("lr 0.02", 0, arguments(tmp_path)) == first
    assert len(runs) == 1
    with pytest.raises(ValueError, match="max_steps 1, not 2"):
        ablation.trial("lr 0.02", 0, arguments(tmp_path, "--steps", "2"))
    (tmp_path / "work" / "lr_0.02-0" / "run.json").unlink()  # a result from before options were kept
    with pytest.raises(ValueError, match="does not say what it is of"):
        ablation.trial("lr 0.02", 0, arguments(tmp_path))
    assert len(runs) == 1


def test_heads_are_trained_and_compared(
    tmp_path: Path,
    base: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    monkeypatch.setattr(ablation.AutoTokenizer, "from_pretrained", lambda *_, **__: tiny_tokenizer())
    small = {"head_hidden_size": 32, "head_num_layers": 1, "head_num_heads": 2, "acceptance_rows": 0}
    original = ablation.options_of
    monkeypatch.setattr(ablation, "options_of", lambda *given: original(*given) | small)

    def told(self: Any, rows: Any) -> list[Any]:
        call = {"name": "get_weather", "arguments": {"city": "Rome"}}
        shown = {"messages": [{"role": "user", "content": "hi"}], "tools": rows[0].tools, "gold": rows[0].calls}
        return [{"id": row.id, "calls": [call], "soft": {}, **shown} for row in rows]

    monkeypatch.setattr(distillation.BaseTeacher, "targets", told)
    chosen = ["budgets fixed", "targets of the base", "feature_layers last", "copy head off"]
    ablation.main(words(tmp_path, "--variants", *chosen))
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("| defaults, 1 seeds |") for line in lines)
    assert any(line.startswith("| budgets fixed |") for line in lines)
    report = json.loads((tmp_path / "out.json").read_text())
    assert [head["name"] for head in report["heads"]] == ["defaults", *chosen]
    assert all(0 <= head["measures"]["seen_slots_right"] <= 1 for head in report["heads"])
    assert (tmp_path / "work" / "targets-0" / distillation.TARGETS_FILE).exists()
    assert report["heads"][2]["options"]["distill_weight"] == 0.0
    saved = {name: tmp_path / "work" / name / "final" for name in ("defaults-0", "feature_layers_last-0")}
    layers = {name: json.loads((path / "config.json").read_text())["feature_layers"] for name, path in saved.items()}
    assert layers == {"defaults-0": [1, 2], "feature_layers_last-0": [2]}
    weights = load_file(tmp_path / "work" / "copy_head_off-0" / "final" / "model.safetensors")
    assert weights["diffusion_head.copy_gate.bias"].tolist() == [SHUT], "shut while it drafts, too"
    assert not weights["diffusion_head.copy_gate.weight"].any()


def test_a_changed_head_starts_as_an_unchanged_one_but_for_what_is_changed(tmp_path: Path, base: Any) -> None:  # noqa: F811
    run = HeadRun(
        tmp_path / "out", base=str(tmp_path / "base"), head_hidden_size=32, head_num_layers=1, head_num_heads=2
    )
    plain = dict(ablation.fresh_model(run).diffusion_head.named_parameters())
    shut = dict(ablation.changed_model(run, {"copy_head": "off"}).diffusion_head.named_parameters())
    differing = {name for name, weight in shut.items() if not torch.equal(weight, plain[name])}
    assert differing == {"copy_gate.bias"}
    assert {name for name, weight in shut.items() if not weight.requires_grad} == {"copy_gate.weight", "copy_gate.bias"}
    last = dict(ablation.changed_model(run, {"feature_layers": "last"}).diffusion_head.named_parameters())
    assert last.keys() == plain.keys()
    differing = {name for name, weight in last.items() if weight.shape != plain[name].shape}
    assert differing == {"feature_proj.weight"}
    assert last["feature_proj.weight"].shape[1] == 32
    assert all(weight.requires_grad for weight in last.values())
    start = last["layers.0.qkv_proj.weight"].std().item()
    assert start == pytest.approx(plain["layers.0.qkv_proj.weight"].std().item(), rel=0.1)


def test_the_table_has_the_range_of_the_defaults_and_the_difference_of_each_choice() -> None:
    def head(name: str, value: float) -> dict[str, Any]:
        return {"name": name, "measures": {"seen_acceptance": value}}

    shown = ablation.table([head("defaults", 0.4), head("defaults", 0.6)], [head("lr 0.02", 0.45)]).splitlines()
    assert shown[2].startswith("| defaults, 2 seeds | 50.0 (40.0 to 60.0) | - |")
    assert shown[3].startswith("| lr 0.02 | -5.0 | - |")
