"""AllSmall: everybody trains the one narrow model that everybody can hold.

The baseline that ProFL's authors name so. It is the widest of HeteroFL's widths that
fits every device, or the narrowest if none does; who cannot hold that sits out. The
global model keeps its shapes: outside of the slice it is zero, so that it computes what
the narrow model does.
"""

from typing import Any

import numpy as np
from flwr.serverapp.strategy import Strategy

from flwr_smartsplit import Route, Variant, Widths, predicted_peak_bytes
from flwr_smartsplit.plan.selection.selection import select_at_random
from flwr_smartsplit.profile.task_profiles import profile_of
from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.types import width_of
from simulations.methods.heterofl import WIDTHS
from simulations.methods.method import NO_RECOMPUTE, Method, Setting, split_strategy


def rate_for_all(setting: Setting) -> float:
    """Find the widest width that every device can hold."""
    budgets = [device.budget_bytes for device in setting.devices]
    least = min((b for b in budgets if b is not None), default=None)
    fitting = (r for r in WIDTHS if least is None or _peak_bytes(setting, r) <= least)
    return next(fitting, WIDTHS[-1])


def _peak_bytes(setting: Setting, rate: float) -> int:
    size, variant = setting.experiment.batch_size, _slice(setting, rate)
    profile = profile_of(setting.task, batch_size=size, variant=variant)
    return predicted_peak_bytes(profile, Route.whole())


def _slice(setting: Setting, rate: float) -> Variant:
    return width_of(build_chain(setting.task).channels.groups, rate)


def build_strategy(setting: Setting) -> Strategy:
    """Build the strategy that trains one slice."""
    rate = rate_for_all(setting)
    regions = build_chain(setting.task).regions(_slice(setting, rate))

    def only_the_slice(number: int, state: Any, summary: Any) -> Any:
        del number, summary
        return {name: _only(array, regions.get(name)) for name, array in state.items()}

    return split_strategy(
        setting,
        has_edges=False,
        constraints=NO_RECOMPUTE,
        select=select_at_random,
        variants=Widths((rate,), scale=False),
        more={"between_rounds": only_the_slice},
    )


def _only(array: Any, region: Any) -> Any:
    """Set to zero what a region leaves out."""
    if region is None:
        return array
    kept = np.zeros(array.shape, dtype=bool)
    at = [np.arange(size) for size in array.shape]
    for axis, indices in enumerate(region):
        at[axis] = at[axis] if indices is None else indices
    kept[np.ix_(*at)] = True
    return np.where(kept, array, array.dtype.type(0))


ALLSMALL = Method(
    name="allsmall",
    summary="everybody trains the one narrow model that all can hold",
    strategy_fn=build_strategy,
)
