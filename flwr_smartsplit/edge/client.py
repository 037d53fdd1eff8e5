"""EdgeLink: one client's session at an edge, seen from where the boundary comes from.

That is the device, or the edge before on a route over several.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.moving import MoveCut, on_wire
from flwr_smartsplit.edge.tensors import WireTensor
from flwr_smartsplit.errors import EdgeError, EdgeUnreachable
from flwr_smartsplit.split.segment import Batch, Boundary
from flwr_smartsplit.train.unit_migration import Carried
from flwr_smartsplit.types import ClientPlan, Leg, Receipt

Connect = Callable[[str, str], wire.Transport]
"""``connect(place, address)`` reaches an edge."""


def nowhere(place: str, address: str) -> wire.Transport:
    """Reach no edge: for one that routes end at."""
    raise EdgeUnreachable(
        f"edge {place!r} at {address!r} cannot be reached from an edge that was given "
        "no way to others."
    )


def opening_of(
    plan: ClientPlan,
    legs: tuple[Leg, ...],
    *,
    is_trained: bool,
    token: str,
    batch_size: int | None = None,
) -> wire.OpenSession:
    """Ask the first of the edges of a route for a session, and it the next.

    Parameters
    ----------
    plan : ClientPlan
        Whose session it is.
    legs : tuple[Leg, ...]
        The segments at edges, in order.
    is_trained : bool
        Whether the segments are trained; sessions that only evaluate have other names.
    token : str
        Of this opening.
    batch_size : int, optional
        The most examples that a batch will have, if the device knows.
    """
    leg, *rest = legs
    onward = None
    if rest:
        address = plan.edge_addresses[rest[0].place]
        opening = opening_of(
            plan,
            tuple(rest),
            is_trained=is_trained,
            token=token,
            batch_size=batch_size,
        )
        onward = wire.Onward(address, opening)
    return wire.OpenSession(
        session=plan.session(leg.place) + ("" if is_trained else "/evaluate"),
        place=leg.place,
        round_number=plan.round_number,
        client_key=plan.client_key,
        start=leg.start,
        stop=leg.stop,
        state_digest=plan.state_digest,
        seed=plan.seed,
        num_threads=plan.num_threads,
        config=plan.config,
        onward=onward,
        is_trained=is_trained,
        token=token,
        cohort=plan.cohort if is_trained and leg.start == plan.route.cuts[0] else None,
        importance=plan.importance,
        num_examples=plan.num_examples,
        batch_size=batch_size,
        variant=plan.variant,
    )


class EdgeLink:
    """Open a session at an edge, and talk to it.

    Parameters
    ----------
    transport : Transport
        Reaches the edge.
    opening : OpenSession
        The session to open.
    """

    def __init__(self, transport: wire.Transport, opening: wire.OpenSession) -> None:
        self._transport = wire.CountingTransport(transport)
        self._session = opening.session
        self._num_moves = 0
        self._incarnation = self._transport.send(opening).incarnation

    def train(
        self,
        step: int,
        boundary: tuple[WireTensor, ...],
        targets: WireTensor,
        norm: float | None,
        *,
        step_seconds: float | None = None,
    ) -> wire.Stepped:
        """Have the rest of a step done."""
        return self._transport.send(
            wire.TrainStep(
                session=self._session,
                incarnation=self._incarnation,
                step=step,
                boundary=boundary[0],
                context=boundary[1:],
                targets=targets,
                norm=norm,
                step_seconds=step_seconds,
            )
        )

    def forward(
        self,
        step: int,
        boundary: tuple[WireTensor, ...],
        num_examples: int,
        norm: float | None,
    ) -> wire.Forwarded:
        """Have a step's forward done up to where the route comes back."""
        return self._transport.send(
            wire.ForwardStep(
                session=self._session,
                incarnation=self._incarnation,
                step=step,
                boundary=boundary[0],
                context=boundary[1:],
                num_examples=num_examples,
                norm=norm,
            )
        )

    def backward(self, step: int, gradient: WireTensor) -> wire.Returned:
        """Have the backward of that step done."""
        return self._transport.send(
            wire.BackwardStep(
                session=self._session,
                incarnation=self._incarnation,
                step=step,
                gradient=gradient,
            )
        )

    def move(
        self, step: int, start: int, units: Carried | None, norm: float | None
    ) -> Carried | None:
        """Have the session begin at another unit; return the units it gives away."""
        request = MoveCut(
            session=self._session,
            incarnation=self._incarnation,
            step=step,
            number=self._num_moves,
            start=start,
            carried=None if units is None else on_wire(units),
            norm=norm,
        )
        moved = self._transport.send(request)
        self._num_moves += 1
        return moved.carried

    def evaluate(
        self, boundary: tuple[WireTensor, ...], targets: WireTensor
    ) -> Mapping[str, float]:
        """Have the rest of a batch evaluated; return loss and metrics."""
        request = wire.EvaluateStep(
            session=self._session,
            incarnation=self._incarnation,
            boundary=boundary[0],
            context=boundary[1:],
            targets=targets,
        )
        return self._transport.send(request).values

    def evaluate_forward(self, boundary: tuple[WireTensor, ...]) -> wire.Forwarded:
        """Have a batch brought up to where the route comes back."""
        return self._transport.send(
            wire.EvaluateForward(
                session=self._session,
                incarnation=self._incarnation,
                boundary=boundary[0],
                context=boundary[1:],
            )
        )

    def seal(self, num_steps: int, norm: float | None) -> tuple[Receipt, ...]:
        """Finish the session here and at the edges after it."""
        return self._transport.send(
            wire.Seal(self._session, self._incarnation, num_steps, norm)
        )

    def abandon(self) -> None:
        """Have the session forgotten, here and at the edges after it."""
        self._transport.send(wire.Abandon(self._session, self._incarnation))

    def abandon_quietly(self) -> None:
        """Have it forgotten if the edge can be told; else the round's end does it."""
        try:
            self.abandon()
        except EdgeError:
            pass

    def traffic(self) -> tuple[int, int]:
        """Count the bytes that were sent, and those that were received."""
        return self._transport.sent_bytes, self._transport.received_bytes


def packed(boundary: Boundary) -> tuple[WireTensor, ...]:
    """Make a boundary ready to cross."""
    return tuple(WireTensor.pack(tensor) for tensor in boundary)


def unpacked(message: Any) -> Batch:
    """Read the boundary of a message, with its context if it has one."""
    tensors: tuple[WireTensor, ...] = (message.boundary, *message.context)
    values: tuple[Tensor, ...] = tuple(tensor.unpack() for tensor in tensors)
    return values if message.context else values[0]
