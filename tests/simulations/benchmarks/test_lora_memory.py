"""The LoRA benchmark: its rows are exact, predicted to the byte, and add up."""

import io

import pytest
from rich.console import Console

from simulations.benchmarks.lora_memory import Size, measured, show

SMALL = Size(layers=2, width=64, batch_size=4, length=6, vocabulary=40)


@pytest.mark.slow
def test_every_row_is_exact_and_as_predicted() -> None:
    """Of a small decoder; a device that holds less of it takes less."""
    rows = {row.name: row for row in measured(SMALL)}
    assert all(row.is_exact for row in rows.values())
    assert all(row.measured_bytes == row.predicted_bytes for row in rows.values())
    everything, adapters = rows["all trained"], rows["adapters"]
    assert everything.trained == everything.parameters
    assert adapters.trained < adapters.parameters
    assert adapters.measured_bytes < everything.measured_bytes
    assert rows["adapters, split"].measured_bytes < adapters.measured_bytes
    assert adapters.down_bytes == adapters.up_bytes == 4 * adapters.trained
    assert adapters.first_down_bytes > everything.first_down_bytes
    console = Console(file=io.StringIO(), width=160)
    show(list(rows.values()), console)
    assert "NO" not in console.file.getvalue()  # type: ignore[attr-defined]
