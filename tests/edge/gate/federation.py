"""An edge in which a run has begun, its strategy, and clients that may be dishonest.

Nothing but bytes reaches the edge, as from another machine.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from flwr_smartsplit import Route
from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.client import opening_of
from flwr_smartsplit.edge.cut_moves import MoveCut
from flwr_smartsplit.edge.gate.gate import EdgeGate
from flwr_smartsplit.edge.gate.run_keys import RunKeys
from flwr_smartsplit.edge.hosts.edge import BytesTransport, answered
from flwr_smartsplit.edge.tensors import WireTensor, state_digest
from flwr_smartsplit.profile.task_profiles import profile_of
from flwr_smartsplit.server.limits import limits_of
from flwr_smartsplit.train.unit_migration import MigratedUnits
from flwr_smartsplit.types import EDGE, ClientPlan, DeviceProfile, EdgeProfile, Receipt
from tests.tasks import (
    BATCH_SIZE,
    NUM_CLASSES,
    TASK,
    client_plan,
    initial_state,
    tiny_chain,
)

CUT = 2
NUM_EXAMPLES = 10
STATE = initial_state()
DIGEST = state_digest(STATE)
ADDRESS = "edge-1"
SPLIT = Route.split(CUT, edge=EDGE)


def device(client_key: str) -> DeviceProfile:
    """What a client has said of itself."""
    return DeviceProfile(
        client_key=client_key,
        budget_bytes=None,
        num_examples=NUM_EXAMPLES,
        batch_size=BATCH_SIZE,
    )


def planned(
    client: int, route: Route, *, is_train: bool = True
) -> tuple[ClientPlan, wire.Limits]:
    """Make a client's plan, and what it may do."""
    addresses = dict.fromkeys(route.edges(), ADDRESS)
    plan = client_plan(client, route, STATE, addresses=addresses)
    profile = profile_of(TASK, batch_size=BATCH_SIZE)
    size = len(tiny_chain())
    who = device(plan.client_key)
    return plan, limits_of(plan, who, profile, num_units=size, is_train=is_train)


class Strategy:
    """The strategy of one run: whoever has it may do anything in this run."""

    def __init__(self, gate: EdgeGate, *, admin: str = "") -> None:
        self.keys = RunKeys()
        self._edge = transport_to(gate)
        self.access = self.keys.access(ADDRESS)
        self._edge.send(self.keys.hello(ADDRESS, admin=admin))

    def ask(self, request: wire.StrategyRequest[wire.ReplyT]) -> wire.ReplyT:
        """Ask with the run's secret."""
        return self._edge.send(replace(request, access=self.access))

    def hold(self) -> None:
        """Give the edge the round's state."""
        self.ask(wire.HoldState(DIGEST, STATE))

    def signed(
        self,
        client: int = 0,
        route: Route = SPLIT,
        *,
        phase: int = 1,
        is_train: bool = True,
        change: Callable[[wire.OpenSession], wire.OpenSession] = lambda o: o,
    ) -> wire.OpenSigned:
        """Sign a client's opening."""
        plan, limits = planned(client, route, is_train=is_train)
        limits = replace(limits, phase=phase)
        request = opening_of(
            plan,
            route.edge_legs(len(tiny_chain())),
            is_trained=is_train,
            token="",
            batch_size=BATCH_SIZE,
            sign=lambda opening: self.keys.sign(change(opening), limits),
        )
        assert isinstance(request, wire.OpenSigned)
        return request


