"""EdgeClient: one client's session at an edge, seen from where the boundary comes from.

That is the device, or the edge before on a route over several.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.codec import Crossing
from flwr_smartsplit.edge.cut_moves import MoveCut, pack_units
from flwr_smartsplit.errors import EdgeError, EdgeUnreachable
from flwr_smartsplit.split.segment import Boundary
from flwr_smartsplit.train.segment_runner import CPU
from flwr_smartsplit.train.unit_migration import MigratedUnits
from flwr_smartsplit.types import ClientPlan, Leg, Receipt

Connect = Callable[[str, str], wire.Transport]
"""``connect(place, address)`` reaches an edge."""


def nowhere(place: str, address: str) -> wire.Transport:
    """Reach no edge: for one that routes end at."""
    raise EdgeUnreachable(
        f"edge {place!r} at {address!r} cannot be reached from an edge that was given "
        "no way to others."
    )


# longer than 40 lines because it fills in every field of an opening
def opening_of(
    plan: ClientPlan,
    legs: tuple[Leg, ...],
    *,
    is_trained: bool,
    token: str,
    batch_size: int | None = None,
    accumulate: int = 1,
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
    accumulate : int
        Into how many micro-batches a batch is divided.
    """
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
            codecs=plan.codecs[cut_index:],
        )
        onward = wire.Onward(plan.edge_addresses[leg.place], opening)
    return opening


class EdgeClient:
    """Open a session at an edge, and talk to it.

    Parameters
    ----------
    transport : Transport
        Reaches the edge.
    opening : OpenSession
        The session to open.
    device : torch.device
        Where the place that asks computes.

    Attributes
    ----------
    outward, returning : Crossing
        How to write and read at the cut before the edge; and at the last cut of the
        route, where that comes back to the device.
    """

    def __init__(
        self,
        transport: wire.Transport,
        opening: wire.OpenSession,
        *,
        device: torch.device = CPU,
    ) -> None:
        self.outward = Crossing.at(opening.codecs, 0, device)
        self.returning = Crossing.at(opening.codecs, -1, device)
        self._transport = wire.CountingTransport(transport)
        self._session = opening.session
        self._num_moves = 0
        self._incarnation = self._transport.send(opening).incarnation

    def forward(self, boundary: Boundary, request: wire.Forward) -> wire.Stepped:
        """Send a step's boundary on.

        Parameters
        ----------
        boundary : tuple[Tensor, ...]
            What this place made of the step.
        request : Forward
            The step as it came here; session and boundary are replaced.
        """
        return self._transport.send(
            replace(
                request,
                session=self._session,
                incarnation=self._incarnation,
                boundary=self.outward.encode(boundary),
            )
        )

    def backward(self, request: wire.Backward) -> wire.Stepped:
        """Send the gradients of what came back on, as they were written."""
        return self._transport.send(
            replace(request, session=self._session, incarnation=self._incarnation)
        )

    def move(
        self, step: int, start: int, units: MigratedUnits | None, norm: float | None
    ) -> MigratedUnits | None:
        """Have the session begin at another unit; return the units it gives away."""
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
