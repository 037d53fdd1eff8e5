"""The models of the experiments, built by importable functions.

Group normalisation by default: a network without any stalls in the first rounds, and
batch statistics averaged over clients with different classes are a second effect.
"""

import difflib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from flwr_smartsplit import Task, gated
from simulations.experiments.data import input_shape, load_images
from simulations.experiments.errors import ExperimentError
from simulations.experiments.experiment import TORCHVISION, Experiment

SMALL_IMAGE_SIDE = 16
"""Images with shorter sides get the network for digits."""

NUM_GROUPS = 8
"""Groups of channels that each layer of a small network normalises, at full width."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The size of a small network."""

    channels: tuple[int, ...]  # Channels after each block, at full width
    pooled: tuple[int, ...]  # The blocks, from 1, that halve height and width
    side: int  # Height and width of what is classified, in pixels


DIGITS = Layout(channels=(32, 40, 64), pooled=(2, 3), side=2)
IMAGES = Layout(channels=(16, 32, 128), pooled=(1, 2), side=4)
"""Halved before the wide blocks: a step costs a fifth of one without."""


GATED = "gated"
"""The small network with a gate of channels behind its second block's ReLU."""

GATE_STRENGTH = 30.0
"""Times a learning rate of 0.03 with momentum 0.9, what VCCprune's 1000 is times 0.01
without: found in its settings, and never tuned."""


def model_fn(experiment: Experiment) -> Callable[[], nn.Module]:
    """Return the function that builds the experiment's model."""
    name = experiment.model
    if name.startswith(TORCHVISION):
        num_classes = load_images(experiment).num_classes
        return partial(torchvision_model, known_model(name), num_classes=num_classes)
    if name not in {"small", GATED}:
        raise ExperimentError(
            f"model {name!r} is unknown: choose small, {GATED} or {TORCHVISION}NAME, "
            f"such as {TORCHVISION}resnet18."
        )
    small = partial(_small_network(experiment), **ends(experiment))
    if name == "small":
        return small
    return gated(small, after="relu2", encoder=False, strength=GATE_STRENGTH)


def narrow_model_fn(experiment: Experiment, width: float) -> Callable[[], nn.Module]:
    """Return the function that builds the model with a share of its channels."""
    refuse_large_models(experiment)
    if width == 1:
        return model_fn(experiment)
    if not 0 < width < 1 or NUM_GROUPS * width != int(NUM_GROUPS * width):
        raise ExperimentError(
            f"width is {width}, but normalisation keeps its groups of channels whole: "
            f"take a multiple of {1 / NUM_GROUPS}, at most 1."
        )
    return partial(_small_network(experiment), width=width, **ends(experiment))


def refuse_large_models(experiment: Experiment) -> None:
    """Refuse a model of which there are no smaller submodels: any but ``small``."""
    if experiment.model != "small":
        raise ExperimentError(
            f"model {experiment.model!r} has no narrower or shallower submodels, which "
            f"heterofl and depthfl train on weak devices: take --model small, or leave "
            f"these methods out."
        )


def small_layout(experiment: Experiment) -> Layout:
    """Choose the size of the small network by that of the images."""
    is_tiny = min(input_shape(experiment)[1:]) < SMALL_IMAGE_SIDE
    return DIGITS if is_tiny else IMAGES


def _small_network(experiment: Experiment) -> Callable[..., nn.Module]:
    return digits_network if small_layout(experiment) is DIGITS else image_network


def ends(experiment: Experiment) -> dict[str, int]:
    """Say how many channels a model takes, and how many classes it knows."""
    return {
        "num_channels": input_shape(experiment)[0],
        "num_classes": load_images(experiment).num_classes,
    }


def known_model(name: str) -> str:
    """Strip ``torchvision:`` off a name, and refuse one that torchvision lacks."""
    import torchvision  # noqa: PLC0415 - takes seconds; the small networks need none

    wanted = name.removeprefix(TORCHVISION)
    known = torchvision.models.list_models(module=torchvision.models)
    if wanted not in known:
        close = difflib.get_close_matches(wanted, known) or ["resnet18", "vgg11_bn"]
        raise ExperimentError(
            f"torchvision has no classification model {wanted!r}: choose one of its "
            f"{len(known)}, such as {', '.join(close)}."
        )
    return wanted


