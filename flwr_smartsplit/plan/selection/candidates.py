"""Candidates: the clients that have a route, and the options that each of them has."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf, isnan, nan

import numpy as np
import numpy.typing as npt

from flwr_smartsplit.errors import bytes_text
from flwr_smartsplit.plan.search_space import SearchSpace
from flwr_smartsplit.plan.timing import NO_WAIT, over_limit, why_over_limit
from flwr_smartsplit.types import (
    RAW,
    Assignment,
    DeviceProfile,
    EdgeProfile,
    Link,
    RouteOption,
)

Floats = npt.NDArray[np.float64]
NO_BUDGET_BYTES = np.iinfo(np.int64).max
MOST_SECONDS = float(np.finfo(np.float64).max)


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """One client and what it can do."""

    device: DeviceProfile
    space: SearchSpace  # What there is at its batch size
    fits: npt.NDArray[np.int64]  # Indices of the options within its budget
    seconds: Floats  # What each of these takes in a round, or NaN
    best: int  # Index of the fastest that fits; the first if unknown
    best_seconds: float  # NaN if unknown

    @property
    def client_key(self) -> str:
        """The client's key."""
        return self.device.client_key

    @property
    def options(self) -> tuple[RouteOption, ...]:
        """The options within the budget, with their seconds; the deepest first."""
        return tuple(map(self._option, range(len(self.fits))))

    def preferred(self) -> Iterator[RouteOption]:
        """Yield the best option, then all, as ``options`` has them."""
        (best,) = (self.fits == self.best).nonzero()
        for index in (*best, *range(len(self.fits))):
            yield self._option(index)

    def assigned(self, option: RouteOption, *, why: str = "") -> Assignment:
        """Give the client one of its options, placed at an edge with room for it.

        ``why`` says, for the journal, why this client was chosen.
        """
        return Assignment(
            client_key=self.client_key,
            option=option,
            budget_bytes=self.device.budget_bytes,
            why="; ".join(filter(None, (why, self._why_codecs(option)))),
        )

    def _why_codecs(self, option: RouteOption) -> str:
        """Say what its route would take with each of the codecs that it may have."""
        others = [
            each
            for each in self.options
            if each.route.cuts == option.route.cuts and each.recompute.is_empty
        ]
        if len(others) < 2 or not option.route.cuts:  # noqa: PLR2004
            return ""
        parts = [
            "+".join(map(str, each.codecs or (RAW,)))
            + ("" if each.seconds is None else f" {each.seconds:.3g} s")
            for each in others
        ]
        return f"codecs for this cut: {', '.join(parts)}"

    def _option(self, index: int) -> RouteOption:
        seconds = float(self.seconds[index])
        option = self.space.options[int(self.fits[index])]
        return replace(option, seconds=None if isnan(seconds) else seconds)


def candidates_of(
    devices: Sequence[DeviceProfile], space: SearchSpace, edges: Sequence[EdgeProfile]
) -> tuple[list[Candidate], dict[str, str]]:
    """Find out who can take what, and for all others, by client_key, why not."""
    budgets = np.array(
        [
            # A client that claims more than there can be has no limit.
            NO_BUDGET_BYTES
            if device.budget_bytes is None
            else min(device.budget_bytes, NO_BUDGET_BYTES)
            for device in devices
        ],
        np.int64,
    )
    is_fit = space.peaks[None, :] <= budgets[:, None]
    over = _refuse_over_limits(is_fit, devices, space, edges)
    seconds = _seconds(devices, space, edges)
    # Where the time is unknown, the first option that fits is the best one.
    ranked = np.where(np.isnan(seconds), np.arange(len(space.options)), seconds)
    ranked = np.minimum(ranked, MOST_SECONDS)  # What does not fit comes after all.
    best = np.where(is_fit, ranked, inf).argmin(axis=1).tolist()
    candidates: list[Candidate] = []
    unfit: dict[str, str] = {}
    for row, device in enumerate(devices):
        (fits,) = is_fit[row].nonzero()
        if not len(fits):
            why = over.get(device.client_key)
            why = why or _why_unfit(device, space, has_edges=bool(edges))
            unfit[device.client_key] = why
            continue
        own = seconds[row]
        candidates.append(
            Candidate(device, space, fits, own[fits], best[row], float(own[best[row]]))
        )
    return candidates, unfit


