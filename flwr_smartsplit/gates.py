"""Gates: learned switches of channels, so that few of them cross a cut.

A gate is two units of the model, and a cut between them sends the open channels only:
``ChannelGate`` closes channels on their way forward, ``GateEnd`` those of the gradient
on its way back. They are part of the model, so every route computes the same, and gates
are merged as all parameters are. ``PruneSchedule`` says which channels are open in a
round.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from flwr_smartsplit.errors import InvalidTask
from flwr_smartsplit.loss_terms import with_loss
from flwr_smartsplit.types import GATE

GATE_END = f"{GATE}_end"
"""The names of both units in the module that they follow."""

OPEN, BUDGET, LOGITS = "is_open", "budget", "logits"
"""The names of a gate's state."""

_MOST_LOGIT = 15.0  # As VCCprune draws gates
_DELTA = 0.01 * 512  # Over the number of channels: VCCprune has 0.01 for 512
_MOST_BARRIER = 15.0
_HALF = torch.float16
_LARGEST_EXPONENT, _LEAST_EXPONENT = 14, -100
_SIZES = ("out_channels", "num_channels", "num_features", "out_features")


class _Switched(nn.Module):
    """What both ends know of a round: the open channels, and how many these are.

    A budget of 0 means that all channels pass, unrounded.
    """

    is_open: Tensor
    budget: Tensor

    def __init__(self, num_channels: int, after: str) -> None:
        super().__init__()
        self.after = after
        self.register_buffer(OPEN, torch.ones(num_channels, dtype=torch.bool))
        self.register_buffer(BUDGET, torch.zeros((), dtype=torch.int64))

    def _along(self, values: Tensor, vector: Tensor) -> Tensor:
        """Shape a vector of channels so that it multiplies values; check their size.

        Channels are dimension 1 of images, and the last one of all else.
        """
        dim = 1 if values.dim() > 3 else values.dim() - 1  # noqa: PLR2004
        if values.dim() < 2 or values.shape[dim] != len(vector):  # noqa: PLR2004
            raise InvalidTask(
                f"the gate after {self.after!r} has {len(vector)} channels, and what "
                f"comes out there has the shape {tuple(values.shape)}: give "
                "gated(..., channels=...) the size of dimension 1 for images, and of "
                "the last one for all else."
            )
        return vector.view(-1, *[1] * (values.dim() - 1 - dim))


class ChannelGate(_Switched):
    """Multiply each channel by a learned number from 0 to 1; close all but some.

    Under a budget, what passes is rounded to float16, closed channels are 0, and the
    loss has a term that pulls the sum of the squared numbers to the budget. Without
    one, all channels pass as they are, and the numbers are not trained.

    References
    ----------
    VCCprune (see ``docs/decisions/0055-gates-are-units-of-the-model.md``).
    """

    def __init__(
        self, num_channels: int, after: str, *, strength: float, dtype: torch.dtype
    ) -> None:
        super().__init__(num_channels, after)
        self.strength = strength
        self.logits = nn.Parameter(torch.empty(num_channels, dtype=dtype))
        nn.init.uniform_(self.logits, 0.0, _MOST_LOGIT)

    def forward(self, values: Tensor) -> Tensor:
        """Return the values of open channels, and zeros."""
        passes_all = self.budget == 0
        share = torch.sigmoid(self.logits)
        share = torch.where(passes_all, share.detach(), share)
        scaled = values * self._along(values, share).to(values.dtype)
        is_open = self._along(values, self.is_open)
        passed: Tensor = _Close.apply(scaled, is_open, passes_all)
        if self.training and self.strength and self.logits.requires_grad:
            passed = with_loss(passed, self._barrier(share))
        return passed

    def _barrier(self, share: Tensor) -> Tensor:
        """Return a term with the gradient of ``strength * (exp(z) + exp(-z))``.

        ``z`` is the sum of the squared shares above the budget, times a constant. It is
        bounded, and the gradient stays.
        """
        total = (share * share).sum()
        delta = _DELTA / len(share)
        z = (delta * (total.detach() - self.budget)).clamp(
            -_MOST_BARRIER, _MOST_BARRIER
        )
        slope: Tensor = 2 * self.strength * delta * torch.sinh(z)
        return slope * total


class GateEnd(_Switched):
    """Pass on what a gate let through; close the same channels of the gradient.

    Of the open ones it keeps what float16 can write of each row times a power of two:
    gradients are too small for float16 as they are.
    """

    def forward(self, values: Tensor) -> Tensor:
        """Return a copy of the values, which a later unit may write into."""
        is_open = self._along(values, self.is_open)
        passed: Tensor = _CloseBack.apply(values, is_open, self.budget == 0)
        return passed


class _Close(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, is_open: Tensor, exact: Tensor) -> Tensor:
        ctx.save_for_backward(is_open)
        if values.dtype == torch.float32:
            limits = torch.finfo(_HALF)
            rounded = values.clamp(limits.min, limits.max).to(_HALF).to(values.dtype)
            values = torch.where(exact, values, rounded)
        return torch.where(is_open, values, 0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (is_open,) = ctx.saved_tensors
        return torch.where(is_open, gradient, 0), None, None


class _CloseBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, is_open: Tensor, exact: Tensor) -> Tensor:
        ctx.save_for_backward(is_open, exact)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        is_open, exact = ctx.saved_tensors
        gradient = torch.where(is_open, gradient, 0)
        if gradient.dtype == torch.float32:
            gradient = torch.where(exact, gradient, _scaled_halves(gradient))
        return gradient, None, None


