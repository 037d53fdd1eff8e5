"""From a module's forward to a chain of units.

A model is traced in training and in evaluation mode, because the two may run different
code; a place counts only where both can be cut.
"""

import inspect
import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from functools import partial
from traceback import walk_tb
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.parametrize import is_parametrized

from flwr_smartsplit.errors import NotSplittable
from flwr_smartsplit.split.fake_tensors import warnings_ignored
from flwr_smartsplit.split.huggingface import units_advice
from flwr_smartsplit.split.python_state import names_in_code
from flwr_smartsplit.split.segment import Batch, Unit
from flwr_smartsplit.split.submodules import modes_restored
from flwr_smartsplit.split.trace.conditions import (
    Conditions,
    check_answer,
    condition_text,
)
from flwr_smartsplit.split.trace.cut_points import (
    admissible_cuts,
    gradient_flags,
    is_reshaped,
    used_by,
    with_nearest,
)
from flwr_smartsplit.split.trace.facts import find_facts, no_new_state
from flwr_smartsplit.split.trace.guards import refuse_switches, trace_strictly
from flwr_smartsplit.split.trace.liveness import (
    Place,
    longest_needed,
    read_sizes_early,
)
from flwr_smartsplit.split.trace.op_recorder import NodeFacts, storages_of
from flwr_smartsplit.split.trace.selective_checkpointing import selective_function
from flwr_smartsplit.split.trace.subgraphs import Piece, compiled

AUGMENTED = "augmented assignment to"
"""The key of a node's ``meta`` for the value that Python would have changed."""

_FOREIGN = "argument of type: "  # What fx says of all that is no tensor.
_NOT_A_MODELS = ("torch", "flwr_smartsplit", "contextlib", "functools")


def _noting(operation: Callable[..., Any]) -> Callable[..., Any]:
    def augmented(self: fx.Proxy, other: Any) -> Any:
        result = operation(self, other)
        if isinstance(result, fx.Proxy):
            result.node.meta[AUGMENTED] = self.node
        return result

    return augmented


class _NotingProxy(fx.Proxy):
    """A proxy that notes ``x += y``, which fx reads as ``x = x + y``.

    It also tells Python how long it is, or which number, where shapes tell.
    """

    tracer: "_Tracer"

    def __getattr__(self, name: str) -> "_NotingAttribute":
        return _NotingAttribute(self, name)

    def __len__(self) -> int:
        return int(self.tracer.ask("len", self))

    def __index__(self) -> int:
        return operator.index(self.tracer.ask("index", self))

    def __int__(self) -> int:
        return int(self.tracer.ask("int", self))

    def __float__(self) -> float:
        return float(self.tracer.ask("float", self))

    __iadd__ = _noting(operator.add)
    __isub__ = _noting(operator.sub)
    __imul__ = _noting(operator.mul)
    __itruediv__ = _noting(operator.truediv)
    __ifloordiv__ = _noting(operator.floordiv)
    __imod__ = _noting(operator.mod)
    __ipow__ = _noting(operator.pow)
    __iand__ = _noting(operator.and_)
    __ior__ = _noting(operator.or_)
    __ixor__ = _noting(operator.xor)


class _NotingAttribute(fx.proxy.Attribute, _NotingProxy):
    """An attribute, such as a shape, or a method of a value."""


