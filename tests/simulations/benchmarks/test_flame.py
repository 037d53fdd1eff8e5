"""The picture of a step: what is counted where, and what is left out."""

import pytest

from simulations.benchmarks import flame
from simulations.report.style import svg_of

STACKS = """\
main (a.py:1);step (s.py:2);forward (torch/nn/modules/conv.py:9) 30
main (a.py:1);step (s.py:3);wrap (contextlib.py:8);send (flwr_smartsplit/edge/x.py:4) 50
main (a.py:1);step (s.py:3);send (flwr_smartsplit/edge/x.py:5);pack (p.py:1) 20
main (a.py:1);other (a.py:5) 900
main (a.py:1);step (s.py:4);rare (r.py:1) 0
"""


def test_samples_count_for_each_caller():
    """Whatever the line; wrappers are no callers, and what is rare is not drawn."""
    top = flame.read_calls(iter(STACKS.splitlines()), "step")
    assert top.samples == 100
    found = {name: call.samples for (name, _), call in top.inner.items()}
    assert found == {"send": 70, "forward": 30}
    (inner,) = top.inner["send", "flwr_smartsplit/edge/x.py"].inner.values()
    assert (inner.name, inner.samples) == ("pack", 20)
    assert top.depth == 3


def test_the_picture_names_what_takes_time():
    """Shares are of the root, not of the whole run."""
    top = flame.read_calls(iter(STACKS.splitlines()), "step")
    texts = [text.get_text() for text in flame.draw_calls(top).axes[0].texts]
    assert texts == ["step 100 %", "send 70 %", "pack 20 %", "forward 30 %"]
    assert svg_of(flame.draw_calls, top).startswith("<?xml")


def test_a_run_without_the_function_is_an_error():
    with pytest.raises(ValueError, match="no sampled stack has train"):
        flame.read_calls(iter(STACKS.splitlines()), "train")
