"""The training command: options out of files and the command line, what wrong ones are told, install, trackers, and
the configs of several processes."""

import dataclasses
import errno
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml  # type: ignore[import-untyped]
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import SmolLM3ForCausalLM

import train_hf
from repo_package import ROOT
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer
from train_hf import STAGES, StageParser, explanations, main
from training.records import write_records
from training.synthetic_calls import generate
from training.trainer import (
    WEIGHTS_FILE,
    BlockDataset,
    RunOptions,
    StageTrainer,
    TrainingError,
    gather_parameters,
    split_like,
)

CONFIGS = sorted((ROOT / "training" / "configs").glob("*.yaml"))
ACCELERATE = ROOT / "training" / "configs" / "accelerate"


@dataclasses.dataclass(frozen=True)
class PracticeRun(RunOptions):
    """Options of a practice stage.

    Args:
        seed: of the practice alone.
        first_part, second_part: two parts, of which
            100% count: all of them.
    """

    first_part: int = 1
    second_part: list[float] = dataclasses.field(default_factory=list)


@pytest.fixture
def practised(monkeypatch: pytest.MonkeyPatch) -> list[PracticeRun]:
    """A stage that only notes its options."""
    runs: list[PracticeRun] = []
    monkeypatch.setitem(STAGES, "practice", (PracticeRun, runs.append))
    return runs


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def refusal(*arguments: str) -> str:
    """The message with which the command ends."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert isinstance(ended.value.code, str)  # Python prints it and exits with 1
    assert "\n" not in ended.value.code
    return ended.value.code


# ---------------------------------------------------------------------- options


def test_a_file_gives_options_and_the_command_line_wins(tmp_path: Path, practised: list[PracticeRun]) -> None:
    config = write(
        tmp_path / "run.yaml",
        "practice:\n  output: runs/x\n  max_steps: 7\n  adam_lr: 2e-3\n  bf16: true\n  resume: false\n"
        "  data: [a, b]\n  second_part: [1, 2.5]\n  push_to_hub: null\nother:\n  whatever: 1\n",
    )
    main(["--stage", "practice", "--config", str(config), "--max_steps", "9", "--data", "c"])
    main(["--stage=practice", f"--config={config}", "--resume"])
    assert practised == [
        PracticeRun(
            output=Path("runs/x"),
            data=[Path("c")],
            max_steps=9,
            adam_lr=2e-3,
            bf16=True,
            resume=False,
            second_part=[1.0, 2.5],
        ),
        PracticeRun(
            output=Path("runs/x"),
            data=[Path("a"), Path("b")],
            max_steps=7,
            adam_lr=2e-3,
            bf16=True,
            resume=True,
            second_part=[1.0, 2.5],
        ),
    ]


def test_one_folder_of_data_needs_no_list(tmp_path: Path, practised: list[PracticeRun]) -> None:
    main(["--stage", "practice", "--config", str(write(tmp_path / "c.yaml", "practice: {output: o, data: here}"))])
    assert practised[0].data == [Path("here")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("practice: {output: o, max_step: 3}", "no option 'max_step'. Did you mean max_steps"),
        ("practice: {output: o, zzz: 3}", "no option 'zzz'. It has: adam_lr, "),
        (
            "practice: {output: o, max_steps: many}",
            "'max_steps' of stage 'practice' is 'many', but must be of type int",
        ),
        ("practice: {output: o, max_steps: 1.5}", "is 1.5, but must be of type int"),
        ("practice: {output: o, bf16: perhaps}", "is 'perhaps', but must be of type bool"),
        ("practice: {output: o, adam_lr: [1, 2]}", "is [1, 2], but must be of type float"),
        ("practice: {output: o, second_part: [1, x]}", "is [1, 'x'], but must be of type list[float]"),
        ("head: {output: o}", "no options for stage 'practice': it has head, and needs `practice:`"),
        ("just words", "no options for stage 'practice': it is no mapping"),
        ("practice: {output: [", "is no YAML"),
    ],
)
def test_a_wrong_file_is_named_with_what_is_wrong(
    tmp_path: Path, practised: list[PracticeRun], text: str, message: str
) -> None:
    config = write(tmp_path / "wrong.yaml", text)
    said = refusal("--stage", "practice", "--config", str(config))
    assert message in said
    assert str(config) in said
    assert not practised


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stage", "practice"], "required: --output"),
        (["--stage", "practice", "--output", "o", "--max_steps", "many"], "--max_steps/--max-steps: invalid int value"),
        (["--stage", "practice", "--output", "o", "--adam_rl", "1"], "no option '--adam_rl'. Did you mean adam_lr"),
        (["--stage", "practice", "--output", "o", "--warmup_share", "0.5"], "warmup_share must be from 0 to 0.1"),
        (
            ["--stage", "practice", "--output", "o", "--report_to", "paper"],
            "report_to must be one of none, tensorboard",
        ),
        (["--stage", "practice", "--output", "o", "--config", "no/such.yaml"], "no/such.yaml"),
        (["--stage", "base", "--output", "o", "--install"], "makes no model with a head"),
        (["--stage", "head", "--output", "o"], "--base or --head_from is missing"),
        (["--stage", "distill", "--output", "o"], "--model is missing"),
        (["--output", "o"], "--stage is missing: one of tokenizer, base, head"),
    ],
)
def test_wrong_arguments_end_in_one_line(practised: list[PracticeRun], arguments: list[str], message: str) -> None:
    assert message in refusal(*arguments)


def test_an_unknown_stage_names_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--stage", "heads"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert all(stage in said for stage in STAGES)


@pytest.mark.parametrize("error", [TrainingError("the disk\n is full"), ValueError("no"), OSError("gone")])
def test_an_expected_error_of_a_run_is_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(run: Any) -> None:
        raise error

    monkeypatch.setitem(STAGES, "practice", (PracticeRun, fail))
    assert refusal("--stage", "practice", "--output", "o") == f"{type(error).__name__}: {' '.join(str(error).split())}"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (SafetensorError("I/O error: No space left on device (os error 28)"), "No space left on the disk (Safetensor"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"), "No space left on the"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on the disk (OSError"),
        (torch.OutOfMemoryError("CUDA out of memory."), "OutOfMemoryError: CUDA out of memory."),
    ],
)
def test_a_machine_without_room_is_one_line_wherever_it_shows(
    monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    """Such as where the result is saved, after the steps."""

    def fail(run: Any) -> None:
        raise error

    monkeypatch.setitem(STAGES, "practice", (PracticeRun, fail))
    assert refusal("--stage", "practice", "--output", "o").startswith(said)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_says_what_is_safe_and_ends_with_the_signals_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: signal.Signals
) -> None:
    make_data(tmp_path / "data")
    usual = StageTrainer.training_step

    def signalled(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 3:
            os.kill(os.getpid(), number)
        return usual(self, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "training_step", signalled)
    before = signal.getsignal(signal.SIGTERM)
    # A shell starts jobs in the background with SIGINT ignored, and tests may be such a job.
    interrupting = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as ended:
            main(base_command(tmp_path))
    finally:
        signal.signal(signal.SIGINT, interrupting)
    assert ended.value.code == 128 + number
    assert "interrupted at step 3" in caplog.text
    assert "checkpoint-2 is whole" in caplog.text
    assert signal.getsignal(signal.SIGTERM) is before


def test_other_runtime_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(run: Any) -> None:
        raise RuntimeError("shape mismatch")

    monkeypatch.setitem(STAGES, "practice", (PracticeRun, fail))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        main(["--stage", "practice", "--output", "o"])


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STAGES, "practice", (PracticeRun, lambda run: vars(run)["fault"]))
    with pytest.raises(KeyError):
        main(["--stage", "practice", "--output", "o"])


# ---------------------------------------------------------------------- help


@pytest.mark.parametrize("stage", list(STAGES))
def test_help_explains_every_option_of_a_stage(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    fields = STAGES[stage][0].__dataclass_fields__
    texts = explanations(STAGES[stage][0])
    assert not set(fields) - set(texts), "options without a line in the docstring"
    assert not set(texts) - set(fields), "lines in the docstring without an option"
    with pytest.raises(SystemExit) as ended:
        main(["--stage", stage, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    assert all(f"--{name} " in shown or f"--{name}, " in shown for name in fields)
    assert "--install" in shown


def test_help_comes_from_the_nearest_docstring() -> None:
    texts = explanations(PracticeRun)
    assert texts["seed"] == "of the practice alone."
    assert texts["first_part"] == texts["second_part"] == "two parts, of which 100% count: all of them."
    assert texts["lr"] == explanations(RunOptions)["lr"]


def test_help_without_a_stage_names_the_stages(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    shown = capsys.readouterr().out
    assert all(word in shown for word in (*STAGES, "--config", "--install"))


# ---------------------------------------------------------------------- the shipped configs


STAGE_CONFIGS = [(path, stage) for path in CONFIGS for stage in yaml.safe_load(path.read_text())]


@pytest.mark.parametrize(("path", "stage"), STAGE_CONFIGS, ids=lambda value: getattr(value, "stem", value))
def test_every_stage_of_a_shipped_config_is_a_run(path: Path, stage: str) -> None:
    run, _ = StageParser(stage).read(["--stage", stage], path)
    written = yaml.safe_load(path.read_text())[stage]
    for name, value in written.items():
        assert getattr(run, name) == (Path(value) if name == "output" else value)


def test_the_shipped_configs_are_those_promised_and_go_on_from_each_other() -> None:
    assert [path.stem for path in CONFIGS] == ["default-cpu", "default-gpu", "smollm3-3b"]
    for path in CONFIGS:
        stages = yaml.safe_load(path.read_text())
        results = {f"{options['output']}/final" for options in stages.values()} | {"HuggingFaceTB/SmolLM3-3B"}
        sources = [options[name] for options in stages.values() for name in ("base", "model") if name in options]
        assert set(sources) <= results


# ---------------------------------------------------------------------- install and upload


@pytest.fixture
def final(tmp_path: Path) -> Path:
    """A trained model as a stage leaves it."""
    tiny_model().save_pretrained(tmp_path / "out" / "final")
    tiny_tokenizer().save_pretrained(tmp_path / "out" / "final")
    return tmp_path / "out" / "final"


def test_install_copies_the_whole_model_and_no_more(tmp_path: Path, final: Path) -> None:
    root = tmp_path / "root"
    (root / "adapter").mkdir(parents=True)
    (root / "adapter" / "adapter_config.json").write_text("{}")
    write(root / "modeling_smollm_diffusion.py", "# the repository's own")
    train_hf.install(final, root)
    for name in train_hf.MODEL_FILES:
        assert (root / name).read_bytes() == (final / name).read_bytes()
    assert not (root / "adapter").exists()  # of an older model
    assert (root / "modeling_smollm_diffusion.py").read_text() == "# the repository's own"
    (final / "adapter").mkdir()
    write(final / "adapter" / "adapter_config.json", '{"r": 4}')
    train_hf.install(final, root)
    assert json.loads((root / "adapter" / "adapter_config.json").read_text()) == {"r": 4}


def test_an_incomplete_model_is_not_installed(tmp_path: Path, final: Path) -> None:
    (final / "generation_config.json").unlink()
    (tmp_path / "root").mkdir()
    with pytest.raises(FileNotFoundError, match=r"lacks generation_config\.json, so nothing was installed"):
        train_hf.install(final, tmp_path / "root")
    assert not list((tmp_path / "root").iterdir())


def test_a_head_alone_on_a_base_of_this_machine_is_not_installed(tmp_path: Path, final: Path) -> None:
    config = json.loads((final / "config.json").read_text())
    (tmp_path / "base").mkdir()
    config |= {"head_only_checkpoint": True, "base_model_name_or_path": str(tmp_path / "base")}
    write(final / "config.json", json.dumps(config))
    (tmp_path / "root").mkdir()
    with pytest.raises(ValueError, match="holds a head alone, and its base"):
        train_hf.install(final, tmp_path / "root")
    assert not list((tmp_path / "root").iterdir())


def test_the_first_process_alone_uploads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, practised: list[PracticeRun]
) -> None:
    released: list[tuple[Path, str]] = []
    monkeypatch.setattr(train_hf, "release", lambda *what: released.append(what))
    command = ["--stage", "practice", "--output", str(tmp_path), "--push_to_hub", "org/name"]
    monkeypatch.setenv("RANK", "1")
    main(command)
    assert not released
    monkeypatch.setenv("RANK", "0")
    main(command)
    assert released == [(tmp_path / "final", "org/name")]


# ---------------------------------------------------------------------- a real run


def make_data(folder: Path) -> Path:
    """A few synthetic records as `train/` and `dev/`."""
    for part, names in (("train/synthetic_calls", "train"), ("dev/dev", "dev")):
        path = folder / f"{part}.jsonl.gz"
        path.parent.mkdir(parents=True)
        write_records(path, generate(30, 0, names))  # type: ignore[arg-type]
    return folder


def base_command(tmp_path: Path, *more: str) -> list[str]:
    """A run of the base stage that takes a second."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_layers": 4, "num_heads": 4, "num_key_value_heads": 2}
    steps = {"max_steps": 4, "rows_per_batch": 1, "eval_steps": 2, "logging_steps": 1, "eval_rows": 2}
    options = {**sizes, **steps, "warm_share": 0.9, "output": tmp_path / "out", "data": tmp_path / "data"}
    return ["--stage", "base", *(part for name, value in options.items() for part in (f"--{name}", str(value))), *more]


