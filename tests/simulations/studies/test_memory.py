"""The memory suite: its numbers worked out anew, and its runs stopped and resumed."""

import json
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from typer.testing import CliRunner

from flwr_smartsplit import Route, Task, profile_chain
from flwr_smartsplit.memory.meter import MemoryMeter
from flwr_smartsplit.plan.checkpointing.plan import least_bytes
from flwr_smartsplit.plan.checkpointing.stages import stages_of
from flwr_smartsplit.split.build import build_chain
from simulations.__main__ import app
from simulations.experiments.errors import ExperimentError
from simulations.experiments.provenance import Provenance
from simulations.studies.measurement import ROWS, MeasurementOptions, read_rows
from simulations.studies.memory import measuring, stepping, suite
from simulations.studies.memory.cases import FAMILIES, memory_cases
from simulations.studies.memory.choosing import (
    PROGRAMME,
    least_choice,
    plan_curves,
    sequential_plans,
)
from simulations.studies.memory.measuring import BATCH_SIZE, MemoryRow, measure_case

KEYS = {
    *("model", "family", "whole_peak_bytes", "whole_lean_bytes", "device_peak_bytes"),
    *("ratio", "useful_ratio", "predicted_bytes", "extra_flops_fraction"),
    *("step_time_ratio", "floor_bytes", "floor_text", "input_side", "batch_size"),
}
SIDE = 12


