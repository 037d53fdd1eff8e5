"""Train one shared model across devices too small to hold it, under Flower.

The names below are all of the public interface. They are loaded when they are first
used, so that importing the package brings in neither Ray nor Flower.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flwr_smartsplit.flower.client_app import build_client_app
    from flwr_smartsplit.flower.legacy_strategy import LegacySmartSplit
    from flwr_smartsplit.flower.numpy_client import SmartSplitNumPyClient
    from flwr_smartsplit.flower.observing import measured_seconds
    from flwr_smartsplit.flower.strategy import SmartSplit
    from flwr_smartsplit.model.cap import memory_cap
    from flwr_smartsplit.model.chain import Chain
    from flwr_smartsplit.model.costs import profile_chain
    from flwr_smartsplit.model.proximal import proximal
    from flwr_smartsplit.model.segment import Unit
    from flwr_smartsplit.policy.by_utility import SelectByUtility
    from flwr_smartsplit.policy.cuts import (
        RouteRequest,
        deepest_split,
        deepest_u_shape,
        first_that_fits,
    )
    from flwr_smartsplit.policy.predict import predicted_peak_bytes
    from flwr_smartsplit.policy.recompute_plan import plan_recompute
    from flwr_smartsplit.policy.selection import select_at_random
    from flwr_smartsplit.runtime.budget import MemoryBudget
    from flwr_smartsplit.runtime.ray_edge import RayEdge
    from flwr_smartsplit.task import Task
    from flwr_smartsplit.types import DeviceTraits, Link, RecomputePlan, Route

__all__ = [
    "Chain",
    "DeviceTraits",
    "LegacySmartSplit",
    "Link",
    "MemoryBudget",
    "RayEdge",
    "RecomputePlan",
    "Route",
    "RouteRequest",
    "SelectByUtility",
    "SmartSplit",
    "SmartSplitNumPyClient",
    "Task",
    "Unit",
    "build_client_app",
    "deepest_split",
    "deepest_u_shape",
    "first_that_fits",
    "measured_seconds",
    "memory_cap",
    "plan_recompute",
    "predicted_peak_bytes",
    "profile_chain",
    "proximal",
    "select_at_random",
]

_HOMES = {
    "Chain": "model.chain",
    "DeviceTraits": "types",
    "LegacySmartSplit": "flower.legacy_strategy",
    "Link": "types",
    "MemoryBudget": "runtime.budget",
    "RayEdge": "runtime.ray_edge",
    "RecomputePlan": "types",
    "Route": "types",
    "RouteRequest": "policy.cuts",
    "SelectByUtility": "policy.by_utility",
    "SmartSplit": "flower.strategy",
    "SmartSplitNumPyClient": "flower.numpy_client",
    "Task": "task",
    "Unit": "model.segment",
    "build_client_app": "flower.client_app",
    "deepest_split": "policy.cuts",
    "deepest_u_shape": "policy.cuts",
    "first_that_fits": "policy.cuts",
    "measured_seconds": "flower.observing",
    "memory_cap": "model.cap",
    "plan_recompute": "policy.recompute_plan",
    "predicted_peak_bytes": "policy.predict",
    "profile_chain": "model.costs",
    "proximal": "model.proximal",
    "select_at_random": "policy.selection",
}


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