def test_a_run_writes_tensorboard_events_and_goes_on_when_run_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    make_data(tmp_path / "data")
    main(base_command(tmp_path, "--report_to", "tensorboard"))
    (events,) = (tmp_path / "out").rglob("events.out.tfevents*")
    written = accumulator.EventAccumulator(str(events)).Reload()
    scalars = set(written.Tags()["scalars"])
    assert {"train/loss", "train/reply_loss", "train/tokens_per_second", "eval/unseen_loss"} <= scalars
    assert [event.step for event in written.Scalars("train/loss")] == [1, 2, 3, 4]

    for name in ("checkpoint-4", "final"):
        (tmp_path / "out" / name).rename(tmp_path / name)
    main(base_command(tmp_path))
    half, whole, resumed = (
        load_file(folder / WEIGHTS_FILE)
        for folder in (tmp_path / "out" / "checkpoint-2", tmp_path / "checkpoint-4", tmp_path / "out" / "checkpoint-4")
    )
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    assert not all(torch.equal(tensor, resumed[name]) for name, tensor in half.items())
    assert SmolLM3ForCausalLM.from_pretrained(tmp_path / "out" / "final").config.hidden_size == 32
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3, 4]


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_a_missing_tracker_names_its_package(
    monkeypatch: pytest.MonkeyPatch, tracker: str, practised: list[PracticeRun]
) -> None:
    monkeypatch.setattr("training.trainer.find_spec", lambda name: None)
    said = refusal("--stage", "practice", "--output", "o", "--report_to", tracker)
    assert f"pip install {tracker}" in said


