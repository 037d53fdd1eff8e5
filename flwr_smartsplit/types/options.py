"""RouteOption: one way to train a client, and what it costs."""

from dataclasses import dataclass, replace
from typing import Self

from flwr_smartsplit.types.checkpointing import KEEP_ALL, RecomputePlan
from flwr_smartsplit.types.codecs import Codec
from flwr_smartsplit.types.routes import Route
from flwr_smartsplit.types.variants import WHOLE, Variant

# FLOPs of a step over those of its forward: backward multiplies each layer's gradient
# with its weights and with its inputs.
STEP_OVER_FORWARD = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a route asks of a device, its edges and their links in a training step."""

    device_flops: float = 0
    edge_flops: float = 0
    # What crosses the device's cuts each way if it is neither idle nor coded
    boundary_bytes: int = 0
    # The part of boundary_bytes that is not sent, or does not come back: gradients that
    # nothing before a cut needs, and what codecs save
    unsent_bytes: int = 0
    unreturned_bytes: int = 0
    num_exchanges: int = 0  # round trips over the device's link, and each of hops
    # What is sent over each link from edge to edge, and comes back, in route order
    hops: tuple[tuple[int, int], ...] = ()
    state_bytes: int = 0  # the device's state, moved once a round; not the frozen
    extra_flops: int = 0  # the part of device_flops that recomputation adds
    # The parts of device_flops and edge_flops that coding takes
    coding_flops: int = 0
    edge_coding_flops: int = 0
    doubtful_bytes: int = 0  # Of all that is not sent: only likely, not sure

    @property
    def up_bytes(self) -> int:
        """What the device sends over its cuts."""
        return self.boundary_bytes - self.unsent_bytes

    @property
    def down_bytes(self) -> int:
        """What comes back over them."""
        return self.boundary_bytes - self.unreturned_bytes

    @property
    def model_flops(self) -> float:
        """The device's part of the model's FLOPs: nothing recomputed, nothing coded."""
        return self.device_flops - self.extra_flops - self.coding_flops

    @property
    def most_bytes(self) -> int:
        """What crosses both ways if nothing is saved but what is sure to be."""
        return self.up_bytes + self.down_bytes + self.doubtful_bytes

    @property
    def device_fraction(self) -> float:
        """The device's share of the model's FLOPs."""
        own = self.model_flops
        total = own + self.edge_flops - self.edge_coding_flops
        return own / total if total else 1.0

    @property
    def extra_fraction(self) -> float:
        """The recomputed FLOPs over those of the device's forward."""
        own = self.model_flops
        return STEP_OVER_FORWARD * self.extra_flops / own if own else 0.0


NO_WORK = Work()


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteOption:
    """A route, how it is trained, and what that costs."""

    route: Route
    recompute: RecomputePlan = KEEP_ALL  # what the device runs twice
    variant: Variant = WHOLE  # what part of the global model is trained
    codecs: tuple[Codec, ...] = ()  # one per cut; empty for RAW at all of them
    accumulate: int = 1  # micro-batches of a step
    peak_bytes: int = 0  # predicted, of the device during a step; 0 if unknown
    work: Work = NO_WORK  # of a step
    edge_memory_bytes: int = 0  # of the rest of the model, while it trains
    edge_disk_bytes: int = 0  # of the same, sealed
    seconds: float | None = None  # of the client's part of a round; None if unknown
    is_placed: bool = False  # whether it names its edges; else "edge" is any of them

    def at(self, edge: str | None) -> Self:
        """Place the rest of the model at an edge; a whole model needs none."""
        if self.is_placed or edge is None or not self.route.cuts:
            return replace(self, is_placed=True)
        route = Route.split(self.route.cuts[0], edge=edge)
        return replace(self, route=route, is_placed=True)
