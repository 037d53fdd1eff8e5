"""What every way to an edge promises: steps once, tails whole, errors by name."""

import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.cut_moves import MoveCut
from flwr_smartsplit.edge.message_bytes import checksum
from flwr_smartsplit.edge.tensors import WireTensor, state_digest
from flwr_smartsplit.errors import (
    EdgeError,
    OutOfOrderStep,
    RefusedMove,
    RefusedTail,
    StaleSession,
    StateNotHeld,
    TailLost,
)
from flwr_smartsplit.split.build import materialise, state_of
from flwr_smartsplit.train.rng import UnitStreams
from flwr_smartsplit.train.segment_runner import SegmentRunner
from flwr_smartsplit.types import Receipt
from tests.contracts.conftest import Place
from tests.contracts.sessions import CUT, Session, payload
from tests.faults import tail_files
from tests.tasks import (
    BATCH_SIZE,
    NUM_CLASSES,
    SEED,
    TASK,
    initial_state,
    tiny_chain,
)


def same_bits(one: WireTensor, other: WireTensor) -> bool:
    """Compare two packed tensors, strides included."""
    return (
        one.data.tobytes() == other.data.tobytes()
        and replace(one, data=other.data) == other
    )


def crossing(*tensors: torch.Tensor) -> tuple[WireTensor, ...]:
    """Pack the tensors of a boundary."""
    return tuple(map(WireTensor.pack, tensors))


def entry_of(receipt: Receipt, weight: int) -> wire.Entry:
    """Ask for one sealed session."""
    return wire.Entry(receipt.session, receipt.digest, weight)


def assert_void(session: Session) -> None:
    """Make sure that nothing of a session is left, in memory or on disk."""
    with pytest.raises(StaleSession):
        session.step(0)
    with pytest.raises(StaleSession):
        session.seal(0)
    assert tail_files(session.place.folder, session.name) == []


# --- steps ----------------------------------------------------------------------------


# One example's boundary is 576 bytes; Ray carries some 100 KiB in a message, and some
# sizes above in several parts.
@pytest.mark.parametrize("batch_size", [4, 200, 1000, 1500])
def test_a_tail_trains_as_a_segment_in_this_process_does(
    place: Place, batch_size: int
) -> None:
    """Losses, boundary gradients with their strides and the tail agree in every bit."""
    session = Session(place, batch_size=batch_size).open()
    chain = tiny_chain()
    segment = materialise(chain, CUT, len(chain), initial_state())
    streams = UnitStreams(SEED, session.round_number, session.client)
    runner = SegmentRunner(segment, TASK, streams=streams)
    for step in range(3):
        boundary, targets = payload(session.client, step, num_examples=batch_size)
        loss, (gradient,) = runner.finish(
            boundary, targets, step=step, inputs_are_boundary=True
        )
        stepped = session.step(step)
        assert stepped.values == {"loss": float(loss)}
        assert same_bits(stepped.gradients[0], WireTensor.pack(gradient))
    assert session.seal(3).digest == state_digest(state_of(segment))


def test_a_repeated_step_gives_the_same_reply_and_trains_once(place: Place) -> None:
    """A retry is answered from memory, as often as it comes."""
    session = Session(place).open()
    for step in range(2):
        first = session.step(step)
        for _ in range(2):
            again = session.step(step)
            assert again.values == first.values
            assert same_bits(again.gradients[0], first.gradients[0])
    receipt = session.seal(2)
    once = Session(place, round_number=session.round_number, suffix="/once").sealed(2)
    assert receipt.digest == once.digest
    assert (receipt.num_steps, receipt.num_examples) == (2, 8)


def test_a_step_that_comes_several_times_at_once_trains_once(place: Place) -> None:
    """Retries may overtake each other; all get the one reply."""
    session = Session(place, batch_size=200).open()
    with ThreadPoolExecutor(4) as pool:
        for step in range(3):
            replies = list(pool.map(session.step, [step] * 4))
            assert len({reply.values["loss"] for reply in replies}) == 1
            assert len({reply.gradients[0].data.tobytes() for reply in replies}) == 1
    once = replace(session, suffix="/once")
    assert session.seal(3).digest == once.sealed(3).digest


