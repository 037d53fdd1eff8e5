"""Phones: a fleet drawn from measured phones and links.

Every number is either of a table or one of the constants below, which are
assumptions. ``docs/howto/fleets.md`` has them all with their sources.
"""

from dataclasses import dataclass
from math import inf

import numpy as np
from numpy.typing import NDArray

from flwr_smartsplit.types import DeviceTraits, Link
from simulations.experiments.errors import ExperimentError
from simulations.fleets.devices import Devices, FleetDevice, Needs
from simulations.fleets.phone_tables import measured_links, phone_groups

PIXEL_4_FLOPS_PER_SECOND = 2 * 569e6 / 14.0e-3
"""MobileNet 1.0 at 224 x 224 has 569 million multiply-adds; TensorFlow Lite runs it in
14.0 ms on four threads of a Pixel 4."""

PIXEL_4_SCORE = 3212
"""Of the same phone, in the list of phones."""

TRAINING_FRACTION = 0.25
"""Speed of training over that of inference."""

FLOPS_PER_SECOND_PER_POINT = (
    TRAINING_FRACTION * PIXEL_4_FLOPS_PER_SECOND / PIXEL_4_SCORE
)

BYTES_PER_SECOND_PER_KB = 1000 / 8
"""The list of links says kb/s; taken as kilobits, the slower reading."""

LATENCY_SECONDS = 0.035

APP_FRACTION = (0.25, 0.5)
"""Least and most share of a phone's memory that an app may take."""

LEAST_FREE_FRACTION = 0.85
"""What is left of the budget while the phone is busy with other things."""

NUM_LEVELS, STEPS_PER_LEVEL = 8, 3
"""Free memory goes through so many levels, and stays at each for some steps."""

NUM_SPEEDS, SPEED_DEVIATION = 16, 0.2
"""True speed over the declared one, from round to round: spread of its logarithm."""

BUSY_FRACTION, BUSY_SPEED = 0.1, 0.5
"""Share of the rounds in which a phone is in use, and its speed then."""

