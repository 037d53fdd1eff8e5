"""Tasks by name: torchvision's models and one's own, and what is neither."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from flwr_smartsplit.cli.specs import (
    NUM_CLASSES,
    OPTIMIZERS,
    UnknownModel,
    mean_cross_entropy,
    optimizer_name,
    task_of,
    torchvision_fn,
)

SUBJECTS = "tests.cli.subjects:"


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_torchvision_model_is_trained_by_the_optimizer_asked_for(optimizer):
    task = task_of("torchvision:alexnet", optimizer=optimizer)

    assert task.example_inputs.shape == (1, 3, 224, 224)
    assert task.example_targets.tolist() == list(range(NUM_CLASSES))
    assert optimizer_name(task) == optimizer


def test_a_transformer_is_built_for_the_images_asked_for():
    model = torchvision_fn("vit_b_32", (3, 64, 64))()

    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, NUM_CLASSES)


@pytest.mark.parametrize(("name", "num_classes"), [("small", 3), ("two_outputs", 5)])
def test_the_classes_of_a_module_are_counted(name, num_classes):
    task = task_of(SUBJECTS + name, input_shape=(4,))

    assert task.example_inputs.shape == (1, 4)
    assert task.example_targets.tolist() == list(range(num_classes))
    assert isinstance(task.model_fn(), nn.Module)
    assert not next(task.model_fn().parameters()).is_meta


def test_a_task_of_ones_own_stays_as_it_is():
    task = task_of(SUBJECTS + "small_task", optimizer="sgd")

    assert task.loss_fn is functional.cross_entropy
    assert optimizer_name(task) is None


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("torchvision:resnt18", "close: resnet18"),
        ("torchvision:", "torchvision has no classifier ''"),
        ("nothing", "neither torchvision:NAME nor package.module:function"),
        (":name", "neither"),
        ("json:", "neither"),
        ("no.such.module:name", "No module named 'no'"),
        (SUBJECTS + "missing", "has no attribute 'missing'"),
        (SUBJECTS + "NOT_A_FUNCTION", "of type int: name a function"),
        (SUBJECTS + "a_list", "returned list: let it return an nn.Module"),
        (SUBJECTS + "one_number", "returns a tensor of shape (2, 1)"),
        (SUBJECTS + "fails", "fails: RuntimeError: no such."),
        (SUBJECTS + "needs_an_argument", "missing 1 required positional argument"),
        (SUBJECTS + "LooksAtValues", "must take them and not look at values"),
    ],
)
def test_what_is_no_model_is_explained(model, words):
    with pytest.raises(UnknownModel) as caught:
        task_of(model, input_shape=(4,))
    assert words in str(caught.value)


def test_a_module_needs_the_shape_of_its_input():
    with pytest.raises(UnknownModel, match="--input 3x32x32"):
        task_of(SUBJECTS + "small")
    with pytest.raises(UnknownModel, match="must take them"):
        task_of(SUBJECTS + "small", input_shape=(5,))


def test_an_unknown_optimizer_is_refused_with_those_there_are():
    with pytest.raises(UnknownModel, match="sgd, momentum, adam"):
        task_of("torchvision:alexnet", optimizer="lbfgs")


def test_auxiliary_outputs_count_three_tenths():
    main, aux = torch.randn(2, 4, 3)
    targets = torch.tensor([0, 1, 2, 0])
    of_main, of_aux = (functional.cross_entropy(out, targets) for out in (main, aux))

    assert mean_cross_entropy(main, targets) == of_main
    assert mean_cross_entropy((main, None), targets) == of_main
    assert mean_cross_entropy((main, aux), targets) == of_main + 0.3 * of_aux
