"""From a module's forward to a chain of units.

A model is traced twice, in training and in evaluation mode, because the two may
run different code; a place counts only where both can be cut.
"""

import inspect
import itertools
import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import fx, nn

from flwr_smartsplit.errors import NotSplittable
from flwr_smartsplit.split.fake_tensors import warnings_ignored
from flwr_smartsplit.split.segment import Batch, Unit
from flwr_smartsplit.split.submodules import modes_restored
from flwr_smartsplit.split.trace.cut_points import (
    admissible_cuts,
    find_facts,
    gradient_flags,
    is_reshaped,
    used_by,
    with_nearest,
)
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
"""Where a node's ``meta`` names the value that Python would have changed."""


class _NotingProxy(fx.Proxy):
    """A stand-in that notes ``x += y``, which fx reads as ``x = x + y``."""

    def _augmented(self, operation: Callable[..., Any], other: Any) -> Any:
        result = operation(self, other)
        if isinstance(result, fx.Proxy):
            result.node.meta[AUGMENTED] = self.node
        return result

    def __iadd__(self, other: Any) -> Any:
        return self._augmented(operator.add, other)

    def __isub__(self, other: Any) -> Any:
        return self._augmented(operator.sub, other)

    def __imul__(self, other: Any) -> Any:
        return self._augmented(operator.mul, other)

    def __itruediv__(self, other: Any) -> Any:
        return self._augmented(operator.truediv, other)

    def __ifloordiv__(self, other: Any) -> Any:
        return self._augmented(operator.floordiv, other)

    def __imod__(self, other: Any) -> Any:
        return self._augmented(operator.mod, other)

    def __ipow__(self, other: Any) -> Any:
        return self._augmented(operator.pow, other)

    def __iand__(self, other: Any) -> Any:
        return self._augmented(operator.and_, other)

    def __ior__(self, other: Any) -> Any:
        return self._augmented(operator.or_, other)

    def __ixor__(self, other: Any) -> Any:
        return self._augmented(operator.xor, other)


class _Tracer(fx.Tracer):
    """Keep every module without children whole, so that its mode stays live."""

    # Else what is computed from buffers alone is computed once, while tracing.
    proxy_buffer_attributes = True

    def __init__(self, inputs: Batch) -> None:
        super().__init__()
        self.inputs = inputs

    def create_proxy(self, kind: str, *args: Any, **kwargs: Any) -> Any:
        """Make a node, unless it would lose what is switched around it."""
        refuse_switches(f"{args[0]}" if args else kind)
        return super().create_proxy(kind, *args, **kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Make the stand-in for a value; it notes augmented assignments."""
        return _NotingProxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Say whether ``m`` is one node of the graph."""
        return super().is_leaf_module(m, module_qualified_name) or not m._modules

    def create_args_for_root(
        self,
        root_fn: Callable[..., Any],
        is_module: bool,
        concrete_args: Any = None,
    ) -> tuple[Any, list[Any]]:
        """Call the root as the batch does: what it leaves out keeps its default."""
        del is_module, concrete_args
        names = input_names(self.root, self.inputs)
        proxies = [self.create_proxy("placeholder", name, (), {}) for name in names]

        def call(root: nn.Module, *values: Any) -> Any:
            if isinstance(self.inputs, dict):
                return root_fn(root, **dict(zip(names, values, strict=True)))
            return root_fn(root, *values)

        return call, [self.root, *proxies]


def input_names(model: nn.Module, inputs: Batch) -> list[str]:
    """Name the tensors of a batch as the model's ``forward`` does.

    Raises
    ------
    NotSplittable
        If ``forward`` does not take them.
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
    """Read a model as a chain of units.

    Parameters
    ----------
    model : nn.Module
        Any module that torch.fx can trace; its parameters may be on meta.
    example_inputs : Tensor, tuple[Tensor, ...] or dict[str, Tensor]
        One batch, ``(batch, *input shape)`` each; only shapes and dtypes matter.
    max_boundary_tensors : int
        The most tensors that may cross a cut, besides sizes.

    Returns
    -------
    units : tuple[Unit, ...]
        The chain; cuts are possible between any two neighbours.
    refusals : dict[str, str]
        For each place with few enough tensors that must not be cut, the reason and the
        nearest place that can be.

    Raises
    ------
    NotSplittable
        If torch.fx cannot trace the model.
    """
    with modes_restored(model):
        train_graph = _trace(model.train(), example_inputs)
        eval_graph = _trace(model.eval(), example_inputs)
        facts = find_facts(model.train(), train_graph, example_inputs)
        _refuse_lost_writes(train_graph, facts)
        if any(AUGMENTED in node.meta for node in eval_graph.nodes):
            # A dropout may be an alias in evaluation only.
            eval_facts = find_facts(model.eval(), eval_graph, example_inputs)
            _refuse_lost_writes(eval_graph, eval_facts)
        if not is_reshaped(facts):
            read_sizes_early(train_graph)
            read_sizes_early(eval_graph)
        cuts, refusals = admissible_cuts(
            model,
            train_graph,
            eval_graph,
            facts,
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
    if not cuts and not refused:
        refused = _needed_everywhere(train_graph)
    places = [order.index(train.node.name) for train, _ in cuts]
    return units, with_nearest(refused, dict(zip(places, names, strict=False)))


def _refuse_lost_writes(graph: fx.Graph, facts: dict[fx.Node, NodeFacts]) -> None:
    """Refuse ``x += y`` where something else looks at ``x``'s memory later.

    Raises
    ------
    NotSplittable
        Naming the operation.
    """
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


def _needed_everywhere(graph: fx.Graph) -> dict[int, tuple[str, str]]:
    """Say of a graph without a single live value which one is in the way most."""
    found = longest_needed(graph)
    if found is None:
        return {}
    name, count = found
    return {0: (name, f"it is still needed next to {count} later values")}


@warnings_ignored()
def _trace(model: nn.Module, inputs: Batch) -> fx.Graph:
    try:
        return trace_strictly(model, partial(_Tracer(inputs).trace, model))
    except NotSplittable:
        raise
    except Exception as error:
        raise NotSplittable(
            f"torch.fx cannot trace {type(model).__name__}: {error}. Its forward must "
            "not branch on the values of tensors; or list its units by hand, with "
            "Chain.from_units and Task(units_fn=...)."
        ) from error


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
    """Name each piece by its last module, or else its last node; each name once."""
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
    reads = {str(used.target) for node in nodes for used in used_by(node)}
    return Unit(
        name=name,
        forward=compiled(model, train),
        eval_forward=compiled(model, evaluate),
        reads=tuple(sorted(reads)),
        is_random=any(facts[n].is_random for n in train.nodes if n in facts),
        selective_forward=selective_function(model, train, facts),
        gradients=gradient_flags(train.leaving, facts),
        changes_buffers=any(facts[n].changes_model for n in train.nodes if n in facts),
    )
