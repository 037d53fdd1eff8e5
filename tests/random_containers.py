"""Modules with children, of which random modules are made.

Every part of a container is given as something to call: what builds a module, or an
``Op`` that the forward does itself.
"""

import itertools
from collections.abc import Callable
from decimal import Decimal
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import StochasticDepth

from tests.random_operations import Op

Build = Callable[[], nn.Module]
Part = Build | Op


class Steps(nn.Module):
    """Parts one after another, as modules of this one and lines of its forward."""

    def __init__(self, *parts: Part) -> None:
        super().__init__()
        self.operations = dict(enumerate(parts))
        for index, part in enumerate(parts):
            if not isinstance(part, Op):
                self.add_module(f"part{index}", part())

    def forward(self, x: Tensor) -> Any:
        for index, part in self.operations.items():
            if not isinstance(part, Op):
                x = self.get_submodule(f"part{index}")(x)
            elif part.knows_mode:
                x = part.run(x, training=self.training)
            else:
                x = part.run(x)
        return x


class Residual(nn.Module):
    """A way around a body; the sum may be written in place, the body skipped."""

    def __init__(self, body: Build, join: str) -> None:
        super().__init__()
        self.body = body()
        self.join = join
        if join in ("row", "batch"):
            self.depth = StochasticDepth(0.4, join)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        if self.join == "into the body":
            return y.add_(x)
        if self.join == "into the way around":
            return x.add_(y)
        return x + (self.depth(y) if self.join in ("row", "batch") else y)


class Concat(nn.Module):
    """Two branches beside each other."""

    def __init__(self, left: Build, right: Build) -> None:
        super().__init__()
        self.left, self.right = left(), right()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x), self.right(x)], dim=1)


class Skips(nn.Module):
    """Bodies one after another; the end uses what each of them gave.

    It adds them, or uses them without their gradients: masks, or detached values.
    """

    def __init__(self, use: str, *bodies: Build) -> None:
        super().__init__()
        self.use = use
        self.bodies = nn.ModuleList(body() for body in bodies)

    def forward(self, x: Tensor) -> Tensor:
        kept = [x * 0.5]
        for body in self.bodies:
            kept.append(body(kept[-1]))
        *others, last = kept
        for other in reversed(others):
            if self.use == "added":
                last = last + other
            elif self.use == "as a mask":
                last = last * (other > 0)
            else:
                last = last + other.detach()
        return last


class Chunks(nn.Module):
    """Half of the channels are worked on; the halves come as a tuple."""

    def __init__(self, body: Build, way: str, count: int) -> None:
        super().__init__()
        self.body, self.way, self.count = body(), way, count

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "slices":
            first, second = x[:, : self.count], x[:, self.count :]
        else:
            cut = x.chunk(2, 1) if self.way == "chunk" else x.split(self.count, 1)
            first, second = cut
        return torch.cat([second, self.body(first)], dim=1)


class Shared(nn.Module):
    """One module is called before and after another."""

    def __init__(self, shared: Build, middle: Build) -> None:
        super().__init__()
        self.shared, self.middle = shared(), middle()

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(self.middle(self.shared(x)))


class Tied(nn.Module):
    """Two layers, or a layer and a line of code, have one weight."""

    def __init__(self, layer: Build, middle: Build, by_name: bool) -> None:
        super().__init__()
        self.first, self.middle, self.by_name = layer(), middle(), by_name
        if not by_name:
            self.last = layer()
            self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.first(x))
        if self.by_name:
            return functional.linear(x, self.first.weight)
        return self.last(x)


class Direct(nn.Module):
    """Parameters and buffers of its own, used without a layer."""

    def __init__(self, body: Build, size: int, matrix: bool) -> None:
        super().__init__()
        self.body = body()
        self.matrix = nn.Parameter(torch.randn(size, size) / 2) if matrix else None
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, size))
        self.register_buffer("offset", torch.linspace(-1, 1, size))
        self.register_buffer("window", torch.ones(size) / 3, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x * self.scale + self.offset * self.window)
        if self.matrix is not None:
            x = functional.linear(x, self.matrix)
        return torch.tanh(x)


