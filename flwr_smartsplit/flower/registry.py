"""Fleets: which client sits behind which node or proxy, and what it says of itself.

Flower's ids are random in every run, so everything else goes by client_key.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from flwr.app import Message
from flwr.common import GetPropertiesIns
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.serverapp import Grid

from flwr_smartsplit.errors import RefusedReply, SmartSplitError
from flwr_smartsplit.flower.serde.records import (
    LEGACY,
    Dialect,
    last_line,
    profile_from_content,
    profile_from_scalars,
    profile_request,
)
from flwr_smartsplit.types import DeviceProfile, Failure

_MOST_AT_ONCE = 32
_A_DAY_SECONDS = 86_400


@dataclass(frozen=True, slots=True)
class Member:
    """One known client: its node, how to talk to it, and its profile."""

    node_id: int
    dialect: Dialect
    profile: DeviceProfile


class Fleet:
    """Ask every new node who it is, and remember the answer.

    Parameters
    ----------
    dialect : Dialect
        The Message API's dialect; nodes that do not understand it are asked as
        ``NumPyClient`` apps.
    timeout_seconds : float
        How long to wait for the answers.
    """

    def __init__(self, dialect: Dialect, *, timeout_seconds: float) -> None:
        self._dialects = [dialect, LEGACY]
        self._timeout_seconds = timeout_seconds
        self._by_node: dict[int, Member] = {}
        self._silent: set[int] = set()

    def members(
        self, grid: Grid, node_ids: Iterable[int], *, ask_again: bool = True
    ) -> tuple[dict[str, Member], list[Failure]]:
        """List the clients behind these nodes by client_key, and who did not answer.

        Parameters
        ----------
        grid : Grid
            Reaches the nodes.
        node_ids : Iterable[int]
            The nodes that are there now.
        ask_again : bool
            Whether to ask nodes again that gave no usable answer before (each time
            may take as long as the timeout), and to name two nodes with one key.

        Returns
        -------
        members : dict[str, Member]
            In client_key order.
        failures : list[Failure]
            Nodes without a usable answer.
        """
        present = list(node_ids)
        if ask_again:
            self._silent.clear()
        known = self._by_node.keys() | self._silent
        unknown = [node for node in present if node not in known]
        failures: list[Failure] = []
        # One node first: most fleets speak one dialect, and a wrong one is an error
        # in the client's log.
        groups = [unknown] if self._by_node else [unknown[:1], unknown[1:]]
        for group in groups:
            failures += self._ask(grid, group)
        members: dict[str, Member] = {}
        for node in present:
            member = self._by_node.get(node)
            if member is None:
                continue
            key = member.profile.client_key
            if key not in members:
                members[key] = member
            elif ask_again:
                failures.append(_twice(key, "node", node, members[key].node_id))
        return dict(sorted(members.items())), failures

    def _ask(self, grid: Grid, node_ids: list[int]) -> list[Failure]:
        """Ask in each dialect whoever has not answered yet."""
        causes: dict[int, list[str]] = {node: [] for node in node_ids}
        first, second = self._dialects
        for dialect in (first, second):
            # Who was silent once would be so in any dialect, for as long again.
            pending = [n for n, why in causes.items() if why or dialect is first]
            if not pending:
                break
            requests = [
                Message(
                    profile_request(dialect),
                    message_type=dialect.profile_type,
                    dst_node_id=node,
                )
                for node in pending
            ]
            for reply in grid.send_and_receive(requests, timeout=self._timeout_seconds):
                self._note(reply, dialect, causes)
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
        self, reply: Message, dialect: Dialect, causes: dict[int, list[str]]
    ) -> None:
        node = reply.metadata.src_node_id
        if reply.has_error():
            causes[node].append(
                f"asked as {dialect.name}: {last_line(reply.error.reason)}"
            )
            return
        try:
            profile = profile_from_content(reply.content)
        except RefusedReply as error:
            causes[node].append(f"asked as {dialect.name}: {error}")
            return
        self._by_node[node] = Member(node, dialect, profile)
        causes.pop(node, None)
        self._dialects.sort(key=lambda known: known is not dialect)


def _joined(reasons: list[str]) -> str:
    """Say once what a client answers in both dialects."""
    said = {reason.partition(": ")[2] for reason in reasons}
    return said.pop() if len(said) == 1 else "; ".join(reasons)


@dataclass(frozen=True, slots=True)
class LegacyClient:
    """One known client: how to reach it, and its profile."""

    proxy: ClientProxy
    profile: DeviceProfile


class LegacyFleet:
    """Ask every new client who it is, and remember the answer.

    Parameters
    ----------
    timeout_seconds : float
        How long to wait for an answer.
    """

    def __init__(self, *, timeout_seconds: float) -> None:
        self._timeout_seconds = timeout_seconds
        self._profiles: dict[str, DeviceProfile] = {}

    def key_of(self, proxy: ClientProxy) -> str:
        """Name a client by its key, or by Flower's id if it is not known."""
        profile = self._profiles.get(proxy.cid)
        return f"client {proxy.cid}" if profile is None else profile.client_key

    def clients(
        self, client_manager: ClientManager, least: int
    ) -> tuple[dict[str, LegacyClient], list[Failure]]:
        """Wait for enough clients, as FedAvg does, and learn who they are.

        Parameters
        ----------
        client_manager : ClientManager
            Flower's.
        least : int
            How many clients to wait for.

        Returns
        -------
        clients : dict[str, LegacyClient]
            In client_key order.
        failures : list[Failure]
            Clients without a usable answer.

        Raises
        ------
        SmartSplitError
            If no client has given one.
        """
        client_manager.wait_for(least, _A_DAY_SECONDS)
        proxies = dict(client_manager.all())
        unknown = [p for cid, p in proxies.items() if cid not in self._profiles]
        with ThreadPoolExecutor(_MOST_AT_ONCE) as pool:
            failures = [problem for problem in pool.map(self._ask, unknown) if problem]
        clients: dict[str, LegacyClient] = {}
        for cid, proxy in proxies.items():
            profile = self._profiles.get(cid)
            if profile is None:
                continue
            key = profile.client_key
            if key in clients:
                failures.append(_twice(key, "client", cid, clients[key].proxy.cid))
            else:
                clients[key] = LegacyClient(proxy, profile)
        if failures and not clients:
            raise SmartSplitError(
                f"none of {len(proxies)} clients says who it is; the first: "
                f"{failures[0].cause}"
            )
        return dict(sorted(clients.items())), failures

    def _ask(self, proxy: ClientProxy) -> Failure | None:
        """Learn who a client is, or what went wrong."""
        try:
            answer = proxy.get_properties(
                GetPropertiesIns({}), timeout=self._timeout_seconds, group_id=None
            )
            self._profiles[proxy.cid] = profile_from_scalars(answer.properties)
        except RefusedReply as error:
            cause = str(error)
        except Exception as error:  # Whatever a client's process can raise.
            cause = reason_of(error)
        else:
            return None
        return Failure(client_key=f"client {proxy.cid}", kind="failed", cause=cause)


def reason_of(error: BaseException) -> str:
    """Take what a client's process said out of what Flower's server wraps it in."""
    _, _, rest = str(error).partition("(reason: ")
    reason, is_wrapped, _ = rest.rpartition("). It originated")
    return last_line(reason if is_wrapped else error)


def _twice(key: str, kind: str, this: object, other: object) -> Failure:
    return Failure(
        client_key=key,
        kind="duplicate",
        cause=f"{kind}s {other} and {this} both call themselves client {key!r}; {kind} "
        f"{this} is left out. Give every client a client_key of its own.",
    )
