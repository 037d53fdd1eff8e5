"""Plans: what a round asks of each client, decided before it begins."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf

from flwr_smartsplit.types.advice import Cohort
from flwr_smartsplit.types.checkpointing import KEEP_ALL, RecomputePlan
from flwr_smartsplit.types.constraints import NO_CONSTRAINTS, Constraints
from flwr_smartsplit.types.devices import NO_TRAITS, DeviceTraits
from flwr_smartsplit.types.options import RouteOption
from flwr_smartsplit.types.routes import Route
from flwr_smartsplit.types.variants import WHOLE, Variant


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
    """What one chosen client is to do in a round.

    Parameters
    ----------
    client_key : str
        The client.
    option : RouteOption
        Where and how it trains, and what that should cost.
    budget_bytes : int or None
        The cap of the device; None for no cap.
    why : str
        Why it was chosen.
    """

    client_key: str
    option: RouteOption
    budget_bytes: int | None
    why: str = ""


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
    constraints : Constraints
        What changes of route and plan must respect.
    variant : Variant
        What of the global model it trains.
    codecs : tuple[str, ...]
        How the boundary at each cut is written; empty for ``RAW`` at all of them.
    accumulate : int
        Micro-batches of a step.
    cohort : Cohort or None
        What the edge compares this client with, to move its cut or release it; None
        leaves it alone.
    importance : float
        How important the client was after its last round; 0 if that is not known.
    num_examples : int
        Its examples, as far as the strategy knows.
    attempt : int
        How often it was asked before in this round: an attempt opens sessions of its
        own.

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
    constraints: Constraints = NO_CONSTRAINTS
    variant: Variant = WHOLE
    codecs: tuple[str, ...] = ()
    accumulate: int = 1
    cohort: Cohort | None = None
    importance: float = 0.0
    num_examples: int = 0
    attempt: int = 0

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
        """Name this client's session at one place in this round and attempt."""
        return f"{self.round_number}.{self.attempt}/{self.client_key}/{place}"
