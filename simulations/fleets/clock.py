"""The clock: what a client's part of a round takes on its device, simulated.

Nothing is measured in seconds here. Bytes come from the journal, FLOPs from the
costs of the model's units; speeds, links and watts are the fleet's. So the same run
gives the same seconds on any machine, and they are never those of the simulation
itself, which are called wall-clock.

Added up, since nothing overlaps: the device's work and the edge's, coding included,
what crosses the device's links and those between edges, and a latency for each message.
A round takes as long as the slowest of its clients; what the server does takes no time,
nor what crosses a link between edges that is not given.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from flwr_smartsplit.plan.coding import route_profile
from flwr_smartsplit.plan.timing import (
    hop_seconds,
    links_along,
    step_seconds,
    work_of,
)
from flwr_smartsplit.types import (
    KEEP_ALL,
    WHOLE,
    ChainProfile,
    ClientPlan,
    Codec,
    EdgeProfile,
    Link,
    RecomputePlan,
    Route,
    StepReport,
    Variant,
    Work,
    codec_from_text,
)
from simulations.experiments.errors import ExperimentError
from simulations.experiments.rows import ClientRow
from simulations.fleets.devices import Devices, FleetDevice
from simulations.report.plan_text import recompute_of, route_of

NOMINAL_FLOPS_PER_SECOND = 1e10
"""Of a device that does not say how fast it is: about the median of the phones."""

NOMINAL_LINK = Link(
    up_bytes_per_second=4.1e5, down_bytes_per_second=5.4e5, latency_seconds=0.035
)
"""Of a device that does not say how it is connected: the median of the links."""

EDGE_FLOPS_PER_SECOND = 2e11
"""What an edge does for one client, however many it serves."""

EDGE_WATTS = 7.0
"""What an edge takes to do it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Steps of a round with the same route and the same recompute plan."""

    num_steps: int
    route: Route
    recompute: RecomputePlan
    codecs: tuple[Codec, ...] = ()  # one per cut; empty for RAW at all of them
    variant: Variant = WHOLE


_Way = tuple[Route, RecomputePlan, tuple[Codec, ...], Variant]


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes that a device received and sent in a round."""

    server_down: float
    server_up: float
    edge_down: float
    edge_up: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """What a client's part of a round took."""

    device_seconds: float = 0.0
    edge_seconds: float = 0.0
    radio_seconds: float = 0.0  # Sending and receiving, latencies not counted
    waiting_seconds: float = 0.0  # Latencies of all its messages
    hop_seconds: float = 0.0  # From edge to edge and back, by the costs of the units
    # device_joules, edge_joules: above idle. A device that waits takes nothing.
    device_joules: float = 0.0
    edge_joules: float = 0.0

    @property
    def seconds(self) -> float:
        """All of it, one after the other."""
        work = self.device_seconds + self.edge_seconds
        return work + self.radio_seconds + self.waiting_seconds + self.hop_seconds


