"""How rounds grow: who takes part, over which edges, and how it is told."""

from dataclasses import replace

import pytest

from flwr_smartsplit.edge.hosts.local import LocalEdge
from flwr_smartsplit.flower.serde.records import plan_from_config
from simulations.benchmarks.rounds import growth
from simulations.experiments.local_grid import LocalGrid


@pytest.fixture
def sent(monkeypatch):
    """Run in this process; note to whom each message goes, and by which edge."""
    seen = []

    class Grid(LocalGrid):
        def send_and_receive(self, messages, **options):
            messages = list(messages)
            if any(m.metadata.message_type == "train" for m in messages):
                seen.append(messages)
            return super().send_and_receive(messages, **options)

    def simulate(app, main, *, num_clients, num_workers):
        assert num_workers == 2
        main(Grid([app] * num_clients))

    edges = LocalEdge(name="one"), LocalEdge(name="two")
    monkeypatch.setattr(growth, "EDGES", edges)
    monkeypatch.setattr(growth, "simulate_app", simulate)
    return seen


def test_each_number_of_clients_trains_over_one_edge_and_over_two(sent):
    job, ended = replace(growth.LIGHT, batch_size=2, num_batches=1), []
    found = growth.measure(job, [2, 4], 2, 1, on_round=lambda: ended.append(1))
    assert [(g.num_clients, g.num_workers, g.num_edges) for g in found] == [
        *((2, 2, 1), (2, 2, 2)),
        *((4, 2, 1), (4, 2, 2)),
    ]
    assert all(grown.seconds > 0 for grown in found)
    assert len(ended) == 8
    assert [len(messages) for messages in sent] == [2] * 4 + [4] * 4
    assert list(map(edges_of, sent)) == [{"one"}, {"one", "two"}] * 4


def edges_of(messages):
    """Say over which edges the clients of a round are split."""
    configs = [c for m in messages for c in m.content.config_records.values()]
    plans = filter(None, map(plan_from_config, configs))
    return {place for plan in plans for place in plan.route.places[1:]}


@pytest.mark.parametrize("most", [10, 100, 300])
def test_as_many_take_part_as_the_table_says(most):
    """Flower rounds a fraction down."""
    assert [int(most * growth.share_of(n, most)) for n in range(1, most + 1)] == list(
        range(1, most + 1)
    )


def test_a_table_says_how_much_faster_two_edges_are():
    facts = {"num_clients": 10, "num_workers": 2}
    found = [
        growth.Grown(**facts, num_edges=edges, seconds=seconds)
        for edges, seconds in ((1, 3.0), (2, 2.0))
    ]
    table = growth.growth_table("a title", found)
    cells = [list(column.cells) for column in table.columns]
    assert cells == [["10"], ["2"], ["3.00"], ["300.0"], ["2.00"], ["200.0"], ["1.50x"]]
