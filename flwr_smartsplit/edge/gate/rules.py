"""What an edge takes from whom: pure checks of requests against signed openings.

Each raises ``RefusedRequest`` before a byte of a tensor is copied. The session goes on
as if the request had not come.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.cut_moves import MoveCut
from flwr_smartsplit.edge.tensors import DTYPES, Coded, WireTensor
from flwr_smartsplit.errors import RefusedRequest, bytes_text
from flwr_smartsplit.split.layout import num_spanned
from flwr_smartsplit.types import MicroBatch

MAX_WEIGHT = 2**29 - 1  # Up to it, weight times float32 is exact in float64
MAX_STATES = 1024  # That a run may say it holds at once
# How much larger than planned a batch, a sequence or an optimizer's state may be:
# profiles have what is usual, and no session may make an edge hold much more.
LENIENCY = 16
SPARE_BYTES = 2**20

Kind = tuple[tuple[int, ...], str]  # Shape, and dtype as NumPy calls it


@dataclass(frozen=True, slots=True)
class Arriving:
    """What units that move to the edge must be like."""

    state: Mapping[str, Kind]
    buffers: frozenset[str]  # Their non-persistent ones, which the model has
    num_bytes: int  # Of the state


def _refuse_if(is_wrong: bool, text: str) -> None:
    if is_wrong:
        raise RefusedRequest(text)


def check_opening(opening: wire.OpenSession, *, place: str, released: int) -> None:
    """Check that a signed opening is for this edge, and its round not over."""
    _refuse_if(
        opening.place != place,
        f"session {opening.session} is for edge {opening.place!r}, and this is "
        f"{place!r}: ask the one in the plan.",
    )
    _refuse_if(
        is_over(opening, released),
        f"session {opening.session}: round {opening.round_number} is over, and its "
        "openings with it. This client sits the round out.",
    )


def is_over(opening: wire.OpenSession, released: int) -> bool:
    """Say whether the phase in which an opening was signed has ended."""
    return opening.limits is None or opening.limits.phase <= released


def check_step(
    request: wire.Forward | wire.Backward, opening: wire.OpenSession, num_done: int
) -> None:
    """Check a step against what its session was opened for.

    ``num_done`` are the examples of earlier steps.
    """
    limits, name = opening.limits, opening.session
    if limits is None:
        return
    _check_part(request.part, opening, limits)
    if isinstance(request, wire.Backward):
        check_bytes(name, limits.step_bytes, request.gradients)
        _refuse_if(
            limits.ends_at_edge or not opening.is_trained,
            f"session {name}: a Backward, where the labels come with each step, or "
            "nothing is trained.",
        )
        return
    if limits.ends_at_edge != (request.targets is not None):
        there = "at the edge; send the labels." if limits.ends_at_edge else "elsewhere."
        raise RefusedRequest(f"session {name}: the plan has the loss {there}")
    most = limits.step_examples
    if not 1 <= request.num_examples <= most:
        raise RefusedRequest(
            f"session {name}: {request.num_examples} examples in one step, and the "
            f"plan allows 1 to {most}: give the client its true batch_size."
        )
    total, allowed = num_done + request.num_examples, limits.num_examples
    if opening.is_trained and allowed is not None and total > allowed:
        raise RefusedRequest(
            f"session {name}: {total} examples so far, and the plan allows {allowed}: "
            "give the client its true num_examples and local_epochs."
        )
    check_bytes(name, limits.step_bytes, (request.boundary, request.targets))


def _check_part(
    part: MicroBatch, opening: wire.OpenSession, limits: wire.Limits
) -> None:
    is_part = 0 <= part.index < part.count <= opening.accumulate
    if not (is_part and 1 <= part.loss_divisor <= limits.step_examples):
        raise RefusedRequest(
            f"session {opening.session}: micro-batch {part.index} of {part.count} with "
            f"a loss over {part.loss_divisor}, and the plan has at most "
            f"{opening.accumulate} of them."
        )


def check_move(
    request: MoveCut, opening: wire.OpenSession, start: int, arriving: Arriving
) -> None:
    """Check a move of a session's first unit, which is ``start`` now."""
    limits, units, name = opening.limits, request.units, opening.session
    if limits is None:
        return
    _refuse_if(
        not (opening.is_trained and limits.least_start <= request.start),
        f"session {name} cannot begin at {request.start}: the plan keeps the units "
        f"below {limits.least_start} on the device, and moves only in training.",
    )
    if units is None:
        return
    found = {key: kind_of(array) for key, array in units.state.items()}
    wrong = sorted(k for k, kind in found.items() if arriving.state.get(k) != kind)
    _refuse_if(
        bool(wrong) or (units.start, units.stop) != (request.start, start),
        f"session {name}: the units that move have {_named(wrong)} of another shape "
        "or dtype than the model, or are not those before the session's.",
    )
    strange = sorted(units.buffers.keys() - arriving.buffers)
    strange += sorted(units.optimizer.keys() - arriving.state.keys())
    strange += sorted(units.settings.keys() - arriving.state.keys())
    strange += [
        key for key, value in units.buffers.items() if not isinstance(value, WireTensor)
    ]
    _refuse_if(
        bool(strange),
        f"session {name}: {_named(strange)} are no tensors of the units that move.",
    )
    most = LENIENCY * arriving.num_bytes + SPARE_BYTES
    check_bytes(name, most, (dict(units.buffers), dict(units.optimizer)))


