"""grown: a narrower model's values as a state of the stock model, channels put back."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from flwr_smartsplit.errors import InvalidTask
from flwr_smartsplit.split.narrow.channels import find_channels
from flwr_smartsplit.split.segment import Batch
from flwr_smartsplit.types import Region, Variant, kept_problem, regions_of


def grown(
    arrays: Mapping[str, Tensor],
    variant: Variant,
    model: nn.Module,
    example_inputs: Batch,
) -> dict[str, Tensor]:
    """Put channels back that a variant leaves out, so that the stock model takes them.

    They are silent: their weights are 0, and so are those of whatever reads them. In
    evaluation mode the stock model then computes what the narrower one does, up to the
    order of sums; it trains on as another model.

    Parameters
    ----------
    arrays : Mapping[str, Tensor]
        The narrower model's state, such as ``result.arrays.to_torch_state_dict()``.
    variant : Variant
        What it has, such as ``strategy.variant``.
    model : nn.Module
        The stock model; its values do not matter, and it is not changed.
    example_inputs : Tensor, tuple[Tensor, ...] or dict[str, Tensor]
        One batch, as the model's ``forward`` takes it; only shapes and dtypes matter.

    Raises
    ------
    NotSplittable
        If torch.fx cannot trace the model.
    InvalidTask
        If the variant is not one of this model, or the arrays are not of the variant.

    Examples
    --------
    >>> model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(2, 1, 1))
    >>> small = {"0.weight": torch.ones(1, 1, 1, 1), "1.bias": torch.ones(1)}
    >>> small["1.weight"] = torch.ones(1, 1, 1, 1)
    >>> variant = Variant("second", {"0.weight": (1,)})
    >>> state = grown(small, variant, model, torch.zeros(1, 1, 2, 2))
    >>> state["0.weight"].flatten(), state["1.weight"].flatten()
    (tensor([0., 1.]), tensor([0., 1.]))
    """
    groups = find_channels(model, example_inputs).groups
    problem = kept_problem(variant, groups)
    if problem:
        raise InvalidTask(f"variant {variant.name!r} is not of this model: {problem}.")
    regions, state = regions_of(groups, variant), model.state_dict()
    if arrays.keys() != state.keys():
        wrong = sorted(arrays.keys() ^ state.keys())
        raise InvalidTask(
            f"the arrays and the model differ in {', '.join(wrong[:3])} ({len(wrong)} "
            "in all): give a whole state of the variant, and the model of its task."
        )
    return {
        name: _placed(name, arrays[name], whole, regions.get(name, ()))
        for name, whole in state.items()
    }


def _placed(name: str, array: Tensor, whole: Tensor, region: Region) -> Tensor:
    """Place values where they are in the whole array; elsewhere nothing comes of it."""
    at = [torch.arange(size) for size in whole.shape]
    for axis, indices in enumerate(region):
        if indices is not None:
            at[axis] = torch.as_tensor(indices)
    shape = tuple(map(len, at))
    if tuple(array.shape) != shape or array.dtype != whole.dtype:
        raise InvalidTask(
            f"{name} is {array.dtype}{tuple(array.shape)}, and the variant has "
            f"{whole.dtype}{shape}: give the state of this variant."
        )
    if not region:
        return array.clone()
    # A variance of 1: nothing divides by it but zeros.
    placed = torch.full_like(whole, float(name.endswith("running_var")))
    placed[torch.meshgrid(*at, indexing="ij")] = array
    return placed
