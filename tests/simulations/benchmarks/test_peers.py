"""The benchmark beside peers: the same work for all, and what is counted of it."""

import numpy as np
import pytest

from flwr_smartsplit import Route
from flwr_smartsplit.edge.hosts.local import LocalEdge
from flwr_smartsplit.flower.serde.records import from_array_record
from simulations.benchmarks.driven_rounds import close, timed_round
from simulations.benchmarks.peers import __main__ as peers
from simulations.benchmarks.peers import jobs
from simulations.experiments.local_grid import LocalGrid

JOB = jobs.Job(model="small", input_shape=(1, 8, 8), batch_size=4, num_batches=2)


@pytest.fixture(autouse=True)
def _edges_in_process(monkeypatch):
    edges = (LocalEdge(),)
    for module in (jobs, peers):
        monkeypatch.setattr(module, "EDGES", edges)


def after_a_round(way):
    """Train two clients for a round; return the model."""
    driven = peers._rounds(way, JOB, LocalGrid([jobs.build_app(JOB)] * 2), 2)
    timed_round(driven, 1)
    close(driven.strategy)
    return from_array_record(driven._arrays)


def test_all_ways_train_the_same():
    """But for the order in which a mean is added up; split and whole to the bit."""
    fedavg, whole, split = map(after_a_round, (peers.FEDAVG, peers.WHOLE, peers.SPLIT))
    before = JOB.state()
    for name, array in fedavg.items():
        np.testing.assert_allclose(whole[name], array, rtol=1e-4, atol=1e-6)
        assert np.array_equal(whole[name], split[name])
    assert any(not np.array_equal(before[name], whole[name]) for name in before)


def test_clients_are_cut_where_the_job_says(monkeypatch):
    """Planted: a job whose clients keep all but the last unit."""
    seen = []
    choose = peers._cut

    def note(job, request):
        route = choose(job, request)
        seen.append((route, len(request.profile.units)))
        return route

    monkeypatch.setattr(peers, "_cut", note)
    after_a_round(peers.SPLIT)
    assert {route.cuts for route, size in seen} == {(round(0.25 * seen[0][1]),)}
    assert all(route != Route.whole() for route, _ in seen)


def test_what_is_counted_grows_with_work():
    before = peers.tree_times()
    peers._loop(JOB, 40)
    user, _, _ = (b - a for a, b in zip(before, peers.tree_times(), strict=True))
    assert user > 0
    spent = peers.Spent(wall_ms=4.0, user_ms=2.0, system_ms=1.0, page_faults=3.0)
    twice = peers.Spent(wall_ms=8.0, user_ms=4.0, system_ms=2.0, page_faults=0.0)
    found = {peers.LOOP: [spent], peers.FEDAVG: [twice], peers.WHOLE: [twice]}
    columns = [list(c.cells) for c in peers.table_of("digits", found).columns]
    assert columns[1] == ["3.00", "6.00", "6.00"]
    assert columns[4] == ["1.00", "2.00", "2.00"]
    assert columns[5] == ["0.50", "1.00", "1.00"]
