"""Build only the part of a model that runs at one place.

A template without values of parameters is traced once; only this place's segments then
get real tensors. Buffers stay real in the template, because some models compute them
from data: building wholly on meta fails for 15 of 80 torchvision classifiers, this way
for none.
"""

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from flwr_smartsplit.errors import InvalidTask
from flwr_smartsplit.memory.meter import BUILDING, phase, unmetered
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.split.fake_tensors import warnings_ignored
from flwr_smartsplit.split.layout import is_dense
from flwr_smartsplit.split.segment import Segment, Unit
from flwr_smartsplit.split.template import building, template_of
from flwr_smartsplit.task import Task

State = Mapping[str, npt.NDArray[Any]]

_CONTAINERS = (OrderedDict, dict, set)
_UNCHANGING = (bool, int, float, str, type(None))
_WHEN_FILLED = 1
"""Torch's count of changes of a tensor that was made and filled."""

_Marked = tuple[str, Chain]
_Recipe = tuple[Callable[..., nn.Module], Any, bytes]
_chains_by_task: "WeakKeyDictionary[Task, _Marked]" = WeakKeyDictionary()
_chains_by_recipe: dict[_Recipe | None, _Marked] = {}


@warnings_ignored()
def build_chain(task: Task, *, anew: bool = False) -> Chain:
    """Read the task's model as a chain without allocating its parameters.

    Traced once per process: Flower and Ray give every message its own copy of a task,
    so copies of one recipe share a chain, if ``model_fn`` still builds the same. With
    ``anew``, that is checked for this very task, too. Raises ``NotSplittable`` if
    torch.fx cannot trace the model, and ``InvalidTask`` if it cannot be built in parts
    or refuses the example inputs.
    """
    with building, unmetered():  # The process keeps it, not the step.
        known = _chains_by_task.get(task)
        if known is None or anew:
            recipe = _recipe(task)
            known = known or _chains_by_recipe.get(recipe)
            model, mark = template_of(task, known[0] if known else "")
            if known is None or known[0] != mark:
                known = mark, _traced(task, model)
            _chains_by_task[task] = known
            if recipe is not None:
                _chains_by_recipe[recipe] = known
        return known[1]


def _traced(task: Task, model: nn.Module) -> Chain:
    inputs = task.example_inputs
    if task.units_fn is not None:
        chain = Chain.from_units(model, task.units_fn(model), inputs)
    else:
        most = task.max_boundary_tensors
        chain = Chain.from_module(model, inputs, max_boundary_tensors=most)
    return chain if task.defence is None else chain.defended(task.defence)


def _recipe(task: Task) -> _Recipe | None:
    """Describe what the chain depends on, if ``model_fn`` can be pickled.

    The function object counts: a notebook may define its name again.
    """
    inputs = tree_map(
        lambda x: (tuple(x.shape), x.stride(), str(x.dtype)), task.example_inputs
    )
    function, units = _unwrapped(task.model_fn), _unwrapped(task.units_fn)
    try:
        hash((function, units))
        how = task.max_boundary_tensors, task.defence
        parts = (task.model_fn, task.units_fn, inputs, how)
        return function, units, pickle.dumps(parts)
    except (pickle.PicklingError, AttributeError, TypeError):
        return None


def _unwrapped(function: Any) -> Any:
    while isinstance(function, partial):
        function = function.func
    return function


