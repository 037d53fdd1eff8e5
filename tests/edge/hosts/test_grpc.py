"""An edge on a network: who gets in, broken streams, restarts, and its end."""

import gc
import pickle
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.gate.gate import Terms
from flwr_smartsplit.edge.gate.run_keys import RunKeys, secret_digest
from flwr_smartsplit.edge.hosts import grpc as grpc_host
from flwr_smartsplit.edge.hosts.addresses import Address
from flwr_smartsplit.edge.hosts.door import Patience
from flwr_smartsplit.edge.hosts.grpc import METHOD, SERVICE, GrpcEdge, GrpcHost
from flwr_smartsplit.edge.hosts.parts import HEADER, divided
from flwr_smartsplit.edge.message_bytes import decode, encode
from flwr_smartsplit.errors import (
    EdgeError,
    EdgeFull,
    EdgeUnreachable,
    RefusedMessage,
    RefusedRequest,
    StaleSession,
)
from flwr_smartsplit.types import EDGE, EdgeProfile
from tests.edge.gate.federation import ADDRESS, DIGEST, Client, Strategy
from tests.edge.hosts.served import Authority, Served, serving
from tests.tasks import TASK

ADMIN = "the admin secret"
SHARED = Terms(admin_digest=secret_digest(ADMIN))
ONCE = {"patience_seconds": 0.0}


class Clock:
    """A clock that a test turns."""

    now = 0.0

    def __call__(self) -> float:
        """Tell the time."""
        return self.now


@dataclass
class Run:
    """A run at a served edge."""

    served: Served
    strategy: Strategy

    @classmethod
    def begin(cls, served: Served) -> "Run":
        """Begin a run, and hold its state."""
        strategy = Strategy.__new__(Strategy)
        strategy.keys = RunKeys()
        strategy._edge = served.connect()  # type: ignore[assignment]
        strategy.access = strategy.keys.access(ADDRESS)
        strategy._edge.send(strategy.keys.hello(ADDRESS, admin=ADMIN))
        strategy.hold()
        return cls(served, strategy)

    def client(self, number: int = 0) -> Client:
        """Make a client that has not opened yet."""
        opening = self.strategy.signed(number)
        return Client(self.served.connect(), opening, f"1.0/c{number}/{EDGE}")


def digest_of_undisturbed(folder: Path, num_steps: int) -> str:
    """Seal so many steps at an edge in which nothing happens."""
    with serving(folder, terms=SHARED) as served:
        client = Run.begin(served).client().open()
        for _ in range(num_steps):
            client.step()
        return client.seal().digest


def cut(served: Served) -> None:
    """Break all connections."""
    for visit in list(served.door._visits):
        visit.end()
    wait_for(lambda: not served.door._visits)


def wait_for(is_so: Callable[[], bool]) -> None:
    """Wait up to five seconds."""
    until = time.monotonic() + 5
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.01)


def raw(served: Served, *parts: bytes) -> Any:
    """Send parts as they are; return the edge's answer."""
    target = Address.read(served.address).target
    with grpc.insecure_channel(target) as channel:
        talk = channel.stream_stream(f"/{SERVICE}/{METHOD}")
        reply = b"".join(talk(iter(parts), timeout=5))
    return decode(reply[HEADER.size :])


# --- who gets in ----------------------------------------------------------------------


def test_only_who_knows_the_authority_gets_in_by_tls(tmp_path: Path) -> None:
    """A device has address and authority from its plan, and nothing else."""
    mine, other = (Authority.make(tmp_path / name) for name in ("mine", "other"))
    with serving(tmp_path / "edge", authority=mine) as served:
        assert not served.connect().send(wire.IsHeld(DIGEST)).is_held
        address = Address.read(served.address)
        host = GrpcHost(**ONCE)
        wrong = replace(address, roots=other.roots.read_bytes())
        with pytest.raises(EdgeUnreachable, match=r"is not the edge.*SSL_ERROR"):
            host.connect(str(wrong)).send(wire.IsHeld(DIGEST))
        plain = Address(address.target, False)
        with pytest.raises(EdgeUnreachable, match="does not answer"):
            host.connect(str(plain)).send(wire.IsHeld(DIGEST))


