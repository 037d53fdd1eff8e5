"""Carry units from one running segment to another, with all that training made of them.

What a unit takes along is its values, the optimizer's state of its parameters, and
what the optimizer's groups are set to. What stays is shared, not copied: while a cut
moves, a device holds nothing twice.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from flwr_smartsplit.errors import MemoryCapExceeded, RefusedMove
from flwr_smartsplit.split.build import materialise
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.split.fake_tensors import warnings_ignored
from flwr_smartsplit.split.segment import Segment
from flwr_smartsplit.split.submodules import share
from flwr_smartsplit.task import Task
from flwr_smartsplit.train.segment_runner import CPU, SegmentRunner

State = Mapping[str, npt.NDArray[Any]]
Make = Callable[[Segment], SegmentRunner]
"""Makes the runner of a segment as its place makes them: task, streams, config."""

_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True, slots=True, kw_only=True)
class MigratedUnits:
    """What units ``[start, stop)`` of a running segment take along.

    Parameters
    ----------
    start, stop : int
        The units.
    state : Mapping[str, ndarray]
        Their parameters and buffers, by the model's names.
    buffers : Mapping[str, Tensor]
        Buffers that are not part of the state and that training has changed.
    optimizer : Mapping[str, Mapping[str, Any]]
        The optimizer's state of each parameter: tensors and plain values, nested in
        mappings, lists and tuples.
    settings : Mapping[str, str]
        What the optimizer's group of each parameter is set to, written out.
    """

    start: int
    stop: int
    state: State
    buffers: Mapping[str, Any]
    optimizer: Mapping[str, Mapping[str, Any]]
    settings: Mapping[str, str]


def migrated_units(
    runner: SegmentRunner, chain: Chain, start: int, stop: int
) -> MigratedUnits:
    """Take what units ``[start, stop)`` of a segment have become; it shares memory.

    Parameters
    ----------
    runner : SegmentRunner
        Runs a segment with these units, and is between two steps.
    chain : Chain
        Whose units they are.
    start, stop : int
        The units.

    Raises
    ------
    RefusedMove
        If they have something that cannot be sent.
    """
    part = chain.segment(start, stop, source=runner.segment)
    _check_attributes(part, chain.model)
    names = {name for name, _ in part.named_parameters()}
    states = {n: s for n, s in _optimizer_states(runner).items() if n in names}
    for name, state in states.items():
        _check_sendable(name, state)
    return MigratedUnits(
        start=start,
        stop=stop,
        state={n: t.detach().numpy() for n, t in part.state_dict().items()},
        buffers=_changed_buffers(part, chain.model),
        optimizer=states,
        settings={n: s for n, s in _settings(runner).items() if n in names},
    )


def rebuilt(
    runner: SegmentRunner,
    chain: Chain,
    units: range,
    *,
    make: Make,
    num_steps: int,
    arriving: MigratedUnits | None = None,
) -> SegmentRunner:
    """Go on with other units: those that stay are shared, those that arrive are built.

    Parameters
    ----------
    runner : SegmentRunner
        Runs the units so far, and is between two steps; it stays as it is, but for its
        gradients, which have been used.
    chain : Chain
        Whose units they are.
    units : range
        Those to run from now on.
    make : Callable[[Segment], SegmentRunner]
        Makes a runner as this place does.
    num_steps : int
        The steps done so far.
    arriving : MigratedUnits, optional
        The units among them that are new here.

    Raises
    ------
    RefusedMove
        If optimizer or schedule cannot be brought exactly to where they were, or the
        units are on an accelerator.
    """
    if runner.device != CPU:
        raise RefusedMove(f"units move from CPU to CPU; these are on {runner.device}.")
    runner.release_gradients()
    sources = {name: runner.segment for i in units for name in chain.units[i].reads}
    if arriving is not None:
        part = _built(chain, arriving)
        for index in range(arriving.start, arriving.stop):
            sources |= dict.fromkeys(chain.units[index].reads, part)
    root = nn.Module()
    for name in sorted(sources):
        share(sources[name], root, name.split("."))
    new = make(chain.segment(units.start, units.stop, source=root))
    _replay(new, num_steps)
    states, settings = _optimizer_states(runner), _settings(runner)
    if arriving is not None:
        states = {**states, **arriving.optimizer}
        settings = {**settings, **arriving.settings}
    _check_settings(_settings(new), settings)
    _check_counters(runner.optimizer, new.optimizer)
    _give_states(new, states)
    return new


def kept_units(chain: Chain, task: Task) -> frozenset[int]:
    """Find the units whose state, or part of it, stays on the device."""
    is_local = task.is_local
    if is_local is None:
        return frozenset()
    return frozenset(
        index
        for index in range(len(chain))
        if any(map(is_local, chain.state_names(index, index + 1)))
    )


def check_kept(chain: Chain, task: Task, leaving: range) -> None:
    """Make sure that no unit leaves the device whose state must stay there.

    Raises
    ------
    RefusedMove
        Naming the units.
    """
    kept = sorted(kept_units(chain, task) & set(leaving))
    if kept:
        names = ", ".join(chain.unit_names[index] for index in kept)
        raise RefusedMove(
            f"{names}: the task's is_local keeps state of these units on the device: "
            f"the cut cannot move below {kept[-1] + 1}."
        )


# --- values ---------------------------------------------------------------------------


def _built(chain: Chain, arriving: MigratedUnits) -> Segment:
    part = materialise(chain, arriving.start, arriving.stop, arriving.state)
    for name, value in arriving.buffers.items():
        parent, _, last = name.rpartition(".")
        setattr(part.get_submodule(parent), last, value)
    return part


def _changed_buffers(part: nn.Module, model: nn.Module) -> dict[str, Tensor]:
    """Find the buffers that no state has and that are not as the model makes them."""
    fresh = dict(model.named_buffers(remove_duplicate=False))
    saved = part.state_dict().keys()
    return {
        name: buffer.detach()
        for name, buffer in part.named_buffers(remove_duplicate=False)
        if name not in saved and not torch.equal(buffer, fresh[name])
    }


def _check_attributes(part: nn.Module, model: nn.Module) -> None:
    """Refuse modules that count, say, in a Python number: it would not come along."""
    for name, module in part.named_modules():
        fresh = _plain_attributes(model.get_submodule(name))
        found = _plain_attributes(module)
        changed = [
            key
            for key in fresh.keys() & found.keys() - {"training"}
            if fresh[key] != found[key]
        ]
        if changed:
            raise RefusedMove(
                f"{name}: training changes {', '.join(sorted(changed))} of this "
                f"{type(module).__name__}, which only tensors can be carried from: "
                "register a buffer, or keep the cut where it is."
            )


def _plain_attributes(thing: Any) -> dict[str, Any]:
    return {
        key: value
        for key, value in vars(thing).items()
        if not key.startswith("_") and type(value) in _PLAIN
    }


# --- the optimizer --------------------------------------------------------------------


def _names_by_id(runner: SegmentRunner) -> dict[int, str]:
    return {id(p): name for name, p in runner.segment.named_parameters()}


def _optimizer_states(runner: SegmentRunner) -> dict[str, Mapping[str, Any]]:
    """Return the optimizer's state by the names of its parameters."""
    if runner.optimizer is None:
        return {}
    names, state = _names_by_id(runner), runner.optimizer.state
    groups = [p for group in runner.optimizer.param_groups for p in group["params"]]
    if any(id(key) not in names for key in [*state, *groups]):
        raise RefusedMove(
            f"{type(runner.optimizer).__name__} keeps what belongs to no parameter "
            "of the model, so no unit can take it along: keep the cut where it is."
        )
    return {names[id(key)]: values for key, values in state.items()}


