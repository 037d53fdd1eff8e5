"""Constraints: what a user allows a plan to do, whatever memory would permit."""

from dataclasses import dataclass

from flwr_smartsplit.types.routes import Route
from flwr_smartsplit.types.sizes import whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraints:
    """What every route, and every later change of it, must respect.

    Parameters
    ----------
    min_device_units : int
        Fewest units that a cut leaves on the device: shallow boundaries leak most.
    recompute : bool
        Whether a device may recompute activations.
    max_accumulate : int
        Most micro-batches that a step may be divided into where nothing else fits.
    kept_units : frozenset[int]
        Units that must stay on the device, because their state is the client's own.

    Raises
    ------
    ValueError
        If a number is below 1.
    """

    min_device_units: int = 1
    recompute: bool = True
    max_accumulate: int = 1
    kept_units: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        for name in ("min_device_units", "max_accumulate"):
            object.__setattr__(self, name, whole(getattr(self, name), name))
        if self.min_device_units < 1:
            raise ValueError(
                f"min_device_units is {self.min_device_units}; a cut leaves at least "
                "1 unit on the device."
            )
        if self.max_accumulate < 1:
            raise ValueError(
                f"max_accumulate is {self.max_accumulate}; a step has at least 1 "
                "micro-batch."
            )

    def allow(self, route: Route, *, num_units: int) -> bool:
        """Say whether a route has on the device the units that must be there."""
        if route.cuts and route.cuts[0] < self.min_device_units:
            return False
        legs = route.device_legs(num_units) if self.kept_units else ()
        on_device = {unit for leg in legs for unit in range(leg.start, leg.stop)}
        return self.kept_units <= on_device


NO_CONSTRAINTS = Constraints()
