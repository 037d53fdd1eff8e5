"""Plans, profiles and outcomes to Flower records and back; every wire key is here.

Two dialects carry the same contents: ``MESSAGE`` is Flower's Message API,
``LEGACY`` what a ``NumPyClient`` app understands. What is ours travels as scalars
in one record, because legacy clients take nothing else.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from flwr_smartsplit.errors import RefusedReply
from flwr_smartsplit.runtime.training import Outcome
from flwr_smartsplit.types import (
    ClientPlan,
    ClientReply,
    DeviceProfile,
    Receipt,
    Route,
    Status,
    StepReport,
)

Arrays = Mapping[str, npt.NDArray[Any]]
Scalar = bool | bytes | float | int | str
Scalars = dict[str, Any]  # Flower's own types are invariant.

ARRAYS = "arrays"
CONFIG = "config"
METRICS = "metrics"
OURS = "smartsplit"
PROFILE_ACTION = "smartsplit_profile"

_PLAN = "smartsplit.plan"
_REPLY = "smartsplit.reply"
_NO_BUDGET = -1
_TOO_LARGE = 2**63


@dataclass(frozen=True, slots=True)
class Dialect:
    """Where one of Flower's two APIs keeps things in a message.

    Parameters
    ----------
    name : str
        What to call it.
    profile_type : str
        Message type that asks a client for its profile.
    train_arrays, train_config, evaluate_arrays, evaluate_config : str
        Record keys of what is sent.
    """

    name: str
    profile_type: str
    train_arrays: str
    train_config: str
    evaluate_arrays: str
    evaluate_config: str


LEGACY = Dialect(
    name="NumPyClient",
    profile_type="get_properties",
    train_arrays="fitins.parameters",
    train_config="fitins.config",
    evaluate_arrays="evaluateins.parameters",
    evaluate_config="evaluateins.config",
)


def message_dialect(arrays_key: str = ARRAYS, config_key: str = CONFIG) -> Dialect:
    """Make the Message API's dialect, with the keys the strategy was given."""
    return Dialect(
        name="Message API",
        profile_type=f"query.{PROFILE_ACTION}",
        train_arrays=arrays_key,
        train_config=config_key,
        evaluate_arrays=arrays_key,
        evaluate_config=config_key,
    )


def last_line(reason: object) -> str:
    """Take the line of an error's text that says what happened, without colours."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(reason))
    lines = [line.strip(" '>") for line in text.splitlines()]
    return next(filter(None, reversed(lines)), "no reason given")


# --- arrays -----------------------------------------------------------------------


def to_array_record(state: Arrays) -> ArrayRecord:
    """Put named arrays into a record, in their order."""
    return ArrayRecord({name: Array(array) for name, array in state.items()})


def from_array_record(record: ArrayRecord) -> dict[str, npt.NDArray[Any]]:
    """Read named arrays from a record."""
    return {name: array.numpy() for name, array in record.items()}


def record_bytes(content: RecordDict) -> int:
    """Count the payload of a message: array bytes and the text we add."""
    arrays = sum(
        len(array.data)
        for record in content.array_records.values()
        for array in record.values()
    )
    texts = sum(
        len(value)
        for record in content.config_records.values()
        for value in record.values()
        if isinstance(value, str | bytes)
    )
    return arrays + texts


# --- profiles ---------------------------------------------------------------------


def profile_to_scalars(profile: DeviceProfile) -> Scalars:
    """Describe a device in scalars."""
    budget = profile.budget_bytes
    return {
        "client-key": profile.client_key,
        "budget-bytes": _NO_BUDGET if budget is None else budget,
        "num-examples": profile.num_examples,
        "batch-size": profile.batch_size,
    }


def profile_from_content(content: RecordDict) -> DeviceProfile:
    """Read a profile from a reply in either dialect.

    Raises
    ------
    RefusedReply
        If the client does not say what is needed.
    """
    scalars: dict[str, Any] = {}
    for record in content.config_records.values():
        scalars |= dict(record)
    try:
        budget = int(scalars["budget-bytes"])
        if budget < _NO_BUDGET or int(scalars["batch-size"]) < 1:
            raise ValueError("a budget below 0 or a batch size below 1")
        return DeviceProfile(
            client_key=str(scalars["client-key"]),
            budget_bytes=None if budget == _NO_BUDGET else budget,
            num_examples=int(scalars["num-examples"]),
            batch_size=int(scalars["batch-size"]),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise RefusedReply(
            f"the client's profile lacks or misspells {error}; it has "
            f"{sorted(scalars)}. Wrap the client in SmartSplitNumPyClient.",
            kind="refused",
        ) from error


# --- plans ------------------------------------------------------------------------


def plan_to_scalars(plan: ClientPlan) -> Scalars:
    """Put a plan into one text."""
    return {_PLAN: json.dumps(asdict(plan))}


def plan_from_config(config: Mapping[str, Any]) -> ClientPlan | None:
    """Read the plan of a message; None if a stock strategy sent it."""
    if _PLAN not in config:
        return None
    values = json.loads(str(config[_PLAN]))
    route = values.pop("route")
    return ClientPlan(
        route=Route(tuple(route["cuts"]), tuple(route["places"])), **values
    )


def instruction(
    dialect: Dialect,
    record: ArrayRecord,
    config: Mapping[str, Any],
    *,
    is_train: bool,
) -> RecordDict:
    """Make what one client is sent: a record of its own, shared with nobody."""
    if dialect is LEGACY:
        record = ArrayRecord({str(i): a for i, a in enumerate(record.values())})
    arrays_key = dialect.train_arrays if is_train else dialect.evaluate_arrays
    config_key = dialect.train_config if is_train else dialect.evaluate_config
    return RecordDict({arrays_key: record, config_key: ConfigRecord(dict(config))})


def profile_request(dialect: Dialect) -> RecordDict:
    """Make what a client is sent to ask for its profile."""
    if dialect is LEGACY:
        return RecordDict({"getpropertiesins.config": ConfigRecord()})
    return RecordDict()


# --- replies ----------------------------------------------------------------------


def metrics_of(report: StepReport, weighted_by_key: str) -> Scalars:
    """List what a client measured, as the metrics that strategies average."""
    return {
        **report.metrics,  # First, so that none of them takes the place of ours.
        weighted_by_key: report.num_examples,
        "loss": report.loss,
        "device-peak-bytes": report.peak_bytes,
        "sent-bytes": report.sent_bytes,
        "received-bytes": report.received_bytes,
        "seconds": report.seconds,
        "num-steps": report.num_steps,
    }


def reply_to_scalars(
    plan: ClientPlan, report: StepReport, receipts: Sequence[Receipt] = ()
) -> Scalars:
    """Put a client's report and receipts into one text."""
    reply = {
        "client_key": plan.client_key,
        "round_number": plan.round_number,
        "report": {**asdict(report), "metrics": dict(report.metrics)},
        "receipts": [asdict(receipt) for receipt in receipts],
    }
    return {_REPLY: json.dumps(reply), "client-key": plan.client_key}


