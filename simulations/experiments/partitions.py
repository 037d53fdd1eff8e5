"""Partitions: which client holds which training examples.

Flower's own partitioners do the dividing, on a table that holds nothing but the
labels, so no data are copied and no network is needed.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from datasets import Dataset
from flwr_datasets.partitioner import (
    DirichletPartitioner,
    IidPartitioner,
    Partitioner,
    PathologicalPartitioner,
)
from numpy.typing import NDArray

from simulations.experiments.errors import ExperimentError
from simulations.fleets.presets import weak_clients

Indices = NDArray[np.int64]
Labels = NDArray[np.int64]

MIN_EXAMPLES = 8
"""A client with fewer examples is given some of the largest client's."""


class Partition(Protocol):
    """A way to divide examples by their labels; frozen, so it can be a cache key."""

    def divide(self, labels: Labels, *, num_clients: int, seed: int) -> list[Indices]:
        """Return each client's indices into ``labels``, every index exactly once.

        Those that ``WithServer`` gives to the server are nobody else's.
        """


@dataclass(frozen=True, slots=True)
class Iid:
    """Everybody gets an equal share of a shuffled deck."""

    def divide(self, labels: Labels, *, num_clients: int, seed: int) -> list[Indices]:
        """Return each client's indices into ``labels``, every index exactly once."""
        deck = np.random.default_rng(seed).permutation(len(labels))
        return _divided(deck, labels, IidPartitioner(num_clients))


