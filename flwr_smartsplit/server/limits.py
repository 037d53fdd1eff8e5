"""What the strategy lets one client's session take at an edge."""

from flwr_smartsplit.edge.gate.rules import LENIENCY, SPARE_BYTES
from flwr_smartsplit.edge.protocol import Limits
from flwr_smartsplit.types import ChainProfile, ClientPlan, DeviceProfile


def limits_of(
    plan: ClientPlan,
    device: DeviceProfile,
    profile: ChainProfile,
    *,
    num_units: int,
    is_train: bool,
) -> Limits:
    """Bound a session by what its client and the profile of its batches say.

    Batches and sequences vary, and samplers draw as many examples as they like, so the
    bounds are well above what is usual. ``num_examples`` bounds a client's weight.
    """
    usual = 2 * device.num_examples * device.num_epochs + device.batch_size
    largest = max(unit.boundary_bytes for unit in profile.units)
    return Limits(
        num_examples=usual if is_train else None,
        step_examples=LENIENCY * device.batch_size,
        step_bytes=LENIENCY * (largest + profile.targets_bytes) + SPARE_BYTES,
        least_start=_least_start(plan, num_units),
        ends_at_edge=not plan.route.returns,
    )


def _least_start(plan: ClientPlan, num_units: int) -> int:
    """Find how far the constraints let the first cut move to the front."""
    route, first = plan.route, plan.route.cuts[0]
    cuts = (c for c in range(1, first) if _is_allowed(plan, c, num_units))
    return next(cuts, first) if route.cuts else first


def _is_allowed(plan: ClientPlan, cut: int, num_units: int) -> bool:
    route = plan.route.with_first_cut(cut)
    return plan.constraints.allow(route, num_units=num_units)