def torchvision_model(name: str, *, num_classes: int) -> nn.Module:
    """Build a model of torchvision's with random weights."""
    import torchvision  # noqa: PLC0415 - takes seconds; the small networks need none

    model: nn.Module = torchvision.models.get_model(
        name, weights=None, num_classes=num_classes
    )
    return model


def image_task(model_fn: Callable[[], nn.Module], *, side: int = 32) -> Task:
    """Train a model on colour images in ten classes, by SGD with momentum."""
    return Task(
        model_fn=model_fn,
        loss_fn=nn.functional.cross_entropy,
        optimizer_fn=partial(torch.optim.SGD, lr=0.01, momentum=0.9),
        example_inputs=torch.zeros(1, 3, side, side),
        example_targets=torch.zeros(1, dtype=torch.int64),
    )


def digits_network(
    *, num_channels: int = 1, num_classes: int = 10, width: float = 1
) -> nn.Sequential:
    """Build the network for 8 x 8 digits: 38 thousand parameters at full width.

    Examples
    --------
    >>> sum(parameter.numel() for parameter in digits_network().parameters())
    37690
    >>> sum(parameter.numel() for parameter in digits_network(width=0.5).parameters())
    10210
    """
    return _network(DIGITS, (num_channels, num_classes), width=width)


def image_network(
    *, num_channels: int = 3, num_classes: int = 10, width: float = 1
) -> nn.Sequential:
    """Build the network for images of 28 x 28 or 32 x 32: 63 thousand parameters."""
    return _network(IMAGES, (num_channels, num_classes), width=width)


def _network(layout: Layout, ends: tuple[int, int], *, width: float) -> nn.Sequential:
    """Stack blocks of convolution, group norm and ReLU, pool, and classify."""
    num_channels, num_classes = ends
    channels = (num_channels, *(round(width * full) for full in layout.channels))
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for index in range(1, len(channels)):
        layers |= block_layers(
            index,
            channels[index - 1 : index + 1],
            is_pooled=index in layout.pooled,
            width=width,
        )
    layers |= classifier_layers(channels[-1], layout.side, num_classes)
    return nn.Sequential(layers)


def block_layers(
    index: int, channels: tuple[int, ...], *, is_pooled: bool, width: float = 1
) -> dict[str, nn.Module]:
    """Build the layers of one block, by name.

    The size of a normalised group is that of the full width, so that a slice of
    channels is normalised as it is in the whole network. A slice is scaled up by the
    inverse of its share.
    """
    before, after = channels
    layers: dict[str, nn.Module] = {
        f"conv{index}": nn.Conv2d(before, after, 3, padding=1, bias=False)
    }
    if width < 1:
        layers[f"scale{index}"] = Scale(1 / width)
    layers[f"norm{index}"] = nn.GroupNorm(round(NUM_GROUPS * width), after)
    layers[f"relu{index}"] = nn.ReLU()
    if is_pooled:
        layers[f"pool{index}"] = nn.MaxPool2d(2)
    return layers


def classifier_layers(
    num_channels: int, side: int, num_classes: int
) -> dict[str, nn.Module]:
    """Build the layers that make class scores of an image, by name."""
    return {
        "pool": nn.AdaptiveAvgPool2d(side),
        "flatten": nn.Flatten(),
        "classify": nn.Linear(num_channels * side**2, num_classes),
    }


class Scale(nn.Module):
    """Multiply by a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the inputs times the factor, in their shape."""
        return inputs * self.factor


# --- a classifier after each block ----------------------------------------------------


def depth_model_fn(
    experiment: Experiment, depth: int | None = None
) -> Callable[[], nn.Module]:
    """Return the function that builds the first blocks and their classifiers."""
    refuse_large_models(experiment)
    layout = small_layout(experiment)
    return partial(
        DepthNetwork,
        layout,
        depth=len(layout.channels) if depth is None else depth,
        **ends(experiment),
    )


def max_depth(experiment: Experiment) -> int:
    """Count the blocks of the experiment's small network."""
    return len(small_layout(experiment).channels)


class DepthNetwork(nn.Module):
    """Blocks in a row, each with a classifier."""

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
