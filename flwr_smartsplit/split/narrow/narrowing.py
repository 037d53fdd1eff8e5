"""narrowed_module: a smaller module that keeps some of a model's channels.

Its parameters are slices, its layers have fewer channels, and its names are the
model's own. Values may be on meta.
"""

import copy
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flwr_smartsplit.errors import InvalidTask
from flwr_smartsplit.split.narrow.operations import (
    BATCH_NORMS,
    CONVOLUTIONS,
    INSTANCE_NORMS,
)
from flwr_smartsplit.types import (
    ChannelGroup,
    Region,
    Variant,
    kept_problem,
    regions_of,
)


def narrowed_module(
    model: nn.Module, groups: Sequence[ChannelGroup], variant: Variant
) -> nn.Module:
    """Copy a model with the channels that a variant keeps.

    Raises ``InvalidTask`` if the variant is not one of a model with these groups.
    """
    problem = kept_problem(variant, groups)
    if problem:
        raise InvalidTask(
            f"variant {variant.name!r} is not known here: {problem}. Use one version "
            "and one task everywhere."
        )
    regions = regions_of(groups, variant)
    state = model.state_dict(keep_vars=True)
    made: dict[int, Any] = {}  # One tensor under two names stays one.
    for name, region in regions.items():
        if id(state[name]) not in made:
            made[id(state[name])] = _sliced(state[name], region)
    small = copy.deepcopy(model, made)
    parameters = zip(model.parameters(), small.parameters(), strict=True)
    for before, after in parameters:  # An optimizer_fn may look at attributes.
        vars(after).update(vars(before))
    _say_sizes(small, regions.keys())
    if variant.is_scaled:
        _scale(small, groups, variant)
    return small


def _sliced(tensor: Tensor, region: Region) -> Tensor:
    """Take a region of a tensor, in its layout and role."""
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=strides.__getitem__, reverse=True)
    values = tensor.detach().permute(order)
    for axis, indices in enumerate(region):
        if indices is not None:
            at = torch.from_numpy(indices).to(tensor.device)
            values = values.index_select(order.index(axis), at)
    back = sorted(range(tensor.dim()), key=order.__getitem__)
    values = values.contiguous().permute(back)
    if isinstance(tensor, nn.Parameter):
        values = nn.Parameter(values, requires_grad=tensor.requires_grad)
    return values


def _say_sizes(model: nn.Module, names: Collection[str]) -> None:
    """Tell the layers that were sliced how many channels they have now."""
    changed = {name.rpartition(".")[0] for name in names}
    layers = dict(model.named_modules(remove_duplicate=False))
    for layer in {id(layers[path]): layers[path] for path in changed}.values():
        _say_size(layer)


def _say_size(layer: Any) -> None:
    kind = type(layer)
    if kind in CONVOLUTIONS:
        out, into = layer.weight.shape[:2]
        if layer.groups > 1:  # Depthwise
            layer.groups = layer.in_channels = layer.out_channels = out
        else:
            pair = (into, out) if layer.transposed else (out, into)
            layer.out_channels, layer.in_channels = pair
    elif kind is nn.Linear:
        layer.out_features, layer.in_features = layer.weight.shape
    elif kind is nn.GroupNorm:
        per_group = layer.num_channels // layer.num_groups
        layer.num_channels = len(layer.weight)
        layer.num_groups = layer.num_channels // per_group
    elif kind in BATCH_NORMS | INSTANCE_NORMS:
        each = layer.weight if layer.weight is not None else layer.running_mean
        layer.num_features = len(each)


# --- the scaler -------------------------------------------------------------------


class Scaled:
    """Multiply a layer's outputs in training, as a forward hook."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, layer: nn.Module, args: Any, outputs: Tensor) -> Tensor:
        """Return the outputs times the factor, in their shape."""
        del args
        return outputs * self.factor if layer.training else outputs


def _scale(model: nn.Module, groups: Sequence[ChannelGroup], variant: Variant) -> None:
    for group in groups:
        num_kept = len(variant.kept.get(group.name, ())) or group.size
        for name in group.unscaled if num_kept < group.size else ():
            layer = model.get_submodule(name)
            layer.register_forward_hook(Scaled(group.size / num_kept))
