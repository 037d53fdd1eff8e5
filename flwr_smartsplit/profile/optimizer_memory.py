"""What an optimizer keeps for parameters, and what its step allocates."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flwr_smartsplit.memory.meter import MemoryMeter
from flwr_smartsplit.split.fake_tensors import DryRun, fake_like
from flwr_smartsplit.task import Task
from flwr_smartsplit.train.segment_runner import optimizer_of

_Signature = tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...]


class OptimizerCosts:
    """Dry runs of a task's optimizer, one per signature of parameters."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._known: dict[_Signature, tuple[int, int]] = {}

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

    def _step(self, parameters: Sequence[Tensor]) -> tuple[int, int]:
        """Return the bytes of the state, and those that a second step adds."""
        signature = tuple((tuple(p.shape), p.stride(), p.dtype) for p in parameters)
        if signature not in self._known:
            self._known[signature] = self._dry_run(parameters)
        return self._known[signature]

    def _dry_run(self, parameters: Sequence[Tensor]) -> tuple[int, int]:
        if not parameters:
            return 0, 0
        mode, meter = DryRun(), MemoryMeter()
        fakes = [fake_like(parameter, mode) for parameter in parameters]
        with mode:
            for fake in fakes:
                fake.grad = torch.empty_like(fake)
            optimizer = self._built(fakes)
            if optimizer is None:
                return 0, 0
            optimizer.step()
            meter.track(optimizer)
            state_bytes = meter.live_bytes
            meter.track(fakes, [fake.grad for fake in fakes])
            before = meter.live_bytes
            with meter:
                optimizer.step()
        return state_bytes, meter.peak_bytes - before

    def _built(self, parameters: Sequence[Tensor]) -> Optimizer | None:
        return optimizer_of(self._task, list(nn.ParameterList(parameters)))
