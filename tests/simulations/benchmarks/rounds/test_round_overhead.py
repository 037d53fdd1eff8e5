"""Overhead: all ways train the same, take turns, and are timed only if nobody fails."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common import parameters_to_ndarrays
from flwr.server.server import fit_clients
from typer.testing import CliRunner

from simulations.benchmarks.rounds import driven_rounds, round_overhead
from simulations.benchmarks.rounds.driven_rounds import RoundTime, timed_round
from simulations.benchmarks.rounds.round_overhead import (
    ALL_SPLIT,
    FEDAVG,
    PLAIN_FEDAVG,
    SMARTSPLIT,
    WAYS,
    Overhead,
    Setting,
    measure,
)
from simulations.benchmarks.rounds.trivial_clients import (
    build_app,
    initial_state,
    tiny_model,
)
from simulations.experiments.errors import ExperimentError
from tests.in_process_grid import InProcessGrid
from tests.tasks import differences

NUM_CLIENTS, NUM_HIDDEN = 3, 8
ROOT = Path(__file__).parents[4]
WHOLE_WAYS = [PLAIN_FEDAVG, FEDAVG, SMARTSPLIT]


@pytest.fixture
def setting(tmp_path):
    """Make a setting of two steady rounds."""
    return Setting(
        num_clients=NUM_CLIENTS,
        num_rounds=2,
        num_workers=1,
        num_hidden=NUM_HIDDEN,
        apis=("message",),
        has_split=False,
        folder=tmp_path,
    )


@pytest.fixture
def grid():
    """Make a grid of the real clients, in this process."""
    return InProcessGrid([build_app(NUM_HIDDEN)] * NUM_CLIENTS)


@pytest.fixture
def _one_at_a_time(monkeypatch):
    """Spare the in-process grid, which is not made for threads."""
    monkeypatch.setattr(
        driven_rounds, "fit_clients", lambda sent, _, *rest: fit_clients(sent, 1, *rest)
    )


def state_after_a_round(api, way, setting, grid):
    """Run a round of one way; return its global model."""
    rounds = WAYS[api](setting, grid)[way]
    timed_round(rounds, 1)
    if api == "message":
        return {name: array.numpy() for name, array in rounds._arrays.items()}
    arrays = parameters_to_ndarrays(rounds._parameters)
    return dict(zip(initial_state(NUM_HIDDEN), arrays, strict=True))


def plainly_trained():
    """Do one client's step, with nothing but torch; all clients have the same batch."""
    model = tiny_model(NUM_HIDDEN)
    model.load_state_dict(
        {name: torch.tensor(v) for name, v in initial_state(NUM_HIDDEN).items()}
    )
    targets = torch.arange(4)
    torch.nn.functional.cross_entropy(model(torch.ones(4, 8)), targets).backward()
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    return model.state_dict()


@pytest.mark.usefixtures("_one_at_a_time")
@pytest.mark.parametrize("way", WHOLE_WAYS)
@pytest.mark.parametrize("api", ["message", "legacy"])
def test_every_way_trains_every_client_alike(api, way, setting, grid):
    """Else their times could not be compared. Flower averages in float32."""
    found = state_after_a_round(api, way, setting, grid)
    for name, tensor in plainly_trained().items():
        torch.testing.assert_close(
            torch.tensor(found[name]), tensor, rtol=1e-6, atol=1e-7
        )
    assert differences(found, initial_state(NUM_HIDDEN)) == sorted(found)
    kind = "train"
    assert len([m for m in grid.sent if m.metadata.message_type == kind]) == NUM_CLIENTS


@pytest.mark.parametrize("way", [FEDAVG, PLAIN_FEDAVG])
def test_only_the_plain_way_is_for_the_plain_client(way, setting, grid):
    """Our client says more in its replies."""
    state_after_a_round("message", way, setting, grid)
    for reply in grid.replied:
        assert ("smartsplit" in reply.content) == (way == FEDAVG)


@pytest.mark.usefixtures("_one_at_a_time")
@pytest.mark.parametrize("api", ["message", "legacy"])
def test_steady_rounds_are_measured_and_the_first_is_dropped(api, setting, grid):
    turns = []
    found = measure(api, setting, grid, on_round=lambda: turns.append(1))
    assert list(found.rounds) == WHOLE_WAYS
    assert {len(times) for times in found.rounds.values()} == {setting.num_rounds}
    assert len(turns) == len(WHOLE_WAYS) * (setting.num_rounds + 1)
    assert all(t.seconds > 0 for times in found.rounds.values() for t in times)


class NotedRounds:
    """Rounds that do nothing but note who had a turn, and who was ended."""

    def __init__(self, name, turns):
        self.name, self.turns = name, turns

    def configure(self, number):
        self.turns.append((number, self.name))

    def exchange(self, number, sent): ...

    def aggregate(self, number, answers): ...

    @property
    def strategy(self):
        return self.name


