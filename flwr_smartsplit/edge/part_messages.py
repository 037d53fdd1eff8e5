"""What crosses when a device sends its boundary in slices, and how it is ordered.

A step then has many messages: the parts of the boundary, one request for the step,
and one for each part of the gradient. Each has its place in the order of a session,
``(number, offset)``: the half step, and the sample at which a part begins.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.tensors import WireTensor
from flwr_smartsplit.types import Advice

PER_STEP = 2  # A step has two halves in the order of messages: there, and back.

WHOLE = -1  # Stands for the sample at which a gradient begins that comes whole.


@dataclass(frozen=True, slots=True)
class Taken:
    """A part is there; so many samples are, with it."""

    num_examples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundaryPart(wire.Request[Taken]):
    """Take the boundary of some samples, until all of the batch are there.

    Parameters
    ----------
    session, incarnation : str
        The session, and the life of the edge that opened it.
    step : int
        Number of the step, or of the batch that is evaluated, from 0.
    start : int
        The first sample of the part.
    num_examples : int
        How many samples the whole batch has.
    boundary : WireTensor
        What the device computed from these samples.
    context : tuple[WireTensor, ...]
        What goes along with it and needs no gradient.
    """

    session: str
    incarnation: str
    step: int
    start: int
    num_examples: int
    boundary: WireTensor
    context: tuple[WireTensor, ...] = ()


@dataclass(frozen=True, slots=True)
class PartsStepped:
    """Loss of a batch, and norms if they are clipped; the gradient is asked for."""

    loss: float
    norms: Mapping[str, float] = field(default_factory=dict)
    advice: Advice | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainParts(wire.Request[PartsStepped]):
    """Do all that is left of a training step whose boundary came in parts.

    The parameters are those of ``TrainStep``.
    """

    session: str
    incarnation: str
    step: int
    targets: WireTensor
    norm: float | None = None
    step_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Gradient:
    """The gradient of the boundary of some samples."""

    gradient: WireTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientPart(wire.Request[Gradient]):
    """Ask for the gradient of samples ``[start, stop)`` of the step before."""

    session: str
    incarnation: str
    step: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateParts(wire.Request[wire.Evaluated]):
    """Do all that is left of evaluating a batch whose boundary came in parts."""

    session: str
    incarnation: str
    step: int
    targets: WireTensor


def place_of(request: Any) -> tuple[int, int]:
    """Tell a message's place in the order of its session."""
    number = request.step * PER_STEP
    match request:
        case BoundaryPart():
            return number, request.start
        case TrainParts() | EvaluateParts():
            return number, request.targets.shape[0]  # After all of the batch's parts.
        case GradientPart():
            return number + 1, request.start
        case wire.BackwardStep():
            return number + 1, WHOLE
    return number, 0
