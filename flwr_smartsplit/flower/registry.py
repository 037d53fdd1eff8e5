"""Fleets: the clients behind Flower's nodes or proxies, with their profiles.

Flower's ids are random in every run, so everything else goes by client_key.
"""

from collections.abc import Callable, Iterable, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from flwr.app import Message
from flwr.common import GetPropertiesIns
from flwr.server.client_proxy import ClientProxy
from flwr.serverapp import Grid

from flwr_smartsplit.errors import RefusedReply, SmartSplitError
from flwr_smartsplit.flower.round_exchange import Dispatch
from flwr_smartsplit.flower.serde.records import (
    LEGACY,
    PARTITION,
    RecordLayout,
    config_of,
    facts_from_scalars,
    last_line,
    profile_from_content,
    profile_from_scalars,
    profile_request,
)
from flwr_smartsplit.types import DeviceProfile, Failure

_MOST_AT_ONCE = 32

CompareTask = Callable[[Mapping[str, str], str], None]
"""Raises if a client, of this key, has another task than the strategy's."""


@dataclass(frozen=True, slots=True)
class Member:
    """A known client: its node, record layout and profile; when it answered."""

    node_id: int
    layout: RecordLayout
    profile: DeviceProfile
    # The request for profiles that it answered, counted
    answered: int = field(default=0, compare=False)
    partition: int = field(default=-1, compare=False)  # In a simulation


class _Doubts:
    """The nodes or proxies whose last message stayed without a reply."""

    def __init__(self) -> None:
        self._doubted: set[Any] = set()

    def heard(self, dispatch: Dispatch, failures: Iterable[Failure]) -> None:
        """Doubt the clients of a phase that gave no reply, and nobody else of it."""
        silent = {f.client_key for f in failures if f.kind in self._no_reply}
        for key in dispatch.sent:
            this = self._id_of(dispatch.contacts[key])
            (self._doubted.add if key in silent else self._doubted.discard)(this)

    _no_reply = frozenset({"lost"})

    def _id_of(self, client: Any) -> Any:
        return client.node_id


class Fleet(_Doubts):
    """Ask each new node for its profile, and remember the answer.

    Nodes that do not understand ``layout`` are asked as ``NumPyClient`` apps.
    """

    def __init__(
        self,
        layout: RecordLayout,
        *,
        timeout_seconds: float,
        compare: CompareTask | None = None,
    ) -> None:
        super().__init__()
        self._compare = compare
        self._layouts = [layout, LEGACY]
        self._num_requests = 0
        self._timeout_seconds = timeout_seconds
        self._by_node: dict[int, Member] = {}
        self._silent: set[int] = set()

    def members(
        self, grid: Grid, node_ids: Iterable[int], *, ask_again: bool = True
    ) -> tuple[dict[str, Member], list[Failure]]:
        """List these nodes' clients by client_key, and those without a usable answer.

        Of two nodes with one key, the one counts that replies, or else the one that
        answered last: a client that restarts comes under a new id while its old one is
        still listed. With ``ask_again``, two nodes with one key are reported, and nodes
        that gave no usable answer before are asked again, which may take as long as the
        timeout.
        """
        present = list(node_ids)
        if ask_again:
            self._silent.clear()
        known = self._by_node.keys() | self._silent
        unknown = [node for node in present if node not in known]
        self._num_requests += 1
        failures = self._ask(grid, unknown)
        known_now = {n: self._by_node[n] for n in present if n in self._by_node}
        members, duplicates = _by_key(known_now, "node", self._doubted)
        return members, failures + (duplicates if ask_again else [])

    def _ask(self, grid: Grid, node_ids: list[int]) -> list[Failure]:
        """Ask in each layout the nodes that have not answered yet."""
        causes: dict[int, list[str]] = {node: [] for node in node_ids}
        gone: set[int] = set()
        first, second = self._layouts
        for layout in (first, second):
            # A node that is silent in one layout would be in the other, as long again.
            pending = [n for n, why in causes.items() if why or layout is first]
            pending = [node for node in pending if node not in gone]
            if not pending:
                break
            kind = layout.profile_type
            requests = [
                Message(profile_request(layout), message_type=kind, dst_node_id=node)
                for node in pending
            ]
            replies = grid.send_and_receive(requests, timeout=self._timeout_seconds)
            # An error may be the SuperLink's, which only says what it answers.
            asked = {m.metadata.message_id: m.metadata.dst_node_id for m in requests}
            for reply in replies:
                source = reply.metadata.src_node_id
                node = asked.get(reply.metadata.reply_to_message_id, source)
                if node != source:
                    gone.add(node)
                self._note(node, reply, layout, causes)
        self._silent |= causes.keys()
        return [
            Failure(
                client_key=f"node {node}",
                kind="failed",
                cause=_joined(reasons) or "no answer to the profile request",
            )
            for node, reasons in causes.items()
        ]

    def _note(
        self,
        node: int,
        reply: Message,
        layout: RecordLayout,
        causes: dict[int, list[str]],
    ) -> None:
        try:
            if reply.has_error():
                raise RefusedReply(last_line(reply.error.reason), kind="failed")
            profile = profile_from_content(reply.content)
            if self._compare is not None:
                facts = facts_from_scalars(config_of(reply.content))
                self._compare(facts, profile.client_key)
        except SmartSplitError as error:
            if node in causes:  # Not a late answer to an earlier request.
                causes[node].append(f"asked as {layout.name}: {error}")
            return
        partition = config_of(reply.content).get(PARTITION)
        self._by_node[node] = Member(
            node,
            layout,
            profile,
            answered=self._num_requests,
            partition=partition if isinstance(partition, int) else -1,
        )
        causes.pop(node, None)
        self._layouts.sort(key=lambda known: known is not layout)


