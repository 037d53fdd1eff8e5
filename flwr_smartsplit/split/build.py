"""Build the part of a model that belongs at one place, and nothing else.

Parameters are created on the meta device, which has no memory; only the segments
of this place are then given real tensors. Buffers stay real while building,
because some models compute them from data: building wholly on meta fails for 15 of
80 torchvision classifiers, this way for none.
"""

import pickle
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakIdKeyDictionary

from flwr_smartsplit.errors import InvalidTask
from flwr_smartsplit.memory.meter import BUILDING, phase, unmetered
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.split.fake_tensors import warnings_ignored
from flwr_smartsplit.split.layout import is_dense
from flwr_smartsplit.split.segment import Segment
from flwr_smartsplit.task import Task

State = Mapping[str, npt.NDArray[Any]]

_building = threading.RLock()
_chains_by_task: "WeakKeyDictionary[Task, Chain]" = WeakKeyDictionary()
_Recipe = tuple[Callable[..., nn.Module], Any, bytes]
_chains_by_recipe: dict[_Recipe, Chain] = {}


def _on_meta(param: nn.Parameter, twins: Any) -> nn.Parameter:
    if param.is_meta:
        return param
    if param not in twins:
        twins[param] = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
    twin: nn.Parameter = twins[param]
    return twin


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Send every parameter that is registered in this thread to the meta device."""
    register = nn.Module.register_parameter
    thread = threading.get_ident()
    twins = WeakIdKeyDictionary()  # One parameter under two names stays one.

    def register_on_meta(
        module: nn.Module, name: str, param: nn.Parameter | None
    ) -> None:
        if param is not None and threading.get_ident() == thread:
            param = _on_meta(param, twins)
        register(module, name, param)

    with _building:
        nn.Module.register_parameter = register_on_meta  # type: ignore
        try:
            yield
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]


@warnings_ignored()
def build_chain(task: Task) -> Chain:
    """Read the task's model as a chain without allocating its parameters.

    A chain is traced once per process: Flower and Ray hand every message its own
    copy of a task, so the copies of one recipe share a chain.

    Parameters
    ----------
    task : Task
        Whose model to read.

    Raises
    ------
    NotSplittable
        If torch.fx cannot trace the model.
    InvalidTask
        If the model cannot be built, or does not accept the example inputs.
    """
    with _building:
        chain = _chains_by_task.get(task)
        if chain is None:
            recipe = _recipe(task)
            chain = _chains_by_recipe.get(recipe) if recipe else None
            if chain is None:
                model = _built(task)
                if task.units_fn is None:
                    chain = Chain.from_module(
                        model,
                        task.example_inputs,
                        max_boundary_tensors=task.max_boundary_tensors,
                    )
                else:
                    units = task.units_fn(model)
                    chain = Chain.from_units(model, units, task.example_inputs)
            _chains_by_task[task] = chain
            if recipe:
                _chains_by_recipe[recipe] = chain
        return chain


def _built(task: Task) -> nn.Module:
    """Build a task's model with its parameters on meta.

    Raises
    ------
    InvalidTask
        If that fails, for instance since it computes with its parameters.
    """
    try:
        with parameters_on_meta():
            model = task.model_fn()
    except Exception as error:
        raise InvalidTask(
            f"model_fn fails: {type(error).__name__}: {str(error).rstrip('.')}. (If it "
            "works elsewhere: here parameters have no values while a model is built; "
            "let model_fn compute nothing from them.)"
        ) from error
    saved = model.state_dict().keys()
    lost = [n for n, b in model.named_buffers() if b.is_meta and n not in saved]
    if lost:
        raise InvalidTask(
            f"{', '.join(lost)}: these buffers are computed from parameters, which "
            "have no values while a model is built here, and they are not part of its "
            "state. Register them with persistent=True, or compute them in forward."
        )
    narrow = [n for n, t in model.state_dict().items() if t.dtype is torch.bfloat16]
    if narrow:
        raise InvalidTask(
            f"{', '.join(narrow[:3])} ({len(narrow)} in all) are bfloat16, which NumPy "
            "does not have; Flower sends NumPy arrays. Use float32 or float16."
        )
    return model


def _recipe(task: Task) -> _Recipe | None:
    """Describe what the chain depends on, if ``model_fn`` is importable.

    The function itself is part of it: in a notebook, its name may be used again.
    """
    inputs = tree_map(
        lambda x: (tuple(x.shape), x.stride(), str(x.dtype)), task.example_inputs
    )
    function: Callable[..., nn.Module] = task.model_fn
    units: Any = task.units_fn
    while isinstance(function, partial):
        function = function.func
    while isinstance(units, partial):
        units = units.func
    try:
        hash((function, units))
        parts = (task.model_fn, task.units_fn, inputs, task.max_boundary_tensors)
        return function, units, pickle.dumps(parts)
    except (pickle.PicklingError, AttributeError, TypeError):
        return None


def materialise(chain: Chain, start: int, stop: int, state: State) -> Segment:
    """Give units ``[start, stop)`` real tensors, filled from ``state``.

    Parameters
    ----------
    chain : Chain
        A chain whose parameters may be on meta.
    start, stop : int
        The units to build.
    state : Mapping[str, ndarray]
        Values by the model's names; names of other units are left alone.

    Returns
    -------
    Segment
        A segment of its own, with the strides that the model gives its tensors.

    Raises
    ------
    InvalidTask
        If a value is missing or has another shape.
    """
    with unmetered():  # The template's buffers are nobody's.
        segment = chain.own_segment(start, stop)
        wanted = segment.state_dict()
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
    with phase(BUILDING):
        _fill(segment, state)
    return segment


def _fill(segment: Segment, state: State) -> None:
    """Give a segment real tensors; one tensor under two names stays one."""
    twins: dict[int, Tensor] = {}
    for prefix, module in segment.named_modules():
        dot = f"{prefix}." if prefix else ""
        persistent = module._buffers.keys() - module._non_persistent_buffers_set
        for tensors, names in (
            (module._parameters, module._parameters.keys()),
            (module._buffers, persistent),
        ):
            for name in names:
                old = tensors[name]
                if old is not None:
                    if id(old) not in twins:
                        twins[id(old)] = _filled_like(old, state[dot + name])
                    tensors[name] = twins[id(old)]


def _filled_like(template: Tensor, values: npt.NDArray[Any]) -> Tensor:
    """Make a real tensor with the template's strides, dtype and role."""
    shape = tuple(template.shape)
    if is_dense(shape, template.stride()):
        filled = torch.empty_strided(shape, template.stride(), dtype=template.dtype)
    else:
        filled = torch.empty(shape, dtype=template.dtype)
    with unmetered():  # The message's memory is not the step's.
        source = torch.from_numpy(np.require(values, requirements=["C", "W"]))
        with torch.no_grad():
            filled.copy_(source)
    if isinstance(template, nn.Parameter):
        return nn.Parameter(filled, requires_grad=template.requires_grad)
    return filled


def state_of(module: nn.Module) -> dict[str, npt.NDArray[Any]]:
    """Copy a module's state into contiguous arrays, by name."""
    return {
        name: np.array(tensor.detach().cpu().numpy(), order="C")
        for name, tensor in module.state_dict().items()
    }


def state_views(module: nn.Module) -> dict[str, npt.NDArray[Any]]:
    """Show a module's state as contiguous arrays, by name, copied only if they are not.

    They change with the module.
    """
    return {
        name: np.asarray(tensor.detach().cpu().numpy(), order="C")
        for name, tensor in module.state_dict().items()
    }
