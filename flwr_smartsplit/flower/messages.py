"""A phase's messages in Flower's Message API."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from flwr.app import ArrayRecord, Message, MessageType

from flwr_smartsplit.flower.round_exchange import Answer, Dispatch, names_after
from flwr_smartsplit.flower.serde.records import (
    LEGACY,
    instruction,
    last_line,
    plan_to_scalars,
    record_bytes,
)
from flwr_smartsplit.flower.serde.replies import reply_from_content
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.types import ClientReply, Failure


def written(
    dispatch: Dispatch, arrays: ArrayRecord, config: Mapping[str, Any]
) -> list[Message]:
    """Write each chosen client's message: its segments' state, and its plan."""
    kind = MessageType.TRAIN if dispatch.is_train else MessageType.EVALUATE
    messages = []
    for key, sent in dispatch.sent.items():
        member = dispatch.contacts[key]
        content = instruction(
            member.layout,
            ArrayRecord({name: arrays[name] for name in sent.sent_names}),
            {**config, **plan_to_scalars(sent.plan)},
            is_train=dispatch.is_train,
        )
        dispatch.sent_bytes[key] = record_bytes(content)
        messages.append(Message(content, message_type=kind, dst_node_id=member.node_id))
    return messages


def read(
    dispatch: Dispatch, messages: Iterable[Message], chain: Chain
) -> tuple[list[ClientReply], list[Failure]]:
    """Read the replies, each in its client's layout."""
    members = [dispatch.contacts[key] for key in dispatch.sent]
    chosen = {member.node_id: member for member in members}
    return dispatch.collect(
        _answer(dispatch, chosen, message, chain) for message in messages
    )


def _answer(
    dispatch: Dispatch, chosen: Mapping[int, Any], message: Message, chain: Chain
) -> Answer:
    node = message.metadata.src_node_id
    member = chosen.get(node)
    key = f"node {node}" if member is None else member.profile.client_key
    if message.has_error():
        return Answer(key, error=last_line(message.error.reason))
    is_legacy = member is not None and member.layout is LEGACY
    names = partial(names_after, dispatch.sent[key], chain) if is_legacy else None
    return Answer(
        key,
        read=partial(reply_from_content, message.content, names),
        num_bytes=record_bytes(message.content),
    )