def materialise(
    chain: Chain,
    start: int,
    stop: int,
    state: State,
    *,
    beside: Iterable[nn.Module] = (),
) -> Segment:
    """Give units ``[start, stop)`` real tensors, filled from ``state`` by name.

    The tensors get the model's strides. Frozen ones are those of segments ``beside``
    it at its place, if they have them. Raises ``InvalidTask`` if a value is
    missing or has another shape.
    """
    with unmetered():  # Only a template.
        template = chain.segment(start, stop)
        wanted = template.state_dict(keep_vars=True)
    problems = [
        f"{name}: {'missing' if name not in state else state[name].shape} "
        f"instead of {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name not in state or state[name].shape != tuple(tensor.shape)
    ]
    if problems:
        raise InvalidTask(
            f"the state does not fit units [{start}, {stop}): {'; '.join(problems)}. "
            "Use the state of a model built by the same task."
        )
    made: dict[int, Any] = {}  # One tensor under two names stays one.
    with phase(BUILDING):
        for segment in beside:
            made |= _frozen_in(chain, segment)
        for name, tensor in wanted.items():
            if id(tensor) not in made:
                made[id(tensor)] = _filled_like(tensor, state[name])
    with unmetered():
        for tensor in wanted.values():
            vars(made[id(tensor)]).update(copy.deepcopy(vars(tensor), made))
        return copy.deepcopy(template, made | _simple_ones(template))


def _simple_ones(template: nn.Module) -> dict[int, Any]:
    """Copy what is simple in a module, by identity: empty hooks, what never changes.

    ``copy.deepcopy`` does the same in thrice the time.
    """
    copies: dict[int, Any] = {}
    for module in template.modules():
        for value in vars(module).values():
            if type(value) in _CONTAINERS and not value:
                copies[id(value)] = type(value)()
            elif type(value) is tuple and all(map(_is_unchanging, value)):
                copies[id(value)] = value
    return copies


def _is_unchanging(value: Any) -> bool:
    if type(value) is tuple:
        return all(map(_is_unchanging, value))
    if type(value) is Unit:  # Whoever lists them may give methods, of what changes.
        ways = value.forward, value.eval_forward, value.selective_forward
        return all(type(each) in (FunctionType, type(None)) for each in ways)
    return type(value) in _UNCHANGING


def _frozen_in(chain: Chain, segment: nn.Module) -> dict[int, Tensor]:
    """Find the frozen parameters of a segment, by the ids of the template's."""
    known = chain.model.named_parameters(remove_duplicate=False)
    names = {name: id(parameter) for name, parameter in known}
    found = segment.named_parameters(remove_duplicate=False)
    return {names[n]: p for n, p in found if not p.requires_grad and n in names}


def _filled_like(template: Tensor, values: npt.NDArray[Any]) -> Tensor:
    """Make a real tensor with the template's strides, dtype and role."""
    shape = tuple(template.shape)
    if is_dense(shape, template.stride()):
        filled = torch.empty_strided(shape, template.stride(), dtype=template.dtype)
    else:
        filled = torch.empty(shape, dtype=template.dtype)
    with unmetered():  # The message is not part of the step.
        source = torch.from_numpy(np.require(values, requirements=["C", "W"]))
        with torch.no_grad():
            filled.copy_(source)
    if isinstance(template, nn.Parameter):
        return nn.Parameter(filled, requires_grad=template.requires_grad)
    return filled


def check_unsent(segment: nn.Module, sent: Collection[str]) -> None:
    """Raise ``InvalidTask`` if training has changed state that is not sent back."""
    state = segment.state_dict(keep_vars=True)
    names = [n for n in state.keys() - set(sent) if state[n]._version > _WHEN_FILLED]
    if names:
        raise InvalidTask(
            f"training changes {', '.join(sorted(names))}, and a dry run of one step "
            "did not, so that it would not be sent back: let forward write it in every "
            "step, or register it with persistent=False."
        )


def state_of(module: nn.Module) -> dict[str, npt.NDArray[Any]]:
    """Copy a module's state into contiguous arrays, by name."""
    return {
        name: np.array(tensor.detach().cpu().numpy(), order="C")
        for name, tensor in module.state_dict().items()
    }


def state_views(module: nn.Module) -> dict[str, npt.NDArray[Any]]:
    """Show a module's state as contiguous arrays, sharing memory where possible."""
    return {
        name: np.asarray(tensor.detach().cpu().numpy(), order="C")
        for name, tensor in module.state_dict().items()
    }
