"""What devices, links and edges can do, as far as they say so."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import inf
from typing import Self

from flwr_smartsplit.types.routes import DEVICE
from flwr_smartsplit.types.sizes import own_numbers, whole_bytes

LEAST_RATE = 1e-3  # bytes or FLOPs per second; with less, times become infinite
MOST_FLOPS_PER_SECOND = 1e24
MOST_LATENCY_SECONDS = 1e6
MOST_LABELS = 2**53


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A connection of a device, or of an edge to another.

    Parameters
    ----------
    up_bytes_per_second, down_bytes_per_second : float
        From the device, and to it; or from the edge that names it, and to it.
    latency_seconds : float
        One way, for each message.
    most_bytes_per_round : int, optional
        What it may carry while a round trains, or evaluates, both ways together, as
        predicted: no route is chosen that sends more. None is no limit. Only of a
        device's link.

    Raises
    ------
    ValueError
        If a rate is not above 0, or the latency or the limit is negative.
    """

    up_bytes_per_second: float = inf
    down_bytes_per_second: float = inf
    latency_seconds: float = 0.0
    most_bytes_per_round: int | None = None

    def __post_init__(self) -> None:
        own_numbers(self)
        if self.most_bytes_per_round is not None:
            most = whole_bytes(self.most_bytes_per_round, "most_bytes_per_round")
            object.__setattr__(self, "most_bytes_per_round", most)
        rates = self.up_bytes_per_second, self.down_bytes_per_second
        latency = self.latency_seconds
        if not (min(rates) >= LEAST_RATE and 0 <= latency <= MOST_LATENCY_SECONDS):
            raise ValueError(
                f"a link of {rates[0]:g} and {rates[1]:g} B/s with a latency of "
                f"{latency:g} s: give rates of at least {LEAST_RATE:g}, and a time "
                f"from 0 to {MOST_LATENCY_SECONDS:g}."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceTraits:
    """What a device reports of itself besides its memory; everything is optional.

    Parameters
    ----------
    flops_per_second : float or None
        FLOPs per second of training; None if unknown.
    link : Link or None
        To the server, and to edges that ``edge_links`` does not name; None if unknown.
    edge_links : Mapping[str, Link]
        To some edges, by name.
    label_counts : tuple[int, ...] or None
        Examples of each class. They reveal something of the data, so they are sent only
        if the user sets them.

    Raises
    ------
    ValueError
        If a number is out of range.
    """

    flops_per_second: float | None = None
    link: Link | None = None
    edge_links: Mapping[str, Link] = field(default_factory=dict)
    label_counts: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        own_numbers(self)
        flops = self.flops_per_second
        if flops is not None and not LEAST_RATE <= flops <= MOST_FLOPS_PER_SECOND:
            raise ValueError(
                f"flops_per_second is {str(flops)[:40]}: give a number from "
                f"{LEAST_RATE:g} to {MOST_FLOPS_PER_SECOND:g}, or None."
            )
        counts = self.label_counts
        if counts is not None and not (
            0 <= min(counts, default=-1) <= max(counts) <= MOST_LABELS
            and sum(counts) > 0
        ):
            raise ValueError(
                f"label_counts is {counts}: give the number of examples of each class, "
                "or None."
            )

    def link_to(self, edge: str) -> Link | None:
        """Return the link to an edge; None if unknown."""
        return self.edge_links.get(edge, self.link)


NO_TRAITS = DeviceTraits()


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeProfile:
    """What an edge offers."""

    name: str  # the place's name in routes
    memory_bytes: int | None = None  # for its replicas; None is no limit
    disk_bytes: int | None = None  # for sealed tails; None is no limit
    flops_per_second: float | None = None  # for one client; None if unknown
    # To other edges, by name
    links: Mapping[str, Link] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        own_numbers(self)
        if not isinstance(self.name, str) or self.name == DEVICE:
            raise ValueError(
                f"an edge's name is {self.name!r}: give a text other than {DEVICE!r}, "
                "which names the device in routes."
            )
        for name in ("memory_bytes", "disk_bytes"):
            limit = getattr(self, name)
            if limit is not None:
                object.__setattr__(self, name, whole_bytes(limit, name))
        self._check_links()

    def _check_links(self) -> None:
        if not isinstance(self.links, Mapping) or not all(
            isinstance(link, Link) for link in self.links.values()
        ):
            raise TypeError(
                f"the links of edge {self.name!r} are {self.links!r:.200}: give the "
                'Link to each other edge by its name, such as {"far": Link(...)}.'
            )
        for other, link in self.links.items():
            if other in {self.name, DEVICE}:
                raise ValueError(
                    f"edge {self.name!r} has a link to {other!r}: name another edge. "
                    "A device's links are in its DeviceTraits."
                )
            if link.most_bytes_per_round is not None:
                raise ValueError(
                    f"the link of edge {self.name!r} to {other!r} has "
                    f"most_bytes_per_round={link.most_bytes_per_round}: only a "
                    "device's link may have a limit. Leave it out."
                )

    def link_to(self, other: Self) -> Link | None:
        """Return the link to another edge, as either of them says; None if unknown."""
        if other.name in self.links or self.name not in other.links:
            return self.links.get(other.name)
        back = other.links[self.name]
        return replace(
            back,
            up_bytes_per_second=back.down_bytes_per_second,
            down_bytes_per_second=back.up_bytes_per_second,
        )
