"""OwnData: examples that the server has, and the whole model trained on them.

The server trains as a client does whose route is whole: the same steps, from random
streams of its own that are derived from the run's seed, on one thread of the CPU. So a
round has the same bits wherever and however often it is done.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, Subset
from torch.utils.data.sampler import SequentialSampler

from flwr_smartsplit.device.local_training import (
    Conditions,
    Loader,
    evaluate_locally,
    train_locally,
)
from flwr_smartsplit.edge.protocol import State
from flwr_smartsplit.errors import InvalidTask, SmartSplitError
from flwr_smartsplit.memory.cap import CapMode
from flwr_smartsplit.plan.divergence import pooled
from flwr_smartsplit.server.aggregation import RoundStart
from flwr_smartsplit.train.micro_batches import num_examples
from flwr_smartsplit.train.rng import UnitStreams, derived_seed
from flwr_smartsplit.types import WHOLE, ClientPlan, Route, StepReport
from flwr_smartsplit.types.sizes import whole

OptimizerFn = Callable[..., torch.optim.Optimizer]

ACCURACY = "accuracy"
"""The metric of ``Task.metrics_fn`` that counts."""

_SERVER = "<server>"
"""What names the server's random streams; see ``UnitStreams``."""


class OwnData:
    """The server's examples, and after ``begin`` the model that is trained on them.

    A class with slots: what is in it is no setting, and is not compared when a run is
    resumed. ``holdout`` is the share of the examples that is measured and not trained.
    """

    __slots__ = (
        *("_conditions", "_held_out", "_loader", "_measure", "_seed", "_variant"),
    )

    def __init__(self, loader: Loader, *, holdout: float = 0.0) -> None:
        self._loader, self._held_out = loader, loader
        sampler = getattr(loader, "sampler", None)
        for owner in (loader, sampler, getattr(loader, "batch_sampler", None)):
            if getattr(owner, "generator", None) is not None:
                raise ValueError(
                    "the server's loader has a generator of its own, which goes on "
                    "from pass to pass: a resumed run would draw other numbers. Leave "
                    "out generator=; each pass has a seed of its own anyway."
                )
        if not 0 <= holdout < 1:
            raise ValueError(
                f"holdout is {holdout}: give a share from 0 to below 1, such as 0.1."
            )
        if holdout > 0:
            self._loader, self._held_out = divided(loader, holdout)
        self._conditions: Conditions | None = None
        self._measure: Conditions | None = None
        self._seed = 0
        self._variant = WHOLE

    def counted(self) -> tuple[int, tuple[int, ...] | None]:
        """Count the examples of one pass, and of each class if targets say it.

        Raises
        ------
        ValueError
            If there are none.
        """
        total, counts, has_classes = 0, pooled(()), True
        for inputs, targets in self.batches():
            total += num_examples(inputs, targets)
            found = _label_counts(targets)
            has_classes = has_classes and found is not None
            counts = pooled([counts, found or ()])
        if not total:
            raise ValueError("the server's loader yields nothing: give it examples.")
        return total, counts if has_classes else None

    def batches(self) -> Iterator[tuple[Any, Any]]:
        """Yield one pass over the examples, the same one each time."""
        yield from UnitStreams(0, 0, _SERVER).batches(self._loader, 0)

    def begin(
        self, start: RoundStart, *, epochs: int, optimizer_fn: OptimizerFn | None
    ) -> bool:
        """Take the task and the seed of a run; say whether the run is new here.

        It is in its first round, and where it is resumed with an object that has not
        been in a run.

        Raises
        ------
        InvalidTask
            If the task keeps state on the devices.
        """
        is_new, task = start.round_number == 1 or not self.has_begun, start.task
        if task.is_local is not None:
            raise InvalidTask(
                "the server cannot train the whole model: the task's is_local keeps "
                "some of its state on the devices, and the server has only its first "
                "values. Leave out is_local, or the server's training."
            )
        if optimizer_fn is not None:
            task = replace(task, optimizer_fn=optimizer_fn)
        self._seed, self._variant = start.seed, start.variant
        self._conditions = Conditions(
            task=task,
            connect=_no_edge,
            cap_mode=CapMode.OFF,
            local_epochs=epochs,
            noise_seed=derived_seed(start.seed, _SERVER, "noise"),
        )
        judged = partial(_judged, metrics_fn=task.metrics_fn)
        task = replace(task, metrics_fn=judged)
        self._measure = replace(self._conditions, task=task)
        return is_new

    @property
    def has_begun(self) -> bool:
        """Whether a run has told its task."""
        return self._conditions is not None

    def check(self, state: State) -> None:
        """Measure a state on all examples; raise ``InvalidTask`` if that fails."""
        for loader in {id(x): x for x in (self._loader, self._held_out)}.values():
            try:
                report = self._measured(state, 0, {}, loader)
            except SmartSplitError:
                raise
            except Exception as error:  # Whatever a model or a loss can raise.
                raise InvalidTask(
                    "the server's examples do not fit the task: "
                    f"{type(error).__name__}: {error}. Give the server's loader "
                    "inputs and targets as the clients' loaders yield them."
                ) from error
            accuracy = report.metrics[ACCURACY]
            if not 0 <= accuracy <= 1:
                raise InvalidTask(
                    f"Task.metrics_fn says {ACCURACY}={accuracy:g} of the server's "
                    "examples: let it return a share from 0 to 1."
                )

    def measured(
        self, state: State, round_number: int, config: Mapping[str, Any]
    ) -> StepReport:
        """Evaluate a state: its loss, and its ``accuracy`` among the metrics."""
        return self._measured(state, round_number, config, self._held_out)

    def _measured(
        self, state: State, number: int, config: Mapping[str, Any], loader: Loader
    ) -> StepReport:
        assert self._measure is not None
        plan = self._plan(number, config)
        return evaluate_locally(plan, state, loader, self._measure)

    def trained(
        self, state: State, round_number: int, config: Mapping[str, Any]
    ) -> State:
        """Return what training changes of a state."""
        assert self._conditions is not None
        plan = self._plan(round_number, config)
        return train_locally(plan, state, self._loader, self._conditions).state

    def _plan(self, round_number: int, config: Mapping[str, Any]) -> ClientPlan:
        return ClientPlan(
            client_key=_SERVER,
            round_number=round_number,
            route=Route.whole(),
            seed=self._seed,
            variant=self._variant,
            edge_addresses={},
            config=config,
        )


