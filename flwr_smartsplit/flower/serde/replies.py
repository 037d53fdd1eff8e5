"""Replies: what a client measured and confirms, to Flower records and back."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from flwr_smartsplit.device.local_training import Outcome
from flwr_smartsplit.edge.tensors import state_digest
from flwr_smartsplit.errors import RefusedReply
from flwr_smartsplit.flower.serde.records import (
    ARRAYS,
    OURS,
    Scalars,
    from_array_record,
    records_of,
    to_array_record,
)
from flwr_smartsplit.types import (
    ClientPlan,
    ClientReply,
    Move,
    Receipt,
    Replan,
    Status,
    StepReport,
    Variant,
)

METRICS = "metrics"
NamesOf = Callable[[tuple[Move, ...]], Sequence[str]]
"""Names the arrays that come without names, if the client moved its cut like this."""

_REPLY = "smartsplit.reply"
_TOO_LARGE = 2**63


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


def reply_to_scalars(plan: ClientPlan, outcome: Outcome) -> Scalars:
    """Put a client's report and receipts into one text, with a digest of its state."""
    report, receipts = outcome.report, outcome.receipts
    reply = {
        "client_key": plan.client_key,
        "round_number": plan.round_number,
        "digest": state_digest(outcome.state),
        "report": {**asdict(report), "metrics": dict(report.metrics)},
        "receipts": [asdict(receipt) for receipt in receipts],
    }
    return {_REPLY: json.dumps(reply), "client-key": plan.client_key}


def evaluated(report: StepReport) -> Outcome:
    """Wrap what an evaluation measured; it has no state."""
    return Outcome(state={}, receipts=(), report=report)


def train_reply(
    plan: ClientPlan, outcome: Outcome, *, weighted_by_key: str
) -> RecordDict:
    """Make a Message-API reply to a training request."""
    return RecordDict(
        {
            ARRAYS: to_array_record(outcome.state),
            METRICS: MetricRecord(metrics_of(outcome.report, weighted_by_key)),
            OURS: ConfigRecord(reply_to_scalars(plan, outcome)),
        }
    )


def evaluate_reply(
    plan: ClientPlan, report: StepReport, *, weighted_by_key: str
) -> RecordDict:
    """Make a Message-API reply to an evaluation request."""
    return RecordDict(
        {
            METRICS: MetricRecord(metrics_of(report, weighted_by_key)),
            OURS: ConfigRecord(reply_to_scalars(plan, evaluated(report))),
        }
    )


def reply_from_content(
    content: RecordDict, names: NamesOf | None = None
) -> ClientReply:
    """Read a reply in either dialect.

    Parameters
    ----------
    content : RecordDict
        What came.
    names : Callable[[moves], Sequence[str]], optional
        Names a legacy reply's arrays, which come without.

    Raises
    ------
    RefusedReply
        If the reply cannot be read.
    """
    with _reading():
        texts: dict[str, Any] = {}
        for record in records_of(content, ConfigRecord):
            texts |= dict(record)
        state: dict[str, npt.NDArray[Any]] = {}
        reply, digest = _read_reply(texts[_REPLY])
        if reply.report.status is Status.OK:  # Flower marks an empty legacy reply.
            for arrays in records_of(content, ArrayRecord):
                state |= from_array_record(arrays)
        named = state if names is None else _named(reply, list(state.values()), names)
        return _whole_reply(reply, named, digest)


def reply_from_scalars(
    scalars: Mapping[str, Any],
    arrays: Sequence[npt.NDArray[Any]],
    names: NamesOf,
) -> ClientReply:
    """Read a reply as Flower's legacy API hands it on.

    Parameters
    ----------
    scalars : Mapping[str, Scalar]
        Its metrics, ours among them.
    arrays : Sequence[ndarray]
        Its arrays, in the order of the names.
    names : Callable[[moves], Sequence[str]]
        What they are called.

    Raises
    ------
    RefusedReply
        If the reply cannot be read.
    """
    with _reading():
        reply, digest = _read_reply(scalars[_REPLY])
        is_ok = reply.report.status is Status.OK
        named = _named(reply, arrays, names) if is_ok else {}
        return _whole_reply(reply, named, digest)


@contextmanager
def _reading() -> Iterator[None]:
    """Refuse what cannot be read, whatever it is."""
    try:
        yield
    except RefusedReply:
        raise
    except Exception as error:
        raise RefusedReply(
            f"the reply cannot be read: {type(error).__name__}: {error}",
            kind="refused",
        ) from error


def _read_reply(text: Any) -> tuple[ClientReply, Any]:
    """Read a reply, yet without its arrays, and what their digest should be."""
    values = json.loads(str(text))
    facts = values["report"]
    facts["status"] = Status(facts["status"])
    facts["moves"] = tuple(Move(**move) for move in facts.get("moves", ()))
    facts["replans"] = tuple(Replan(**each) for each in facts.get("replans", ()))
    report = StepReport(**facts)
    _check_types(report)
    receipts = tuple(
        Receipt(
            **{
                **receipt,
                "names": tuple(receipt["names"]),
                "variant": Variant(**receipt["variant"]),
            }
        )
        for receipt in values["receipts"]
    )
    for receipt in receipts:
        _check_receipt(receipt)
    reply = ClientReply(
        client_key=str(values["client_key"]),
        round_number=int(values["round_number"]),
        state={},
        receipts=receipts,
        report=report,
    )
    return reply, values["digest"]


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


def _check_types(report: StepReport) -> None:
    """Make sure that a report's numbers are numbers."""
    for field in fields(report):
        value, wanted = getattr(report, field.name), type(field.default)
        if field.name == "resident_growth_bytes" and value is not None:
            wanted = int
        if wanted is str and not isinstance(value, str):
            raise TypeError(f"{field.name} is {value!r}, not text")
        if wanted in (int, float) and not _is_number(value, wanted):
            raise TypeError(f"{field.name} is {value!r}, not {wanted.__name__}")
    metrics: Any = report.metrics
    if not isinstance(metrics, dict) or not all(
        _is_number(value, float) for value in metrics.values()
    ):
        raise TypeError(f"metrics are {metrics!r}, not numbers by name")
    for move in report.moves:
        numbers = (move.step, move.before, move.after)
        if not all(_is_number(number, int) for number in numbers) or not isinstance(
            move.reason, str
        ):
            raise TypeError(f"{move!r} does not have a move's types")
    for replan in report.replans:
        texts = (replan.before, replan.after, replan.reason)
        if not _is_number(replan.step, int) or not all(
            isinstance(text, str) for text in texts
        ):
            raise TypeError(f"{replan!r} does not have a replan's types")


def _check_receipt(receipt: Receipt) -> None:
    """Make sure that a receipt's names are texts and its counts numbers."""
    texts = (
        *(receipt.place, receipt.incarnation, receipt.session, receipt.digest),
        receipt.variant.name,
    )
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