@pytest.mark.parametrize("part", ["boundary", "targets"])
def test_a_repeated_step_with_another_payload_voids_the_session(
    place: Place, part: str
) -> None:
    """The same step number with other bytes cannot be a retry."""
    session = Session(place).open()
    session.step(0)
    other = dict(zip(("boundary", "targets"), payload("c9", 0), strict=True))[part]
    with pytest.raises(OutOfOrderStep, match="step 0 was changed after 1 steps"):
        session.step(
            0,
            **{part: crossing(other) if part == "boundary" else WireTensor.pack(other)},
        )
    assert_void(session)


def test_a_boundary_that_differs_in_one_bit_is_another_payload(place: Place) -> None:
    """The check does not round."""
    session = Session(place).open()
    session.step(0)
    boundary, _ = payload(session.client, 0)
    bent = boundary.clone()
    bent[1, 2, 3, 4] = torch.nextafter(bent[1, 2, 3, 4], torch.tensor(9.0))
    with pytest.raises(OutOfOrderStep):
        session.step(0, boundary=crossing(bent))
    assert_void(session)


@pytest.mark.parametrize("batch_size", [4, 400])
@pytest.mark.parametrize(("done", "asked"), [(0, 1), (2, 3), (2, 0), (0, -1)])
def test_a_step_out_of_order_voids_the_session(
    place: Place, done: int, asked: int, batch_size: int
) -> None:
    """A skipped or an old step ends the session, and the error counts the steps."""
    session = Session(place, batch_size=batch_size).open()
    for step in range(done):
        session.step(step)
    with pytest.raises(OutOfOrderStep) as raised:
        session.step(asked)
    assert (raised.value.step, raised.value.num_steps) == (asked, done)
    assert_void(session)


def test_a_step_that_fails_voids_the_session_and_names_the_cause(place: Place) -> None:
    """What torch raises in the tail reaches the device with its own type."""
    session = Session(place).open()
    session.step(0)
    with pytest.raises(RuntimeError, match="expected input"):
        session.step(1, boundary=crossing(torch.zeros(4, 9, 6, 6)))
    assert_void(session)


def test_a_session_that_evaluates_changes_nothing(place: Place) -> None:
    """Loss and metrics come from the tail in eval mode, in any order of steps."""
    session = Session(place).open()
    beside = replace(session, suffix="/evaluate", is_trained=False).open()
    session.step(0)
    replies = [beside.step(step) for step in (0, 3, 0)]
    assert replies[0] == replies[2] != replies[1]
    assert set(replies[0].values) == {"accuracy", "loss"}
    assert replies[0].gradients == ()
    session.step(1)
    plain = Session(place, round_number=session.round_number, suffix="/plain")
    assert session.seal(2).digest == plain.sealed(2).digest
    chain, boundary, targets = tiny_chain(), *payload(session.client, 0)
    tail = materialise(chain, CUT, len(chain), initial_state())
    runner = SegmentRunner(tail, TASK, is_trained=False)
    assert replies[0].values == runner.assess(runner.evaluate(boundary), targets)


def test_a_session_that_evaluates_does_not_go_backward(place: Place) -> None:
    """There was no forward to go back from."""
    session = Session(place, is_trained=False).open()
    session.step(0, targets=None)
    back = {"session": session.name, "incarnation": session.incarnation, "step": 0}
    gradients = crossing(torch.zeros(BATCH_SIZE, NUM_CLASSES))
    with pytest.raises(OutOfOrderStep, match="in a Backward"):
        session.send(wire.Backward(**back, gradients=gradients))


def test_a_session_without_targets_takes_two_requests_for_a_step(place: Place) -> None:
    """What comes back is its output; each request is done once, in this order."""
    session = Session(place).open()
    chain = tiny_chain()
    segment = materialise(chain, CUT, len(chain), initial_state())
    streams = UnitStreams(SEED, session.round_number, session.client)
    runner = SegmentRunner(segment, TASK, streams=streams)
    back = {"session": session.name, "incarnation": session.incarnation}
    gradients = (torch.full((BATCH_SIZE, NUM_CLASSES), 0.1),)
    for step in range(2):
        boundary, _ = payload(session.client, step)
        outputs = runner.forward(boundary, step=step, inputs_are_boundary=True)
        expected = runner.backward(lambda: gradients)
        for _ in range(2):
            stepped = session.step(step, targets=None)
            assert same_bits(stepped.boundary[0], WireTensor.pack(outputs[0]))
        for _ in range(2):
            request = wire.Backward(**back, step=step, gradients=crossing(*gradients))
            returned = session.send(request)
            assert same_bits(returned.gradients[0], WireTensor.pack(expected[0]))
    with pytest.raises(OutOfOrderStep, match="step 1 came after 2 steps, in a Forward"):
        session.step(1, targets=None)
    assert_void(session)


