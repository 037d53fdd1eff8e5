"""Codecs are timed beside a memory copy, and what a link adds is worked out."""

from dataclasses import replace

import pytest
from rich.console import Console

from flwr_smartsplit.types import Integer, Packed, Raw
from simulations.benchmarks.wires.codec_time import (
    CodecTime,
    measured,
    show,
    training_flops_per_second,
)

TIME = CodecTime(
    codec="packed",
    copy=0.001,
    code=0.004,
    decode=0.003,
    code_back=0.002,
    decode_back=0.001,
    sent=0.5,
    back=0.25,
)
RAW = replace(
    TIME, codec="raw", code=0.0, decode=0.001, code_back=0.0, decode_back=0.001
)
RAW = replace(RAW, sent=1.0, back=1.0)


def test_what_is_sent_and_how_long_it_takes() -> None:
    """Half of the boundary is +0, and a byte of eight says so."""
    codecs = Raw(), Packed(), Integer()
    raw, packed, integer = measured(codecs, (2, 4, 8, 8), repeats=1)
    assert (raw.sent, raw.back) == (1, 1)
    assert packed.sent == pytest.approx(packed.back + 1 / 32)
    assert 0.4 < packed.back < 0.6
    assert integer.sent == integer.back == (256 + 8) / 1024
    assert packed.seconds > raw.seconds > 0
    assert training_flops_per_second(num_steps=1) > 0


def test_a_link_is_added_and_a_codec_pays_up_to_a_rate() -> None:
    """By hand: 10 ms and 8 ms more than Raw; 6 of 16 Mbit are sent."""
    assert TIME.seconds == pytest.approx(0.010)
    assert TIME.crossing_seconds(1e6) == pytest.approx(0.010 + 6)
    assert TIME.pays_up_to(RAW) == pytest.approx(10e6 / 0.008)
    assert TIME.flops_per_value(2.5e9) == (40, 30, 20, 10)
    at = TIME.pays_up_to(RAW)
    assert TIME.crossing_seconds(at) == pytest.approx(RAW.crossing_seconds(at))
    assert TIME.crossing_seconds(at / 2) < RAW.crossing_seconds(at / 2)
    assert replace(RAW, sent=0.9).pays_up_to(RAW) == float("inf")


def test_the_fastest_of_each_link_is_named() -> None:
    """The slow link gets the smaller code, the fast one none."""
    console = Console(record=True, width=200)
    show([RAW, TIME], 1e9, console)
    fastest = console.export_text().split("fastest")[1].split()
    assert fastest[:4] == ["packed", "packed", "packed", "raw"]
