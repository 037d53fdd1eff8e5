"""How a tensor that crosses a cut lies in memory, here and where it arrives."""

from dataclasses import replace

from torch import Tensor

from flwr_smartsplit.split.layout import ALIGNMENT, is_dense, num_spanned
from flwr_smartsplit.train.segment_runner import blocks_gradient
from flwr_smartsplit.types import TensorCost


def spanned_bytes(tensor: Tensor) -> int:
    """Size of what a tensor takes where it arrives, as far from an aligned address."""
    spanned = num_spanned(tuple(tensor.shape), tensor.stride())
    lead_bytes = int(tensor.storage_offset()) * tensor.element_size() % ALIGNMENT
    return lead_bytes + spanned * tensor.element_size()


def crossing_cost(tensor: Tensor) -> TensorCost:
    """Describe a tensor that may cross."""
    has_gaps = not is_dense(tuple(tensor.shape), tensor.stride())
    return TensorCost(
        shape=tuple(map(int, tensor.shape)),
        dtype=str(tensor.dtype).removeprefix("torch."),
        item_bytes=tensor.element_size(),
        spanned_bytes=spanned_bytes(tensor) if has_gaps else None,
        blocks=blocks_gradient(tensor),
    )


def packing_bytes(tensor: Tensor) -> int:
    """Size of the copy that the wire makes of a tensor with gaps or overlap."""
    is_packed = is_dense(tuple(tensor.shape), tensor.stride())
    return 0 if is_packed else tensor.nbytes


def with_gradient(cost: TensorCost, gradient: Tensor) -> TensorCost:
    """Add how the gradient of a tensor lies in memory, if that has gaps."""
    if is_dense(tuple(gradient.shape), gradient.stride()):
        return cost
    return replace(cost, spanned_gradient_bytes=spanned_bytes(gradient))
