"""Refuse models whose forward does something that a trace would silently lose.

torch.fx runs ``forward`` once and keeps its operations on the inputs. Other Python code
runs only then: drawing numbers, counting, entering contexts.
"""

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from flwr_smartsplit.errors import NotSplittable
from flwr_smartsplit.split.trace.op_recorder import Recorder

ResultT = TypeVar("ResultT")
_ADVICE = "Change that, or list its units by hand with Task(units_fn=...)."
_TRIES = 5
_PLAIN = (bool, int, float, str, bytes, tuple, type(None))


def trace_strictly(model: nn.Module, trace: Callable[[], ResultT]) -> ResultT:
    """Trace a model; raise ``NotSplittable`` if that changed or drew anything."""
    hooks = (model._forward_hooks, model._forward_pre_hooks)
    if "forward" in vars(model) or any(hooks):
        raise _refused(model, "its forward is changed by a hook or on the instance")
    before, chance = _settings(model), _chance()
    recorder = Recorder()
    with recorder, torch.enable_grad():
        traced = trace()
    # All threads share the generators: check that this one drew.
    is_random = chance != _chance() and _draws(trace)
    if recorder.facts.is_random or is_random:
        raise _refused(model, "its forward draws random numbers outside of operators")
    after = _settings(model)
    changed = sorted(name for name in before if before[name] != after.get(name))
    if changed:
        raise _refused(model, f"its forward changes {', '.join(changed)}")
    return traced


def refuse_switches(name: str) -> None:
    """Raise ``NotSplittable`` for an operation inside a context that a trace loses.

    That is without gradients, under autocast, or under activation checkpointing.
    """
    switches = {
        "without gradients (torch.no_grad)": not torch.is_grad_enabled(),
        "under autocast": torch.is_autocast_enabled("cpu"),
        "under activation checkpointing or other hooks on saved tensors": (
            torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
        ),
    }
    for words, is_on in switches.items():
        if is_on:
            raise NotSplittable(
                f"forward runs {name} {words}, which torch.fx would lose. {_ADVICE}"
            )


def _refused(model: nn.Module, reason: str) -> NotSplittable:
    return NotSplittable(
        f"torch.fx cannot trace {type(model).__name__}: {reason}. {_ADVICE}"
    )


def _settings(model: nn.Module) -> dict[str, Any]:
    """Copy the plain attributes of every module."""
    return {
        f"{prefix}.{name}".lstrip("."): value
        for prefix, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, _PLAIN)
    }


def _draws(run: Callable[[], object]) -> bool:
    """Say whether a function draws from Python's or NumPy's generators in this thread.

    A profiler sees this thread's calls of Python's. For NumPy's there is none, so a
    function draws if their state changes at every try.
    """
    shared = random.random.__self__  # type: ignore[attr-defined]
    drawn = []
    changes = []

    def look(frame: object, event: str, called: Any) -> None:
        del frame
        if event == "c_call" and getattr(called, "__self__", None) is shared:
            drawn.append(called)

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        for _ in range(_TRIES):
            numbers = _numpys_chance()
            run()
            changes.append(numbers != _numpys_chance())
    finally:
        sys.setprofile(before)
    return bool(drawn) or all(changes)


def _chance() -> tuple[Any, ...]:
    """Read the state of Python's and of NumPy's generator."""
    return random.getstate(), *_numpys_chance()


def _numpys_chance() -> tuple[Any, ...]:
    numbers: Any = np.random.get_state()  # noqa: NPY002 - a forward may use it
    return numbers[1].tobytes(), numbers[2]


@contextmanager
def chance_restored() -> Iterator[None]:
    """Restore torch's, Python's and NumPy's generators afterwards."""
    numbers = np.random.get_state()  # noqa: NPY002 - a model may use it
    before = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(before)
        np.random.set_state(numbers)  # noqa: NPY002
