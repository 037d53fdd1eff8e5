"""Sampling: who is asked in a round, the same clients whatever the method.

Flower's strategies draw node ids, which are random in every run, from Python's global
generator. Here the clients are drawn by their keys and the experiment's seed, as
``SmartSplit`` draws them.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import final

from flwr.serverapp import Grid

from flwr_smartsplit.flower.journal.rows import Row, failure_row, skipped_row
from flwr_smartsplit.flower.registry import Fleet, Member
from flwr_smartsplit.flower.serde.records import message_dialect
from flwr_smartsplit.plan.selection.selection import NOT_SAMPLED, sample_clients
from flwr_smartsplit.train.rng import derived_seed
from flwr_smartsplit.types import Failure
from simulations.experiments.experiment import Experiment
from simulations.experiments.rows import TRAIN

TIMEOUT_SECONDS = 600.0
MIN_CLIENTS = 2
"""Fewest clients that Flower's strategies ask in a round, unless told otherwise."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The clients of one round, in client_key order.

    Parameters
    ----------
    chosen, left_out : dict[str, Member]
        Who is asked, and who is not, by client_key.
    failures : list[Failure]
        Who could not be asked.
    """

    chosen: dict[str, Member]
    left_out: dict[str, Member]
    failures: list[Failure]

    def rows(self, server_round: int) -> Iterator[Row]:
        """Make the journal's rows of those who are not asked."""
        for member in self.left_out.values():
            yield skipped_row(member.profile, NOT_SAMPLED, server_round)
        for failure in self.failures:
            yield failure_row(failure, server_round, TRAIN)


@final
class Sampler:
    """Draw each round's clients, as many as FedAvg would ask.

    Parameters
    ----------
    experiment : Experiment
        Says how many clients there are, which share of them is asked, and the seed.
    """

    def __init__(self, experiment: Experiment) -> None:
        self._experiment = experiment
        self._fleet = Fleet(message_dialect(), timeout_seconds=TIMEOUT_SECONDS)
        self._key_of_node: dict[int, str] = {}

    def draw(self, server_round: int, grid: Grid) -> Sample:
        """Wait until all clients are there, and draw among them.

        Parameters
        ----------
        server_round : int
            The round, counted from 1.
        grid : Grid
            Reaches the clients.
        """
        experiment = self._experiment
        while len(nodes := list(grid.get_node_ids())) < experiment.num_clients:
            time.sleep(0.1)
        members, failures = self._fleet.members(grid, nodes)
        self._key_of_node |= {m.node_id: key for key, m in members.items()}
        drawn = sample_clients(
            list(members),
            num_clients=max(int(len(members) * experiment.fraction_train), MIN_CLIENTS),
            rng=Random(derived_seed(experiment.seed, server_round, 1)),
        )
        return Sample(
            chosen={key: m for key, m in members.items() if key in drawn},
            left_out={key: m for key, m in members.items() if key not in drawn},
            failures=failures,
        )

    def client_key(self, node_id: int) -> str:
        """Name the client behind a node."""
        return self._key_of_node.get(node_id, f"node {node_id}")
