"""Why a place in a model can or cannot be cut.

A place is a node of the model's graph after which few tensors are still needed; all of
them cross. Gradients that are summed on both sides of a cut are summed in the stock
model's order: autograd runs operations in reverse, so the far side's sum comes first. A
dry run under fake tensors shows which storages each operation writes, whether it draws
random numbers, and whether its value needs a gradient. Guessing from names would miss
functional and user-written operations.
"""

from collections.abc import Collection, Iterable, Mapping
from itertools import combinations
from types import FunctionType
from typing import Any

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from flwr_smartsplit.split.trace.facts import shape_of
from flwr_smartsplit.split.trace.liveness import Place, live_places
from flwr_smartsplit.split.trace.op_recorder import NodeFacts, storages_of


def is_reshaped(facts: Mapping[fx.Node, NodeFacts]) -> bool:
    """Say whether any tensor changed its shape after it was made."""
    return any(fact.shape != shape_of(fact.value) for fact in facts.values())


def used_by(node: fx.Node) -> list[fx.Node]:
    """List what a node uses of the model: its module, parameters and constants.

    A parameter belongs where it is used; torch.fx reads it once for all its uses.
    """
    module = [node] if node.op == "call_module" else []
    return module + [n for n in node.all_input_nodes if n.op == "get_attr"]


def admissible_cuts(
    model: nn.Module,
    graphs: tuple[fx.Graph, fx.Graph],
    known: tuple[dict[fx.Node, NodeFacts], dict[fx.Node, NodeFacts]],
    *,
    max_tensors: int = 1,
) -> tuple[list[tuple[Place, Place]], dict[str, str]]:
    """Keep the places that can be cut without changing a number.

    Returns pairs of the same place in the training and the evaluation graph, in order;
    and the reason for each other place with at most ``max_tensors`` live tensors. What
    is ``known`` of evaluation may be nothing, where no operation writes in place.
    """
    (train_graph, eval_graph), (facts, eval_facts) = graphs, known
    order = {node: index for index, node in enumerate(eval_graph.nodes)}
    reached = grad_nodes(facts[list(train_graph.nodes)[-1]].value)
    others = {n.name: p for n, p in live_places(eval_graph, max_tensors).items()}
    kept: list[tuple[Place, Place]] = []
    refusals = {}
    for node, place in live_places(train_graph, max_tensors).items():
        other = others.get(node.name)
        reason = _refusal(model, place, facts, reached)
        if reason is None and other is None:
            reason = "evaluation mode has no such place"
        if reason is None and other is not None:
            if kept and order[other.node] < order[kept[-1][1].node]:
                reason = "evaluation mode comes to it in another order"
            elif [n.name for n in other.tensors] != [n.name for n in place.tensors]:
                reason = "evaluation mode needs other tensors after it"
            else:
                reason = (
                    _tied(model, facts, node, other.node)
                    or _kept_apart(facts, node, other.node)
                    or _one_in_evaluation(eval_facts, other)
                )
        if reason is None and other is not None:
            kept.append((place, other))
        else:
            refusals[node.name] = str(reason)
    return kept, refusals


def gradient_flags(
    place: Place | None, facts: Mapping[fx.Node, NodeFacts]
) -> tuple[bool, ...]:
    """Say for each tensor that crosses at a place whether a gradient comes back."""
    if place is None:
        return ()
    needed = (facts[node].value.requires_grad for node in place.tensors)
    return (*needed, *(False for _ in place.sizes))


def grad_nodes(outputs: Any) -> set[Any]:
    """Find all autograd nodes that backward reaches from outputs."""
    tensors = (leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor))
    waiting = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    reached = set(waiting)
    while waiting:
        for source, _ in waiting.pop().next_functions:
            if source is not None and source not in reached:
                reached.add(source)
                waiting.append(source)
    return reached


