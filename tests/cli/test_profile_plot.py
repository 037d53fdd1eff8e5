"""The picture of a profile: it is drawn, and says what the profile says."""

import importlib.util
from dataclasses import replace
from itertools import pairwise

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from typer.testing import CliRunner

from flwr_smartsplit.cli.app import app
from flwr_smartsplit.cli.profile_plot import STYLE, profile_figure
from flwr_smartsplit.cli.profile_report import ProfileReport
from flwr_smartsplit.cli.subject import read_subject

SMALL = "tests.cli.subjects:small"


def call(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture(scope="module")
def small():
    return read_subject(SMALL, input_shape=(4,), batch_size=8, optimizer="adam")


def drawn(subject, *, budget_bytes=None):
    """Draw a picture, and lay it out."""
    with mpl.rc_context(STYLE):
        report = ProfileReport(subject=subject, budget_bytes=budget_bytes)
        figure = profile_figure(report)
        FigureCanvasAgg(figure).draw()
    return figure


@pytest.mark.parametrize("suffix", ["svg", "pdf"])
def test_a_picture_is_written_beside_the_table(tmp_path, suffix):
    file = tmp_path / f"picture.{suffix}"
    result = call("profile", SMALL, "--input", 4, "--budget", "4KiB", "--plot", file)

    assert result.exit_code == 0
    assert "device" in result.stdout
    assert f"Wrote {file}." in result.stderr.replace("\n", " ")
    assert file.stat().st_size > 5_000


def test_a_picture_is_not_blank(tmp_path):
    file = tmp_path / "picture.png"
    call("profile", SMALL, "--input", 4, "--json", "--plot", file)

    pixels = np.asarray(Image.open(file).convert("RGB")).reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) > 50
    assert (pixels == 255).all(axis=1).mean() < 0.95


def test_the_lines_are_the_profiles_numbers(small):
    profile, figure = small.profile, drawn(small, budget_bytes=5000)
    memory, work, traffic = figure.axes
    lines = {line.get_label(): list(line.get_ydata()) for line in memory.lines}

    assert lines["peak of the device"] == [u.device_peak_bytes for u in profile.units]
    assert lines["whole model"] == [profile.units[-1].device_peak_bytes] * 2
    assert lines["budget"] == [5000, 5000]
    # Gradients are as large as parameters: one line for both.
    assert "parameters = gradients" in lines
    boundary = list(traffic.lines[0].get_ydata())
    assert boundary == [unit.boundary_bytes for unit in profile.units[:-1]]
    assert list(traffic.lines[1].get_ydata()) == [profile.batch_bytes] * 2
    assert work.containers[0][-1].get_height() == 1.0


@pytest.mark.every(3)
@pytest.mark.parametrize("num_units", [1, 45, 150])
def test_names_do_not_overlap_and_legends_stay_off_the_data(small, num_units):
    first, *_ = small.profile.units
    units = [
        replace(first, name=f"features.{index}.block.with.a.very.long.name")
        for index in range(num_units)
    ]
    profile = replace(small.profile, units=tuple(units))

    figure = drawn(replace(small, profile=profile), budget_bytes=2**40)
    renderer = figure.canvas.get_renderer()
    labels = figure.axes[-1].get_xticklabels()
    names = [label.get_window_extent(renderer) for label in labels]
    assert all(a.x1 <= b.x0 for a, b in pairwise(names))
    for axes in figure.axes:
        legend = axes.get_legend().get_window_extent(renderer)
        assert legend.y0 >= axes.get_window_extent(renderer).y1 - 1
        assert legend.x1 <= figure.bbox.x1
        title = axes._left_title.get_window_extent(renderer)
        assert legend.y1 <= title.y0 + 1


def test_a_missing_matplotlib_is_said_before_anything_is_computed(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: None if n == "matplotlib" else find(n)
    )
    result = call("profile", "no.such:model", "--plot", "a.png")

    assert result.exit_code == 2
    assert "pip install 'flwr-smartsplit[plot]'" in result.stderr


def test_a_file_that_cannot_be_written_is_explained(tmp_path):
    folder = tmp_path / "folder.png"
    folder.mkdir()
    result = call("profile", SMALL, "--input", 4, "--plot", folder)

    assert result.exit_code == 2
    assert "cannot be written" in result.stderr
