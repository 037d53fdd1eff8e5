"""LegacyFleet: which client sits behind which proxy of Flower's legacy server.

Flower's client ids are random in every run, so everything else goes by client_key.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from flwr.common import GetPropertiesIns
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy

from flwr_smartsplit.errors import RefusedReply, SmartSplitError
from flwr_smartsplit.flower.serde.records import last_line, profile_from_scalars
from flwr_smartsplit.types import DeviceProfile, Failure

_MOST_AT_ONCE = 32
_A_DAY_SECONDS = 86_400


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
                failures.append(_twice(key, cid, clients[key].proxy.cid))
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


def _twice(key: str, cid: str, other: str) -> Failure:
    return Failure(
        client_key=key,
        kind="duplicate",
        cause=f"clients {other} and {cid} both call themselves {key!r}; {cid} is left "
        "out. Give every client a client_key of its own.",
    )