def _refusal(
    model: nn.Module,
    place: Place,
    facts: dict[fx.Node, NodeFacts],
    reached: set[Any],
) -> str | None:
    """Say why the tensors of a place must not be a boundary, or None."""
    before, after = _sides(place.node)
    for node in place.tensors:
        problem = _value_problem(facts[node].value)
        if problem:
            return problem if node is place.node else f"{node.name} crosses: {problem}"
    values = [facts[node].value for node in place.tensors]
    trained = [value for value in values if value.requires_grad]
    if not trained:
        read = {str(used.target) for node in before for used in used_by(node)}
        tensors = _tensors_of(model, read).values()
        frozen = [p for name, p in model.named_parameters() if name in tensors]
        if not frozen:
            return "no layer with parameters is before it"
        if any(parameter.requires_grad for parameter in frozen):
            return "no gradient comes back to it"
    elif not any(value.grad_fn in reached for value in trained):
        return "no gradient comes back to it"
    inputs = [n for n in before if n.op == "placeholder"]
    for node in place.tensors[:-1]:
        for given in inputs:
            if storages_of(facts[given].value) & storages_of(facts[node].value):
                return f"the input {given.name} is needed after it, and must not leave"
    return (
        overwritten(values, _named(after, facts))
        or _shared_state(facts, before, after)
        or _shared_gradients(place, facts, set(after))
    )


def _shared_state(
    facts: Mapping[fx.Node, NodeFacts],
    before: Iterable[fx.Node],
    after: Iterable[fx.Node],
) -> str | None:
    """Say what both sides can reach that one of them changes, or None."""
    sides = [[facts[n] for n in side if n in facts] for side in (before, after)]
    return shared_state(*sides)


def shared_state(before: Iterable[NodeFacts], after: Iterable[NodeFacts]) -> str | None:
    """Say what two sides can reach that one of them changes, or None."""
    first, second = (
        frozenset().union(*(fact.reached for fact in side)) for side in (before, after)
    )
    both = first & second
    for fact in (*before, *after):
        for name, owner in fact.changed.items():
            if owner in both:
                return (
                    f"both sides of it use what {name.lstrip('.')} is in, and change it"
                )
    return None


def _value_problem(value: Any) -> str | None:
    if not isinstance(value, Tensor):
        return f"its value is a {type(value).__name__}, not one tensor"
    if value.is_conj() or value.is_neg():
        return "it is a conjugate or negative view"
    return None


def _shared_gradients(
    place: Place, facts: Mapping[fx.Node, NodeFacts], after: set[fx.Node]
) -> str | None:
    """Say which two tensors would get gradients in the same memory, or None.

    A sum or a concatenation gives its terms one gradient, or parts of one. Beyond a cut
    they would be separate, and take more memory than in the model.
    """
    users: dict[fx.Node, fx.Node] = {}
    edges: dict[Any, fx.Node] = {}
    for node in place.tensors:
        value = facts[node].value
        if not value.requires_grad:
            continue
        first = edges.setdefault((value.grad_fn, value.output_nr), node)
        if first is not node:
            return f"{first.name} and {node.name} are one tensor"
        user = _only_user(node, facts, after)
        other = user and users.setdefault(user, node)
        if user and other and other is not node:
            return (
                f"{user.name} alone uses {other.name} and {node.name}, whose gradients "
                "may share memory"
            )
    return None


def _only_user(
    node: fx.Node, facts: Mapping[fx.Node, NodeFacts], after: set[fx.Node]
) -> fx.Node | None:
    """Find the one operation that uses a value, or a view of it, later."""
    users = [user for user in node.users if user in after]
    if len(users) != 1:
        return None
    (user,) = users
    if user.op != "output" and (
        storages_of(facts[user].value) & storages_of(facts[node].value)
    ):
        return _only_user(user, facts, after)
    return user


def overwritten(value: Any, later: Mapping[str, NodeFacts]) -> str | None:
    """Say which later operation writes into a value in place, or None."""
    storages = storages_of(value)
    for name, facts in later.items():
        if facts.written & storages:
            return f"{name} writes into it, or a view of it, in place"
    return None