class Constant(nn.Module):
    """A tensor that is neither a parameter nor a buffer."""

    def __init__(self, body: Build, size: int) -> None:
        super().__init__()
        self.body = body()
        self.constant = torch.full((size,), 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.constant


class Derived(nn.Module):
    """A layer with a tensor beside it that is no part of the state.

    It may be computed from the layer's weight, or drawn after it.
    """

    def __init__(self, size: int, *, is_drawn: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(size, size)
        values = torch.randn(size) if is_drawn else self.layer.weight.detach()[0] * 2
        self.register_buffer("values", values, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.values


class RunningMean(nn.Module):
    """A buffer that the forward itself writes while it trains."""

    def __init__(self, body: Build, size: int) -> None:
        super().__init__()
        self.body = body()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("count", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            batch_mean = x.detach().flatten(0, -2).mean(0)
            self.mean.mul_(0.9).add_(batch_mean, alpha=0.1)
            self.count.add_(1)
        return self.body(x - self.mean)


class InEval(nn.Module):
    """A normalisation that never trains, before a body that does."""

    def __init__(self, norm: Build, body: Build) -> None:
        super().__init__()
        self.norm, self.body = norm(), body()

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.norm(x))


class ByMode(nn.Module):
    """One body in training, another in evaluation."""

    def __init__(self, training: Build, evaluation: Build) -> None:
        super().__init__()
        self.in_training, self.in_evaluation = training(), evaluation()

    def forward(self, x: Tensor) -> Tensor:
        return self.in_training(x) if self.training else self.in_evaluation(x)


class Aside(nn.Module):
    """A branch whose value nobody uses, and a layer that nobody calls."""

    def __init__(self, side: Build, body: Build) -> None:
        super().__init__()
        self.side, self.body = side(), body()
        self.idle = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.side(x)
        return self.body(x)


class Recurrent(nn.Module):
    """A recurrent layer, or attention, that returns a tuple."""

    def __init__(self, layer: Build, kind: str) -> None:
        super().__init__()
        self.layer, self.kind = layer(), kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "attention":
            values, _ = self.layer(x, x, x)
            return values
        values, state = self.layer(x)
        if self.kind == "lstm":
            hidden, _ = state
            return values + hidden[-1].unsqueeze(1)
        return values


class Joined(nn.Module):
    """A model of two inputs: the second joins between front and back."""

    def __init__(self, front: Build, back: Build) -> None:
        super().__init__()
        self.front, self.back = front(), back()

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.back(self.front(x) * torch.sigmoid(y))


class Auxiliary(nn.Module):
    """A second output, from the middle, in training only."""

    def __init__(self, front: Build, middle: Build, back: Build) -> None:
        super().__init__()
        self.front, self.middle, self.back = front(), middle(), back()

    def forward(self, x: Tensor) -> Any:
        x = self.front(x)
        if self.training:
            return self.back(x), self.middle(x)
        return self.back(x)


class Counter(nn.Module):
    """Counts its calls; what comes out depends on the count.

    It has no module inside, so a trace does not see what it does.
    """

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        counts: dict[str, Any] = {
            "attribute": 0,
            "list": [],
            "dict": {"calls": 0},
            "array": np.zeros(1),
            "iterator": itertools.count(1),
            "tensor": torch.zeros(()),
            "tuple": (0,),
            "decimal": Decimal(0),
        }
        self.count = counts[where]

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + 0.1 * self.counted())

    def counted(self) -> Any:
        """Count one call, and return how many there were."""
        match self.where:
            case "list":
                self.count.append(None)
                count = len(self.count)
            case "dict":
                self.count["calls"] += 1
                count = self.count["calls"]
            case "iterator":
                count = next(self.count)
            case "tuple":
                self.count = (self.count[0] + 1,)
                count = self.count[0]
            case "array":
                self.count += 1
                count = self.count[0]
            case _:
                self.count += 1
                count = self.count
        return count.clone() if isinstance(count, Tensor) else float(count)


class Counting(Counter):
    """Counts its calls too, and has a body, so a trace looks inside."""

    def __init__(self, body: Build, where: str) -> None:
        super().__init__(where)
        self.body = body()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.body(x))


class Adapter(nn.Module):
    """A frozen layer, and beside it a low-rank one that is trained."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.base = frozen(partial(nn.Linear, size, size))
        self.down = nn.Parameter(torch.randn(2, size) / 4)
        self.up = nn.Parameter(torch.randn(size, 2) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


def with_biases_only(build: Build) -> nn.Module:
    """Build a module of which only the biases are trained."""
    module = build()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    return module


def frozen(build: Build) -> nn.Module:
    """Build a module that is not trained."""
    return build().requires_grad_(False)


def in_channels_last(build: Build) -> nn.Module:
    """Build a model with its images' channels innermost in memory."""
    return build().to(memory_format=torch.channels_last)
