"""Sizes that people write, and what is not a size."""

import pytest

from flwr_smartsplit.types.sizes import parse_size


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("1B", 1), (" 64 mib ", 64 * 2**20), ("0.5KiB", 512), ("2TiB", 2**41)],
)
def test_a_size_is_read_with_its_unit(text, num_bytes):
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize("text", ["", "64", "64MB", "-1MiB", "0.1B", "1e3KiB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match=r"is not a size: .* such as 64MiB"):
        parse_size(text)