def _refuse_over_limits(
    is_fit: npt.NDArray[np.bool_],
    devices: Sequence[DeviceProfile],
    space: SearchSpace,
    edges: Sequence[EdgeProfile],
) -> dict[str, str]:
    """Drop what links may not carry; say of whom that leaves nothing, and why."""
    unfit: dict[str, str] = {}
    for row, device in zip(is_fit, devices, strict=True):
        links = (device.traits.link, *device.traits.edge_links.values())
        if all(link is None or link.most_bytes_per_round is None for link in links):
            continue
        found = []
        for index in row.nonzero()[0]:
            over = over_limit(space.options[index].work, device, edges)
            if over is not None:
                row[index] = False
                found.append(over)
        if found and not row.any():
            unfit[device.client_key] = why_over_limit(*min(found))
    return unfit


def _why_unfit(device: DeviceProfile, space: SearchSpace, *, has_edges: bool) -> str:
    """Say why a device has no route, with the least bytes that would do."""
    cheapest = space.cheapest
    advice = "" if has_edges else ", give the strategy an edge"
    parts = "" if cheapest.accumulate == 1 else f" in {cheapest.accumulate} parts"
    return (
        f"no route fits: the cheapest ({cheapest.route}) needs "
        f"{bytes_text(cheapest.peak_bytes)} at batch size {space.profile.batch_size}"
        f"{parts}, the budget is {bytes_text(device.budget_bytes or 0)}. "
        f"Lower the batch size{advice} or raise the budget."
    )


def _seconds(
    devices: Sequence[DeviceProfile], space: SearchSpace, edges: Sequence[EdgeProfile]
) -> Floats:
    """Say what each option takes each device, over its fastest link to an edge.

    The sums are those of ``timing.round_seconds``, for all at once.
    """
    works = [option.work for option in space.options]
    device_flops = np.array([work.device_flops for work in works], np.float64)
    edge_flops = np.array([work.edge_flops for work in works], np.float64)
    boundary = np.array([work.boundary_bytes for work in works], np.float64)
    idle = np.array([(w.unsent_bytes, w.unreturned_bytes) for w in works], np.float64)
    exchanges = np.array([work.num_exchanges for work in works], np.float64)
    state = np.array([work.state_bytes for work in works], np.float64)
    steps = np.array([device.num_steps for device in devices], np.float64)[:, None]
    speeds = [device.traits.flops_per_second for device in devices]
    speed = np.array([nan if s is None else s for s in speeds])[:, None]
    away = np.full((len(devices), len(works)), inf if edges else 0.0)
    for edge in edges:
        links = [device.traits.link_to(edge.name) for device in devices]
        per_byte, per_message = _rates(links)
        at_edge = edge_flops / (edge.flops_per_second or inf)
        over = boundary * per_byte + exchanges * per_message + at_edge
        if idle.any():
            over = over - _each_way(links) @ idle.T
        away = np.minimum(away, over)
    per_byte, per_message = _rates([device.traits.link for device in devices])
    seconds: Floats = steps * (device_flops / speed + away) + state * per_byte
    return seconds + per_message


def _each_way(links: Sequence[Link | None]) -> Floats:
    """Return seconds per byte up and down."""
    known = [NO_WAIT if link is None else link for link in links]
    rates = [(x.up_bytes_per_second, x.down_bytes_per_second) for x in known]
    return 1 / np.array(rates, np.float64)


def _rates(links: Sequence[Link | None]) -> tuple[Floats, Floats]:
    """Return seconds per byte there and back, and per message with its answer."""
    known = [NO_WAIT if link is None else link for link in links]
    per_byte = [
        1 / link.up_bytes_per_second + 1 / link.down_bytes_per_second for link in known
    ]
    per_message = [2 * link.latency_seconds for link in known]
    return np.array(per_byte)[:, None], np.array(per_message)[:, None]
