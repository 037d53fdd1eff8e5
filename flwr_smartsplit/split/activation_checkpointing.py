"""Run units twice instead of keeping what they make, with the same numbers.

Torch's checkpointing drops what a part of a graph saves and runs that part again when
backward asks for it. What is ours: a running statistic is not updated twice, random
units draw their own stream again, and parts may be nested as a plan says.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils.checkpoint import checkpoint

from flwr_smartsplit.types import Rerun

RunUnit = Callable[[int, Any], Any]
"""``run(index, value)`` runs one unit."""

Observer = Callable[[int, Any], Any]
"""``observe(index, value)`` is told the value of each unit that has run, and returns
what to go on with."""


def observe_nothing(index: int, value: Any) -> Any:
    """Look away."""
    del index
    return value


@dataclass(frozen=True, slots=True)
class UnitRunner:
    """How units are run.

    Parameters
    ----------
    run : Callable[[int, value], value]
        Runs one unit.
    root : nn.Module
        The module that they are part of.
    observe : Callable[[int, value], value]
        Is told the value of each unit.
    preserves_chance : bool
        Whether torch's generator has to be put back to draw the same numbers again;
        not if each unit draws from a stream of its own.
    """

    run: RunUnit
    root: nn.Module
    observe: Observer = observe_nothing
    preserves_chance: bool = False


def run_units(
    value: Any, units: range, reruns: Sequence[Rerun], runner: UnitRunner
) -> Any:
    """Run units in order; those of ``reruns`` keep nothing and run again in backward.

    Parameters
    ----------
    value : Tensor, tuple[Tensor, ...] or dict[str, Tensor]
        What the first unit takes.
    units : range
        Which to run.
    reruns : Sequence[Rerun]
        Parts of them, in order.
    runner : UnitRunner
        How they are run.
    """
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
    """Run a function and keep nothing but its inputs; run it again for backward.

    Parameters
    ----------
    function : Callable
        Of the values.
    *values : Any
        Its inputs; tensors are kept.
    root : nn.Module
        Whose running statistics must not be updated twice.
    preserves_chance : bool
        Whether torch's generator has to be put back to draw the same numbers again.
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
    """Let no BatchNorm of a module update its running statistics.

    A momentum of 0 keeps them to the bit, and saves as many tensors as before, which
    torch's checkpointing makes sure of. Instance norms take a mean over the batch even
    so; theirs are copied.
    """
    norms: list[Any] = [each for each in root.modules() if has_statistics(each)]
    before = [(norm.momentum, dict(norm._buffers)) for norm in norms]
    try:
        for norm in norms:
            norm.momentum, norm._buffers["num_batches_tracked"] = 0.0, None
            if isinstance(norm, _InstanceNorm):
                for name in ("running_mean", "running_var"):
                    norm._buffers[name] = getattr(norm, name).clone()
        yield
    finally:
        for norm, (momentum, buffers) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm._buffers.update(buffers)


def has_statistics(module: nn.Module) -> bool:
    """Say whether a module keeps statistics that a rerun leaves alone."""
    return isinstance(module, _NormBase) and module.track_running_stats
