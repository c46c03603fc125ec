"""The latency command: its requests have the sizes asked for, its phases add up, and what it runs is what it says."""

import json
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from eval import latency
from eval import latency_measure as measure
from eval.gold_choices import Shape
from eval.latency_measure import Cell
from eval.resumable import PartialResults
from eval.soak import tiny_model
from repo_package import load_repo_module

call_decoding = load_repo_module("call_decoding")
scaffolds = load_repo_module("schema_scaffold")

FACTORS: dict[str, tuple[Any, ...]] = {
    "prompt": (20, 64, 9000),
    "slots": (2, 50),
    "accuracy": (1.0, 0.0),
    "mode": ("warm", "prefix reuse", "CUDA graphs", "warm, not split"),
}
CENTRE: dict[str, Any] = {"prompt": 64, "slots": 2, "value": 3, "steps": 2}


@cache
def shape() -> Shape:
    """A tiny random model that may write the calls made here."""
    model, tokenizer = tiny_model()
    model.config.max_call_tokens, model.config.max_value_tokens = 100, 20
    return Shape("a tiny model", model, tokenizer)


@cache
def maker() -> measure.Maker:
    return measure.Maker(shape(), seed=0)


@cache
def runner() -> measure.Runner:
    return measure.Runner(maker())


def run_cell(number: int = 0, **fields: Any) -> dict[str, Any]:
    """What one request costs."""
    cell = Cell(**{**CENTRE, **fields})
    return runner().run(cell, maker().make(cell, number, 0))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command measures few small cells of a tiny model."""
    monkeypatch.setitem(latency.GRIDS, "all", latency.Grid(Cell(**CENTRE), FACTORS))
    monkeypatch.setattr(latency, "load", lambda *_: shape())


def run(out: Path, *options: str) -> dict[str, Any]:
    """The command's result."""
    latency.main(["--out", str(out), "--limit", "2", "--factors", *FACTORS, *options])
    return dict(json.loads(out.read_text(encoding="utf-8")))


# ------------------------------------------------------------------------------------------------- the clock


def test_a_phase_takes_its_time_out_of_the_one_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    times: Iterator[float] = iter([0.0, 1.0, 3.0, 3.5, 7.5, 17.5])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(times))
    clock = measure.Clock(torch.device("cpu"))

    def work() -> str:
        with clock.phase("verify"), clock.phase("simulation"):
            pass
        return "done"

    result, seconds = clock.measure(work)
    assert result == "done"
    spent = {phase: second for phase, second in seconds.items() if second}
    assert spent == {"Python": 1.0 + 10.0, "verify": 2.0 + 4.0, "simulation": 0.5}


def test_functions_are_wrapped_only_while_they_are_watched() -> None:
    clock = measure.Clock(torch.device("cpu"))
    accept = call_decoding.CallWriter.accept
    with clock.split():
        assert call_decoding.CallWriter.accept is not accept
    assert call_decoding.CallWriter.accept is accept


def test_every_phase_of_a_verified_call_takes_time() -> None:
    found = run_cell()
    assert set(found["ms"]) == set(measure.PHASES)
    assert all(found["ms"][phase] > 0 for phase in measure.PHASES)
    reference = run_cell(decoding="ar")["ms"]
    assert reference["draft"] == reference["commit"] == 0 < reference["verify"]


# ------------------------------------------------------------------------------------------------- requests


@pytest.mark.parametrize("prompt", [64, 501])
def test_a_prompt_has_the_length_asked_for_and_shares_its_first_part(prompt: int) -> None:
    cell = Cell(**{**CENTRE, "prompt": prompt})
    first, second = (maker().make(cell, 0, repeat).prompt_ids for repeat in (0, 1))
    assert len(first) == len(second) == prompt
    share = int(measure.REUSED * prompt)
    assert first[:share] == second[:share]
    assert first != second


