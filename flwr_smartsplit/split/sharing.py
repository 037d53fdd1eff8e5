"""One module's parts under their own names in another, without copies."""

from torch import nn


def share(source: nn.Module, target: nn.Module, path: list[str]) -> None:
    """Register ``source``'s object at ``path`` under the same path of ``target``.

    Parameters
    ----------
    source : nn.Module
        What has it.
    target : nn.Module
        What shall have it too.
    path : list[str]
        Names of modules, and at last of a module, a tensor or another attribute.
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
