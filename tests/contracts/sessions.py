"""A session as a device would lead it, one request at a time."""

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.cut_moves import MoveCut
from flwr_smartsplit.edge.tensors import WireTensor, state_digest
from flwr_smartsplit.train.unit_migration import MigratedUnits
from flwr_smartsplit.types import EDGE, Receipt
from tests.contracts.conftest import Place
from tests.tasks import BATCH_SIZE, NUM_CLASSES, SEED, initial_state, tiny_chain

CUT = 2  # The tail has dropout and BatchNorm.
_rounds = itertools.count(1)


def payload(
    client: str, step: int, *, num_examples: int = BATCH_SIZE
) -> tuple[Tensor, Tensor]:
    """Draw a boundary and targets; the boundary is not contiguous."""
    chance = torch.Generator().manual_seed(1000 * step + int(client[1:]))
    boundary = torch.randn(num_examples, 6, 6, 4, generator=chance)
    targets = torch.randint(0, NUM_CLASSES, (num_examples,), generator=chance)
    return boundary.permute(0, 3, 1, 2), targets


@dataclass
class Session:
    """One client's session at an edge, in a round that no other test uses."""

    place: Place
    client: str = "c0"
    round_number: int = field(default_factory=lambda: next(_rounds))
    suffix: str = ""
    incarnation: str = ""
    batch_size: int = BATCH_SIZE
    is_trained: bool = True

    @property
    def name(self) -> str:
        """The session's name."""
        return f"{self.round_number}/{self.client}/{EDGE}{self.suffix}"

    def send(self, request: wire.Request[wire.ReplyT]) -> wire.ReplyT:
        """Send any request."""
        return self.place.transport.send(request)

    def open(self, *, state_digest_: str = "", token: str = "") -> "Session":
        """Give the edge the state if it lacks it, and open the session."""
        state = initial_state()
        digest = state_digest(state)
        if not self.send(wire.IsHeld(digest)).is_held:
            self.send(wire.HoldState(digest, state))
        opened = self.send(
            wire.OpenSession(
                session=self.name,
                place=EDGE,
                round_number=self.round_number,
                client_key=self.client,
                start=CUT,
                stop=len(tiny_chain()),
                state_digest=state_digest_ or digest,
                seed=SEED,
                num_threads=1,
                token=token,
                is_trained=self.is_trained,
            )
        )
        self.incarnation = opened.incarnation
        return self

    def step(self, step: int, **changes: Any) -> wire.Stepped:
        """Do one step; ``changes`` replace parts of the request."""
        boundary, targets = payload(self.client, step, num_examples=self.batch_size)
        parts = {
            "session": self.name,
            "incarnation": self.incarnation,
            "step": step,
            "boundary": (WireTensor.pack(boundary),),
            "targets": WireTensor.pack(targets),
            "num_examples": self.batch_size,
        }
        return self.send(wire.Forward(**{**parts, **changes}))

    def move(
        self, step: int, number: int, start: int, **changes: Any
    ) -> MigratedUnits | None:
        """Begin at another unit; ``changes`` replace parts of the request."""
        parts = {
            "session": self.name,
            "incarnation": self.incarnation,
            "step": step,
            "number": number,
            "start": start,
        }
        return self.send(MoveCut(**{**parts, **changes})).units

    def seal(self, num_steps: int, *, incarnation: str = "") -> Receipt:
        """Finish the session."""
        (receipt,) = self.send(
            wire.Seal(self.name, incarnation or self.incarnation, num_steps)
        )
        return receipt

    def sealed(self, num_steps: int) -> Receipt:
        """Open, step so often, and seal."""
        self.open()
        for step in range(num_steps):
            self.step(step)
        return self.seal(num_steps)

    def commit(self, *entries: wire.Entry) -> wire.Committed:
        """Merge sealed sessions."""
        return self.send(wire.Commit(self.round_number, entries))
