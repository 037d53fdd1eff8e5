"""Phase and Dispatch: what is asked in a round, in either of Flower's APIs."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from flwr_smartsplit.errors import InvalidRoute, RefusedReply
from flwr_smartsplit.flower.serde.records import plan_from_config, plan_to_scalars
from flwr_smartsplit.server.edge_pool import EdgePool
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.types import (
    Assignment,
    ChainProfile,
    ClientPlan,
    ClientReply,
    DeviceProfile,
    Expectation,
    Failure,
    Move,
    Regions,
    TailExpectation,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One phase of one round, as Flower asks for it.

    ``sample_size(available)`` is how many clients to choose; ``config`` is the user's.
    """

    round_number: int
    is_train: bool
    sample_size: Callable[[int], int]
    config: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Sent:
    """What one client is sent."""

    plan: ClientPlan
    names: tuple[str, ...]  # of its device segments' state
    # Those that it sends back: what training can change, if it need not stay there
    returned_names: tuple[str, ...]
    assignment: Assignment
    profile: ChainProfile | None = None  # at its batch size
    frozen: Mapping[str, str] = field(default_factory=dict)  # their digests, by name
    regions: Regions = field(default_factory=dict)  # of the arrays that are not whole
    device: DeviceProfile | None = None  # as it was when it was chosen

    @property
    def sent_names(self) -> tuple[str, ...]:
        """Those whose arrays are in its message."""
        is_sent = self.plan.sends_frozen
        return tuple(n for n in self.names if is_sent or n not in self.frozen)

    def after(self, moves: Sequence[Move], chain: Chain) -> "Sent":
        """Follow a client's moved cut to what it sends back.

        Moves that cannot have happened change nothing; then the reply does not fit
        the plan.
        """
        if not moves:
            return self
        try:
            plan = moved_plan(self.plan, moves)
            names = device_names(plan, chain)
        except InvalidRoute:
            return self
        local = set(changed_names(self.plan, chain)) - set(self.returned_names)
        if not local <= set(names):
            return self
        mine = tuple(n for n in changed_names(plan, chain) if n not in local)
        return replace(self, plan=plan, names=names, returned_names=mine)


@dataclass(frozen=True, slots=True)
class Answer:
    """One client's answer: a reply to read (maybe a ``RefusedReply``), or an error.

    The client_key is the node's name if no client there was asked.
    """

    client_key: str
    read: Callable[[], ClientReply] | None = None
    num_bytes: int = 0
    error: str = ""


@dataclass
class Dispatch:
    """One phase of one round: what each client is sent, and the size of the replies.

    All mappings are by client_key.
    """

    round_number: int
    is_train: bool
    started_seconds: float
    version: int = 0  # of the global state that was sent: the round, if synchronous
    digest: str = ""  # under which the edges hold that state
    rest: str = ""  # and its frozen part, if there is one
    edge_phase: int = 0  # of the edges, in which its openings were signed
    staleness: Mapping[str, int] = field(default_factory=dict)  # of a joined phase
    weight: float | None = None  # of its mean, if a mixing says so
    at_seconds: float | None = None  # since an asynchronous run began
    config: Mapping[str, Any] = field(default_factory=dict)  # of the round
    # Of all clients there, chosen or not; None where a client does not share them
    label_counts: Mapping[str, tuple[int, ...] | None] = field(default_factory=dict)
    # Of the state that was sent, what is in no whole model
    proxies: Mapping[str, Any] = field(default_factory=dict)
    contacts: Mapping[str, Any] = field(default_factory=dict)  # Member or LegacyClient
    messages: dict[str, Any] = field(default_factory=dict)  # Metadata of those sent
    sent: dict[str, Sent] = field(default_factory=dict)
    sent_bytes: dict[str, int] = field(default_factory=dict)
    received_bytes: dict[str, int] = field(default_factory=dict)

    def add(self, sent: Sent, device: DeviceProfile, edges: EdgePool) -> None:
        """Send one client something; what it opens at edges is signed."""
        # As the client reads it: its config then holds no other library's numbers.
        plan = plan_from_config(plan_to_scalars(sent.plan))
        if plan is not None and sent.profile is not None:
            plan = edges.signed(plan, device, sent.profile, is_train=self.is_train)
            sent = replace(sent, plan=replace(sent.plan, opening=plan.opening))
        self.sent[sent.plan.client_key] = sent

    def of_client(self, key: str) -> "Dispatch":
        """Return what one client is asked; it can be joined with other phases'."""
        return replace(
            self,
            contacts={key: self.contacts[key]},
            messages={key: self.messages[key]},
            sent={key: self.sent[key]},
            sent_bytes={key: self.sent_bytes[key]},
            received_bytes={},
        )

    def oldest(self, accepted: Iterable[str], *, newest: int) -> int:
        """Count the states that are newer than the oldest one of these clients."""
        if self.staleness:
            return max((self.staleness[key] for key in accepted), default=0)
        return newest - self.version

    def ended_sessions(self, chain: Chain) -> tuple[str, ...]:
        """Name all that its clients may have opened at edges."""
        return tuple(
            sent.plan.session(leg.place)
            for sent in self.sent.values()
            for leg in sent.plan.route.edge_legs(len(chain.under(sent.plan.variant)))
        )

    def expectations(
        self, chain: Chain, replies: Sequence[ClientReply] = ()
    ) -> dict[str, Expectation]:
        """Say what every chosen client's reply must contain, after its moves."""
        moves: dict[str, tuple[Move, ...]] = {}
        for reply in replies:  # Only the first reply of a client can be accepted.
            moves.setdefault(reply.client_key, reply.report.moves)
        ended = {k: s.after(moves.get(k, ()), chain) for k, s in self.sent.items()}
        return {
            key: Expectation(
                client_key=key,
                device_names=frozenset(sent.returned_names),
                tails=_tails(sent.plan, chain.under(sent.plan.variant)),
                variant=sent.plan.variant,
                regions=sent.regions,
                round_number=sent.plan.round_number,
            )
            for key, sent in ended.items()
        }

    def collect(
        self, answers: Iterable[Answer], *, unnamed: Sequence[str] = ()
    ) -> tuple[list[ClientReply], list[Failure]]:
        """Sort answers into replies and failures; silent clients are failures too.

        ``unnamed`` are errors of which Flower does not say whose they are.
        """
        replies, failures = [], []
        silent = set(self.sent)
        for answer in answers:
            key = answer.client_key
            silent.discard(key)
            try:
                if answer.read is None:
                    raise RefusedReply(answer.error, kind="failed")
                self.received_bytes[key] = answer.num_bytes
                reply = answer.read()
                if reply.client_key != key:
                    raise RefusedReply(
                        f"the node of client {key!r} answers for {reply.client_key!r}.",
                        kind="refused",
                    )
                replies.append(reply)
            except RefusedReply as error:
                cause = str(error)
                failures.append(Failure(client_key=key, kind=error.kind, cause=cause))
        failures += [_lost(key, unnamed) for key in sorted(silent)]
        return replies, failures


