"""Move units from one running segment to another, with all their training state.

A unit takes along its values, the optimizer's state of its parameters, and the settings
of their parameter groups. Units that stay are shared, not copied: a device holds
nothing twice while a cut moves.
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
from flwr_smartsplit.split.build import materialise, state_views
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.split.fake_tensors import warnings_ignored
from flwr_smartsplit.split.segment import Segment
from flwr_smartsplit.split.submodules import share
from flwr_smartsplit.task import Task
from flwr_smartsplit.train.segment_runner import SegmentRunner
from flwr_smartsplit.train.torch_device import placed

State = Mapping[str, npt.NDArray[Any]]
Make = Callable[[Segment], SegmentRunner]
"""Makes the runner of a segment with its place's task, streams and config."""

_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True, slots=True, kw_only=True)
class MigratedUnits:
    """What units ``[start, stop)`` of a running segment take along."""

    start: int
    stop: int
    state: State  # Parameters and buffers, by the model's names
    buffers: Mapping[str, Any]  # Non-persistent ones that training has changed
    optimizer: Mapping[str, Mapping[str, Any]]  # Its state of each parameter
    settings: Mapping[str, str]  # Those of each parameter's group, as text


def migrated_units(
    runner: SegmentRunner, chain: Chain, start: int, stop: int
) -> MigratedUnits:
    """Collect what units ``[start, stop)`` take along, sharing memory.

    The runner must be between two steps. Raises ``RefusedMove`` if the units have
    something that cannot be sent.
    """
    part = chain.segment(start, stop, source=runner.segment)
    _check_unchanged(chain, start, stop)
    names = {name for name, _ in part.named_parameters()}
    states = {n: s for n, s in _optimizer_states(runner).items() if n in names}
    for name, state in states.items():
        _check_sendable(name, state)
    return MigratedUnits(
        start=start,
        stop=stop,
        state=state_views(part),
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
    """Make a runner of other units: those that stay are shared, new ones are built.

    ``make`` builds a runner with this place's task, streams and config, and
    ``num_steps`` are done so far. Of the old runner, between two steps, only the
    gradients are freed. Raises ``RefusedMove`` if the optimizer or schedule cannot be
    restored exactly.
    """
    runner.release_gradients()
    sources = {name: runner.segment for i in units for name in chain.units[i].reads}
    if arriving is not None:
        part = _built(chain, arriving, runner.segment)
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
    """Find the units that stay on the device: with local state, or up to a defence."""
    defended = frozenset(range(chain.num_defended))
    if task.is_local is None:
        return defended
    names = {i: chain.state_names(i, i + 1) for i in range(len(chain))}
    local = (i for i, own in names.items() if any(map(task.is_local, own)))
    return defended.union(local)


def check_kept(chain: Chain, task: Task, leaving: range) -> None:
    """Raise ``RefusedMove`` if a leaving unit has state that must stay here."""
    kept = sorted(kept_units(chain, task) & set(leaving))
    if kept:
        names = ", ".join(chain.unit_names[index] for index in kept)
        raise RefusedMove(
            f"{names}: the task's is_local or its defence keeps these units on the "
            f"device: the cut cannot move below {kept[-1] + 1}."
        )


# --- values ---------------------------------------------------------------------------


def _built(chain: Chain, arriving: MigratedUnits, present: nn.Module) -> Segment:
    part = materialise(
        chain, arriving.start, arriving.stop, arriving.state, beside=[present]
    )
    for name, value in arriving.buffers.items():
        parent, _, last = name.rpartition(".")
        setattr(part.get_submodule(parent), last, value)
    return part


def _changed_buffers(part: nn.Module, model: nn.Module) -> dict[str, Tensor]:
    """Find the non-persistent buffers that differ from a new model's."""
    fresh = dict(model.named_buffers(remove_duplicate=False))
    saved = part.state_dict().keys()
    return {
        name: buffer.detach()
        for name, buffer in part.named_buffers(remove_duplicate=False)
        if name not in saved and not torch.equal(buffer.cpu(), fresh[name])
    }


def _check_unchanged(chain: Chain, start: int, stop: int) -> None:
    """Refuse units that keep something which is neither parameter nor buffer."""
    for unit in chain.units[start:stop]:
        if unit.changed:
            names = ", ".join(name.lstrip(".") for name in unit.changed[:3])
            raise RefusedMove(
                f"{unit.name}: training changes {names}, and only tensors can move: "
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
    """Return the optimizer's state by parameter name."""
    if runner.optimizer is None:
        return {}
    names, state = _names_by_id(runner), runner.optimizer.state
    groups = [p for group in runner.optimizer.param_groups for p in group["params"]]
    if any(id(key) not in names for key in [*state, *groups]):
        raise RefusedMove(
            f"{type(runner.optimizer).__name__} has state that belongs to no parameter "
            "of the model, so no unit can take it along: keep the cut where it is."
        )
    return {names[id(key)]: values for key, values in state.items()}


def _settings(runner: SegmentRunner) -> dict[str, str]:
    """Write out the settings of each parameter's group: rates, decays, and so on."""
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

    Steps without gradients change only what depends on the number of steps. The
    parameters are empty meanwhile, so nothing else can change.
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
            f"cannot be rebuilt in a running round: {type(error).__name__}: {error}"
        ) from error
    finally:
        after = [parameter._version for parameter in parameters]
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value
    if after != before:
        raise RefusedMove(
            f"{type(runner.optimizer).__name__} changes parameters that have no "
            "gradient, so it cannot be rebuilt in a running round."
        )


def _check_settings(found: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    wrong = [name for name in found if found[name] != wanted.get(name)]
    if wrong:
        name = wrong[0]
        raise RefusedMove(
            f"{name} ({len(wrong)} in all): a new optimizer of this task, stepped as "
            f"often, is set to {found[name]}, and was {wanted.get(name)} before: it "
            "may depend only on the parameter, the config and the number of steps."
        )


def _check_counters(old: Optimizer | None, new: Optimizer | None) -> None:
    """Refuse optimizers that keep changing values outside their state."""
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
                own = {k: _beside(parameter, group, k, v) for k, v in state.items()}
                runner.optimizer.state[parameter] = own


def _beside(parameter: Tensor, group: Mapping[str, Any], key: str, value: Any) -> Any:
    """Place a value where ``Optimizer.load_state_dict`` would: counters may stay."""
    is_counter = key == "step" and not (group.get("capturable") or group.get("fused"))
    return value if is_counter else placed(value, parameter.device)