def test_targets_for_another_number_of_examples_make_no_request() -> None:
    """Receipts count examples, so no request may contradict itself."""
    targets = WireTensor.pack(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"shape \(3,\) for 4 examples"):
        wire.Forward(step=0, targets=targets, num_examples=4)


# --- sessions -------------------------------------------------------------------------


def test_another_incarnation_is_stale_and_harms_nothing(place: Place) -> None:
    """A request to an earlier life of the edge is refused; the session goes on."""
    session = Session(place).open()
    session.step(0)
    with pytest.raises(StaleSession, match="an earlier life") as raised:
        session.step(1, incarnation="an earlier life")
    assert raised.value.session == session.name
    with pytest.raises(StaleSession):
        session.seal(1, incarnation="an earlier life")
    session.step(1)
    assert session.seal(2).num_steps == 2


def test_a_session_that_was_never_opened_is_stale(place: Place) -> None:
    """The error says which session."""
    session = Session(place, incarnation="first life")
    with pytest.raises(StaleSession) as raised:
        session.step(0)
    assert raised.value.session == session.name


def test_a_state_the_edge_lacks_is_asked_for_by_its_digest(place: Place) -> None:
    """Opening on an unknown state fails, and holding it makes it work."""
    session = Session(place)
    other = {name: array + 1 for name, array in initial_state().items()}
    digest = state_digest(other)
    with pytest.raises(StateNotHeld) as raised:
        session.open(state_digest_=digest)
    assert raised.value.digest == digest
    assert not session.send(wire.IsHeld(digest)).is_held
    assert session.send(wire.HoldState(digest, other)).is_held
    assert session.send(wire.IsHeld(digest)).is_held
    session.open(state_digest_=digest)
    session.step(0)


def test_a_state_that_changed_on_the_way_is_not_held(place: Place) -> None:
    """Else clients would train from it, under the name of another."""
    session = Session(place)
    with pytest.raises(EdgeError, match="changed on the way"):
        session.send(wire.HoldState("f" * 64, initial_state()))
    assert not session.send(wire.IsHeld("f" * 64)).is_held


def test_opening_again_starts_over(place: Place) -> None:
    """Whatever a session did before, sealed or not, is void when it opens again."""
    fresh = Session(place, suffix="/fresh")
    expected = fresh.sealed(2).digest
    session = Session(place, round_number=fresh.round_number)
    session.open()
    session.step(0)
    assert session.sealed(2).digest == expected
    session.open()
    assert tail_files(place.folder, session.name) == []
    assert session.sealed(2).digest == expected


def test_an_abandoned_session_cannot_be_sealed(place: Place) -> None:
    """Abandoning forgets the replica, and doing it twice is no error."""
    session = Session(place).open()
    session.step(0)
    session.send(wire.Abandon(session.name))
    session.send(wire.Abandon(session.name))
    assert_void(session)


def test_an_abandoned_tail_cannot_be_committed(place: Place) -> None:
    """Abandoning after the seal deletes what was sealed."""
    session = Session(place)
    receipt = session.sealed(1)
    session.send(wire.Abandon(session.name))
    with pytest.raises(TailLost) as raised:
        session.commit(entry_of(receipt, 1))
    assert raised.value.sessions == (session.name,)


# --- moving the cut -------------------------------------------------------------------

LATER = 6  # Convolution and BatchNorm of the tail move.


