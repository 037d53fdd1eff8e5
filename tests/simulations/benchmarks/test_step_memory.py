"""The benchmark of steps' memory: predicted is measured, and exact."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from simulations.benchmarks.step_memory import NETWORKS, measured, predicted, table_of


@pytest.mark.slow
def test_predicted_peaks_are_those_of_real_steps() -> None:
    """Of the smallest network, whole and in its worst step."""
    row = measured(predicted("vgg11_bn", 2))
    assert row.is_exact
    assert row.measured_bytes == (row.whole_bytes, max(row.step_bytes))
    assert 0 < row.saved_fraction < 1
    assert all(
        cut < step
        for cut, step in zip(row.least_cut_bytes, row.step_bytes, strict=True)
    )
    console = Console(file=io.StringIO(), width=160)
    console.print(table_of([row]))
    assert f"{row.saved_fraction:.1%}" in console.file.getvalue()  # type: ignore


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "saved"),
    [("resnet18", 0.463), ("resnet34", 0.591), ("vgg11_bn", 0.390)],
)
def test_the_worst_step_takes_less_than_the_model(network: str, saved: float) -> None:
    """By the share that the page on progressive training says."""
    row = predicted(network, 64)
    assert row.saved_fraction == pytest.approx(saved, abs=5e-4)
    assert len(row.step_bytes) == len(NETWORKS[network][1])
    worse = replace(row, step_bytes=(row.whole_bytes,))  # The planted error
    assert worse.saved_fraction == 0
