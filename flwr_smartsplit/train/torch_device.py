"""Where a place computes: on the CPU, or on an accelerator such as ``cuda:0``.

A place keeps on its torch device what it trains: parameters, buffers, gradients,
optimizer state, activations and batches. What leaves it leaves as bytes of the CPU.
"""

import copy
import os
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from flwr_smartsplit.errors import InvalidTask

CPU = torch.device("cpu")
ThingT = TypeVar("ThingT")


def as_device(device: str | torch.device) -> torch.device:
    """Return a torch device that this process can use, or raise ``InvalidTask``.

    ``"auto"`` is the first CUDA device that this process sees, else the CPU. Flower and
    Ray show a client or an edge the GPUs that they gave it a share of.

    Examples
    --------
    >>> as_device("cpu")
    device(type='cpu')
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else CPU
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InvalidTask(
            f"device is {device!r}: give 'cpu', 'cuda', 'cuda:1' or 'auto'."
        ) from error
    if found.type == "cpu":
        return CPU
    if found.type == "meta":
        raise InvalidTask(
            "device is 'meta', which has no values: nothing trains there."
        )
    module = torch.get_device_module(found.type)
    count = module.device_count() if module.is_available() else 0
    index = found.index or 0
    if index >= count:
        shown = os.environ.get("CUDA_VISIBLE_DEVICES")
        raise InvalidTask(
            f"device is {str(device)!r}, and this process sees {count} such devices "
            f"(CUDA_VISIBLE_DEVICES={shown!r}). Under Flower's simulation, give "
            "clients a share by client-resources-num-gpus; an edge gets one by "
            "RayEdge(num_gpus=1). device='auto' takes the CPU where there is none."
        )
    if not hasattr(module, "default_generators"):
        raise InvalidTask(
            f"device is {str(device)!r}: the random numbers of a {found.type} device "
            "cannot be derived here, so dropout would differ from run to run. Give "
            "'cpu' or 'cuda'."
        )
    return torch.device(found.type, index)


def generators_of(device: torch.device) -> list[torch.Generator]:
    """Return the generators that operators on a device may draw from.

    The CPU's is always one: a model on an accelerator may draw there, too.
    """
    generators = [torch.default_generator]
    if device.type != "cpu":
        module = torch.get_device_module(device.type)
        if hasattr(module, "init"):
            module.init()  # CUDA has no generators before.
        generators.append(module.default_generators[device.index or 0])
    return generators


def placed(thing: ThingT, device: torch.device) -> ThingT:
    """Copy nested tensors to a device; what is there already, or no tensor, stays."""

    def place(x: Any) -> Any:
        return x.to(device, non_blocking=True) if isinstance(x, Tensor) else x

    if device.type == "cpu":
        return thing
    result: ThingT = tree_map(place, thing)
    return result


def function_on(function: Any, device: torch.device) -> Any:
    """Copy the tensors that a loss or metric holds, such as class weights, to a device.

    They are found in modules and in the arguments of ``functools.partial``; a tensor
    that a function's own code makes is that code's to place.
    """
    if device.type == "cpu":
        return function
    if isinstance(function, nn.Module):
        return copy.deepcopy(function).to(device)
    if isinstance(function, partial):
        keywords = {k: function_on(v, device) for k, v in function.keywords.items()}
        args = (function_on(value, device) for value in function.args)
        return partial(function_on(function.func, device), *args, **keywords)
    return placed(function, device)


def in_this_thread() -> AbstractContextManager[Any]:
    """Run backward in the calling thread on every device.

    Autograd has a thread of its own for each accelerator, where neither the phase of a
    meter nor the lock of a random stream would be this thread's. Order and numbers of
    the operators stay the same.
    """
    return torch.autograd.set_multithreading_enabled(False)


def synchronise(device: torch.device) -> None:
    """Wait until an accelerator has done what it was given."""
    if device.type != "cpu":
        torch.get_device_module(device.type).synchronize(device)
