"""Devices, plans, reports and replies: what one round says and is told."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from math import inf
from typing import Any

import numpy.typing as npt

from flwr_smartsplit.types.devices import NO_TRAITS, DeviceTraits
from flwr_smartsplit.types.recompute import KEEP_ALL, RecomputePlan
from flwr_smartsplit.types.refining import Cohort
from flwr_smartsplit.types.routes import Route


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProfile:
    """What a client says of itself before a round is planned.

    Parameters
    ----------
    client_key : str
        Stable name of the client; orders, seeds and remembers everything.
    budget_bytes : int or None
        Memory its tensors may take at any moment; None means no limit.
    num_examples : int
        Size of its training set.
    batch_size : int
        Examples per training step.
    num_epochs : int
        Passes over its training set in a round.
    traits : DeviceTraits
        What else it says.
    """

    client_key: str
    budget_bytes: int | None
    num_examples: int
    batch_size: int
    num_epochs: int = 1
    traits: DeviceTraits = NO_TRAITS

    @property
    def num_steps(self) -> int:
        """How many optimizer steps it takes in a round, a last small batch included."""
        return -(-self.num_examples // self.batch_size) * self.num_epochs


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """The route the policy gives one chosen client, and what it should cost.

    Parameters
    ----------
    client_key : str
        The client.
    route : Route
        Where its segments run.
    budget_bytes : int or None
        The cap of the device; None for no cap.
    predicted_peak_bytes : int
        What the device should hold at most.
    recompute : RecomputePlan
        What the device runs twice.
    predicted_seconds : float or None
        How long its part should take; None if its speed is unknown.
    why : str
        Why it was chosen.
    features : tuple[float, ...]
        What a surrogate knew of it, to learn from what the round brings.
    """

    client_key: str
    route: Route
    budget_bytes: int | None
    predicted_peak_bytes: int
    recompute: RecomputePlan = KEEP_ALL
    predicted_seconds: float | None = None
    why: str = ""
    features: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundPlan:
    """Who trains what where in one round, and why the others do not.

    Parameters
    ----------
    round_number : int
        The round, counted from 1.
    assignments : tuple[Assignment, ...]
        The chosen clients in client_key order.
    skipped : Mapping[str, str]
        For every other client the reason, by client_key.
    unfit : frozenset[str]
        Those of them that have no route at all.
    """

    round_number: int
    assignments: tuple[Assignment, ...]
    skipped: Mapping[str, str]
    unfit: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientPlan:
    """All a client needs to know to do its part of one round.

    Parameters
    ----------
    client_key : str
        Whom the plan is for.
    round_number : int
        The round, counted from 1.
    route : Route
        Where its segments run.
    seed : int
        Root of every random stream of the run.
    num_threads : int
        Torch threads at every place; gradients differ in their last bits between
        thread counts, so the plan sets it.
    budget_bytes : int or None
        The cap of the device; None for no cap.
    state_digest : str
        Digest under which the edges hold this round's global state.
    edge_addresses : Mapping[str, str]
        How to reach each edge of the route, by place.
    recompute : RecomputePlan
        What the device runs twice.
    predicted_peak_bytes : int, optional
        What the device should hold at most under route and plan.
    config : Mapping[str, bool | int | float | str]
        What the user's ``train_config`` says in this round, for ``Task.schedule_fn``.
    min_device_units : int
        Fewest units that stay at the device, wherever its cut moves.
    slice_size : int or None
        Samples that the front runs at a time, each twice; None runs the whole batch.
    cohort : Cohort or None
        What the edge compares this client with, to move its cut or release it; None
        leaves it alone.
    importance : float
        How important the client was after its last round; 0 if that is not known.
    num_examples : int
        Its examples, as far as the strategy knows.

    Raises
    ------
    ValueError
        If there is a cohort, and the client's own numbers mean nothing.
    """

    client_key: str
    round_number: int
    route: Route
    seed: int
    num_threads: int = 1
    budget_bytes: int | None = None
    state_digest: str = ""
    edge_addresses: Mapping[str, str]
    recompute: RecomputePlan = KEEP_ALL
    predicted_peak_bytes: int | None = None
    config: Mapping[str, bool | int | float | str] = field(default_factory=dict)
    min_device_units: int = 1
    slice_size: int | None = None
    cohort: Cohort | None = None
    importance: float = 0.0
    num_examples: int = 0

    def __post_init__(self) -> None:
        """Refuse to compare a client of whom nothing is known."""
        is_known = self.num_examples >= 1 and 0 <= self.importance < inf
        if self.cohort is not None and not is_known:
            raise ValueError(
                f"client {self.client_key!r} has a cohort, {self.num_examples} "
                f"examples and importance {self.importance}: give at least one "
                "example, and an importance of at least 0."
            )

    def session(self, place: str) -> str:
        """Name this client's session at one place in this round."""
        return f"{self.round_number}/{self.client_key}/{place}"


