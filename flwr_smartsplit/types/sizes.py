"""Sizes such as ``64MiB``, and numbers of other libraries as Python's own.

``errors.bytes_text`` prints sizes.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

_UNIT_BYTES = {"b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]+)", re.ASCII)


def parse_size(text: str) -> int:
    """Read a size with its unit, in bytes; ValueError if it is none."""
    match = _SIZE.fullmatch(text.strip())
    unit_bytes = _UNIT_BYTES.get(match[2].lower()) if match else None
    exact = float(match[1]) * unit_bytes if match and unit_bytes else 0.0
    size = math.floor(exact) if exact < math.inf else 0
    if size < 1:
        raise ValueError(
            f"{text!r} is not a size: write a positive number and B, KiB, MiB, GiB or "
            "TiB, such as 64MiB."
        )
    return size


def plain(value: Any) -> Any:
    """Turn NumPy's and torch's numbers and arrays into Python's own.

    Whatever is inside a tuple, list or mapping is turned, too; arrays become tuples.
    Everything else comes back as it is.
    """
    if hasattr(value, "tolist"):  # What both libraries' scalars and arrays have.
        value = value.tolist()
    if type(value) in (tuple, list):
        return tuple(map(plain, value))
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    return value


def whole(value: Any, name: str) -> int:
    """Read a whole number, whoever's it is; ``8.0`` is one, too."""
    number = plain(value)
    is_number = isinstance(number, int | float) and not isinstance(number, bool)
    if not is_number or number != number // 1:
        raise ValueError(f"{name} is {value!r:.40}: give a whole number.")
    return int(number)


def whole_bytes(value: Any, name: str) -> int:
    """Read a number of bytes; the fraction of a computed one is left out."""
    number = plain(value)
    if isinstance(number, float) and math.isfinite(number):
        number = math.floor(number)
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise ValueError(
            f"{name} is {value!r:.40}: give a whole number of bytes of at least 0, "
            "such as 64 * 2**20, or None for no limit."
        )
    return number


def own_numbers(values: Any) -> None:
    """Turn the numbers in a frozen dataclass's fields into Python's own."""
    for each in fields(values):
        object.__setattr__(values, each.name, plain(getattr(values, each.name)))
