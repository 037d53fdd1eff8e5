"""Chain: a model as ordered, named units that run in any contiguous part."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from flwr_smartsplit.defence import Defence
from flwr_smartsplit.errors import InvalidRoute, InvalidTask, NotSplittable
from flwr_smartsplit.split.manual_units import declared_units, with_defence
from flwr_smartsplit.split.narrow.channels import Channels, find_channels
from flwr_smartsplit.split.narrow.narrowing import narrowed_module
from flwr_smartsplit.split.segment import Batch, Segment, Unit
from flwr_smartsplit.split.stages.proxies import run_of
from flwr_smartsplit.split.stages.staged import Staged, staged
from flwr_smartsplit.split.submodules import odd_modes
from flwr_smartsplit.split.trace.tracing import trace_units
from flwr_smartsplit.types import (
    WHOLE,
    Regions,
    Variant,
    groups_under,
    inside,
    kept_problem,
    regions_of,
)

MAX_VARIANTS = 32
"""Of which a chain remembers what follows from them."""

ArrayT = TypeVar("ArrayT")
_Kind = tuple[tuple[int, ...], str]


class Chain:
    """An ``nn.Module`` as a chain of units.

    Parameters
    ----------
    model : nn.Module
        The model the units belong to.
    units : Sequence[Unit]
        Its units, in order.
    example_inputs : Tensor, tuple[Tensor, ...] or dict[str, Tensor]
        One batch of inputs; only shapes and dtypes matter.
    refusals : dict[str, str]
        For each place that looks like a cut and must not be one, the reason and the
        nearest place that can be cut.
    is_declared : bool
        Whether the units were listed by hand.

    Examples
    --------
    >>> import torch
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> chain = Chain.from_module(model, torch.zeros(1, 4))
    >>> chain.unit_names
    ('0', '1', '2')
    >>> list(chain.segment(1, 3).state_dict())
    ['2.weight', '2.bias']
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[Unit],
        example_inputs: Batch,
        *,
        refusals: dict[str, str],
        is_declared: bool = False,
    ) -> None:
        self.model = model
        self.units = tuple(units)
        self.example_inputs = example_inputs
        self.refusals = refusals
        self.is_declared = is_declared
        self._odd_modes = odd_modes(model)
        self._state_names: dict[tuple[int, int], tuple[str, ...]] = {}
        self._changed_names: dict[tuple[int, int], tuple[str, ...]] = {}
        self._narrower: dict[Variant, Chain] = {}
        self._regions: dict[tuple[Variant, Variant], Regions] = {}

    @classmethod
    def from_module(
        cls, model: nn.Module, example_inputs: Batch, *, max_boundary_tensors: int = 1
    ) -> Self:
        """Read a model as a chain; its parameters may be on meta.

        Parameters
        ----------
        model : nn.Module
            Any module that torch.fx can trace.
        example_inputs : Tensor, tuple[Tensor, ...] or dict[str, Tensor]
            One batch, ``(batch, *input shape)`` each, as the model's ``forward`` takes
            it (a dict by keyword); only shapes and dtypes matter.
        max_boundary_tensors : int
            The most tensors that may cross a cut: 1 cuts where the model is narrow,
            more cut inside blocks with skip connections, too.

        Raises
        ------
        NotSplittable
            If torch.fx cannot trace the model, or a module uses a name twice.
        """
        units, refusals = trace_units(
            model, example_inputs, max_boundary_tensors=max_boundary_tensors
        )
        return cls(model, units, example_inputs, refusals=refusals)

    @classmethod
    def from_units(
        cls, model: nn.Module, units: Sequence[Unit], example_inputs: Batch
    ) -> Self:
        """Make a chain of units listed by hand, where tracing does not work.

        Units between which the model must not be cut become one.

        Parameters
        ----------
        model : nn.Module
            The model of the units; its parameters may be on meta.
        units : Sequence[Unit]
            What to run, in order. A unit must read each parameter that is trained.
        example_inputs : Tensor, tuple[Tensor, ...] or dict[str, Tensor]
            One batch, as the first unit takes it; only shapes and dtypes matter.

        Raises
        ------
        NotSplittable
            If the units are not a chain of this model; names every problem.

        Examples
        --------
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
        >>> units = [
        ...     Unit("first", lambda root, x: getattr(root, "0")(x).relu(), ("0",)),
        ...     Unit("last", lambda root, x: getattr(root, "1")(x), ("1",)),
        ... ]
        >>> Chain.from_units(model, units, torch.zeros(1, 4)).unit_names
        ('first', 'last')
        """
        checked, refusals = declared_units(model, units, example_inputs)
        return cls(model, checked, example_inputs, refusals=refusals, is_declared=True)

    @cached_property
    def channels(self) -> Channels:
        """The groups of channels that may be left out of this model.

        Raises
        ------
        NotSplittable
            If its units were listed by hand, or torch.fx cannot trace it.
        """
        if self.is_declared:
            raise NotSplittable(
                f"the units of {type(self.model).__name__} were listed by hand, so it "
                "is not known which channels they share: only a model that torch.fx "
                "traces can be narrowed. Leave out Task(units_fn=...), or variants."
            )
        return find_channels(self.model, self.example_inputs)

    def under(self, variant: Variant) -> "Chain":
        """Return the chain as a variant has it: the same units, of a model of its own.

        Variants of one size share it: their models differ in values only.

        Raises
        ------
        InvalidTask
            If the variant is not one of this model.
        NotSplittable
            If this model cannot be narrowed, or computes otherwise with fewer channels.
        """
        if variant == WHOLE:
            return self
        if not (variant.kept or variant.is_step):
            raise InvalidTask(
                f"variant {variant.name!r} is not known here: it leaves nothing out, "
                f"and is not {WHOLE.name!r}. Use one version everywhere."
            )
        alike = variant.leading()
        known = self._narrower.get(alike)
        if known is None:
            small = self.narrowed(self.model, alike)
            if isinstance(small, Staged):
                known = Chain.from_units(small, small.step_units, self.example_inputs)
            else:
                self.channels.require_same_steps(small, self.example_inputs)
                known = self._with(small, self.units)
            self._narrower = _remembered(self._narrower, alike, known)
        return known

    def narrowed(self, model: nn.Module, variant: Variant) -> nn.Module:
        """Make the module of a variant from one of this chain's, with its values.

        Raises
        ------
        InvalidTask, NotSplittable
            As ``under`` does.
        """
        if variant == WHOLE:
            return model
        if variant.is_step:
            return staged(model, self.units, self.example_inputs, variant)
        return narrowed_module(model, self.channels.groups, variant)

    def regions(self, variant: Variant, *, of: Variant = WHOLE) -> Regions:
        """Find which values of a state a variant's state has, by name.

        The state is the whole model's, or ``of`` a variant that keeps more.

        Raises
        ------
        InvalidTask, NotSplittable
            As ``under`` does.
        """
        if variant == of or variant.is_step:
            return {}
        found = self._regions.get((of, variant))
        if found is None:
            problem = self.problem_of(variant)
            if problem:
                raise InvalidTask(f"variant {variant.name!r}: {problem}.")
            groups = self.channels.groups
            try:
                part = inside(of, variant)
            except ValueError as error:
                raise InvalidTask(f"{error} Use one task everywhere.") from error
            found = regions_of(groups_under(groups, of), part)
            self._regions = _remembered(self._regions, (of, variant), found)
        return found

    def problem_of(self, variant: Variant) -> str:
        """Say what this model lacks of what a variant keeps; ``""`` if nothing."""
        is_known = (WHOLE, variant) in self._regions
        return "" if is_known else kept_problem(variant, self.channels.groups)

    @cached_property
    def num_defended(self) -> int:
        """How many units a task's defence keeps on the device, with itself."""
        return max((i + 1 for i, u in enumerate(self.units) if u.is_defence), default=0)

    def defended(self, defence: Defence) -> "Chain":
        """Add a defence as a unit; raise ``InvalidTask`` if it cannot stand there."""
        units = with_defence(self.model, self.units, defence, self.example_inputs)
        return self._with(self.model, units)

    def _with(self, model: nn.Module, units: Sequence[Unit]) -> "Chain":
        """Make the same chain of another model, or with other units."""
        return Chain(
            model,
            units,
            self.example_inputs,
            refusals=self.refusals,
            is_declared=self.is_declared,
        )

    def given(self, example_inputs: Batch) -> "Chain":
        """Return this chain with other example inputs; it shares model and units."""
        chain = copy.copy(self)
        chain.example_inputs, chain._narrower = example_inputs, {}
        return chain

    @property
    def unit_names(self) -> tuple[str, ...]:
        """The units' names, in order; each is used once."""
        return tuple(unit.name for unit in self.units)

    def __len__(self) -> int:
        """Count the units."""
        return len(self.units)

    def segment(
        self, start: int, stop: int, *, source: nn.Module | None = None
    ) -> Segment:
        """Take units ``[start, stop)``, sharing the model's own modules.

        Its ``state_dict`` uses the model's names, whatever the cut.

        Parameters
        ----------
        start, stop : int
            The units.
        source : nn.Module, optional
            Where to take the modules from, instead of the model.

        Raises
        ------
        InvalidRoute
            If the range is empty or outside the chain.
        """
        if not 0 <= start < stop <= len(self):
            raise InvalidRoute(
                f"units [{start}, {stop}) are not a part of a chain of {len(self)} "
                f"units: choose 0 <= start < stop <= {len(self)}."
            )
        root = self.model if source is None else source
        entering = self.units[start - 1].gradients if start else ()
        units = self.units[start:stop]
        return Segment(units, start, root, self._odd_modes, entering=entering)

    def is_constant(self, start: int, stop: int) -> bool:
        """Say whether units ``[start, stop)`` stay as they are in evaluation.

        Not if a module of the model trains then, too, as an odd BatchNorm does, or if
        they keep more than tensors, which evaluation may change as training does.
        """
        keeps = any(unit.changed for unit in self.units[start:stop])
        return not keeps and not self._odd_modes.get(False)

    def own_segment(self, start: int, stop: int) -> Segment:
        """Copy units ``[start, stop)`` with modules of their own."""
        return copy.deepcopy(self.segment(start, stop))

    def state_names(self, start: int, stop: int) -> tuple[str, ...]:
        """Name the state of units ``[start, stop)`` in the model's order.

        State that no unit uses belongs to no segment: training cannot change it.
        """
        if (start, stop) not in self._state_names:  # Every client of a round asks.
            names = set(self.segment(start, stop).state_dict())
            self._state_names[start, stop] = tuple(
                name for name in self.model.state_dict() if name in names
            )
        return self._state_names[start, stop]

    def changed_names(self, start: int, stop: int) -> tuple[str, ...]:
        """Name the state of units ``[start, stop)`` that training can change.

        Parameters that are not frozen, and what forward writes, such as BatchNorm's
        statistics.
        """
        if (start, stop) in self._changed_names:  # Every client of a round asks.
            return self._changed_names[start, stop]
        changed: set[str] = set()
        for index in range(start, stop):
            unit = self.segment(index, index + 1)
            parameters = unit.named_parameters(remove_duplicate=False)
            changed |= {name for name, p in parameters if p.requires_grad}
            changed |= set(self.units[index].writes)
        names = tuple(n for n in self.state_names(start, stop) if n in changed)
        self._changed_names[start, stop] = names
        return names

    @cached_property
    def unit_parameters(self) -> Mapping[str, tuple[str, ...]]:
        """For each unit, in order, the parameters that are trained there."""
        own = self.parameter_names
        return {
            name: tuple(n for n in self.changed_names(i, i + 1) if n in own)
            for i, name in enumerate(self.unit_names)
        }

    @cached_property
    def first_names(self) -> Mapping[str, str]:
        """For each name of the state, the one under which its tensor is trained.

        They differ where a module or a parameter has several names.
        """
        read = set(self.state_names(0, len(self)))
        groups: dict[int, list[str]] = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            groups.setdefault(id(tensor), []).append(name)
        return {
            name: next((other for other in names if other in read), names[0])
            for names in groups.values()
            for name in names
        }

    @cached_property
    def parameter_names(self) -> frozenset[str]:
        """Name all parameters as they are trained; the rest of a state is buffers."""
        first = self.first_names
        return frozenset(first[name] for name, _ in self.model.named_parameters())

    def with_aliases(self, state: Mapping[str, ArrayT]) -> dict[str, ArrayT]:
        """Give all names of one tensor in a state the value that was trained."""
        first = self.first_names
        return {n: state.get(first.get(n, n), array) for n, array in state.items()}

    @cached_property
    def kinds(self) -> Mapping[str, _Kind]:
        """The shape of each name of the state, and its dtype as NumPy calls it."""
        return {n: _kind_of(t) for n, t in self.model.state_dict().items()}

    def kinds_of(self, names: Iterable[str]) -> Mapping[str, _Kind]:
        """Return the kinds of the model's state and of those of its proxies named."""
        found = dict(self.kinds)
        for name in names:
            run = run_of(name)
            if name in found or run is None or run[1] >= len(self):
                continue
            with suppress(InvalidTask, ValueError):
                kinds = self.under(Variant("proxy", proxies=(run,))).kinds
                found |= {name: kinds[name]} if name in kinds else {}
        return found

    def check_state(self, kinds: Mapping[str, _Kind]) -> None:
        """Check that a state fits this model, by names, shapes and NumPy's dtypes.

        Raises
        ------
        InvalidTask
            Naming every difference.
        """
        wanted = self.kinds
        problems = [
            f"{name}: {_difference(kinds.get(name), wanted.get(name))}"
            for name in sorted(wanted.keys() | kinds.keys())
            if kinds.get(name) != wanted.get(name)
        ]
        if problems:
            raise InvalidTask(
                f"the state is not one of {type(self.model).__name__}: "
                f"{'; '.join(problems)}. Use ArrayRecord(model_fn().state_dict())."
            )

    def check_aliases(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Check that all names of one tensor have one value in a state.

        Raises
        ------
        InvalidTask
            Naming every difference.
        """
        unequal = [
            f"{name} and {first}"
            for name, first in self.first_names.items()
            if name != first and not _are_equal(state[name], state[first])
        ]
        if unequal:
            raise InvalidTask(
                f"{'; '.join(unequal)}: two names of one tensor of "
                f"{type(self.model).__name__}, with different values. Use "
                "ArrayRecord(model_fn().state_dict())."
            )

    def require_cuts(self) -> None:
        """Raise if the model cannot be cut anywhere, with the reasons.

        Raises
        ------
        NotSplittable
            If the chain has a single unit.
        """
        if len(self) > 1:
            return
        reasons = "; ".join(f"{name}: {why}" for name, why in self.refusals.items())
        raise NotSplittable(
            f"{type(self.model).__name__} cannot be cut anywhere: "
            f"{reasons or 'it is a single operation'}. Where that helps, let several "
            "tensors cross a cut: Task(max_boundary_tensors=...)."
        )


def _remembered(known: dict[Any, Any], key: Any, value: Any) -> dict[Any, Any]:
    """Add to what is known; the oldest is forgotten where it is too much."""
    newest = list(known.items())[-MAX_VARIANTS + 1 :]
    return {**dict(newest), key: value}


def _kind_of(tensor: Tensor) -> _Kind:
    """Return a tensor's shape, and its dtype as NumPy calls it."""
    shape = tuple(tensor.shape)
    return shape, str(tensor.new_empty(0, device="cpu").numpy().dtype)


def _difference(found: _Kind | None, wanted: _Kind | None) -> str:
    """Say how a shape or, if that is right, a dtype differs."""
    if found and wanted and found[0] == wanted[0]:
        return f"{found[1]} instead of {wanted[1]}"
    shape = found[0] if found else "missing"
    return f"{shape} instead of {wanted[0] if wanted else 'nothing'}"


def _are_equal(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> bool:
    return np.array_equal(one, other, equal_nan=one.dtype.kind in "fc")
