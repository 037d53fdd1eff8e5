"""RayEdge: what settling promises holds when the edge's own process is killed."""

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import ray

from flwr_smartsplit import RayEdge, Route
from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.hosts import ray as ray_edge
from flwr_smartsplit.edge.hosts.edge import BytesTransport
from flwr_smartsplit.edge.hosts.unix_socket import UnixClient
from flwr_smartsplit.errors import EdgeUnreachable, StaleSession
from flwr_smartsplit.types import EDGE, ClientReply
from tests import test_defence
from tests.faults import tail_files
from tests.flower import test_codecs
from tests.server.one_round import ROUND, fedavg, settle, start
from tests.tasks import TASK, differences

pytestmark = pytest.mark.ray

ROUTES = (Route.split(2), Route.split(4), Route.whole(), Route.split(7))


def incarnation_of(transport: wire.Transport, access: str) -> str | None:
    """Ask an edge who it is; None while it starts, which is long on a busy machine."""
    try:
        return transport.send(wire.IsHeld("nothing", access=access)).incarnation
    except EdgeUnreachable:
        return None


def kill_and_wait(transport: wire.Transport, address: str, access: str) -> None:
    """Kill the actor, and wait until it lives again and knows the run."""
    actor = ray.get_actor(address, namespace=ray_edge._NAMESPACE)
    first = incarnation_of(transport, access)
    assert first is not None
    ray.kill(actor, no_restart=False)
    while incarnation_of(transport, access) in {None, first}:
        time.sleep(0.05)  # The old process may answer for a moment, then none does.


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_tails_sealed_before_the_process_was_killed_still_count(
    whole: Mapping[str, ClientReply], tmp_path: Path
) -> None:
    """A restarted actor commits what the dead one sealed; what it lost is dropped."""
    edge = RayEdge(spill_dir=str(tmp_path))
    pool, replies = start([edge], ROUTES)
    (folder,) = tmp_path.iterdir()
    try:
        address = folder.name.removeprefix("smartsplit-")
        transport = edge.connect(address)
        kill_and_wait(transport, address, pool._keys.access(address))
        settled = settle(replies, pool, ROUTES)
        assert sorted(settled.accepted) == ["c0", "c1", "c2", "c3"]
        assert settled.failures == ()
        assert settled.state is not None
        assert differences(settled.state, fedavg(whole)) == []

        (tail,) = tail_files(folder / pool._keys.run, f"{ROUND}.0/c1/{EDGE}")
        tail.unlink()
        settled = settle(replies, pool, ROUTES)
        assert [(f.client_key, f.kind) for f in settled.failures] == [
            ("c1", "edge_failed")
        ]
        assert settled.state is not None
        truth = fedavg({key: whole[key] for key in ("c0", "c2", "c3")})
        assert differences(settled.state, truth) == []

        with pytest.raises(StaleSession):
            transport.send(wire.Seal(f"{ROUND}.0/c0/{EDGE}", "an earlier life", 3))
    finally:
        pool.stop()
    assert not folder.exists()
    with pytest.raises(EdgeUnreachable, match="does not answer"):
        transport.send(wire.IsHeld("nothing"))
    with pytest.raises(EdgeUnreachable, match="not running in namespace"):
        edge.connect(address)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("run", [test_defence, test_codecs])
def test_a_run_is_the_same_over_ray(run: ModuleType) -> None:
    """What is drawn comes from the devices, whichever process the edge is."""
    assert run.differences_over(RayEdge()) == []


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("is_near", [True, False])
def test_who_is_near_talks_over_a_socket(
    is_near: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """All others over Ray; here, since the socket's path would be too long."""
    parent = tmp_path_factory.mktemp("n") / ("" if is_near else "x" * 120)
    edge = RayEdge(spill_dir=str(parent))
    address = edge.start(TASK)
    try:
        transport: Any = edge.connect(address)
        carrier = transport.inner.carry.__self__
        assert carrier.near._path.exists() == is_near
        asked = []

        class Handle:
            """Note what is asked over Ray."""

            def __getattr__(self, name: str) -> Any:
                asked.append(name)
                return getattr(carrier.actor, name)

        noting = BytesTransport(replace(carrier, actor=Handle()).carry)
        assert not noting.send(wire.IsHeld("nothing")).is_held
        assert asked == ([] if is_near else ["handle"])
    finally:
        edge.stop(address)
    with pytest.raises(EdgeUnreachable, match="does not answer"):
        transport.send(wire.IsHeld("nothing"))


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_an_answer_that_is_lost_is_given_again_over_ray(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every third connection breaks when the edge has answered: each step counts once.

    The edge lives on, and repeats its answers.
    """
    ask, asked, lost = UnixClient.ask, [0], []

    def losing(self: UnixClient, pieces: Any, *, timeout_seconds: float) -> Any:
        reply = ask(self, pieces, timeout_seconds=timeout_seconds)
        asked[0] += 1
        if asked[0] % 3 == 0:
            lost.append(reply)
            raise ConnectionResetError("planted")
        return reply

    monkeypatch.setattr(UnixClient, "ask", losing)
    assert test_codecs.differences_over(RayEdge()) == []
    assert len(lost) > 5
