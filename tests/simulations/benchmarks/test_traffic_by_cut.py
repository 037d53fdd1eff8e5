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


def test_bytes_are_those_of_the_formulas(prepared, tmp_path):
    """Planted: the cut before has as many values, but no zeros for ``Packed``."""

    def found(codec, cut=RELU):
        return traffic_by_cut.bytes_per_example(prepared, cut, codec, tmp_path)

    raw = found(Raw())
    assert raw == pytest.approx(2 * 4 * VALUES, rel=0.01)
    assert found(Integer()) == pytest.approx(2 * (VALUES + 8), rel=0.03)
    assert found(Packed()) < 0.7 * raw
    assert found(Packed(), RELU - 1) == pytest.approx(raw, rel=0.01)


def test_the_picture_names_codecs_and_cuts():
    values = [1000.0, 10.0]
    by_codec = dict.fromkeys(traffic_by_cut.CODECS, values)

    drawn = svg_of(traffic_by_cut.drawn, (["conv1", "relu1"], by_codec))

    for name in (*by_codec, "conv1", "relu1"):
        assert f"<!-- {name} -->" in drawn
