"""Records: what is written is what is read, in both layouts; nonsense is refused."""

import json
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from flwr_smartsplit import Integer, Route
from flwr_smartsplit.device.local_training import Outcome
from flwr_smartsplit.errors import RefusedReply
from flwr_smartsplit.flower.serde.records import (
    LEGACY,
    from_array_record,
    instruction,
    message_layout,
    plan_from_config,
    plan_to_scalars,
    profile_from_content,
    profile_request,
    profile_to_scalars,
    record_bytes,
    to_array_record,
)
from flwr_smartsplit.flower.serde.replies import (
    NamesOf,
    evaluate_reply,
    evaluated,
    metrics_of,
    reply_from_content,
    reply_to_scalars,
    train_reply,
)
from flwr_smartsplit.types import (
    NO_TRAITS,
    ClientPlan,
    Cohort,
    Constraints,
    DeviceProfile,
    DeviceTraits,
    Link,
    Receipt,
    Status,
    StepReport,
    Variant,
)
from tests.tasks import differences

STATE: dict[str, Any] = {
    "b.w": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a.n": np.array(3, np.int64),
    "b.h": np.float16([1.5, -0.0]),
    "b.f": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
}
PLAN = ClientPlan(
    client_key="client é/1",
    round_number=3,
    route=Route.split(2, edge="x"),
    seed=2**62,
    num_threads=2,
    budget_bytes=2**40,
    state_digest="d" * 64,
    edge_addresses={"x": "x-1"},
)
RECEIPT = Receipt(
    place="x",
    incarnation="i",
    session="3/client é/1/x",
    names=("c.w", "c.b"),
    digest="e" * 64,
    num_examples=9,
    num_steps=3,
)
REPORT = StepReport(
    num_examples=9,
    num_steps=3,
    loss=0.1 + 0.2,
    peak_bytes=2**33,
    resident_growth_bytes=2**34,
    sent_bytes=5,
    received_bytes=6,
    seconds=1.25,
    num_threads=2,
    metrics={"accuracy": 1 / 3},
    step_seconds=0.1,
    released="slow",
)
COHORT = Cohort(median_step_seconds=0.7, median_importance=1 / 3, low_importance=0.2)
FRONT = Variant("front", {"a": (0, 2)}, is_scaled=True)
CONSTRAINTS = Constraints(min_device_units=2, kept_units=frozenset({3, 1}))
OUTCOME = Outcome(state=STATE, receipts=(RECEIPT,), report=REPORT)


def legacy_reply(*arrays: Any, **scalars: Any) -> RecordDict:
    """Make what Flower makes of a ``NumPyClient``'s answer."""
    record = ArrayRecord({str(i): Array(array) for i, array in enumerate(arrays)})
    return RecordDict(
        {
            "fitres.parameters": record,
            "fitres.num_examples": MetricRecord({"num_examples": 9}),
            "fitres.metrics": ConfigRecord(scalars),
            "fitres.status": ConfigRecord({"code": 0, "message": "Success"}),
        }
    )


# --- arrays ---------------------------------------------------------------------------


def test_arrays_come_back_in_every_bit_and_in_order() -> None:
    """Any dtype, no dimensions, either memory order."""
    state = from_array_record(to_array_record(STATE))
    assert list(state) == list(STATE)
    assert differences(state, STATE) == []
    assert (state["b.f"] == STATE["b.f"]).all()


# --- profiles -------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [None, 0, 1, 2**40])
@pytest.mark.parametrize("key", ["smartsplit", "getpropertiesres.properties"])
def test_a_profile_comes_back(budget: int | None, key: str) -> None:
    """No limit and a budget of zero are two things."""
    profile = DeviceProfile(
        client_key="7", budget_bytes=budget, num_examples=9, batch_size=4
    )
    content = RecordDict({key: ConfigRecord(profile_to_scalars(profile))})
    assert profile_from_content(content) == profile