def test_ways_take_turns_and_the_order_rotates(monkeypatch, setting):
    """No way always comes after the same one; all are ended."""
    turns = []
    ways = {name: NotedRounds(name, turns) for name in (*WHOLE_WAYS, ALL_SPLIT)}
    monkeypatch.setitem(WAYS, "message", lambda *_: ways)
    monkeypatch.setattr(
        round_overhead, "close", lambda name: turns.append(("closed", name))
    )
    setting = replace(setting, has_split=True, num_rounds=3)
    measure("message", setting, None, on_round=lambda: None)
    firsts = []
    for number in (1, 2, 3, 4):
        names = [name for where, name in turns if where == number]
        assert sorted(names) == sorted(ways)
        firsts.append(names[0])
    assert sorted(firsts) == sorted(ways)
    assert turns[-4:] == [("closed", name) for name in ways]


def broken_app():
    """Make an app whose clients fail."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        raise OSError("disk on fire")

    return app


def spoiled_app():
    """Make an app whose clients' arrays change on their way back."""
    inner = build_app(NUM_HIDDEN)

    class Spoiled(ClientApp):
        def __call__(self, message, context):
            reply = inner(message, context)
            if "arrays" in reply.content:
                changed = {
                    n: Array(a.numpy() + 1) for n, a in reply.content["arrays"].items()
                }
                rest = {k: v for k, v in reply.content.items() if k != "arrays"}
                content = RecordDict({**rest, "arrays": ArrayRecord(changed)})
                return Message(content, reply_to=message)
            return reply

    return Spoiled()


@pytest.mark.parametrize(
    ("way", "app", "words"),
    [
        (FEDAVG, broken_app, "disk on fire"),
        (SMARTSPLIT, spoiled_app, "are not those it sent"),
    ],
)
def test_a_round_in_which_a_client_fails_is_not_timed(way, app, words, setting):
    """Its time would mean nothing; also if only our strategy refuses a reply."""
    good = [build_app(NUM_HIDDEN)] * (NUM_CLIENTS - 1)
    rounds = WAYS["message"](setting, InProcessGrid([*good, app()]))[way]
    with pytest.raises(ExperimentError, match=f"1 clients failed.*{words}"):
        timed_round(rounds, 1)


# --- figures --------------------------------------------------------------------------


def times(*seconds):
    """Make rounds of which a quarter each is before and after the clients."""
    return [
        RoundTime(
            configure_seconds=s / 4,
            clients_seconds=s / 2,
            aggregate_seconds=s / 4,
            cpu_seconds=s / 8,
        )
        for s in seconds
    ]


FOUND = Overhead(
    api="message",
    num_clients=10,
    load=0.5,
    rounds={
        PLAIN_FEDAVG: times(1.0, 1.0, 9.0),
        FEDAVG: times(2.0, 2.0, 0.0),
        SMARTSPLIT: times(3.0, 3.0, 7.0),
    },
)


def test_medians_and_ratios_are_of_whole_rounds():
    """A single slow round changes neither."""
    assert FOUND.median(SMARTSPLIT) == 3.0
    assert FOUND.median(SMARTSPLIT, "server_seconds") == 1.5
    assert FOUND.ratio() == 1.5
    assert FOUND.ratio(PLAIN_FEDAVG) == 0.5


# --- the command ----------------------------------------------------------------------


def call(*arguments):
    app = round_overhead.typer.Typer()
    app.command()(round_overhead.main)
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize("as_json", [True, False])
def test_the_command_prints_tables_or_json(monkeypatch, as_json):
    """One simulation for each number of clients."""
    seen = []

    def simulate(setting, *, on_round):
        seen.append(setting)
        return [replace(FOUND, num_clients=setting.num_clients)]

    monkeypatch.setattr(round_overhead, "simulate", simulate)
    options = ["--clients", "2,30", "--rounds", "4", "--api", "legacy", "--no-split"]
    result = call(*options, *(["--json"] if as_json else []))
    assert result.exit_code == 0, result.output
    assert [(s.num_clients, s.num_rounds, s.apis, s.has_split) for s in seen] == [
        (2, 4, ("legacy",), False),
        (30, 4, ("legacy",), False),
    ]
    if as_json:
        first, second = json.loads(result.stdout)
        assert (first["num_clients"], second["num_clients"]) == (2, 30)
        assert first["ratio"] == 1.5
        assert first["seconds_per_round"][FEDAVG] == 2.0
        assert len(first["rounds"][SMARTSPLIT]) == 3
    else:
        assert "30 message" in result.stdout
        assert "1.50" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--clients", "1"], "give numbers of at least 2"),
        (["--clients", "10,x"], "--clients is '10,x'"),
        (["--clients", ""], "with commas between them"),
        (["--api", "grpc"], "choose message, legacy or both"),
    ],
)
def test_what_cannot_be_measured_is_explained(arguments, words):
    result = call(*arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.slow  # Three Ray clusters, one after the other.
@pytest.mark.ray
def test_it_measures_under_flowers_simulation():
    """Both APIs and all ways, those over Ray too, with two clients for a round."""
    options = ["--clients", "2", "--rounds", "1", "--workers", "1", "--json"]
    finished = subprocess.run(
        [
            sys.executable,
            "-m",
            "simulations.benchmarks.rounds.round_overhead",
            *options,
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    both = json.loads(finished.stdout.splitlines()[-1])
    assert [found["api"] for found in both] == ["message", "legacy"]
    for found in both:
        assert list(found["seconds_per_round"]) == [*WHOLE_WAYS, ALL_SPLIT]
        assert found["ratio"] > 0
