"""Models: their size, that they travel, and that a wrong name is explained."""

import pickle
from dataclasses import replace

import pytest
import torch

from simulations.errors import ExperimentError
from simulations.experiment import Experiment
from simulations.fleets import half_weak
from simulations.models import digits_network, image_network, model_fn
from simulations.partitions import Iid

DIGITS = Experiment(name="test", methods=("fedavg",), fleet=half_weak, partition=Iid())


def num_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_small_networks_have_the_sizes_that_were_calibrated():
    assert 35_000 < num_parameters(digits_network()) < 40_000
    assert 105_000 < num_parameters(image_network(num_channels=1)) < 125_000
    assert 105_000 < num_parameters(image_network()) < 125_000


@pytest.mark.parametrize("name", ["small", "torchvision:resnet18"])
def test_a_model_can_be_built_in_another_process_and_takes_the_images(name):
    build = pickle.loads(pickle.dumps(model_fn(replace(DIGITS, model=name))))
    channels = 1 if name == "small" else 3

    outputs = build().eval()(torch.zeros(2, channels, 8, 8))

    assert outputs.shape == (2, 10)


def test_images_of_28_pixels_get_the_larger_network():
    outputs = image_network(num_channels=1)(torch.zeros(2, 1, 28, 28))

    assert outputs.shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("large", "choose small or torchvision:NAME"),
        ("torchvision:resnet81", "resnet18"),
    ],
)
def test_an_unknown_model_is_answered_with_known_ones(name, words):
    with pytest.raises(ExperimentError, match=words):
        model_fn(replace(DIGITS, model=name))