def test_what_a_device_says_of_itself_comes_back() -> None:
    """Links without a limit, links to some edges, labels; and nothing, too."""
    link = Link(up_bytes_per_second=3.5, latency_seconds=0.1)
    traits = DeviceTraits(
        flops_per_second=2e9, link=link, edge_links={"x": Link()}, label_counts=(3, 0)
    )
    profile = DeviceProfile(
        client_key="7",
        budget_bytes=None,
        num_examples=9,
        batch_size=4,
        num_epochs=3,
        traits=traits,
    )
    scalars = profile_to_scalars(profile)
    content = RecordDict({"x": ConfigRecord(scalars)})
    assert profile_from_content(content) == profile
    older = {k: v for k, v in scalars.items() if k not in {"traits", "num-epochs"}}
    found = profile_from_content(RecordDict({"x": ConfigRecord(older)}))
    assert (found.num_epochs, found.traits) == (1, NO_TRAITS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"traits": "no"}, "Expecting value"),
        ({"traits": "[1]"}, "pop expected"),
        ({"traits": '{"speed": 3}'}, "unexpected keyword"),
        ({"traits": '{"flops_per_second": -1}'}, r"to 1e\+24, or None"),
        ({"traits": '{"flops_per_second": 1e-320}'}, r"to 1e\+24, or None"),
        ({"traits": f'{{"flops_per_second": {10**400}}}'}, r"to 1e\+24, or None"),
        ({"traits": '{"link": {"up_bytes_per_second": 0}}'}, r"at least 0\.001"),
        ({"traits": '{"link": {"up_bytes_per_second": 1e-310}}'}, r"at least 0\.001"),
        ({"traits": '{"link": {"latency_seconds": 1e300}}'}, r"from 0 to 1e\+06"),
        ({"traits": f'{{"label_counts": [{10**400}, 1]}}'}, "number of examples"),
        ({"num-examples": 0}, "num-examples 0, of which"),
        ({"num-examples": -800}, "num-examples -800, of which"),
        ({"num-examples": str(10**400)}, "num-examples 1000000"),
        ({"traits": '{"label_counts": "many"}'}, "invalid literal"),
        ({"traits": json.dumps({"label_counts": [1] * 20_000})}, "20000 classes"),
        ({"num-epochs": 0}, "num-epochs 0, of which"),
    ],
)
def test_traits_that_mean_nothing_are_refused(
    changes: dict[str, Any], message: str
) -> None:
    """One client's nonsense is its own."""
    profile = DeviceProfile(
        client_key="7", budget_bytes=1, num_examples=9, batch_size=4
    )
    scalars = profile_to_scalars(profile) | changes
    with pytest.raises(RefusedReply, match=message):
        profile_from_content(RecordDict({"x": ConfigRecord(scalars)}))


@pytest.mark.parametrize(
    ("scalars", "message"),
    [
        ({}, r"'budget-bytes'; it has \[\]"),
        ({"client-key": "a", "budget-bytes": 5, "batch-size": 2}, "'num-examples'"),
        (
            {"client-key": "a", "budget-bytes": "lots", "batch-size": 2},
            "invalid literal",
        ),
    ],
)
def test_half_a_profile_is_refused(scalars: dict[str, Any], message: str) -> None:
    """With what is missing, and what to do."""
    with pytest.raises(RefusedReply, match=message) as raised:
        profile_from_content(RecordDict({"x": ConfigRecord(scalars)}))
    assert raised.value.kind == "refused"
    assert "SmartSplitNumPyClient" in str(raised.value)


def test_each_layout_is_asked_as_it_expects() -> None:
    """A legacy app reads a config record, a Message-API app nothing."""
    assert list(profile_request(LEGACY)) == ["getpropertiesins.config"]
    assert list(profile_request(message_layout())) == []
    assert LEGACY.profile_type == "get_properties"
    assert message_layout().profile_type == "query.smartsplit_profile"


# --- plans ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan",
    [
        PLAN,
        ClientPlan(
            client_key="0",
            round_number=1,
            route=Route.whole(),
            seed=0,
            edge_addresses={},
        ),
        ClientPlan(
            client_key="0",
            round_number=1,
            route=Route((2, 5), ("device", "x", "device")),
            seed=0,
            edge_addresses={"x": "y"},
        ),
        replace(PLAN, cohort=COHORT, importance=0.1 + 0.2, num_examples=9),
        replace(PLAN, constraints=CONSTRAINTS, variant=FRONT, accumulate=4),
        replace(PLAN, codecs=(Integer(bits=4),)),
    ],
)
def test_a_plan_comes_back(plan: ClientPlan) -> None:
    """Through the scalars of a config record, beside the user's own."""
    config = ConfigRecord({"lr": 0.1, **plan_to_scalars(plan)})
    assert plan_from_config(config) == plan


@pytest.mark.parametrize(
    "facts",
    [{}, {"num_examples": 5, "importance": -1.0}, {"importance": 1.0}],
)
def test_a_client_of_whom_nothing_is_known_is_not_compared(
    facts: dict[str, Any],
) -> None:
    """Its importance would be made up."""
    with pytest.raises(ValueError, match="has a cohort"):
        replace(PLAN, cohort=COHORT, **facts)


