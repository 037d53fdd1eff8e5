"""Build the ``Task`` that the command line names."""

import difflib
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.optim import SGD, Adam
from torchvision import models

from flwr_smartsplit.errors import SmartSplitError
from flwr_smartsplit.split.fake_tensors import (
    DryRun,
    fake_batch,
    fake_copy,
    warnings_ignored,
)
from flwr_smartsplit.split.template import parameters_on_meta
from flwr_smartsplit.split.trace.facts import torch_log_silenced
from flwr_smartsplit.task import Task

TORCHVISION = "torchvision:"
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(SGD, lr=0.01),
    "momentum": partial(SGD, lr=0.01, momentum=0.9),
    "adam": partial(Adam, lr=1e-3),
}
NUM_CLASSES = 10
_PATCHED = "vit_"


class UnknownModel(SmartSplitError):
    """A MODEL or an optimizer that cannot be built."""


@warnings_ignored()
def task_of(
    model: str, *, input_shape: tuple[int, ...] | None = None, optimizer: str = "sgd"
) -> Task:
    """Build the task that a command line names.

    A ``Task`` brings its example inputs and its optimizer; an ``nn.Module`` of your own
    needs ``input_shape``, the shape of one input without the batch.
    """
    if optimizer not in OPTIMIZERS:
        raise UnknownModel(
            f"--optimizer {optimizer!r} is not known: choose one of "
            f"{', '.join(OPTIMIZERS)}."
        )
    if model.startswith(TORCHVISION):
        name = model.removeprefix(TORCHVISION)
        build = torchvision_fn(name, input_shape)
        shape = input_shape or (3, 224, 224)
        return classification(build, shape, optimizer, num_classes=NUM_CLASSES)
    function = _imported(model)
    # Look at what the user's function builds without taking memory for it.
    with parameters_on_meta():
        made = _call(model, function)
    if isinstance(made, Task):
        task: Task = _call(model, function)
        return task
    if not isinstance(made, nn.Module):
        raise UnknownModel(
            f"{model} returned {type(made).__name__}: let it return an nn.Module or a "
            "flwr_smartsplit.Task."
        )
    if input_shape is None:
        raise UnknownModel(
            f"{model} returned a module: give the shape of one input, such as "
            "--input 3x32x32, or let it return a flwr_smartsplit.Task."
        )
    num_classes = _num_classes(made, input_shape)
    return classification(function, input_shape, optimizer, num_classes=num_classes)


def optimizer_name(task: Task) -> str | None:
    """Name the optimizer that ``task_of`` chose; None if the task brought its own."""
    names = [name for name, fn in OPTIMIZERS.items() if fn is task.optimizer_fn]
    return names[0] if names else None


def torchvision_fn(
    name: str, input_shape: tuple[int, ...] | None = None
) -> Callable[[], nn.Module]:
    """Return the function that builds a torchvision classifier for ten classes.

    Transformers with a fixed image size are built for that of ``input_shape``.
    """
    known = models.list_models(module=models)
    if name not in known:
        close = difflib.get_close_matches(name, known) or ["resnet18", "vgg11_bn"]
        raise UnknownModel(
            f"torchvision has no classifier {name!r}; close: {', '.join(close)}."
        )
    arguments: dict[str, Any] = {"num_classes": NUM_CLASSES}
    if name.startswith(_PATCHED) and input_shape is not None:
        arguments["image_size"] = input_shape[-1]
    if name == "maxvit_t" and input_shape is not None:
        arguments["input_size"] = tuple(input_shape[-2:])
    # These two warn that their slow default initialisation will change.
    if name in ("googlenet", "inception_v3"):
        arguments["init_weights"] = False
    return partial(models.get_model, name, weights=None, **arguments)


def classification(
    model_fn: Callable[[], nn.Module],
    input_shape: tuple[int, ...],
    optimizer: str,
    *,
    num_classes: int,
) -> Task:
    """Make the task of a model whose outputs are ``(batch, classes)``."""
    return Task(
        model_fn=model_fn,
        loss_fn=mean_cross_entropy,
        optimizer_fn=OPTIMIZERS[optimizer],
        example_inputs=torch.zeros(1, *input_shape),
        example_targets=torch.arange(num_classes),
    )


def mean_cross_entropy(outputs: Any, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy; auxiliary outputs are weighted as in their papers.

    GoogLeNet (Szegedy et al., 2015, section 5) weighs its two with 0.3, Inception v3
    (Szegedy et al., 2016) in torchvision's reference its one with 0.3 as well.
    """
    if isinstance(outputs, tuple):
        main, *others = (out for out in outputs if out is not None)
        loss = functional.cross_entropy(main, targets)
        for other in others:
            loss = loss + 0.3 * functional.cross_entropy(other, targets)
        return loss
    return functional.cross_entropy(outputs, targets)


def _num_classes(model: nn.Module, input_shape: tuple[int, ...]) -> int:
    """Find by a dry run how many classes a module distinguishes."""
    mode = DryRun()
    module = fake_copy(model, mode)
    inputs = fake_batch(torch.zeros(1, *input_shape), mode, batch_size=2)
    try:
        with mode, torch.no_grad(), torch_log_silenced():
            outputs = module.train()(inputs)
    except Exception as error:
        raise UnknownModel(
            f"a dry run of {type(model).__name__} on inputs of shape {input_shape} "
            f"fails: {first_line(error)} Its forward must take them and not look at "
            "values."
        ) from error
    main = outputs[0] if isinstance(outputs, tuple) and outputs else outputs
    shape = tuple(main.shape) if isinstance(main, torch.Tensor) else None
    if shape is None or len(shape) != 2 or shape[1] < 2:  # noqa: PLR2004
        found = type(main).__name__ if shape is None else f"tensor of shape {shape}"
        raise UnknownModel(
            f"{type(model).__name__} is not a classifier: for 2 examples it returns a "
            f"{found}, not (2, classes). Let MODEL return a flwr_smartsplit.Task, "
            "with a loss of its own."
        )
    return shape[1]


def _call(path: str, function: Callable[[], Any]) -> Any:
    try:
        return function()
    except SmartSplitError:
        raise
    except Exception as error:
        raise UnknownModel(f"MODEL {path!r} fails: {first_line(error)}") from error


def _imported(path: str) -> Callable[[], Any]:
    """Import ``package.module:function``, also from the current folder."""
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise UnknownModel(
            f"MODEL {path!r} is neither torchvision:NAME nor package.module:function."
        )
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        function: Any = getattr(import_module(module_name), name)
    except Exception as error:  # The user's module may raise anything.
        raise UnknownModel(
            f"MODEL {path!r} cannot be imported: {first_line(error)}"
        ) from error
    if not callable(function):
        raise UnknownModel(
            f"MODEL {path!r} is of type {type(function).__name__}: name a function "
            "that builds the model."
        )
    return function  # type: ignore[no-any-return]


def first_line(error: Exception) -> str:
    """Give an error's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}." if lines else repr(error)