@pytest.mark.parametrize("tokens", [1, 2, 5, 16])
def test_a_value_has_as_many_tokens_as_asked_for(tokens: int) -> None:
    request = maker().make(Cell(**{**CENTRE, "value": tokens}), 0, 0)
    assert len(request.arguments) == CENTRE["slots"]
    for text in request.arguments.values():
        assert len(maker().vocabulary.encode(text)) == tokens


def test_tools_are_new_only_where_that_is_asked_for() -> None:
    def names(number: int, repeat: int, mode: str) -> list[str]:
        made = maker().make(Cell(**CENTRE, mode=mode), number, repeat)
        return [tool["function"]["name"] for tool in made.tools]

    assert names(3, 0, "warm") == names(3, 1, "warm")
    assert not set(names(3, 0, "warm")) & set(names(4, 0, "warm"))
    assert not set(names(3, 0, "new tools")) & set(names(3, 1, "new tools"))


def test_making_a_request_leaves_its_tools_to_be_compiled() -> None:
    cell = Cell(**CENTRE)
    request = maker().make(cell, 77, 0)
    measure.oracle_of(cell, request)
    before = len(scaffolds._compiled)
    runner().run(cell, request)
    assert len(scaffolds._compiled) == before + len(measure.TOOLS)


def test_cells_beyond_the_limits_are_left_out_with_the_reason() -> None:
    limits = {"prompt": (20, "template alone has"), "slots": (50, "max_call_tokens=100"), "value": (21, "21 tokens")}
    for name, (value, reason) in limits.items():
        with pytest.raises(measure.LeftOut, match=reason):
            maker().make(Cell(**{**CENTRE, name: value}), 0, 0)
    with pytest.raises(measure.LeftOut, match="context of 8192"):
        maker().make(Cell(**{**CENTRE, "prompt": 8100}), 0, 0)


@pytest.mark.parametrize("wrong", [0, 1, 3, 4])
def test_exactly_as_many_slots_are_drafted_wrong_as_asked_for(wrong: int) -> None:
    found = run_cell(slots=4, accuracy=1 - wrong / 4)
    assert (found["drafted"], found["accepted"]) == (4, 4 - wrong)


# ------------------------------------------------------------------------------------------------- running


def test_a_right_draft_costs_two_base_forwards_and_a_wrong_one_more() -> None:
    right, wrong, reference = (run_cell(**fields) for fields in ({}, {"accuracy": 0.0}, {"decoding": "ar"}))
    assert right["base_forwards"] == 2 < wrong["base_forwards"] <= reference["base_forwards"]
    assert reference["head_forwards"] == 0
    assert reference["drafted"] is reference["accepted"] is None
    assert right["tokens"] == wrong["tokens"] == reference["tokens"]


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_a_draft_takes_all_of_its_steps(steps: int) -> None:
    assert run_cell(steps=steps)["head_forwards"] == steps


@pytest.mark.parametrize("fields", [{"accuracy": 0.5}, {"decoding": "ar"}], ids=str)
def test_rows_of_a_batch_cost_the_forwards_of_one(fields: dict[str, Any]) -> None:
    one, three = run_cell(**fields), run_cell(**fields, batch=3)
    for name in ("base_forwards", "head_forwards", "accepted", "tokens"):
        assert one[name] == three[name]


def test_a_reply_that_was_not_chosen_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell(**CENTRE, decoding="ar")
    request = maker().make(cell, 0, 0)
    chosen = measure._chosen
    other = maker().make(cell, 1, 0)
    monkeypatch.setattr(measure, "_chosen", lambda clock, base, _: chosen(clock, base, other))
    with pytest.raises(RuntimeError, match="not what the base was made to choose"):
        runner().run(cell, request)


