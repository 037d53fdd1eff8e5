"""MoveCut: the request that moves the cut between a device and its first edge.

One request, between two steps, transfers the units; the edge switches, and the device
switches on its reply. Both count the moves, so that each is done exactly once.
"""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from flwr_smartsplit.edge.protocol import Request
from flwr_smartsplit.edge.tensors import WireTensor
from flwr_smartsplit.errors import RefusedMove
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.train.segment_runner import SegmentRunner
from flwr_smartsplit.train.unit_migration import (
    Make,
    MigratedUnits,
    migrated_units,
    rebuilt,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """The edge has moved the cut."""

    units: MigratedUnits | None = None  # Now the device's, if the cut moved later


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveCut(Request[Moved]):
    """Move a session's first unit to ``start``, exactly once.

    To repeat the last move before the next step repeats its reply.
    """

    session: str
    incarnation: str
    step: int  # Steps done
    number: int  # Moves of the session before this one
    start: int
    units: MigratedUnits | None = None  # New at the edge, if the cut moves earlier
    norm: float | None = None  # As in ``Forward``


def pack_units(units: MigratedUnits) -> MigratedUnits:
    """Pack units to be sent; they share memory."""
    return _mapped(units, lambda x: WireTensor.pack(x) if isinstance(x, Tensor) else x)


def unpack_units(units: MigratedUnits) -> MigratedUnits:
    """Unpack received units into new tensors."""
    return _mapped(units, lambda x: x.unpack() if isinstance(x, WireTensor) else x)


def moved_session(
    runner: SegmentRunner, chain: Chain, units: range, request: MoveCut, *, make: Make
) -> tuple[SegmentRunner, Moved]:
    """Return the session's runner after a move, and the reply.

    ``units`` are the session's until now; ``runner`` is unchanged. Raises
    ``RefusedMove`` if an exact move is impossible.
    """
    start = request.start
    _check(chain, units, request)
    arriving = None if request.units is None else unpack_units(request.units)
    new = rebuilt(
        runner,
        chain,
        range(start, units.stop),
        make=make,
        num_steps=request.step,
        arriving=arriving,
    )
    if start < units.start:
        return new, Moved()
    return new, Moved(
        units=pack_units(migrated_units(runner, chain, units.start, start))
    )


def _check(chain: Chain, units: range, request: MoveCut) -> None:
    start, arriving = request.start, request.units
    if not 0 < start < units.stop or start == units.start:
        raise RefusedMove(
            f"session {request.session} has units [{units.start}, {units.stop}) and "
            f"cannot begin at {start}: choose another unit in 1..{units.stop - 1}."
        )
    wanted = (start, units.start) if start < units.start else None
    found = None if arriving is None else (arriving.start, arriving.stop)
    names = () if arriving is None else arriving.state
    if found != wanted or (wanted and set(names) != set(chain.state_names(*wanted))):
        raise RefusedMove(
            f"session {request.session}: to begin at {start} instead of {units.start} "
            f"it needs the state of units {wanted}, and got {found} with {len(names)} "
            "names."
        )


def _mapped(units: MigratedUnits, change: Any) -> MigratedUnits:
    return replace(
        units,
        buffers=tree_map(change, dict(units.buffers)),
        optimizer=tree_map(change, dict(units.optimizer)),
    )
