"""What tests of a round share: the truth about each client, and a Ray of their own."""

from collections.abc import Iterator

import pytest
import ray

from flwr_smartsplit import Route
from flwr_smartsplit.types import ClientReply
from tests.runtime.one_round import NUM_CLIENTS, train
from tests.tasks import initial_state


@pytest.fixture(scope="session")
def whole() -> dict[str, ClientReply]:
    """Train every client alone and unsplit."""
    routes = [Route.whole()] * NUM_CLIENTS
    return {reply.client_key: reply for reply in train(routes, initial_state())}


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """Start Ray for one test module, and end it."""
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
