"""Rerun units in backward instead of saving their activations, with the same numbers.

Torch's checkpointing drops what a part of a graph saves and reruns that part when
backward asks for it. Added here: a running statistic is not updated twice, random units
draw their own stream again, and parts may be nested.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils.checkpoint import checkpoint

from flwr_smartsplit.types import Rerun

RunUnit = Callable[[int, Any], Any]
"""``run(index, value)`` runs one unit."""

Observer = Callable[[int, Any], Any]
"""``observe(index, value)`` gets each unit's value, and returns the one to pass on."""


def observe_nothing(index: int, value: Any) -> Any:
    """Return the value as it is."""
    del index
    return value


@dataclass(frozen=True, slots=True)
class UnitRunner:
    """How units run: ``run(index, value)`` runs one, and ``observe`` sees its value.

    ``root`` is the module they are part of. ``preserves_chance`` restores torch's
    generator for a rerun; not needed if each unit draws from its own stream.
    """

    run: RunUnit
    root: nn.Module
    observe: Observer = observe_nothing
    preserves_chance: bool = False


def run_units(
    value: Any, units: range, reruns: Sequence[Rerun], runner: UnitRunner
) -> Any:
    """Run units in order; those of ``reruns`` save nothing and rerun in backward."""
    index = units.start
    for part in reruns:
        for unit in range(index, part.start):
            value = runner.observe(unit, runner.run(unit, value))
        value = _run_again(value, part, runner)
        index = part.stop
    for unit in range(index, units.stop):
        value = runner.observe(unit, runner.run(unit, value))
    return value


def _run_again(value: Any, part: Rerun, runner: UnitRunner) -> Any:
    is_tuple = type(value) is tuple

    def function(*values: Any) -> Any:
        inputs = values if is_tuple else values[0]
        return run_units(inputs, range(part.start, part.stop), part.inner, runner)

    return run_twice(
        function,
        *(value if is_tuple else (value,)),
        root=runner.root,
        preserves_chance=runner.preserves_chance,
    )


def run_twice(
    function: Callable[..., Any],
    *values: Any,
    root: nn.Module,
    preserves_chance: bool = False,
) -> Any:
    """Run a function, save only its inputs, and rerun it in backward.

    The running statistics of ``root`` are not updated twice.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), statistics_kept(root)

    return checkpoint(
        function,
        *values,
        use_reentrant=False,
        preserve_rng_state=preserves_chance,
        context_fn=contexts,
    )


@contextmanager
def statistics_kept(root: nn.Module) -> Iterator[None]:
    """Keep the running statistics of a module's norms unchanged.

    A momentum of 0 keeps BatchNorm's to the bit, and saves as many tensors as before,
    which torch's checkpointing checks. Instance norms average over the batch even so,
    so theirs are copied.
    """
    norms: list[Any] = [each for each in root.modules() if has_statistics(each)]
    before = [(norm.momentum, dict(norm._buffers)) for norm in norms]
    try:
        for norm in norms:
            counts = isinstance(norm, nn.SyncBatchNorm)  # It insists on it.
            count = torch.zeros((), dtype=torch.long) if counts else None
            norm.momentum, norm._buffers["num_batches_tracked"] = 0.0, count
            if isinstance(norm, _InstanceNorm):
                for name in ("running_mean", "running_var"):
                    norm._buffers[name] = getattr(norm, name).clone()
        yield
    finally:
        for norm, (momentum, buffers) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm._buffers.update(buffers)


def has_statistics(module: nn.Module) -> bool:
    """Say whether a module keeps running statistics, which a rerun leaves alone."""
    return isinstance(module, _NormBase) and module.track_running_stats
