"""Depth networks: the small network inside, and shallow ones inside deep ones."""

from dataclasses import replace

import pytest
import torch

from simulations.experiments.errors import ExperimentError
from simulations.experiments.models import depth_model_fn, max_depth, model_fn
from simulations.experiments.runner import initial_model
from tests.simulations.in_process import EXPERIMENT

IMAGES = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def network(depth=None, seed=0):
    return initial_model(depth_model_fn(EXPERIMENT, depth), seed)


@pytest.mark.parametrize(("seed", "same"), [(0, True), (1, False)])
def test_the_deepest_way_begins_as_the_small_network(seed, same):
    small = initial_model(model_fn(EXPERIMENT), 0)

    scores = network(seed=seed)(IMAGES)

    assert scores.shape == (4, max_depth(EXPERIMENT), 10)
    assert torch.equal(scores[:, -1], small(IMAGES)) == same


@pytest.mark.parametrize("depth", [1, 2])
def test_a_shallow_network_is_the_first_part_of_a_deep_one(depth):
    deep, shallow = network(), network(depth, seed=1)
    state = deep.state_dict()

    shallow.load_state_dict({name: state[name] for name in shallow.state_dict()})

    assert torch.equal(shallow(IMAGES), deep(IMAGES)[:, :depth])


def test_a_large_model_has_no_shallower_variants():
    with pytest.raises(ExperimentError, match="take --model small"):
        depth_model_fn(replace(EXPERIMENT, model="torchvision:resnet18"), 1)
