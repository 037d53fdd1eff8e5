"""Words of a command line: what they mean, and what means nothing."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flwr_smartsplit.cli.arguments import (
    BadArgument,
    choose_cut,
    choose_cuts,
    parse_bytes,
    parse_shape,
)


@given(st.lists(st.integers(1, 10**9 - 1), min_size=1, max_size=4))
def test_a_shape_that_is_written_can_be_read(shape):
    assert parse_shape("x".join(map(str, shape))) == tuple(shape)


@pytest.mark.parametrize(
    "text", ["", "x", "3x", "x3", "3x0x1", "-3x4", "abc", "3 x 4", "3x4.5", "3,4", "٣"]
)
def test_what_is_no_shape_is_refused(text):
    with pytest.raises(BadArgument, match="such as 3x32x32"):
        parse_shape(text)


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("1B", 1),
        ("64MiB", 64 * 2**20),
        ("64 mib", 64 * 2**20),
        (" 0.5KiB ", 512),
        ("1.5GiB", 3 * 2**29),
        ("2TiB", 2**41),
    ],
)
def test_a_size_is_read_with_its_unit(text, num_bytes):
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize(
    "text",
    [
        *("", "64", "MiB", "-1MiB", "0MiB", "0.1B", "64MB", "1e3KiB", "infMiB", "٣B"),
        *("nan", "nanMiB", "9" * 308 + "TiB", "9" * 400 + "B"),
    ],
)
def test_what_is_no_size_is_refused(text):
    with pytest.raises(BadArgument, match="such as 64MiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "num_units", "cuts"),
    [
        ("all", 5, (1, 2, 3, 4)),
        ("first,middle,last", 5, (1, 2, 4)),
        ("first,middle,last", 2, (1,)),
        ("4, 2,2", 5, (2, 4)),
        ("FIRST,3", 5, (1, 3)),
        ("random:100", 5, (1, 2, 3, 4)),
        ("all", 1, ()),
        ("first,middle,last", 1, ()),
        ("random:3", 1, ()),
        ("3", 1, ()),
    ],
)
def test_cuts_are_chosen_once_each_and_in_order(text, num_units, cuts):
    assert choose_cuts(text, num_units=num_units, rng=Random(0)) == cuts


def test_random_cuts_are_the_seeds():
    one, same, other = (
        choose_cuts("random:5", num_units=1000, rng=Random(seed)) for seed in (1, 1, 2)
    )
    assert len(one) == 5
    assert one == same != other


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "frist", "random", "random:", "random:0", "1;2", "1,,2"]
)
def test_what_names_no_cuts_is_refused(text):
    with pytest.raises(BadArgument, match="write all, or with commas"):
        choose_cuts(text, num_units=5, rng=Random(0))


def test_a_cut_beyond_the_last_is_refused_with_what_there_is():
    with pytest.raises(BadArgument, match=r"names 5, but .* 1\.\.4 only"):
        choose_cuts("1,5", num_units=5, rng=Random(0))


NAMES = ["conv", "1", "block.relu", "fc"]


@pytest.mark.parametrize(
    ("text", "cut"),
    [("1", 1), ("03", 3), ("conv", 1), ("block.relu", 3), ("fc", 4), ("WHOLE", 4)],
)
def test_a_cut_is_a_number_first_or_the_unit_before_it(text, cut):
    assert choose_cut(text, unit_names=NAMES) == cut


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0", r"write whole or a unit's name, or a number in 1\.\.3"),
        ("4", r"a number in 1\.\.3"),
        ("-1", r"a number in 1\.\.3"),
        ("nan", "write whole"),
        ("", "write whole"),
        ("block.rely", r"close: block\.relu"),
        ("٣", "write whole"),
    ],
)
def test_what_names_no_cut_is_refused_with_what_there_is(text, words):
    with pytest.raises(BadArgument, match=words):
        choose_cut(text, unit_names=NAMES)


def test_a_model_of_one_unit_has_no_cut_to_name():
    with pytest.raises(BadArgument, match=r"write whole or a unit's name\.$"):
        choose_cut("1", unit_names=["all"])