def _one_in_evaluation(facts: Mapping[fx.Node, NodeFacts], place: Place) -> str | None:
    """Say which later operation writes into two tensors of a place at once, or None.

    Where dropout does nothing, its result is what it was given; beyond a cut they would
    be two.
    """
    if not facts:
        return None
    values = [facts[node].value for node in place.tensors]
    pairs = combinations(values, 2)
    twins = [two for one, two in pairs if storages_of(one) & storages_of(two)]
    _, after = _sides(place.node)
    reason = overwritten(twins, _named(after, facts))
    return reason and f"two of its tensors are one in evaluation, and {reason}"


def _named(
    nodes: Iterable[fx.Node], facts: Mapping[fx.Node, NodeFacts]
) -> dict[str, NodeFacts]:
    """Find what is known of operations, by their names."""
    return {node.name: facts[node] for node in nodes if node.op != "output"}


def _sides(place: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """Divide a graph's nodes into those up to a place and those after it."""
    nodes = list(place.graph.nodes)
    after = nodes.index(place) + 1
    return nodes[:after], nodes[after:]


def _tied(
    model: nn.Module, facts: Mapping[fx.Node, NodeFacts], *places: fx.Node
) -> str | None:
    """Say whether a tensor is used on both sides of a place, in either mode."""
    sides = zip(*map(_sides, places), strict=True)
    before, after = (
        {str(used.target) for nodes in side for node in nodes for used in used_by(node)}
        for side in sides
    )
    written = {name for fact in facts.values() for name in fact.changed_state}
    return tied(model, before, after, written=written)


def _kept_apart(facts: Mapping[fx.Node, NodeFacts], *places: fx.Node) -> str | None:
    """Say whether code that keeps something runs before it in one mode, or None.

    And after it in the other: each side would keep its own.
    """
    changed = {
        node.target: name
        for node, fact in facts.items()
        for name in fact.changed
        if node.op == "call_module" or isinstance(node.target, FunctionType)
    }
    before, after = (
        {node.target for nodes in side for node in nodes}
        for side in zip(*map(_sides, places), strict=True)
    )
    for target in before & after & changed.keys():
        name = changed[target].lstrip(".")
        return f"training and evaluation change {name} on different sides of it"
    return None


def tied(
    model: nn.Module,
    before: Iterable[str],
    after: Iterable[str],
    *,
    written: Collection[str],
) -> str | None:
    """Say which tensor is used on both sides, by what each uses of the model.

    Frozen parameters that forward does not write may be: each side has them, and they
    stay the same.
    """
    first, second = _tensors_of(model, before), _tensors_of(model, after)
    named = list(model.named_parameters(remove_duplicate=False))
    changing = {id(p) for n, p in named if p.requires_grad or n in written}
    frozen = {id(parameter) for _, parameter in named} - changing
    both = first.keys() & second.keys() - frozen
    names = sorted({first[key] for key in both})
    if not names:
        return None
    return f"both sides of it use {', '.join(names)}"


def _tensors_of(model: nn.Module, targets: Iterable[str]) -> dict[int, str]:
    """Identify and name the parameters, buffers and constants behind targets."""
    tensors: dict[int, str] = {}
    for target in targets:
        path, _, name = target.rpartition(".")
        thing = getattr(model.get_submodule(path), name)
        if not isinstance(thing, nn.Module):
            tensors.setdefault(id(thing), target)
            continue
        for inner, tensor in (*thing.named_parameters(), *thing.named_buffers()):
            tensors.setdefault(id(tensor), f"{target}.{inner}")
    return tensors


def with_nearest(
    refused: Mapping[int, tuple[str, str]], cuts: Mapping[int, str]
) -> dict[str, str]:
    """Add the nearest possible cut to each refusal (name, reason), by position."""
    explained = {}
    for position, (name, reason) in refused.items():
        advice = "no other place can be cut"
        if cuts:
            nearest = min(cuts, key=lambda cut: abs(cut - position))
            advice = f"the nearest cut is after {cuts[nearest]}"
        explained[name] = f"{reason}; {advice}"
    return explained