def _scaled_halves(values: Tensor) -> Tensor:
    """Round each row times the power of two that brings it into float16's range."""
    most = values.abs().flatten(1).amax(dim=1)
    up = _LARGEST_EXPONENT - torch.frexp(most).exponent.clamp(min=_LEAST_EXPONENT)
    up = up.view(-1, *[1] * (values.dim() - 1))
    return torch.ldexp(torch.ldexp(values, up).to(_HALF).to(values.dtype), -up)


# --- gates in a model -----------------------------------------------------------------


def gated(
    model_fn: Callable[[], nn.Module],
    after: str,
    *,
    encoder: bool = True,
    channels: int | None = None,
    strength: float = 1000.0,
) -> Callable[[], nn.Module]:
    """Make a model function whose model has a gate after one of its modules.

    All names of the model stay; those of the gate come after them. Choose the cut there
    with ``Planning(choose_route=cut_at_gate)``.

    Parameters
    ----------
    model_fn : Callable[[], nn.Module]
        Builds the model; importable, as ``Task.model_fn`` is.
    after : str
        The name of a module that returns one tensor, such as ``"features.7"``.
    encoder : bool
        Whether a small encoder (convolution, BatchNorm, sigmoid) stands before the
        gate and a decoder behind it, as in VCCprune; for images only. Without, the gate
        acts on the module's own channels.
    channels : int, optional
        How many channels the gate has: with an encoder as many as you like, else as
        many as come out of ``after``, which is the default if the model tells.
    strength : float
        How strongly the number of open channels is pulled to the budget; 0 not at all.

    Raises
    ------
    ValueError
        If a number is out of range.
    InvalidTask
        When the model is built, if there is no such module.

    Examples
    --------
    >>> model_fn = gated(lambda: nn.Sequential(nn.Linear(4, 8)), "0", encoder=False)
    >>> list(model_fn().state_dict())[:3]
    ['0.weight', '0.bias', '0.channel_gate.logits']
    """
    if channels is not None and channels < 1:
        raise ValueError(f"channels is {channels}: a gate has at least 1.")
    if not 0 <= strength < float("inf"):
        raise ValueError(f"strength is {strength}: give a finite number of at least 0.")
    return partial(
        _gated,
        *(model_fn, after),
        encoder=encoder,
        channels=channels,
        strength=strength,
    )


def _gated(
    model_fn: Callable[[], nn.Module],
    after: str,
    *,
    encoder: bool,
    channels: int | None,
    strength: float,
) -> nn.Module:
    model = model_fn()
    modules = dict(model.named_modules())
    if not after or after not in modules:
        raise InvalidTask(
            f"the gate stands after module {after!r}, which {type(model).__name__} "
            f"does not have: {', '.join(filter(None, modules))}."
        )
    module = modules[after]
    if encoder or channels is None:
        before = _num_channels(model, module, after)
        channels = before if channels is None else channels
    floats = (p.dtype for p in model.parameters() if p.is_floating_point())
    dtype = next(floats, torch.get_default_dtype())
    parts: dict[str, nn.Module] = {
        GATE: ChannelGate(channels, after, strength=strength, dtype=dtype),
        GATE_END: GateEnd(channels, after),
    }
    if encoder:
        parts = _encoded(parts, before, channels, dtype)
    taken = [name for name in parts if hasattr(module, name)]
    if taken:
        raise InvalidTask(
            f"{after!r} has {', '.join(taken)} already, where the gate would be: give "
            "another module, or encoder=False."
        )
    for name, part in parts.items():
        module.add_module(name, part)
    if type(module).forward is not nn.Sequential.forward:  # That one runs all it has.
        kind: Any = type(module)
        module.__class__ = _then(kind, tuple(parts))
    return model


def _encoded(
    parts: dict[str, nn.Module], before: int, channels: int, dtype: torch.dtype
) -> dict[str, nn.Module]:
    """Put an encoder before a gate, and a decoder behind it."""
    encode = nn.Sequential(
        _ImageConv2d(before, channels, 3, padding=1, dtype=dtype),
        nn.BatchNorm2d(channels, eps=1e-4, momentum=0.03, dtype=dtype),
        nn.Sigmoid(),
    )
    decode = nn.Sequential(
        nn.ConvTranspose2d(channels, before, 3, padding=1, dtype=dtype),
        nn.BatchNorm2d(before, dtype=dtype),
        nn.ReLU(),
    )
    return {"encode": encode, **parts, "decode": decode}


class _ImageConv2d(nn.Conv2d):
    """Refuse what a convolution would take for one image."""

    def forward(self, values: Tensor) -> Tensor:
        """Convolve a batch of images."""
        if values.dim() != 4:  # noqa: PLR2004
            raise InvalidTask(
                "a gate's encoder is for images, and what comes in has the shape "
                f"{tuple(values.shape)}: give gated(..., encoder=False)."
            )
        return super().forward(values)


@cache
def _then(kind: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """Make a kind of module that runs some of its children after itself."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        values = kind.forward(self, *args, **kwargs)
        for name in names:
            values = getattr(self, name)(values)
        return values

    return type(f"Gated{kind.__name__}", (kind,), {"forward": forward})


def _num_channels(model: nn.Module, module: nn.Module, after: str) -> int:
    """Read off how many channels come out of a module: of its last layer, or before."""
    own = list(module.modules())[-1]
    found = None
    for each in model.modules():
        sizes = (getattr(each, name, None) for name in _SIZES)
        shape = getattr(each, "normalized_shape", (None,))
        found = next((s for s in (*sizes, shape[-1]) if isinstance(s, int)), found)
        if each is own:
            break
    if found is None:
        raise InvalidTask(
            f"no layer up to {after!r} says how many channels come out of it: give "
            "gated(..., channels=...)."
        )
    return found
