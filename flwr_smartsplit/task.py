"""Task: what every place needs to build its own part of the training.

A place builds its segments from these functions instead of receiving code or whole
models, so a device never holds a tail and nothing executable crosses the wire.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flwr_smartsplit.types.sizes import plain, whole

if TYPE_CHECKING:
    from torch import Tensor, dtype, nn
    from torch.optim import Optimizer

    from flwr_smartsplit.defence import Defence


@dataclass(frozen=True, eq=False, kw_only=True)
class Task:
    """The model, loss and optimizer of one federated run.

    Parameters
    ----------
    model_fn : Callable[[], nn.Module]
        Builds the model. Must be importable (a module-level function or a
        ``functools.partial`` of one) for an edge in another process to build it too.
    loss_fn : Callable[[outputs, targets], Tensor]
        Mean loss of a batch.
    optimizer_fn : Callable[[Iterable[nn.Parameter]], Optimizer]
        Builds the optimizer of the parameters of one segment. It must treat
        parameters one by one, as SGD and Adam do.
    example_inputs : Tensor, tuple[Tensor, ...] or dict[str, Tensor]
        A batch of your loader, ``(batch, *input shape)`` each, as the model takes it (a
        dict by keyword); only shapes, dtypes and the strides of one example matter.
    example_targets : Tensor, tuple or dict of Tensors, or None
        Their targets, ``(batch, *target shape)`` each, nested as your loader yields
        them. A loss that looks at values is priced for the values given here.
    metrics_fn : Callable[[outputs, targets], Mapping[str, float]], optional
        Batch means to report in evaluation, such as an accuracy.
    units_fn : Callable[[nn.Module], Sequence[Unit]], optional
        Lists the units of a model that torch.fx cannot trace. Importable, too.
    schedule_fn : Callable[[Optimizer, Mapping], LRScheduler or None], optional
        Sets up a new optimizer at every place by the round's config (``train_config``
        and ``"server-round"``); may return a torch scheduler, stepped after each step.
    max_gradient_norm : float, optional
        Clip the norm of all gradients of a step, those at other places included.
    autocast_dtype : torch.dtype, optional
        Run forward and loss under ``torch.autocast`` with this type, such as
        ``torch.bfloat16``; not ``torch.float16``, which needs loss scaling.
    accumulate : int
        Micro-batches of a step: each batch is divided into so many parts, whose
        gradients add up to one optimizer step. BatchNorm sees the parts.
    max_boundary_tensors : int
        The most tensors that may cross a cut. With more than 1, cuts also lie inside
        blocks with skip connections. It changes the units, and with them the numbers of
        cuts and the random numbers that units draw.
    is_local : Callable[[str], bool], optional
        Says by name which state stays on the device and is not merged, such as
        BatchNorm's or a personal last layer; so do its units, on every route.
    defence : Defence, optional
        What makes boundaries tell less of the inputs, such as
        ``Defence(after="relu", nopeek=0.5)``. It changes what is trained, alike on
        every route; no cut lies before it.

    Examples
    --------
    >>> import torch
    >>> from functools import partial
    >>> task = Task(
    ...     model_fn=partial(torch.nn.Linear, 4, 2),
    ...     loss_fn=torch.nn.functional.cross_entropy,
    ...     optimizer_fn=partial(torch.optim.SGD, lr=0.1),
    ...     example_inputs=torch.zeros(1, 4),
    ...     example_targets=torch.zeros(1, dtype=torch.int64),
    ... )
    """

    model_fn: "Callable[[], nn.Module]"
    loss_fn: "Callable[[Any, Any], Tensor]"
    optimizer_fn: "Callable[[Iterable[nn.Parameter]], Optimizer]"
    example_inputs: "Tensor | tuple[Tensor, ...] | dict[str, Tensor]"
    example_targets: Any
    metrics_fn: Callable[[Any, Any], Mapping[str, float]] | None = None
    units_fn: "Callable[[nn.Module], Sequence[Any]] | None" = None
    schedule_fn: "Callable[[Optimizer, Mapping[str, Any]], Any] | None" = None
    max_gradient_norm: float | None = None
    autocast_dtype: "dtype | None" = None
    accumulate: int = 1
    max_boundary_tensors: int = 1
    is_local: Callable[[str], bool] | None = None
    defence: "Defence | None" = None

    def __post_init__(self) -> None:
        inputs = self.example_inputs
        if isinstance(inputs, Mapping):
            object.__setattr__(self, "example_inputs", dict(inputs))
        elif isinstance(inputs, tuple | list):
            object.__setattr__(self, "example_inputs", tuple(inputs))
        object.__setattr__(self, "example_targets", _no_lists(self.example_targets))
        for name in ("accumulate", "max_boundary_tensors"):
            object.__setattr__(self, name, whole(getattr(self, name), name))
        object.__setattr__(self, "max_gradient_norm", plain(self.max_gradient_norm))
        self._check_options()
        made = {"model_fn": "parameters", "optimizer_fn": "param_groups"}
        problems = [
            f"{name} is a {type(getattr(self, name)).__name__}; give a function"
            for name in ("model_fn", "loss_fn", "optimizer_fn")
            if not callable(getattr(self, name))
            or (
                name in made
                and hasattr(getattr(self, name), made[name])
                and not isinstance(getattr(self, name), type)
            )
        ]
        if problems:
            raise TypeError(f"{'; '.join(problems)}.")

    def _check_options(self) -> None:
        if self.max_boundary_tensors < 1:
            raise ValueError(
                f"max_boundary_tensors is {self.max_boundary_tensors}: at least one "
                "tensor crosses a cut."
            )
        norm = self.max_gradient_norm
        if norm is not None and not norm > 0:
            raise ValueError(f"max_gradient_norm is {norm}: give a number above 0.")
        if self.accumulate < 1:
            raise ValueError(
                f"accumulate is {self.accumulate}: a step has at least 1 micro-batch."
            )
        if str(self.autocast_dtype) == "torch.float16":
            raise ValueError(
                "autocast_dtype is torch.float16, whose small gradients vanish without "
                "loss scaling, and nothing scales across places: use torch.bfloat16."
            )
        loss: Any = self.loss_fn
        if isinstance(loss, type):
            raise TypeError(
                f"loss_fn is the class {loss.__name__}; give an instance of it, such "
                f"as {loss.__name__}(), or a function."
            )
        if list(getattr(loss, "parameters", list)()):
            raise TypeError(
                f"loss_fn is a {type(loss).__name__} with parameters of its own, which "
                "no place would train: make them part of the model."
            )


def _no_lists(targets: Any) -> Any:
    """Write nested targets with tuples and dicts, as every place gets them."""
    if isinstance(targets, Mapping):
        return {key: _no_lists(value) for key, value in targets.items()}
    if isinstance(targets, list) or type(targets) is tuple:
        return tuple(map(_no_lists, targets))
    return targets


def copied_loss(loss_fn: "Callable[..., Tensor]") -> "Callable[..., Tensor]":
    """Copy a loss to try it on: one with a memory must not remember that."""
    try:
        return copy.deepcopy(loss_fn)
    except Exception:  # Not everything that can be called can be copied.
        return loss_fn
