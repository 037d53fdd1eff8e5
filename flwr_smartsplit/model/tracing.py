"""From a module's forward to a chain of units.

A model is traced twice, in training and in evaluation mode, because the two may
run different code; a place counts only where both can be cut.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx, nn

from flwr_smartsplit.errors import NotSplittable
from flwr_smartsplit.model.cuttable import (
    NodeFacts,
    admissible_cuts,
    find_facts,
    used_by,
)
from flwr_smartsplit.model.segment import Unit


class _Tracer(fx.Tracer):
    """Keep every module without children whole, so that its mode stays live."""

    # Else what is computed from buffers alone is computed once, while tracing.
    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Say whether ``m`` is one node of the graph."""
        return super().is_leaf_module(m, module_qualified_name) or not m._modules


def trace_units(
    model: nn.Module, example_inputs: tuple[Tensor, ...]
) -> tuple[tuple[Unit, ...], dict[str, str]]:
    """Read a model as a chain of units.

    Parameters
    ----------
    model : nn.Module
        Any module that torch.fx can trace; its parameters may be on meta.
    example_inputs : tuple[Tensor, ...]
        One batch, ``(batch, *input shape)`` each; only shapes and dtypes matter.

    Returns
    -------
    units : tuple[Unit, ...]
        The chain; cuts are possible between any two neighbours.
    refusals : dict[str, str]
        For each single-tensor place that must not be cut, the reason.

    Raises
    ------
    NotSplittable
        If torch.fx cannot trace the model.
    """
    with _modes_restored(model):
        train_graph = _trace(model.train())
        eval_graph = _trace(model.eval())
        facts = find_facts(model.train(), train_graph, example_inputs)
        cuts, refusals = admissible_cuts(model, train_graph, eval_graph, facts)
        train_parts = _pieces(train_graph, [train for train, _ in cuts])
        eval_parts = _pieces(eval_graph, [evaluate for _, evaluate in cuts])
        names = _unit_names(train_parts)
        units = tuple(
            _make_unit(model, name, (train, evaluate), facts)
            for name, train, evaluate in zip(
                names, train_parts, eval_parts, strict=True
            )
        )
    return units, refusals


@contextmanager
def _modes_restored(model: nn.Module) -> Iterator[None]:
    """Put every submodule's training flag back afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def _trace(model: nn.Module) -> fx.Graph:
    try:
        return _Tracer().trace(model)
    except Exception as error:
        raise NotSplittable(
            f"torch.fx cannot trace {type(model).__name__}: {error}. "
            "Its forward must not branch on the values of tensors."
        ) from error


def _pieces(graph: fx.Graph, cuts: list[fx.Node]) -> list[list[fx.Node]]:
    """Divide the graph's nodes after each cut; the last piece ends the model."""
    nodes = list(graph.nodes)
    bounds = [0, *(nodes.index(cut) + 1 for cut in cuts), len(nodes)]
    return [nodes[low:high] for low, high in itertools.pairwise(bounds)]


def _unit_names(pieces: list[list[fx.Node]]) -> list[str]:
    """Name each piece by its last module, or else its last node; each name once."""
    names: list[str] = []
    for piece in pieces:
        modules = [str(n.target) for n in piece if n.op == "call_module"]
        others = [n.name for n in piece if n.op not in ("output", "get_attr")]
        name = modules[-1] if modules else (others or ["output"])[-1]
        names.append(name if name not in names else others[-1])
    return names


def _make_unit(
    model: nn.Module,
    name: str,
    pieces: tuple[list[fx.Node], list[fx.Node]],
    facts: dict[fx.Node, NodeFacts],
) -> Unit:
    train, evaluate = pieces
    reads = {str(used.target) for n in (*train, *evaluate) for used in used_by(n)}
    return Unit(
        name=name,
        train_forward=_function(model, train),
        eval_forward=_function(model, evaluate),
        targets=tuple(sorted(reads)),
        is_random=any(facts[n].is_random for n in train if n in facts),
    )


def _function(model: nn.Module, piece: list[fx.Node]) -> Callable[..., Any]:
    """Compile one piece of a graph into ``forward(root, *inputs)``."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    inside = set(piece)

    def copy_of(node: fx.Node) -> fx.Node:
        if node not in copies:
            if node not in inside and node.op != "get_attr":
                copies[node] = graph.placeholder("boundary")
            else:
                copies[node] = graph.node_copy(node, copy_of)
        return copies[node]

    entering = [
        source
        for node in piece
        for source in node.all_input_nodes
        if source not in inside and source.op != "get_attr"
    ]
    for source in dict.fromkeys(entering):
        copy_of(source)
    for node in piece:
        if node.op not in ("output", "get_attr"):
            copy_of(node)
    last = piece[-1]
    if last.op == "output":
        result = fx.map_arg(last.args[0], copy_of)
    else:
        result = copy_of(last)
    graph.output(result)
    return type(fx.GraphModule(model, graph)).forward