def between(state: State, other: State, weight: float) -> dict[str, Any]:
    """Go a share of the way from a state to another, which may lack names.

    Computed in float64 and rounded once; whole numbers stay.
    """
    mixed = dict(state)
    for name, far in other.items():
        near = state[name]
        if near.dtype.kind in "fc":
            wide = np.complex128 if near.dtype.kind == "c" else np.float64
            start = near.astype(wide)
            moved = (start + weight * (far - start)).astype(near.dtype)
            mixed[name] = np.where(far == near, near, moved)  # Also a negative zero
    return mixed


def divided(loader: Any, holdout: float) -> tuple[Loader, Loader]:
    """Divide a loader's examples: for training, and a share for measuring.

    The same ones are held out in every process.
    """
    samplers = RandomSampler | SequentialSampler
    source: Any = getattr(loader, "dataset", None)
    if (
        not isinstance(loader, DataLoader)
        or isinstance(source, IterableDataset)
        or not isinstance(loader.sampler, samplers)
        or loader.batch_size is None
    ):
        raise ValueError(
            f"holdout={holdout} divides the examples of a DataLoader with a dataset "
            "that has a length, a batch size, and shuffle=True or False; this loader "
            f"is a {type(loader).__name__} of another kind. Give such a one, or "
            "holdout=0."
        )
    num = len(source)
    num_held = max(round(num * holdout), 1)
    chance = torch.Generator().manual_seed(derived_seed(_SERVER, "holdout", num))
    order = torch.randperm(num, generator=chance).tolist()
    if num_held >= num:
        raise ValueError(
            f"holdout={holdout} of {num} examples leaves none to train: give more "
            "examples, or a smaller share."
        )
    is_shuffled = isinstance(loader.sampler, RandomSampler)

    def part(indices: list[int], *, is_trained: bool) -> Loader:
        return DataLoader(
            Subset(source, sorted(indices)),
            batch_size=loader.batch_size,
            shuffle=is_shuffled and is_trained,
            drop_last=loader.drop_last and is_trained,
            collate_fn=loader.collate_fn,
        )

    held, rest = order[:num_held], order[num_held:]
    return part(rest, is_trained=True), part(held, is_trained=False)


def epochs_of(value: Any) -> int:
    """Read how many passes the server does."""
    epochs = whole(value, "epochs")
    if epochs < 1:
        raise ValueError(f"epochs is {epochs}: the server does at least 1 pass.")
    return epochs


def _no_edge(place: str, address: str) -> NoReturn:
    raise InvalidTask(f"the server trains whole models, without the edge {place!r}.")


def _label_counts(targets: Any) -> tuple[int, ...] | None:
    """Count the examples of each class; None if targets are not class numbers."""
    if not isinstance(targets, Tensor) or targets.dim() != 1 or not targets.numel():
        return None
    if targets.is_floating_point() or targets.is_complex() or targets.min() < 0:
        return None
    return tuple(torch.bincount(targets.long()).tolist())


def _judged(
    outputs: Any,
    targets: Any,
    *,
    metrics_fn: Callable[[Any, Any], Mapping[str, float]] | None,
) -> Mapping[str, float]:
    """Return a batch's accuracy: the task's own, or that of the largest score."""
    found = {} if metrics_fn is None else metrics_fn(outputs, targets)
    if ACCURACY in found:
        return {ACCURACY: found[ACCURACY]}
    if not (
        isinstance(outputs, Tensor)
        and isinstance(targets, Tensor)
        and outputs.dim() == targets.dim() + 1
        and outputs.shape[0] == targets.shape[0]
        and outputs.shape[2:] == targets.shape[1:]
    ):
        raise InvalidTask(
            "ServerData weighs by accuracy, and the model's outputs are not the scores "
            "(batch, classes, ...) of class numbers (batch, ...): let Task.metrics_fn "
            f"return {ACCURACY!r}, from 0 to 1."
        )
    return {ACCURACY: float((outputs.argmax(dim=1) == targets).float().mean())}
