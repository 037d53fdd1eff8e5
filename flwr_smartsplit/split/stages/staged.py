"""staged: a model in one step of a progressive training.

Its first units are frozen, and small units stand for some of the later ones. It has all
names of the model, and those of the proxies. Values may be on meta.

References
----------
.. [1] Wu et al., "ProFL: Breaking the Memory Wall for Heterogeneous Federated Learning
   via Progressive Training", KDD 2025, arXiv:2404.13349.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from flwr_smartsplit.errors import InvalidTask
from flwr_smartsplit.split.manual_units import values_of
from flwr_smartsplit.split.segment import Batch, Segment, Unit, run_unit
from flwr_smartsplit.split.stages.proxies import (
    PROXIES,
    first_values,
    name_of,
    proxy_for,
)
from flwr_smartsplit.split.submodules import odd_modes
from flwr_smartsplit.types import Variant


class Staged(nn.Module):
    """A model that runs the units of one step, in order.

    It has the modules of ``model`` under their names, and keeps those that
    ``fixed`` names in evaluation mode.
    """

    def __init__(
        self, model: nn.Module, units: Sequence[Unit], fixed: Iterable[str]
    ) -> None:
        super().__init__()
        odd = odd_modes(model)
        vars(self).update(vars(model))
        self.step_units = tuple(units)
        self.__odd_modes = {
            True: odd[True] | frozenset(fixed),
            False: odd[False] - frozenset(fixed),
        }

    def train(self, mode: bool = True) -> Self:
        """Switch modes as the model does; what is fixed stays in evaluation mode."""
        super().train(mode)
        for name in self.__odd_modes[mode]:
            self.get_submodule(name).training = not mode
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the units, in order; shapes are the model's."""
        value: Any = kwargs or args
        for unit in self.step_units:
            value = run_unit(unit.forward_in(self.training), self, value)
        return value


def staged(
    model: nn.Module, units: Sequence[Unit], example_inputs: Batch, variant: Variant
) -> Staged:
    """Copy a model for a step: freeze units, and put proxies where it has some.

    Raises
    ------
    InvalidTask
        If the model has no such units, none is left to train or behind the proxies, a
        module draws random numbers in a frozen and in a trained unit, or no proxy fits.
    """
    _check(model, units, variant)
    model = copy.deepcopy(model)
    values = values_of(model, units, example_inputs) if variant.proxies else []
    proxies = nn.Module()
    own: list[Unit] = []
    at = 0
    for start, stop in variant.proxies:
        name = name_of((start, stop))
        shapes = _shape(values, start - 1, example_inputs), _shape(values, stop - 1)
        proxies.add_module(
            name.rpartition(".")[2], proxy_for(*shapes, units[start:stop])
        )
        own += units[at:start]
        own.append(Unit(name, partial(_run, name), (name,)))
        at = stop
    own += units[at:]
    own[: variant.frozen] = map(_forward_only, own[: variant.frozen])
    if variant.proxies:
        model.add_module(PROXIES, _like(model, proxies))
    front, behind = own[: variant.frozen], own[variant.frozen :]
    fixed = _freeze(model, front, behind)
    return Staged(model, own, fixed)


def _check(model: nn.Module, units: Sequence[Unit], variant: Variant) -> None:
    kind, size = type(model).__name__, len(units)
    last = max([variant.frozen, *(stop for _, stop in variant.proxies)])
    problem = ""
    if any(unit.is_defence for unit in units):
        problem = "a defence counts the whole model's units"
    elif last >= size:
        problem = f"it has {size} units, and at least one stays behind unit {last}"
    elif hasattr(model, PROXIES):
        problem = f"it has a part named {PROXIES!r}, which is the proxies' name"
    if problem:
        raise InvalidTask(
            f"variant {variant.name!r} is no step of {kind}: {problem}. Choose other "
            "blocks, or leave out the rule."
        )


def _run(name: str, root: nn.Module, value: Tensor) -> Any:
    return root.get_submodule(name)(value)


def _like(model: nn.Module, proxies: nn.Module) -> nn.Module:
    """Give proxies values, if the model's parameters have some."""
    if all(parameter.is_meta for parameter in model.parameters()):
        return proxies
    kinds = {
        f"{PROXIES}.{name}": (tuple(each.shape), str(each.dtype).removeprefix("torch."))
        for name, each in proxies.state_dict().items()
    }
    values = first_values(kinds, 0).items()
    proxies = proxies.to_empty(device="cpu")
    proxies.load_state_dict(
        {name.removeprefix(f"{PROXIES}."): torch.from_numpy(a) for name, a in values}
    )
    return proxies


def _forward_only(unit: Unit) -> Unit:
    """Return a unit that does in training what it does in evaluation."""
    run = unit.forward_in(False)
    return replace(unit, forward=run, eval_forward=None, selective_forward=None)


def _freeze(
    model: nn.Module, front: Sequence[Unit], behind: Sequence[Unit]
) -> set[str]:
    """Freeze all parameters but those of the later units; name the front's modules."""
    sides = [_read(model, each) for each in (front, behind)]
    trained = {id(p) for p in Segment(behind, 0, model).parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in trained)
    both = sides[0].keys() & sides[1].keys()
    for unit in front:
        shared = both & _read(model, [unit]).keys()
        if shared and (unit.is_random or unit.writes):
            raise InvalidTask(
                f"{sides[0][min(shared)]} of {type(model).__name__} is used by unit "
                f"{unit.name!r}, which is frozen, and by trained ones: it cannot be in "
                "two modes. Give each its own module, or choose other blocks."
            )
    return {name for key, name in sides[0].items() if key not in both}


def _read(model: nn.Module, units: Sequence[Unit]) -> dict[int, str]:
    """Name the modules that units read, by identity."""
    found: dict[int, str] = {}
    for name in {name for unit in units for name in unit.reads}:
        path, _, last = name.rpartition(".")
        thing = getattr(model.get_submodule(path), last)
        if isinstance(thing, nn.Module):
            for inner, module in thing.named_modules():
                found[id(module)] = f"{name}.{inner}".rstrip(".")
    return found


def _shape(values: Sequence[Any], index: int, inputs: Batch = ()) -> Any:
    """Return the shapes of the tensors that leave a unit, or enter the first."""
    value = inputs if index < 0 else values[index]
    tensors = value if isinstance(value, tuple) else (value,)
    return tuple(tuple(t.shape) if isinstance(t, Tensor) else () for t in tensors)
