"""Refuse models whose forward does something that a trace would silently lose.

torch.fx runs ``forward`` once and keeps its operations on the inputs. Other Python code
runs only then: drawing numbers, counting, entering contexts.
"""

import random
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from flwr_smartsplit.errors import NotSplittable
from flwr_smartsplit.split.python_state import PythonState, chance_state
from flwr_smartsplit.split.trace.op_recorder import Recorder

ResultT = TypeVar("ResultT")
_ADVICE = "Change that, or list its units by hand with Task(units_fn=...)."
_TRIES = 5


def trace_strictly(model: nn.Module, trace: Callable[[], ResultT]) -> ResultT:
    """Trace a model; raise ``NotSplittable`` if that changed or drew anything."""
    hooks = (model._forward_hooks, model._forward_pre_hooks)
    if "forward" in vars(model) or any(hooks):
        raise _refused(model, "its forward is changed by a hook or on the instance")
    before, chance = PythonState.of(model), chance_state()
    recorder = Recorder()
    with recorder, torch.enable_grad():
        traced = trace()
    # All threads share the generators: check that this one drew.
    is_random = chance != chance_state() and _draws(trace)
    if recorder.facts.is_random or is_random:
        raise _refused(model, "its forward draws random numbers outside of operators")
    changed = sorted(before.changes(PythonState.of(model)))
    if changed:
        names = ", ".join(name.lstrip(".") for name in changed[:3])
        raise _refused(model, f"its forward changes {names}")
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
            numbers = chance_state()[1:]
            run()
            changes.append(numbers != chance_state()[1:])
    finally:
        sys.setprofile(before)
    return bool(drawn) or all(changes)
