"""Reports: what clients and edges say of a round after it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy.typing as npt

from flwr_smartsplit.types.costs import Shapes
from flwr_smartsplit.types.variants import WHOLE, Regions, Variant

ROW_FACTS = frozenset(
    """kind phase round client_key status cause route budget_bytes num_examples
    predicted_peak_bytes predicted_seconds why peak_bytes resident_growth_bytes
    num_steps num_threads loss loss_rms seconds bytes_down bytes_up
    edge_bytes_up edge_bytes_down edge_bytes_raw_up edge_bytes_raw_down moves replans
    released recompute variant step_flops edge_step_flops codecs accumulate
    metric_examples merge version staleness""".split()
)
"""The keys of a client's row in the journal; all others are the task's metrics."""

RESERVED_METRICS = ROW_FACTS | {
    "device-peak-bytes",
    "num-examples",
    "num-steps",
    "received-bytes",
    "sent-bytes",
}
"""Names of what is reported besides the task's metrics; none of these may have one."""


OF_EXAMPLES = ".num-examples"
"""Ends the name under which a partial metric's number of examples is reported."""

FISHER = "fisher"
"""The metric of a training report that says how large its gradients were."""


class Status(StrEnum):
    """How one client's part of a round ended."""

    OK = "ok"
    OUT_OF_MEMORY = "out_of_memory"
    EDGE_FAILED = "edge_failed"
    NOT_HELD = "not_held"


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
    """What a client measured during its part of a round."""

    status: Status = Status.OK
    message: str = ""  # The error's text if ``status`` is not OK
    num_examples: int = 0  # Of one epoch: the client's weight
    num_epochs: int = 1  # Passes over these examples
    num_steps: int = 0  # Of the optimizer, in all passes
    loss: float = 0.0  # Mean over the examples
    loss_rms: float = 0.0  # Root mean square, over the examples, of their batch's loss
    peak_bytes: int = 0  # The most that the device held in the metered steps
    # Of the process's resident set; None if others share the process, or it is unknown
    resident_growth_bytes: int | None = None
    sent_bytes: int = 0  # From the device to its edges
    received_bytes: int = 0
    # What both would be if every tensor crossed as it is; 0 if every one did
    plain_sent_bytes: int = 0
    plain_received_bytes: int = 0
    seconds: float = 0.0  # Wall-clock time of the client's part
    num_threads: int = 1  # Torch threads in use
    metrics: Mapping[str, float]  # Of ``Task.metrics_fn``, averaged over the examples
    # Of each metric that some batches lack, the examples over which it is the mean
    metric_examples: Mapping[str, int] = field(default_factory=dict)
    moves: tuple[Move, ...] = ()  # Of the first cut, in order
    replans: tuple[Replan, ...] = ()  # Changes of the recompute plan, in order
    step_seconds: float = 0.0  # Mean on the final route; 0 if unknown
    example_shapes: Shapes = ()  # The largest it met, if larger than the task's
    # Why the edge let it stop early. Then ``num_examples`` are those it trained on, and
    # ``num_epochs`` includes the last, unfinished pass.
    released: str = ""
    frozen_digest: str = ""  # Of the frozen state that the node keeps for later rounds

    def examples_of(self, metric: str) -> int:
        """Count the examples over which a metric is the mean."""
        return self.metric_examples.get(metric, self.num_examples)


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
    variant: Variant = WHOLE
    regions: Regions = field(default_factory=dict)  # What it has of the global state
    round_number: int | None = None  # That it must answer; None for the present one


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
        refused, late, duplicate, lost, failed, out_of_memory, edge_failed or not_held.
    cause : str
        The reason in a sentence, with its numbers.
    report : StepReport, optional
        What the client measured, if it was reported.
    """

    client_key: str
    kind: str
    cause: str
    report: StepReport | None = None
