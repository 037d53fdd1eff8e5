"""What each operation of a model does, seen in a run under fake tensors.

Guessing from names would miss functional and user-written operations. So everything
runs, and what can be repeated is repeated: a unit may rerun only if a second run
computes the same and changes nothing.
"""

import itertools
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves, tree_map

from flwr_smartsplit.errors import InvalidTask, NotSplittable
from flwr_smartsplit.split.activation_checkpointing import (
    has_statistics,
    statistics_kept,
)
from flwr_smartsplit.split.fake_tensors import (
    DryRun,
    constants_of,
    fake_batch,
    fake_copy,
    warnings_ignored,
)
from flwr_smartsplit.split.python_state import (
    CONSTANT,
    PythonState,
    attribute_of,
    chance_state,
    draws,
)
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
    is_known: bool  # All that it can reach; and it drew from no generator of Python


class Prober:
    """Runs the parts of a model, and finds out afterwards which of them can rerun.

    What they keep in Python matters in training only.
    """

    def __init__(
        self, root: nn.Module, model: nn.Module, table: Table, *, training: bool
    ) -> None:
        self._training = training
        self.recorder = Recorder()
        self.expressions = Expressions(table)
        self._root = root
        self._names: dict[int, set[str]] = {}
        for name, tensor in named_tensors(root).items():
            for key in storages_of(tensor):
                self._names.setdefault(key, set()).add(name)
        self._constants = constants_of(root)
        self.recorder.own = storages_of(_all_tensors(root))
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
        path: str = "",
        again: Again | None,
    ) -> Any:
        """Run a part once, and note what it does.

        ``thing`` is the code that it runs, and ``path`` its name if it is a module;
        ``again`` runs it a second time, on the same inputs: on copies of those that it
        writes.
        """
        self.recorder.facts = facts
        start = self.expressions.start(inputs)
        root = thing if isinstance(thing, nn.Module) else nn.Module()
        watched = (thing,) if self._training else ()
        before, registered = PythonState.of(*watched), named_tensors(root)
        chance = chance_state()
        facts.value = value = run()
        after, now = PythonState.of(*watched), named_tensors(root)
        facts.reached = frozenset(after.reached)
        facts.changed = before.changes(after)
        for name, constant in self._constants.items():
            if not facts.written.isdisjoint(storages_of(constant)):
                facts.changed[name] = id(constant)
        changed = {name for name in now if registered.get(name) is not now[name]}
        # A counter, say, may decide what is changed in another step.
        names = now if facts.changed else changed
        facts.changed_state = {f"{path}.{name}".lstrip(".") for name in names}.union(
            *(self._names.get(key, ()) for key in facts.written)
        )
        changes = facts.changed or facts.changed_state or facts.fills_saved
        facts.repeats = not changes
        if again is not None and self._training:
            returned = self.expressions.of(value)
            is_known = chance == chance_state() and after.is_known()
            self._calls.append(_Call(facts, again, thing, start, returned, is_known))
        return value

    def repeat_all(self) -> None:
        """Run each part again, as backward does, and note which ones repeat.

        Code of known libraries does, unless it changed more than running statistics.
        """
        for call in self._calls:
            is_norm = isinstance(call.thing, nn.Module) and has_statistics(call.thing)
            changes = call.facts.changed or (call.facts.changed_state and not is_norm)
            call.facts.repeats = not call.facts.fills_saved and (
                (call.is_known and not changes) or self._repeats(call)
            )

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
                    if self.expressions.of(value) != call.returned:
                        return False
                    # All threads share the generators: check that this one drew.
                    if chance != chance_state() and draws(lambda: call.again(fresh)):
                        return False
                except Exception:
                    return False
                if state.changes(PythonState.of(call.thing)):
                    return False
            after = self.expressions.of(_all_tensors(root))
            return bool(before == after)


class _Runner(fx.Interpreter):
    """Run a graph node by node."""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        super().__init__(root, garbage_collect_values=False, graph=graph)
        self.extra_traceback = False  # Of generated code, which says nobody anything.

    def fetch_args_kwargs_from_env(
        self, n: fx.Node
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Copy the lists among the arguments: some operations write into them."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return _thawed(tuple(args)), _thawed(dict(kwargs))


class _FactFinder(_Runner):
    """Run a graph node by node and keep the facts of each."""

    def __init__(self, root: nn.Module, graph: fx.Graph, prober: Prober) -> None:
        super().__init__(root, graph)
        self.prober = prober
        self.facts: dict[fx.Node, NodeFacts] = {}

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
            path=str(n.target),
            again=run_again if can_repeat else None,
        )
        facts.shape = shape_of(value)
        return value

    def writes_constants(self) -> bool:
        """Say whether a node wrote a tensor that forward makes anew in each step."""
        names = {name for facts in self.facts.values() for name in facts.changed}
        return any(name.startswith(CONSTANT) for name in names)


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


def _fake_root(model: nn.Module, graph: fx.Graph, mode: DryRun) -> nn.Module:
    """Copy what a graph reads of a model."""
    reads = tuple({str(n.target) for n in graph.nodes if n.op in _READS_MODEL})
    everything = Segment([Unit("", _identity, reads)], 0, model, odd_modes(model))
    return fake_copy(everything, mode).train(model.training)


