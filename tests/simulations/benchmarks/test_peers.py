"""The benchmark beside peers: the same work for all, and what is counted of it."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch

from flwr_smartsplit import Route
from flwr_smartsplit.edge.hosts.local import LocalEdge
from flwr_smartsplit.flower.serde.records import from_array_record
from flwr_smartsplit.split.build import build_chain
from simulations.benchmarks.peers import __main__ as peers
from simulations.benchmarks.peers import jobs, work
from simulations.benchmarks.peers.bare_split import bare_split
from simulations.benchmarks.peers.splitfed import SplitFed
from simulations.benchmarks.process_tree import tree_times
from simulations.benchmarks.rounds.driven_rounds import close, timed_round
from simulations.experiments.local_grid import LocalGrid

JOB = jobs.Job(model="small", input_shape=(1, 8, 8), batch_size=4, num_batches=2)


@pytest.fixture(autouse=True)
def _edges_in_process(monkeypatch):
    monkeypatch.setattr(peers, "EDGES", (LocalEdge(),))


def after_a_round(way):
    """Train two clients for a round; return the model."""
    driven = peers._rounds(
        way, JOB, LocalGrid([jobs.build_app(JOB, peers.EDGES)] * 2), 2
    )
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
    choose = jobs.split_at

    def note(job, request):
        route = choose(job, request)
        seen.append((route, len(request.profile.units)))
        return route

    monkeypatch.setattr(peers, "split_at", note)
    after_a_round(peers.SPLIT)
    assert {route.cuts for route, size in seen} == {(round(0.25 * seen[0][1]),)}
    assert all(route != Route.whole() for route, _ in seen)


def test_what_is_counted_grows_with_work():
    before = tree_times()
    peers._loop(JOB, 40)
    user, _, _ = (b - a for a, b in zip(before, tree_times(), strict=True))
    assert user > 0
    spent = work.Spent(wall_ms=4.0, user_ms=2.0, system_ms=1.0, page_faults=3.0)
    twice = work.Spent(wall_ms=8.0, user_ms=4.0, system_ms=2.0, page_faults=0.0)
    found = {peers.LOOP: [spent], peers.FEDAVG: [twice], peers.WHOLE: [twice]}
    columns = [list(c.cells) for c in peers.table_of("digits", found).columns]
    assert columns[1] == ["3.00", "6.00", "6.00"]
    assert columns[4] == ["1.00", "2.00", "2.00"]
    assert columns[5] == ["0.50", "1.00", "1.00"]


def test_a_pause_is_as_long_as_a_step(monkeypatch):
    slept = []
    monkeypatch.setattr(jobs.time, "sleep", slept.append)
    peers._loop(JOB, 2)
    assert slept == []
    peers._loop(JOB, 2, pauses=True)
    assert len(slept) == 2 * JOB.num_batches
    assert all(seconds > 0 for seconds in slept)


SCRIPT = """
import no_such_package  # As the real one needs data and more
count = 0
seen = []
data = no_such_package.read()

def train_server(outputs, labels, epoch, epochs, index, num_batches):
    global count
    count += 1
    seen.append((index, num_batches))
    loss = criterion(net_model_server[index](outputs), labels)
    loss.backward()
    return outputs.grad

def FedAvg(states):
    return {k: sum(s[k] for s in states) / len(states) for k in states[0]}

class Client:
    def __init__(self):
        raise AssertionError("it would read data")

    def train(self, net):
        step = torch.optim.Adam(net.parameters(), lr=self.lr)
        for images, labels in self.ldr_train:
            outputs = net(images.to(self.device))
            sent = outputs.clone().detach().requires_grad_(True)
            size = len(self.ldr_train)
            back = train_server(sent, labels, 0, self.local_ep, self.idx, size)
            outputs.backward(back)
            step.step()
            print(f"client {self.idx}")
        return net.state_dict()
"""


def test_a_copied_script_trains_the_same_networks(tmp_path, capsys):
    """Its functions run; its data, its networks and what it prints do not matter."""
    path = tmp_path / "script.py"
    path.write_text(SCRIPT, "utf-8")
    batches = work.noise((3, 32, 32), batch_size=2, count=2)
    peer = SplitFed(path, 3, batches)
    before = [p.detach().clone() for p in peer._front.parameters()]
    peer.round()
    assert capsys.readouterr().out == ""
    assert peer._names["count"] == 6
    assert peer._names["seen"] == [(i, 2) for i in range(3) for _ in range(2)]
    after = list(peer._front.parameters())
    assert not any(map(torch.equal, before, after))


def test_the_halves_are_those_of_the_split_client():
    """Cut where ours is, so that the same crosses, and nobody trains more."""
    front, back = work.resnet18_halves()
    job = jobs.JOBS["resnet18"]
    chain = build_chain(jobs.task_of(job))
    cut = max(1, round(job.cut_share * len(chain)))
    head = chain.segment(0, cut).state_dict()
    sizes = [sum(t.numel() for t in x.values()) for x in (head, front.state_dict())]
    assert sizes[0] == sizes[1]
    boundary = front(torch.zeros(2, 3, 32, 32))
    assert boundary.shape == (2, 64, 8, 8)
    assert back(boundary).shape == (2, 10)


def test_copies_are_compared_only_if_they_are_named(tmp_path):
    facts = {"job": "resnet18", "num_clients": 2, "num_rounds": 1, "num_workers": 1}
    ours = [peers.FEDAVG, peers.WHOLE, peers.SPLIT]
    loops = [peers.LOOP, peers.PAUSING, peers.BARE]
    assert peers.Plan(**facts).ways == [*loops, *ours]
    both = peers.Plan(**facts, splitfed=tmp_path, slower=tmp_path).ways
    assert both == [*loops, peers.SPLITFED, peers.SLOWER, *ours]


@pytest.mark.slow
def test_two_bare_processes_train_what_the_loop_trains():
    """The same losses, so that it is the same work that is timed."""
    torch.manual_seed(0)
    halves = jobs.halves_of(JOB)
    whole = torch.nn.Sequential(*deepcopy(halves.front), *deepcopy(halves.tail))
    losses = [jobs.train_plainly(whole, JOB)]
    losses.append(jobs.train_plainly(whole, JOB))
    with bare_split(halves, jobs.batches_of(JOB)) as train:
        assert [train(), train()] == losses
    stale = replace(halves, front=deepcopy(halves.front))
    with bare_split(stale, jobs.batches_of(JOB)) as train:  # Planted: an old tail
        assert train() != losses[0]