class _Tracer(fx.Tracer):
    """Keep every module without children whole, so that its mode stays live."""

    # Else values computed from buffers alone become constants of the trace.
    proxy_buffer_attributes = True

    def __init__(self, inputs: Batch) -> None:
        super().__init__()
        self.inputs = inputs
        self._conditions: Conditions | None = None

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Follow a condition on shapes, and let the model check it at each step."""
        return bool(self.ask("bool", obj))

    def iter(self, obj: Any) -> Iterator[Any]:
        """Take as many items as there are: of a shape, or of chunks."""
        return iter([obj[index] for index in range(len(obj))])

    def ask(self, question: str, obj: fx.Proxy) -> Any:
        """Ask what shapes tell, and let the model check it at each step."""
        if self._conditions is None:
            self._conditions = Conditions(self.root, self.inputs, self.graph)
        answer = self._conditions.answer(question, obj.node)
        args = obj.node, question, answer, condition_text(obj.node)
        self.create_node("call_function", check_answer, args, {})
        return answer

    def create_proxy(self, kind: str, *args: Any, **kwargs: Any) -> Any:
        """Make a node, unless fx would lose a switched-on context around it."""
        refuse_switches(f"{args[0]}" if args else kind)
        return super().create_proxy(kind, *args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        """Keep an output of transformers, which fx takes for a plain dict."""
        if isinstance(a, dict) and is_dataclass(a):
            a = self.create_proxy("call_function", type(a), (), dict(a))
        return super().create_arg(a)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Make a proxy that notes augmented assignments."""
        return _NotingProxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Say whether ``m`` is one node of the graph."""
        is_leaf = super().is_leaf_module(m, module_qualified_name) or not m._modules
        # A parametrization may write its buffers, without gradients.
        return is_leaf or is_parametrized(m) or _is_adapter(m)

    def create_args_for_root(
        self,
        root_fn: Callable[..., Any],
        is_module: bool,
        concrete_args: Any = None,
    ) -> tuple[Any, list[Any]]:
        """Call the root as the batch does: absent arguments keep their defaults."""
        del is_module, concrete_args
        names = input_names(self.root, self.inputs)
        proxies = [self.create_proxy("placeholder", name, (), {}) for name in names]

        def call(root: nn.Module, *values: Any) -> Any:
            if isinstance(self.inputs, dict):
                return root_fn(root, **dict(zip(names, values, strict=True)))
            return root_fn(root, *values)

        return call, [self.root, *proxies]


def _is_adapter(module: nn.Module) -> bool:
    """Say whether this is a layer of peft, around one that it adapts or replaces.

    Their forward branches on settings and dtypes.
    """
    is_peft = type(module).__module__.partition(".")[0] == "peft"
    return is_peft and not {"base_layer", "original_module"}.isdisjoint(module._modules)


def input_names(model: nn.Module, inputs: Batch) -> list[str]:
    """Name the tensors of a batch as the model's ``forward`` does.

    Raises ``NotSplittable`` if ``forward`` does not take them.
    """
    forward = inspect.signature(type(model).forward)
    try:
        if isinstance(inputs, dict):
            forward.bind(model, **inputs)
            return list(inputs)
        values = inputs if isinstance(inputs, tuple) else (inputs,)
        bound = forward.bind(model, *values)
    except TypeError as error:
        raise NotSplittable(
            f"forward{forward} of {type(model).__name__} does not take the example "
            f"inputs: {error}. Give them as a tensor, a tuple, or a dict by name."
        ) from error
    _, *names = (
        f"{name}_{index}" if isinstance(value, tuple) else name
        for name, value in bound.arguments.items()
        for index in range(len(value) if isinstance(value, tuple) else 1)
    )
    return names


def trace_units(
    model: nn.Module, example_inputs: Batch, *, max_boundary_tensors: int = 1
) -> tuple[tuple[Unit, ...], dict[str, str]]:
    """Read a model as a chain of units, which may be cut between any two.

    At most ``max_boundary_tensors`` tensors, besides sizes, may cross a cut. Also
    returns, for each place with few enough tensors that must not be cut, the reason and
    the nearest cut. Raises ``NotSplittable`` if torch.fx cannot trace the model.
    """
    with modes_restored(model), no_new_state(model, model):
        train_graph, kept = _trace(model.train(), example_inputs)
        eval_graph, eval_kept = _trace(model.eval(), example_inputs)
        facts = find_facts(model.train(), train_graph, example_inputs, kept)
        _refuse_lost_writes(train_graph, facts)
        is_other = bool(eval_kept) or not _is_same(model, train_graph, eval_graph)
        # A dropout may be an alias in evaluation only.
        writes = any(AUGMENTED in node.meta for node in eval_graph.nodes) or (
            max_boundary_tensors > 1 and any(fact.written for fact in facts.values())
        )
        eval_facts = {}
        if is_other or writes:
            eval_facts = find_facts(
                *(model.eval(), eval_graph, example_inputs, eval_kept),
                compares=is_other,
            )
            _refuse_lost_writes(eval_graph, eval_facts)
        if not is_reshaped(facts):
            read_sizes_early(train_graph)
            read_sizes_early(eval_graph)
        cuts, refusals = admissible_cuts(
            model,
            (train_graph, eval_graph),
            (facts, eval_facts),
            max_tensors=max_boundary_tensors,
        )
        train_parts = _pieces(train_graph, [train for train, _ in cuts])
        eval_parts = _pieces(eval_graph, [evaluate for _, evaluate in cuts])
        names = _unit_names(train_parts)
        units = tuple(
            _make_unit(model, name, parts, facts)
            for name, *parts in zip(names, train_parts, eval_parts, strict=True)
        )
    order = [node.name for node in train_graph.nodes]
    refused = {order.index(name): (name, why) for name, why in refusals.items()}
    refused = {**_needed_everywhere(train_graph, len(cuts)), **refused}
    places = [order.index(train.node.name) for train, _ in cuts]
    return units, with_nearest(refused, dict(zip(places, names, strict=False)))


def _is_same(model: nn.Module, train: fx.Graph, evaluate: fx.Graph) -> bool:
    """Say whether evaluation mode was compared with the model by comparing training."""
    return _listed(train) == _listed(evaluate) and not names_in_code(model, "training")


def _listed(graph: fx.Graph) -> list[Any]:
    """Describe a graph, with numbers in place of its nodes."""
    order = {node: ("node", index) for index, node in enumerate(graph.nodes)}
    return [
        (node.op, node.target, fx.map_arg((node.args, node.kwargs), order.get))
        for node in graph.nodes
    ]


def _refuse_lost_writes(graph: fx.Graph, facts: dict[fx.Node, NodeFacts]) -> None:
    """Raise ``NotSplittable`` for ``x += y`` where ``x``'s memory is used later."""
    nodes = list(graph.nodes)
    order = {node: index for index, node in enumerate(nodes)}
    for index, node in enumerate(nodes):
        target = node.meta.get(AUGMENTED)
        if target is None:
            continue
        written = storages_of(facts[target].value)
        aliases = {n for n in nodes[:index] if storages_of(facts[n].value) & written}
        later = {user for alias in aliases for user in alias.users}
        users = [user for user in later if order[user] > index]
        if users:
            raise NotSplittable(
                f"{node.name} is an augmented assignment, and {users[0].name} uses "
                "what it should have changed; torch.fx would lose the change. Write "
                "x = x + y, or x.add_(y)."
            )


