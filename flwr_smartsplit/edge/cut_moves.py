"""MoveCut: the request that moves the cut between a device and its first edge.

One message prepares, transfers and switches at the edge; its reply is the
acknowledgement on which the device switches. It is asked between two steps, and both
count the moves, so that it is done exactly once.
"""

import zlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

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
    """The cut has moved at the edge; what it gave away comes along.

    Parameters
    ----------
    units : MigratedUnits, optional
        The units that are the device's now, if the cut moved later.
    """

    units: MigratedUnits | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveCut(Request[Moved]):
    """Let a session begin at another unit from the next step on, exactly once.

    Parameters
    ----------
    session, incarnation : str
        The session, and the life of the edge that opened it.
    step : int
        How many steps are done; the move comes before the next one.
    number : int
        Number of the move in its session, from 0; repeating the last one before the
        next step repeats its reply.
    start : int
        The session's first unit from now on.
    units : MigratedUnits, optional
        The units that are new at the edge, if the cut moves earlier.
    norm : float, optional
        As for ``Forward``.
    """

    session: str
    incarnation: str
    step: int
    number: int
    start: int
    units: MigratedUnits | None = None
    norm: float | None = None


def pack_units(units: MigratedUnits) -> MigratedUnits:
    """Make what units carry ready to cross; it shares their memory."""
    return _mapped(units, lambda x: WireTensor.pack(x) if isinstance(x, Tensor) else x)


def unpack_units(units: MigratedUnits) -> MigratedUnits:
    """Read what came, into tensors of one's own."""
    return _mapped(units, lambda x: x.unpack() if isinstance(x, WireTensor) else x)


def checksum(request: MoveCut) -> int:
    """Tell a repeated move from a changed one."""
    units = request.units
    code = zlib.crc32(repr((request.start, request.norm, units is None)).encode())
    if units is None:
        return code
    header = (units.start, units.stop, *units.buffers, *units.optimizer, units.settings)
    code = zlib.crc32(repr(header).encode(), code)
    for name, array in units.state.items():
        code = zlib.crc32(repr((name, array.dtype.str, array.shape)).encode(), code)
        code = zlib.crc32(np.require(array, requirements=["C"]).data, code)
    for value in tree_leaves((dict(units.buffers), dict(units.optimizer))):
        if isinstance(value, WireTensor):
            code = value.checksum(code)
        else:
            code = zlib.crc32(repr(value).encode(), code)
    return code


def moved_session(
    runner: SegmentRunner, chain: Chain, units: range, request: MoveCut, *, make: Make
) -> tuple[SegmentRunner, Moved]:
    """Do a move at the edge; the runner so far stays as it is.

    Parameters
    ----------
    runner : SegmentRunner
        Runs the session's units so far.
    chain : Chain
        Whose units they are.
    units : range
        The units so far.
    request : MoveCut
        What is asked.
    make : Callable[[Segment], SegmentRunner]
        Makes the session's runners.

    Returns
    -------
    SegmentRunner
        Runs the session's units from now on.
    Moved
        What the device is answered.

    Raises
    ------
    RefusedMove
        If it cannot be done exactly.
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
    """Refuse a move that does not fit the session."""
    start, arriving = request.start, request.units
    if not 0 < start < units.stop or start == units.start:
        raise RefusedMove(
            f"session {request.session} has units [{units.start}, {units.stop}) and "
            f"cannot begin at {start}: choose another one in 1..{units.stop - 1}."
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
