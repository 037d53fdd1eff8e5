"""Random small modules for the property that every offered cut is exact.

A piece says what to build, as ``partial`` objects that can be read and pasted, and
which shape comes out, so shapes always fit. A drawn model can therefore fail on its
own only where an operator writes over what autograd still needs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import hypothesis.strategies as st
import torch
from torch import Tensor, nn
from torch.nn import functional

from flwr_smartsplit.split.segment import Batch
from flwr_smartsplit.task import Task
from tests import random_containers as made
from tests import random_operations as ops
from tests.models import OPTIMIZERS, seeded
from tests.random_containers import Build, Part, Steps
from tests.random_operations import Op

YES_NO = (True, False)
Choose = Callable[[Sequence[Any]], Any]
Shape = tuple[int, ...]
"""Of one example: ``(features,)``, ``(length, features)`` or ``(channels, h, w)``."""


@dataclass(frozen=True)
class Piece:
    """Something to build, what it is an example of, and the shape that comes out."""

    feature: str
    part: Part
    shape: Shape


@dataclass(frozen=True)
class RandomModel:
    """A drawn model with what it needs to be trained."""

    build: Build
    example_inputs: Batch
    optimizer: str
    features: frozenset[str]
    max_boundary_tensors: int = 1

    @property
    def task(self) -> Task:
        """Make a new task of it; a closure, so no process keeps its chain."""
        return Task(
            model_fn=lambda: seeded(self.build),
            loss_fn=loss_of,
            optimizer_fn=OPTIMIZERS[self.optimizer],
            example_inputs=self.example_inputs,
            example_targets=torch.arange(2),
            max_boundary_tensors=self.max_boundary_tensors,
        )


def loss_of(outputs: Tensor | tuple[Tensor, ...], targets: Tensor) -> Tensor:
    """Classify; further outputs count less."""
    first, *others = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = functional.cross_entropy(first, targets)
    return loss + sum(0.3 * functional.cross_entropy(o, targets) for o in others)


# --- pieces without parts of their own ------------------------------------------------

ANYWHERE: dict[str, list[Part]] = {
    "activation module": [nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Identity],
    "activation function": [
        Op(functional.relu),
        Op(torch.sigmoid),
        Op(functional.softplus),
    ],
    "in-place module": [
        partial(nn.ReLU, inplace=True),
        partial(nn.ELU, inplace=True),
        partial(nn.Hardswish, inplace=True),
    ],
    "in-place operation": [
        Op(functional.relu_),
        Op(ops.raised),
        Op(ops.scaled),
    ],
    "in-place on a view": [
        Op(ops.start_doubled),
        Op(ops.flat_rectified),
        Op(ops.slices_rejoined),
    ],
    "in-place on a copy": [Op(ops.copy_written)],
    "dropout": [partial(nn.Dropout, 0.3)],
    "in-place dropout": [
        partial(nn.Dropout, 0.3, inplace=True),
        Op(ops.dropped_in_place, knows_mode=True),
    ],
    "functional dropout": [Op(partial(functional.dropout, p=0.3), knows_mode=True)],
    "alpha dropout": [
        partial(nn.AlphaDropout, 0.3),
        partial(nn.FeatureAlphaDropout, 0.3),
        Op(partial(functional.feature_alpha_dropout, p=0.3), knows_mode=True),
    ],
    "noise": [
        Op(ops.noisy, knows_mode=True),
        Op(ops.masked, knows_mode=True),
    ],
    "noisy activation": [nn.RReLU, partial(nn.RReLU, inplace=True)],
    "other operations by mode": [Op(ops.other_by_mode, knows_mode=True)],
    "memory order": [Op(ops.moved_round), Op(ops.reversed_order)],
    "other dtype": [
        Op(ops.in_double),
        Op(ops.in_bfloat16),
        Op(ops.in_frequencies),
    ],
}
COUNTS = ("attribute", "list", "dict", "array", "iterator", "tensor")
ANYWHERE["counter"] = [partial(made.Counter, where) for where in COUNTS]
"""What fits any shape and keeps it."""


def sized(shape: Shape) -> list[Piece]:
    """List the pieces that depend on the shape; some change it."""
    pieces = [
        Piece("layer norm", partial(nn.LayerNorm, shape[-1]), shape),
        Piece("linear", partial(nn.Linear, shape[-1], shape[-1]), shape),
        Piece("adapter", partial(made.Adapter, shape[-1]), shape),
        Piece(
            "expanded",
            Op(partial(ops.expanded, sizes=(*[-1] * len(shape), shape[-1]))),
            shape,
        ),
        Piece(
            "view",
            partial(Steps, nn.Flatten, partial(nn.Unflatten, 1, shape)),
            shape,
        ),
    ]
    if len(shape) > 1:
        moved = (*shape[:-2], shape[-1], shape[-2])
        pieces.append(Piece("transpose", Op(ops.transposed), moved))
    if shape[-1] > 4:
        fewer = (*shape[:-1], (shape[-1] + 1) // 2)
        pieces.append(Piece("slice with gaps", Op(ops.every_second), fewer))
    if len(shape) == 3:
        return pieces + _for_images(shape)
    return pieces + (_for_sequences(shape) if len(shape) == 2 else _for_vectors(shape))


def _for_images(shape: Shape) -> list[Piece]:
    channels, height, width = shape
    norm = partial(partial, nn.BatchNorm2d, channels)
    convolution = partial(nn.Conv2d, channels, 4, 3, padding=1)
    pieces = [Piece("convolution", convolution, (4, height, width))]
    pieces += [
        Piece("batch norm", norm(**options), shape)
        for options in ({}, {"momentum": 0.3}, {"affine": False})
    ]
    pieces += [
        Piece("batch norm without momentum", norm(momentum=None), shape),
        Piece("batch norm untracked", norm(track_running_stats=False), shape),
        Piece("group norm", partial(nn.GroupNorm, 1, channels), shape),
        Piece("feature dropout", partial(nn.Dropout2d, 0.3), shape),
        Piece("channels last", Op(ops.channels_last), shape),
        Piece("as sequence", Op(ops.as_sequence), (height * width, channels)),
    ]
    if height * width > 1:
        for tracked in (False, True):
            part = partial(
                nn.InstanceNorm2d, channels, affine=True, track_running_stats=tracked
            )
            pieces.append(Piece("instance norm", part, shape))
    if min(height, width) > 1:
        half = (channels, height // 2, width // 2)
        pieces += [
            Piece("pool", partial(nn.MaxPool2d, 2), half),
            Piece("pool", Op(partial(functional.avg_pool2d, kernel_size=2)), half),
        ]
    return pieces


def _for_sequences(shape: Shape) -> list[Piece]:
    length, size = shape
    options = {"batch_first": True}
    pieces = [
        Piece("batch norm", partial(nn.BatchNorm1d, length), shape),
        Piece(
            "lstm",
            partial(made.Recurrent, partial(nn.LSTM, size, size, **options), "lstm"),
            shape,
        ),
        Piece(
            "gru",
            partial(made.Recurrent, partial(nn.GRU, size, 4, **options), "gru"),
            (length, 4),
        ),
        Piece("last of a sequence", Op(ops.last_of_sequence), (size,)),
    ]
    if size % 2 == 0:
        attention = partial(nn.MultiheadAttention, size, 2, dropout=0.2, **options)
        encoder = partial(
            nn.TransformerEncoderLayer, size, 2, 8, dropout=0.2, **options
        )
        pieces += [
            Piece("attention", partial(made.Recurrent, attention, "attention"), shape),
            Piece("attention", encoder, shape),
        ]
    return pieces


def _for_vectors(shape: Shape) -> list[Piece]:
    (size,) = shape
    return [
        Piece("linear", partial(nn.Linear, size, 6), (6,)),
        Piece("batch norm", partial(nn.BatchNorm1d, size), shape),
        Piece(
            "batch norm without momentum",
            partial(nn.BatchNorm1d, size, momentum=None),
            shape,
        ),
        Piece(
            "view",
            partial(nn.Unflatten, 1, (2, size // 2)) if size % 2 == 0 else nn.Identity,
            (2, size // 2) if size % 2 == 0 else shape,
        ),
    ]


# --- pieces of pieces -----------------------------------------------------------------


class _Drawing:
    """Draws one model, and remembers what is in it."""

    def __init__(self, choose: Choose) -> None:
        self.choose = choose
        self.features: set[str] = set()

    def one_of(self, examples: dict[str, list[Any]]) -> tuple[str, Any]:
        """Draw a feature and one of its examples."""
        feature = self.choose(sorted(examples))
        self.features.add(feature)
        return feature, self.choose(examples[feature])

    def piece(self, shape: Shape, *, depth: int, keeps_shape: bool = False) -> Piece:
        """Draw one piece, which may have pieces of its own."""
        choices: dict[str, list[Any]] = {
            name: [Piece(name, part, shape) for part in parts]
            for name, parts in ANYWHERE.items()
        }
        for piece in sized(shape):
            if piece.shape == shape or not keeps_shape:
                choices.setdefault(piece.feature, []).append(piece)
        if depth:
            containers = self._containers(shape, depth - 1)
            if keeps_shape:
                del containers["concat"]
            choices |= {name: [make] for name, make in containers.items()}
        feature, chosen = self.one_of(choices)
        if isinstance(chosen, Piece):
            return chosen
        part = chosen()
        if feature == "concat":
            shape = (2 * shape[0], *shape[1:])
        return Piece(feature, part, shape)

    def body(self, shape: Shape, depth: int) -> Build:
        """Draw one or two pieces that keep the shape."""
        count = self.choose((1, 2))
        piece = partial(self.piece, shape, depth=depth, keeps_shape=True)
        return partial(Steps, *(piece().part for _ in range(count)))

    def _containers(self, shape: Shape, depth: int) -> dict[str, Callable[[], Build]]:
        """List what has bodies; each is drawn when it is called."""
        body = partial(self.body, shape, depth)
        size = shape[-1]
        choose, layer = self.choose, partial(nn.Linear, size, size)
        norms = [p.part for p in sized(shape) if p.feature == "batch norm"]
        found: dict[str, Callable[[], Build]] = {
            "residual": lambda: partial(made.Residual, body(), "sum"),
            "in-place residual": lambda: partial(
                made.Residual,
                body(),
                self.choose(("into the body", "into the way around")),
            ),
            "stochastic depth": lambda: partial(
                made.Residual, body(), choose(("row", "batch"))
            ),
            "concat": lambda: partial(made.Concat, body(), body()),
            "shared": lambda: partial(made.Shared, body(), body()),
            "tied": lambda: partial(made.Tied, layer, body(), self.choose(YES_NO)),
            "direct": lambda: partial(made.Direct, body(), size, self.choose(YES_NO)),
            "constant": lambda: partial(made.Constant, body(), size),
            "running mean": lambda: partial(made.RunningMean, body(), size),
            "other body by mode": lambda: partial(made.ByMode, body(), body()),
            "aside": lambda: partial(made.Aside, body(), body()),
            "frozen": lambda: partial(made.frozen, body()),
            "skips": lambda: partial(
                made.Skips,
                choose(("added", "as a mask", "detached")),
                *(body() for _ in range(choose((2, 3)))),
            ),
            "counting": lambda: partial(made.Counting, body(), choose(COUNTS)),
            "nested": body,
        }
        if norms:
            found["kept in eval"] = lambda: partial(made.InEval, norms[0], body())
        if shape[0] % 2 == 0:
            half = (shape[0] // 2, *shape[1:])
            found["chunks"] = lambda: partial(
                made.Chunks,
                self.body(half, depth),
                choose(("chunk", "split", "slices")),
                half[0],
            )
        return found

    def stem(self, kind: str, shape: Shape) -> tuple[Tensor, list[Part], Shape]:
        """Draw inputs and what first has parameters; nobody writes into a batch."""
        if kind == "tokens":
            tokens = torch.arange(28).reshape(7, 4) % 7
            return tokens, [partial(nn.Embedding, 7, 4)], (*shape, 4)
        prepared = {"raw inputs": [[]], "prepared inputs": [[Op(ops.prepared)]]}
        first = list(self.one_of(prepared)[1])
        if kind == "image":
            first.append(partial(nn.Conv2d, shape[0], 4, 3, padding=1, bias=False))
            return torch.zeros(1, *shape), first, (4, *shape[1:])
        first.append(partial(nn.Linear, shape[-1], shape[-1]))
        return torch.zeros(1, *shape), first, shape

    def steps(self, shape: Shape, *, most: int) -> tuple[list[Part], Shape]:
        """Draw several pieces, and return the shape after them."""
        parts = []
        for _ in range(self.choose(range(1, most + 1))):
            piece = self.piece(shape, depth=2)
            parts.append(piece.part)
            shape = piece.shape
        return parts, shape

    def partly_frozen(self, front: Build, back: Build) -> tuple[Build, Build]:
        """Draw which half of a model is not trained, if any."""
        kinds = ("front", "back", "all but biases", *["nothing"] * 5)
        kind = self.choose(kinds)
        if kind != "nothing":
            self.features.add(f"frozen {kind}")
        if kind == "all but biases":
            only = partial(partial, made.with_biases_only)
            return only(front), only(back)
        if kind == "front":
            return partial(made.frozen, front), back
        return front, partial(made.frozen, back) if kind == "back" else back

    def ending(self, shape: Shape) -> list[Part]:
        """Draw how a shape becomes a few classes, with or without a layer."""
        parts: list[Part] = []
        if len(shape) == 3:
            flat = int(torch.Size(shape).numel())
            means = self.choose(YES_NO)
            parts.append(Op(ops.image_mean) if means else nn.Flatten)
            size = shape[0] if means else flat
        elif len(shape) == 2:
            parts.append(Op(ops.last_of_sequence))
            size = shape[-1]
        else:
            (size,) = shape
        if size < 2 or self.choose((True, True, True, False)):
            return [*parts, partial(nn.Linear, size, 3)]
        self.features.add("end without parameters")
        return parts


# --- whole models ---------------------------------------------------------------------

INPUTS: dict[str, list[Shape]] = {
    "image": [(2, 6, 6), (4, 5, 4)],
    "sequence": [(4, 4), (3, 6)],
    "vector": [(4,), (8,)],
    "tokens": [(4,)],
}


@st.composite
def random_models(draw: st.DrawFn) -> RandomModel:
    """Draw models that Hypothesis can make smaller."""
    return random_model(lambda values: draw(st.sampled_from(values)))


def random_model(choose: Choose) -> RandomModel:
    """Draw a model, its inputs and its optimizer; ``Random(seed).choice`` does."""
    drawing = _Drawing(choose)
    kind, shape = drawing.one_of(INPUTS)
    inputs, stem, shape = drawing.stem(kind, shape)
    parts, middle = drawing.steps(shape, most=3)
    front: Build = partial(Steps, *stem, *parts)
    parts, last = drawing.steps(middle, most=3)
    if choose(range(16)) == 15:
        drawing.features.add("branch on values")
        parts.append(Op(ops.branched_on_values))
    back: Build = partial(Steps, *parts, *drawing.ending(last))
    front, back = drawing.partly_frozen(front, back)
    most = choose((1, 1, 3, 8))
    if most > 1:
        drawing.features.add("several boundary tensors")
    structure = choose(["line", "auxiliary", "tuple", "dict"])
    drawing.features.add(structure)
    example: Batch = inputs
    if structure == "line":
        build: Build = partial(Steps, front, back)
    elif structure == "auxiliary":
        aside = partial(Steps, *drawing.ending(middle))
        build = partial(made.Auxiliary, front, aside, back)
    else:
        build = partial(made.Joined, front, back)
        second = torch.zeros(len(inputs), *middle)
        named = {"y": second, "x": inputs}
        example = named if structure == "dict" else (inputs, second)
    if choose(range(5)) == 4:
        drawing.features.add("channels-last model")
        build = partial(made.in_channels_last, build)
    return RandomModel(
        build=build,
        example_inputs=example,
        optimizer=choose(sorted(OPTIMIZERS)),
        features=frozenset(drawing.features),
        max_boundary_tensors=most,
    )