def test_a_cut_that_moves_there_and_back_changes_no_bit(place: Place) -> None:
    """Parameters, buffers and momentum come along, both ways."""
    session = Session(place).open()
    plain = Session(place, round_number=session.round_number, suffix="/plain")
    session.step(0)
    units = session.move(1, 0, LATER)
    assert units is not None
    assert set(units.state) == set(tiny_chain().state_names(CUT, LATER))
    assert session.move(1, 1, CUT, units=units) is None
    session.step(1)
    assert session.seal(2).digest == plain.sealed(2).digest


def test_a_moved_session_signs_for_what_it_has_left(place: Place) -> None:
    """The other names are the device's."""
    session = Session(place).open()
    session.step(0)
    session.move(1, 0, LATER)
    assert session.seal(1).names == tiny_chain().state_names(LATER, 9)


def test_a_repeated_move_gives_the_same_reply_and_moves_once(place: Place) -> None:
    """A retry is answered from memory, as often as it comes."""
    session = Session(place).open()
    session.step(0)
    replies = [session.move(1, 0, LATER) for _ in range(3)]
    codes = {
        checksum(
            MoveCut(session="", incarnation="", step=1, number=0, start=6, units=units)
        )
        for units in replies
    }
    assert len(codes) == 1
    units = replies[0]
    for _ in range(2):
        session.move(1, 1, CUT, units=units)
    once = Session(place, round_number=session.round_number, suffix="/once")
    assert session.seal(1).digest == once.sealed(1).digest


@pytest.mark.parametrize(("step", "number"), [(0, 0), (2, 0), (1, 1), (1, -1)], ids=str)
def test_a_move_out_of_order_voids_the_session(
    place: Place, step: int, number: int
) -> None:
    """It belongs to one step, and moves are counted."""
    session = Session(place).open()
    session.step(0)
    with pytest.raises(OutOfOrderStep):
        session.move(step, number, LATER)
    assert_void(session)


def test_a_repeated_move_that_differs_voids_the_session(place: Place) -> None:
    """In one bit of what it carries."""
    session = Session(place).open()
    session.step(0)
    units = session.move(1, 0, LATER)
    assert units is not None
    session.move(1, 1, CUT, units=units)
    weight = units.state["4.weight"].copy()
    weight.flat[0] = np.nextafter(weight.flat[0], np.float32(9))
    bent = replace(units, state={**units.state, "4.weight": weight})
    with pytest.raises(OutOfOrderStep, match="step 1 was changed after 1 steps"):
        session.move(1, 1, CUT, units=bent)
    assert_void(session)


def test_a_move_of_an_earlier_opening_is_stale_and_harms_nothing(place: Place) -> None:
    """The later opening goes on as it is."""
    session = Session(place).open(token="a")
    before = session.incarnation
    session.open(token="b")
    session.step(0)
    with pytest.raises(StaleSession):
        session.move(1, 0, LATER, incarnation=before)
    session.step(1)
    plain = Session(place, round_number=session.round_number, suffix="/plain")
    assert session.seal(2).digest == plain.sealed(2).digest


@pytest.mark.parametrize("start", [-1, 0, 1, CUT, 9, 99])
def test_a_move_that_cannot_be_is_refused_and_harms_nothing(
    place: Place, start: int
) -> None:
    """Nothing would be left, or nobody says what the new units are."""
    session = Session(place).open()
    session.step(0)
    with pytest.raises(RefusedMove, match=r"begin at"):
        session.move(1, 0, start)
    session.step(1)
    plain = Session(place, round_number=session.round_number, suffix="/plain")
    assert session.seal(2).digest == plain.sealed(2).digest


# --- sealing --------------------------------------------------------------------------


def test_sealing_twice_gives_the_same_receipt(place: Place) -> None:
    """A lost receipt can be asked for again; it says what was sealed."""
    session = Session(place)
    receipt = session.sealed(3)
    assert session.seal(3) == receipt
    chain = tiny_chain()
    assert receipt.names == chain.state_names(CUT, len(chain))
    assert receipt.session == session.name
    held = session.send(wire.IsHeld(""))
    assert receipt.incarnation == held.incarnation != session.incarnation
    assert (receipt.num_steps, receipt.num_examples) == (3, 12)
    (tail,) = tail_files(place.folder, session.name)
    assert state_digest(load_file(tail)) == receipt.digest


