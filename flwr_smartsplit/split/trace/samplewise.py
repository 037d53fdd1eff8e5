"""Whether a part of a model's graph treats the samples of a batch one by one.

Only then may a device run it slice by slice. It is read off the graph by a list of
what is known to keep dimension 0 as independent samples; whatever is not on the list,
or not provably used so, counts as mixing. What operations do to values is in
``samplewise_calls``; here is what becomes of modules and of the whole.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, fx, nn

from flwr_smartsplit.split.trace.op_recorder import NodeFacts, storages_of
from flwr_smartsplit.split.trace.samplewise_calls import (
    ATTENTION,
    CALLS,
    Call,
    Doubt,
    Kind,
    constant_call,
    require,
)

Check = Callable[[Any, int], bool]
"""``check(module, rank)`` says whether it keeps apart the samples of such an input."""

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks")


class SampleReader:
    """Read a graph piece by piece, in order, and follow what becomes of the samples.

    Parameters
    ----------
    model : nn.Module
        The model that the graph was traced from.
    facts : Mapping[fx.Node, NodeFacts]
        What a dry run saw of each node.
    """

    def __init__(self, model: nn.Module, facts: Mapping[fx.Node, NodeFacts]) -> None:
        self._model = model
        self._facts = facts
        self._kinds: dict[fx.Node, Kind] = {}

    def treats_apart(self, nodes: Iterable[fx.Node], entering: fx.Node | None) -> bool:
        """Say whether a piece provably does to each sample as if it were alone.

        Parameters
        ----------
        nodes : Iterable[fx.Node]
            The next piece.
        entering : fx.Node or None
            The node before it whose value enters, dimension 0 being the samples; None
            where the batch enters.
        """
        if entering is not None:
            self._kinds[entering] = Kind.SAMPLES
        try:
            for node in nodes:
                if node.op != "output":
                    kind = _kind_of(self._model, node, self._kinds, self._facts)
                    _check_facts(self._model, node, kind, self._facts)
                    self._kinds[node] = kind
        except Doubt:
            return False
        return True


def same_code(one: Iterable[fx.Node], other: Iterable[fx.Node]) -> bool:
    """Say whether two pieces of graphs do the same, name for name."""
    return list(map(_text, one)) == list(map(_text, other))


def _text(node: fx.Node) -> tuple[str, ...]:
    return node.op, node.name, str(node.target), repr(node.args), repr(node.kwargs)


def _kind_of(
    model: nn.Module,
    node: fx.Node,
    kinds: dict[fx.Node, Kind],
    facts: Mapping[fx.Node, NodeFacts],
) -> Kind:
    """Tell what a node's value is, or doubt."""
    if node.op == "placeholder":
        return Kind.SAMPLES
    if node.op == "get_attr":
        return Kind.CONSTANT
    for source in node.all_input_nodes:
        if source not in kinds and source.op == "get_attr":
            kinds[source] = Kind.CONSTANT  # It was read before the piece began.
    call = Call(node, kinds, facts)
    if node.op == "call_module":
        return _module_kind(model.get_submodule(str(node.target)), call)
    if all(kinds.get(n) is Kind.CONSTANT for n in node.all_input_nodes):
        return constant_call(call)
    rule = CALLS.get(node.target)
    if rule is None:
        raise Doubt
    return rule(call)


def _module_kind(module: nn.Module, call: Call) -> Kind:
    """Tell what a module makes of samples; its type must be one that is known."""
    require(not any(getattr(module, hooks) for hooks in _HOOKS))
    if type(module) is nn.MultiheadAttention:
        return _attention_kind(module, call)
    check = _MODULES.get(type(module)) or _BY_NAME.get(_full_name(module))
    (inputs,) = call.args if len(call.args) == 1 and not call.kwargs else (None,)
    if check is None:
        raise Doubt
    require(call.kind(inputs) is Kind.SAMPLES and check(module, call.rank(inputs)))
    return call.result()


def _attention_kind(module: nn.MultiheadAttention, call: Call) -> Kind:
    inputs = [*call.args, *(v for v in call.kwargs.values() if isinstance(v, fx.Node))]
    apart = (call.kind(i) is Kind.SAMPLES and call.rank(i) == 3 for i in inputs)  # noqa: PLR2004
    switches = {"query", "key", "value", "need_weights", "average_attn_weights"}
    masks = [v for k, v in call.kwargs.items() if k not in switches]
    is_plain = len(inputs) == 3 and all(apart) and masks == [None] * len(masks)  # noqa: PLR2004
    require(is_plain and module.batch_first and module.bias_k is None)
    return call.result()