def test_a_stock_strategy_sends_no_plan() -> None:
    """Its config is none."""
    assert plan_from_config({"server-round": 1}) is None


@pytest.mark.parametrize("is_train", [True, False])
def test_an_instruction_has_the_keys_of_its_layout(is_train: bool) -> None:
    """Names under the Message API, numbers in the same order under the legacy one."""
    record = to_array_record(STATE)
    ours = instruction(message_layout("w", "c"), record, {"a": 1}, is_train=is_train)
    assert list(ours) == ["w", "c"]
    assert list(ours["w"]) == list(STATE)
    theirs = instruction(LEGACY, record, {"a": 1}, is_train=is_train)
    prefix = "fitins" if is_train else "evaluateins"
    assert list(theirs) == [f"{prefix}.parameters", f"{prefix}.config"]
    arrays = theirs[f"{prefix}.parameters"]
    assert list(arrays) == ["0", "1", "2", "3"]
    for array, name in zip(arrays.values(), STATE, strict=True):
        assert array.numpy().tobytes() == STATE[name].tobytes()


def test_an_instruction_does_not_share_the_config() -> None:
    """What one client does to its config, no other sees."""
    config = {"a": 1}
    made = instruction(LEGACY, to_array_record(STATE), config, is_train=True)
    made["fitins.config"]["a"] = 2
    assert config == {"a": 1}


# --- replies --------------------------------------------------------------------------


def test_a_reply_comes_back_in_the_message_layout() -> None:
    """State, receipts and report, to the last digit."""
    content = train_reply(PLAN, OUTCOME, weighted_by_key="n")
    reply = reply_from_content(content)
    assert (reply.client_key, reply.round_number) == (PLAN.client_key, 3)
    assert differences(reply.state, STATE) == []
    assert reply.receipts == (RECEIPT,)
    assert reply.report == REPORT
    assert content["metrics"]["n"] == 9
    assert content["metrics"]["accuracy"] == 1 / 3


def test_a_reply_comes_back_in_the_legacy_layout() -> None:
    """The names are those the strategy sent, in their order."""
    scalars = reply_to_scalars(PLAN, OUTCOME)
    content = legacy_reply(*STATE.values(), **scalars)
    reply = reply_from_content(content, lambda moves: list(STATE))
    assert differences(reply.state, STATE) == []
    assert (reply.receipts, reply.report) == ((RECEIPT,), REPORT)


@pytest.mark.parametrize("names", [None, lambda moves: ["a", "b"]])
def test_a_failed_part_comes_back_without_a_state(names: NamesOf | None) -> None:
    """Its status and message are what counts."""
    report = StepReport(status=Status.OUT_OF_MEMORY, message="too big", metrics={})
    scalars = reply_to_scalars(PLAN, evaluated(report))
    reply = reply_from_content(legacy_reply(**scalars), names)
    assert reply.state == {}
    assert reply.report == report


@pytest.mark.parametrize("growth_bytes", [None, 0, 2**34])
def test_what_the_process_grew_by_comes_back(growth_bytes: int | None) -> None:
    """Not known and nothing are two things; it is no metric, since some lack it."""
    report = replace(REPORT, resident_growth_bytes=growth_bytes)
    content = train_reply(PLAN, replace(OUTCOME, report=report), weighted_by_key="n")
    assert reply_from_content(content).report == report
    assert not [name for name in content["metrics"] if "resident" in name]


def test_an_evaluation_comes_back() -> None:
    """Without arrays; a loss that is not a number survives."""
    report = StepReport(num_examples=4, loss=float("nan"), metrics={"a": 1.0})
    content = evaluate_reply(PLAN, report, weighted_by_key="n")
    reply = reply_from_content(content)
    assert np.isnan(reply.report.loss)
    assert reply.report.metrics == {"a": 1.0}
    assert not content.array_records


def test_metrics_are_numbers_under_the_strategys_keys() -> None:
    """Flower averages all of them by the weight's key."""
    metrics = metrics_of(REPORT, "weight")
    assert metrics["weight"] == 9
    assert metrics["loss"] == REPORT.loss
    assert metrics["device-peak-bytes"] == 2**33
    MetricRecord(metrics)