def narrow_cnn() -> nn.Sequential:
    """Build a model whose boundaries become small before its parameters large."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
        nn.Flatten(),
        nn.Linear(72, 400),
        nn.ReLU(),
        nn.Linear(400, 10),
    )


TASK = Task(
    model_fn=narrow_cnn,
    loss_fn=nn.functional.cross_entropy,
    optimizer_fn=partial(torch.optim.SGD, lr=0.01, momentum=0.9),
    example_inputs=torch.zeros(1, 3, SIDE, SIDE),
    example_targets=torch.arange(10),
)


@dataclass(frozen=True)
class TinyCase:
    """A case that is measured within a second."""

    model: str = "tiny"
    family: str = "Tiny"
    input_side: int = SIDE
    seed: int = 0
    task: Task = TASK
    has_curves: bool = True

    @property
    def title(self) -> str:
        return f"{self.model}, {self.input_side} px"

    @property
    def key(self) -> str:
        return f"{self.title}, seed {self.seed}"


MEASURED: dict[str, MemoryRow] = {}


@pytest.fixture(scope="module")
def profile():
    return profile_chain(build_chain(TASK), batch_size=BATCH_SIZE, task=TASK)


@pytest.fixture(scope="module")
def row():
    return measure_case(TinyCase())


@pytest.fixture
def two_cases(monkeypatch):
    """Let the suite know two tiny models, and count what is measured.

    They are measured for the first test; the others look at what is done with it.
    """
    measured = []

    def measure(case, **how):
        measured.append(case.model)
        if case.model not in MEASURED:
            MEASURED[case.model] = measure_case(case, **how)
        return MEASURED[case.model]

    cases = [TinyCase(), TinyCase(model="twin")]
    monkeypatch.setattr(suite, "memory_cases", lambda *_, **__: cases)
    monkeypatch.setattr(suite, "measure_case", measure)
    return measured


def options(**changes):
    provenance = Provenance(
        command="by hand", date="2026", versions={"torch": "1"}, hardware={}
    )
    return replace(MeasurementOptions(is_small=True, provenance=provenance), **changes)


def models_in(folder) -> list[str]:
    return [row["model"] for row in read_rows(folder)]


def stock_peak_bytes() -> int:
    """Meter the second step of a loop that knows nothing of this package."""
    model = narrow_cnn()
    optimizer = TASK.optimizer_fn(model.parameters())
    inputs = torch.randn(BATCH_SIZE, 3, SIDE, SIDE)
    targets = torch.zeros(BATCH_SIZE, dtype=torch.int64)
    for _ in range(2):
        meter = MemoryMeter()
        with meter:
            meter.track(model, optimizer, (inputs, targets))
            optimizer.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    return meter.peak_bytes


# --- one row --------------------------------------------------------------------------


def test_a_row_has_the_promised_keys_and_survives_a_file(row):
    """What is written as JSON is read back as the same row."""
    assert row.values().keys() >= KEYS
    assert MemoryRow.from_values(json.loads(json.dumps(row.values()))) == row


def test_the_whole_model_is_a_stock_step_predicted_and_measured(row):
    """A dry run, a real run and a plain loop agree to the byte."""
    assert row.whole_peak_bytes == row.whole_measured_bytes == stock_peak_bytes()
    assert row.whole_lean_bytes < row.whole_peak_bytes


def test_the_ratio_is_that_of_the_best_of_all_cuts(row, profile):
    """Compared with a search that passes no cut over."""
    cuts = range(1, len(profile.units))
    least = min(least_bytes(profile, Route.split(cut)) for cut in cuts)
    values = row.values()
    assert values["device_peak_bytes"] == values["predicted_bytes"] == least
    assert values["ratio"] == stock_peak_bytes() / least


def test_the_useful_ratio_is_that_of_the_best_useful_cut(row, profile):
    """A tenth of the FLOPs before it, and no larger boundary than the inputs."""
    flops = list(accumulate(unit.forward_flops for unit in profile.units))
    useful = {
        cut: least_bytes(profile, Route.split(cut))
        for cut in range(1, len(profile.units))
        if flops[cut - 1] >= 0.1 * flops[-1]
        and profile.units[cut - 1].boundary_bytes <= BATCH_SIZE * 3 * SIDE * SIDE * 4
    }
    assert 1 not in useful  # Its boundary is twice the inputs.
    assert row.useful.peak_bytes == row.useful.predicted_bytes == min(useful.values())
    assert row.useful_ratio == row.whole_peak_bytes / min(useful.values())
    assert row.useful_ratio < row.ratio


def test_the_time_ratio_is_that_of_the_medians(row):
    """One slow step of three changes nothing."""
    assert row.step_time_ratio > 0
    slow = replace(row, step_seconds=[(2.0, 3.0), (2.0, 90.0), (1.0, 2.0)])
    assert slow.step_time_ratio == 1.5
    assert replace(row, step_seconds=[]).step_time_ratio is None


def test_the_floor_is_batch_first_unit_and_two_gradients(row):
    """Worked out by hand: 3 colours in, 6 channels out, kernels of 3 x 3."""
    batch = BATCH_SIZE * (3 * SIDE * SIDE * 4 + 8)
    weights, output = 6 * 3 * 9 * 4, BATCH_SIZE * 6 * SIDE * SIDE * 4
    assert row.floor_bytes == batch + 2 * weights + output + weights
    assert row.floor_bytes <= row.least.peak_bytes
    assert row.floor_text.startswith("At the floor; most of it is the gradient of the")


def test_a_device_that_holds_its_boundary_is_seen(row, monkeypatch):
    """The planted error makes the peak larger and the ratio smaller."""
    held = []
    pack = stepping.packed

    def packed(boundary):
        held.append(boundary)
        return pack(boundary)

    monkeypatch.setattr(stepping, "packed", packed)
    worse = measure_case(TinyCase())
    assert worse.ratio < row.ratio
    assert worse.least.peak_bytes > worse.least.predicted_bytes


def test_a_cut_that_is_passed_over_is_never_the_best(profile):
    """From any set of cuts, the search finds what looking at each would."""
    cuts = range(1, len(profile.units))
    needed = {cut: least_bytes(profile, Route.split(cut)) for cut in cuts}
    for first in cuts:
        some = range(first, len(profile.units))
        found = least_choice(profile, some)
        assert found.predicted_bytes == min(needed[cut] for cut in some)
        assert needed[found.cut] == found.predicted_bytes
    assert least_choice(profile, []) is None


def test_micro_batches_that_a_model_cannot_train_on_are_left_out():
    """BatchNorm takes no single value a channel, as of one small image."""
    task = replace(
        TASK,
        model_fn=lambda: nn.Sequential(narrow_cnn(), nn.BatchNorm1d(10)),
    )
    assert list(measure_case(TinyCase(task=task)).accumulated) == ["8"]


def test_a_model_that_is_too_large_to_be_run_is_predicted(monkeypatch, row):
    """And says so."""
    monkeypatch.setattr(measuring, "MAX_DEVICE_BYTES", 0)
    monkeypatch.setattr(measuring, "MAX_WHOLE_BYTES", 0)
    dry = measure_case(TinyCase())
    assert (dry.least.is_measured, row.least.is_measured) == (False, True)
    assert dry.least.peak_bytes == row.least.predicted_bytes
    assert dry.whole_measured_bytes is None
    assert dry.step_time_ratio is None


# --- curves ---------------------------------------------------------------------------


def test_the_optimum_is_on_or_below_every_other_curve(row, profile):
    """For no more memory it adds no more, at each point of the others."""
    curves = plan_curves(profile, row.useful.cut)
    assert len(curves) > 1
    for rule, points in curves.items():
        for peak, extra in points:
            own = [more for at, more in curves[PROGRAMME] if at <= peak]
            assert own, (rule, peak)
            assert min(own) <= extra + 1e-9, (rule, peak)


def test_sequential_plans_are_torchs(profile):
    """Torch's function divides as many stages the same way."""
    route = Route.split(len(profile.units) - 1)
    (leg,) = route.device_legs(len(profile.units))
    stages = stages_of(profile, leg)
    plans = list(sequential_plans(profile, route))
    assert len(plans) == len(stages) - 1
    for num, plan in enumerate(plans, start=2):
        again = {
            index
            for index, stage in enumerate(stages)
            if plan.num_runs(stage.start) > 1
        }
        assert again == checkpointed_by_torch(len(stages), num)


