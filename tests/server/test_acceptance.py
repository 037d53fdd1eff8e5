"""Acceptance: every way in which a reply can be wrong is refused, with its numbers."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from flwr_smartsplit.errors import RefusedReply
from flwr_smartsplit.server.acceptance import check_reply
from flwr_smartsplit.types import (
    ClientReply,
    Expectation,
    Receipt,
    Status,
    StepReport,
    TailExpectation,
    Variant,
)

CURRENT = {
    "a.weight": np.zeros((2, 3), np.float32),
    "a.count": np.array(0, np.int64),
    "b.weight": np.zeros(4, np.float32),
}
EXPECTED = {
    "c1": Expectation(
        client_key="c1",
        device_names=frozenset({"a.weight", "a.count"}),
        tails={
            "edge": TailExpectation(
                session="5.0/c1/edge", names=frozenset({"b.weight"})
            )
        },
    ),
    "c2": Expectation(client_key="c2", device_names=frozenset(CURRENT), tails={}),
}
RECEIPT = Receipt(
    place="edge",
    incarnation="first life",
    session="5.0/c1/edge",
    names=("b.weight",),
    digest="0" * 64,
    num_examples=8,
    num_steps=2,
)
GOOD = ClientReply(
    client_key="c1",
    round_number=5,
    state={"a.weight": np.ones((2, 3), np.float32), "a.count": np.array(2)},
    receipts=(RECEIPT,),
    report=StepReport(num_examples=8, num_steps=2, metrics={}),
)


def check(reply: ClientReply, **changes: Any) -> None:
    """Check a reply of round 5."""
    facts: dict[str, Any] = {
        "round_number": 5,
        "expected": EXPECTED,
        "accepted": {},
        "current": CURRENT,
    }
    check_reply(reply, **{**facts, **changes})


def with_state(**arrays: Any) -> ClientReply:
    """Change the good reply's arrays."""
    dotted = {name.replace("_", "."): array for name, array in arrays.items()}
    return replace(GOOD, state={**GOOD.state, **dotted})


def with_report(**changes: Any) -> ClientReply:
    """Change the good reply's report."""
    return replace(GOOD, report=replace(GOOD.report, **changes))


def with_receipt(**changes: Any) -> ClientReply:
    """Change the good reply's receipt."""
    return replace(GOOD, receipts=(replace(RECEIPT, **changes),))


def test_good_replies_are_accepted_in_silence() -> None:
    """A split and a whole client, with all they must send, raise nothing."""
    check(GOOD)
    whole = {name: array + 1 for name, array in CURRENT.items()}
    check(replace(GOOD, client_key="c2", state=whole, receipts=()))


RELEASED = {
    "in the first pass": (8, 1, 8),
    "early in the second": (8, 2, 9),
    "late in the second": (8, 2, 15),
    "at the end of the second": (8, 2, 16),
}


@pytest.mark.parametrize("case", RELEASED)
def test_who_was_released_counts_with_what_it_trained_on(case: str) -> None:
    """Its last pass may be a part of one."""
    num_examples, num_epochs, stepped = RELEASED[case]
    facts = {"num_examples": num_examples, "num_epochs": num_epochs}
    receipt = replace(RECEIPT, num_examples=stepped)
    reply = replace(with_report(**facts, released="slow"), receipts=(receipt,))
    check(reply)
    is_whole = num_examples * num_epochs == stepped
    if not is_whole:
        report = replace(reply.report, released="")
        with pytest.raises(RefusedReply, match=f"saw {stepped}"):
            check(replace(reply, report=report))


def test_others_who_were_accepted_are_no_matter() -> None:
    """Only a second reply of the same client is a duplicate."""
    check(GOOD, accepted={"c2": GOOD})


NOT_A_NUMBER = np.full((2, 3), np.nan, np.float32)
ENDLESS = np.full((2, 3), np.inf, np.float32)

