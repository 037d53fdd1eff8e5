"""Parse command-line arguments: shapes, sizes and cuts. Without torch, so at once."""

import difflib
import re
from collections.abc import Sequence
from random import Random

from flwr_smartsplit.errors import SmartSplitError
from flwr_smartsplit.types.codecs import Codec, codec_from_text
from flwr_smartsplit.types.sizes import parse_size

_CUTS_SYNTAX = "all, or with commas: first, middle, last, a number, random:N"


class BadArgument(SmartSplitError):
    """A command-line argument that cannot be used."""


def parse_shape(text: str) -> tuple[int, ...]:
    """Read the shape of one input, such as 3x32x32."""
    words = text.lower().split("x")
    if not all(re.fullmatch("0*[1-9][0-9]{0,8}", word) for word in words):
        raise BadArgument(
            f"--input {text!r} is not a shape: write positive whole numbers with x "
            "between them and without the batch, such as 3x32x32."
        )
    return tuple(map(int, words))


def parse_bytes(text: str, option: str = "--budget") -> int:
    """Read a size with its unit, such as ``64MiB``, in bytes."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise BadArgument(f"{option} {error}") from None


def parse_codec(text: str) -> Codec:
    """Read a codec, such as ``integer:8``."""
    try:
        return codec_from_text(text)
    except ValueError as error:
        raise BadArgument(f"--codec {error}") from None


def choose_cuts(text: str, *, num_units: int, rng: Random) -> tuple[int, ...]:
    """Choose the cuts that ``--cuts`` names, each once and in order."""
    last = num_units - 1
    named = {"first": [1], "middle": [num_units // 2], "last": [last]}
    named["all"] = [*range(1, num_units)]
    chosen: set[int] = set()
    for word in map(str.strip, text.lower().split(",")):
        match = re.fullmatch(r"(random:)?([0-9]{1,9})", word, re.ASCII)
        number = int(match[2]) if match else 0
        if word not in named and number < 1:
            raise BadArgument(f"--cuts {text!r} is not known: write {_CUTS_SYNTAX}.")
        if match and match[1]:
            chosen.update(rng.sample(range(1, num_units), min(number, last)))
        elif match and last and number > last:
            raise BadArgument(
                f"--cuts names {number}, but the {num_units} units can be cut at "
                f"1..{last} only."
            )
        else:
            chosen.update(named.get(word, [number]))
    return tuple(sorted(cut for cut in chosen if 1 <= cut <= last))


def choose_cut(text: str, *, unit_names: Sequence[str]) -> int:
    """Read one cut: a number, the last unit before it, or ``whole``.

    A number is never taken for a name. Returns how many units the device has.
    """
    last = len(unit_names) - 1
    if re.fullmatch("[0-9]{1,9}", text, re.ASCII):
        if 1 <= int(text) <= last:
            return int(text)
    elif text in unit_names:
        return unit_names.index(text) + 1
    elif text.lower() == "whole":
        return len(unit_names)
    close = difflib.get_close_matches(text, unit_names)
    known = f"close: {', '.join(close)}" if close else "write whole or a unit's name"
    numbers = f", or a number in 1..{last}" if last else ""
    raise BadArgument(f"--cut {text!r} is none of this model: {known}{numbers}.")