@dataclass(frozen=True, slots=True, kw_only=True)
class Dirichlet:
    """Each class is shared out by a Dirichlet draw; small ``alpha``, uneven clients.

    Too small clients are topped up from the largest ones: drawing again until nobody
    is small need not end (100 clients at 0.1: not in 1,000 tries).
    """

    alpha: float

    def divide(self, labels: Labels, *, num_clients: int, seed: int) -> list[Indices]:
        """Return each client's indices into ``labels``, every index exactly once."""
        partitioner = DirichletPartitioner(
            num_clients, "label", alpha=self.alpha, min_partition_size=0, seed=seed
        )
        shares = _divided(np.arange(len(labels)), labels, partitioner)
        return topped_up(shares, min_examples=MIN_EXAMPLES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pathological:
    """Each client holds so many classes and no others."""

    classes_per_client: int

    def divide(self, labels: Labels, *, num_clients: int, seed: int) -> list[Indices]:
        """Return each client's indices into ``labels``, every index exactly once."""
        num_classes = len(np.unique(labels))
        if num_clients < num_classes or self.classes_per_client > num_classes:
            raise ExperimentError(
                f"{num_clients} clients with {self.classes_per_client} classes each "
                f"cannot hold {num_classes} classes: take at least {num_classes} "
                f"clients and at most {num_classes} classes each."
            )
        partitioner = PathologicalPartitioner(
            num_clients,
            "label",
            self.classes_per_client,
            # Else a class that nobody drew is left out.
            class_assignment_mode="first-deterministic",
            seed=seed,
        )
        return _divided(np.arange(len(labels)), labels, partitioner)


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnLabels:
    """The first classes live on the weak clients only, the others on everybody.

    The setting in which leaving the weak clients out costs most, and by construction:
    a method without them never sees an example of their classes.
    """

    num_own: int = 5

    def divide(self, labels: Labels, *, num_clients: int, seed: int) -> list[Indices]:
        """Return each client's indices into ``labels``, every index exactly once."""
        num_classes = len(np.unique(labels))
        if not 0 < self.num_own < num_classes:
            raise ExperimentError(
                f"{self.num_own} of {num_classes} classes cannot be the weak clients' "
                f"own: choose 1..{num_classes - 1}."
            )
        deck = np.random.default_rng(seed).permutation(len(labels))
        is_own = labels[deck] < self.num_own
        num_weak = len(weak_clients(num_clients))
        own = _divided(deck[is_own], labels, IidPartitioner(num_weak))
        shared = _divided(deck[~is_own], labels, IidPartitioner(num_clients))
        strong = [np.empty(0, np.int64)] * (num_clients - num_weak)
        return [
            np.concatenate(parts) for parts in zip([*own, *strong], shared, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class Shards:
    """Examples are sorted by class and cut into equal shards, some for each client.

    The division of McMahan et al., 2017: with 2 shards, most clients have 2 classes.
    """

    per_client: int = 2

    def divide(self, labels: Labels, *, num_clients: int, seed: int) -> list[Indices]:
        """Return each client's indices into ``labels``, every index exactly once."""
        num_shards = num_clients * self.per_client
        if not 0 < num_shards <= len(labels):
            raise ExperimentError(
                f"{len(labels)} examples cannot be cut into {self.per_client} shards "
                f"for each of {num_clients} clients: take more examples, fewer "
                "clients, and at least 1 shard each."
            )
        rng = np.random.default_rng(seed)
        deck = rng.permutation(len(labels))
        by_class = deck[np.argsort(labels[deck], kind="stable")]
        shards = np.array_split(by_class, num_shards)
        dealt = rng.permutation(num_shards).reshape(num_clients, self.per_client)
        return [np.concatenate([shards[shard] for shard in hand]) for hand in dealt]


@dataclass(frozen=True, slots=True, kw_only=True)
class WithServer:
    """The server holds a share of the examples, of some classes; clients the rest."""

    clients: Partition  # How the rest is divided
    fraction: float = 0.1  # The server's share of all examples
    num_classes: int = 5  # How many classes it has, drawn by the seed

    def divide(self, labels: Labels, *, num_clients: int, seed: int) -> list[Indices]:
        """Return each client's indices into ``labels``, without the server's."""
        servers = self.server_indices(labels, seed=seed)
        rest = np.setdiff1d(np.arange(len(labels)), servers)
        shares = self.clients.divide(labels[rest], num_clients=num_clients, seed=seed)
        return [rest[share] for share in shares]

    def server_indices(self, labels: Labels, *, seed: int) -> Indices:
        """Return the server's indices into ``labels``."""
        rng, known = np.random.default_rng((seed, 1)), np.unique(labels)
        classes = rng.permutation(known)[: self.num_classes]
        deck = rng.permutation(len(labels))
        held = deck[np.isin(labels[deck], classes)]
        wanted = round(self.fraction * len(labels))
        if not 0 < wanted <= len(held) or not 0 < self.num_classes <= len(known):
            raise ExperimentError(
                f"the server cannot hold {self.fraction} of {len(labels)} examples, "
                f"from {self.num_classes} of {len(known)} classes: these have "
                f"{len(held)}. Take another share, or more classes."
            )
        return held[:wanted]


def topped_up(shares: Iterable[Indices], *, min_examples: int) -> list[Indices]:
    """Move examples from the largest clients until nobody has too few."""
    held = [share.tolist() for share in shares]
    total = sum(map(len, held))
    if total < min_examples * len(held):
        raise ExperimentError(
            f"{total} examples cannot give {len(held)} clients {min_examples} each: "
            f"take more examples or fewer clients."
        )
    for share in held:
        while len(share) < min_examples:
            share.append(max(held, key=len).pop())
    return [np.array(share, np.int64) for share in held]


def _divided(
    deck: Indices, labels: NDArray[np.int64], partitioner: Partitioner
) -> list[Indices]:
    """Let a partitioner of Flower's divide the examples of a deck, in its order."""
    partitioner.dataset = Dataset.from_dict(
        {"index": deck, "label": labels[deck]}
    ).with_format("numpy")
    try:
        shares: Sequence[Dataset] = [
            partitioner.load_partition(client)
            for client in range(partitioner.num_partitions)
        ]
    except (IndexError, ValueError) as error:
        raise ExperimentError(
            f"{type(partitioner).__name__} cannot divide {len(deck)} examples "
            f"({error}): take more examples or fewer clients."
        ) from error
    return [np.asarray(share["index"][:], np.int64) for share in shares]