# ---------------------------------------------------------------------- several processes


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """What `accelerate launch` reads out of a config; the environment that it would start processes with is set."""
    commands = pytest.importorskip("accelerate.commands.launch")
    launch = pytest.importorskip("accelerate.utils.launch")
    monkeypatch.chdir(ROOT)  # paths in the configs start there

    def read(name: str) -> Any:
        parsed = commands.launch_command_parser().parse_args(["--config_file", str(ACCELERATE / name), "train_hf.py"])
        arguments, _, _ = commands._validate_launch_command(parsed)
        for key, value in launch.prepare_multi_gpu_env(arguments).items():
            monkeypatch.setenv(key, value)
        return arguments

    return read


def test_the_config_of_two_cpu_processes_starts_two(launched: Callable[[str], Any]) -> None:
    arguments = launched("two_cpu.yaml")
    # With `multi_gpu` and without `cpu`, accelerate hands over to torchrun.
    assert (arguments.multi_gpu, arguments.cpu, arguments.num_processes) == (True, False, 2)


def test_the_fsdp_config_splits_the_layers_of_a_base(launched: Callable[[str], Any]) -> None:
    arguments = launched("fsdp.yaml")
    assert arguments.use_fsdp
    plugin = pytest.importorskip("accelerate.utils").FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert "FULL_STATE_DICT" in str(plugin.state_dict_type)
    base = tiny_model().base
    plugin.set_auto_wrap_policy(base)
    split = [module for module in base.modules() if plugin.auto_wrap_policy(module, recurse=False, nonwrapped_numel=0)]
    assert split == list(base.model.layers)


