"""EdgeClient: opens and uses one client's session at an edge.

The device has one for the first edge of its route; an edge has one for the next edge.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import torch

from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.coding.crossing import Crossing
from flwr_smartsplit.edge.cut_moves import MoveCut, pack_units
from flwr_smartsplit.edge.gate.rules import check_bytes
from flwr_smartsplit.edge.message_bytes import decode
from flwr_smartsplit.errors import EdgeError, EdgeUnreachable, RefusedMessage
from flwr_smartsplit.split.segment import Boundary
from flwr_smartsplit.train.segment_runner import SegmentRunner
from flwr_smartsplit.train.torch_device import CPU
from flwr_smartsplit.train.unit_migration import MigratedUnits
from flwr_smartsplit.types import ClientPlan, Leg, Receipt

Connect = Callable[[str, str], wire.Transport]
"""``connect(place, address)`` returns a transport to an edge."""

Opening = wire.OpenSession | wire.OpenSigned
Sign = Callable[[wire.OpenSession], Opening]


def _unsigned(opening: wire.OpenSession) -> Opening:
    return opening


def nowhere(place: str, address: str) -> wire.Transport:
    """Refuse to connect: for an edge at which every route ends."""
    raise EdgeUnreachable(
        f"edge {place!r} at {address!r} cannot be reached from an edge without "
        "``connect``."
    )


def opening_in(request: Opening) -> wire.OpenSession:
    """Read what a request opens, without checking who signed it."""
    if isinstance(request, wire.OpenSession):
        return request
    opening = decode(request.opening)
    if not isinstance(opening, wire.OpenSession):
        raise RefusedMessage(f"a signed {type(opening).__name__} opens no session.")
    return opening


def signed_opening(plan: ClientPlan) -> wire.OpenSigned | None:
    """Read the opening that a plan's strategy has signed, if it has."""
    request = decode(plan.opening) if plan.opening else None
    if request is None or isinstance(request, wire.OpenSigned):
        return request
    raise RefusedMessage(f"the plan's opening is a {type(request).__name__}.")


# longer than 40 lines because it fills in every field of an opening
def opening_of(  # noqa: PLR0913 - what a plan does not say
    plan: ClientPlan,
    legs: tuple[Leg, ...],  # The segments at edges, in order
    *,
    is_trained: bool,
    token: str,
    batch_size: int | None = None,  # The largest, if known
    accumulate: int = 1,
    predicts: bool = False,
    sign: Sign = _unsigned,
) -> Opening:
    """Make the request for the first edge; it holds those for the edges after it."""
    onward = None
    for leg in reversed(legs):
        cut_index = plan.route.cuts.index(leg.start)
        opening = wire.OpenSession(
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
            cohort=plan.cohort if is_trained and cut_index == 0 else None,
            importance=plan.importance,
            num_examples=plan.num_examples,
            batch_size=batch_size,
            variant=plan.variant,
            accumulate=accumulate,
            wants_norms=plan.wants_fisher and is_trained,
            codecs=plan.codecs[cut_index:],
            predicts=predicts,
        )
        request = sign(opening)
        onward = wire.Onward(plan.edge_addresses[leg.place], request)
    return request


class EdgeClient:
    """Open a session at an edge, and send its requests."""

    def __init__(
        self,
        transport: wire.Transport,
        request: Opening,
        *,
        device: torch.device = CPU,
    ) -> None:
        opening = opening_in(request)
        self.outward = Crossing.at(opening, 0, device)  # The cut to the edge
        self.returning = Crossing.at(opening, -1, device)  # The route's last cut
        self._transport = wire.CountingTransport(transport)
        self._session = opening.session
        self._limits = opening.limits
        self._num_moves = 0
        self._incarnation = self._transport.send(request).incarnation

    def forward(
        self, boundary: Boundary, request: wire.Forward, runner: SegmentRunner
    ) -> wire.Stepped:
        """Send a step's request on, with the boundary of this place's runner."""
        sent = self.outward.encode_for(runner, boundary, request)
        secret = self._incarnation
        return self._send(
            replace(request, boundary=sent, session=self._session, incarnation=secret)
        )

    def pass_on(self, request: wire.Forward | wire.Backward) -> wire.Stepped:
        """Send a request on with this session's name; its tensors stay encoded."""
        return self._send(
            replace(request, session=self._session, incarnation=self._incarnation)
        )

    def _send(self, request: wire.Forward | wire.Backward) -> wire.Stepped:
        reply = self._transport.send(request)
        if self._limits is not None:  # An edge may be dishonest, too.
            most = self._limits.step_bytes
            came = reply.boundary, reply.outputs, reply.gradients
            check_bytes(self._session, most, came)
        return reply

    def move(
        self, step: int, start: int, units: MigratedUnits | None, norm: float | None
    ) -> MigratedUnits | None:
        """Move the session's first unit to ``start``; return the units it gives up."""
        request = MoveCut(
            session=self._session,
            incarnation=self._incarnation,
            step=step,
            number=self._num_moves,
            start=start,
            units=None if units is None else pack_units(units),
            norm=norm,
        )
        moved = self._transport.send(request)
        self._num_moves += 1
        return moved.units

    def seal(self, num_steps: int, norm: float | None) -> tuple[Receipt, ...]:
        """Finish the session at this edge and those after it."""
        return self._transport.send(
            wire.Seal(self._session, self._incarnation, num_steps, norm)
        )

    def abandon(self) -> None:
        """Delete the session here and at later edges; the round's end retries it."""
        with suppress(EdgeError):
            self._transport.send(wire.Abandon(self._session, self._incarnation))

    def traffic(self) -> tuple[int, int]:
        """Return the bytes sent and received."""
        return self._transport.sent_bytes, self._transport.received_bytes

    def plain_traffic(self) -> tuple[int, int]:
        """Return what both would be if every tensor crossed as it is."""
        ends = self.outward, self.returning
        return (
            self._transport.sent_bytes + sum(end.saved_sending for end in ends),
            self._transport.received_bytes + sum(end.saved_receiving for end in ends),
        )
