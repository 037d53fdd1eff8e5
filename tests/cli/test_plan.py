"""``smartsplit plan``: the choices, the plan of one cut, pictures, and refusals."""

import json
import math
from itertools import pairwise

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from typer.testing import CliRunner

from flwr_smartsplit.cli.app import app
from flwr_smartsplit.cli.plan_plot import extra_share, plan_figure
from flwr_smartsplit.cli.plan_report import FrontReport
from flwr_smartsplit.cli.profile_plot import STYLE
from flwr_smartsplit.cli.subject import read_subject
from flwr_smartsplit.errors import bytes_text
from flwr_smartsplit.plan.checkpointing.plan import least_bytes, plan_recompute
from flwr_smartsplit.plan.search_space import (
    extra_work,
    option_of,
    options_of_route,
    routes_worth_a_plan,
    undominated,
)
from flwr_smartsplit.types import KEEP_ALL, RecomputePlan, Route

SMALL = ["tests.cli.subjects:small", "--input", 4]
SMALL_CNN = ["tests.models:small_cnn", "--input", "3x12x12", "--batch-size", 8]


def call(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture(scope="module")
def cnn():
    return read_subject(
        SMALL_CNN[0], input_shape=(3, 12, 12), batch_size=8, optimizer=None
    )


@pytest.fixture(scope="module")
def front(cnn):
    return undominated(
        option
        for route in routes_worth_a_plan(cnn.profile)
        for option in options_of_route(cnn.profile, route)
    )


def facts_of(option, cnn):
    cuts = option.route.cuts
    return {
        "route": str(option.route),
        "cuts": list(cuts),
        "last_unit": cnn.profile.units[cuts[0] - 1 if cuts else -1].name,
        "recompute": json.loads(json.dumps(option.recompute.to_lists())),
        "peak_bytes": option.peak_bytes,
        "extra_flops": option.work.extra_flops,
        "extra_flops_fraction": option.work.extra_fraction,
        "boundary_bytes": option.work.boundary_bytes,
        "device_flops_fraction": option.work.device_fraction,
    }


def test_json_has_the_front_and_nothing_else_is_printed(cnn, front):
    result = call("plan", *SMALL_CNN, "--json")

    found = json.loads(result.stdout)
    assert result.exit_code == 0
    assert result.stdout.count("\n") == 1
    assert found == {
        "model": SMALL_CNN[0],
        "input_shapes": [[3, 12, 12]],
        "batch_size": 8,
        "optimizer": "sgd",
        "versions": found["versions"],
        "no_cut_reason": None,
        "budget_bytes": None,
        "choices": [facts_of(option, cnn) for option in front],
    }
    assert any(option["recompute"] != [[], []] for option in found["choices"])


def test_a_budget_that_something_fits_whole_recommends_the_deepest_of_these(cnn, front):
    plain = [option for option in front if option.recompute.is_empty]
    budget = plain[-1].peak_bytes
    arguments = ["plan", *SMALL_CNN, "--budget", f"{budget}B"]

    found = json.loads(call(*arguments, "--json").stdout)
    assert found["budget_bytes"] == budget
    deepest = plain[-1]
    assert deepest.route == Route.whole()
    assert found["recommended"] == facts_of(deepest, cnn)
    assert [each["peak_bytes"] for each in found["choices"]] == [
        option.peak_bytes for option in front if option.peak_bytes <= budget
    ]
    text = call(*arguments).stdout
    assert f"Recommended within {bytes_text(budget)}: {deepest.route}, the" in text
    marked = [line.split() for line in text.splitlines() if line.startswith("→")]
    assert len(marked) == 1
    assert marked[0][1:4] == ["whole", cnn.profile.units[-1].name, "none"]


def test_a_budget_between_two_choices_gets_a_plan_of_its_own(cnn):
    whole, profile = Route.whole(), cnn.profile
    least = least_bytes(profile, whole)
    ends = tuple(
        option_of(profile, whole, plan)
        for plan in (plan_recompute(profile, whole, budget_bytes=least), KEEP_ALL)
    )
    between = [
        (budget, plan_recompute(profile, whole, budget_bytes=budget))
        for budget in range(least, ends[1].peak_bytes, 997)
    ]
    budget, plan = next(
        (budget, plan)
        for budget, plan in between
        if extra_work(option_of(profile, whole, plan)) < extra_work(ends[0])
    )

    report = FrontReport(cnn, ends, budget)
    assert report.recommended == option_of(profile, whole, plan)
    assert report.recommended in report.shown
    assert report.recommended not in ends
    assert "of least extra work" in "".join(report._recommendation())
    assert "--cut whole lists" in "".join(report._recommendation())


def test_people_see_a_row_per_choice_and_what_the_words_mean(cnn, front):
    result = call("plan", *SMALL_CNN)

    rows = [line.split() for line in result.stdout.splitlines()][4 : 4 + len(front)]
    assert [row[0] for row in rows] == [
        str(option.route.cuts[0]) if option.route.cuts else "whole" for option in front
    ]
    assert [
        bytes_text(option.peak_bytes) in " ".join(row)
        for option, row in zip(front, rows, strict=True)
    ] == [True] * len(front)
    assert "again: units whose forward runs twice" in result.stdout
    assert "Recommended" not in result.stdout
    assert "→" not in result.stdout


@pytest.mark.parametrize("name", ["cut", "unit"])
def test_one_cut_is_planned_for_exactly_the_budget(cnn, name):
    profile, route = cnn.profile, Route.split(5)
    budget = least_bytes(profile, route)
    plan = plan_recompute(profile, route, budget_bytes=budget)
    assert not plan.is_empty
    cut = {"cut": 5, "unit": profile.units[4].name}[name]
    arguments = ["plan", *SMALL_CNN, "--budget", f"{budget}B", "--cut", cut]

    found = json.loads(call(*arguments, "--json").stdout)
    assert found["choice"] == facts_of(option_of(profile, route, plan), cnn)
    assert RecomputePlan.from_lists(found["choice"]["recompute"]) == plan
    assert found["units"] == [
        {
            "name": profile.units[index].name,
            "num_runs": plan.num_runs(index),
            "is_selective": index in plan.selective,
        }
        for index in range(5)
    ]
    text = call(*arguments).stdout
    assert f"The plan: {plan}\n" in text
    assert f"{route} needs {bytes_text(budget)}, and" in text


def test_a_cut_that_fits_recomputes_nothing():
    found = call("plan", *SMALL_CNN, "--budget", "1GiB", "--cut", "whole")

    assert found.exit_code == 0
    assert "whole needs" in found.stdout
    assert "with nothing recomputed.\n" in found.stdout
    assert "The plan" not in found.stdout


@pytest.mark.parametrize("options", [[], ["--json"], ["--cut", 1], ["--cut", "whole"]])
def test_a_budget_that_nothing_fits_ends_with_1_and_what_is_needed(cnn, options):
    cut = Route.whole() if "whole" in options else Route.split(1)
    needed = bytes_text(least_bytes(cnn.profile, cut))
    result = call("plan", *SMALL_CNN, "--budget", "10B", *options)

    assert result.exit_code == 1
    assert result.stdout == ""
    assert f"Error: no recompute plan of {cut} fits: the least is {needed}" in (
        result.stderr
    )


def test_a_cut_that_cannot_fit_names_the_nearest_that_does(cnn):
    budget = least_bytes(cnn.profile, Route.whole()) - 1
    result = call("plan", *SMALL_CNN, "--budget", f"{budget}B", "--cut", "whole")

    assert result.exit_code == 1
    assert "the nearest route that fits is device[:" in result.stderr


def test_a_model_without_cuts_is_planned_whole():
    result = call("plan", "tests.cli.subjects:UsedTwice", "--input", 4)

    assert result.exit_code == 0
    assert "cannot be cut anywhere: linear: both sides" in result.stdout
    found = json.loads(
        call("plan", "tests.cli.subjects:UsedTwice", "--input", 4, "--json").stdout
    )
    assert [option["route"] for option in found["choices"]] == ["whole"]
    assert "both sides" in found["no_cut_reason"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--budget", "64"], "--budget '64' is not a size"),
        (["--budget", "-1MiB"], "--budget '-1MiB' is not a size"),
        (["--budget", "nan"], "--budget 'nan' is not a size"),
        (["--budget", "much"], "--budget 'much' is not a size"),
        (["--budget", "0B"], "--budget '0B' is not a size"),
        (["--budget", "9" * 308 + "TiB"], "is not a size"),
        (["--cut", 1], "--cut needs --budget"),
        (["--cut", 1, "--budget", "1KiB", "--plot", "a.png"], "has no --plot"),
        (["--cut", 9, "--budget", "1KiB"], "or a number in 1..3"),
        (["--cut", "relu", "--budget", "1KiB"], "--cut 'relu' is none of this model"),
        (["--plot", "picture.gif"], "is not a .png, .svg or .pdf"),
        (["--batch-size", 0], "--batch-size 0 is less than 1"),
        (["--optimizer", "x"], "choose one of sgd, momentum, adam"),
        (["--cache-dir", __file__], "is not a folder"),
    ],
)
def test_a_mistake_is_explained_in_one_line_without_a_traceback(arguments, words):
    result = call("plan", *SMALL, *arguments)

    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert words in result.stderr


