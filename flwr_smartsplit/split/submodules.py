"""Training and evaluation mode as the model itself switches between them."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def modes_restored(model: nn.Module) -> Iterator[None]:
    """Put every submodule's training flag back afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def odd_modes(model: nn.Module) -> dict[bool, frozenset[str]]:
    """Name, for ``train(mode)``, the modules that end in the other mode.

    A model may override ``train``, for instance to keep a BatchNorm frozen.
    """
    odd = {}
    with modes_restored(model):
        for mode in (True, False):
            model.train(mode)
            odd[mode] = frozenset(
                name
                for name, module in model.named_modules()
                if module.training != mode
            )
    return odd
