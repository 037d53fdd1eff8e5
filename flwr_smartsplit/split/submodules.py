"""Parts of a module: shared under their own names, in the mode the model sets."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def modes_restored(model: nn.Module) -> Iterator[None]:
    """Restore every submodule's training flag afterwards."""
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


def share(source: nn.Module, target: nn.Module, path: list[str]) -> None:
    """Register ``source``'s object at ``path`` under the same path of ``target``.

    The path ends at a module, a tensor or another attribute.
    """
    *parents, last = path
    for name in parents:
        source = source.get_submodule(name)
        if not hasattr(target, name):
            target.add_module(name, nn.Module())
        target = target.get_submodule(name)
    if last in source._modules:
        target.add_module(last, source._modules[last])
    elif last in source._parameters:
        target.register_parameter(last, source._parameters[last])
    elif last in source._buffers:
        persistent = last not in source._non_persistent_buffers_set
        target.register_buffer(last, source._buffers[last], persistent=persistent)
    else:
        setattr(target, last, getattr(source, last))
