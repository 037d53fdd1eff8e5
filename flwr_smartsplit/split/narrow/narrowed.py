"""narrowed: a smaller model of one that was trained, for whoever exports it."""

from torch import nn

from flwr_smartsplit.split.narrow.channels import find_channels
from flwr_smartsplit.split.narrow.narrowing import narrowed_module
from flwr_smartsplit.split.segment import Batch
from flwr_smartsplit.types import Variant, width_of


def narrowed(
    model: nn.Module, variant: Variant | float, example_inputs: Batch
) -> nn.Module:
    """Make a real smaller module of a model, with its values.

    Names of parameters and buffers stay; layers have fewer channels. Nothing in it
    depends on this package, unless the variant scales what its layers return.

    Parameters
    ----------
    model : nn.Module
        A trained model that torch.fx can trace; it is not changed.
    variant : Variant or float
        What to keep; a number is a width, the share of each layer's channels, of which
        the first are kept, as ``Widths`` without ``roll`` trains them.
    example_inputs : Tensor, tuple[Tensor, ...] or dict[str, Tensor]
        One batch, as the model's ``forward`` takes it; only shapes and dtypes matter.

    Raises
    ------
    NotSplittable
        If torch.fx cannot trace the model, no channels of it may be left out, or its
        forward reads how large a layer is.
    InvalidTask
        If the variant is not one of this model.
    ValueError
        If a width is not in ``(0, 1]``.

    Examples
    --------
    >>> import torch
    >>> model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))
    >>> narrowed(model, 0.5, torch.zeros(1, 1, 8, 8))[0]
    Conv2d(1, 4, kernel_size=(3, 3), stride=(1, 1))
    """
    channels = find_channels(model, example_inputs)
    channels.require_groups(model)
    if not isinstance(variant, Variant):
        variant = width_of(channels.groups, variant)
    small = narrowed_module(model, channels.groups, variant)
    channels.require_same_steps(small, example_inputs)
    return small