def _tails(plan: ClientPlan, chain: Chain) -> dict[str, TailExpectation]:
    """Say what each edge of a plan seals; ``chain`` is the one of its variant."""
    return {
        leg.place: TailExpectation(
            session=plan.session(leg.place),
            names=frozenset(chain.changed_names(leg.start, leg.stop)),
            variant=plan.variant,
        )
        for leg in plan.route.edge_legs(len(chain))
    }


def joined(parts: Sequence[Dispatch], *, round_number: int, like: Dispatch) -> Dispatch:
    """Join clients that began with different states into one phase to settle.

    ``like`` is the phase that was begun last; ``round_number`` counts merges.
    """
    made = replace(
        like,
        round_number=round_number,
        version=min((each.version for each in parts), default=round_number),
        started_seconds=min(
            (each.started_seconds for each in parts), default=like.started_seconds
        ),
        staleness={k: round_number - each.version for each in parts for k in each.sent},
        weight=None,
        contacts={},
        messages={},
        sent={},
        sent_bytes={},
        received_bytes={},
    )
    for each in parts:
        for name in ("contacts", "messages", "sent", "sent_bytes", "received_bytes"):
            getattr(made, name).update(getattr(each, name))
    return made


def device_names(plan: ClientPlan, chain: Chain) -> tuple[str, ...]:
    """Name the state of a plan's device segments, in the chain's order."""
    chain = chain.under(plan.variant)
    names = (
        chain.state_names(leg.start, leg.stop)
        for leg in plan.route.device_legs(len(chain))
    )
    return tuple(
        dict.fromkeys(itertools.chain.from_iterable(names))
    )  # Once, if both use it.


def changed_names(plan: ClientPlan, chain: Chain) -> tuple[str, ...]:
    """Name the device segments' state that training can change."""
    chain = chain.under(plan.variant)
    return tuple(
        name
        for leg in plan.route.device_legs(len(chain))
        for name in chain.changed_names(leg.start, leg.stop)
    )


def frozen_names(plan: ClientPlan, chain: Chain) -> tuple[str, ...]:
    """Name the device segments' state that training changes at no place."""
    mine = chain.under(plan.variant)
    changed = set(mine.changed_names(0, len(mine)))
    return tuple(name for name in device_names(plan, chain) if name not in changed)


def moved_plan(plan: ClientPlan, moves: Sequence[Move]) -> ClientPlan:
    """Follow a client's moves from its planned route to the one it ended on.

    ``InvalidRoute`` is raised if they do not begin at its cut or follow each other.
    """
    route = plan.route
    for move in moves:
        if route.cuts[:1] != (move.before,):
            raise InvalidRoute(f"a move from {move.before} on {route}.")
        route = route.with_first_cut(move.after)
    return replace(plan, route=route)


def names_after(
    sent: Sent | None, chain: Chain, moves: Sequence[Move]
) -> tuple[str, ...]:
    """Name a client's arrays in their order, wherever its cut has moved."""
    return () if sent is None else sent.after(moves, chain).returned_names


def returned(
    names: Iterable[str], is_local: Callable[[str], bool] | None
) -> tuple[str, ...]:
    """Leave out the names of state that stays on the device."""
    return tuple(name for name in names if is_local is None or not is_local(name))


def _lost(key: str, unnamed: Sequence[str]) -> Failure:
    if unnamed:
        cause = "no reply; Flower's legacy API does not say whose errors came: "
        cause += "; ".join(unnamed)
        return Failure(client_key=key, kind="failed", cause=cause)
    cause = "no reply before the timeout; raise it, or look at the client's log."
    return Failure(client_key=key, kind="lost", cause=cause)
