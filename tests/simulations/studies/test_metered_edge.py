"""MeteredEdge: it counts what the service makes, and nothing of its callers."""

import pytest
import torch

from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.tensors import state_digest
from flwr_smartsplit.errors import EdgeUnreachable
from simulations.studies.scale.metered_edge import MeteredEdge
from tests.tasks import SEED, TASK, initial_state, tiny_chain


def test_only_sessions_count(tmp_path):
    """Their parameters and buffers, from the opening on."""
    state, chain = initial_state(), tiny_chain()
    edge = MeteredEdge(TASK, tmp_path)
    send = edge.connect(edge.name).send
    send(wire.HoldState(state_digest(state), state))
    torch.zeros(1000)
    assert edge.meter.peak_bytes == 0
    send(
        wire.OpenSession(
            session="s",
            place=edge.name,
            round_number=1,
            client_key="c",
            start=4,
            stop=len(chain),
            state_digest=state_digest(state),
            seed=SEED,
            num_threads=1,
        )
    )
    tail = chain.state_names(4, len(chain))
    assert edge.meter.peak_bytes == sum(state[name].nbytes for name in tail)
    assert edge.disk_bytes == 0


def test_it_has_one_address(tmp_path):
    edge = MeteredEdge(TASK, tmp_path)
    assert edge.start(TASK) == edge.name
    edge.stop(edge.name)
    with pytest.raises(EdgeUnreachable, match="no edge at 'elsewhere'"):
        edge.connect("elsewhere")
