"""Refuse models whose forward does something that a trace would silently lose.

torch.fx runs ``forward`` once and keeps its operations on the inputs. Other Python code
runs only then: drawing numbers, counting, entering contexts.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from flwr_smartsplit.errors import NotSplittable
from flwr_smartsplit.split.python_state import (
    CONSTANT,
    PythonState,
    attribute_of,
    chance_state,
    draws,
    restore,
)
from flwr_smartsplit.split.trace.op_recorder import Recorder

ResultT = TypeVar("ResultT")
_ADVICE = "Change that, or list its units by hand with Task(units_fn=...)."


def trace_strictly(
    model: nn.Module, trace: Callable[[], ResultT]
) -> tuple[ResultT, frozenset[str]]:
    """Trace a model, and name the attributes that its forward assigns.

    They are restored. Raises ``NotSplittable`` if forward assigns a buffer or draws
    random numbers.
    """
    hooks = (model._forward_hooks, model._forward_pre_hooks)
    if "forward" in vars(model) or any(hooks):
        raise _refused(model, "its forward is changed by a hook or on the instance")
    before, chance, buffers = PythonState.of(model), chance_state(), _buffers(model)
    kept = before.copied()
    recorder = Recorder()
    with recorder, torch.enable_grad():
        traced = trace()
    # All threads share the generators: check that this one drew.
    is_random = chance != chance_state() and draws(trace)
    if recorder.facts.is_random or is_random:
        raise _refused(model, "its forward draws random numbers outside of operators")
    changed = before.changes(PythonState.of(model))
    assigned = [n for n, b in _buffers(model).items() if b is not buffers.get(n)]
    if assigned:
        name = assigned[0]
        raise NotSplittable(
            f"forward assigns {name}, which torch.fx would lose. Write a buffer in "
            f"place, as in self.{name.rpartition('.')[2]}.add_(1); or list its units "
            "by hand with Task(units_fn=...)."
        )
    if changed:
        restore(kept)
    # Not the constants that torch.fx adds to the model.
    names = {attribute_of(path) for path in changed}
    return traced, frozenset(n for n in names if not n.startswith(CONSTANT))


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


def _buffers(model: nn.Module) -> dict[str, object]:
    return {
        f"{prefix}.{name}".lstrip("."): value
        for prefix, part in model.named_modules()
        for values in (part._parameters, part._buffers)
        for name, value in values.items()
    }
