"""Build only the part of a model that runs at one place.

Parameters are created on the meta device, which has no memory; only this place's
segments then get real tensors. Buffers stay real while building, because some models
compute them from data: building wholly on meta fails for 15 of 80 torchvision
classifiers, this way for none.
"""

import pickle
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
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


def _on_meta(param: nn.Parameter, made: Any) -> nn.Parameter:
    if param.is_meta:
        return param
    if param not in made:
        made[param] = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
    on_meta: nn.Parameter = made[param]
    return on_meta


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Move every parameter registered in this thread to the meta device."""
    register = nn.Module.register_parameter
    thread = threading.get_ident()
    made = WeakIdKeyDictionary()  # One parameter under two names stays one.

    def register_on_meta(
        module: nn.Module, name: str, param: nn.Parameter | None
    ) -> None:
        if param is not None and threading.get_ident() == thread:
            param = _on_meta(param, made)
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

    Traced once per process: Flower and Ray give every message its own copy of a task,
    so copies of one recipe share a chain. Raises ``NotSplittable`` if torch.fx cannot
    trace the model, and ``InvalidTask`` if it cannot be built or refuses the example
    inputs.
    """
    with _building:
        if task in _chains_by_task:
            return _chains_by_task[task]
        recipe = _recipe(task)
        chain = _chains_by_recipe.get(recipe) if recipe else None
        if chain is None:
            model, inputs = _built(task), task.example_inputs
            if task.units_fn is None:
                chain = Chain.from_module(
                    model, inputs, max_boundary_tensors=task.max_boundary_tensors
                )
            else:
                chain = Chain.from_units(model, task.units_fn(model), inputs)
        _chains_by_task[task] = chain
        if recipe:
            _chains_by_recipe[recipe] = chain
        return chain


def _built(task: Task) -> nn.Module:
    """Build a task's model with its parameters on meta, or raise ``InvalidTask``."""
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
    """Describe what the chain depends on, if ``model_fn`` can be pickled.

    The function object counts: a notebook may define its name again.
    """
    inputs = tree_map(
        lambda x: (tuple(x.shape), x.stride(), str(x.dtype)), task.example_inputs
    )
    function, units = _unwrapped(task.model_fn), _unwrapped(task.units_fn)
    try:
        hash((function, units))
        parts = (task.model_fn, task.units_fn, inputs, task.max_boundary_tensors)
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
    beside: Iterable[Segment] = (),
) -> Segment:
    """Give units ``[start, stop)`` real tensors, filled from ``state`` by name.

    The tensors get the model's strides; frozen ones that a segment ``beside`` this one
    has are its own. Raises ``InvalidTask`` if a value is missing or
    has another shape.
    """
    with unmetered():  # Only a template.
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
        _fill(segment, state, _frozen_in(chain, beside, segment))
    return segment


def _frozen_in(
    chain: Chain, segments: Iterable[Segment], template: Segment
) -> dict[int, Tensor]:
    """Find the frozen parameters of segments that a template has, by its own ids."""
    names = {n: id(p) for n, p in chain.model.named_parameters(remove_duplicate=False)}
    made = {
        names[name]: parameter
        for segment in segments
        for name, parameter in segment.named_parameters(remove_duplicate=False)
        if not parameter.requires_grad
    }
    mine = template.named_parameters(remove_duplicate=False) if made else ()
    return {id(p): made[names[name]] for name, p in mine if names[name] in made}


def _fill(segment: Segment, state: State, made: dict[int, Tensor]) -> None:
    """Give a segment real tensors; one tensor under two names stays one."""
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
                    if id(old) not in made:
                        made[id(old)] = _filled_like(old, state[dot + name])
                    tensors[name] = made[id(old)]


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
