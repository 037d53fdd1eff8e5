"""Segment: some units of a chain as a module with the model's own names."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn

from flwr_smartsplit.loss_terms import loss_divided_by, loss_divisor_now
from flwr_smartsplit.split.activation_checkpointing import (
    Observer,
    UnitRunner,
    observe_nothing,
    run_units,
)
from flwr_smartsplit.split.submodules import share
from flwr_smartsplit.types import KEEP_ALL, RecomputePlan

Streams = Callable[[int | str, int], AbstractContextManager[None]]
"""``streams(step, unit)`` opens the random stream that unit runs under."""

Boundary = tuple[Tensor, ...]
"""All tensors that cross a cut. ``Unit.gradients`` says which need a gradient."""

Batch = Tensor | tuple[Tensor, ...] | dict[str, Tensor]


def no_streams(step: int | str, unit: int) -> AbstractContextManager[None]:
    """Leave torch's generator as it is."""
    del step, unit
    return nullcontext()


@dataclass(frozen=True, slots=True)
class Unit:
    """The smallest piece of a model that is not cut.

    Parameters
    ----------
    name : str
        Its name in the chain: the model's own name of its last module or operation.
    forward : Callable
        ``forward(root, *values)``: ``root`` has the modules of ``reads`` under the
        model's own names; the values are the batch (by keyword if it is a mapping),
        or what the unit before returned: one tensor, or a tuple of several.
    reads : tuple[str, ...]
        Dotted names of the modules, parameters and constants it uses.
    eval_forward : Callable, optional
        What it does in evaluation mode, if that is other code.
    is_random : bool
        Whether it draws random numbers in training.
    selective_forward : Callable, optional
        What it does in training if its cheap operators run twice: the same values,
        gradients and buffers, with less kept for backward.
    gradients : tuple[bool, ...]
        For each tensor that it returns, whether a gradient comes back for it. A chain
        finds out; nothing comes back for the last unit, nor for frozen ones.
    writes : tuple[str, ...]
        Names of the model's state that it changes in training, as a BatchNorm does. A
        chain finds out.
    can_rerun : bool
        Whether a second run computes the same and changes nothing; a chain finds out.
    changed : tuple[str, ...]
        What it changes in training that is neither parameter nor buffer, such as a
        counter in a list. It cannot move to another place in a round.
    rereads : tuple[str, ...]
        Trained parameters of which it also reads the values without a gradient. They
        are not updated before the step ends.
    is_defence : bool
        Whether it is a ``Defence``, called in both modes with ``(root, value, batch)``
        under a stream of its own; a chain makes it.

    Examples
    --------
    >>> unit = Unit("embed", lambda root, tokens: root.table(tokens), ("table",))
    >>> unit.name
    'embed'
    """

    name: str
    forward: Callable[..., Any]
    reads: tuple[str, ...]
    eval_forward: Callable[..., Any] | None = None
    is_random: bool = False
    selective_forward: Callable[..., Any] | None = None
    gradients: tuple[bool, ...] = (True,)
    writes: tuple[str, ...] = ()
    can_rerun: bool = True
    changed: tuple[str, ...] = ()
    rereads: tuple[str, ...] = ()
    is_defence: bool = False

    def forward_in(
        self, training: bool, *, is_selective: bool = False
    ) -> Callable[..., Any]:
        """Return the function for one mode."""
        if not training:
            return self.eval_forward or self.forward
        return (self.selective_forward if is_selective else None) or self.forward


class Segment(nn.Module):
    """Units ``[start, stop)`` of a chain, as a module with the model's own names.

    It shares the modules and parameters of ``source``. ``odd_modes`` names, for
    ``train(mode)``, the modules that the model leaves in the other mode;
    ``entering_gradients`` and ``leaving_gradients`` say for each tensor that comes or
    goes whether it needs a gradient.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        start: int,
        source: nn.Module,
        odd_modes: Mapping[bool, frozenset[str]] | None = None,
        *,
        entering: tuple[bool, ...] = (),
    ) -> None:
        super().__init__()
        self.entering_gradients = entering
        self.leaving_gradients = units[-1].gradients
        self.rereads = frozenset(name for unit in units for name in unit.rereads)
        # Mangled names, so that none collides with the model's own children.
        self.__units = tuple(units)
        self.__start = start
        for target in sorted({name for unit in units for name in unit.reads}):
            share(source, self, target.split("."))
        mine = {name for name, _ in self.named_modules()}
        self.__odd_modes = {
            mode: names & mine for mode, names in (odd_modes or {}).items()
        }

    def train(self, mode: bool = True) -> Self:
        """Switch modes as the model does, which may keep some modules in the other."""
        super().train(mode)
        for name in self.__odd_modes.get(mode, ()):
            self.get_submodule(name).training = not mode
        return self

    def forward(
        self,
        inputs: Batch,
        *,
        streams: Streams = no_streams,
        step: int | str = 0,
        observe: Observer = observe_nothing,
        recompute: RecomputePlan = KEEP_ALL,
        loss_divisor: float = 1.0,
    ) -> Any:
        """Run the units in order, each random one under its own stream.

        ``inputs`` is the batch or the incoming boundary; ``step`` the number of the
        step, from 0, or the name of a micro-batch in it, whose loss is divided by
        ``loss_divisor``.
        """
        training, first = self.training, self.__start
        units = range(first, first + len(self.__units))
        plan = recompute.within(units.start, units.stop)

        def run(index: int, value: Any) -> Any:
            unit = self.__units[index - first]
            do = unit.forward_in(training, is_selective=index in plan.selective)
            draws = unit.is_defence or (training and unit.is_random)
            if not draws and loss_divisor == loss_divisor_now():
                # Contexts take longer than a small unit.
                return run_unit(do, self, value)
            stream = streams(step, index) if draws else nullcontext()
            with loss_divided_by(loss_divisor), stream:
                if unit.is_defence:
                    return do(self, value, inputs)
                return run_unit(do, self, value)

        reruns = plan.reruns if training else ()
        runner = UnitRunner(run, self, observe, preserves_chance=streams is no_streams)
        return run_units(inputs, units, reruns, runner)


def as_boundary(outputs: Any) -> Boundary:
    """Return a segment's outputs as a boundary."""
    return outputs if type(outputs) is tuple else (outputs,)


def run_unit(run: Callable[..., Any], root: nn.Module, value: Any) -> Any:
    """Call a unit with a batch or a boundary as its arguments."""
    if type(value) is dict:
        return run(root, **value)
    if type(value) is tuple:
        return run(root, *value)
    return run(root, value)