def _check_facts(
    model: nn.Module,
    node: fx.Node,
    kind: Kind,
    facts: Mapping[fx.Node, NodeFacts],
) -> None:
    """Compare with the dry run: two samples, no chance, and nothing given is written.

    A front runs twice on each slice, so it must not write into the batch.
    """
    fact = facts[node]
    require(not fact.is_random or _keeps_all(model, node))
    if kind is Kind.SAMPLES:
        is_tensor = isinstance(fact.value, Tensor) and fact.value.dim() > 0
        require(is_tensor and fact.value.shape[0] == NUM_SAMPLES)
    if fact.written:
        given = (n for n in node.graph.nodes if n.op in ("placeholder", "get_attr"))
        require(not any(fact.written & storages_of(facts[n].value) for n in given))


def _keeps_all(model: nn.Module, node: fx.Node) -> bool:
    """Say whether a random operation is one that drops nothing, so that chance is idle.

    Dropout draws its mask even at a probability of 0, and attention is called random.
    """
    if node.op != "call_module":
        fraction = node.kwargs.get("dropout_p", 0.0)
        return bool(node.target is ATTENTION and fraction == 0.0)
    module = model.get_submodule(str(node.target))
    if type(module) is nn.MultiheadAttention:
        return bool(module.dropout == 0.0)
    is_dropout = isinstance(module, nn.modules.dropout._DropoutNd)
    return is_dropout and bool(module.p == 0.0)


NUM_SAMPLES = 2
"""How many samples the dry run of ``cuttable.find_facts`` has."""


def _full_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


# --- modules --------------------------------------------------------------------------


def _any(module: Any, rank: int) -> bool:
    del module
    return rank >= 1


def _at_least(least: int) -> Check:
    return lambda module, rank: rank >= least


def _exactly(wanted: int) -> Check:
    """Take inputs of one rank: torch reads those with one less as one sample."""
    return lambda module, rank: rank == wanted


def _shape_norm(module: Any, rank: int) -> bool:
    return len(module.normalized_shape) < rank


def _instance_norm(wanted: int) -> Check:
    return lambda module, rank: rank == wanted and not module.track_running_stats


def _other_dim(module: Any, rank: int) -> bool:
    dim = module.dim
    return isinstance(dim, int) and dim % rank != 0


def _flatten(module: Any, rank: int) -> bool:
    return bool(module.start_dim % rank != 0)


def _padding(module: Any, rank: int) -> bool:
    padding = module.padding
    return isinstance(padding, tuple) and len(padding) // 2 < rank


def _embedding(module: Any, rank: int) -> bool:
    # The others write into the weight, count within the batch, or add up sparsely.
    is_plain = module.max_norm is None and not module.scale_grad_by_freq
    return rank >= 1 and is_plain and not module.sparse


_POINTWISE = (
    "CELU Dropout Dropout1d Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout ELU "
    "GELU Hardshrink Hardsigmoid Hardswish Hardtanh Identity LeakyReLU LogSigmoid Mish "
    "ReLU ReLU6 SELU SiLU Sigmoid Softplus Softshrink Softsign Tanh Tanhshrink "
    "Threshold"
)
_SPATIAL = "Conv{}d ConvTranspose{}d AvgPool{}d MaxPool{}d LPPool{}d "
_SPATIAL += "AdaptiveAvgPool{}d AdaptiveMaxPool{}d"
_PADDINGS = "ZeroPad{0}d ConstantPad{0}d ReflectionPad{0}d ReplicationPad{0}d"


def _types(names: str, check: Check) -> dict[type[nn.Module], Check]:
    found = {name: getattr(nn, name, None) for name in names.split()}
    return {kind: check for kind in found.values() if kind is not None}


_MODULES: dict[type[nn.Module], Check] = {
    **_types(_POINTWISE, _any),
    **_types("Linear PReLU GroupNorm", _at_least(2)),
    **_types("LocalResponseNorm Upsample", _at_least(3)),
    **_types("PixelShuffle PixelUnshuffle ChannelShuffle", _at_least(4)),
    **_types("LayerNorm RMSNorm", _shape_norm),
    **_types("Softmax LogSoftmax Softmin GLU Unflatten", _other_dim),
    **_types("Softmax2d", _exactly(4)),
    **_types("Flatten", _flatten),
    **_types("Embedding", _embedding),
}
for _dims in (1, 2, 3):
    _MODULES |= _types(_SPATIAL.format(*[_dims] * 7), _exactly(_dims + 2))
    _MODULES |= _types(_PADDINGS.format(_dims), _padding)
    _MODULES |= _types(f"InstanceNorm{_dims}d", _instance_norm(_dims + 2))

# By name, because the package does not need torchvision.
_BY_NAME: dict[str, Check] = {
    "torchvision.models.convnext.LayerNorm2d": _exactly(4),
    "torchvision.ops.misc.Permute": lambda module, rank: module.dims[0] == 0,
    # It is random unless it keeps all.
    "torchvision.ops.stochastic_depth.StochasticDepth": _any,
}
