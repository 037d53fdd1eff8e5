"""Frozen values that every layer shares: routes, costs, plans and reports.

They stand apart so that deciding (``policy``) and carrying (``runtime``,
``flower``) can talk to each other without knowing each other.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Any, Self

import numpy.typing as npt

from flwr_smartsplit.errors import InvalidRoute

DEVICE = "device"
EDGE = "edge"


@dataclass(frozen=True, slots=True)
class Leg:
    """Units ``[start, stop)`` of a chain, run at one place."""

    place: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Route:
    """Where the segments of one client's model run.

    Parameters
    ----------
    cuts : tuple[int, ...]
        Strictly increasing indices of the first unit after each boundary; empty for
        a model that stays whole.
    places : tuple[str, ...]
        One place per segment, ``"device"`` first; one more than there are cuts.

    Raises
    ------
    InvalidRoute
        If cuts and places do not fit each other.

    Examples
    --------
    >>> str(Route.split(3))
    'device[:3] > edge[3:]'
    >>> [leg.stop for leg in Route.split(3).legs(8)]
    [3, 8]
    >>> Route.whole().legs(8)
    (Leg(place='device', start=0, stop=8),)
    """

    cuts: tuple[int, ...] = ()
    places: tuple[str, ...] = (DEVICE,)

    def __post_init__(self) -> None:
        """Refuse a route that no chain could have."""
        if len(self.places) != len(self.cuts) + 1:
            raise InvalidRoute(
                f"{len(self.cuts)} cuts make {len(self.cuts) + 1} segments, "
                f"but {len(self.places)} places are given: name one place per segment."
            )
        if self.places[0] != DEVICE:
            raise InvalidRoute(
                f"a route starts at {DEVICE!r}, where the data is, not at "
                f"{self.places[0]!r}."
            )
        ordered = all(low < high for low, high in pairwise(self.cuts))
        if not ordered or any(cut < 1 for cut in self.cuts):
            raise InvalidRoute(
                f"cuts {self.cuts} must be strictly increasing and at least 1."
            )

    @classmethod
    def whole(cls) -> Self:
        """Keep every unit on the device, as FedAvg does."""
        return cls()

    @classmethod
    def split(cls, cut: int, *, edge: str = EDGE) -> Self:
        """Run units ``[0, cut)`` on the device and the rest at one edge."""
        return cls((cut,), (DEVICE, edge))

    def legs(self, num_units: int) -> tuple[Leg, ...]:
        """Lay the route along a chain of ``num_units`` units.

        Raises
        ------
        InvalidRoute
            If a cut lies beyond the last unit.
        """
        if self.cuts and self.cuts[-1] >= num_units:
            raise InvalidRoute(
                f"cut {self.cuts[-1]} is outside a chain of {num_units} units: "
                f"choose one in 1..{num_units - 1}.",
                cut=self.cuts[-1],
                num_units=num_units,
            )
        bounds = (0, *self.cuts, num_units)
        return tuple(
            Leg(place, start, stop)
            for place, (start, stop) in zip(self.places, pairwise(bounds), strict=True)
        )

    def edges(self) -> tuple[str, ...]:
        """Name the places other than the device, in route order, each once."""
        return tuple(dict.fromkeys(p for p in self.places if p != DEVICE))

    def __str__(self) -> str:
        """Show each place with the units it runs."""
        if not self.cuts:
            return "whole"
        bounds = ("", *map(str, self.cuts), "")
        return " > ".join(
            f"{place}[{start}:{stop}]"
            for place, (start, stop) in zip(self.places, pairwise(bounds), strict=True)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitCost:
    """What one unit holds and what crosses the boundary after it.

    Parameters
    ----------
    name : str
        The unit's name in its chain.
    parameter_bytes, buffer_bytes : int
        Size of its parameters and buffers.
    gradient_bytes, optimizer_state_bytes : int
        Size of its parameters' gradients, and of what the optimizer keeps for them.
    saved_bytes : int
        What its forward makes and backward needs: its saved activations.
    boundary_bytes : int
        Size of its output for one batch, with its context; 0 for the last unit.
    forward_flops : int
        Floating-point operations of its forward; a multiply-add is two.
    device_peak_bytes : int
        The most a device holds during a training step when this is its last unit:
        parameters, gradients, optimizer state, batch, activations, boundary gradient.
    """

    name: str
    parameter_bytes: int
    buffer_bytes: int
    gradient_bytes: int
    optimizer_state_bytes: int
    saved_bytes: int
    boundary_bytes: int
    forward_flops: int
    device_peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainProfile:
    """The exact costs of a chain at one batch size and optimizer.

    Parameters
    ----------
    batch_size : int
        Examples per step.
    batch_bytes : int
        Size of a batch, its targets included.
    units : tuple[UnitCost, ...]
        The costs of each unit, in order.

    Examples
    --------
    >>> profile = ChainProfile(batch_size=8, batch_bytes=128, units=())
    >>> ChainProfile.from_json(profile.to_json()) == profile
    True
    """

    batch_size: int
    batch_bytes: int
    units: tuple[UnitCost, ...]

    def to_json(self) -> str:
        """Write the profile as JSON, with the names of the fields as keys."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what ``to_json`` wrote.

        Raises
        ------
        ValueError
            If it is not such a profile.
        """
        try:
            read = json.loads(text)
            units = tuple(UnitCost(**unit) for unit in read.pop("units"))
            return cls(units=units, **read)
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(
                f"this is not a chain's profile as JSON: {error}. Make one anew with "
                "profile_chain(...).to_json()."
            ) from error


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
    """

    client_key: str
    budget_bytes: int | None
    num_examples: int
    batch_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """The route the policy gives one chosen client, and what it should cost."""

    client_key: str
    route: Route
    budget_bytes: int | None
    predicted_peak_bytes: int


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
    """

    round_number: int
    assignments: tuple[Assignment, ...]
    skipped: Mapping[str, str]


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
    """

    client_key: str
    round_number: int
    route: Route
    seed: int
    num_threads: int = 1
    budget_bytes: int | None = None
    state_digest: str = ""
    edge_addresses: Mapping[str, str]

    def session(self, place: str) -> str:
        """Name this client's session at one place in this round."""
        return f"{self.round_number}/{self.client_key}/{place}"


class Status(StrEnum):
    """How one client's part of a round ended."""

    OK = "ok"
    OUT_OF_MEMORY = "out_of_memory"
    EDGE_FAILED = "edge_failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What a client measured while it did its part of a round.

    Parameters
    ----------
    status : Status
        How it ended.
    message : str
        The error's text when ``status`` is not OK.
    num_examples, num_epochs, num_steps : int
        Examples of one epoch (the client's weight), epochs, and optimizer steps.
    loss : float
        Mean loss over the examples.
    peak_bytes : int
        The most the device held in the metered steps.
    sent_bytes, received_bytes : int
        Traffic between the device and its edges.
    seconds : float
        Wall-clock time of the client's part.
    num_threads : int
        Torch threads in force.
    metrics : Mapping[str, float]
        What ``Task.metrics_fn`` returned, averaged over the examples.
    """

    status: Status = Status.OK
    message: str = ""
    num_examples: int = 0
    num_epochs: int = 1
    num_steps: int = 0
    loss: float = 0.0
    peak_bytes: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    seconds: float = 0.0
    num_threads: int = 1
    metrics: Mapping[str, float]


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
