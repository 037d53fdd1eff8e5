"""SmartSplit: weak devices train the front of the model, an edge the rest.

A reconstruction: the formulas of the paper are not public to us. Each round it chooses
clients and routes together, by memory, speed, loss, labels and fairness. The variants
have one part less, or more.

References
----------
Tian, Li, Tam, Wu, Xu: Breaking the Memory Wall for Heterogeneous Federated Learning
via Model Splitting. IEEE TPDS 35(12), 2024. arXiv:2410.11577.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from flwr.serverapp.strategy import Strategy

from flwr_smartsplit import (
    CodecRequest,
    Constraints,
    Integer,
    Raw,
    TopK,
    codec_by_rate,
    predicted_peak_bytes,
)
from flwr_smartsplit.plan.advisor import StragglerAdvisor
from flwr_smartsplit.plan.codec_choice import accepted
from flwr_smartsplit.plan.coding import route_profile
from flwr_smartsplit.plan.selection.utility import BY_UTILITY
from flwr_smartsplit.types import Codec
from simulations.fleets.clock import NOMINAL_LINK
from simulations.methods.method import NO_RECOMPUTE, Method, Setting, split_strategy
from simulations.methods.splitfed import one_cut_for_all

Change = Callable[[Setting], dict[str, Any]]


def build_strategy(setting: Setting, *, change: Change | None = None) -> Strategy:
    """Build the strategy that splits models over the devices and one Ray edge."""
    return split_strategy(setting, **({} if change is None else change(setting)))


def _select(**changes: Any) -> Change:
    rule = replace(BY_UTILITY, **changes)
    return lambda setting: {"select": rule}


def _keep(share: float) -> Change:
    return lambda setting: {
        "constraints": Constraints(
            min_device_units=max(int(len(setting.clock.profile.units) * share), 1)
        )
    }


BY_RATE = codec_by_rate(
    {2e6: Raw(), 5e5: Integer(), 0: TopK(fraction=0.1, values="float16")}
)


def by_rate(request: CodecRequest) -> Codec:
    """Choose by the link's rate, and none where the device has no memory for coding.

    A device that tells no rate has the clock's. ``Integer`` with 4 bits takes the least
    memory, so it is tried before a boundary is sent as it is.
    """
    budget_bytes = request.device.budget_bytes
    wanted = BY_RATE(replace(request, link=request.link or NOMINAL_LINK))
    for codec in (*accepted(wanted), Integer(bits=4)):
        coded = route_profile(request.profile, request.route, (codec,))
        peak_bytes = predicted_peak_bytes(coded, request.route)
        if budget_bytes is None or peak_bytes <= budget_bytes:
            return codec
    return Raw()


def coded_strategy(setting: Setting) -> Strategy:
    """Build the strategy that codes what crosses a slow link."""
    return split_strategy(setting, more={"codec": by_rate})


SMARTSPLIT = Method(
    name="smartsplit",
    summary="who cannot hold the model trains its front, an edge the rest",
    strategy_fn=build_strategy,
)

CODED = Method(
    name="smartsplit_by_rate",
    summary="smartsplit, and the slower the link, the smaller what crosses",
    strategy_fn=coded_strategy,
)

VARIANTS = tuple(
    Method(
        name=f"smartsplit_{name}",
        summary=f"smartsplit {summary}",
        strategy_fn=partial(build_strategy, change=change),
    )
    for name, summary, change in (
        ("no_loss", "without statistical utility", _select(loss=0.0)),
        ("no_speed", "without the speed of devices", _select(speed=0.0)),
        ("no_labels", "without label coverage", _select(coverage=0.0)),
        ("no_fairness", "without fairness", _select(waiting=0.0)),
        (
            "no_learning",
            "without learning the speed of devices that do not tell it",
            lambda _: {"client_seconds": None},
        ),
        ("keep_quarter", "with a quarter of the units at devices", _keep(1 / 4)),
        ("keep_half", "with half of the units at devices", _keep(1 / 2)),
        (
            "advised",
            "with an edge manager that advises devices",
            lambda _: {"advisor": StragglerAdvisor()},
        ),
        (
            "no_recompute",
            "without recomputation",
            lambda _: {"constraints": NO_RECOMPUTE},
        ),
        (
            "one_cut",
            "with one cut for all devices",
            lambda setting: {"choose_route": one_cut_for_all(setting)},
        ),
    )
)
"""SmartSplit with one part less, or more, for the ablation."""
