"""What each operation of a model does, seen in a run under fake tensors.

Guessing from names would miss functional and user-written operations. So everything
runs, and what can be repeated is repeated: a unit may rerun only if a second run
computes the same and changes nothing.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves, tree_map

from flwr_smartsplit.errors import InvalidTask, NotSplittable
from flwr_smartsplit.split.activation_checkpointing import statistics_kept
from flwr_smartsplit.split.fake_tensors import (
    DryRun,
    constants_of,
    fake_batch,
    fake_copy,
    warnings_ignored,
)
from flwr_smartsplit.split.python_state import PythonState, chance_state
from flwr_smartsplit.split.segment import Batch, Segment, Unit, run_unit
from flwr_smartsplit.split.submodules import odd_modes
from flwr_smartsplit.split.trace.expressions import Expressions, Start, Table
from flwr_smartsplit.split.trace.op_recorder import NodeFacts, Recorder, storages_of

_READS_MODEL = ("call_module", "get_attr")
# Two examples, since BatchNorm refuses to train on one value per channel.
_NUM_EXAMPLES = 2


Fresh = Callable[[Any], Any]
"""Copies a tensor that a call writes; the copy holds what it held before the call."""
Again = Callable[[Fresh], Any]


@dataclass(frozen=True)
class _Call:
    """A call that can be repeated: what it was, where it began, what it returned."""

    facts: NodeFacts
    again: "Again"
    thing: Any  # The code that it runs
    start: Start
    returned: Any


class Prober:
    """Runs the parts of a model, and finds out afterwards which of them can rerun."""

    def __init__(self, root: nn.Module, model: nn.Module, table: Table) -> None:
        self.recorder = Recorder()
        self.expressions = Expressions(table)
        self._root = root
        self._storages = self.recorder.own = storages_of(_all_tensors(root))
        self.recorder.trained = {
            key: name
            for name, parameter in root.named_parameters()
            if parameter.requires_grad
            for key in storages_of(parameter)
        }
        self._calls: list[_Call] = []
        number_tensors(self.expressions, root, model)

    def run(
        self,
        facts: NodeFacts,
        run: Callable[[], Any],
        inputs: Any,
        thing: Any,
        *,
        again: Again | None,
    ) -> Any:
        """Run a part once, and note what it does.

        ``thing`` is the code that it runs; ``again`` runs it a second time, on the same
        inputs: on copies of those that it writes.
        """
        self.recorder.facts = facts
        start = self.expressions.start(inputs)
        root = thing if isinstance(thing, nn.Module) else nn.Module()
        before, registered = PythonState.of(thing), named_tensors(root)
        facts.value = value = run()
        after = PythonState.of(thing)
        facts.changed = before.changes(after)
        facts.reached = frozenset(after.reached)
        facts.changes_model = (
            bool(facts.changed)
            or not self._storages.isdisjoint(facts.written)
            or any(
                now is not registered.get(n) for n, now in named_tensors(root).items()
            )
        )
        facts.repeats = not facts.changes_model
        if again is not None:
            returned = self.expressions.of(value)
            self._calls.append(_Call(facts, again, thing, start, returned))
        return value

    def repeat_all(self) -> None:
        """Run each part again, as backward does, and note which ones repeat."""
        for call in self._calls:
            call.facts.repeats = self._repeats(call)

    def meaning(self, outputs: Any) -> Any:
        """Describe what was computed: the outputs, and what the model holds now."""
        return self.expressions.of(outputs), {
            name: self.expressions.of(tensor)
            for name, tensor in named_tensors(self._root).items()
        }

    def _repeats(self, call: _Call) -> bool:
        root = call.thing if isinstance(call.thing, nn.Module) else nn.Module()
        self.recorder.facts = NodeFacts()

        def fresh(given: Any) -> Any:
            if storages_of(given).isdisjoint(call.facts.written):
                return given
            return self.expressions.copy_of(given, call.start)

        with self.expressions.again(call.start):
            before = self.expressions.of(_all_tensors(root))
            with statistics_kept(root):
                chance, state = chance_state(), PythonState.of(call.thing)
                try:
                    value = call.again(fresh)
                    is_same = self.expressions.of(value) == call.returned
                except Exception:
                    return False
                is_same &= not state.changes(PythonState.of(call.thing))
            is_same &= chance == chance_state()
            return is_same and before == self.expressions.of(_all_tensors(root))


class _FactFinder(fx.Interpreter):
    """Run a graph node by node and keep the facts of each."""

    def __init__(self, root: nn.Module, graph: fx.Graph, prober: Prober) -> None:
        super().__init__(root, garbage_collect_values=False, graph=graph)
        self.prober = prober
        self.facts: dict[fx.Node, NodeFacts] = {}

    def fetch_args_kwargs_from_env(
        self, n: fx.Node
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Copy the lists among the arguments: some operations write into them."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return _thawed(tuple(args)), _thawed(dict(kwargs))

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and keep what the prober saw."""
        facts = self.facts[n] = NodeFacts()
        thing: Any = n.target
        if n.op == "call_module":
            thing = self.fetch_attr(str(n.target))
        can_repeat = n.op == "call_module" or (
            n.op == "call_function" and isinstance(thing, FunctionType)
        )
        inputs = [self.env[source] for source in n.all_input_nodes]
        run = super().run_node

        def run_again(fresh: Fresh) -> Any:
            before = {source: self.env[source] for source in n.all_input_nodes}
            self.env.update(tree_map(fresh, before))
            try:
                return run(n)
            finally:
                self.env.update(before)

        value = self.prober.run(
            facts,
            lambda: run(n),
            inputs,
            thing,
            again=run_again if can_repeat else None,
        )
        facts.shape = shape_of(value)
        return value