def _needed_everywhere(graph: fx.Graph, num_cuts: int) -> dict[int, tuple[str, str]]:
    """Name the value that prevents more cuts than there are, and what to do."""
    found = longest_needed(graph)
    if found is None or found[1] <= num_cuts:
        return {}
    name, count = found
    nodes = list(graph.nodes)
    (index,) = (i for i, node in enumerate(nodes) if node.name == name)
    advice = "let it cross the cuts there: Task(max_boundary_tensors=...)"
    if nodes[index].op == "placeholder":
        advice = (
            "an input does not leave the device by itself. Where this one may, such as "
            "a padding mask, list the units by hand with Task(units_fn=...), and let "
            "each return what the next one needs: return hidden, mask"
        )
    return {index: (name, f"it is still needed next to {count} later values; {advice}")}


def trace_graph(model: nn.Module, inputs: Batch) -> fx.Graph:
    """Trace a model in its present mode; raise ``NotSplittable`` if that fails."""
    return _trace(model, inputs)[0]


@warnings_ignored()
def _trace(model: nn.Module, inputs: Batch) -> tuple[fx.Graph, frozenset[str]]:
    """Trace a model, and name what its forward assigns besides."""
    try:
        with _limits_traced():
            return trace_strictly(model, partial(_Tracer(inputs).trace, model))
    except NotSplittable as error:
        if not (place := _where(error)):
            raise
        raise NotSplittable(f"{error} It is {place}.") from error
    except Exception as error:
        said = str(error).partition(". ")[0].rstrip(".")
        if said.startswith(_FOREIGN):
            said = f"its forward returns {said.removeprefix(_FOREIGN)}, or passes it on"
        raise NotSplittable(
            f"torch.fx cannot trace {type(model).__name__}: {said}"
            f"{f' ({place})' if (place := _where(error)) else ''}. "
            f"Change that, or {units_advice(model)}."
        ) from error