@warnings_ignored()
def find_facts(
    model: nn.Module,
    graph: fx.Graph,
    example_inputs: Batch,
    kept: Collection[str] = (),
    *,
    compares: bool = True,
) -> dict[fx.Node, NodeFacts]:
    """Run a graph under fake tensors and record what each of its nodes does.

    The model must be in the mode that was traced; it is not changed. ``kept`` names the
    attributes that its forward assigns. Raises ``InvalidTask`` if it does not run on
    the example inputs, and, if it ``compares``, ``NotSplittable`` if the graph computes
    something else than the model's own ``forward``.
    """
    mode, table = DryRun(), Table()
    root = _fake_root(model, graph, mode)
    prober = Prober(root, model, table, training=model.training)
    finder = _FactFinder(root, graph, prober)
    inputs = fake_batch(example_inputs, mode, batch_size=_NUM_EXAMPLES)
    batch = tree_leaves(inputs)
    prober.expressions.name({f"input {i}": x for i, x in enumerate(batch)})
    expressions = prober.expressions if compares else nullcontext()
    try:
        with mode, prober.recorder, expressions, torch.enable_grad():
            with (
                saved_tensors_hooks(prober.recorder.note_saved, _itself),
                no_new_state(root, model),
                torch_log_silenced(),
            ):
                meanings = [prober.meaning(finder.run(*batch))]
                if compares and (kept or finder.writes_constants()):
                    prober.recorder.facts = NodeFacts()
                    again = _Runner(root, graph).run(*batch)
                    meanings.append(prober.meaning(again))
                prober.repeat_all()
    except InvalidTask:
        raise
    except Exception as error:
        raise cannot_run(model, example_inputs, error) from error
    given = storages_of(batch)
    for facts in finder.facts.values():
        facts.repeats &= given.isdisjoint(facts.written)
    if compares:
        _Stock(model, table, inputs, mode, beside=root).compare(meanings, kept)
    return finder.facts


class _Stock:
    """Runs the model's own forward, to compare it with what was traced."""

    def __init__(
        self,
        model: nn.Module,
        table: Table,
        inputs: Any,
        mode: DryRun,
        *,
        beside: nn.Module,
    ) -> None:
        self._model, self._inputs, self._mode = model, inputs, mode
        self._stock = fake_copy(model, mode, beside=beside)
        mode.allow_non_fake_inputs = True  # As constants outside of the model are.
        self._expressions = Expressions(table)
        number_tensors(self._expressions, self._stock, model)
        batch = enumerate(tree_leaves(inputs))
        self._expressions.name({f"input {i}": x for i, x in batch})

    def compare(self, meanings: Sequence[Any], kept: Collection[str]) -> None:
        """Raise ``NotSplittable`` unless the model computes the same, run after run.

        What it keeps in Python must be the same after each run: nothing but what it
        computed last.
        """
        states = []
        for index, meaning in enumerate(meanings):
            difference = self._difference(meaning)
            if difference and kept and (index > 0 or self._is_another_each_time()):
                self._refuse_change(kept)
            if difference:
                self._refuse(difference)
            if kept:
                states.append(PythonState.of(self._stock))
        for before, after in itertools.pairwise(states):
            changes = before.changes(after, with_tensors=False)
            changed = {attribute_of(path) for path in changes}.intersection(kept)
            if changed:
                self._refuse_change(changed)

    def _difference(self, meaning: Any) -> str | None:
        """Run forward once; say what is not as it was traced."""
        try:
            outputs = self._outputs()
        except Exception as error:
            return f"what forward does ({type(error).__name__}: {str(error)[:200]})"
        for name, tensor in named_tensors(self._stock).items():
            if name in meaning[1] and meaning[1][name] != self._expressions.of(tensor):
                return f"what forward writes to {name}"
        return None if outputs == meaning[0] else "what forward returns"

    def _outputs(self) -> Any:
        """Run forward once; describe what it returns."""
        stock = self._stock
        with (
            self._mode,
            self._expressions,
            torch.enable_grad(),
            saved_tensors_hooks(_nothing, _itself),
            torch_log_silenced(),
        ):
            outputs = run_unit(lambda _, *a, **k: stock(*a, **k), stock, self._inputs)
        return self._expressions.of(outputs)

    def _is_another_each_time(self) -> bool:
        """Say whether forward returns something else on the same inputs and state."""
        again, state = self._expressions.again, [*named_tensors(self._stock).values()]
        start = self._expressions.start((self._inputs, state))
        with suppress(Exception), again(start):
            first = self._outputs()
            with again(start):
                return bool(first != self._outputs())
        return False

    def _refuse_change(self, names: Collection[str]) -> None:
        words = ", ".join(sorted(names)[:3])
        raise NotSplittable(
            f"torch.fx cannot trace {type(self._model).__name__}: its forward changes "
            f"{words}, and the next step may depend on it. Change that, or list its "
            "units by hand with Task(units_fn=...)."
        )

    def _refuse(self, difference: str) -> None:
        mode = "training" if self._model.training else "evaluation"
        raise NotSplittable(
            f"torch.fx reads {type(self._model).__name__} wrongly: {difference} in "
            f"{mode} mode is not what the traced operations compute. Often forward "
            "asks what a value is, with isinstance or torch.is_tensor, and a traced "
            "value is a Proxy. Change that, or list its units by hand with "
            "Task(units_fn=...)."
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
def no_new_state(root: nn.Module, model: nn.Module) -> Iterator[None]:
    """Raise ``InvalidTask`` if a run of ``root`` adds state to it, or removes some."""
    before = root.state_dict(keep_vars=True).keys()
    yield
    names = sorted(before ^ root.state_dict(keep_vars=True).keys())
    if names:
        raise InvalidTask(
            f"forward of {type(model).__name__} adds or removes {', '.join(names)}: "
            "make layers and buffers in __init__, so that they are in the state that "
            "is sent, and that the optimizer has them."
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