GIGABYTE = 10**9
DECIMALS = 3

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Phones:
    """A fleet of phones, the least memory first.

    Raises
    ------
    ExperimentError
        If the share leaves nobody weak, or nobody strong, or a phone would be faster
        than it is.
    """

    # Budgets are scaled so that this share of the phones cannot hold the model; None
    # leaves the phones' own bytes, which only large models fill
    weak_fraction: float | None = 0.5
    edge_link: Link | None = None  # To all edges; None: as to the server
    is_steady: bool = False  # Whether free memory and speed stay as they are declared
    slowdown: float = 1.0  # So many times slower than measured is every phone
    # Spread of the logarithm of all links' true rates over the declared ones, from
    # round to round
    link_deviation: float = 0.0

    def __post_init__(self) -> None:
        """Refuse a share that is none."""
        if self.weak_fraction is not None and not 0 < self.weak_fraction < 1:
            raise ExperimentError(
                f"weak_fraction is {self.weak_fraction}: give a share between 0 and 1, "
                "or None for the phones' own bytes."
            )
        if not 1 <= self.slowdown < inf:
            raise ExperimentError(
                f"slowdown is {self.slowdown}: give a number of at least 1."
            )
        if not 0 <= self.link_deviation < inf:
            raise ExperimentError(
                f"link_deviation is {self.link_deviation}: give a number of at least 0."
            )

    def __call__(self, needs: Needs, num_clients: int, seed: int) -> Devices:
        """Draw the phones."""
        rng = np.random.default_rng(seed)
        groups = phone_groups()
        counts = np.array([group.num_phones for group in groups])
        kinds = rng.choice(len(groups), num_clients, p=counts / counts.sum())
        ram_gb = np.array([group.ram_gb for group in groups])[kinds]
        scores = np.array([group.float_score for group in groups])[kinds]
        memory = ram_gb * GIGABYTE * rng.uniform(*APP_FRACTION, num_clients)
        down, up = link_rates(rng, num_clients)
        free, speed = self._wobble(rng, num_clients)
        link_speed = self._link_traces(num_clients, seed)
        flops = scores * FLOPS_PER_SECOND_PER_POINT / self.slowdown
        budgets = self._budgets(memory, needs)
        return tuple(
            FleetDevice(
                name=f"phone with {ram_gb[phone]:g} GB",
                budget_bytes=int(budgets[phone]),
                traits=DeviceTraits(
                    flops_per_second=float(flops[phone]),
                    link=Link(
                        up_bytes_per_second=float(up[phone]),
                        down_bytes_per_second=float(down[phone]),
                        latency_seconds=LATENCY_SECONDS,
                    ),
                    edge_links=self._edge_links(needs),
                ),
                free_memory=free[phone],
                speed=speed[phone],
                link_speed=link_speed[phone],
            )
            for phone in np.argsort(budgets, kind="stable")
        )

    def _budgets(self, memory: Floats, needs: Needs) -> Floats:
        """Scale so that the model's peak lies between the weak and the strong."""
        if self.weak_fraction is None:
            return memory
        num_weak = int(self.weak_fraction * len(memory))
        num_weak = min(max(num_weak, 1), len(memory) - 1)
        around = np.sort(memory)[num_weak - 1 : num_weak + 1]
        middle = float(np.sqrt(around.prod()))
        return memory * (needs.whole_peak_bytes / middle)

    def _edge_links(self, needs: Needs) -> dict[str, Link]:
        if self.edge_link is None:
            return {}
        return dict.fromkeys(needs.edges, self.edge_link)

    def _wobble(
        self, rng: np.random.Generator, num_clients: int
    ) -> tuple[list[tuple[float, ...]], list[tuple[float, ...]]]:
        """Draw free memory by step, the first 1, and speed by round."""
        levels = rng.uniform(LEAST_FREE_FRACTION, 1.0, (num_clients, NUM_LEVELS))
        levels[:, 0] = 1.0
        free = np.repeat(levels, STEPS_PER_LEVEL, axis=1)
        shape = num_clients, NUM_SPEEDS
        speed = np.exp(rng.normal(0.0, SPEED_DEVIATION, shape))
        speed[rng.random(shape) < BUSY_FRACTION] *= BUSY_SPEED
        if self.is_steady:
            return [()] * num_clients, [()] * num_clients
        return _rows(free), _rows(speed)

    def _link_traces(self, num_clients: int, seed: int) -> list[tuple[float, ...]]:
        """Draw links' rates by round, from numbers of their own: the rest stays."""
        if not self.link_deviation:
            return [()] * num_clients
        rng = np.random.default_rng([seed, 1])
        shape = num_clients, NUM_SPEEDS
        return _rows(np.exp(rng.normal(0.0, self.link_deviation, shape)))


def link_rates(rng: np.random.Generator, num_clients: int) -> tuple[Floats, Floats]:
    """Draw links; return their rates down and up, in bytes per second.

    Each is a draw from one measured user's link: log-normal, since no rate is below
    0, with the mean and the deviation that were measured.
    """
    links = measured_links()
    chosen = rng.integers(len(links), size=num_clients)
    down = _log_normal(rng, [(n.down_mean, n.down_deviation) for n in links], chosen)
    up = _log_normal(rng, [(n.up_mean, n.up_deviation) for n in links], chosen)
    return down * BYTES_PER_SECOND_PER_KB, up * BYTES_PER_SECOND_PER_KB


def _log_normal(
    rng: np.random.Generator,
    moments: list[tuple[float, float]],
    chosen: NDArray[np.int64],
) -> Floats:
    """Draw values with these means and standard deviations."""
    mean, deviation = np.array(moments)[chosen].T
    variance = np.log1p((deviation / mean) ** 2)
    return np.asarray(
        rng.lognormal(np.log(mean) - variance / 2, np.sqrt(variance)), np.float64
    )


def _rows(values: Floats) -> list[tuple[float, ...]]:
    return [tuple(row) for row in values.round(DECIMALS).tolist()]
