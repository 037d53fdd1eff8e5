"""Units that a user lists by hand, checked by a dry run.

The user says what a unit reads; what it writes and draws is observed under fake
tensors, as for traced models.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map

from flwr_smartsplit.defence import Defence, float_tensors
from flwr_smartsplit.errors import InvalidTask, NotSplittable
from flwr_smartsplit.split.fake_tensors import (
    DryRun,
    fake_batch,
    fake_copy,
    warnings_ignored,
)
from flwr_smartsplit.split.segment import Batch, Segment, Unit, run_unit
from flwr_smartsplit.split.submodules import odd_modes
from flwr_smartsplit.split.trace.cut_points import (
    overwritten,
    shared_state,
    tied,
    with_nearest,
)
from flwr_smartsplit.split.trace.facts import (
    Prober,
    cannot_run,
    no_new_state,
    torch_log_silenced,
)
from flwr_smartsplit.split.trace.op_recorder import NodeFacts, storages_of


@warnings_ignored()
def declared_units(
    model: nn.Module, units: Sequence[Unit], example_inputs: Batch
) -> tuple[tuple[Unit, ...], dict[str, str]]:
    """Check units, and join those between which the model must not be cut.

    Returns the chain's units, and the reason for each unit that must not end a segment.
    Raises ``NotSplittable`` with every problem of the list, and ``InvalidTask`` if a
    unit does not run on what the one before it returns.
    """
    units = list(units)
    problems = _list_problems(model, units)
    if problems:
        raise NotSplittable(
            f"these units are no chain of {type(model).__name__}: "
            f"{'; '.join(problems)}."
        )
    train, evaluate = (
        _dry_run(model, units, example_inputs, training=mode) for mode in (True, False)
    )
    units = [
        replace(
            unit,
            is_random=facts.is_random,
            gradients=tuple(t.requires_grad for t in _tensors(facts.value)),
            writes=tuple(sorted(facts.changed_state)),
            can_rerun=facts.repeats,
            changed=tuple(sorted(facts.changed)),
            rereads=tuple(sorted(facts.rereads)),
        )
        for unit, facts in zip(units, train, strict=True)
    ]
    refused = {}
    for index, unit in enumerate(units[:-1]):
        reason = _refusal(model, units, (train, evaluate), index)
        if reason is not None:
            refused[index] = (unit.name, reason)
    cuts = {i: u.name for i, u in enumerate(units[:-1]) if i not in refused}
    return _joined(units, [*cuts]), with_nearest(refused, cuts)


@warnings_ignored()
def values_of(model: nn.Module, units: Sequence[Unit], inputs: Batch) -> list[Any]:
    """Return what each unit returns for 2 examples, as tensors without values."""
    return [fact.value for fact in _dry_run(model, units, inputs, training=True)]


def _list_problems(model: nn.Module, units: Sequence[Unit]) -> list[str]:
    """List what is wrong with the list itself."""
    strangers = [unit for unit in units if not isinstance(unit, Unit)]
    if strangers:
        return [f"{strangers[0]!r} is not a Unit"]
    problems = [] if units else ["the list is empty"]
    names = [unit.name for unit in units]
    problems += [
        f"two units are named {name!r}"
        for name in sorted({name for name in names if names.count(name) > 1})
    ]
    known = {name for name, _ in model.named_modules(remove_duplicate=False)}
    known |= {name for name, _ in model.named_parameters(remove_duplicate=False)}
    known |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    known |= {  # Tensors that are plain attributes.
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
    }
    known.discard("")
    reads = {name for unit in units for name in unit.reads}
    problems += [f"{name} is not in the model" for name in sorted(reads - known)]
    read = {id(p) for name in reads & known for p in _parameters_at(model, name)}
    problems += [
        f"{name} is trained, but no unit reads it"
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in read
    ]
    return problems


def _parameters_at(model: nn.Module, target: str) -> list[Tensor]:
    path, _, name = target.rpartition(".")
    thing = getattr(model.get_submodule(path), name)
    tensors = thing.parameters() if isinstance(thing, nn.Module) else [thing]
    return [tensor for tensor in tensors if isinstance(tensor, nn.Parameter)]


def _dry_run(
    model: nn.Module, units: Sequence[Unit], inputs: Batch, *, training: bool
) -> list[NodeFacts]:
    """Run the units one by one under fake tensors; each sees only what it reads."""
    mode = DryRun()
    whole = fake_copy(Segment(units, 0, model), mode)
    prober = Prober(whole, model, {}, training=training)
    odd = odd_modes(model)
    value: Any = fake_batch(inputs, mode, batch_size=2)
    found = []
    for index, unit in enumerate(units):
        root = Segment([unit], index, whole, odd).train(training)
        run = unit.forward_in(training)
        facts = NodeFacts()
        call, given = partial(_called, run, root, value), value
        try:
            with (
                _probing(mode, prober, training=training),
                no_new_state(root, model),
            ):
                value = prober.run(
                    facts, partial(call, _itself), given, root, again=call
                )
            facts.writes_inputs = not storages_of(given).isdisjoint(facts.written)
        except InvalidTask:
            raise
        except Exception as error:
            raise cannot_run(
                model, inputs, error, part=f"unit {unit.name!r}"
            ) from error
        found.append(facts)
    if training:
        with _probing(mode, prober, training=True):
            prober.repeat_all()
    for facts in found:
        facts.repeats &= not facts.writes_inputs
    return found


# --- a defence ------------------------------------------------------------------------


def with_defence(
    model: nn.Module, units: Sequence[Unit], defence: Defence, inputs: Batch
) -> list[Unit]:
    """Put a defence behind the unit that it names.

    Raises ``InvalidTask`` if there is none, if it is the last one, or if the defence
    would not hold there.
    """
    names = [unit.name for unit in units]
    if defence.after not in names[:-1]:
        raise InvalidTask(
            f"the defence stands after unit {defence.after!r}, which is not one of "
            f"those of {type(model).__name__} that a cut can follow: "
            f"{', '.join(names[:-1])}."
        )
    place = names.index(defence.after) + 1
    values = values_of(model, units[:place], inputs)
    mixing = [
        name
        for unit in units[:place]
        for name in unit.reads
        if any(isinstance(m, _BatchNorm) for m in _modules_at(model, name))
    ]
    for problem in _undefended(defence, inputs, values[-1], mixing):
        raise InvalidTask(f"the defence after unit {defence.after!r}: {problem}")
    before, may_rerun = list(units[:place]), not defence.nopeek
    if not may_rerun:  # The peak of reruns before its loss is not known to the byte.
        before = [replace(unit, can_rerun=False) for unit in before]
    own = Unit(
        "(defence)",
        defence,
        (),
        gradients=before[-1].gradients,
        can_rerun=may_rerun,
        is_defence=True,
    )
    return [*before, own, *units[place:]]


def _undefended(
    defence: Defence, inputs: Batch, value: Any, mixing: Sequence[str]
) -> Iterator[str]:
    """Say what of a boundary a defence would not hold for."""
    for tensor in _tensors(value):
        if not tensor.is_floating_point() or tensor.dim() < 2 or len(tensor) != 2:  # noqa: PLR2004
            yield (
                f"a tensor of {tensor.dtype} and shape {tuple(tensor.shape)} (of 2 "
                "examples) would cross behind it. It takes floating-point values with "
                "the examples in dimension 0: choose a unit with one such output."
            )
    if defence.nopeek and not float_tensors(inputs):
        yield (
            "nopeek measures distances between inputs, and the task's are no "
            "floating-point values. Choose clip and noise."
        )
    if defence.noise and mixing:
        yield (
            f"{', '.join(mixing)} mixes the examples of a batch before it, so that "
            "clipping bounds what no single example tells. Choose an earlier unit, or "
            "GroupNorm in place of BatchNorm."
        )


def _modules_at(model: nn.Module, name: str) -> list[nn.Module]:
    path, _, last = name.rpartition(".")
    thing = getattr(model.get_submodule(path), last)
    return list(thing.modules()) if isinstance(thing, nn.Module) else []


def _called(
    run: Callable[..., Any], root: nn.Module, value: Any, fresh: Callable[..., Any]
) -> Any:
    return run_unit(run, root, tree_map(fresh, value))


def _itself(value: Any) -> Any:
    return value


@contextmanager
def _probing(mode: DryRun, prober: Prober, *, training: bool) -> Iterator[None]:
    expressions = prober.expressions if training else nullcontext()
    with mode, prober.recorder, expressions, torch_log_silenced():
        with saved_tensors_hooks(prober.recorder.note_saved, _itself):
            with torch.set_grad_enabled(training):
                yield


def _refusal(
    model: nn.Module,
    units: Sequence[Unit],
    facts: tuple[list[NodeFacts], list[NodeFacts]],
    index: int,
) -> str | None:
    """Say why there must be no cut after a unit, or None."""
    after = index + 1
    for found in facts:
        value = found[index].value
        reason = _value_problem(value)
        if reason is None:
            names = [unit.name for unit in units[after:]]
            later = dict(zip(names, found[after:], strict=True))
            reason = overwritten(value, later)
        if reason is not None:
            return reason
    before, behind = (
        {name for unit in side for name in unit.reads}
        for side in (units[:after], units[after:])
    )
    trained = [t for t in _tensors(facts[0][index].value) if t.requires_grad]
    if not trained and not any(_parameters_at(model, name) for name in before):
        return "no layer with parameters is before it"
    if len({(tensor.grad_fn, tensor.output_nr) for tensor in trained}) < len(trained):
        return "two of the tensors of its value are one"
    written = {name for found in facts[0] for name in found.changed_state}
    return tied(model, before, behind, written=written) or shared_state(
        facts[0][:after], facts[0][after:]
    )


def _value_problem(value: Any) -> str | None:
    """Say why a unit's value is not a boundary, or None."""
    tensors = value if type(value) is tuple else (value,)
    if tensors and all(isinstance(tensor, Tensor) for tensor in tensors):
        return None
    return f"its value is a {type(value).__name__}, not one tensor or several"


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _joined(units: Sequence[Unit], cuts: Sequence[int]) -> tuple[Unit, ...]:
    """Join the units between two cuts, under the name of the last."""
    starts = [0, *(cut + 1 for cut in cuts)]
    stops = [*starts[1:], len(units)]
    return tuple(
        _as_one(units[start:stop]) for start, stop in zip(starts, stops, strict=True)
    )


def _as_one(units: Sequence[Unit]) -> Unit:
    if len(units) == 1:
        return units[0]

    def run(training: bool, root: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        value: Any = kwargs or args
        for unit in units:
            value = run_unit(unit.forward_in(training), root, value)
        return value

    return Unit(
        name=units[-1].name,
        forward=partial(run, True),
        eval_forward=partial(run, False),
        reads=tuple(sorted({name for unit in units for name in unit.reads})),
        is_random=any(unit.is_random for unit in units),
        gradients=units[-1].gradients,
        writes=tuple(sorted({name for unit in units for name in unit.writes})),
        can_rerun=all(unit.can_rerun for unit in units),
        changed=tuple(name for unit in units for name in unit.changed),
        rereads=tuple(name for unit in units for name in unit.rereads),
    )
