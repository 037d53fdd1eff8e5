"""What an optimizer keeps for parameters, and what its step allocates."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flwr_smartsplit.errors import InvalidTask
from flwr_smartsplit.memory.meter import MemoryMeter
from flwr_smartsplit.split.fake_tensors import DryRun, StandIns, fake_like
from flwr_smartsplit.task import Task
from flwr_smartsplit.train.segment_runner import optimizer_of

_Signature = tuple[
    tuple[tuple[int, ...], tuple[int, ...], torch.dtype, int | None], ...
]


class OptimizerCosts:
    """Dry runs of a task's optimizer, one per signature of parameters.

    ``is_at_once`` lets it update all of them at once (``foreach``) wherever torch would
    on CUDA.
    """

    def __init__(
        self,
        task: Task,
        sparse: Mapping[int, int] | None = None,
        *,
        is_at_once: bool = False,
    ) -> None:
        self._task = task
        self._is_at_once = is_at_once
        self._sparse = sparse or {}  # Values of sparse gradients, by the parameter's id
        self._known: dict[_Signature, tuple[int, int, int]] = {}

    def state_bytes(self, parameters: Sequence[Tensor]) -> int:
        """Size of what the optimizer keeps from step to step."""
        return sum(self._step([parameter])[0] for parameter in parameters)

    def initial_state_bytes(self, parameters: Sequence[Tensor]) -> int:
        """Size of the state that the optimizer makes before any gradient."""
        if not parameters:
            return 0
        mode, meter = DryRun(), MemoryMeter()
        fakes = [fake_like(parameter, mode) for parameter in parameters]
        with mode:
            optimizer = self._built(fakes)  # Its state lives as long as it does.
            meter.track(optimizer)
            return meter.live_bytes

    def temporary_bytes(self, parameters: Sequence[Tensor]) -> int:
        """Most that a step allocates and frees if it updates parameters one by one.

        The last temporary of one parameter may still live while the next is updated.
        """
        own = [self._step([parameter])[1] for parameter in parameters]
        most = max(own, default=0)
        for (first, second), (one, other) in zip(
            pairwise(parameters), pairwise(own), strict=True
        ):
            if one + other > most:
                most = max(most, self._step([first, second])[1])
        return most

    def temporary_bytes_at_once(self, parameters: Sequence[Tensor]) -> int:
        """Most that a step of all parameters allocates and frees."""
        return self._step(parameters)[1]

    def constant_bytes(self, parameters: Sequence[Tensor]) -> int:
        """Size of what the optimizer holds whatever it trains, as a tensor ``lr``."""
        return self._step(parameters)[2]

    def _step(self, parameters: Sequence[Tensor]) -> tuple[int, int, int]:
        """Return the bytes of the state, those that a second step adds, and others."""
        signature = tuple(
            (tuple(p.shape), p.stride(), p.dtype, self._sparse.get(id(p)))
            for p in parameters
        )
        if signature not in self._known:
            self._known[signature] = self._dry_run(parameters)
        return self._known[signature]

    def _dry_run(self, parameters: Sequence[Tensor]) -> tuple[int, int, int]:
        if not parameters:
            return 0, 0, 0
        mode, meter = DryRun(), MemoryMeter()
        fakes = [fake_like(parameter, mode) for parameter in parameters]
        stand_ins = StandIns(mode)
        with mode, stand_ins:
            for fake, parameter in zip(fakes, parameters, strict=True):
                count = self._sparse.get(id(parameter))
                fake.grad = _gradient(fake, num_values=count)
            optimizer = self._built(fakes)
            if optimizer is None:  # Nobody frees the gradients of what it leaves.
                return sum(fake.nbytes for fake in fakes), 0, 0
            optimizer.step()
            meter.track(optimizer)
            state_bytes = meter.live_bytes
            meter.track(fakes, [fake.grad for fake in fakes])
            before = meter.live_bytes
        with mode, meter, stand_ins:
            optimizer.step()  # What it holds besides a state shows here.
            constant_bytes = meter.live_bytes - before
            meter.peak_bytes = meter.live_bytes
            optimizer.step()
        if _state_bytes(optimizer) > state_bytes and self._sparse:
            raise InvalidTask(
                f"{type(optimizer).__name__} keeps a sparse state, to which torch "
                "appends in every step, so no prediction of its memory would hold. Use "
                "an optimizer without a state for sparse gradients, such as SGD "
                "without momentum, or sparse=False."
            )
        return state_bytes, meter.peak_bytes - before - constant_bytes, constant_bytes

    def _built(self, parameters: Sequence[Tensor]) -> Optimizer | None:
        optimizer = optimizer_of(self._task, list(nn.ParameterList(parameters)))
        if self._is_at_once and optimizer is not None:
            for group in optimizer.param_groups:
                is_open = "foreach" in group and group["foreach"] is None
                if is_open and not isinstance(group.get("lr"), Tensor):
                    group["foreach"] = True
        return optimizer


def _gradient(parameter: Tensor, *, num_values: int | None) -> Tensor:
    """Make a gradient, with so many rows if it is sparse."""
    if num_values is None:
        return torch.empty_like(parameter)
    return torch.sparse_coo_tensor(
        torch.empty((1, num_values), dtype=torch.int64),
        torch.empty((num_values, *parameter.shape[1:]), dtype=parameter.dtype),
        parameter.shape,
        check_invariants=False,
    )


def _state_bytes(optimizer: Optimizer) -> int:
    meter = MemoryMeter()
    meter.track(optimizer)
    return meter.live_bytes