def test_compiled_forwards_are_used_where_a_mode_asks_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = shape().model
    compile_decoding = type(model).compile_decoding
    monkeypatch.setattr(model, "compile_decoding", lambda mode: compile_decoding(model, backend="eager"), raising=False)
    own = measure.Runner(maker())
    cells = [Cell(**CENTRE, decoding="ar", mode=mode) for mode in ("compiled", "warm")]
    compiled, warm = (own.run(cell, maker().make(cell, 0, 0)) for cell in cells)
    assert own.compiled["default"].graphs > 0
    assert not own.compiled["default"].off
    assert compiled["base_forwards"] == warm["base_forwards"]
    assert model.compiled_decoding is None


# ------------------------------------------------------------------------------------------------- the command


@pytest.mark.usefixtures("small")
def test_the_command_measures_each_factor_around_the_centre(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run(tmp_path / "a.json")
    rows = report["factors"]
    assert {name: [(row[name], row["decoding"]) for row in found] for name, found in rows.items()} == {
        "prompt": [(64, "verified"), (64, "ar")],
        "slots": [(2, "verified"), (2, "ar")],
        "accuracy": [(1.0, "verified"), (0.0, "verified"), (1.0, "ar")],
        "mode": [
            (mode, decoding) for mode in ("warm", "prefix reuse", "warm, not split") for decoding in ("verified", "ar")
        ],
    }
    assert set(report["left_out"]) == {"prompt 20", "prompt 9000", "slots 50", "mode CUDA graphs"}
    for row in (row for found in rows.values() for row in found):
        assert row["requests"] == report["rounds"] == 2
        times = row["ms"]
        assert 0 < times["min"] <= times["p50"] <= times["p95"] <= times["max"]
        assert sum(row["phases_ms"].values()) == pytest.approx(times["mean"])
        assert row["calls_per_second"] == pytest.approx(1000 / times["p50"])
        assert row["first_ms"] > 0
        assert (row["of_ar"] is None) == (row["decoding"] == "ar")
        assert row["accepted"] == (None if row["decoding"] == "ar" else row["accuracy"])
        assert (row["reused_tokens"] >= 48) == (row["mode"] == "prefix reuse")
        assert (row["phases_ms"]["prefill"] == 0) == (row["mode"] == "warm, not split")
    assert report["centre"]["prompt"] == 64
    assert set(report) >= {"command", "versions", "threads", "device", "dtype", "model", "seed", "start"}
    printed = capsys.readouterr().out
    for text in (*report["left_out"].values(), *report["versions"].values(), report["device"], report["model"]):
        assert text in printed
    assert f"{rows['accuracy'][1]['ms']['p50']:.1f}" in printed
    assert f"{rows['accuracy'][1]['of_ar']:.2f}" in printed
    assert not list(tmp_path.glob("*.jsonl"))


@pytest.mark.usefixtures("small")
def test_an_interrupted_run_goes_on_from_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, run_one, left = tmp_path / "a.json", measure.Runner.run, [9]

    def interrupted(self: measure.Runner, *args: Any) -> dict[str, Any]:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return run_one(self, *args)

    monkeypatch.setattr(measure.Runner, "run", interrupted)
    with pytest.raises(SystemExit, match="9 results are kept"):
        run(out)
    with pytest.raises(SystemExit, match="another seed"):
        run(out, "--seed", "1")
    lines = out.with_suffix(".partial.jsonl").read_text(encoding="utf-8").splitlines()
    kept = {part["key"]: part["value"] for part in map(json.loads, lines[1:])}
    monkeypatch.setattr(measure.Runner, "run", run_one)
    report = run(out)
    centre = next(key for key in kept if key.startswith(f"{Cell(**CENTRE)} "))
    assert report["start"] == kept["start"]
    assert report["factors"]["prompt"][0]["first_ms"] == pytest.approx(sum(kept[centre]["ms"].values()))


@pytest.mark.usefixtures("small")
def test_without_matplotlib_the_result_is_written_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(latency.GRIDS, "all", latency.Grid(Cell(**CENTRE), {"slots": (2,)}))
    latency.main(["--out", str(tmp_path / "a.json"), "--limit", "1", "--factors", "slots"])
    assert "pip install matplotlib" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_the_plot_has_a_bar_for_each_phase_of_each_cell(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    phases = dict.fromkeys(measure.PHASES, 1.0)
    cell = {"decoding": "verified", "mode": "warm", "batch": 2, "phases_ms": phases}
    rows = [{"slots": slots, **cell} for slots in (1, 2)]
    report = {"model": "a", "device": "b", "factors": {"slots": rows, "prompt": []}}
    assert latency.plot(report, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "a.json")]
    with pytest.raises(SystemExit, match="no model could be loaded"):
        latency.main([*out, "--model", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit, match="--device abacus: torch cannot use it here"):
        latency.main([*out, "--device", "abacus"])
    assert list(tmp_path.iterdir()) == []  # nothing that would refuse the right model


@pytest.mark.usefixtures("small")
def test_a_result_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"eval\.latency: .*file"):
        run(tmp_path / "file" / "a.json")


@pytest.mark.parametrize(
    "options",
    [
        ["--limit", "-1"],
        ["--minutes", "0"],
        ["--factors", "colour"],
        ["--shape", "round"],
        ["--layers", "4"],
        ["--shape", "smollm3-3b", "--layers", "37"],
    ],
    ids=" ".join,
)
def test_wrong_options_are_refused(options: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        latency.parse(options)


def test_the_3b_shape_is_made_as_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def made(layers: int | None, **fields: Any) -> Shape:
        asked.update(layers=layers, **fields)
        return shape()

    monkeypatch.setattr(latency, "smollm3_shape", made)
    options = latency.parse(["--shape", "smollm3-3b", "--layers", "4", "--dtype", "bfloat16", "--seed", "3"])
    assert latency.shape_of(options) is shape()
    assert asked == {"layers": 4, "seed": 3, "device": "cpu", "dtype": torch.bfloat16}


def test_defaults_depend_on_the_device() -> None:
    cpu, gpu = (latency.parse(["--shape", "smollm3-3b", "--device", device]) for device in ("cpu", "cuda"))
    assert (cpu.layers, cpu.dtype, cpu.cells) == (latency.CPU_LAYERS, "float32", "few")
    assert (gpu.layers, gpu.dtype, gpu.cells) == (None, "bfloat16", "all")
    assert latency.parse([]).cells == "all"
    assert latency.parse(["--shape", "smollm3-3b", "--cells", "all"]).cells == "all"


def test_the_centre_and_its_reference_are_in_every_grid() -> None:
    for grid in latency.GRIDS.values():
        assert list(grid.factors) == list(latency.TITLES)
        for name, values in grid.factors.items():
            assert getattr(grid.centre, name) in values


# ------------------------------------------------------------------------------------------------- rounds


class _Fake:
    """A runner whose requests take one second each of a clock of its own."""

    def __init__(self, uncompiled: dict[str, str]) -> None:
        self.now, self.uncompiled, self.order = 0.0, uncompiled, list[Cell]()
        self.largest_batch = 32

    def run(self, cell: Cell, _: object) -> dict[str, Any]:
        if cell.batch > self.largest_batch:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        self.now += 1.0
        self.order.append(cell)
        return {"uncompiled": self.uncompiled if cell.mode == "compiled" else {}}


def _measurement(
    folder: Path, monkeypatch: pytest.MonkeyPatch, uncompiled: dict[str, str], **factors: tuple[Any, ...]
) -> tuple[latency.Measurement, _Fake]:
    """Of the cells of some factors, in a folder of its own."""
    fake = _Fake(uncompiled)
    monkeypatch.setattr(latency.time, "monotonic", lambda: fake.now)
    made = latency.plan(maker(), latency.Grid(Cell(**CENTRE), factors), list(factors))
    return latency.Measurement(fake, maker(), made, PartialResults(folder / "a.json", {})), fake  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("limit", "end", "rounds"), [(3, 1000.0, 3), (0, 7.5, 3), (50, 7.5, 3), (50, 8.0, 4), (50, 0.0, 1)]
)
def test_rounds_end_at_the_limit_or_when_the_next_would_end_too_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, end: float, rounds: int
) -> None:
    measurement, fake = _measurement(tmp_path, monkeypatch, {}, slots=(2,))  # two cells
    assert measurement.rounds(limit, end) == rounds
    assert fake.now == 2 * rounds
    # What is known is not measured again, and takes no time.
    assert measurement.rounds(rounds, 0.0) == rounds
    assert fake.now == 2 * rounds