def check_seal(opening: wire.OpenSession) -> None:
    """Check that there is something to seal: it takes the edge's disk."""
    _refuse_if(
        not opening.is_trained,
        f"session {opening.session}: a Seal, where nothing is trained; abandon it.",
    )


def check_commit(request: wire.Commit) -> None:
    """Check the weights of a merge."""
    wrong = [e.session for e in request.entries if not 1 <= e.weight <= MAX_WEIGHT]
    names = {entry.session for entry in request.entries}
    _refuse_if(
        bool(wrong) or len(names) < len(request.entries),
        f"a merge of {len(request.entries)} sessions names one twice, or gives "
        f"{_named(wrong)} a weight outside 1 to {MAX_WEIGHT}.",
    )


def check_state(
    request: wire.HoldState,
    model: Mapping[str, Kind],
    *,
    held_bytes: int,
    num_states: int,
) -> None:
    """Check that a state is part of the model, and one of the few that a run holds."""
    kinds = {name: kind_of(array) for name, array in request.state.items()}
    wrong = sorted(n for n, kind in kinds.items() if model.get(n) != kind)
    _refuse_if(
        bool(wrong),
        f"the state {request.digest:.12} has {_named(wrong)}, of which the model has "
        "none or another shape or dtype: give strategy and edges the same task.",
    )
    size = sum(array.nbytes for array in request.state.values())
    _refuse_if(
        held_bytes + size > most_state_bytes(model, num_states),
        f"this run holds {bytes_text(held_bytes)} of states, and {bytes_text(size)} "
        f"more would be over {num_states} models: send Release first.",
    )


def most_state_bytes(model: Mapping[str, Kind], num_states: int = 2) -> int:
    """Say what so many states may take; their names do so, too."""
    size = sum(map(_kind_bytes, model.values())) + 400 * len(model)
    return num_states * size + SPARE_BYTES


def most_move_bytes(arriving: Arriving) -> int:
    """Say what the message of a move may take in memory."""
    return (LENIENCY + 1) * arriving.num_bytes + SPARE_BYTES


def kind_of(array: npt.NDArray[Any]) -> Kind:
    """Return an array's shape and dtype."""
    return tuple(array.shape), str(array.dtype)


def _kind_bytes(kind: Kind) -> int:
    return int(np.prod(kind[0], dtype=object)) * np.dtype(kind[1]).itemsize


def check_bytes(session: str, most: int, tensors: Any) -> None:
    """Check what the tensors of one request or reply take in memory."""
    size = _laid_out_bytes(tensors)
    if size > most:
        raise RefusedRequest(
            f"session {session}: the tensors of one message take {bytes_text(size)}, "
            f"and the plan allows {bytes_text(most)}: give the task example_inputs of "
            "the usual size."
        )


def _laid_out_bytes(tensors: Any) -> int:
    """Count the memory of nested tensors with their gaps."""
    if isinstance(tensors, WireTensor | Coded):
        spanned = num_spanned(tensors.shape, tensors.strides)
        size = spanned * DTYPES[tensors.dtype].itemsize
        return max(int(tensors.data.nbytes), size)
    if isinstance(tensors, tuple | list):
        return sum(map(_laid_out_bytes, tensors))
    if isinstance(tensors, Mapping):
        return sum(map(_laid_out_bytes, tensors.values()))
    return 0


def _named(names: list[str]) -> str:
    return ", ".join(f"{name:.200}" for name in names[:3]) or "nothing"
