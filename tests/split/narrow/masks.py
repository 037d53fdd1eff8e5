"""A narrow model against the whole one whose other channels nobody reads."""

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from flwr_smartsplit.split.narrow.narrowing import narrowed_module
from flwr_smartsplit.types import ChannelGroup, Variant

TOLERANCE = 1e-5
"""Of the largest output: sums over fewer channels are added in another order."""


def masked(
    model: nn.Module, groups: Sequence[ChannelGroup], variant: Variant
) -> nn.Module:
    """Copy a model, with zeros where layers read channels that are left out."""
    copied = copy.deepcopy(model)
    state = copied.state_dict()
    for group in groups:
        gone = np.setdiff1d(np.arange(group.size), variant.kept[group.name])
        for axis in group.axes:
            reads = state[axis.name].dim() > 1 and not _makes(
                copied, axis.name, axis.axis
            )
            if reads:
                entries = gone[:, None] * axis.repeat + np.arange(axis.repeat)
                at = torch.from_numpy(entries.reshape(-1))
                state[axis.name].index_fill_(axis.axis, at, 0)
    return copied


def _makes(model: nn.Module, name: str, axis: int) -> bool:
    """Say whether a layer's channels out lie along an axis of its weight."""
    layer = model.get_submodule(name.rpartition(".")[0])
    return axis == int(getattr(layer, "transposed", False))


def difference(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    variant: Variant,
    example: Tensor,
) -> float:
    """Compare narrow and masked in evaluation, by the largest output."""
    chance = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, *example.shape[1:], generator=chance)
    whole = masked(model, groups, variant).eval()
    small = narrowed_module(whole, groups, variant).eval()
    with torch.no_grad():
        expected, found = whole(inputs), small(inputs)
    return float((expected - found).abs().max() / expected.abs().max())


def is_masked(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    variant: Variant,
    example: Tensor,
) -> bool:
    """Say whether the narrow model computes what the masked one does."""
    return difference(model, groups, variant, example) < TOLERANCE
