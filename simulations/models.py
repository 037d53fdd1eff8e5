"""The models of the experiments, built by importable functions.

Group normalisation by default: a network without any stalls in the first rounds, and
batch statistics averaged over clients with different classes are a second effect.
"""

import difflib
from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torchvision
from torch import nn

from simulations.data import input_shape, load_images
from simulations.errors import ExperimentError
from simulations.experiment import TORCHVISION, Experiment

SMALL_IMAGE_SIDE = 16
"""Images with shorter sides get the network for digits."""


def model_fn(experiment: Experiment) -> Callable[[], nn.Module]:
    """Return the function that builds the experiment's model.

    Raises
    ------
    ExperimentError
        If there is no such model.
    """
    shape = input_shape(experiment)
    num_classes = load_images(experiment).num_classes
    name = experiment.model
    build: Callable[[], nn.Module]
    if name.startswith(TORCHVISION):
        build = partial(torchvision_model, known_model(name), num_classes=num_classes)
    elif name != "small":
        raise ExperimentError(
            f"model {name!r} is unknown: choose small or {TORCHVISION}NAME, such as "
            f"{TORCHVISION}resnet18."
        )
    else:
        small = digits_network if min(shape[1:]) < SMALL_IMAGE_SIDE else image_network
        build = partial(small, num_channels=shape[0], num_classes=num_classes)
    return build


def known_model(name: str) -> str:
    """Strip ``torchvision:`` off a name that torchvision knows.

    Raises
    ------
    ExperimentError
        If it does not, with the closest names it knows.
    """
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
    model: nn.Module = torchvision.models.get_model(
        name, weights=None, num_classes=num_classes
    )
    return model


def digits_network(*, num_channels: int = 1, num_classes: int = 10) -> nn.Sequential:
    """Build the network for 8 x 8 digits: 38 thousand parameters.

    Examples
    --------
    >>> sum(parameter.numel() for parameter in digits_network().parameters())
    37690
    """
    return _convolutional_network(
        channels=(num_channels, 32, 40, 64), side_after_pools=2, num_classes=num_classes
    )


def image_network(*, num_channels: int = 3, num_classes: int = 10) -> nn.Sequential:
    """Build the network for images of 28 x 28 or 32 x 32: 114 thousand parameters.

    Examples
    --------
    >>> sum(parameter.numel() for parameter in image_network().parameters())
    113962
    """
    return _convolutional_network(
        channels=(num_channels, 32, 64, 128),
        side_after_pools=4,
        num_classes=num_classes,
    )


def _convolutional_network(
    *, channels: tuple[int, ...], side_after_pools: int, num_classes: int
) -> nn.Sequential:
    """Stack blocks of convolution, group norm and ReLU, pool, and classify."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for index in range(1, len(channels)):
        before, after = channels[index - 1 : index + 1]
        layers[f"conv{index}"] = nn.Conv2d(before, after, 3, padding=1, bias=False)
        layers[f"norm{index}"] = nn.GroupNorm(8, after)
        layers[f"relu{index}"] = nn.ReLU()
        if index > 1:
            layers[f"pool{index}"] = nn.MaxPool2d(2)
    layers["pool"] = nn.AdaptiveAvgPool2d(side_after_pools)
    layers["flatten"] = nn.Flatten()
    layers["classify"] = nn.Linear(channels[-1] * side_after_pools**2, num_classes)
    return nn.Sequential(layers)