def test_the_deepspeed_config_keeps_parameters_whole(launched: Callable[[str], Any]) -> None:
    arguments = launched("deepspeed_zero2.yaml")
    assert arguments.use_deepspeed
    plugin = pytest.importorskip("accelerate.utils").DeepSpeedPlugin(hf_ds_config=arguments.deepspeed_config_file)
    assert plugin.zero_stage == 2
    assert not plugin.is_zero3_init_enabled()


@pytest.mark.parametrize("enabled", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_muon_is_refused_where_matrices_are_split(tmp_path: Path, enabled: str) -> None:
    def trainer(optimizer: str) -> StageTrainer:
        run = RunOptions(tmp_path, optimizer=optimizer)
        dataset = BlockDataset(lambda rng, progress: [0.0], len, 1, 16, 0)
        made = StageTrainer(torch.nn.Linear(2, 2), run, dataset, lambda rows: {})
        setattr(made, enabled, True)
        return made

    with pytest.raises(TrainingError, match="pass --optimizer adamw"):
        trainer("muon").create_optimizer()
    assert isinstance(trainer("adamw").create_optimizer(), torch.optim.AdamW)


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_split_model_takes_whole_weights_and_gives_them_back(one_process: None) -> None:
    base, other = tiny_model().base, tiny_model().base
    torch.nn.init.normal_(other.model.norm.weight)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    for part in (*base.model.layers, base):
        fully_shard(part, mesh=mesh)
    wanted = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            assert isinstance(parameter, DTensor)
            parameter.copy_(split_like(wanted[name], parameter))
    gather_parameters(base)
    assert not any(isinstance(parameter, DTensor) for parameter in base.parameters())
    assert base.get_output_embeddings().weight is base.get_input_embeddings().weight
    found = base.to(torch.bfloat16).state_dict()
    assert all(torch.equal(found[name], tensor.bfloat16()) for name, tensor in wanted.items())
