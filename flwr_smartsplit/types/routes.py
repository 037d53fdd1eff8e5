"""Routes: where the segments of one client's model run."""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Self

from flwr_smartsplit.errors import InvalidRoute
from flwr_smartsplit.types.sizes import whole

DEVICE = "device"
EDGE = "edge"


@dataclass(frozen=True, slots=True)
class Leg:
    """Units ``[start, stop)`` of a chain, run at one place."""

    place: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Route:
    """Where the segments of one client's model run.

    Parameters
    ----------
    cuts : tuple[int, ...]
        Strictly increasing indices of the first unit after each boundary; empty for
        a model that stays whole.
    places : tuple[str, ...]
        One place per segment, ``"device"`` first; one more than there are cuts. Each
        edge once; the device again only at the end.

    Raises
    ------
    InvalidRoute
        If cuts and places do not fit each other.

    Examples
    --------
    >>> str(Route.split(3)), str(Route.whole())
    ('device[:3] > edge[3:]', 'whole')
    >>> str(Route.u_shape(2, 6)), str(Route.hops((2, 6), edges=("near", "far")))
    ('device[:2] > edge[2:6] > device[6:]', 'device[:2] > near[2:6] > far[6:]')
    """

    cuts: tuple[int, ...] = ()
    places: tuple[str, ...] = (DEVICE,)

    def __post_init__(self) -> None:
        if any(type(cut) is not int for cut in self.cuts):
            cuts = tuple(whole(cut, "a cut") for cut in self.cuts)
            object.__setattr__(self, "cuts", cuts)
        if len(self.places) != len(self.cuts) + 1:
            raise InvalidRoute(
                f"{len(self.cuts)} cuts make {len(self.cuts) + 1} segments, "
                f"but {len(self.places)} places are given: name one place per segment."
            )
        if self.places[0] != DEVICE:
            raise InvalidRoute(
                f"a route starts at {DEVICE!r}, where the data are, not at "
                f"{self.places[0]!r}."
            )
        middle = self.places[1:-1] if self.returns else self.places[1:]
        if DEVICE in middle or len(set(middle)) != len(middle):
            raise InvalidRoute(
                f"places {self.places}: a route visits each edge once, and comes back "
                "to the device only for its last segment."
            )
        if any(low >= high for low, high in pairwise((0, *self.cuts))):
            raise InvalidRoute(
                f"cuts {self.cuts} must be strictly increasing and at least 1."
            )

    @classmethod
    def whole(cls) -> Self:
        """Keep every unit on the device, as FedAvg does."""
        return cls()

    @classmethod
    def split(cls, cut: int, *, edge: str = EDGE) -> Self:
        """Run units ``[0, cut)`` on the device and the rest at one edge."""
        return cls((cut,), (DEVICE, edge))

    @classmethod
    def u_shape(cls, first: int, last: int, *, edge: str = EDGE) -> Self:
        """Run ``[first, last)`` at an edge; the rest, with loss and labels, here."""
        return cls((first, last), (DEVICE, edge, DEVICE))

    @classmethod
    def hops(cls, cuts: tuple[int, ...], *, edges: tuple[str, ...]) -> Self:
        """Run the front on the device and the rest on several edges in turn."""
        return cls(tuple(cuts), (DEVICE, *edges))

    @property
    def returns(self) -> bool:
        """Whether the last segment, and with it the labels, is on the device."""
        return len(self.places) > 2 and self.places[-1] == DEVICE  # noqa: PLR2004

    def with_first_cut(self, cut: int) -> Self:
        """Move the boundary between the device and the first edge.

        Raises
        ------
        InvalidRoute
            If there is none, or the next one is not beyond it.
        """
        if not self.cuts:
            raise InvalidRoute("a whole model has no cut that could move.")
        return replace(self, cuts=(cut, *self.cuts[1:]))

    def device_legs(self, num_units: int) -> tuple[Leg, ...]:
        """Return the segments on the device, for a chain of ``num_units`` units."""
        return tuple(leg for leg in self.legs(num_units) if leg.place == DEVICE)

    def edge_legs(self, num_units: int) -> tuple[Leg, ...]:
        """Return the segments at edges, for a chain of ``num_units`` units."""
        return tuple(leg for leg in self.legs(num_units) if leg.place != DEVICE)

    def legs(self, num_units: int) -> tuple[Leg, ...]:
        """Lay the route along a chain of ``num_units`` units.

        Raises
        ------
        InvalidRoute
            If a cut lies beyond the last unit.
        """
        if self.cuts and self.cuts[-1] >= num_units:
            raise InvalidRoute(
                f"cut {self.cuts[-1]} is outside a chain of {num_units} units: "
                f"choose one in 1..{num_units - 1}.",
                cut=self.cuts[-1],
                num_units=num_units,
            )
        bounds = (0, *self.cuts, num_units)
        return tuple(
            Leg(place, start, stop)
            for place, (start, stop) in zip(self.places, pairwise(bounds), strict=True)
        )

    def edges(self) -> tuple[str, ...]:
        """Name the places other than the device, in route order."""
        return tuple(place for place in self.places if place != DEVICE)

    def __str__(self) -> str:
        if not self.cuts:
            return "whole"
        bounds = ("", *map(str, self.cuts), "")
        return " > ".join(
            f"{place}[{start}:{stop}]"
            for place, (start, stop) in zip(self.places, pairwise(bounds), strict=True)
        )
