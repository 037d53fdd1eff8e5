"""Simulated devices: what a fleet is made of, and what it is made for."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flwr_smartsplit.types import EDGE, NO_TRAITS, WHOLE, DeviceTraits, Link


@dataclass(frozen=True, slots=True, kw_only=True)
class Watts:
    """What a device takes while it works, above what it takes when idle."""

    compute: float = 3.0  # While it trains
    radio: float = 2.0  # While it sends or receives


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a fleet is made for."""

    whole_peak_bytes: int  # The most a device holds in a step of the whole model
    smallest_peak_bytes: int  # The least it can get by with, at the best cut
    edges: tuple[str, ...] = (EDGE,)  # Devices may have links of their own to each


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """What was measured on a device, by the name of the variant that it trains."""

    example_seconds: Mapping[str, float]  # Of training one example in one step
    transfer_seconds: Mapping[str, float]  # Of a round's messages

    def step_seconds(self, variant: str, batch_size: int) -> float:
        """Say how long a step takes."""
        return self.example_seconds[variant or WHOLE.name] * batch_size


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetDevice:
    """One simulated device."""

    name: str  # What kind of device it is
    budget_bytes: int | None  # For tensors, when a round begins; None is no limit
    traits: DeviceTraits = NO_TRAITS  # The speed and the links that it declares
    # Its budget over ``budget_bytes`` from step to step, over and over; the first is 1
    free_memory: tuple[float, ...] = ()
    # Its true speed over the declared one from round to round, over and over
    speed: tuple[float, ...] = ()
    # The true rates of all its links over the declared ones, in the same way
    link_speed: tuple[float, ...] = ()
    watts: Watts = Watts()  # What it takes
    times: Times | None = None  # Instead of speed and links, where those were measured

    def speed_in(self, round_number: int) -> float:
        """Return its true speed in a round, over the declared one."""
        return _in_round(self.speed, round_number)

    def link_speed_in(self, round_number: int) -> float:
        """Return the true rates of its links in a round, over the declared ones."""
        return _in_round(self.link_speed, round_number)


def _in_round(trace: tuple[float, ...], round_number: int) -> float:
    return trace[(round_number - 1) % len(trace)] if trace else 1.0


Devices = tuple[FleetDevice, ...]

Fleet = Callable[[Needs, int, int], Devices]
"""``fleet(needs, num_clients, seed)`` makes the devices, the least memory first."""


def is_weak(device: FleetDevice, needs: Needs) -> bool:
    """Say whether a device cannot hold the whole model."""
    budget_bytes = device.budget_bytes
    return budget_bytes is not None and budget_bytes < needs.whole_peak_bytes


def device_from(values: dict[str, Any]) -> FleetDevice:
    """Read what ``asdict(device)`` wrote, also by way of JSON."""
    traits = dict(values["traits"])
    link, edge_links = traits.pop("link"), traits.pop("edge_links")
    counts = traits.pop("label_counts")
    return FleetDevice(
        name=values["name"],
        budget_bytes=values["budget_bytes"],
        traits=DeviceTraits(
            link=None if link is None else Link(**link),
            edge_links={name: Link(**each) for name, each in edge_links.items()},
            label_counts=None if counts is None else tuple(counts),
            **traits,
        ),
        free_memory=tuple(values["free_memory"]),
        speed=tuple(values["speed"]),
        link_speed=tuple(values.get("link_speed", ())),  # Older journals have none.
        watts=Watts(**values["watts"]),
        times=Times(**values["times"]) if values.get("times") else None,
    )
