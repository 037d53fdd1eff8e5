"""Fleets: the clients behind Flower's nodes or proxies, with their profiles.

Flower's ids are random in every run, so everything else goes by client_key.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Literal, TypeVar

from flwr.app import Message
from flwr.common import GetPropertiesIns
from flwr.server.client_proxy import ClientProxy
from flwr.serverapp import Grid

from flwr_smartsplit.errors import RefusedReply, SmartSplitError
from flwr_smartsplit.flower.rounds.exchange import Dispatch
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


ClientKeys = Literal["bound", "node-name", "claimed"]
"""Who may call itself by a client_key; see ``SmartSplit``."""


class Owners:
    """Whose each client_key is, where nodes are authenticated.

    A node has a name only if it was registered with its public key, which the SuperLink
    then asks it to prove. Others are not told apart, and own no key.
    """

    def __init__(self, rule: ClientKeys = "bound") -> None:
        if rule not in {"bound", "node-name", "claimed"}:
            raise ValueError(
                f'client_keys is {rule!r}: give "bound", "node-name" or "claimed".'
            )
        self._rule = rule
        self._owners: dict[str, str] = {}  # Fingerprints of public keys, by client_key

    def state_dict(self) -> dict[str, str]:
        """Return whose the keys are, for a checkpoint."""
        return dict(self._owners)

    def load_state_dict(self, state: Mapping[str, str]) -> None:
        """Take up what a checkpoint says."""
        self._owners = dict(state)

    def refused(
        self, claims: Mapping[int, str], nodes: Iterable[Any]
    ) -> dict[int, str]:
        """Say which nodes may not have the client_key they claim, and why.

        ``nodes`` is what Flower knows of them. The others own their keys from now on.
        """
        if self._rule == "claimed":
            return {}
        known = {info.node_id: info for info in nodes}
        names = {node: str(getattr(known.get(node), "name", "")) for node in claims}
        prints = {
            node: sha256(known[node].public_key).hexdigest() if name else ""
            for node, name in names.items()
        }
        keys = {owner: key for key, owner in self._owners.items()}
        causes: dict[int, str] = {}
        for node, key in claims.items():
            before = keys.get(prints[node], key)
            why = self._why_not(key, names[node], prints[node], before)
            if why:
                causes[node] = f"node {node} calls itself client {key!r}, but {why}"
        self._refuse_rivals(claims, prints, causes)
        for node in claims.keys() - causes.keys():
            if prints[node]:
                self._owners[claims[node]] = prints[node]
        return causes

    def _why_not(self, key: str, name: str, fingerprint: str, before: str) -> str:
        if self._rule == "node-name" and name != key:
            is_called = f"is registered as {name!r}" if name else "has no name"
            return (
                f'it {is_called}, and client_keys="node-name" wants this to be its '
                "client_key: register it by `flwr supernode register KEY --name "
                f"{key}`, at a SuperLink with --enable-supernode-auth."
            )
        if self._owners.get(key, fingerprint) != fingerprint:
            return (
                "this key is another node's, with another public key. If the client "
                "has a new public key, start a new run."
            )
        if before != key:
            return (
                f"it was client {before!r} before, with the same public key. Give it "
                "that client_key again, or start a new run."
            )
        return ""

    @staticmethod
    def _refuse_rivals(
        claims: Mapping[int, str],
        prints: Mapping[int, str],
        causes: dict[int, str],
    ) -> None:
        """Refuse all that claim one key at once, since nobody owns it yet."""
        rivals = defaultdict(list)
        for node in sorted(claims.keys() - causes.keys()):
            rivals[claims[node]].append(node)
        for key, nodes in rivals.items():
            if len({prints[node] for node in nodes}) > 1:
                text = ", ".join(map(str, nodes))
                for node in nodes:
                    causes[node] = (
                        f"nodes {text} have different public keys, and all call "
                        f"themselves client {key!r}: none of them is believed. "
                        'client_keys="node-name" tells whose it is.'
                    )


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
        owners: Owners | None = None,
    ) -> None:
        super().__init__()
        self._compare = compare
        self._owners = owners
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
        refused = self._refused(grid, node_ids)
        self._silent |= causes.keys() | refused.keys()
        failures = {
            node: Failure(
                client_key=f"node {node}",
                kind="failed",
                cause=_joined(reasons) or "no answer to the profile request",
            )
            for node, reasons in causes.items()
        }
        return [*(failures | refused).values()]

    def _refused(self, grid: Grid, node_ids: Iterable[int]) -> dict[int, Failure]:
        """Take those away that claim a client_key which is not theirs."""
        asked = {n: self._by_node[n] for n in node_ids if n in self._by_node}
        if self._owners is None or not asked:
            return {}
        claims = {node: member.profile.client_key for node, member in asked.items()}
        causes = self._owners.refused(claims, _nodes_of(grid))
        for node in causes:
            del self._by_node[node]
        return {node: _refusal(f"node {node}", why) for node, why in causes.items()}

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
        self,
        *,
        timeout_seconds: float,
        compare: CompareTask | None = None,
        owners: Owners | None = None,
    ) -> None:
        super().__init__()
        self._compare = compare
        self._owners = owners
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
        failures += self._refused(unknown)
        known = {
            p.cid: LegacyClient(p, self._profiles[p.cid], self._answered[p.cid])
            for p in proxies
            if p.cid in self._profiles
        }
        clients, duplicates = _by_key(known, "client", self._doubted)
        return clients, failures + duplicates

    def _refused(self, asked: Iterable[ClientProxy]) -> list[Failure]:
        """Take those away that claim a client_key which is not theirs."""
        proxies: dict[int, Any] = {
            node: proxy
            for proxy in asked
            if proxy.cid in self._profiles and (node := getattr(proxy, "node_id", None))
        }
        if self._owners is None or not proxies:
            return []
        claims = {n: self._profiles[p.cid].client_key for n, p in proxies.items()}
        (grid, *_) = (proxy.grid for proxy in proxies.values())
        causes = self._owners.refused(claims, _nodes_of(grid))
        for node in causes:
            del self._profiles[proxies[node].cid]
        return [_refusal(f"client {proxies[n].cid}", why) for n, why in causes.items()]

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


def _nodes_of(grid: Any) -> Iterable[Any]:
    """Ask Flower what it knows of the nodes; not every release can say."""
    ask = getattr(grid, "get_nodes", None)
    return () if ask is None else ask()


def _refusal(client: str, cause: str) -> Failure:
    return Failure(client_key=client, kind="refused", cause=cause)


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