def test_an_edge_may_ask_for_a_certificate(tmp_path: Path) -> None:
    """One of its own authority; then nobody else can even say hello."""
    mine, other = (Authority.make(tmp_path / name) for name in ("mine", "other"))
    with serving(tmp_path / "edge", authority=mine, asks_clients=True) as served:
        assert not served.connect().send(wire.IsHeld(DIGEST)).is_held
        own, key = (path.read_bytes() for path in other.issue("thief"))
        for host in (GrpcHost(**ONCE), GrpcHost(certificate=own, key=key, **ONCE)):
            with pytest.raises(EdgeUnreachable, match="does not answer"):
                host.connect(served.address).send(wire.IsHeld(DIGEST))


def test_renewed_certificates_are_taken_at_once(tmp_path: Path) -> None:
    """Without a restart: the next connection is shown the new one."""
    old, new = (Authority.make(tmp_path / name) for name in ("old", "new"))
    with serving(tmp_path / "edge", authority=old) as served:
        assert not served.connect().send(wire.IsHeld(DIGEST)).is_held
        for path, fresh in zip(
            ("edge.pem", "edge.key"), new.issue("edge"), strict=True
        ):
            (old.folder / path).write_bytes(fresh.read_bytes())
        renewed = replace(Address.read(served.address), roots=new.roots.read_bytes())
        host = GrpcHost(**ONCE)
        assert not host.connect(str(renewed)).send(wire.IsHeld(DIGEST)).is_held
        with pytest.raises(EdgeUnreachable, match="is not the edge"):
            host.connect(served.address).send(wire.IsHeld(DIGEST))


def test_a_run_begins_with_the_admin_secret_only(tmp_path: Path) -> None:
    """Until then the edge answers nobody, and the run's end ends it."""
    with serving(tmp_path, terms=SHARED) as served:
        hello = RunKeys().hello(ADDRESS, admin="guess")
        with pytest.raises(RefusedRequest, match="the edge's admin secret"):
            served.connect().send(hello)
        with pytest.raises(RefusedRequest, match="for the strategy of a run"):
            served.connect().send(wire.IsHeld(DIGEST))
        run = Run.begin(served)
        client = run.client().open()
        client.step()
        folder = tmp_path / run.strategy.keys.run
        assert folder.is_dir()
        run.strategy.ask(wire.EndRun())
        assert not folder.exists()
        assert served.gate.load().num_runs == served.gate.load().num_sessions == 0
        with pytest.raises(StaleSession):
            client.step()
        with pytest.raises(RefusedRequest, match="EndRun is for the strategy"):
            run.strategy.ask(wire.EndRun())


def test_an_edge_says_what_it_offers_when_a_run_begins(tmp_path: Path) -> None:
    """So that the strategy plans with what there is."""
    profile = EdgeProfile(name=EDGE, memory_bytes=2**30, disk_bytes=2**31)
    with serving(tmp_path, profile=profile, terms=SHARED) as served:
        hello = RunKeys().hello(ADDRESS, admin=ADMIN)
        assert served.connect().send(hello) == wire.Welcome(2**30, 2**31)


def test_nobody_sends_more_than_his_part(tmp_path: Path) -> None:
    """A stranger's size is refused by its header; a client's by its plan."""
    with serving(tmp_path, terms=SHARED) as served:
        run = Run.begin(served)
        header = HEADER.pack(b"SmSpPart", 2**40)
        assert "1e+03 GiB" in str(raw(served, header)).replace("1.02e+03", "1e+03")
        assert "begins with" in str(raw(served, b"GET / HTTP/1.1\r\n\r\n"))
        assert "a part of 0 bytes" in str(raw(served, HEADER.pack(b"SmSpPart", 100)))
        state = b"".join(encode(wire.HoldState(DIGEST, {}))) + bytes(2**19)
        assert isinstance(raw(served, *divided([state])), RefusedMessage)
        client = run.client().open()
        client.step()
        large = replace(client.forward(), boundary=client.forward().boundary * 10**4)
        with pytest.raises(RefusedMessage, match="nothing of it was read"):
            client.edge.send(large)
        client.step()
        assert client.seal().num_steps == 2


