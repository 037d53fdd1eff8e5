"""Random small modules for the property that every offered cut is exact.

A piece says what to build, as ``partial`` objects that can be read and pasted, and
which shape comes out, so shapes always fit. A drawn model can therefore fail on its
own only where an operator writes over what autograd still needs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import hypothesis.strategies as st
import torch
from torch import Tensor, nn
from torch.nn import functional

from flwr_smartsplit.model.segment import Batch
from flwr_smartsplit.task import Task
from tests import random_containers as made
from tests.models import OPTIMIZERS, seeded
from tests.random_containers import Build, Op, Part, Steps

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

    @property
    def task(self) -> Task:
        """Make a new task of it; a closure, so no process keeps its chain."""
        return Task(
            model_fn=lambda: seeded(self.build),
            loss_fn=loss_of,
            optimizer_fn=OPTIMIZERS[self.optimizer],
            example_inputs=self.example_inputs,
            example_targets=torch.arange(2),
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
        Op(made.raised),
        Op(made.scaled),
    ],
    "in-place on a view": [
        Op(made.start_doubled),
        Op(made.flat_rectified),
        Op(made.slices_rejoined),
    ],
    "in-place on a copy": [Op(made.copy_written)],
    "dropout": [partial(nn.Dropout, 0.3)],
    "in-place dropout": [
        partial(nn.Dropout, 0.3, inplace=True),
        Op(made.dropped_in_place, knows_mode=True),
    ],
    "functional dropout": [Op(partial(functional.dropout, p=0.3), knows_mode=True)],
    "alpha dropout": [
        partial(nn.AlphaDropout, 0.3),
        partial(nn.FeatureAlphaDropout, 0.3),
        Op(partial(functional.feature_alpha_dropout, p=0.3), knows_mode=True),
    ],
    "noise": [Op(made.noisy, knows_mode=True), Op(made.masked, knows_mode=True)],
    "noisy activation": [nn.RReLU, partial(nn.RReLU, inplace=True)],
    "other operations by mode": [Op(made.other_by_mode, knows_mode=True)],
    "memory order": [Op(made.moved_round), Op(made.reversed_order)],
    "other dtype": [Op(made.in_double), Op(made.in_bfloat16), Op(made.in_frequencies)],
}
"""What fits any shape and keeps it."""


def sized(shape: Shape) -> list[Piece]:
    """List the pieces that depend on the shape; some change it."""
    pieces = [
        Piece("layer norm", partial(nn.LayerNorm, shape[-1]), shape),
        Piece("linear", partial(nn.Linear, shape[-1], shape[-1]), shape),
        Piece(
            "expanded",
            Op(partial(made.expanded, sizes=(*[-1] * len(shape), shape[-1]))),
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
        pieces.append(Piece("transpose", Op(made.transposed), moved))
    if shape[-1] > 4:
        fewer = (*shape[:-1], (shape[-1] + 1) // 2)
        pieces.append(Piece("slice with gaps", Op(made.every_second), fewer))
    if len(shape) == 3:
        return pieces + _for_images(shape)
    return pieces + (_for_sequences(shape) if len(shape) == 2 else _for_vectors(shape))


def _for_images(shape: Shape) -> list[Piece]:
    channels, height, width = shape
    pieces = [
        Piece("convolution", partial(nn.Conv2d, channels, to, 3, padding=1), out)
        for to in (channels, 4)
        for out in [(to, height, width)]
    ]
    pieces += [
        Piece("batch norm", partial(nn.BatchNorm2d, channels, **options), shape)
        for options in ({}, {"momentum": 0.3}, {"affine": False})
    ]
    pieces += [
        Piece("batch norm without momentum", _norm(channels, momentum=None), shape),
        Piece("batch norm untracked", _norm(channels, track_running_stats=False), shape),
        Piece("group norm", partial(nn.GroupNorm, 1, channels), shape),
        Piece("feature dropout", partial(nn.Dropout2d, 0.3), shape),
        Piece("channels last", Op(made.channels_last), shape),
        Piece("as sequence", Op(made.as_sequence), (height * width, channels)),
    ]
    if height * width > 1:
        for tracked in (False, True):
            norm = partial(
                nn.InstanceNorm2d, channels, affine=True, track_running_stats=tracked
            )
            pieces.append(Piece("instance norm", norm, shape))
    if min(height, width) > 1:
        half = (channels, height // 2, width // 2)
        pieces += [
            Piece("pool", partial(nn.MaxPool2d, 2), half),
            Piece("pool", Op(partial(functional.avg_pool2d, kernel_size=2)), half),
        ]
    return pieces


def _norm(channels: int, **options: object) -> Build:
    return partial(nn.BatchNorm2d, channels, **options)  # type: ignore[arg-type]


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
        Piece("last of a sequence", Op(made.last_of_sequence), (size,)),
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

    def __init__(self, draw: Callable[[st.SearchStrategy], object]) -> None:
        self.draw = draw
        self.features: set[str] = set()

    def one_of(self, feature_to_parts: dict) -> tuple:
        """Draw a feature and one of its examples."""
        feature = self.draw(st.sampled_from(sorted(feature_to_parts)))
        self.features.add(feature)
        return feature, self.draw(st.sampled_from(feature_to_parts[feature]))

    def piece(self, shape: Shape, *, depth: int, keeps_shape: bool = False) -> Piece:
        """Draw one piece, which may have pieces of its own."""
        choices: dict[str, list] = {
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
        count = self.draw(st.integers(1, 2))
        pieces = [
            self.piece(shape, depth=depth, keeps_shape=True) for _ in range(count)
        ]
        return partial(Steps, *(piece.part for piece in pieces))

    def _containers(
        self, shape: Shape, depth: int
    ) -> dict[str, Callable[[], Build]]:
        """List what has bodies; each is drawn when it is called."""
        body = partial(self.body, shape, depth)
        size = shape[-1]
        layer = partial(nn.Linear, size, size)
        norms = [p.part for p in sized(shape) if p.feature == "batch norm"]
        pick = lambda *values: self.draw(st.sampled_from(values))  # noqa: E731
        found: dict[str, Callable[[], Build]] = {
            "residual": lambda: partial(made.Residual, body(), "sum"),
            "in-place residual": lambda: partial(
                made.Residual, body(), pick("into the body", "into the way around")
            ),
            "stochastic depth": lambda: partial(
                made.Residual, body(), pick("row", "batch")
            ),
            "concat": lambda: partial(made.Concat, body(), body()),
            "shared": lambda: partial(made.Shared, body(), body()),
            "tied": lambda: partial(made.Tied, layer, body(), pick(True, False)),
            "direct": lambda: partial(made.Direct, body(), size, pick(True, False)),
            "constant": lambda: partial(made.Constant, body(), size),
            "running mean": lambda: partial(made.RunningMean, body(), size),
            "other body by mode": lambda: partial(made.ByMode, body(), body()),
            "aside": lambda: partial(made.Aside, body(), body()),
            "frozen": lambda: partial(made.frozen, body()),
            "nested": body,
        }
        if norms:
            found["kept in eval"] = lambda: partial(made.InEval, norms[0], body())
        if shape[0] % 2 == 0:
            half = (shape[0] // 2, *shape[1:])
            found["chunks"] = lambda: partial(
                made.Chunks,
                self.body(half, depth),
                pick("chunk", "split", "slices"),
                half[0],
            )
        return found

    def stem(self, kind: str, shape: Shape) -> tuple[Tensor, list[Part], Shape]:
        """Draw inputs and what first has parameters; nobody writes into a batch."""
        if kind == "tokens":
            tokens = torch.arange(28).reshape(7, 4) % 7
            return tokens, [partial(nn.Embedding, 7, 4)], (*shape, 4)
        prepared = {"raw inputs": [[]], "prepared inputs": [[Op(made.prepared)]]}
        first = list(self.one_of(prepared)[1])
        if kind == "image":
            first.append(partial(nn.Conv2d, shape[0], 4, 3, padding=1, bias=False))
            return torch.zeros(1, *shape), first, (4, *shape[1:])
        first.append(partial(nn.Linear, shape[-1], shape[-1]))
        return torch.zeros(1, *shape), first, shape

    def steps(self, shape: Shape, *, most: int) -> tuple[list[Part], Shape]:
        """Draw several pieces, and return the shape after them."""
        parts = []
        for _ in range(self.draw(st.integers(1, most))):
            piece = self.piece(shape, depth=2)
            parts.append(piece.part)
            shape = piece.shape
        return parts, shape

    def ending(self, shape: Shape) -> list[Part]:
        """Draw how a shape becomes a few classes, with or without a layer."""
        parts: list[Part] = []
        if len(shape) == 3:
            flat = int(torch.Size(shape).numel())
            means = self.draw(st.booleans())
            parts.append(Op(made.image_mean) if means else nn.Flatten)
            size = shape[0] if means else flat
        elif len(shape) == 2:
            parts.append(Op(made.last_of_sequence))
            size = shape[-1]
        else:
            (size,) = shape
        if size < 2 or self.draw(st.integers(0, 3)):
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
    """Draw a model, its inputs and its optimizer."""
    drawing = _Drawing(draw)
    kind, shape = drawing.one_of(INPUTS)
    inputs, stem, shape = drawing.stem(kind, shape)
    parts, middle = drawing.steps(shape, most=3)
    front = partial(Steps, *stem, *parts)
    parts, last = drawing.steps(middle, most=3)
    if draw(st.integers(0, 15)) == 15:
        drawing.features.add("branch on values")
        parts.append(Op(made.branched_on_values))
    back = partial(Steps, *parts, *drawing.ending(last))
    structure, build = drawing.one_of(
        {
            "line": [partial(Steps, front, back)],
            "auxiliary": [
                partial(
                    made.Auxiliary,
                    front,
                    partial(Steps, *drawing.ending(middle)),
                    back,
                )
            ],
            "two inputs": [partial(made.Joined, front, back)],
        }
    )
    example: Batch = inputs
    if structure == "two inputs":
        second = torch.zeros(len(inputs), *middle)
        example = {"y": second, "x": inputs}
        if drawing.one_of({"tuple batch": [True], "dict batch": [False]})[1]:
            example = (inputs, second)
    if draw(st.integers(0, 4)) == 0:
        drawing.features.add("channels-last model")
        build = partial(made.in_channels_last, build)
    return RandomModel(
        build=build,
        example_inputs=example,
        optimizer=draw(st.sampled_from(sorted(OPTIMIZERS))),
        features=frozenset(drawing.features),
    )
