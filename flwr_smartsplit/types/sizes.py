"""Parse sizes such as ``64MiB``; ``errors.bytes_text`` prints them."""

import math
import re

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