def test_a_sealed_session_takes_no_more_steps(place: Place) -> None:
    """Its replica is gone; only the receipt is left."""
    session = Session(place)
    session.sealed(1)
    with pytest.raises(StaleSession):
        session.step(1)
    with pytest.raises(StaleSession):
        session.step(0)


def test_a_tail_that_is_not_finite_is_refused(place: Place) -> None:
    """The error names the arrays, the session is void, and nothing is on disk."""
    session = Session(place).open()
    session.step(0)
    poison = torch.full_like(payload("c0", 1)[0], float("nan"))
    assert np.isnan(session.step(1, boundary=crossing(poison)).values["loss"])
    with pytest.raises(RefusedTail, match=r"not finite after 2 steps: .*8\.weight"):
        session.seal(2)
    assert_void(session)


def test_a_tail_that_was_stepped_more_or_less_often_is_refused(place: Place) -> None:
    """Device and edge must have counted the same steps."""
    for claimed in (1, 3):
        session = Session(place).open()
        session.step(0)
        session.step(1)
        with pytest.raises(RefusedTail, match=f"counts {claimed} steps, the edge 2"):
            session.seal(claimed)
        assert_void(session)


# --- committing -----------------------------------------------------------------------


def exact_mean(tails: list[dict[str, Any]], weights: list[int]) -> dict[str, Any]:
    """Average tails in exact fractions, rounded once."""
    mean = {}
    for name, first in tails[0].items():
        columns = zip(*(tail[name].ravel() for tail in tails), strict=True)
        values = [
            sum(Fraction(float(v)) * w for v, w in zip(column, weights, strict=True))
            / sum(weights)
            for column in columns
        ]
        kept = [int(v) if first.dtype.kind == "i" else float(v) for v in values]
        mean[name] = np.array(kept).astype(first.dtype).reshape(first.shape)
    return mean


def test_a_commit_is_exact_and_can_be_repeated(place: Place) -> None:
    """Any order and any number of commits give the bits of the exact mean."""
    first = Session(place)
    number = first.round_number
    sessions = [first, Session(place, "c1", number), Session(place, "c2", number)]
    receipts = [session.sealed(2) for session in sessions]
    weights = [8, 13, 5]
    tails = [load_file(tail_files(place.folder, s.name)[0]) for s in sessions]
    truth = exact_mean(tails, weights)
    entries = [entry_of(r, w) for r, w in zip(receipts, weights, strict=True)]
    for order in (entries, entries, entries[::-1]):
        sums = first.commit(*order).sums
        assert set(sums) == set(truth)
        for name, value in truth.items():
            assert sums[name].weight == sum(weights)
            assert sums[name].mean(value.dtype).tobytes() == value.tobytes(), name


def test_a_commit_merges_nobody_who_was_not_asked_for(place: Place) -> None:
    """A sealed tail that is left out leaves no trace in the sums."""
    first = Session(place)
    second = Session(place, "c1", first.round_number)
    receipt, _ = first.sealed(1), second.sealed(1)
    sums = first.commit(entry_of(receipt, 3)).sums
    tail = load_file(tail_files(place.folder, first.name)[0])
    for name, value in tail.items():
        assert sums[name].weight == 3
        assert sums[name].mean(value.dtype).tobytes() == value.tobytes()


def test_tails_that_are_gone_or_changed_are_named(place: Place) -> None:
    """A commit fails before it merges, and says whose tails are lost."""
    first = Session(place)
    sessions = [
        first,
        *(Session(place, f"c{client}", first.round_number) for client in (1, 2, 3)),
    ]
    receipts = [session.sealed(1) for session in sessions]
    tail_files(place.folder, sessions[0].name)[0].unlink()
    bent = tail_files(place.folder, sessions[1].name)[0]
    content = bytearray(bent.read_bytes())
    content[-1] ^= 1
    bent.write_bytes(content)
    torn = tail_files(place.folder, sessions[2].name)[0]
    torn.write_bytes(torn.read_bytes()[:100])
    with pytest.raises(TailLost) as raised:
        first.commit(*(entry_of(receipt, 1) for receipt in receipts))
    lost = tuple(session.name for session in sessions[:3])
    assert raised.value.sessions == lost
    assert all(name in str(raised.value) for name in lost)
    assert first.commit(entry_of(receipts[3], 1)).sums


