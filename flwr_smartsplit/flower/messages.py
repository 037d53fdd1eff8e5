"""A phase's messages in Flower's Message API."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from logging import INFO, getLogger
from typing import Any

from flwr.app import Array, ArrayRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords

from flwr_smartsplit.edge.regions import cut_array
from flwr_smartsplit.flower.rounds.exchange import Answer, Dispatch, names_after
from flwr_smartsplit.flower.serde.records import (
    LEGACY,
    instruction,
    last_line,
    plan_to_scalars,
    record_bytes,
)
from flwr_smartsplit.flower.serde.replies import (
    metrics_of,
    reply_from_content,
)
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.types import (
    OF_EXAMPLES,
    RESERVED_METRICS,
    ClientReply,
    Failure,
    Variant,
)

_log = getLogger("flwr")


def written(
    dispatch: Dispatch,
    arrays: ArrayRecord,
    config: Mapping[str, Any],
    *,
    ttl: float | None = None,
) -> list[Message]:
    """Write each chosen client's message: its segments' state, and its plan.

    After ``ttl`` seconds, Flower drops it; by default, when Flower does.
    """
    kind = MessageType.TRAIN if dispatch.is_train else MessageType.EVALUATE
    messages = []
    parts: dict[Variant, dict[str, Array]] = {}  # Of arrays, each cut once
    for key, sent in dispatch.sent.items():
        member = dispatch.contacts[key]
        cut = parts.setdefault(sent.plan.variant, {})
        for name in sent.sent_names:
            if name in dispatch.proxies and name not in cut:
                cut[name] = Array(dispatch.proxies[name])
            if name in sent.regions and name not in cut:
                part = cut_array(arrays[name].numpy(), sent.regions[name])
                cut[name] = Array(part)
        content = instruction(
            member.layout,
            ArrayRecord(
                {n: cut[n] if n in cut else arrays[n] for n in sent.sent_names}
            ),
            {**config, **plan_to_scalars(sent.plan)},
            is_train=dispatch.is_train,
        )
        dispatch.sent_bytes[key] = record_bytes(content)
        message = Message(
            content, message_type=kind, dst_node_id=member.node_id, ttl=ttl
        )
        dispatch.messages[key] = message.metadata
        messages.append(message)
    return messages


def read(
    dispatch: Dispatch, messages: Iterable[Message], chain: Chain
) -> tuple[list[ClientReply], list[Failure]]:
    """Read the replies, each in its client's layout.

    An error may be the SuperLink's, which only says what it answers.
    """
    asked = {data.message_id: key for key, data in dispatch.messages.items()}
    keys = {dispatch.contacts[key].node_id: key for key in dispatch.sent}
    return dispatch.collect(
        _answer(
            dispatch,
            asked.get(message.metadata.reply_to_message_id)
            or keys.get(message.metadata.src_node_id),
            message,
            chain,
        )
        for message in messages
    )


def _answer(
    dispatch: Dispatch, known: str | None, message: Message, chain: Chain
) -> Answer:
    member = None if known is None else dispatch.contacts[known]
    key = f"node {message.metadata.src_node_id}" if known is None else known
    if message.has_error():
        return Answer(key, error=last_line(message.error.reason))
    is_legacy = member is not None and member.layout is LEGACY
    names = partial(names_after, dispatch.sent[key], chain) if is_legacy else None
    return Answer(
        key,
        read=partial(reply_from_content, message.content, names),
        num_bytes=record_bytes(message.content),
    )


Average = Callable[[list[RecordDict], str], MetricRecord]


def averaged(
    average: Average, accepted: Mapping[str, ClientReply], weighted_by_key: str
) -> MetricRecord:
    """Average the accepted clients' metrics, in client_key order.

    Flower's own average takes a metric that a client lacks for 0; here it is the mean
    over those that report it, with the number of their examples beside it. A function
    of the user's is given what each client reports.
    """
    reports = [reply.report for reply in accepted.values()]
    names = dict.fromkeys(name for report in reports for name in report.metrics)
    partial_names = [
        name
        for name in names
        if name not in (*RESERVED_METRICS, weighted_by_key)
        and any(name not in r.metrics or name in r.metric_examples for r in reports)
    ]
    numbers = [metrics_of(report, weighted_by_key) for report in reports]
    if average is not aggregate_metricrecords or not partial_names:
        return average(list(map(_content, numbers)), weighted_by_key)
    left_out = {each for n in partial_names for each in (n, n + OF_EXAMPLES)}
    shared = [{k: v for k, v in each.items() if k not in left_out} for each in numbers]
    found = average(list(map(_content, shared)), weighted_by_key)
    for name in partial_names:
        having = [
            {name: report.metrics[name], weighted_by_key: report.examples_of(name)}
            for report in reports
            if name in report.metrics and report.examples_of(name)
        ]
        if having:
            found[name] = average(list(map(_content, having)), weighted_by_key)[name]
            found[name + OF_EXAMPLES] = sum(each[weighted_by_key] for each in having)
        _log.log(
            INFO,
            "\t> Metric %s is reported by %s of %s clients: the mean is theirs",
            name,
            len(having),
            len(reports),
        )
    return found


def contents_of(
    accepted: Mapping[str, ClientReply], weighted_by_key: str
) -> list[RecordDict]:
    """List the accepted clients' metrics as records, in client_key order."""
    return [_content(metrics_of(r.report, weighted_by_key)) for r in accepted.values()]


def _content(numbers: Mapping[str, Any]) -> RecordDict:
    return RecordDict({"metrics": MetricRecord(dict(numbers))})