def changed(**changes: Any) -> str:
    """Change fields of a reply's text; ``report__x`` is a field of the report."""
    text = reply_to_scalars(PLAN, OUTCOME)["smartsplit.reply"]
    fields = json.loads(text)
    for key, value in changes.items():
        *outer, last = key.split("__")
        target = fields[outer[0]] if outer else fields
        target[last] = value
    return json.dumps(fields)


UNREADABLE = {
    "no text": None,
    "no JSON": "{",
    "no fields": "{}",
    "a list": "[]",
    "an unknown status": changed(report__status="fine"),
    "an unknown field": changed(report__colour="red"),
    "no round": changed(round_number=None),
    "half a receipt": changed(receipts=[{"place": "x"}]),
    "a receipt that is none": changed(receipts=[3]),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_cannot_be_read_is_refused(case: str) -> None:
    """Never another exception: one client's nonsense is not the run's end."""
    text = UNREADABLE[case]
    record = ConfigRecord({} if text is None else {"smartsplit.reply": text})
    with pytest.raises(RefusedReply, match="cannot be read") as raised:
        reply_from_content(RecordDict({"smartsplit": record}))
    assert raised.value.kind == "refused"


NONSENSE = {
    "examples in words": changed(report__num_examples="many"),
    "no number of examples": changed(report__num_examples=None),
    "a resident set in words": changed(report__resident_growth_bytes="large"),
    "a resident set of truth": changed(report__resident_growth_bytes=True),
    "no reason in words": changed(report__released=True),
    "no loss": changed(report__loss=None),
    "metrics in words": changed(report__metrics={"accuracy": "good"}),
    "a list of metrics": changed(report__metrics=[1, 2]),
    "steps in words": changed(report__num_steps="three"),
}


def with_receipt(**fields: Any) -> str:
    """Change fields of a reply's receipt."""
    return changed(receipts=[asdict(RECEIPT) | fields])


WRONG_RECEIPTS = {
    "a place that is a list": with_receipt(place=["x"]),
    "names that are lists": with_receipt(names=[["c.w"], "c.b"]),
    "a session that is a number": with_receipt(session=3),
    "no digest": with_receipt(digest=None),
    "steps in words": with_receipt(num_steps="three"),
}


@pytest.mark.parametrize("case", WRONG_RECEIPTS)
def test_a_receipt_of_other_types_is_refused(case: str) -> None:
    """As a report: lists cannot be compared as names are, and would end the run."""
    record = ConfigRecord({"smartsplit.reply": WRONG_RECEIPTS[case]})
    with pytest.raises(RefusedReply, match="cannot be read"):
        reply_from_content(RecordDict({"smartsplit": record}))


@pytest.mark.parametrize("case", NONSENSE)
def test_a_report_of_other_types_is_refused(case: str) -> None:
    """Else it fails later, where nobody expects it, and ends the run."""
    record = ConfigRecord({"smartsplit.reply": NONSENSE[case]})
    with pytest.raises(RefusedReply):
        reply_from_content(RecordDict({"smartsplit": record}))


@pytest.mark.parametrize("names", [None, lambda moves: list(STATE)])
def test_arrays_that_changed_on_the_way_are_refused(names: NamesOf | None) -> None:
    """One last bit is enough: mods and wrappers must not pass for the client."""
    scalars = reply_to_scalars(PLAN, OUTCOME)
    bent = {**STATE, "b.w": np.nextafter(STATE["b.w"], np.float32(9))}
    content = RecordDict(
        {
            "arrays": to_array_record(bent),
            "smartsplit": ConfigRecord(scalars),
        }
    )
    with pytest.raises(RefusedReply, match="not those it sent"):
        reply_from_content(content, names)


def test_a_legacy_reply_with_other_arrays_is_refused() -> None:
    """The count must be that of the names that were sent."""
    scalars = reply_to_scalars(PLAN, OUTCOME)
    content = legacy_reply(np.zeros(1), **scalars)
    with pytest.raises(RefusedReply, match="sends 1 arrays, its segments have 2"):
        reply_from_content(content, lambda moves: ["a", "b"])


def test_bytes_of_a_message_are_arrays_and_our_text() -> None:
    """Numbers are headers."""
    content = RecordDict(
        {
            "arrays": to_array_record({"w": np.zeros(100, np.float32)}),
            "config": ConfigRecord({"text": "12345", "blob": b"123", "number": 7}),
        }
    )
    raw = len(content["arrays"]["w"].data)
    assert record_bytes(content) == raw + 8
    assert 400 < raw < 600