def test_a_pickle_is_no_message(tmp_path: Path) -> None:
    """Neither side unpickles anything."""
    with serving(tmp_path) as served:
        answer = raw(served, *divided([pickle.dumps(wire.IsHeld(DIGEST))]))
    assert isinstance(answer, RefusedMessage)


def test_openings_are_limited_for_each_machine(tmp_path: Path) -> None:
    """Whoever tries more is told when to ask again; steps are not limited."""
    clock = Clock()
    patience = Patience(openings_per_second=1.0, clock=clock)
    with serving(tmp_path, terms=SHARED, patience=patience) as served:
        run = Run.begin(served)
        client = run.client().open()
        with pytest.raises(EdgeFull, match="opens 1 sessions a second") as raised:
            run.client(1).open()
        assert raised.value.retry_after_seconds == 1.0
        for _ in range(3):
            client.step()
        clock.now = 1.0
        run.client(1).open()


def test_strangers_who_say_nothing_are_sent_away(tmp_path: Path) -> None:
    """They take one of few places; strategy and clients stay."""
    clock = Clock()
    patience = Patience(idle_seconds=30.0, max_visits=3, clock=clock)
    with serving(tmp_path, terms=SHARED, patience=patience) as served:
        run = Run.begin(served)
        client = run.client().open()
        target = Address.read(served.address).target
        with grpc.insecure_channel(target) as channel:
            talk = channel.stream_stream(f"/{SERVICE}/{METHOD}")
            stranger = talk(iter(lambda: time.sleep(5), 0))
            wait_for(lambda: len(served.door._visits) == 3)
            with pytest.raises(EdgeFull, match="has 3 connections"):
                run.client(1).open()
            clock.now = 31.0
            served.door.tick()
            wait_for(lambda: not stranger.is_active())
        client.step()
        assert run.strategy.ask(wire.IsHeld(DIGEST)).is_held
        run.client(1).open()


# --- what breaks ----------------------------------------------------------------------


def test_a_broken_stream_costs_nothing(tmp_path: Path) -> None:
    """The client comes again, is known, and each step is done once."""
    truth = digest_of_undisturbed(tmp_path / "truth", 3)
    with serving(tmp_path / "edge", terms=SHARED) as served:
        run = Run.begin(served)
        client = run.client().open()
        for _ in range(3):
            client.step()
            cut(served)
        assert len(served.door._lost) == 1
        receipt = client.seal()
        assert receipt.digest == truth
        served.door.tick()
        assert run.strategy.ask(wire.Commit(1, (entry_of(receipt),))).sums


def entry_of(receipt: Any) -> wire.Entry:
    """Ask for one sealed session."""
    return wire.Entry(receipt.session, receipt.digest, 1)


def test_a_stream_that_breaks_in_a_step_is_answered_once(tmp_path: Path) -> None:
    """The edge is still at the first copy when the second one comes."""
    truth = digest_of_undisturbed(tmp_path / "truth", 2)
    with serving(tmp_path / "edge", terms=SHARED) as served:
        client = Run.begin(served).client().open()
        client.step()
        handle, seen = served.gate.handle, []

        def slow(request: Any) -> Any:
            if isinstance(request, wire.Forward):
                seen.append(request)
                if len(seen) == 1:
                    cut_later.submit(lambda: [v.end() for v in served.door._visits])
                    time.sleep(0.3)
            return handle(request)

        with ThreadPoolExecutor(1) as cut_later:
            served.gate.handle = slow  # type: ignore[method-assign]
            client.step()
        assert len(seen) == 2
        assert client.seal().digest == truth