def test_a_round_is_all_cells_in_an_order_drawn_anew_with_what_is_compared_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measurement, fake = _measurement(tmp_path, monkeypatch, {}, slots=(1, 2, 3, 4, 5), accuracy=(1.0, 0.5, 0.0))
    measurement.rounds(2, 1000.0)
    first, second = fake.order[:12], fake.order[12:]
    assert set(first) == set(second) == set(measurement.plan.cells)
    assert first != second
    for cells in (first, second):
        for reference in {cell for cell in cells if cell.decoding == "ar"}:
            places = [place for place, cell in enumerate(cells) if measurement.plan.reference(cell) == reference]
            assert places == list(range(places[0], places[0] + len(places)))
            assert len(places) == (4 if reference.slots == 2 else 2)


@pytest.mark.parametrize(
    ("uncompiled", "left_out"),
    [
        ({}, []),
        ({"head": "no compiler"}, []),
        ({"base": "no compiler"}, ["mode compiled, ar"]),  # the head of `verified` is compiled
        ({"base": "no compiler", "head": "no compiler"}, ["mode compiled, verified", "mode compiled, ar"]),
    ],
)
def test_modes_of_which_nothing_could_be_compiled_are_left_out_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uncompiled: dict[str, str], left_out: list[str]
) -> None:
    measurement, _ = _measurement(tmp_path, monkeypatch, uncompiled, mode=("warm", "compiled"))
    measurement.first_requests()
    made = measurement.plan
    assert made.left_out == dict.fromkeys(left_out, "no compiler")
    assert made.cells == made.factors["mode"]
    assert [f"mode {cell.mode}, {cell.decoding}" in left_out for cell in made.cells] == [False] * (4 - len(left_out))


