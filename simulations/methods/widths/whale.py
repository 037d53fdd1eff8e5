"""WHALE-FL, and what it is compared with: widths by speed, and by a deadline.

Times are those of the fleet's table. The strategy is told them as it would be by
devices that say how fast they are.

References
----------
Su et al.: WHALE-FL: Wireless and Heterogeneity Aware Latency Efficient Federated
Learning over Mobile Devices via Adaptive Subnetwork Scheduling. AAAI 2025.
arXiv:2405.00885.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from flwr.serverapp.strategy import Strategy

from flwr_smartsplit import (
    AdaptiveWidths,
    DeadlineWidths,
    RoundOutcome,
    Variant,
    VariantRequest,
)
from flwr_smartsplit.plan.selection.selection import select_at_random
from flwr_smartsplit.plan.variants.variants import Variants, wants_fisher
from flwr_smartsplit.types import width_of
from simulations.fleets.whale import LADDER
from simulations.methods.method import NO_RECOMPUTE, Method, Setting, split_strategy

DEADLINE_SECONDS = 2.6
"""A round of 80 examples, twice: whole on the fastest device, half on two others."""

SecondsAt = Callable[[int, str, int], float]


@dataclass(frozen=True)
class Timed:
    """A rule that is told a table's times.

    ``seconds`` takes a client's number, a variant's name and the examples of a round.
    """

    rule: Any
    num_epochs: int
    seconds: SecondsAt = field(compare=False)

    @property
    def wants_fisher(self) -> bool:
        """Whether the rule asks for it."""
        return wants_fisher(self.rule)

    def offered(self, request: VariantRequest) -> Sequence[Variant]:
        """Ask the rule, with the table's times."""
        device = request.device

        def seconds_of(variant: Variant) -> float:
            return self._seconds(device.client_key, variant, device.num_examples)

        offers: Sequence[Variant] = self.rule.offered(
            replace(request, seconds_of=seconds_of)
        )
        return offers

    def learned(self, outcome: RoundOutcome) -> Any:
        """Tell the rule, with the table's times; nothing if it does not learn."""

        def seconds_of(key: str, variant: Variant) -> float:
            return self._seconds(key, variant, outcome.clients[key].num_examples)

        if not hasattr(self.rule, "learned"):
            return None
        return self.rule.learned(replace(outcome, seconds_of=seconds_of))

    def _seconds(self, key: str, variant: Variant, num_examples: int) -> float:
        return self.seconds(int(key), variant.name, num_examples * self.num_epochs)


@dataclass(frozen=True)
class BySpeed:
    """Offer each device the width of its kind."""

    rates: tuple[float, ...]  # By the clients' numbers

    def offered(self, request: VariantRequest) -> Sequence[Variant]:
        """Return one width."""
        rate = self.rates[int(request.device.client_key)]
        return (width_of(request.groups, rate, is_scaled=True),)


def build_strategy(setting: Setting, *, rule: Variants) -> Strategy:
    """Build the strategy of a rule that is told the table's times."""
    epochs, clock = setting.experiment.local_epochs, setting.clock
    return split_strategy(
        setting,
        has_edges=False,
        constraints=NO_RECOMPUTE,
        select=select_at_random,
        variants=Timed(rule, epochs, clock.round_seconds),
        client_seconds=clock.client_seconds,
    )


def ladder_strategy(setting: Setting) -> Strategy:
    """Build the strategy of HeteroFL's widths by speed."""
    rates = tuple(LADDER.get(device.name, 0.25) for device in setting.devices)
    return build_strategy(setting, rule=BySpeed(rates))


def _method(name: str, summary: str, rule: Variants) -> Method:
    strategy_fn = partial(build_strategy, rule=rule)
    return Method(name=name, summary=summary, strategy_fn=strategy_fn)


WHALE = (
    Method(
        name="width_ladder",
        summary="each kind of device has a width by its speed, as in HeteroFL",
        strategy_fn=ladder_strategy,
    ),
    _method(
        "deadline_widths",
        "the widest model that ends in time",
        DeadlineWidths(DEADLINE_SECONDS),
    ),
    _method(
        "whale_published",
        "WHALE-FL with its authors' constants",
        AdaptiveWidths.published(),
    ),
    _method(
        "whale_rescaled",
        "WHALE-FL as published, with a scale that fits these data",
        AdaptiveWidths.published(scale="largest", delay=3),
    ),
    _method(
        "whale",
        "WHALE-FL with a window that is one, full-width times and its own scale",
        AdaptiveWidths(),
    ),
)
"""Needs the fleet ``whale_devices``."""