REFUSALS: dict[str, tuple[ClientReply, str, str]] = {
    "an earlier round": (
        replace(GOOD, round_number=4),
        "late",
        "'c1' answers round 4 in round 5",
    ),
    "a round to come": (
        replace(GOOD, round_number=6),
        "late",
        "'c1' answers round 6 in round 5",
    ),
    "not chosen": (
        replace(GOOD, client_key="c9"),
        "refused",
        "'c9' was not chosen",
    ),
    "no examples": (with_report(num_examples=0), "refused", "trained on 0 examples"),
    "fewer than none": (
        with_report(num_examples=-3),
        "refused",
        "trained on -3 examples",
    ),
    "missing name": (
        replace(GOOD, state={"a.count": np.array(2)}),
        "refused",
        r"missing \['a.weight'\], surplus \[\]",
    ),
    "a tail's name": (
        with_state(b_weight=np.zeros(4, np.float32)),
        "refused",
        r"missing \[\], surplus \['b.weight'\]",
    ),
    "no state": (replace(GOOD, state={}), "refused", r"missing \['a.count', 'a.weight"),
    "shape": (
        with_state(a_weight=np.zeros((3, 2), np.float32)),
        "refused",
        r"a.weight as float32\(3, 2\), the model has float32\(2, 3\)",
    ),
    "broadcastable shape": (
        with_state(a_weight=np.zeros((1, 3), np.float32)),
        "refused",
        r"float32\(1, 3\)",
    ),
    "dtype": (
        with_state(a_weight=np.zeros((2, 3))),
        "refused",
        r"a.weight as float64\(2, 3\), the model has float32",
    ),
    "not a number": (with_state(a_weight=NOT_A_NUMBER), "refused", "not finite"),
    "infinite": (with_state(a_weight=ENDLESS), "refused", "a.weight that are not"),
    "no receipt": (
        replace(GOOD, receipts=()),
        "refused",
        r"receipts of \['edge'\], not of \[\]",
    ),
    "receipt of another edge": (
        with_receipt(place="elsewhere"),
        "refused",
        r"receipts of \['edge'\], not of \['elsewhere'\]",
    ),
    "receipt nobody needs": (
        replace(GOOD, client_key="c2", state=dict(CURRENT)),
        "refused",
        r"receipts of \[\], not of \['edge'\]",
    ),
    "another variant": (
        with_receipt(variant=Variant("front")),
        "refused",
        "for variant 'front'; 'whole' was planned",
    ),
    "session of another round": (
        with_receipt(session="4.0/c1/edge"),
        "refused",
        "session 4.0/c1/edge with 1 names; 5.0/c1/edge with 1 was expected",
    ),
    "tail of other names": (
        with_receipt(names=("b.weight", "c.weight")),
        "refused",
        "with 2 names; 5.0/c1/edge with 1",
    ),
    "another number of examples": (
        with_receipt(num_examples=80),
        "refused",
        "claims 8 examples in 1 epochs, its tail at 'edge' saw 80",
    ),
    "another number of steps": (
        with_receipt(num_steps=1),
        "refused",
        "did 2 steps, its tail at 'edge' did 1",
    ),
    "released, with more than it trained on": (
        with_report(num_examples=9, released="slow"),
        "refused",
        "claims 9 examples in 1 epochs, its tail at 'edge' saw 8",
    ),
    "released in a pass it did not begin": (
        with_report(num_examples=4, num_epochs=3, released="slow"),
        "refused",
        "claims 4 examples in 3 epochs, its tail at 'edge' saw 8",
    ),
    "released, with less than it trained on": (
        with_report(num_examples=3, num_epochs=2, released="slow"),
        "refused",
        "claims 3 examples in 2 epochs, its tail at 'edge' saw 8",
    ),
    "over its cap": (
        with_report(status=Status.OUT_OF_MEMORY, message="3.00 MiB over the cap"),
        "out_of_memory",
        "3.00 MiB over the cap",
    ),
    "edge gone": (
        with_report(status=Status.EDGE_FAILED, message="edge 'e' does not answer"),
        "edge_failed",
        "edge 'e' does not answer",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_wrong_reply_is_refused_by_kind_and_with_its_numbers(case: str) -> None:
    """The kind is one word, and the message says what, against what."""
    reply, kind, message = REFUSALS[case]
    with pytest.raises(RefusedReply, match=message) as raised:
        check(reply)
    assert raised.value.kind == kind


@pytest.mark.parametrize("num_examples", [2**29, 10**400])
def test_a_weight_too_large_to_be_exact_is_refused(num_examples: int) -> None:
    """One above 10**308 would even end the run, when it meets a float."""
    whole = {name: array + 1 for name, array in CURRENT.items()}
    reply = with_report(num_examples=num_examples)
    with pytest.raises(RefusedReply, match="weight"):
        check(replace(reply, client_key="c2", state=whole, receipts=()))


def test_a_second_reply_is_a_duplicate() -> None:
    """Whatever it holds, the first one counts."""
    with pytest.raises(RefusedReply, match="'c1' has answered already") as raised:
        check(GOOD, accepted={"c1": GOOD})
    assert raised.value.kind == "duplicate"


def test_two_receipts_of_one_edge_are_refused_or_the_last_is_checked() -> None:
    """A good receipt cannot hide a wrong one behind it."""
    wrong = replace(RECEIPT, session="4.0/c1/edge")
    with pytest.raises(RefusedReply):
        check(replace(GOOD, receipts=(RECEIPT, wrong)))