def checkpointed_by_torch(num_functions: int, num_segments: int) -> set[int]:
    """Find which functions ``checkpoint_sequential`` runs twice."""
    runs = []

    def function(index, value):
        runs.append(index)
        return value * 2

    functions = [partial(function, index) for index in range(num_functions)]
    value = torch.ones(1, requires_grad=True)
    torch.utils.checkpoint.checkpoint_sequential(
        functions, num_segments, value, use_reentrant=True
    ).backward()
    return {index for index in runs if runs.count(index) > 1}


# --- a run ----------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_and_measures_nothing_twice(
    tmp_path, two_cases, monkeypatch
):
    """Half a line, as a killed process leaves it, counts as nothing."""

    def interrupted(case, **how):
        if case.model == "twin":
            raise KeyboardInterrupt
        return measure(case, **how)

    measure = suite.measure_case
    monkeypatch.setattr(suite, "measure_case", interrupted)
    assert suite.MEMORY.run(tmp_path, options()) is False
    assert models_in(tmp_path) == ["tiny"]
    with (tmp_path / ROWS).open("a") as file:
        file.write('{"model": "twi')

    monkeypatch.setattr(suite, "measure_case", measure)
    assert suite.MEMORY.run(tmp_path, options()) is True
    assert suite.MEMORY.run(tmp_path, options()) is True
    assert two_cases == ["tiny", "twin"]
    assert models_in(tmp_path) == ["tiny", "twin"]


def test_a_folder_of_other_versions_is_not_gone_on_with(tmp_path, two_cases):
    """Numbers of two versions do not belong into one table."""
    suite.MEMORY.run(tmp_path, options())
    other = replace(options().provenance, versions={"torch": "2"})
    with pytest.raises(ExperimentError, match="torch is '1' there and '2' now"):
        suite.MEMORY.run(tmp_path, options(provenance=other))


def test_the_command_prints_json_and_reports_again(tmp_path, two_cases):
    """``run`` and ``report`` print the same rows, and the page shows them."""
    call = CliRunner().invoke
    first = call(app, ["run", "memory", "--json", "--out", str(tmp_path)])
    again = call(app, ["report", str(tmp_path), "--json"])

    assert first.exit_code == again.exit_code == 0, first.stderr
    assert first.stdout == again.stdout
    methods = json.loads(first.stdout)["methods"]
    assert list(methods)[:3] == [
        f"tiny, 12 px: {n}" for n in ("whole", "least", "useful")
    ]
    rows = json.loads((tmp_path / "summary.json").read_text())["rows"]
    assert methods["twin, 12 px: least"] == {
        "accuracy": None,
        "simulated_seconds": None,
        "bytes_up": None,
        "bytes_down": None,
        "device_peak_bytes": rows[1]["device_peak_bytes"],
    }
    assert [each["model"] for each in rows] == ["tiny", "twin"]
    assert all(each.keys() >= KEYS for each in rows)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/svg+xml") == 2
    assert "twin, 12 px" in page
    assert "At the floor" in page


def test_the_table_is_printed_without_json(tmp_path, two_cases, row):
    """With the ratio of each model."""
    result = CliRunner().invoke(app, ["run", "memory", "--out", str(tmp_path)])
    assert result.exit_code == 0
    assert "tiny, 12" in result.stdout
    assert f"{row.ratio:.0f}" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["memory", "--rounds", "3"], "measures models and has no rounds: leave out"),
        (["memory", "--models", "nope"], "--models names 'nope', but the models are"),
        (["memory", "--models", ","], "--models names nothing"),
        (["memory", "--out", __file__], "name another folder with --out"),
    ],
)
def test_a_bad_option_is_explained(tmp_path, arguments, words):
    """And nothing is begun."""
    result = CliRunner().invoke(app, ["run", "--out", str(tmp_path / "a"), *arguments])
    assert result.exit_code == 2
    assert words in result.stderr
    assert not (tmp_path / "a").exists()


def test_results_with_rounds_are_not_written_over(tmp_path):
    """A folder is of one suite."""
    Path(tmp_path / "config.json").write_text('{"experiment": {}}')
    with pytest.raises(ExperimentError, match="results of another suite"):
        suite.MEMORY.run(tmp_path, options())


def test_the_full_list_is_of_many_models_and_families():
    """At least twelve of at least eight, each at two sizes; small is a part of it."""
    cases = memory_cases()
    assert len({case.model for case in cases}) >= 12
    assert len({case.family for case in cases}) >= 8
    assert len(cases) == 2 * len(FAMILIES)
    assert set(memory_cases(is_small=True)) < set(cases)