@dataclass
class Client:
    """What one client may send, and what it may not: ``changes`` forge a request."""

    edge: wire.Transport
    opening: wire.OpenSigned
    name: str = ""
    incarnation: str = ""
    num_steps: int = 0
    sent: list[Any] = field(default_factory=list)

    def open(self, **changes: Any) -> "Client":
        """Open what the strategy has signed, or something else."""
        request = replace(self.opening, **changes)
        self.incarnation = self.edge.send(request).incarnation
        return self

    def step(self, **changes: Any) -> wire.Stepped:
        """Send a step."""
        reply = self.edge.send(self.forward(**changes))
        self.num_steps += 1
        return reply

    def forward(self, **changes: Any) -> wire.Forward:
        """Make a step's request."""
        chance = torch.Generator().manual_seed(self.num_steps)
        boundary = torch.randn(BATCH_SIZE, 4, 6, 6, generator=chance)
        labels = torch.randint(NUM_CLASSES, (BATCH_SIZE,), generator=chance)
        parts: dict[str, Any] = {
            "session": self.name,
            "incarnation": self.incarnation,
            "step": self.num_steps,
            "boundary": (WireTensor.pack(boundary),),
            "targets": WireTensor.pack(labels),
            "num_examples": BATCH_SIZE,
        }
        return wire.Forward(**{**parts, **changes})

    def backward(self, **changes: Any) -> wire.Backward:
        """Make the second half of a step that is finished on the device."""
        parts: dict[str, Any] = {
            "session": self.name,
            "incarnation": self.incarnation,
            "step": self.num_steps,
            "gradients": (),
        }
        return wire.Backward(**{**parts, **changes})

    def move(
        self, start: int = 1, units: MigratedUnits | None = None, **changes: Any
    ) -> Any:
        """Move the cut."""
        parts: dict[str, Any] = {
            "session": self.name,
            "incarnation": self.incarnation,
            "step": self.num_steps,
            "number": 0,
            "start": start,
            "units": units,
        }
        return self.edge.send(MoveCut(**{**parts, **changes}))

    def seal(self, **changes: Any) -> Receipt:
        """Finish the session."""
        request = wire.Seal(self.name, self.incarnation, self.num_steps)
        (receipt,) = self.edge.send(replace(request, **changes))
        return receipt


def transport_to(gate: EdgeGate) -> BytesTransport:
    """Reach an edge by bytes."""
    return BytesTransport(lambda pieces: answered(gate.handle, b"".join(pieces)))


def make_gate(folder: Path, **profile: Any) -> EdgeGate:
    """Start an edge for one run."""
    return EdgeGate(
        TASK,
        spill_dir=folder,
        incarnation="life",
        profile=EdgeProfile(name=EDGE, **profile),
    )


@dataclass
class Federation:
    """One edge, one run, an honest client and a dishonest one."""

    folder: Path
    gate: EdgeGate
    strategy: Strategy
    victim: Client
    thief: Client

    @property
    def stranger(self) -> wire.Transport:
        """Whoever can reach the edge."""
        return self.thief.edge

    @classmethod
    def start(cls, folder: Path, gate: EdgeGate | None = None) -> "Federation":
        """Begin a run, and have both clients open and do a step."""
        gate = gate or make_gate(folder)
        strategy = Strategy(gate)
        strategy.hold()
        victim, thief = (
            Client(transport_to(gate), strategy.signed(n), f"1.0/c{n}/{EDGE}").open()
            for n in (0, 1)
        )
        for client in (victim, thief):
            client.step()
        return cls(folder, gate, strategy, victim, thief)

    def evaluating(self, client: int = 1) -> Client:
        """Open a session that only evaluates."""
        opening = self.strategy.signed(client, is_train=False)
        name = f"1.0/c{client}/{EDGE}/evaluate"
        return Client(self.stranger, opening, name).open()

    def returning(self, client: int = 2) -> Client:
        """Open a session whose route comes back to the device."""
        route = Route.u_shape(CUT, 6, edge=EDGE)
        opening = self.strategy.signed(client, route)
        return Client(self.stranger, opening, f"1.0/c{client}/{EDGE}").open()

    def check_unharmed(self) -> None:
        """The victim goes on, seals, and is merged with its own tail."""
        self.victim.step()
        receipt = self.victim.seal()
        entry = wire.Entry(receipt.session, receipt.digest, NUM_EXAMPLES)
        sums = self.strategy.ask(wire.Commit(1, (entry,))).sums
        assert set(sums) == set(receipt.names)
        assert receipt.num_examples == self.victim.num_steps * BATCH_SIZE


def units_before_the_cut(start: int = 1, **changes: Any) -> MigratedUnits:
    """Make what units that move to the edge take along, without optimizer state."""
    names = tiny_chain().state_names(start, CUT)
    parts: Mapping[str, Any] = {
        "start": start,
        "stop": CUT,
        "state": {name: STATE[name] for name in names},
        "buffers": {},
        "optimizer": {},
        "settings": {},
    }
    return MigratedUnits(**{**parts, **changes})
