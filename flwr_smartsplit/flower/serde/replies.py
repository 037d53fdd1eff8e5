"""Clients' replies to Flower records and back."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from functools import partial
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
import numpy.typing as npt
from flwr.app import ConfigRecord, MetricRecord, RecordDict

from flwr_smartsplit.device.local_training import Outcome
from flwr_smartsplit.edge.tensors import state_digest
from flwr_smartsplit.errors import RefusedReply
from flwr_smartsplit.flower.serde.records import (
    ARRAYS,
    OURS,
    Scalars,
    arrays_of,
    config_of,
    to_array_record,
)
from flwr_smartsplit.train.metric_names import check_metric_names
from flwr_smartsplit.types import (
    OF_EXAMPLES,
    ClientPlan,
    ClientReply,
    Move,
    Receipt,
    Status,
    StepReport,
    Variant,
)
from flwr_smartsplit.types.sizes import plain

METRICS = "metrics"
NamesOf = Callable[[tuple[Move, ...]], Sequence[str]]
"""Names the arrays of a legacy reply, given how its client moved its cut."""

_REPLY = "smartsplit.reply"
_TOO_LARGE = 2**63


def metrics_of(report: StepReport, weighted_by_key: str) -> Scalars:
    """List a report's numbers as the metrics that strategies average.

    With a metric that some batches lack comes the number of its examples.
    """
    counts = report.metric_examples
    return {
        **report.metrics,  # First, so that none of them replaces ours.
        **{name + OF_EXAMPLES: count for name, count in counts.items()},
        weighted_by_key: report.num_examples,
        "loss": report.loss,
        "device-peak-bytes": report.peak_bytes,
        "sent-bytes": report.sent_bytes,
        "received-bytes": report.received_bytes,
        "seconds": report.seconds,
        "num-steps": report.num_steps,
    }


def reply_to_scalars(plan: ClientPlan, outcome: Outcome) -> Scalars:
    """Put a client's report and receipts into one text, with a digest of its state."""
    report, receipts = outcome.report, outcome.receipts
    reply = {
        "client_key": plan.client_key,
        "round_number": plan.round_number,
        "digest": state_digest(outcome.state),
        "report": _written(report),
        "receipts": list(map(_receipt, receipts)),
    }
    text = json.dumps(reply, default=plain)
    return {_REPLY: text, "client-key": plan.client_key}


def _receipt(receipt: Receipt) -> dict[str, Any]:
    """Write a receipt."""
    written = {each.name: getattr(receipt, each.name) for each in fields(receipt)}
    return {**written, "variant": receipt.variant.to_lists()}


def _written(report: StepReport) -> dict[str, Any]:
    """Write a report; what only codecs measure is there where one is used."""
    plain = {"plain_sent_bytes", "plain_received_bytes"}
    return {k: v for k, v in asdict(report).items() if v or k not in plain}


def client_metrics(report: StepReport, weighted_by_key: str) -> Scalars:
    """List a report's numbers where it is made; a metric may not be named as ours."""
    check_metric_names(report.metrics, {weighted_by_key})
    return metrics_of(report, weighted_by_key)


def evaluated(report: StepReport) -> Outcome:
    """Wrap an evaluation's report as an outcome without a state."""
    return Outcome(state={}, receipts=(), report=report)


def train_reply(
    plan: ClientPlan, outcome: Outcome, *, weighted_by_key: str
) -> RecordDict:
    """Make a Message-API reply to a training request."""
    return RecordDict(
        {
            ARRAYS: to_array_record(outcome.state),
            METRICS: MetricRecord(client_metrics(outcome.report, weighted_by_key)),
            OURS: ConfigRecord(reply_to_scalars(plan, outcome)),
        }
    )


def evaluate_reply(
    plan: ClientPlan, report: StepReport, *, weighted_by_key: str
) -> RecordDict:
    """Make a Message-API reply to an evaluation request."""
    return RecordDict(
        {
            METRICS: MetricRecord(client_metrics(report, weighted_by_key)),
            OURS: ConfigRecord(reply_to_scalars(plan, evaluated(report))),
        }
    )


