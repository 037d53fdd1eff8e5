"""Models: their size, that they travel, and that a wrong name is explained."""

import itertools
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

from simulations.experiments.errors import ExperimentError
from simulations.experiments.experiment import Experiment
from simulations.experiments.models import (
    block_layers,
    digits_network,
    image_network,
    model_fn,
    narrow_model_fn,
)
from simulations.experiments.partitions import Iid
from simulations.fleets.presets import half_weak

DIGITS = Experiment(name="test", methods=("fedavg",), fleet=half_weak, partition=Iid())


def num_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_small_networks_have_sizes_that_train_in_minutes():
    assert 35_000 < num_parameters(digits_network()) < 40_000
    assert 55_000 < num_parameters(image_network(num_channels=1)) < 65_000
    assert 55_000 < num_parameters(image_network()) < 65_000


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
        ("large", "choose small, gated or torchvision:NAME"),
        ("torchvision:resnet81", "resnet18"),
    ],
)
def test_an_unknown_model_is_answered_with_known_ones(name, words):
    with pytest.raises(ExperimentError, match=words):
        model_fn(replace(DIGITS, model=name))


@pytest.mark.parametrize("network", [digits_network, image_network])
def test_a_narrower_network_is_the_first_part_of_every_wider_one(network):
    shapes = [
        {name: t.shape for name, t in network(width=width).state_dict().items()}
        for width in (0.125, 0.25, 0.5, 1)
    ]

    for narrow, wide in itertools.pairwise(shapes):
        assert narrow.keys() == wide.keys()
        assert all(
            small <= large
            for name in wide
            for small, large in zip(narrow[name], wide[name], strict=True)
        )
    narrowest, whole = (shapes[index]["conv2.weight"] for index in (0, 3))
    assert narrowest[:2] == (whole[0] // 8, whole[1] // 8)


@pytest.mark.parametrize(("num_groups", "same"), [(4, True), (8, False)])
def test_a_slice_is_normalised_as_in_the_whole(num_groups, same):
    """Four groups of four channels, as in the whole; eight of two would differ."""
    inputs = torch.randn(2, 32, 5, 5, generator=torch.Generator().manual_seed(0))
    whole = block_layers(1, (1, 32), is_pooled=False)["norm1"]
    narrow = block_layers(1, (1, 16), is_pooled=False, width=0.5)["norm1"]
    assert narrow.num_groups == 4

    narrow = nn.GroupNorm(num_groups, 16)

    assert torch.equal(narrow(inputs[:, :16]), whole(inputs)[:, :16]) == same


def test_a_slice_is_scaled_up_by_the_inverse_of_its_width():
    scale = block_layers(1, (1, 8), is_pooled=False, width=0.25)["scale1"]

    assert scale(torch.tensor([1.0, -2.0])).tolist() == [4.0, -8.0]
    assert "scale1" not in block_layers(1, (1, 32), is_pooled=False)


def test_full_width_is_the_experiments_model():
    assert "scale1" not in dict(narrow_model_fn(DIGITS, 1)().named_children())


@pytest.mark.parametrize("width", [0, 0.3, 2])
def test_a_width_that_would_tear_groups_apart_is_refused(width):
    with pytest.raises(ExperimentError, match="take a multiple of"):
        narrow_model_fn(DIGITS, width)


def test_a_large_model_has_no_narrower_variants():
    with pytest.raises(ExperimentError, match="take --model small"):
        narrow_model_fn(replace(DIGITS, model="torchvision:resnet18"), 0.5)
