"""Dry runs: tensors that have sizes but no memory, for costs and cut places."""

import copy
import math
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from flwr_smartsplit.split.layout import is_dense

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def fake_like(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    """Make a fake CPU tensor of the same shape, strides, dtype and role."""
    with mode:
        if tensor.dim() == 0 and not tensor.is_floating_point():
            # A counter has a value, because BatchNorm may divide by it.
            return torch.tensor(0, dtype=tensor.dtype)
        twin = torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu"
        )
    if isinstance(tensor, nn.Parameter):
        twin = nn.Parameter(twin, requires_grad=tensor.requires_grad)
    return twin


def fake_copy(segment: ModuleT, mode: FakeTensorMode) -> ModuleT:
    """Copy a module with fake tensors for its own; none is allocated.

    Parameters
    ----------
    segment : nn.Module
        What to copy; it may hold real tensors, and is not touched.
    mode : FakeTensorMode
        The mode the fake tensors belong to.
    """
    tensors = [
        value
        for module in segment.modules()
        for values in (module._parameters, module._buffers, module.__dict__)
        for value in values.values()
        if isinstance(value, Tensor)
    ]
    return copy.deepcopy(segment, {id(t): fake_like(t, mode) for t in tensors})


def constants_of(module: nn.Module) -> dict[str, Tensor]:
    """Find the tensors of a module that are neither parameters nor buffers."""
    return {
        f"{prefix}.{name}".lstrip("."): value
        for prefix, part in module.named_modules()
        for name, value in vars(part).items()
        if isinstance(value, Tensor)
    }


def fake_batch(batch: Any, mode: FakeTensorMode, *, batch_size: int) -> Any:
    """Make a fake twin of a batch, nested as it is, with ``batch_size`` examples.

    Its examples are laid out like those of ``batch``, if they are dense: a convolution
    takes more memory for some layouts than for others.
    """

    def twin(tensor: Tensor) -> Tensor:
        shape, strides = tensor.shape[1:], tensor.stride()[1:]
        if not is_dense(shape, strides):
            return torch.empty((batch_size, *shape), dtype=tensor.dtype)
        sizes, steps = (batch_size, *shape), (math.prod(shape), *strides)
        return torch.empty_strided(sizes, steps, dtype=tensor.dtype)

    with mode:
        return tree_map(twin, batch)