class Status(StrEnum):
    """How one client's part of a round ended."""

    OK = "ok"
    OUT_OF_MEMORY = "out_of_memory"
    EDGE_FAILED = "edge_failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """The first cut of a route, moved between two steps of a round.

    Parameters
    ----------
    step : int
        How many steps were done before.
    before, after : int
        The cut.
    reason : str
        Why, for the journal.
    """

    step: int
    before: int
    after: int
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replan:
    """A change of what a device runs twice, between two steps of a round.

    Parameters
    ----------
    step : int
        How many steps were done before.
    before, after : str
        The recompute plan, as text.
    reason : str
        Why, for the journal.
    """

    step: int
    before: str
    after: str
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What a client measured while it did its part of a round.

    Parameters
    ----------
    status : Status
        How it ended.
    message : str
        The error's text when ``status`` is not OK.
    num_examples, num_steps : int
        Examples of one epoch, which is the client's weight, and all optimizer steps.
    num_epochs : int
        Passes over these examples.
    loss : float
        Mean loss over the examples.
    loss_rms : float
        Root of the mean over the examples of their batch's loss, squared.
    loss_drop : float
        Mean loss of the first half of the steps, less that of the second half.
    peak_bytes : int
        The most the device held in the metered steps.
    resident_growth_bytes : int or None
        Growth of the process's resident set, where the client is alone in its process;
        None where it is not, or the system does not say.
    sent_bytes, received_bytes : int
        Traffic between the device and its edges.
    seconds : float
        Wall-clock time of the client's part.
    num_threads : int
        Torch threads in force.
    metrics : Mapping[str, float]
        What ``Task.metrics_fn`` returned, averaged over the examples.
    moves : tuple[Move, ...]
        How the first cut moved since the round began, in order.
    replans : tuple[Replan, ...]
        How what runs twice changed since then, in order.
    step_seconds : float
        Mean time of a training step as the route ended, by the client's clock or its
        ``step_seconds``; 0 if nobody knows.
    released : str
        Why the edge let it stop early; empty if it did not. Then ``num_examples`` are
        those it trained on, and ``num_epochs`` counts the last, unfinished pass too.
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
    """An edge's word that it holds one finished tail.

    Parameters
    ----------
    place : str
        The edge's name in the route.
    incarnation : str
        Which life of the edge sealed it.
    session : str
        The session that was sealed.
    names : tuple[str, ...]
        The state names the tail covers.
    digest : str
        SHA-256 over names, dtypes, shapes and values.
    num_examples, num_steps : int
        What the tail was stepped with.
    """

    place: str
    incarnation: str
    session: str
    names: tuple[str, ...]
    digest: str
    num_examples: int
    num_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TailExpectation:
    """The sealed tail a client's receipt must prove."""

    session: str
    names: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """What the reply of one chosen client must contain.

    Parameters
    ----------
    client_key : str
        The client.
    device_names : frozenset[str]
        The state names of its device segments.
    tails : Mapping[str, TailExpectation]
        The tails of its route, by place.
    """

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
        The reason in one word: refused, late, duplicate, lost, failed,
        out_of_memory, edge_failed.
    cause : str
        The reason in a sentence, with its numbers.
    report : StepReport, optional
        What the client measured, if it said so.
    """

    client_key: str
    kind: str
    cause: str
    report: StepReport | None = None
