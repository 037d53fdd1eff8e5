"""Offer: all that a device needs to predict with a model that it cannot hold."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy.typing as npt

from flwr_smartsplit.edge.message_bytes import decode, encode, fitted
from flwr_smartsplit.errors import RefusedMessage
from flwr_smartsplit.types import ClientPlan, Codec, Route


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """All that a device needs to predict along a route; ``Serving.offer`` makes it.

    It holds the state of the device's units, and openings that the serving side has
    signed for this device. Whoever has an offer can use it, so send it as a secret.

    Parameters
    ----------
    plan : ClientPlan
        The route, its edges and codecs, the device's cap, and the signed opening.
    state : Mapping[str, NDArray]
        The values of the device's units, by the model's names.
    batch_size : int
        The most examples in a batch.
    facts : Mapping[str, str]
        What the task is made of; the device's task is compared with it.
    """

    plan: ClientPlan
    state: Mapping[str, npt.NDArray[Any]]
    batch_size: int
    facts: Mapping[str, str]

    @property
    def predicted_peak_bytes(self) -> int:
        """The most that the device's tensors take, in a batch of ``batch_size``.

        To the byte without codecs; with codecs never less.
        """
        return self.plan.predicted_peak_bytes or 0

    def to_bytes(self) -> bytes:
        """Write the offer, to be sent to its device. Nothing is pickled."""
        plan = self.plan
        return b"".join(
            encode(
                {
                    **{name: getattr(plan, name) for name in _PLAIN},
                    "cuts": plan.route.cuts,
                    "places": plan.route.places,
                    "state": dict(self.state),
                    "batch_size": self.batch_size,
                    "facts": dict(self.facts),
                }
            )
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read what ``to_bytes`` wrote.

        Raises
        ------
        RefusedMessage
            If it is not an offer of this release.
        """
        found = decode(data)
        wanted = {*_PLAIN, *_OWN}
        if not isinstance(found, dict) or found.keys() != wanted:
            raise RefusedMessage(
                "these bytes are no offer of this release: use what Offer.to_bytes "
                "wrote, and one release of flwr_smartsplit everywhere."
            )
        kinds = {**_PLAIN, **_OWN}
        read = {name: fitted(found[name], kinds[name], name) for name in wanted}
        own = {name: read.pop(name) for name in _OWN}
        try:
            plan = ClientPlan(route=Route(own["cuts"], own["places"]), **read)
        except ValueError as error:
            raise RefusedMessage(f"an offer with a wrong plan: {error}") from error
        return cls(plan=plan, **{name: own[name] for name in _FIELDS})


_PLAIN: Mapping[str, Any] = {
    "client_key": str,
    "round_number": int,
    "seed": int,
    "num_threads": int,
    "budget_bytes": int | None,
    "state_digest": str,
    "edge_addresses": Mapping[str, str],
    "predicted_peak_bytes": int | None,
    "codecs": tuple[Codec, ...],
    "attempt": int,
    "opening": bytes,
}
_OWN: Mapping[str, Any] = {
    "cuts": tuple[int, ...],
    "places": tuple[str, ...],
    "state": Mapping[str, Any],
    "batch_size": int,
    "facts": Mapping[str, str],
}
_FIELDS = ("state", "batch_size", "facts")
