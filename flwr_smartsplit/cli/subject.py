"""The model that a command line names: read as a chain, and profiled.

Both commands begin with it, so that both explain the same mistakes the same way.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils._pytree import tree_leaves

from flwr_smartsplit.cli.specs import (
    UnknownModel,
    first_line,
    optimizer_name,
    task_of,
)
from flwr_smartsplit.errors import InvalidTask, NotSplittable, SmartSplitError
from flwr_smartsplit.profile.profile import profile_chain
from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.split.segment import Unit
from flwr_smartsplit.task import Task
from flwr_smartsplit.types import ChainProfile

WHOLE = "whole model"


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model, what it costs, and where it must not be cut.

    Parameters
    ----------
    model : str
        MODEL as it was given.
    optimizer : str or None
        The optimizer that was asked for; None if the task brought its own.
    task : Task
        What trains it.
    profile : ChainProfile
        What each of its units costs.
    refusals : dict[str, str]
        The places that must not be cut, with the reasons.
    no_cut_reason : str or None
        Why it cannot be cut anywhere, if so.
    """

    model: str
    optimizer: str | None
    task: Task
    profile: ChainProfile
    refusals: dict[str, str]
    no_cut_reason: str | None

    @property
    def input_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of one example's inputs, without the batch."""
        return [tuple(x.shape[1:]) for x in tree_leaves(self.task.example_inputs)]

    def heading(self) -> str:
        """Say what was profiled, and how."""
        shapes = ", ".join("×".join(map(str, shape)) for shape in self.input_shapes)
        optimizer = self.optimizer or "its own optimizer"
        return (
            f"{self.model}, input {shapes}, batch size {self.profile.batch_size}, "
            f"{optimizer}"
        )


def read_subject(
    model: str,
    *,
    input_shape: tuple[int, ...] | None,
    batch_size: int,
    optimizer: str | None,
    cache_dir: Path | None = None,
) -> Subject:
    """Read and profile the model that a command line names.

    A model that cannot be read as a chain becomes a single unit, with the reason.

    Parameters
    ----------
    model : str
        MODEL of the command line.
    input_shape : tuple[int, ...], optional
        Shape of one input; None if MODEL knows it.
    batch_size : int
        Examples per step.
    optimizer : str, optional
        Its name; None for plain SGD, or what MODEL brings along.
    cache_dir : Path, optional
        A folder that keeps profiles.

    Raises
    ------
    SmartSplitError
        If there is no such model, or it cannot do a step.
    """
    task = task_of(model, input_shape=input_shape, optimizer=optimizer or "sgd")
    name = optimizer_name(task)
    if name is None and (optimizer is not None or input_shape is not None):
        raise UnknownModel(
            f"{model} returns a Task, which has its own optimizer and inputs: leave "
            "--optimizer and --input out."
        )
    task, chain, reason = _read(model, task)
    return Subject(
        model=model,
        optimizer=name,
        task=task,
        profile=profile_chain(
            chain, batch_size=batch_size, task=task, cache_dir=cache_dir
        ),
        refusals=chain.refusals,
        no_cut_reason=reason,
    )


def _read(model: str, task: Task) -> tuple[Task, Chain, str | None]:
    """Read a task's model; if that fails, the task and chain of one unit."""
    try:
        chain = build_chain(task)
        chain.require_cuts()
    except NotSplittable as error:
        reason = " ".join(str(error).split())
        return *_uncut(task, error), reason
    except SmartSplitError:
        raise
    except Exception as error:
        raise UnknownModel(f"{model} cannot be read: {first_line(error)}") from error
    return task, chain, None


def _uncut(task: Task, error: NotSplittable) -> tuple[Task, Chain]:
    """Wrap a model in another whose only unit is the model."""
    try:
        return task, build_chain(task)
    except NotSplittable:
        whole = replace(
            task, model_fn=partial(_Wrapped, task.model_fn), units_fn=_one_unit
        )
    try:
        return whole, build_chain(whole)
    except InvalidTask:
        raise error from None


class _Wrapped(nn.Module):
    """A model as the child of another."""

    def __init__(self, model_fn: Any) -> None:
        super().__init__()
        self.model = model_fn()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        return self.model(*args, **kwargs)


def _one_unit(model: nn.Module) -> Sequence[Unit]:
    del model
    return [Unit(WHOLE, _call, ("model",))]


def _call(root: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return root.get_submodule("model")(*args, **kwargs)
