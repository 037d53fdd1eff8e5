"""The picture of traffic by cut and codec: its bytes are those of the formulas."""

import pytest

from flwr_smartsplit import Integer, Packed, Raw
from simulations.benchmarks import traffic_by_cut
from simulations.experiments.runner import prepared_fleet
from simulations.report.style import svg_of

RELU, VALUES = 3, 32 * 8 * 8
"""The cut behind the first ReLU, and how many values of an example cross it."""


@pytest.fixture(scope="module")
def prepared():
    return prepared_fleet(traffic_by_cut.EXPERIMENT)


def test_what_is_priced_crosses_and_packed_finds_zeros(prepared, tmp_path):
    """Planted: the cut two before has as many values, but no zeros for ``Packed``."""
    profile = prepared.clock.profile
    raw = traffic_by_cut.priced(profile, RELU, Raw())
    coded = traffic_by_cut.priced(profile, RELU, Integer())
    packed, before = (
        traffic_by_cut.measured(prepared, cut, Packed(), tmp_path)
        for cut in (RELU, RELU - 2)
    )

    assert (raw, coded) == (2 * 4 * VALUES, 2 * (VALUES + 8))
    assert packed < 0.7 * raw
    assert before == pytest.approx(raw, rel=0.01)


def test_the_picture_names_codecs_and_cuts():
    values = [1000.0, 10.0]
    by_codec = dict.fromkeys(traffic_by_cut.CODECS, values)

    drawn = svg_of(traffic_by_cut.drawn, (["conv1", "relu1"], by_codec))

    for name in (*by_codec, "conv1", "relu1"):
        assert f"<!-- {name} -->" in drawn
