"""Whole federated runs over ``smartsplit edge``: the bits of a run in one process."""

from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from flwr_smartsplit import Route
from tests.edge.hosts.edge_process import EdgeProcess
from tests.edge.hosts.served import Authority
from tests.flower.apps import apps, budgets_of, legacy_app, run, smart_split
from tests.flower.legacy import legacy_smart_split, run_legacy
from tests.flwr_cli import free_port
from tests.tasks import differences

BUDGETS = budgets_of(1, 4, None, 8)


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EdgeProcess]:
    """Run one edge for a module: to start it takes seconds."""
    metrics = ["--metrics-port", str(free_port())]
    process = EdgeProcess(tmp_path_factory.mktemp("edge"), *metrics)
    yield process.start()
    assert process.stop() == 0


def page(edge: EdgeProcess, path: str) -> str:
    """Read what the edge says of itself."""
    url = f"http://127.0.0.1:{edge.words[-1]}{path}"
    with urlopen(url, timeout=5) as reply:
        return str(reply.read().decode())


@pytest.mark.slow
def test_both_apis_give_the_bits_of_one_process(edge: EdgeProcess) -> None:
    """Clients are given no edge: address and certificates come with their plans."""
    local, remote = smart_split(), smart_split((edge.edge(),))
    truth = run(apps(BUDGETS), local)
    found = run(apps(BUDGETS, edges=()), remote)
    assert found.kinds() == truth.kinds() == []
    assert differences(found.state, truth.state) == []
    clients = [legacy_app(index, b, edges=()) for index, b in enumerate(BUDGETS)]
    legacy = run_legacy(clients, legacy_smart_split((edge.edge(),)))
    assert legacy.kinds() == []
    assert differences(legacy.state, truth.state) == []


@pytest.mark.slow
def test_an_edge_tells_how_it_is(edge: EdgeProcess) -> None:
    """Its numbers for Prometheus; health for whoever supervises it."""
    text = page(edge, "/metrics")
    assert "\nsmartsplit_edge_sessions 0\n" in text
    assert "\nsmartsplit_edge_runs 0\n" in text
    assert page(edge, "/healthz") == "ready\n"
    with pytest.raises(HTTPError, match="404"):
        page(edge, "/")


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["between rounds", "in a round"])
def test_a_run_outlives_its_edge(moment: str, tmp_path: Path) -> None:
    """Nothing is lost between rounds, and one client's work in a round."""
    process = EdgeProcess(tmp_path).start()
    kinds: list[list[tuple[str, str]]] = []

    def restart() -> None:
        process.kill()
        process.start()

    def between(number: int, state: Any, summary: Any) -> None:
        if moment == "between rounds" and number == 1:
            restart()
        kinds.append([(f.client_key, f.kind) for f in summary.failures])

    strategy = smart_split((process.edge(),), between_rounds=between)
    options: dict[str, Any] = {"edges": ()}
    if moment == "in a round":
        options["step_seconds"] = Restarts(restart)
    try:
        found = run(apps(BUDGETS, **options), strategy, num_rounds=3)
    finally:
        process.stop()
    if moment == "between rounds":
        truth = run(apps(BUDGETS), smart_split(), num_rounds=3)
        assert differences(found.state, truth.state) == []
        assert kinds == [[], [], []]
    else:
        assert [len(each) for each in kinds] == [1, 0, 0]
        assert kinds[0][0][1] == "edge_failed"


class Restarts:
    """Predicts steps' times, and restarts an edge at the third."""

    def __init__(self, restart: Any) -> None:
        self.left = 3
        self.restart = restart

    def __call__(self, *_: Any) -> float:
        """Predict one."""
        self.left -= 1
        if self.left == 0:
            self.restart()
        return 1.0


@pytest.mark.slow
def test_a_route_goes_over_two_edges(tmp_path: Path) -> None:
    """The first edge reaches the second by the address that the strategy has signed."""
    authority = Authority.make(tmp_path / "certificates")
    asks = ["--client-ca", str(authority.roots)]
    near = EdgeProcess(tmp_path, name="near", authority=authority).start()
    far = EdgeProcess(tmp_path, *asks, name="far", authority=authority).start()
    own, key = authority.issue("strategy")
    route = Route.hops((2, 6), edges=("near", "far"))
    edges = (near.edge(), far.edge(certificate=own, key=key))
    try:
        strategy = smart_split(edges, choose_route=lambda request: route)
        found = run(apps([None] * 3, edges=()), strategy)
    finally:
        assert (near.stop(), far.stop()) == (0, 0)
    truth = run(apps([None] * 3), smart_split(()))
    assert found.kinds() == []
    assert differences(found.state, truth.state) == []


@pytest.mark.slow
def test_a_stopped_edge_finishes_its_round(tmp_path: Path) -> None:
    """SIGTERM in a step: it goes on to its seal; then others do without the edge."""
    process = EdgeProcess(tmp_path).start()
    edges = (process.edge(patience_seconds=0.5),)
    ends: list[int] = []
    thread = Thread(target=lambda: ends.append(process.stop()))
    clients = apps(BUDGETS, edges=edges, step_seconds=Restarts(thread.start))
    found = run(clients, smart_split(edges), num_rounds=2)
    thread.join()
    assert ends == [0]
    # Nobody merges at an edge that is gone; what was sealed there lies on its disk.
    assert found.kinds() == [(key, "edge_failed") for key in ("c1", "c3", "c0")] + [
        ("edge edge", "edge_failed")
    ]
    assert len(found.strategy.round_plans[1].assignments) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--insecure", "--host", "0.0.0.0"], "--insecure at 0.0.0.0 lets whoever can"),
        ([], "TLS needs --tls-certificate and --tls-key"),
        (["--insecure", "--tls-key", "a"], "--insecure and certificates: give one"),
        (["--insecure-anywhere"], "--admin-secret-file is missing"),
        (["--insecure", "--admin-secret-file", "short"], "has 5 characters"),
        (["--tls-certificate", "none", "--tls-key", "none"], "none cannot be read"),
        (["--insecure", "--memory", "8"], "--memory '8' is not a size"),
    ],
)
def test_a_wrong_command_line_is_told_at_once(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is wrong, and what to write instead."""
    from typer.testing import CliRunner  # noqa: PLC0415

    from flwr_smartsplit.cli.app import app  # noqa: PLC0415

    monkeypatch.chdir(tmp_path)
    Path("short").write_text("short")
    spill = ["--spill", str(tmp_path / "spill")]
    result = CliRunner().invoke(app, ["edge", "tests.tasks:build_task", *spill, *words])
    assert result.exit_code == 2
    assert message in result.stderr
