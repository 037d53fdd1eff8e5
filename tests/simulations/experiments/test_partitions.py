"""Partitions: every example once, the same everywhere, own classes on the weak."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from simulations.experiments.errors import ExperimentError
from simulations.experiments.partitions import (
    MIN_EXAMPLES,
    Dirichlet,
    Iid,
    OwnLabels,
    Pathological,
    Shards,
    WithServer,
    topped_up,
)
from simulations.fleets.presets import weak_clients

ROOT = Path(__file__).parents[3]
NUM_CLIENTS = 12
LABELS = np.random.default_rng(7).integers(0, 10, size=600)
PARTITIONS = [
    Iid(),
    Dirichlet(alpha=0.1),
    Dirichlet(alpha=10.0),
    Pathological(classes_per_client=2),
    OwnLabels(num_own=5),
    OwnLabels(num_own=1),
    Shards(2),
]


def coverage_problems(shares, num_examples):
    """List the examples that are not held exactly once."""
    counts = np.bincount(np.concatenate(shares), minlength=num_examples)
    return np.flatnonzero(counts != 1).tolist()


def own_label_problems(shares, labels, num_own):
    """List the clients that hold a class they must not, or lack one they must."""
    problems = []
    for client, share in enumerate(shares):
        held = set(labels[share].tolist())
        own, shared = set(range(num_own)), set(range(num_own, 10))
        is_weak = client in weak_clients(len(shares))
        if (held & own != own) if is_weak else (held & own):
            problems.append(client)
        elif held & shared != shared:
            problems.append(client)
    return problems


def digest(shares):
    return hashlib.sha256(b"|".join(share.tobytes() for share in shares)).hexdigest()


def divide(partition, seed=3):
    return partition.divide(LABELS, num_clients=NUM_CLIENTS, seed=seed)


@pytest.mark.parametrize("partition", PARTITIONS, ids=repr)
def test_every_example_is_held_by_exactly_one_client(partition):
    shares = divide(partition)

    assert len(shares) == NUM_CLIENTS
    assert coverage_problems(shares, len(LABELS)) == []


def test_a_lost_and_a_doubled_example_would_be_noticed():
    first, *others = divide(Iid())

    assert coverage_problems([first[1:], *others], len(LABELS)) == [first[0]]
    assert coverage_problems([first, *others, first[:1]], len(LABELS)) == [first[0]]


@pytest.mark.parametrize("partition", PARTITIONS, ids=repr)
def test_the_seed_decides(partition):
    assert digest(divide(partition)) == digest(divide(partition))
    assert digest(divide(partition)) != digest(divide(partition, seed=4))


@pytest.mark.slow
def test_another_process_divides_alike():
    """Ray's workers must not see other clients than the driver does."""
    program = (
        "from tests.simulations.experiments.test_partitions import *; "
        "print([digest(divide(partition)) for partition in PARTITIONS])"
    )
    there = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )

    assert there.stdout.strip() == str([digest(divide(p)) for p in PARTITIONS])


def test_own_classes_live_on_the_weak_half_only_and_the_others_on_everybody():
    assert own_label_problems(divide(OwnLabels(num_own=5)), LABELS, 5) == []


def test_a_strong_client_with_an_own_class_would_be_noticed():
    shares = divide(OwnLabels(num_own=5))
    shares[0], shares[-1] = shares[-1], shares[0]

    assert own_label_problems(shares, LABELS, 5) == [0, NUM_CLIENTS - 1]
    assert own_label_problems(divide(Iid()), LABELS, 5) != []


def test_iid_shares_differ_by_one_example_at_most():
    sizes = {len(share) for share in divide(Iid())}

    assert sizes == {50}


def test_pathological_clients_hold_so_many_classes_at_most():
    held = [
        len(set(LABELS[s].tolist())) for s in divide(Pathological(classes_per_client=2))
    ]

    assert max(held) == 2


def test_two_shards_are_two_classes_or_a_border_between_two():
    """600 examples in 24 shards of 25: a class has 60, so two borders each."""
    shares = divide(Shards(2))
    held = [len(set(LABELS[share].tolist())) for share in shares]

    assert {len(share) for share in shares} == {50}
    assert max(held) <= 4 and np.mean(held) < 3
    assert np.mean([len(set(LABELS[s].tolist())) for s in divide(Iid())]) > 9


def test_what_the_server_holds_is_nobody_elses():
    partition = WithServer(clients=Shards(2), fraction=0.1, num_classes=5)
    servers, shares = partition.server_indices(LABELS, seed=3), divide(partition)

    assert len(servers) == 60
    assert len(set(LABELS[servers].tolist())) == 5
    assert coverage_problems([*shares, servers], len(LABELS)) == []
    assert coverage_problems(shares, len(LABELS)) == sorted(servers.tolist())
    others = partition.server_indices(LABELS, seed=4)
    assert set(others.tolist()) != set(servers.tolist())


def test_a_small_alpha_makes_clients_less_even_than_a_large_one():
    def spread(alpha):
        return np.std([len(share) for share in divide(Dirichlet(alpha=alpha))])

    assert spread(0.1) > 2 * spread(10.0)


def test_a_hundred_uneven_clients_all_get_enough():
    """Drawing again until everybody has enough would never end here."""
    labels = np.random.default_rng(0).integers(0, 10, size=6000)

    shares = Dirichlet(alpha=0.1).divide(labels, num_clients=100, seed=0)

    assert min(map(len, shares)) >= MIN_EXAMPLES
    assert coverage_problems(shares, len(labels)) == []


def test_topping_up_takes_from_the_largest():
    shares = [np.arange(6), np.arange(6, 10), np.array([], np.int64)]

    mended = topped_up(shares, min_examples=3)

    assert [share.tolist() for share in mended] == [[0, 1, 2], [6, 7, 8, 9], [5, 4, 3]]


@pytest.mark.parametrize(
    ("partition", "words"),
    [
        (OwnLabels(num_own=10), "choose 1..9"),
        (Pathological(classes_per_client=11), "at most 10 classes each"),
        (Shards(51), "51 shards for each of 12 clients"),
        (Shards(0), "at least 1 shard each"),
        (WithServer(clients=Iid(), fraction=0.6), "the server cannot hold 0.6"),
        (WithServer(clients=Iid(), num_classes=11), "from 11 of 10 classes"),
    ],
)
def test_an_impossible_division_says_what_would_be_possible(partition, words):
    with pytest.raises(ExperimentError, match=words):
        divide(partition)


@pytest.mark.parametrize("partition", [Iid(), Dirichlet(alpha=1.0), OwnLabels()])
def test_too_few_examples_are_an_error_that_says_so(partition):
    with pytest.raises(ExperimentError, match="more examples or fewer clients"):
        partition.divide(LABELS[:30], num_clients=40, seed=0)
