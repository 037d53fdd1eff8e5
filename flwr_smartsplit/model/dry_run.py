"""Dry runs: tensors that have sizes but no memory, for costs and cut places."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode


def fake_like(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    """Make a fake CPU tensor of the same shape, strides, dtype and role."""
    with mode:
        twin = torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu"
        )
    if isinstance(tensor, nn.Parameter):
        twin = nn.Parameter(twin, requires_grad=tensor.requires_grad)
    return twin


def make_fake(segment: nn.Module, mode: FakeTensorMode) -> None:
    """Replace every tensor that a segment of one's own holds by a fake one.

    Parameters
    ----------
    segment : nn.Module
        A module nobody else uses, such as ``Chain.own_segment`` returns.
    mode : FakeTensorMode
        The mode the fake tensors belong to.
    """
    twins: dict[int, Tensor] = {}
    for module in segment.modules():
        for tensors in (module._parameters, module._buffers, module.__dict__):
            for key, value in list(tensors.items()):
                if isinstance(value, Tensor):
                    if id(value) not in twins:
                        twins[id(value)] = fake_like(value, mode)
                    tensors[key] = twins[id(value)]  # type: ignore[assignment]


def fake_batch(
    tensors: Iterable[Tensor], mode: FakeTensorMode, *, batch_size: int
) -> tuple[Tensor, ...]:
    """Make fake twins of a batch's tensors, with ``batch_size`` examples."""
    with mode:
        return tuple(
            torch.empty((batch_size, *tensor.shape[1:]), dtype=tensor.dtype)
            for tensor in tensors
        )
