"""An edge's host places it on a torch device, or says at once why it cannot."""

import pytest

from flwr_smartsplit import RayEdge
from flwr_smartsplit.edge.hosts import local
from flwr_smartsplit.edge.hosts.local import LocalEdge
from flwr_smartsplit.errors import InvalidTask
from flwr_smartsplit.train.torch_device import CPU
from tests.tasks import TASK


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"device": "cuda"}, "device='cuda' with num_gpus=0"),
        ({"num_gpus": 1}, "device='cpu' with num_gpus=1"),
        ({"device": "cuda", "num_gpus": 2}, "num_gpus is 2"),
        ({"device": "cuda", "num_gpus": -1}, "num_gpus is -1"),
    ],
)
def test_a_device_and_a_share_go_together(facts: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RayEdge(**facts)


def test_an_edge_is_described_where_there_is_no_gpu() -> None:
    """The strategy's process need not have what the edge's has."""
    RayEdge(device="cuda", num_gpus=0.5)
    LocalEdge(device="cuda:7")


def test_an_edge_starts_on_its_device_or_not_at_all() -> None:
    edge = LocalEdge(device="cpu:0")
    address = edge.start(TASK)
    try:
        assert local._edges[address][0]._private._device == CPU
    finally:
        edge.stop(address)
    with pytest.raises(InvalidTask, match="'cuda:99'"):
        LocalEdge(device="cuda:99").start(TASK)
