"""The small networks with a classifier after each block, at any depth.

Separate from ``models`` because such a network has several outputs: one for each
classifier. The deepest way through it is the small network itself.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from simulations.experiments.experiment import Experiment
from simulations.experiments.models import (
    Layout,
    block_layers,
    classifier_layers,
    ends,
    refuse_large_models,
    small_layout,
)


def depth_model_fn(
    experiment: Experiment, depth: int | None = None
) -> Callable[[], nn.Module]:
    """Return the function that builds the first blocks and their classifiers.

    Parameters
    ----------
    experiment : Experiment
        Says which model, for which data.
    depth : int, optional
        How many blocks; all of them if not given.

    Raises
    ------
    ExperimentError
        If the model is not a small network.
    """
    refuse_large_models(experiment)
    layout = small_layout(experiment)
    depth = len(layout.channels) if depth is None else depth
    return partial(DepthNetwork, layout, depth=depth, **ends(experiment))


def max_depth(experiment: Experiment) -> int:
    """Count the blocks of the experiment's small network."""
    return len(small_layout(experiment).channels)


class DepthNetwork(nn.Module):
    """Blocks in a row, each with a classifier.

    Parameters
    ----------
    layout : Layout
        Size of the whole network.
    depth : int
        How many blocks to build, from the first.
    num_channels, num_classes : int
        What goes in and comes out.
    """

    def __init__(
        self, layout: Layout, *, depth: int, num_channels: int, num_classes: int
    ) -> None:
        super().__init__()
        channels = (num_channels, *layout.channels[:depth])
        self.blocks = nn.ModuleList(
            nn.Sequential(
                OrderedDict(
                    block_layers(
                        index,
                        channels[index - 1 : index + 1],
                        is_pooled=index in layout.pooled,
                    )
                )
            )
            for index in range(1, depth + 1)
        )
        # The deepest first: so it begins, as the blocks do, like the small network.
        classifiers = [
            nn.Sequential(
                OrderedDict(classifier_layers(after, layout.side, num_classes))
            )
            for after in reversed(channels[1:])
        ]
        self.classifiers = nn.ModuleList(reversed(classifiers))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the scores of all classifiers, ``(batch, depth, classes)``."""
        scores = []
        for block, classifier in zip(self.blocks, self.classifiers, strict=True):
            inputs = block(inputs)
            scores.append(classifier(inputs))
        return torch.stack(scores, dim=1)