def _settings(runner: SegmentRunner) -> dict[str, str]:
    """Write out what each parameter's group is set to: rates, decays, and so on."""
    if runner.optimizer is None:
        return {}
    names = _names_by_id(runner)
    return {
        names[id(parameter)]: repr(
            sorted((k, _as_text(v)) for k, v in group.items() if k != "params")
        )
        for group in runner.optimizer.param_groups
        for parameter in group["params"]
    }


def _as_text(value: Any) -> str:
    return repr(value.tolist() if isinstance(value, Tensor) else value)


@warnings_ignored()
def _replay(runner: SegmentRunner, num_steps: int) -> None:
    """Bring a new optimizer and its schedule to this step.

    Both are stepped as often as elsewhere. There are no gradients, so all that moves
    is what depends on the number of steps alone; and nothing else could, since the
    parameters are empty meanwhile.
    """
    parameters = list(runner.segment.parameters())
    values = [parameter.data for parameter in parameters]
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data = value.new_empty(0)
    before = [parameter._version for parameter in parameters]
    try:
        for _ in range(num_steps):
            runner.update()
    except MemoryCapExceeded:
        raise
    except Exception as error:
        raise RefusedMove(
            "the optimizer or its schedule cannot be stepped without gradients, so it "
            f"cannot be set up anew in a running round: {type(error).__name__}: {error}"
        ) from error
    finally:
        after = [parameter._version for parameter in parameters]
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value
    if after != before:
        raise RefusedMove(
            f"{type(runner.optimizer).__name__} changes parameters that have no "
            "gradient, so it cannot be set up anew in a running round."
        )


def _check_settings(found: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    wrong = [name for name in found if found[name] != wanted.get(name)]
    if wrong:
        name = wrong[0]
        raise RefusedMove(
            f"{name} ({len(wrong)} in all): a new optimizer of this task, stepped as "
            f"often, is set to {found[name]}, and was {wanted.get(name)} before: what "
            "sets it must depend on the parameter, the config and the number of steps "
            "alone."
        )


def _check_counters(old: Optimizer | None, new: Optimizer | None) -> None:
    """Refuse optimizers that remember something outside their state."""
    if old is None or new is None:
        return
    before, after = _plain_attributes(old), _plain_attributes(new)
    if before != after:
        raise RefusedMove(
            f"{type(old).__name__} has attributes that training changes ({before} is "
            f"{after} in a new one): keep them in its state, by parameter."
        )


def _check_sendable(name: str, state: Any) -> None:
    for value in tree_leaves(state):
        if not isinstance(value, Tensor) and type(value) not in _PLAIN:
            raise RefusedMove(
                f"the optimizer's state of {name} has a {type(value).__name__}; only "
                "tensors and plain numbers can be sent: keep the cut where it is."
            )


def _give_states(runner: SegmentRunner, states: Mapping[str, Any]) -> None:
    if runner.optimizer is None:
        return
    names = _names_by_id(runner)
    for group in runner.optimizer.param_groups:
        for parameter in group["params"]:
            runner.optimizer.state.pop(parameter, None)
            state = states.get(names[id(parameter)])
            if state is not None:
                runner.optimizer.state[parameter] = state