def reply_from_content(
    content: RecordDict, names: NamesOf | None = None
) -> ClientReply:
    """Read a reply in either layout, as ``reply_from_scalars`` does."""
    scalars, arrays = config_of(content), partial(arrays_of, content)
    return reply_from_scalars(scalars, arrays, names)


def reply_from_scalars(
    scalars: Mapping[str, Any],
    read_arrays: Callable[[], Mapping[Any, npt.NDArray[Any]]],
    names: NamesOf | None,
) -> ClientReply:
    """Read a reply, and its arrays unless the client failed.

    ``names`` names the arrays of a legacy reply, which come in order but unnamed.
    ``RefusedReply`` is raised if the arrays are not those that the client sent.
    """
    try:
        values = json.loads(str(scalars[_REPLY]))
        reply = ClientReply(
            client_key=str(values["client_key"]),
            round_number=int(values["round_number"]),
            state={},
            receipts=_typed("receipts", tuple[Receipt, ...], values["receipts"]),
            report=_typed("report", StepReport, values["report"]),
        )
        state: Mapping[Any, npt.NDArray[Any]] = {}
        if reply.report.status is Status.OK:  # Flower marks an empty legacy reply.
            state = read_arrays()
        if names is not None:
            state = _named(reply, list(state.values()), names)
        return _whole_reply(reply, state, values["digest"])
    except RefusedReply:
        raise
    except Exception as error:
        raise RefusedReply(
            f"the reply cannot be read: {type(error).__name__}: {error}", kind="refused"
        ) from error


def _named(
    reply: ClientReply, arrays: Sequence[npt.NDArray[Any]], names_of: NamesOf
) -> dict[str, npt.NDArray[Any]]:
    """Give the arrays of a legacy reply their names; an evaluation has none."""
    names = names_of(reply.report.moves)
    if arrays and len(arrays) != len(names):
        raise RefusedReply(
            f"client {reply.client_key!r} sends {len(arrays)} arrays, its "
            f"segments have {len(names)}.",
            kind="refused",
        )
    return dict(zip(names, arrays, strict=True)) if arrays else {}


def _whole_reply(
    reply: ClientReply, state: Mapping[str, npt.NDArray[Any]], digest: Any
) -> ClientReply:
    """Join a reply and its arrays, if these are what the client sent."""
    state = {name: np.asarray(array) for name, array in state.items()}
    if state_digest(state) != digest:
        raise RefusedReply(
            f"the arrays of client {reply.client_key!r} are not those it sent: "
            "something between client and strategy changed them, such as a mod or a "
            "wrapper for differential privacy or secure aggregation. Those need whole "
            "models; a split client sends a part.",
            kind="refused",
        )
    return replace(reply, state=state)


def _typed(name: str, kind: Any, value: Any) -> Any:
    """Build a value of a type, such as a dataclass, from what JSON made of it.

    TypeError if a value in it has another type, which would fail later and end the run.
    """
    origin, args = get_origin(kind), get_args(kind)
    hints = get_type_hints(kind) if is_dataclass(kind) else {}
    if hints and isinstance(value, dict):
        if kind is not Variant:  # Which reads itself.
            value = {k: _typed(k, hints[k], each) for k, each in value.items()}
        return Variant.from_lists(value) if kind is Variant else kind(**value)
    if origin is tuple and isinstance(value, list):
        return tuple(_typed(name, args[0], each) for each in value)
    if origin is Mapping and isinstance(value, dict):
        return {key: _typed(f"{name} {key}", args[1], v) for key, v in value.items()}
    if origin is UnionType:  # int | None
        return None if value is None else _typed(name, args[0], value)
    is_right = kind is bool and isinstance(value, bool)
    if is_right or (kind in (int, float) and _is_number(value, kind)):
        return value
    if kind in (str, Status) and isinstance(value, str):
        return kind(value)
    raise TypeError(f"{name} is {value!r}, not {getattr(kind, '__name__', kind)}")


def _is_number(value: Any, kind: type) -> bool:
    allowed = int if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, allowed):
        return False
    return isinstance(value, float) or abs(value) < _TOO_LARGE