@contextmanager
def _limits_traced() -> Iterator[None]:
    """Have ``torch.finfo(x.dtype)`` traced; a mask is filled with its ``min``."""
    before = torch.finfo

    def finfo(*args: Any) -> Any:
        dtype = args[0] if args else None
        if isinstance(dtype, fx.Proxy):
            return dtype.tracer.create_proxy("call_function", before, args, {})
        return before(*args)

    torch.finfo = finfo  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        torch.finfo = before  # type: ignore[misc]


def _where(error: Exception) -> str:
    """Name the last line that ran of code that is neither torch's nor ours."""
    lines = [
        f"line {line} of {frame.f_code.co_filename}, in {frame.f_code.co_qualname}"
        for frame, line in walk_tb(error.__traceback__)
        if frame.f_globals.get("__name__", "").partition(".")[0] not in _NOT_A_MODELS
    ]
    return lines[-1] if lines else ""


def _pieces(graph: fx.Graph, cuts: list[Place]) -> list[Piece]:
    """Divide the graph's nodes after each cut; the last piece ends the model."""
    nodes = list(graph.nodes)
    bounds = [0, *(nodes.index(cut.node) + 1 for cut in cuts), len(nodes)]
    places = [None, *cuts, None]
    return [
        Piece(nodes[low:high], entering, leaving)
        for (low, high), (entering, leaving) in zip(
            itertools.pairwise(bounds), itertools.pairwise(places), strict=True
        )
    ]


def _unit_names(pieces: list[Piece]) -> list[str]:
    """Name each piece uniquely by its last module, or else its last node."""
    names: list[str] = []
    for piece in pieces:
        modules = [str(n.target) for n in piece.nodes if n.op == "call_module"]
        others = [n.name for n in piece.nodes if n.op not in ("output", "get_attr")]
        name = modules[-1] if modules else (others or ["output"])[-1]
        names.append(name if name not in names else others[-1])
    return names


def _make_unit(
    model: nn.Module,
    name: str,
    parts: Sequence[Piece],
    facts: dict[fx.Node, NodeFacts],
) -> Unit:
    train, evaluate = parts
    nodes = (*train.nodes, *evaluate.nodes)
    own = [facts[node] for node in train.nodes if node in facts]
    can_rerun = all(fact.repeats for fact in own)
    reads = {str(used.target) for node in nodes for used in used_by(node)}
    return Unit(
        name=name,
        forward=compiled(model, train),
        eval_forward=compiled(model, evaluate),
        reads=tuple(sorted(reads)),
        is_random=any(fact.is_random for fact in own),
        selective_forward=selective_function(model, train, facts),
        gradients=gradient_flags(train.leaving, facts),
        writes=tuple(sorted({name for fact in own for name in fact.changed_state})),
        can_rerun=can_rerun,
        changed=tuple(sorted({what for fact in own for what in fact.changed})),
        rereads=tuple(sorted({what for fact in own for what in fact.rereads})),
    )
