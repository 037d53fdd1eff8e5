"""Plans: what a round asks of each client, decided before it begins."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any, Literal

from flwr_smartsplit.types.advice import Cohort
from flwr_smartsplit.types.checkpointing import KEEP_ALL, RecomputePlan
from flwr_smartsplit.types.codecs import Codec
from flwr_smartsplit.types.constraints import NO_CONSTRAINTS, Constraints
from flwr_smartsplit.types.costs import BatchKind, Shapes
from flwr_smartsplit.types.devices import NO_TRAITS, DeviceTraits
from flwr_smartsplit.types.options import RouteOption
from flwr_smartsplit.types.routes import Route
from flwr_smartsplit.types.variants import WHOLE, Variant

Verify = Literal["once", "always", "off"]
"""How often a task's chain is compared with its stock module before it is trained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProfile:
    """What a client reports of itself before a round is planned."""

    client_key: str  # a stable name, which orders and seeds everything
    budget_bytes: int | None  # for its live tensors; None is no limit
    num_examples: int
    batch_size: int
    num_epochs: int = 1
    eval_batch_size: int | None = None  # as in training if None
    traits: DeviceTraits = NO_TRAITS
    keeps_local: bool = False  # Its local state outlives its process.
    example_shapes: Shapes = ()  # Of the longest it met, if longer than the task's

    @property
    def batch_kind(self) -> BatchKind:
        """What a step's costs depend on: the batch size, and shapes if not usual."""
        shapes = self.example_shapes
        return (self.batch_size, shapes) if shapes else self.batch_size

    @property
    def num_steps(self) -> int:
        """Optimizer steps in a round, a last small batch included."""
        return -(-self.num_examples // self.batch_size) * self.num_epochs


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What one chosen client does in a round.

    Parameters
    ----------
    client_key : str
        The client.
    option : RouteOption
        Where and how it trains, and the predicted cost.
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
        The chosen clients, ordered by client_key.
    skipped : Mapping[str, str]
        For every other client the reason, by client_key.
    unfit : frozenset[str]
        Those of them that have no route at all.
    """

    round_number: int
    assignments: tuple[Assignment, ...]
    skipped: Mapping[str, str]
    unfit: frozenset[str] = frozenset()

    @property
    def unfit_causes(self) -> list[str]:
        """Why each of those has no route, in client_key order."""
        return [self.skipped[key] for key in sorted(self.unfit)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientPlan:
    """All that a client needs to know to do its part of one round."""

    client_key: str
    round_number: int  # counted from 1
    route: Route
    seed: int  # of every random stream of the run
    num_threads: int = 1  # of torch, at every place: it changes gradients' last bits
    budget_bytes: int | None = None  # the cap of the device; None for no cap
    state_digest: str = ""  # under which the edges hold this round's global state
    edge_addresses: Mapping[str, str]  # by place
    frozen_digest: str = ""  # of the device's state that training cannot change
    sends_frozen: bool = True  # with the plan; else the node has kept it
    recompute: RecomputePlan = KEEP_ALL
    predicted_peak_bytes: int | None = None
    # What the user's train_config returns in this round, for Task.schedule_fn.
    config: Mapping[str, Any] = field(default_factory=dict)
    constraints: Constraints = NO_CONSTRAINTS
    variant: Variant = WHOLE
    codecs: tuple[Codec, ...] = ()  # one per cut; empty for RAW at all of them
    accumulate: int = 1  # micro-batches of a step
    wants_fisher: bool = False  # reports how large gradients were
    cohort: Cohort | None = None  # lets the edge move its cut or release it
    importance: float = 0.0  # after its last round; 0 if unknown
    num_examples: int = 0  # as far as the strategy knows
    attempt: int = 0  # how often it was asked before; each opens its own sessions
    task_digest: str = ""  # of the strategy's task, which is the client's, too
    # Of a run whose clients keep state of their own: its name, the same after it is
    # resumed, and the first round after which it may be; -1 if it cannot be.
    lineage: str = ""
    resumable_round: int = -1
    verify: Verify = "once"  # compare chain and stock module before training
    opening: bytes = b""  # of its sessions, signed by the strategy

    def __post_init__(self) -> None:
        is_known = self.num_examples >= 1 and 0 <= self.importance < inf
        if self.cohort is not None and not is_known:
            raise ValueError(
                f"client {self.client_key!r} has a cohort, {self.num_examples} "
                f"examples and importance {self.importance}: give at least one "
                "example, and an importance of at least 0."
            )

        if len(self.codecs) not in (0, len(self.route.cuts)):
            raise ValueError(
                f"client {self.client_key!r} has {len(self.codecs)} codecs for "
                f"{len(self.route.cuts)} cuts: give one for each cut, or none."
            )

    def session(self, place: str) -> str:
        """Name this client's session at one place in this round and attempt."""
        return f"{self.round_number}.{self.attempt}/{self.client_key}/{place}"