def test_a_huge_budget_is_no_mistake(tmp_path):
    file = tmp_path / "picture.png"
    result = call("plan", *SMALL, "--budget", "9" * 250 + "TiB", "--plot", file)

    assert result.exit_code == 0
    assert "Recommended within" in result.stdout
    assert file.exists()


# --- the picture ----------------------------------------------------------------------


def drawn(cnn, front, budget_bytes=None):
    with mpl.rc_context(STYLE):
        report = FrontReport(cnn, front, budget_bytes)
        figure = plan_figure(report)
        FigureCanvasAgg(figure).draw()
    return report, figure


def test_the_stairs_are_the_front_and_the_ring_what_is_recommended(cnn, front):
    budget = front[len(front) // 2].peak_bytes
    report, figure = drawn(cnn, front, budget)
    lines = {line.get_label(): line for line in figure.axes[0].lines}

    ring = lines.pop("recommended")
    best = report.recommended
    assert (*ring.get_xdata(), *ring.get_ydata()) == (
        best.peak_bytes,
        extra_share(best),
    )
    limit = lines.pop(f"budget, {bytes_text(budget)}")
    assert set(limit.get_xdata()) == {budget}
    found = {xy for line in lines.values() for xy in zip(*line.get_data(), strict=True)}
    assert found == {(option.peak_bytes, extra_share(option)) for option in front}
    named = [label for label in lines if not label.startswith("_")]
    assert len(named) == len({option.route for option in front})
    plain = [option for option in front if option.recompute.is_empty]
    filled = [line for line in lines.values() if line.get_linestyle() == "None"]
    assert {x for line in filled for x in line.get_xdata()} == {
        option.peak_bytes for option in plain
    }
    total = sum(unit.forward_flops for unit in cnn.profile.units)
    for option in front:
        assert math.isclose(extra_share(option), option.work.extra_flops / total)


def test_a_budget_far_off_leaves_the_choices_in_sight(cnn, front):
    _, figure = drawn(cnn, front, 2**40)

    low, high = figure.axes[0].get_xlim()
    assert low < front[0].peak_bytes < front[-1].peak_bytes < high < 2**30


@pytest.mark.parametrize("budget_bytes", [None, 60_000])
def test_the_legend_stays_off_the_data_and_ticks_do_not_overlap(
    cnn, front, budget_bytes
):
    _, figure = drawn(cnn, front, budget_bytes)
    renderer = figure.canvas.get_renderer()
    (axes,) = figure.axes
    legend = figure.legends[0].get_window_extent(renderer)

    assert legend.x0 >= axes.get_window_extent(renderer).x1
    assert legend.x1 <= figure.bbox.x1
    low, high = axes.get_xlim()
    shown = [
        label.get_window_extent(renderer)
        for at, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
        if low <= at <= high
    ]
    assert all(a.x1 <= b.x0 for a, b in pairwise(shown))


def test_a_picture_is_written_and_not_blank(tmp_path):
    file = tmp_path / "picture.png"
    result = call("plan", *SMALL_CNN, "--budget", "60KiB", "--json", "--plot", file)

    assert result.exit_code == 0
    assert json.loads(result.stdout)["choices"]
    assert f"Wrote {file}." in result.stderr.replace("\n", " ")
    pixels = np.asarray(Image.open(file).convert("RGB")).reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) > 50


def test_a_file_that_cannot_be_written_is_explained(tmp_path):
    folder = tmp_path / "folder.png"
    folder.mkdir()
    result = call("plan", *SMALL, "--plot", folder)

    assert result.exit_code == 2
    assert "cannot be written" in result.stderr