NOTHING = Spent()


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """Simulated seconds and joules of clients."""

    profile: ChainProfile  # At the run's batch size; a last, smaller batch counts whole
    devices: Devices  # The fleet; the client with key ``"3"`` has ``devices[3]``
    # What an edge does for one client, however many it has, and takes for it
    edge_flops_per_second: float = EDGE_FLOPS_PER_SECOND
    edge_watts: float = EDGE_WATTS
    edges: tuple[EdgeProfile, ...] = ()  # Those with links to each other
    # What a variant costs, for whoever runs one; a journal has its FLOPs
    costs: Callable[[Variant], ChainProfile] | None = field(default=None, compare=False)
    _works: dict[_Way, Work] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def client_seconds(self, plan: ClientPlan, report: StepReport) -> float:
        """Say how long a client took, from what a strategy knows while it runs.

        Messages count as the state that they carry; the journal has their exact size.
        """
        device = self.devices[int(plan.client_key)]
        if device.times is not None:
            return self._measured(device, plan.variant.name, report.num_steps).seconds
        cuts = [move.after for move in report.moves]
        last = plan.route.with_first_cut(cuts[-1]) if cuts else plan.route
        traffic = Traffic(
            server_down=self._work(plan.route, variant=plan.variant).state_bytes,
            server_up=self._work(last, variant=plan.variant).state_bytes,
            edge_down=report.received_bytes,
            edge_up=report.sent_bytes,
        )
        stretches = stretches_of(
            Stretch(
                num_steps=report.num_steps,
                route=plan.route,
                recompute=plan.recompute,
                codecs=plan.codecs,
                variant=plan.variant,
            ),
            moves=[asdict(move) for move in report.moves],
            replans=[asdict(replan) for replan in report.replans],
        )
        return self._spent(
            device,
            plan.round_number,
            self._works_of(stretches),
            traffic=traffic,
            edges=plan.route.edges(),
        ).seconds

    def step_seconds(
        self, plan: ClientPlan, route: Route, recompute: RecomputePlan
    ) -> float:
        """Say how long a step takes on a route, from the costs of the units alone."""
        device = self.devices[int(plan.client_key)]
        if device.times is not None:
            batch_size = self.profile.batch_size
            return device.times.step_seconds(plan.variant.name, batch_size)
        return step_seconds(
            self._work(route, recompute, plan.codecs, variant=plan.variant),
            flops_per_second=true_flops_per_second(device, plan.round_number),
            link=link_to(device, _first_edge(route), plan.round_number),
            edge_flops_per_second=self.edge_flops_per_second,
            edge_links=links_along(route.edges(), self.edges),
        )

    def spent(self, row: ClientRow) -> Spent:
        """Say what a row of a journal took; nothing if no step was made.

        Of a variant, what crosses between edges counts as the whole model's.
        """
        if row.num_steps == 0:
            return NOTHING
        device = self.devices[int(row.client_key)]
        if device.times is not None:
            return self._measured(device, row.variant, row.num_steps)
        # A row with FLOPs of its own is of a smaller model: a variant along a route,
        # or else all of it at the device.
        is_submodel = row.step_flops is not None and not row.variant
        planned = Stretch(
            num_steps=row.num_steps,
            route=Route.whole() if is_submodel else route_of(row.route),
            recompute=recompute_of(row.recompute),
            codecs=tuple(map(codec_from_text, row.codecs)),
        )
        traffic = Traffic(
            server_down=row.bytes_down,
            server_up=row.bytes_up,
            edge_down=row.edge_bytes_down,
            edge_up=row.edge_bytes_up,
        )
        stretches = stretches_of(planned, moves=row.moves, replans=row.replans)
        works = self._works_of(stretches)
        if row.step_flops is not None:
            own, edges = row.step_flops, row.edge_step_flops
            works = [
                (n, replace(work, device_flops=own, edge_flops=edges))
                for n, work in works
            ]
        return self._spent(
            device,
            row.round,
            works,
            traffic=traffic,
            edges=planned.route.edges(),
        )

    def _measured(self, device: FleetDevice, variant: str, num_steps: int) -> Spent:
        """Add up what was measured on a device, which trains without an edge."""
        times = device.times
        if times is None or (variant or WHOLE.name) not in times.example_seconds:
            raise ExperimentError(
                f"nobody measured how long {device.name} takes for {variant!r}."
            )
        each = times.step_seconds(variant, self.profile.batch_size)
        seconds, radio = num_steps * each, times.transfer_seconds[variant or WHOLE.name]
        return Spent(
            device_seconds=seconds,
            radio_seconds=radio,
            device_joules=seconds * device.watts.compute + radio * device.watts.radio,
        )

    def round_seconds(self, client: int, variant: str, num_examples: int) -> float:
        """Say how long a round would take a device whose times were measured."""
        num_steps = -(-num_examples // self.profile.batch_size)
        return self._measured(self.devices[client], variant, num_steps).seconds

    def _works_of(self, stretches: Sequence[Stretch]) -> list[tuple[int, Work]]:
        return [
            (
                s.num_steps,
                self._work(s.route, s.recompute, s.codecs, variant=s.variant),
            )
            for s in stretches
        ]

    def _spent(
        self,
        device: FleetDevice,
        round_number: int,
        works: Sequence[tuple[int, Work]],
        *,
        traffic: Traffic,
        edges: Sequence[str],
    ) -> Spent:
        """Add up a client's part of a round."""
        edge = edges[0] if edges else None
        far, near = (link_to(device, at, round_number) for at in (None, edge))
        links = links_along(edges, self.edges)
        device_seconds = sum(
            num_steps * work.device_flops for num_steps, work in works
        ) / true_flops_per_second(device, round_number)
        edge_seconds = (
            sum(num_steps * work.edge_flops for num_steps, work in works)
            / self.edge_flops_per_second
        )
        num_exchanges = sum(n * work.num_exchanges for n, work in works)
        radio_seconds = (
            traffic.server_down / far.down_bytes_per_second
            + traffic.server_up / far.up_bytes_per_second
            + traffic.edge_down / near.down_bytes_per_second
            + traffic.edge_up / near.up_bytes_per_second
        )
        return Spent(
            device_seconds=device_seconds,
            edge_seconds=edge_seconds,
            radio_seconds=radio_seconds,
            waiting_seconds=2 * far.latency_seconds
            + 2 * near.latency_seconds * num_exchanges,
            hop_seconds=sum(n * hop_seconds(work, links) for n, work in works),
            device_joules=device_seconds * device.watts.compute
            + radio_seconds * device.watts.radio,
            edge_joules=edge_seconds * self.edge_watts,
        )

    def _work(
        self,
        route: Route,
        recompute: RecomputePlan = KEEP_ALL,
        codecs: tuple[Codec, ...] = (),
        *,
        variant: Variant = WHOLE,
    ) -> Work:
        key = route, recompute, codecs, variant.leading()
        if key not in self._works:
            coded = route_profile(self._profile_of(variant), route, codecs)
            self._works[key] = work_of(coded, route, recompute)
        return self._works[key]

    def _profile_of(self, variant: Variant) -> ChainProfile:
        if variant == WHOLE:
            return self.profile
        if self.costs is None:
            raise ExperimentError(
                f"this clock does not know what {variant.name!r} costs: give it costs."
            )
        return self.costs(variant)


def stretches_of(
    planned: Stretch,
    *,
    moves: Sequence[Mapping[str, Any]],
    replans: Sequence[Mapping[str, Any]],
) -> list[Stretch]:
    """Divide a round where its cut moves or its recompute plan changes."""
    found, current = [], planned
    begun = 0
    changes = sorted([*moves, *replans], key=lambda change: int(change["step"]))
    for change in changes:
        step, after = int(change["step"]), change["after"]
        if step > begun:
            found.append(replace(current, num_steps=step - begun))
            begun = step
        if isinstance(after, str):
            current = replace(current, recompute=recompute_of(after))
        else:
            current = replace(current, route=current.route.with_first_cut(after))
    if planned.num_steps > begun:
        found.append(replace(current, num_steps=planned.num_steps - begun))
    return found


def true_flops_per_second(device: FleetDevice, round_number: int) -> float:
    """Say how fast a device really is in a round."""
    declared = device.traits.flops_per_second or NOMINAL_FLOPS_PER_SECOND
    return declared * device.speed_in(round_number)


def link_to(device: FleetDevice, edge: str | None, round_number: int) -> Link:
    """Say what a device's link to an edge, or to the server, really gives in a round.

    Latencies stay.
    """
    home = device.traits.link or NOMINAL_LINK
    link = home if edge is None else device.traits.edge_links.get(edge, home)
    speed = device.link_speed_in(round_number)
    return replace(
        link,
        up_bytes_per_second=link.up_bytes_per_second * speed,
        down_bytes_per_second=link.down_bytes_per_second * speed,
    )


def _first_edge(route: Route) -> str | None:
    """Name the only place that a device exchanges steps with."""
    edges = route.edges()
    return edges[0] if edges else None
