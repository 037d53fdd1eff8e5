"""Proxies: small units that stand for blocks which are not trained yet.

ProFL's output modules [1]_: a convolution without normalisation or activation, so that
a step's memory is that of its block and little more.

References
----------
.. [1] Wu et al., "ProFL", KDD 2025, arXiv:2404.13349, and its code.
"""

import re
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from flwr_smartsplit.errors import InvalidTask
from flwr_smartsplit.split.segment import Unit

PROXIES = "proxy"
"""What the names of their state begin with."""

_IMAGE, _TOKENS, _FEATURES = 4, 3, 2
Shapes = tuple[tuple[int, ...], ...]


def proxy_for(entering: Shapes, leaving: Shapes, units: Sequence[Unit]) -> nn.Module:
    """Make the module, on meta, that maps what enters some units to what leaves them.

    Images ``(batch, channels, height, width)`` take a 3x3 convolution with a stride,
    tokens ``(batch, length, features)`` and features ``(batch, features)`` a linear
    layer; neither has a bias.

    Raises
    ------
    InvalidTask
        If neither maps the one shape to the other, with both.
    """
    found = None
    if len(entering) == len(leaving) == 1:
        found = _mapping(entering[0], leaving[0])
    if found is None:
        names = units[0].name, units[-1].name
        raise InvalidTask(
            f"no proxy stands for the block from {names[0]!r} to {names[1]!r}: it maps "
            f"{_text(entering)} to {_text(leaving)} (of 2 examples). A 3x3 convolution "
            "with a stride, or a linear layer, must do so: end the block before the "
            "shape changes otherwise."
        )
    return found


def name_of(run: tuple[int, int]) -> str:
    """Name the proxy of a run of units, as its state does.

    Examples
    --------
    >>> name_of((4, 7)), run_of("proxy.4_7.weight"), run_of("fc.weight")
    ('proxy.4_7', (4, 7), None)
    """
    return f"{PROXIES}.{run[0]}_{run[1]}"


def run_of(name: str) -> tuple[int, int] | None:
    """Read the run of units that an array's proxy stands for; None if it has none."""
    found = re.match(rf"{PROXIES}\.(\d{{1,9}})_(\d{{1,9}})\.", name)
    return None if found is None else (int(found[1]), int(found[2]))


def _mapping(before: tuple[int, ...], after: tuple[int, ...]) -> nn.Module | None:
    if len(before) != len(after):
        return None
    if len(before) == _IMAGE:
        sizes = list(zip(before[2:], after[2:], strict=True))
        high, wide = (max(1, round(one / other)) for one, other in sizes)
        if ((before[2] - 1) // high + 1, (before[3] - 1) // wide + 1) == after[2:]:
            strides = high, wide
            return nn.Conv2d(
                *(before[1], after[1], 3), strides, padding=1, bias=False, device="meta"
            )
    is_linear = len(before) in (_TOKENS, _FEATURES) and before[1:-1] == after[1:-1]
    if is_linear:
        return nn.Linear(before[-1], after[-1], bias=False, device="meta")
    return None


def _text(shapes: Shapes) -> str:
    return " and ".join(map(str, shapes))


def first_values(
    kinds: Mapping[str, tuple[tuple[int, ...], str]], seed: int
) -> dict[str, npt.NDArray[Any]]:
    """Draw the first values of proxies, each from ``(seed, its name)``.

    Kaiming's normal distribution by the number of outputs, as torchvision's ResNets
    have; ``kinds`` are shapes and NumPy's dtypes by name.
    """
    found: dict[str, npt.NDArray[Any]] = {}
    for name, (shape, dtype) in kinds.items():
        digest = sha256(repr((seed, name)).encode()).digest()
        start = int.from_bytes(digest[:8], "big") >> 1
        chance = torch.Generator().manual_seed(start)
        fan_out = shape[0] * int(np.prod(shape[2:]))
        values = torch.randn(shape, generator=chance) * (2 / fan_out) ** 0.5
        found[name] = values.numpy().astype(dtype)
    return found
