"""The clients' tasks: losses by hand, and which task a message gets."""

import math
from dataclasses import replace

import pytest
import torch

from simulations.experiments.clients import build_task
from simulations.experiments.partitions import OwnLabels
from simulations.methods import METHODS
from simulations.methods.depthfl import DEPTH, DISTILLATION, distilling_loss
from simulations.methods.heterofl import WIDTH, local_labels, masked_cross_entropy
from simulations.methods.method import PROXIMAL_MU
from tests.simulations.in_process import EXPERIMENT


def test_foreign_classes_score_zero_and_learn_nothing():
    """Scores ln 2, 5 and ln 3; the second class is foreign: 2 / (2 + 1 + 3)."""
    scores = torch.tensor([[math.log(2), 5.0, math.log(3)]], requires_grad=True)

    loss = masked_cross_entropy(
        scores, torch.tensor([0]), is_foreign=(False, True, False)
    )
    loss.backward()

    assert loss.item() == pytest.approx(math.log(3))
    assert scores.grad[0].tolist() == pytest.approx([2 / 6 - 1, 0.0, 3 / 6])


def test_with_every_class_at_home_it_is_the_cross_entropy():
    scores, targets = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])

    masked = masked_cross_entropy(scores, targets, is_foreign=(False,) * 3)

    assert torch.equal(masked, torch.nn.functional.cross_entropy(scores, targets))


TWO = torch.tensor([[[math.log(3), 0.0], [0.0, 0.0]]])
"""One example; the first classifier says 3/4 and 1/4, the second 1/2 and 1/2."""


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_classifiers_learn_the_target_and_from_each_other(weight):
    loss = distilling_loss(TWO, torch.tensor([0]), distillation=weight)

    first_from_second = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    second_from_first = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    entropies = math.log(4 / 3) + math.log(2)
    truth = entropies + weight * (first_from_second + second_from_first)
    assert loss.item() == pytest.approx(truth)


def test_teachers_are_taken_as_they_are():
    """Of the divergence, a pupil's scores get its probabilities minus the teacher's."""
    scores = TWO.clone().requires_grad_()
    target = torch.tensor([0])
    distilling_loss(scores, target, distillation=1.0).backward()
    plain = TWO.clone().requires_grad_()
    distilling_loss(plain, target, distillation=0.0).backward()

    learned = (scores.grad - plain.grad)[0]

    assert learned.flatten().tolist() == pytest.approx([0.25, -0.25, -0.25, 0.25])


def test_three_classifiers_share_the_weight_of_their_two_teachers():
    """A third one, equal to the second, doubles the divergences; each counts half."""
    three = torch.cat([TWO, TWO[:, 1:]], dim=1)
    target = torch.tensor([0])

    def taught(outputs):
        plain = distilling_loss(outputs, target, distillation=0.0)
        return (distilling_loss(outputs, target, distillation=1.0) - plain).item()

    assert taught(three) == pytest.approx(taught(TWO))


def test_a_single_classifier_has_no_teacher():
    alone = TWO[:, :1]

    loss = distilling_loss(alone, torch.tensor([0]), distillation=1.0)

    assert loss.item() == pytest.approx(math.log(4 / 3))


@pytest.mark.parametrize(
    ("method", "config", "num_parameters"),
    [
        ("fedavg", {}, 37_690),
        ("heterofl", {WIDTH: 0.5}, 10_210),
        ("depthfl", {DEPTH: 1, DISTILLATION: 0.0}, 32 * 9 + 64 + 32 * 4 * 10 + 10),
    ],
)
def test_a_message_gets_the_model_it_asks_for(method, config, num_parameters):
    model = METHODS[method].task_fn(EXPERIMENT, 0, config).model_fn()

    assert sum(p.numel() for p in model.parameters()) == num_parameters


def test_a_message_of_fedprox_gets_its_term_and_one_without_weight_does_not():
    def is_pulled(config):
        task = METHODS["fedprox"].task_fn(EXPERIMENT, 0, config)
        return task.optimizer_fn != build_task(EXPERIMENT).optimizer_fn

    assert is_pulled({PROXIMAL_MU: 0.1})
    assert not is_pulled({PROXIMAL_MU: 0.0})
    assert not is_pulled({})


def test_only_classes_with_an_example_are_a_clients_own():
    labels = local_labels(replace(EXPERIMENT, partition=OwnLabels(num_own=5)))

    assert set(labels[0]) & {0, 1, 2, 3, 4}
    assert not set(labels[1]) & {0, 1, 2, 3, 4}
    assert all(own == tuple(sorted(set(own))) for own in labels)
