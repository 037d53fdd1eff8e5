"""What every way to an edge promises of a step that crosses in parts.

The edge's numbers are those of a boundary that came whole, to the last bit; each part
counts once however often it comes; one that is skipped or changed voids the session.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flwr_smartsplit.edge import parts as parts_module
from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.part_messages import (
    BoundaryPart,
    EvaluateParts,
    Gradient,
    GradientPart,
    PartsStepped,
    TrainParts,
)
from flwr_smartsplit.edge.protocol import LocalTransport
from flwr_smartsplit.edge.service import EdgeService
from flwr_smartsplit.edge.tensors import WireTensor
from flwr_smartsplit.errors import EdgeError, OutOfOrderStep, StaleSession
from tests.contracts.conftest import Place
from tests.contracts.sessions import Session, payload
from tests.tasks import TASK

BOUNDS = [(0, 2), (2, 3), (3, 4)]  # Of a batch of four.


@dataclass
class Parted:
    """A session whose steps cross in parts."""

    session: Session

    def _send(self, kind: type, values: dict[str, Any], changes: dict[str, Any]) -> Any:
        ours = {"session": self.session.name, "incarnation": self.session.incarnation}
        return self.session.send(kind(**{**ours, **values, **changes}))

    def put(self, step: int, start: int, stop: int, **changes: Any) -> Any:
        """Send a part of the boundary."""
        total = self.session.batch_size
        boundary, _ = payload(self.session.client, step, num_examples=total)
        values = {
            "step": step,
            "start": start,
            "num_examples": total,
            "boundary": WireTensor.pack(boundary[start:stop]),
        }
        return self._send(BoundaryPart, values, changes)

    def train(self, step: int, **changes: Any) -> PartsStepped:
        """Have the step done."""
        total = self.session.batch_size
        _, targets = payload(self.session.client, step, num_examples=total)
        values = {"step": step, "targets": WireTensor.pack(targets)}
        stepped: PartsStepped = self._send(TrainParts, values, changes)
        return stepped

    def get(self, step: int, start: int, stop: int, **changes: Any) -> Gradient:
        """Fetch a part of the gradient."""
        values = {"step": step, "start": start, "stop": stop}
        gradient: Gradient = self._send(GradientPart, values, changes)
        return gradient

    def evaluate(self, step: int) -> wire.Evaluated:
        """Have a batch evaluated."""
        _, targets = payload(self.session.client, 0)
        values = {"step": step, "targets": WireTensor.pack(targets)}
        evaluated: wire.Evaluated = self._send(EvaluateParts, values, {})
        return evaluated

    def step(self, step: int, size: int) -> tuple[float, Tensor]:
        """Do one step in parts; return loss and the whole gradient."""
        for bounds in bounds_of(self.session.batch_size, size):
            self.put(step, *bounds)
        loss = self.train(step).loss
        return loss, torch.cat(
            [
                self.get(step, *bounds).gradient.unpack()
                for bounds in bounds_of(self.session.batch_size, size)
            ]
        )


def bounds_of(num_examples: int, size: int) -> Iterator[tuple[int, int]]:
    """Divide a batch."""
    return pairwise([*range(0, num_examples, size), num_examples])


def parted(place: Place, **how: Any) -> Parted:
    """Open a session."""
    return Parted(Session(place, **how).open())


# Larger ones cross Ray in several objects (test_transports.py).
@pytest.mark.parametrize(("batch_size", "size"), [(4, 1), (4, 3), (400, 150)])
def test_a_step_in_parts_is_the_step_of_the_whole(
    place: Place, batch_size: int, size: int
) -> None:
    """Loss, gradient and what is sealed, in every bit; also beside whole steps."""
    session = Session(place, batch_size=batch_size).open()
    suffix = {"round_number": session.round_number, "suffix": "/parts"}
    other = parted(place, batch_size=batch_size, **suffix)
    for step in range(3):
        whole = session.step(step)
        if step == 1:  # A batch that is no larger than a slice.
            again = other.session.step(step)
            assert again.loss == whole.loss
            continue
        loss, gradient = other.step(step, size)
        assert loss == whole.loss
        assert torch.equal(gradient, whole.gradient.unpack())
    one, two = session.seal(3), other.session.seal(3)
    assert (one.digest, one.num_examples) == (two.digest, two.num_examples)


def test_a_last_bit_that_changes_in_a_part_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planted error, in how the gradient is divided."""
    service = EdgeService(TASK, spill_dir=tmp_path, incarnation="first life")
    place = Place(LocalTransport(service.handle), tmp_path)
    whole = Session(place).open().step(0)

    def found(name: str, bent: Callable[..., Tensor]) -> tuple[float, Tensor]:
        with monkeypatch.context() as patch:
            patch.setattr(parts_module, name, bent)
            return parted(place).step(0, 2)

    divide = parts_module.dense_slice
    up = torch.tensor(9.0)
    _, gradient = found("dense_slice", lambda *a: torch.nextafter(divide(*a), up))
    assert not torch.equal(gradient, whole.gradient.unpack())


def test_evaluation_in_parts_is_that_of_the_whole(place: Place) -> None:
    """As often as one likes, and repeated."""
    other = parted(place)
    expected = other.session.evaluate()
    for step in range(2):
        for bounds in BOUNDS:
            other.put(step, *bounds, **boundary_of(0, *bounds))
        found = [other.evaluate(step).values for _ in range(2)]
        assert found == [expected.values] * 2


def boundary_of(step: int, start: int, stop: int) -> dict[str, WireTensor]:
    """Take a part of the boundary of another step."""
    boundary, _ = payload("c0", step)
    return {"boundary": WireTensor.pack(boundary[start:stop])}