def test_cells_that_memory_does_not_hold_are_left_out_and_the_others_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measurement, fake = _measurement(tmp_path, monkeypatch, {}, batch=(1, 4, 2))
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    fake.largest_batch = 2
    measurement.first_requests()
    reason = "the device has too little memory"
    assert measurement.plan.left_out == {"batch 4, verified": reason, "batch 4, ar": reason}
    assert [cell.batch for cell in fake.order] == [1, 1, 2, 2] == [cell.batch for cell in measurement.plan.cells]


def test_time_is_compared_with_ar_in_the_same_round() -> None:
    def runs(*times: float) -> list[dict[str, Any]]:
        counts = {"drafted": 0, "accepted": 0, "tokens": 4, "base_forwards": 2, "head_forwards": 1}
        return [
            {
                "ms": dict.fromkeys(measure.PHASES, 0.0) | {"verify": ms},
                "reused_tokens": 0,
                "simulation_ms": 0.0,
                **counts,
            }
            for ms in times
        ]

    row = latency.summary(Cell(**CENTRE), runs(10.0, 40.0, 30.0), runs(99.0)[0], runs(20.0, 200.0, 30.0))
    assert row["of_ar"] == 0.5
    assert (row["ms"]["p50"], row["ms"]["p95"], row["first_ms"]) == (30.0, 40.0, 99.0)
    assert latency.summary(Cell(**CENTRE, decoding="ar"), runs(10.0), runs(99.0)[0], [])["of_ar"] is None
