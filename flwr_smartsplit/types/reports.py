"""Reports: what clients and edges say of a round after it."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy.typing as npt

from flwr_smartsplit.types.variants import WHOLE, Variant


class Status(StrEnum):
    """How one client's part of a round ended."""

    OK = "ok"
    OUT_OF_MEMORY = "out_of_memory"
    EDGE_FAILED = "edge_failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A move of a route's first cut after ``step`` steps of a round."""

    step: int
    before: int
    after: int
    reason: str = ""  # for the journal


@dataclass(frozen=True, slots=True, kw_only=True)
class Replan:
    """A change of what a device recomputes after ``step`` steps of a round, as text."""

    step: int
    before: str
    after: str
    reason: str = ""  # for the journal


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What a client measured during its part of a round.

    Parameters
    ----------
    status : Status
        How it ended.
    message : str
        The error's text if ``status`` is not OK.
    num_examples, num_steps : int
        Examples of one epoch, which are the client's weight, and all optimizer steps.
    num_epochs : int
        Passes over these examples.
    loss : float
        Mean loss over the examples.
    loss_rms : float
        Root mean square, over the examples, of their batch's loss.
    loss_drop : float
        Mean loss of the first half of the steps, less that of the second half.
    peak_bytes : int
        The most that the device held in the metered steps.
    resident_growth_bytes : int or None
        Growth of the process's resident set; None if the client is not alone in its
        process, or the system does not report it.
    sent_bytes, received_bytes : int
        Traffic between the device and its edges.
    seconds : float
        Wall-clock time of the client's part.
    num_threads : int
        Torch threads in use.
    metrics : Mapping[str, float]
        What ``Task.metrics_fn`` returned, averaged over the examples.
    moves : tuple[Move, ...]
        How the first cut moved during the round, in order.
    replans : tuple[Replan, ...]
        How the recompute plan changed during the round, in order.
    step_seconds : float
        Mean time of a training step on the final route, by the client's clock or its
        ``step_seconds``; 0 if unknown.
    released : str
        Why the edge let it stop early; empty if it did not. Then ``num_examples`` are
        those it trained on, and ``num_epochs`` includes the last, unfinished pass.
    """

    status: Status = Status.OK
    message: str = ""
    num_examples: int = 0
    num_epochs: int = 1
    num_steps: int = 0
    loss: float = 0.0
    loss_rms: float = 0.0
    loss_drop: float = 0.0
    peak_bytes: int = 0
    resident_growth_bytes: int | None = None
    sent_bytes: int = 0
    received_bytes: int = 0
    seconds: float = 0.0
    num_threads: int = 1
    metrics: Mapping[str, float]
    moves: tuple[Move, ...] = ()
    replans: tuple[Replan, ...] = ()
    step_seconds: float = 0.0
    released: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """An edge's confirmation that it holds one finished tail."""

    place: str
    incarnation: str  # of the edge that sealed it; a restart changes it
    session: str
    names: tuple[str, ...]  # of the tail's state
    digest: str  # SHA-256 over names, dtypes, shapes and values
    num_examples: int  # with which the tail was stepped, as num_steps
    num_steps: int
    variant: Variant = WHOLE


@dataclass(frozen=True, slots=True, kw_only=True)
class TailExpectation:
    """The sealed tail that a client's receipt must prove."""

    session: str
    names: frozenset[str]
    variant: Variant = WHOLE


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """What the reply of one chosen client must contain; ``tails`` by place."""

    client_key: str
    device_names: frozenset[str]
    tails: Mapping[str, TailExpectation]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientReply:
    """A client's reply to a training request, whichever API carried it."""

    client_key: str
    round_number: int
    state: Mapping[str, npt.NDArray[Any]]
    receipts: tuple[Receipt, ...]
    report: StepReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """One client's part that was not merged, and why.

    Parameters
    ----------
    client_key : str
        The client, or the node where no key is known.
    kind : str
        The reason in one word: refused, late, duplicate, lost, failed, out_of_memory,
        edge_failed.
    cause : str
        The reason in a sentence, with its numbers.
    report : StepReport, optional
        What the client measured, if it was reported.
    """

    client_key: str
    kind: str
    cause: str
    report: StepReport | None = None
