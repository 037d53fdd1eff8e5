"""Ranks of feature maps, measured on the server's data (HRank)."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flwr_smartsplit.plan.variants.pruning import Scores
from flwr_smartsplit.split.narrow.operations import NORMS
from flwr_smartsplit.train.micro_batches import num_examples
from flwr_smartsplit.types import ChannelGroup

_MOST_EXAMPLES = 500
_LINES = 3
"""Axes of outputs whose maps are lines: batch, channels, positions."""


def measured_ranks(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    batches: Iterable[tuple[Any, Any]],
) -> dict[str, Scores]:
    """Measure the mean rank of each channel's maps, added up over a group's layers.

    A map is what the normalisation behind a convolution makes of one example, or the
    convolution where none follows, with 0 for negative values. The first 500 examples
    count, as in HRank.

    Parameters
    ----------
    model : nn.Module
        The whole model; it is left in evaluation mode.
    groups : Sequence[ChannelGroup]
        Its channels.
    batches : Iterable[tuple[inputs, targets]]
        As a client's loader yields them.

    Returns
    -------
    dict[str, ndarray]
        For each group by name, ``(channels,)``.
    """
    totals = {group.name: np.zeros(group.size) for group in groups}
    hooks = [
        layer.register_forward_hook(_adding(totals[group.name]))
        for group in groups
        for layer in _layers_with_maps(model, group)
    ]
    total = 0
    model.eval()
    try:
        with torch.no_grad():
            for inputs, targets in batches:
                model(inputs)
                total += num_examples(inputs, targets)
                if total >= _MOST_EXAMPLES:
                    break
    finally:
        for hook in hooks:
            hook.remove()
    return {name: found / total for name, found in totals.items()}


def _layers_with_maps(model: nn.Module, group: ChannelGroup) -> list[nn.Module]:
    """List the layers whose outputs are a group's maps, each once."""
    paths = {each.name.rpartition(".")[0] for each in group.axes}
    layers = [(path, model.get_submodule(path)) for path in sorted(paths)]
    mapped = [
        layer
        for path, layer in layers
        if type(layer) in NORMS or path in group.unscaled
    ]
    return list({id(layer): layer for layer in mapped}.values())


def _adding(total: Scores) -> Callable[[nn.Module, Any, Tensor], None]:
    """Return a hook that adds the ranks of a layer's maps, over all examples."""

    def add(layer: nn.Module, inputs: Any, outputs: Tensor) -> None:
        del layer, inputs
        if outputs.dim() < _LINES:
            return
        maps = outputs.clamp(min=0)
        maps = maps.unsqueeze(2) if maps.dim() == _LINES else maps.flatten(2, -2)
        total[:] += torch.linalg.matrix_rank(maps).sum(dim=0).numpy()

    return add
