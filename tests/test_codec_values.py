"""Codecs as values: what they say they take, and how they are written."""

import pytest

from flwr_smartsplit import BFloat16, Float16, Integer, Packed, Raw, TopK
from flwr_smartsplit.types import (
    Codec,
    TensorCost,
    codec_from,
    codec_from_text,
    codec_values,
    wire_bytes,
)

ALL: list[Codec] = [
    Raw(),
    Packed(),
    Float16(),
    BFloat16(),
    Integer(),
    Integer(bits=4, back_bits=16),
    TopK(),
    TopK(fraction=0.01, random_share=0.1, values="float16"),
]


@pytest.mark.parametrize("codec", ALL, ids=str)
def test_a_codec_is_read_as_it_was_written(codec: Codec) -> None:
    """In plans, and on the command line."""
    assert codec_from(codec_values(codec)) == codec
    assert codec_from_text(str(codec)) == codec


def test_the_defaults_are_not_written() -> None:
    """A later release may add fields."""
    assert codec_values(Integer()) == {"kind": "integer"}
    assert codec_values(Integer(bits=4)) == {"kind": "integer", "bits": 4}
    assert [str(codec) for codec in (Raw(), Integer(), TopK(fraction=0.2))] == [
        "raw",
        "integer:8",
        "topk:0.2",
    ]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Integer(bits=3), r"Integer\(bits=3.*give 8 or 4 bits"),
        (lambda: Integer(back_bits=2), "back_bits=2"),
        (lambda: TopK(fraction=0.0), "fraction=0.0.*above 0 and at most 1"),
        (lambda: TopK(fraction=1.5), "fraction=1.5"),
        (lambda: TopK(fraction=float("nan")), "fraction=nan"),
        (lambda: TopK(random_share=1.0), "random_share=1.0.*below 1"),
        (lambda: TopK(values="int8"), "values='int8'"),
        (lambda: codec_from({"kind": "zip"}), "is none of raw.*one release"),
        (lambda: codec_from({"kind": "raw", "bits": 8}), "is none of raw"),
        (lambda: codec_from_text("zip"), "'zip' is no codec"),
        (lambda: codec_from_text("raw:8"), "'raw:8' is no codec"),
        (lambda: codec_from_text("integer:many"), "bits='many'"),
    ],
)
def test_what_is_out_of_range_is_said(make: object, text: str) -> None:
    """With the number and the range."""
    with pytest.raises(ValueError, match=text):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("codec", "up", "down"),
    [
        (Raw(), 4000, 4000),
        (Packed(), 4000, 4000),
        (Float16(), 2010, 2010),
        (BFloat16(), 2000, 2000),
        (Integer(), 1080, 1080),
        (Integer(bits=4), 580, 580),
        (Integer(back_bits=16), 1080, 2010),
        (TopK(fraction=0.1), 10 * (4 * 10 + 13), 400),  # Bits are shorter than indices.
        (TopK(fraction=0.01), 10 * (4 + 2), 40),
        (TopK(fraction=0.1, values="float16"), 10 * (1 + 20 + 13), 210),
        (TopK(fraction=1.0), 4000, 4000),  # No smaller, so as it is.
    ],
    ids=str,
)
def test_bytes_of_ten_rows_of_a_hundred_values(
    codec: Codec, up: int, down: int
) -> None:
    """The specification's formulas."""
    assert wire_bytes(codec, TensorCost(shape=(10, 100), dtype="float32")) == (up, down)


def test_what_is_never_rounded_is_sent_as_it_is() -> None:
    """Whole numbers, float64, what only goes along, single values and tiny rows."""
    for cost in (
        TensorCost(shape=(10, 100), dtype="int64", item_bytes=8),
        TensorCost(shape=(10, 100), dtype="float64", item_bytes=8),
        TensorCost(shape=(10, 100), dtype="float32", is_context=True),
        TensorCost(shape=(), dtype="float32"),
        TensorCost(shape=(10, 2), dtype="float32"),
    ):
        assert wire_bytes(Integer(), cost)[0] == cost.num_bytes
    no_gradient = TensorCost(shape=(10, 100), dtype="float32", has_gradient=False)
    assert wire_bytes(Integer(), no_gradient) == (1080, 0)
