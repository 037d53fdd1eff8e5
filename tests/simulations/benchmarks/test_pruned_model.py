"""What pruning saves: the figures of the table."""

import pytest

from simulations.benchmarks.pruned_model import measured, table_of


@pytest.mark.slow
def test_less_is_left_the_higher_the_rate():
    whole, pruned = measured((0.0, 0.6))

    assert whole.flops_gone == 0
    assert pruned.flops_gone == pytest.approx(0.63, abs=0.005)
    assert pruned.peak_bytes < whole.peak_bytes / 4
    assert pruned.phones_that_fit > whole.phones_that_fit == 50
    assert pruned.slowest_seconds < whole.slowest_seconds / 4
    assert "| 0.6 | 63 % |" in table_of([whole, pruned])
