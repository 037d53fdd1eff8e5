"""The model named on the command line: read as a chain, and profiled."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from torch import nn
from torch.utils._pytree import tree_leaves

from flwr_smartsplit.cli.specs import UnknownModel, first_line, optimizer_name, task_of
from flwr_smartsplit.errors import InvalidTask, NotSplittable, SmartSplitError
from flwr_smartsplit.plan.coding import coded_profile
from flwr_smartsplit.profile.profile import profile_chain
from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.split.segment import Unit
from flwr_smartsplit.task import Task
from flwr_smartsplit.types import RAW, ChainProfile, Codec, Route

WHOLE = "whole model"


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model, what it costs, and where it must not be cut.

    ``optimizer`` is None if the task brought its own; ``refusals`` maps places that
    must not be cut to reasons; ``no_cut_reason`` is set if no place can be cut.
    """

    model: str
    optimizer: str | None
    task: Task
    profile: ChainProfile
    refusals: dict[str, str]
    no_cut_reason: str | None
    codec: Codec = RAW  # At each cut; the profile counts it

    @property
    def input_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of one example's inputs, without the batch."""
        return [tuple(x.shape[1:]) for x in tree_leaves(self.task.example_inputs)]

    def last_unit(self, route: Route) -> str:
        """Name the unit before a route's first cut; the last one of a whole model."""
        return self.profile.units[route.cuts[0] - 1 if route.cuts else -1].name

    def heading(self) -> str:
        """Say what was profiled, and how."""
        shapes = ", ".join("×".join(map(str, shape)) for shape in self.input_shapes)
        codec = "" if self.codec == RAW else f", {self.codec} at the cut"
        return (
            f"{self.model}, input {shapes}, batch size {self.profile.batch_size}, "
            f"{self.optimizer or 'its own optimizer'}{codec}"
        )

    def facts(self) -> dict[str, Any]:
        """Collect what the JSON of every command begins with."""
        try:
            ours = version("flwr-smartsplit")
        except PackageNotFoundError:
            ours = "not installed"
        return {
            "model": self.model,
            "input_shapes": self.input_shapes,
            "batch_size": self.profile.batch_size,
            "optimizer": self.optimizer,
            "versions": {"torch": str(torch.__version__), "flwr_smartsplit": ours},
            "no_cut_reason": self.no_cut_reason,
        }

    def page(self, table: Table, *lines: str | None) -> RenderableType:
        """Put a heading over a table, and lines of text below it; leave None out."""
        below = (f"\n{line}" for line in lines if line is not None)
        return Group(f"{self.heading()}\n", table, *below)


def empty_table(headers: Sequence[str], *, left: Sequence[str]) -> Table:
    """Make a table whose columns are aligned right, except those named in ``left``."""
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    for header in headers:
        justify: Any = "left" if header in left else "right"
        table.add_column(header, justify=justify, overflow="fold")
    return table


def read_subject(  # noqa: PLR0913 - what the command line says of it
    model: str,
    *,
    input_shape: tuple[int, ...] | None,
    batch_size: int,
    optimizer: str | None,
    cache_dir: Path | None = None,
    is_stock: bool = False,
    codec: Codec = RAW,
) -> Subject:
    """Read and profile the model named on the command line.

    A model that cannot be read as a chain becomes a single unit, with the reason. With
    ``is_stock``, a task is read without its defence, which no stock module has.
    """
    task = task_of(model, input_shape=input_shape, optimizer=optimizer or "sgd")
    task = replace(task, defence=None) if is_stock else task
    name = optimizer_name(task)
    if name is None and (optimizer is not None or input_shape is not None):
        raise UnknownModel(
            f"{model} returns a Task, which has its own optimizer and inputs: leave "
            "--optimizer and --input out."
        )
    task, chain, reason = _read(model, task)
    profile = profile_chain(
        chain, batch_size=batch_size, task=task, cache_dir=cache_dir
    )
    return Subject(
        model=model,
        optimizer=name,
        task=task,
        profile=coded_profile(profile, (codec,) * (len(chain) - 1)),
        refusals=chain.refusals,
        no_cut_reason=reason,
        codec=codec,
    )


def _read(model: str, task: Task) -> tuple[Task, Chain, str | None]:
    """Build the chain of a task; if it has no cut, the chain of one unit and why."""
    try:
        chain = build_chain(task)
        chain.require_cuts()
    except NotSplittable as error:
        return *_uncut(task, error), " ".join(str(error).split())
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
    """A model as the only child of another."""

    def __init__(self, model_fn: Any) -> None:
        super().__init__()
        self.model = model_fn()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


def _one_unit(_: nn.Module) -> Sequence[Unit]:
    return [Unit(WHOLE, _call, ("model",))]


def _call(root: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return root.get_submodule("model")(*args, **kwargs)