def test_every_message_may_come_twice(place: Place) -> None:
    """It gets the same reply, and counts once."""
    session = Session(place).open()
    other = parted(place, round_number=session.round_number, suffix="/parts")
    for step in range(2):
        whole = session.step(step)
        for bounds in BOUNDS:
            assert other.put(step, *bounds) == other.put(step, *bounds)
        assert other.train(step).loss == other.train(step).loss == whole.loss
        for bounds in BOUNDS:
            first, second = (other.get(step, *bounds).gradient for _ in range(2))
            assert torch.equal(first.unpack(), second.unpack())
    assert other.session.seal(2).digest == session.seal(2).digest


Wrong = Callable[[Parted], Any]


def changed(other: Parted) -> None:
    """Repeat the last part with other values."""
    other.put(0, *BOUNDS[0], **boundary_of(1, *BOUNDS[0]))


def skipped(other: Parted) -> None:
    """Leave one out."""
    other.put(0, *BOUNDS[2])


def of_another_step(other: Parted) -> None:
    """Go on with the next batch."""
    other.put(1, *BOUNDS[1])


def too_early(other: Parted) -> None:
    """Have the step done before all parts are there."""
    other.train(0)


def whole_after_all(other: Parted) -> None:
    """Send the whole boundary after a part of it."""
    other.session.step(0)


def gradient_too_early(other: Parted) -> None:
    """Ask for a gradient that is not there yet."""
    other.get(0, 0, 2)


def of_another_size(other: Parted) -> None:
    """Say that the batch is larger than it was."""
    other.put(0, *BOUNDS[1], num_examples=9)


def of_another_type(other: Parted) -> None:
    """Send doubles after floats."""
    boundary = payload("c0", 0)[0][2:3].double()
    other.put(0, *BOUNDS[1], boundary=WireTensor.pack(boundary))


def too_many(other: Parted) -> None:
    """Send more samples than the batch has."""
    boundary = torch.cat([payload("c0", 0)[0]] * 2)
    other.put(0, *BOUNDS[1], boundary=WireTensor.pack(boundary))


AFTER_ONE_PART = [
    changed,
    skipped,
    of_another_step,
    too_early,
    whole_after_all,
    gradient_too_early,
    of_another_size,
    of_another_type,
    too_many,
]


@pytest.mark.parametrize("wrong", AFTER_ONE_PART)
def test_a_part_out_of_order_voids_the_session(place: Place, wrong: Wrong) -> None:
    """Whatever is wrong with it."""
    other = parted(place)
    other.put(0, *BOUNDS[0])
    with pytest.raises(EdgeError):
        wrong(other)
    with pytest.raises(StaleSession):
        other.put(0, *BOUNDS[1])


def next_step(other: Parted) -> None:
    """Go on although a part of the gradient was not fetched."""
    other.put(1, *BOUNDS[0])


def skipped_gradient(other: Parted) -> None:
    """Leave a part out."""
    other.get(0, *BOUNDS[2])


def longer_gradient(other: Parted) -> None:
    """Ask for the last part again, and more of it."""
    other.get(0, 0, 3)


def missing_gradient(other: Parted) -> None:
    """Ask for samples that there are not."""
    other.get(0, 2, 5)


def empty_gradient(other: Parted) -> None:
    """Ask for nothing."""
    other.get(0, 2, 2)


def gradient_of_its_own(other: Parted) -> None:
    """Send a gradient, as if the loss were on the device."""
    gradient = WireTensor.pack(torch.zeros(4, 4, 6, 6))
    ours = {"session": other.session.name, "incarnation": other.session.incarnation}
    other.session.send(wire.BackwardStep(**ours, step=0, gradient=gradient))


@pytest.mark.parametrize(
    "wrong",
    [
        next_step,
        skipped_gradient,
        longer_gradient,
        missing_gradient,
        empty_gradient,
        gradient_of_its_own,
    ],
)
def test_a_gradient_out_of_order_voids_the_session(place: Place, wrong: Wrong) -> None:
    """Whatever is wrong with what is asked."""
    other = parted(place)
    for bounds in BOUNDS:
        other.put(0, *bounds)
    other.train(0)
    other.get(0, *BOUNDS[0])
    with pytest.raises(EdgeError):
        wrong(other)
    with pytest.raises(StaleSession):
        other.get(0, *BOUNDS[1])


def test_a_gradient_that_is_asked_for_is_not_also_sent(place: Place) -> None:
    """A step has one end: at the edge, or on the device."""
    other = parted(place)
    for bounds in BOUNDS:
        other.put(0, *bounds)
    other.train(0)
    with pytest.raises(OutOfOrderStep, match="in a BackwardStep"):
        gradient_of_its_own(other)
    other = parted(place)
    boundary = WireTensor.pack(payload("c0", 0)[0])
    ours = {"session": other.session.name, "incarnation": other.session.incarnation}
    forward = wire.ForwardStep(**ours, step=0, boundary=boundary, num_examples=4)
    other.session.send(forward)
    with pytest.raises(OutOfOrderStep, match="in a GradientPart"):
        other.get(0, *BOUNDS[0])


def test_a_tail_is_not_sealed_before_its_gradient_is_fetched(place: Place) -> None:
    """The device cannot have done its part of the step."""
    other = parted(place)
    for bounds in BOUNDS:
        other.put(0, *bounds)
    other.train(0)
    with pytest.raises(EdgeError, match="the device counts 1 steps, the edge 0"):
        other.session.seal(1)


def test_the_error_names_the_message(place: Place) -> None:
    """And the step."""
    other = parted(place)
    with pytest.raises(OutOfOrderStep, match="step 0 came after 0 steps, in a Bound"):
        skipped(other)
