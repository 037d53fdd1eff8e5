"""Dispatch: the messages of one phase of a round, and what comes back."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ArrayRecord, Message, MessageType

from flwr_smartsplit.errors import RefusedReply
from flwr_smartsplit.flower.fleet import Member
from flwr_smartsplit.flower.records import (
    LEGACY,
    instruction,
    last_line,
    plan_to_scalars,
    record_bytes,
    reply_from_content,
)
from flwr_smartsplit.model.chain import Chain
from flwr_smartsplit.types import (
    DEVICE,
    ClientPlan,
    ClientReply,
    Expectation,
    Failure,
    TailExpectation,
)


@dataclass(frozen=True, slots=True)
class Sent:
    """What one client was sent."""

    plan: ClientPlan
    member: Member
    names: tuple[str, ...]
    num_bytes: int
    predicted_peak_bytes: int


@dataclass
class Dispatch:
    """One phase of one round: what went out, and how to read what comes back.

    Parameters
    ----------
    round_number : int
        The round, counted from 1.
    is_train : bool
        Training or evaluation.
    started_seconds : float
        The clock when the phase began.
    """

    round_number: int
    is_train: bool
    started_seconds: float
    sent: dict[str, Sent] = field(default_factory=dict)
    received_bytes: dict[str, int] = field(default_factory=dict)

    def message(
        self,
        plan: ClientPlan,
        member: Member,
        *,
        predicted_peak_bytes: int,
        chain: Chain,
        arrays: ArrayRecord,
        config: Mapping[str, Any],
    ) -> Message:
        """Make one client's message: the state of its own segments and its plan."""
        device = plan.route.legs(len(chain))[0]
        names = chain.state_names(device.start, device.stop)
        content = instruction(
            member.dialect,
            ArrayRecord({name: arrays[name] for name in names}),
            {**config, **plan_to_scalars(plan)},
            is_train=self.is_train,
        )
        size = record_bytes(content)
        self.sent[plan.client_key] = Sent(
            plan, member, names, size, predicted_peak_bytes
        )
        return Message(
            content,
            message_type=MessageType.TRAIN if self.is_train else MessageType.EVALUATE,
            dst_node_id=member.node_id,
        )

    def expectations(self, chain: Chain) -> dict[str, Expectation]:
        """Say what every chosen client's reply must contain."""
        return {
            key: Expectation(
                client_key=key,
                device_names=frozenset(sent.names),
                tails={
                    leg.place: TailExpectation(
                        session=sent.plan.session(leg.place),
                        names=frozenset(chain.state_names(leg.start, leg.stop)),
                    )
                    for leg in sent.plan.route.legs(len(chain))
                    if leg.place != DEVICE
                },
            )
            for key, sent in self.sent.items()
        }

    def read(
        self, messages: Iterable[Message]
    ) -> tuple[list[ClientReply], list[Failure]]:
        """Sort what came into replies and failures.

        Chosen clients of whom nothing came are failures too.
        """
        by_node = {sent.member.node_id: key for key, sent in self.sent.items()}
        replies, failures = [], []
        silent = set(self.sent)
        for message in messages:
            node = message.metadata.src_node_id
            key = by_node.get(node, f"node {node}")
            silent.discard(key)
            if message.has_error():
                cause = last_line(message.error.reason)
                failures.append(Failure(client_key=key, kind="failed", cause=cause))
                continue
            try:
                replies.append(self._read_one(key, message))
            except RefusedReply as error:
                failures.append(
                    Failure(client_key=key, kind=error.kind, cause=str(error))
                )
        failures += [_lost(key) for key in sorted(silent)]
        return replies, failures

    def _read_one(self, key: str, message: Message) -> ClientReply:
        sent = self.sent.get(key)
        is_legacy = sent is not None and sent.member.dialect is LEGACY
        names = sent.names if sent is not None and is_legacy else None
        content = message.content
        self.received_bytes[key] = record_bytes(content)
        reply = reply_from_content(content, names)
        if reply.client_key != key:
            raise RefusedReply(
                f"the node of client {key!r} answers for {reply.client_key!r}.",
                kind="refused",
            )
        return reply


def _lost(key: str) -> Failure:
    return Failure(
        client_key=key,
        kind="lost",
        cause="no reply before the timeout; raise it, or look at the client's log.",
    )