def shape_of(value: Any) -> tuple[int, ...]:
    """Return a tensor's shape; ``()`` for anything else."""
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _thawed(value: Any) -> Any:
    """Replace fx's immutable lists and dicts by ordinary ones."""
    if isinstance(value, list):
        return [_thawed(item) for item in value]
    if type(value) is tuple:
        return tuple(_thawed(item) for item in value)
    if isinstance(value, dict):
        return {key: _thawed(item) for key, item in value.items()}
    return value


@warnings_ignored()
def find_facts(
    model: nn.Module, graph: fx.Graph, example_inputs: Batch
) -> dict[fx.Node, NodeFacts]:
    """Run a graph under fake tensors and record what each of its nodes does.

    The model must be in the mode that was traced; it is not changed. Raises
    ``InvalidTask`` if it does not run on the example inputs, and ``NotSplittable`` if
    the graph computes something else than the model's own ``forward``.
    """
    reads = tuple({str(n.target) for n in graph.nodes if n.op in _READS_MODEL})
    everything = Segment([Unit("", _identity, reads)], 0, model, odd_modes(model))
    mode, table = DryRun(), Table()
    root = fake_copy(everything, mode).train(model.training)
    prober = Prober(root, model, table)
    finder = _FactFinder(root, graph, prober)
    inputs = fake_batch(example_inputs, mode, batch_size=_NUM_EXAMPLES)
    batch = tree_leaves(inputs)
    prober.expressions.name({f"input {i}": x for i, x in enumerate(batch)})
    try:
        with mode, prober.recorder, prober.expressions, torch.enable_grad():
            with (
                saved_tensors_hooks(prober.recorder.note_saved, _itself),
                torch_log_silenced(),
            ):
                outputs = finder.run(*batch)
                meaning = prober.meaning(outputs)
                prober.repeat_all()
    except Exception as error:
        raise cannot_run(model, example_inputs, error) from error
    given = storages_of(batch)
    for facts in finder.facts.values():
        facts.repeats &= given.isdisjoint(facts.written)
    _compare(model, meaning, table, inputs, mode)
    return finder.facts


def _compare(  # noqa: PLR0917
    model: nn.Module, found: Any, table: Table, inputs: Any, mode: DryRun
) -> None:
    """Raise ``NotSplittable`` unless the model itself computes what was found."""
    stock = fake_copy(model, mode)
    expressions = Expressions(table)
    number_tensors(expressions, stock, model)
    batch = tree_leaves(inputs)
    expressions.name({f"input {i}": x for i, x in enumerate(batch)})
    reason = "what forward returns"
    try:
        with mode, expressions, torch.enable_grad(), torch_log_silenced():
            with saved_tensors_hooks(_nothing, _itself):
                outputs = run_unit(lambda _, *a, **k: stock(*a, **k), stock, inputs)
        wrong = [
            name
            for name, tensor in named_tensors(stock).items()
            if name in found[1] and found[1][name] != expressions.of(tensor)
        ]
        if expressions.of(outputs) == found[0] and not wrong:
            return
        if wrong:
            reason = f"what forward writes to {wrong[0]}"
    except Exception as error:
        reason = f"what forward does ({type(error).__name__}: {str(error)[:200]})"
    raise NotSplittable(
        f"torch.fx reads {type(model).__name__} wrongly: {reason} in "
        f"{'training' if model.training else 'evaluation'} mode is not what the traced "
        "operations compute. Often forward asks what a value is, with isinstance or "
        "torch.is_tensor, and a traced value is a Proxy. Change that, or list its "
        "units by hand with Task(units_fn=...)."
    )


def _all_tensors(root: nn.Module) -> list[Tensor]:
    return [*named_tensors(root).values(), *constants_of(root).values()]


def named_tensors(root: nn.Module) -> dict[str, Tensor]:
    """List a model's parameters and buffers under all their names."""
    parameters = root.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(root.named_buffers(remove_duplicate=False))}


def number_tensors(expressions: Expressions, root: nn.Module, model: nn.Module) -> None:
    """Give numbers to a fake copy's tensors: state by name, constants by content."""
    first: dict[int, str] = {}
    names = {
        name: first.setdefault(id(tensor), name)
        for name, tensor in named_tensors(model).items()
    }
    for name, tensor in named_tensors(root).items():
        expressions.name({names.get(name, name): tensor})
    real = constants_of(model)
    for name, constant in constants_of(root).items():
        if name in real:
            expressions.know(constant, real[name])


def cannot_run(
    model: nn.Module, example_inputs: Batch, error: Exception, *, part: str = ""
) -> InvalidTask:
    """Make the error of a failed dry run of a model, or a part of it."""
    shapes = [tuple(example.shape) for example in tree_leaves(example_inputs)]
    reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
    if "convert all Tensors to FakeTensors" in reason:
        reason = "it uses a tensor that it does not name in its reads"
    return InvalidTask(
        f"{f'{part} of ' if part else ''}{type(model).__name__} cannot run on "
        f"example inputs of shape {shapes}: {reason}. Give example inputs that the "
        "model accepts.",
        shapes=shapes,
    )


@contextmanager
def torch_log_silenced() -> Iterator[None]:
    """Keep torch from logging a traceback of what is raised anyway."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _itself(value: Any) -> Any:
    return value


def _nothing(value: Any) -> None:
    del value


def _identity(root: nn.Module, value: Any) -> Any:
    del root
    return value
