"""Layouts: what torch's own addressing says, for any shape and strides."""

import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from flwr_smartsplit.split.layout import is_dense, num_spanned

AXES = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), max_size=4)
"""Sizes, each with its stride."""


def addresses(shape: tuple[int, ...], strides: tuple[int, ...]) -> list[int]:
    """List where each element lies, one by one."""
    places = itertools.product(*map(range, shape))
    return [sum(i * s for i, s in zip(at, strides, strict=True)) for at in places]


@given(AXES)
def test_dense_is_each_address_once_and_none_left_out(axes):
    """The elements' addresses are 0, 1, 2, ... in some order, or there are none."""
    shape, strides = zip(*axes, strict=True) if axes else ((), ())
    places = addresses(shape, strides)
    assert is_dense(shape, strides) == (sorted(places) == list(range(len(places))))


@given(AXES)
def test_the_span_reaches_to_the_last_address(axes):
    """It is what torch needs of a storage for such a tensor."""
    shape, strides = zip(*axes, strict=True) if axes else ((), ())
    assert num_spanned(shape, strides) == max(addresses(shape, strides), default=-1) + 1
    made = torch.empty_strided(shape, strides, dtype=torch.uint8)
    assert num_spanned(shape, strides) == made.untyped_storage().nbytes()


@pytest.mark.parametrize(
    ("look", "dense", "spanned"),
    [
        (lambda x: x, True, 24),
        (lambda x: x.permute(2, 0, 1), True, 24),
        (lambda x: x[:, :1], False, 16),
        (lambda x: x[..., ::2], False, 23),
        (lambda x: x[0, 0, 0].expand(2, 3, 4), False, 1),
        (lambda x: x[:1, :1, :1], True, 1),
        (lambda x: x[:0], True, 0),
        (lambda x: x[0, 0, 0], True, 1),
    ],
    ids=["as made", "permuted", "part", "gaps", "repeated", "one", "empty", "scalar"],
)
def test_layouts_that_occur(look, dense, spanned):
    """What views, slices and sums make of a tensor of 2 x 3 x 4."""
    values = look(torch.zeros(2, 3, 4))
    shape, strides = tuple(values.shape), values.stride()
    assert is_dense(shape, strides) is dense
    assert num_spanned(shape, strides) == spanned