def _joined(reasons: list[str]) -> str:
    """Join the reasons of both layouts; one if they are alike."""
    said = {reason.partition(": ")[2] for reason in reasons}
    return said.pop() if len(said) == 1 else "; ".join(reasons)


@dataclass(frozen=True, slots=True)
class LegacyClient:
    """A known client: its proxy and profile; when it answered."""

    proxy: ClientProxy
    profile: DeviceProfile
    answered: int = field(default=0, compare=False)
    partition: int = field(default=-1, compare=False)


ClientT = TypeVar("ClientT", Member, LegacyClient)


class LegacyFleet(_Doubts):
    """Ask each new client for its profile, and remember the answer."""

    def __init__(
        self, *, timeout_seconds: float, compare: CompareTask | None = None
    ) -> None:
        super().__init__()
        self._compare = compare
        self._timeout_seconds = timeout_seconds
        self._profiles: dict[str, DeviceProfile] = {}
        self._answered: dict[str, int] = {}
        self._num_requests = 0

    def key_of(self, proxy: ClientProxy) -> str:
        """Name a client by its key, or by Flower's id if it is not known."""
        profile = self._profiles.get(proxy.cid)
        return f"client {proxy.cid}" if profile is None else profile.client_key

    def clients(
        self, proxies: Iterable[ClientProxy]
    ) -> tuple[dict[str, LegacyClient], list[Failure]]:
        """List these clients by client_key, and those without a usable answer."""
        proxies = list(proxies)
        unknown = [p for p in proxies if p.cid not in self._profiles]
        self._num_requests += 1
        with ThreadPoolExecutor(_MOST_AT_ONCE) as pool:
            failures = [problem for problem in pool.map(self._ask, unknown) if problem]
        known = {
            p.cid: LegacyClient(p, self._profiles[p.cid], self._answered[p.cid])
            for p in proxies
            if p.cid in self._profiles
        }
        clients, duplicates = _by_key(known, "client", self._doubted)
        return clients, failures + duplicates

    # Flower does not say whose errors came.
    _no_reply = frozenset({"lost", "failed"})

    def _id_of(self, client: Any) -> Any:
        return client.proxy.cid

    def _ask(self, proxy: ClientProxy) -> Failure | None:
        try:
            answer = proxy.get_properties(
                GetPropertiesIns({}), timeout=self._timeout_seconds, group_id=None
            )
            profile = profile_from_scalars(answer.properties)
            if self._compare is not None:
                facts = facts_from_scalars(answer.properties)
                self._compare(facts, profile.client_key)
            self._profiles[proxy.cid] = profile
            self._answered[proxy.cid] = self._num_requests
        except SmartSplitError as error:
            cause = str(error)
        except Exception as error:  # Anything a client's process can raise.
            cause = reason_of(error)
        else:
            return None
        return Failure(client_key=f"client {proxy.cid}", kind="failed", cause=cause)


def reason_of(error: BaseException) -> str:
    """Return a client's own error, without the text Flower's server wraps it in."""
    _, _, rest = str(error).partition("(reason: ")
    reason, is_wrapped, _ = rest.rpartition("). It originated")
    return last_line(reason if is_wrapped else error)


def _by_key(
    clients: Mapping[Any, ClientT], kind: str, doubted: Set[Any]
) -> tuple[dict[str, ClientT], list[Failure]]:
    """Sort clients by client_key; of two with one key, one is a failure."""

    def rank(this: Any) -> Any:
        each = clients[this]
        is_doubted, who = this in doubted, repr(each.profile)
        return is_doubted, -each.answered, each.partition, who, this

    owners: dict[str, Any] = {}
    failures = []
    for this in sorted(clients, key=rank):
        key = clients[this].profile.client_key
        other = owners.setdefault(key, this)
        if other != this:
            cause = (
                f"{kind}s {other} and {this} both call themselves client {key!r}; "
                f"{kind} {this} is left out. Give every client a client_key of its "
                "own; if one of them is the other restarted, this ends by itself."
            )
            failures.append(Failure(client_key=key, kind="duplicate", cause=cause))
    return {key: clients[owners[key]] for key in sorted(owners)}, failures