def test_a_request_is_let_go_although_its_stream_broke(tmp_path: Path) -> None:
    """It counts as the device's memory, and a device may have not a byte to spare."""
    with serving(tmp_path, terms=SHARED) as served:
        client = Run.begin(served).client().open()
        client.step()
        handle, seen = served.gate.handle, []

        def broken(request: Any) -> Any:
            reply = handle(request)
            if isinstance(request, wire.Forward) and not seen:
                seen.append(request)
                cut_now = [visit.end() for visit in list(served.door._visits)]
                assert cut_now
            return reply

        served.gate.handle = broken  # type: ignore[method-assign]
        request = client.forward()
        lives = weakref.ref(request.boundary[0].data)
        gc.collect()
        gc.disable()
        try:
            client.edge.send(request)
            del request
            assert seen
            assert lives() is None
        finally:
            gc.enable()


def test_an_edge_is_not_waited_for_twice_in_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each request of a phase would take the patience of the first."""
    with serving(tmp_path, terms=SHARED) as served:
        address, port = served.address, served.server.port
    monkeypatch.setattr(grpc_host, "_AGAIN_SECONDS", 0.0)
    host = GrpcHost(patience_seconds=1.5)
    for at_least, at_most in ((1.5, 9.0), (0.0, 1.4)):
        start = time.monotonic()
        with pytest.raises(EdgeUnreachable, match="does not answer after"):
            host.connect(address).send(wire.IsHeld(DIGEST))
        assert at_least - 0.3 < time.monotonic() - start < at_most
    with serving(tmp_path, terms=Terms(), port=port):
        assert not host.connect(address).send(wire.IsHeld(DIGEST)).is_held
    assert Address.read(address).target not in grpc_host._gave_up


def test_the_last_request_closes_its_stream_even_if_refused(tmp_path: Path) -> None:
    """A strategy ends its run at an edge that has forgotten it: nothing is left."""
    with serving(tmp_path, terms=SHARED) as served:
        transport = served.connect()
        with pytest.raises(RefusedRequest):
            transport.send(wire.EndRun(access="of another run"))
        assert transport._streams == {}


def test_what_a_lost_client_has_opened_is_deleted_after_a_grace(
    tmp_path: Path,
) -> None:
    """Not what is sealed, and not before."""
    clock = Clock()
    patience = Patience(grace_seconds=60.0, clock=clock)
    with serving(tmp_path, terms=SHARED, patience=patience) as served:
        run = Run.begin(served)
        lost, sealed = run.client(0).open(), run.client(1).open()
        lost.step(), sealed.step()
        receipt = sealed.seal()
        cut(served)
        clock.now = 59.0
        served.door.tick()
        assert served.gate.load().num_sessions == 1
        clock.now = 60.0
        served.door.tick()
        assert served.gate.load().num_sessions == 0
        with pytest.raises(StaleSession):
            lost.step()
        assert run.strategy.ask(wire.Commit(1, (entry_of(receipt),))).sums


def test_an_edge_that_restarts_loses_open_sessions_only(tmp_path: Path) -> None:
    """The strategy goes on and merges what was sealed; late clients open."""
    edge = tmp_path / "edge"
    with serving(edge, terms=SHARED) as served:
        run = Run.begin(served)
        sealed, lost, late = run.client(0).open(), run.client(1).open(), run.client(2)
        sealed.step(), lost.step()
        receipt = sealed.seal()
    with pytest.raises(EdgeUnreachable, match="does not answer after 0 s"):
        GrpcHost(**ONCE).connect(served.address).send(wire.IsHeld(DIGEST))
    with serving(edge, terms=SHARED, port=served.server.port):
        with pytest.raises(StaleSession, match="the edge restarted"):
            lost.step()
        late.open().step()
        assert late.seal().num_steps == 1
        assert run.strategy.ask(wire.Commit(1, (entry_of(receipt),))).sums


def test_a_step_that_never_ends_ends_at_its_deadline(tmp_path: Path) -> None:
    """The client is told, and does not wait for ever."""
    with serving(tmp_path, terms=SHARED, timeout_seconds=1.0) as served:
        client = Run.begin(served).client().open()
        handle = served.gate.handle

        def stuck(request: Any) -> Any:
            time.sleep(1.5 * isinstance(request, wire.Forward))
            return handle(request)

        served.gate.handle = stuck  # type: ignore[method-assign]
        with pytest.raises(EdgeUnreachable, match="did not answer within 1 s"):
            client.step()


# --- its end --------------------------------------------------------------------------


def health(served: Served) -> int:
    """Ask as Kubernetes does."""
    with grpc.insecure_channel(Address.read(served.address).target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for unknown in ("other", f"{SERVICE}2"):
            with pytest.raises(grpc.RpcError, match="NOT_FOUND"):
                stub.Check(health_pb2.HealthCheckRequest(service=unknown))
        named = stub.Check(health_pb2.HealthCheckRequest(service=SERVICE)).status
        assert named == stub.Check(health_pb2.HealthCheckRequest()).status
        return int(named)


def test_a_draining_edge_finishes_what_is_open(tmp_path: Path) -> None:
    """It takes nothing new, and says so with what comes next."""
    with serving(tmp_path, terms=SHARED) as served:
        assert health(served) == health_pb2.HealthCheckResponse.SERVING
        run = Run.begin(served)
        client = run.client().open()
        with ThreadPoolExecutor(1) as pool:
            left = pool.submit(served.server.drain, 5.0)
            wait_for(lambda: served.door.is_draining)
            with pytest.raises(
                EdgeFull, match=r"finishes 1 open sessions.*use another"
            ):
                run.client(1).open()
            assert health(served) == health_pb2.HealthCheckResponse.NOT_SERVING
            client.step()
            receipt = client.seal()
            assert left.result() == 0
        assert run.strategy.ask(wire.Commit(1, (entry_of(receipt),))).sums
        run.served.door.is_draining = False
        run.client(2).open()
        assert served.server.drain(0.0) == 1


def test_two_edges_do_not_share_a_port(tmp_path: Path) -> None:
    """Clients would reach now one of them, now the other."""
    with serving(tmp_path / "one") as served:
        with pytest.raises(EdgeUnreachable, match="another process does so already"):
            with serving(tmp_path / "two", port=served.server.port):
                pass


def test_what_was_done_is_counted(tmp_path: Path) -> None:
    """By kind, in bytes, and what was refused by its cause."""
    with serving(tmp_path, terms=SHARED) as served:
        client = Run.begin(served).client().open()
        client.step()
        with pytest.raises(EdgeError):
            client.step(step=7)
        text = served.door.counts.text(served.door.present())
        assert 'smartsplit_edge_requests_total{request="Forward"} 1\n' in text
        assert 'smartsplit_edge_refused_total{error="OutOfOrderStep"} 1\n' in text
        assert "smartsplit_edge_sessions 0\n" in text
        assert "smartsplit_edge_runs 1\n" in text


# --- addresses ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        *("", "edge-1", "http://a:1", "grpc://a", "grpc://a:0", "grpcs://a:70000"),
        *("grpc://a b:1", "grpc://unix:/tmp/x:1", "grpcs://a:1#?", "grpc://::1:5"),
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(EdgeUnreachable):
        Address.read(text)


@pytest.mark.parametrize("roots", [None, b"PEM"])
@pytest.mark.parametrize("target", ["edge.example:50051", "[::1]:1", "127.0.0.1:65535"])
def test_an_address_survives_as_text(target: str, roots: bytes | None) -> None:
    address = Address(target, True, roots)
    assert Address.read(str(address)) == address
    assert address.is_loopback == (target != "edge.example:50051")


def test_an_edge_needs_an_address_where_the_strategy_is(tmp_path: Path) -> None:
    """A device learns it from its plan; mistakes are told where they are made."""
    with pytest.raises(EdgeUnreachable, match="has no address: give the strategy's"):
        GrpcEdge().start(TASK)
    with pytest.raises(ValueError, match="certificate and key belong together"):
        GrpcEdge("a:1", certificate=tmp_path / "a")
    with pytest.raises(ValueError, match="give one of both"):
        GrpcEdge("a:1", insecure=True, root_certificates=tmp_path / "a")
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        GrpcEdge("a:1", admin_secret_file=tmp_path / "a")
