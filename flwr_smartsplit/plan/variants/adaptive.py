"""Adaptive widths: who has more to learn, and learns fast, trains a wider model.

References
----------
.. [1] Su et al., "WHALE-FL: Wireless and Heterogeneity Aware Latency Efficient
   Federated Learning over Mobile Devices via Adaptive Subnetwork Scheduling", AAAI
   2025, arXiv:2405.00885. The rule is as its authors' code has it
   (github.com/BESTTOOLBOX/WHALE-FL, On-Server/main_train_fisher.py).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite, sqrt
from typing import Any, ClassVar, Literal, Self

from flwr_smartsplit.plan.variants.variants import (
    ClientOutcome,
    RoundOutcome,
    VariantRequest,
)
from flwr_smartsplit.plan.variants.widths import checked_rates, slices
from flwr_smartsplit.types import FISHER, Variant

WARM_UP = 1e-10
"""The efficiency of everybody until a window is full: the authors' factor of 1e-5."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptiveWidths:
    """Offer each device a width by what it has to learn and by its time: WHALE-FL [1]_.

    A client's utility is ``n * sqrt(F) * (seconds_target / T) ** beta``: its number of
    examples, how large its gradients were some rounds ago, and how long its round
    takes. Divided by ``scale`` it chooses one of the rates, each from an equal part of
    0 to 1 on. Until a window of rounds is full, everybody is at the narrowest.

    Parameters
    ----------
    rates : tuple[float, ...]
        Shares of the channels of each layer, falling, in ``(0, 1]``.
    window : int
        How many rounds on either side of the delayed one are averaged.
    delay : int
        How many rounds ago that one was; at least ``window``.
    beta : float
        How much time counts.
    seconds_target : float
        A round's time in seconds at which time does not count.
    scale : float or "largest"
        What utilities are divided by; "largest" is the largest one of the first round
        with a full window, from then on.
    efficiency : "fisher" or "loss"
        What ``sqrt(F)`` is: from the gradients, which clients then report as the metric
        ``fisher``, or the mean loss.
    time_of : "full" or "last"
        Whether ``T`` is that of the widest model, predicted until it was trained, or of
        what the client trained last. The latter swings: a narrow round is short, so
        that the next one is wide.
    floor : int
        How many clients at least are offered the widest model, those of the largest
        utility, so that all of it is trained.
    scaler : bool
        HeteroFL's scaler, as ``scale`` of ``Widths``.
    has_aliased_window : bool
        Whether each record of the window is the latest round's, as the authors' code
        has it, where one array is appended in each round.
    divides_in_loop : bool
        Whether the window's sum is divided after each of its records, as there, which
        makes of two equal records three quarters of one.

    Raises
    ------
    ValueError
        If a number makes no sense.

    Notes
    -----
    A device whose time nobody knows takes the widest rate that its memory allows. The
    rate that is wanted is tried along every route before a narrower one is. What a
    client reports that is not finite is not recorded.

    Examples
    --------
    >>> AdaptiveWidths(rates=(1.0, 0.5)).chosen(0.5), AdaptiveWidths.published().rates
    (0, (1.0, 0.5, 0.25, 0.125, 0.0625))
    """

    rates: tuple[float, ...] = (1.0, 0.5, 0.25, 0.125)
    window: int = 1
    delay: int = 3
    beta: float = 1.0
    seconds_target: float = 1.0
    scale: float | Literal["largest"] = "largest"
    efficiency: Literal["fisher", "loss"] = "fisher"
    time_of: Literal["full", "last"] = "full"
    floor: int = 0
    scaler: bool = True
    has_aliased_window: bool = False
    divides_in_loop: bool = False

    PUBLISHED_RATES: ClassVar = (1.0, 0.5, 0.25, 0.125, 0.0625)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rates", checked_rates(self.rates))
        is_right = {
            "window": _is_count(self.window) and self.window <= self.delay,
            "delay": _is_count(self.delay),
            "floor": _is_count(self.floor),
            "beta": 0 <= self.beta < inf,
            "seconds_target": 0 < self.seconds_target < inf,
            "scale": self.scale == "largest"
            or (not isinstance(self.scale, str) and 0 < self.scale < inf),
            "efficiency": self.efficiency in ("fisher", "loss"),
            "time_of": self.time_of in ("full", "last"),
        }
        names = (name for name, is_fine in is_right.items() if not is_fine)
        wrong = [f"{name}={getattr(self, name)!r:.40}" for name in names]
        if wrong:
            raise ValueError(
                f"{', '.join(wrong)}: give counts of at least 0 with window at most "
                'delay, positive numbers, scale="largest" or one, efficiency="fisher" '
                'or "loss", and time_of="full" or "last".'
            )

    @classmethod
    def published(
        cls,
        *,
        scale: float | Literal["largest"] = 50.0,
        seconds_target: float = 20.0,
        delay: int = 10,
        window: int = 0,
    ) -> Self:
        """Make the rule as its authors run it, with the constants of their examples.

        ``scale`` is their ``linear_arg``, ``window`` their ``onepoint``. The constants
        fit their data: utilities grow with examples, gradients and seconds.
        """
        return cls(
            rates=cls.PUBLISHED_RATES,
            window=window,
            delay=delay,
            seconds_target=seconds_target,
            scale=scale,
            time_of="last",
            has_aliased_window=True,
            divides_in_loop=True,
        )

    @property
    def wants_fisher(self) -> bool:
        """Whether clients report how large their gradients were."""
        return self.efficiency == "fisher"

    def offered(self, request: VariantRequest) -> Sequence[Variant]:
        """Return the width that is wanted, then the narrower ones."""
        widths = slices(request.groups, self.rates, 0, self.scaler)
        memory, key = request.memory or {}, request.device.client_key
        weight = memory.get("weights", {}).get(key)
        if weight is not None:
            index = self.chosen(weight)
        else:
            is_known = request.seconds_of(widths[0]) is not None
            index = len(self.rates) - 1 if is_known else 0
        if key in memory.get("wide", ()):
            index = 0
        return tuple(dict.fromkeys(widths[index:]))

    def learned(self, outcome: RoundOutcome) -> Any:
        """Record a round, and weigh everybody who was ever seen."""
        memory = outcome.memory or {}
        widest = slices(outcome.groups, self.rates, 0, self.scaler)[0]
        clients = dict(memory.get("clients", {}))
        for key, client in outcome.clients.items():
            predicted = outcome.seconds_of(key, widest)
            full = client.seconds if client.variant == widest else predicted
            clients[key] = self._recorded(
                clients.get(key, {}), outcome.round_number, client, full
            )
        now, scale = outcome.round_number, memory.get("scale")
        utilities = {key: self.utility(each, now) for key, each in clients.items()}
        known = {key: each for key, each in utilities.items() if each is not None}
        if scale is None and self._is_full(now):
            scale = max(known.values(), default=0.0) or None
        if self.scale != "largest":
            scale = self.scale
        weights = {k: each / scale if scale else 0.0 for k, each in known.items()}
        by_weight = sorted(weights, key=lambda key: (-weights[key], key))
        return {
            "clients": clients,
            "scale": scale,
            "weights": weights,
            "wide": by_weight[: self.floor],
        }

    def utility(self, client: Mapping[str, Any], round_number: int) -> float | None:
        """Say what a client's next round is worth; None if nobody knows its time.

        ``client`` is what was recorded of it until the end of this round.
        """
        seconds = client["seconds"][self.time_of]
        if seconds is None or not seconds > 0:
            return None
        efficiency = WARM_UP
        if self._is_full(round_number):
            efficiency = self._efficiency(client["records"], round_number)
        share = (self.seconds_target / seconds) ** self.beta
        return float(client["num_examples"] * sqrt(efficiency) * share)

    def chosen(self, weight: float) -> int:
        """Say which of the rates a weight chooses; at a threshold, the wider one."""
        num = len(self.rates)
        fits = (i for i in range(num - 1) if weight >= (num - 1 - i) / num)
        return next(fits, num - 1)

    def _is_full(self, round_number: int) -> bool:
        return round_number - self.delay - self.window >= 1

    def _efficiency(
        self, records: Sequence[Sequence[float]], round_number: int
    ) -> float:
        """Average the window; of a client that was away then, what came before it."""
        middle = round_number - self.delay
        if self.has_aliased_window:
            here = [value for _, value in records[-1:]] * (2 * self.window + 1)
        else:
            stop = middle + self.window
            until = [(number, value) for number, value in records if number <= stop]
            here = [v for n, v in until if n >= middle - self.window]
            here = here or [value for _, value in until[-1:]]
        if not self.divides_in_loop:
            return sum(here) / len(here) if here else 0.0
        return _divided_in_loop(here)

    def _recorded(
        self,
        before: Mapping[str, Any],
        round_number: int,
        client: ClientOutcome,
        full_seconds: float | None,
    ) -> dict[str, Any]:
        """Add a round to what is known of a client; old records go."""
        value = client.metrics.get(FISHER) if self.wants_fisher else client.loss**2
        records = [*before.get("records", ())]
        if value is not None and isfinite(value):
            records.append([round_number, value])
        # One more than a window, for whoever is away while it passes.
        oldest = round_number - self.delay - self.window
        num_old = sum(number < oldest for number, _ in records)
        known = before.get("seconds", {})
        return {
            "num_examples": client.num_examples,
            "records": records[max(num_old - 1, 0) :],
            "seconds": {
                "last": client.seconds,
                "full": known.get("full") if full_seconds is None else full_seconds,
            },
        }


def _divided_in_loop(values: Iterable[float]) -> float:
    """Divide after each of the records, as the authors' code does."""
    values, total = list(values), 0.0
    for value in values:
        total = (total + value) / len(values)
    return total


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