def test_a_receipt_with_another_digest_commits_nothing(place: Place) -> None:
    """The digest that came through the device must fit the file."""
    session = Session(place)
    receipt = replace(session.sealed(1), digest="0" * 64)
    with pytest.raises(TailLost):
        session.commit(entry_of(receipt, 1))


def test_releasing_deletes_a_round_and_what_came_before(place: Place) -> None:
    """Sessions, tails and states go; later rounds and one state stay."""
    old, later = Session(place), Session(place)
    still_open = Session(place, "c1", old.round_number).open()
    old.sealed(1)
    receipt = later.sealed(1)
    keep = state_digest(initial_state())
    other = {name: array + 2 for name, array in initial_state().items()}
    gone = state_digest(other)
    old.send(wire.HoldState(gone, other))
    old.send(wire.Release(old.round_number, keep))
    assert tail_files(place.folder, old.name) == []
    assert_void(still_open)
    with pytest.raises(StaleSession):
        old.seal(1)
    assert not old.send(wire.IsHeld(gone)).is_held
    assert old.send(wire.IsHeld(keep)).is_held
    assert later.commit(entry_of(receipt, 1)).sums
    later.send(wire.Release(later.round_number, keep))
    assert tail_files(place.folder) == []


# --- all at once ----------------------------------------------------------------------


def outcome_of(session: Session) -> tuple[list[float], list[bytes], str]:
    """Lead a session to its end; return all that came of it."""
    session.open()
    replies = [session.step(step) for step in range(3)]
    return (
        [reply.values["loss"] for reply in replies],
        [reply.gradients[0].data.tobytes() for reply in replies],
        session.seal(3).digest,
    )


def test_sessions_at_the_same_time_give_the_bits_of_one_after_another(
    place: Place,
) -> None:
    """Neither dropout nor BatchNorm of one client sees another client."""
    number = Session(place).round_number
    clients = [f"c{client}" for client in range(6)]
    alone = [outcome_of(Session(place, key, number, "/alone")) for key in clients]
    assert len({digest for _, _, digest in alone}) == len(clients)
    with ThreadPoolExecutor(len(clients)) as pool:
        for attempt in range(3):
            sessions = [Session(place, key, number, f"/{attempt}") for key in clients]
            assert list(pool.map(outcome_of, sessions)) == alone


def test_an_edge_says_what_it_cannot_be_asked(place: Place) -> None:
    """A request that is none ends in a TypeError, not in silence."""
    with pytest.raises(TypeError, match="cannot be asked Held"):
        place.transport.send(wire.Held("", True))


@pytest.mark.parametrize(
    "error",
    [
        OutOfOrderStep("a", step=3, num_steps=2),
        TailLost("b", sessions=("1/c0/edge",)),
        StateNotHeld("c", digest="f"),
    ],
)
def test_errors_keep_their_numbers_when_they_travel(error: Exception) -> None:
    """Pickling keeps type, message and attributes."""
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


def test_a_repeated_opening_leaves_the_session_as_it_is(place: Place) -> None:
    """Its reply was lost, not the session; another token starts over."""
    session = Session(place).open(token="a")
    session.step(0)
    second = session.step(1).values
    assert session.open(token="a").step(1).values == second
    session.step(2)
    with pytest.raises(OutOfOrderStep):
        session.open(token="b").step(1)


def test_an_earlier_opening_cannot_touch_a_later_one(place: Place) -> None:
    """Neither its steps nor its farewell count any more."""
    session = Session(place).open(token="a")
    before = session.incarnation
    session.open(token="b")
    session.step(0)
    with pytest.raises(StaleSession):
        session.step(1, incarnation=before)
    session.send(wire.Abandon(session.name, before))
    assert session.seal(1).num_steps == 1
    session.send(wire.Abandon(session.name, before))
    assert session.seal(1).num_steps == 1


def test_two_seals_at_once_give_one_receipt(place: Place) -> None:
    """Whichever comes first seals, and the other is told the same."""
    session = Session(place).open(token="a")
    session.step(0)
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda _: session.seal(1), range(2))
    assert one == other
    assert session.commit(entry_of(one, 1)).sums