def train_reply(
    plan: ClientPlan, outcome: Outcome, *, weighted_by_key: str
) -> RecordDict:
    """Make a Message-API reply to a training request."""
    return RecordDict(
        {
            ARRAYS: to_array_record(outcome.state),
            METRICS: MetricRecord(metrics_of(outcome.report, weighted_by_key)),
            OURS: ConfigRecord(
                reply_to_scalars(plan, outcome.report, outcome.receipts)
            ),
        }
    )


def evaluate_reply(
    plan: ClientPlan, report: StepReport, *, weighted_by_key: str
) -> RecordDict:
    """Make a Message-API reply to an evaluation request."""
    return RecordDict(
        {
            METRICS: MetricRecord(metrics_of(report, weighted_by_key)),
            OURS: ConfigRecord(reply_to_scalars(plan, report)),
        }
    )


def reply_from_content(
    content: RecordDict, names: Sequence[str] | None = None
) -> ClientReply:
    """Read a reply in either dialect.

    Parameters
    ----------
    content : RecordDict
        What came.
    names : Sequence[str], optional
        The names of a legacy reply's arrays, which come without.

    Raises
    ------
    RefusedReply
        If the reply cannot be read.
    """
    try:
        return _read_reply(content, names)
    except RefusedReply:
        raise
    except Exception as error:
        raise RefusedReply(
            f"the reply cannot be read: {type(error).__name__}: {error}",
            kind="refused",
        ) from error


def _read_reply(content: RecordDict, names: Sequence[str] | None) -> ClientReply:
    text = next(
        str(record[_REPLY])
        for record in content.config_records.values()
        if _REPLY in record
    )
    values = json.loads(text)
    report = StepReport(
        **{**values["report"], "status": Status(values["report"]["status"])}
    )
    _check_types(report)
    receipts = tuple(
        Receipt(**{**receipt, "names": tuple(receipt["names"])})
        for receipt in values["receipts"]
    )
    for receipt in receipts:
        _check_receipt(receipt)
    state: dict[str, npt.NDArray[Any]] = {}
    if report.status is Status.OK:  # Flower marks an empty legacy reply otherwise.
        for record in content.array_records.values():
            state |= from_array_record(record)
    if names is not None and state:
        if len(state) != len(names):
            raise RefusedReply(
                f"client {values['client_key']!r} sends {len(state)} arrays, its "
                f"segments have {len(names)}.",
                kind="refused",
            )
        state = dict(zip(names, state.values(), strict=True))
    return ClientReply(
        client_key=str(values["client_key"]),
        round_number=int(values["round_number"]),
        state={name: np.asarray(array) for name, array in state.items()},
        receipts=receipts,
        report=report,
    )


def _check_types(report: StepReport) -> None:
    """Make sure that a report's numbers are numbers."""
    for field in fields(report):
        value, wanted = getattr(report, field.name), type(field.default)
        if wanted in (int, float) and not _is_number(value, wanted):
            raise TypeError(f"{field.name} is {value!r}, not {wanted.__name__}")
    metrics: Any = report.metrics
    if not isinstance(metrics, dict) or not all(
        _is_number(value, float) for value in metrics.values()
    ):
        raise TypeError(f"metrics are {metrics!r}, not numbers by name")


def _check_receipt(receipt: Receipt) -> None:
    """Make sure that a receipt's names are texts and its counts numbers."""
    texts = (receipt.place, receipt.incarnation, receipt.session, receipt.digest)
    counts = (receipt.num_examples, receipt.num_steps)
    if not all(isinstance(text, str) for text in (*texts, *receipt.names)) or not all(
        _is_number(count, int) for count in counts
    ):
        raise TypeError(f"{receipt!r} does not have a receipt's types")


def _is_number(value: Any, wanted: type) -> bool:
    allowed = int if wanted is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, allowed):
        return False
    return isinstance(value, float) or abs(value) < _TOO_LARGE
