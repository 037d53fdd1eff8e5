"""A model trained block by block, through both strategies and along all routes."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.serverapp.strategy import FedAdam

from flwr_smartsplit import (
    Checkpoints,
    Movement,
    Progressive,
    Route,
    ServerData,
)
from flwr_smartsplit.defence import Defence
from flwr_smartsplit.edge.hosts.local import LocalEdge
from flwr_smartsplit.errors import InvalidTask
from flwr_smartsplit.flower.checkpoints import run_record
from flwr_smartsplit.flower.rounds.manager import CentralManager
from flwr_smartsplit.plan.routes import RouteRequest
from tests.flower.apps import arrays_of, legacy_app, message_app, run
from tests.flower.apps import smart_split as strategy_of
from tests.flower.legacy import legacy_smart_split, run_legacy
from tests.tasks import TASK, State, differences, initial_state, loader, tiny_cnn

EDGES = (LocalEdge(name="near"), LocalEdge(name="far"))
RULE = Progressive((4, 7), pace=(2, 2))
FRONT, BLOCK = ("0.", "1."), ("4.", "5.")


def route_of(request: RouteRequest) -> Route:
    """Give each client its own kind of route, below and above the frozen units."""
    size = len(request.profile.units)
    return {
        "c0": Route.whole(),
        "c1": Route.split(2, edge="far"),
        "c2": Route.u_shape(3, size - 1, edge="near"),
        "c3": Route.hops((1, 5), edges=("near", "far")),
        "c4": Route.split(5, edge="near"),
    }[request.device.client_key]


def clients(make: Callable[..., Any], **changes: Any) -> list[Any]:
    """Make five clients that can reach both edges."""
    return [make(index, edges=EDGES, **changes) for index in range(5)]


def trained(num_rounds: int = 4, *, routed: bool = False, **changes: Any) -> Any:
    """Train five clients by the rule, along routes or whole."""
    changes = {"variants": RULE, **changes}
    if routed:
        changes["choose_route"] = route_of
    strategy = strategy_of(EDGES if routed else (), **changes)
    made = run(clients(message_app), strategy, num_rounds=num_rounds)
    assert made.kinds() == [], made.strategy.failures
    return made


def of(state: Mapping[str, Any], *starts: str) -> State:
    """Take the arrays whose names begin so."""
    return {name: array for name, array in state.items() if name.startswith(starts)}


def test_routes_change_no_bit_of_a_progressive_run() -> None:
    """Five kinds of route in each step are whole devices, and both APIs agree."""
    made, whole = trained(routed=True), trained()
    assert differences(made.state, whole.state) == []
    assert made.state.keys() == initial_state().keys()
    strategy = legacy_smart_split(EDGES, variants=RULE, choose_route=route_of)
    old = run_legacy(clients(legacy_app), strategy, num_rounds=4)
    assert differences(old.state, whole.state) == []
    assert differences(trained(3).state, whole.state)  # What is compared moves.


def test_one_block_is_the_run_without_variants() -> None:
    """Bit for bit; two blocks are not."""
    plain = run(clients(message_app), strategy_of(EDGES, choose_route=route_of))
    one = trained(2, routed=True, variants=Progressive((7,), pace=(2,)))
    assert differences(one.state, plain.state) == []
    assert differences(trained(2, routed=True).state, plain.state)


@pytest.mark.parametrize("routed", [False, True])
def test_each_step_trains_its_block_alone(routed: bool) -> None:
    """First the front, then what follows; the head in both."""
    start = initial_state()
    first = trained(2, routed=routed).state
    assert differences(of(first, *BLOCK), of(start, *BLOCK)) == []
    assert len(differences(of(first, *FRONT), of(start, *FRONT))) == len(
        of(start, *FRONT)
    )
    both = trained(4, routed=routed).state
    assert differences(of(both, *FRONT), of(first, *FRONT)) == []
    for parts in (BLOCK, ("8.",)):
        assert set(differences(both, first)) >= of(start, *parts).keys()


def test_no_step_of_the_server_moves_what_is_frozen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """FedAdam's moments would; the planted error lets them."""
    adam = FedAdam(fraction_evaluate=0.0, eta=0.1)
    first = trained(2, strategy=FedAdam(fraction_evaluate=0.0, eta=0.1)).state
    both = trained(4, strategy=adam).state
    assert differences(of(both, *FRONT), of(first, *FRONT)) == []
    assert differences(of(both, *BLOCK), of(first, *BLOCK))
    monkeypatch.setattr(CentralManager, "_fixed", lambda *_: ())
    wrong = trained(4, strategy=FedAdam(fraction_evaluate=0.0, eta=0.1)).state
    assert differences(of(wrong, *FRONT), of(first, *FRONT))


def test_frozen_units_are_sent_once_and_never_come_back() -> None:
    """Nodes keep them by digest; proxies travel, and are in no result."""
    made = trained(4, variants=Progressive((4, 7), pace=(1, 3)))
    sent = [arrays_of(m).keys() for m in made.grid.sent if _is_train(m)]
    back = [arrays_of(m).keys() for m in made.grid.replied if _is_train(m)]
    proxy = "proxy.4_7.weight"
    rounds = [sent[at : at + 5] for at in range(0, 20, 5)]
    assert all(proxy in names for names in rounds[0])
    assert all("0.weight" in names for names in rounds[1])
    assert not any("0.weight" in names for names in [*rounds[2], *rounds[3]])
    assert not any("0.weight" in names or proxy in names for names in back[5:])
    assert all(proxy in names for names in back[:5])
    assert proxy not in made.state
    tiny_cnn().load_state_dict(_tensors(made.state), strict=True)


def _is_train(message: Any) -> bool:
    return bool(message.metadata.message_type == "train")


def _tensors(state: State) -> dict[str, Any]:
    return {name: torch.from_numpy(np.array(a)) for name, a in state.items()}


@pytest.mark.parametrize("stop", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_run_goes_on_in_the_middle_of_a_block(tmp_path: Path, stop: int) -> None:
    """With its proxies, its rounds and its movement."""
    pace = Movement(window=2, patience=1, slope=0.01, most_rounds=2)
    rule = Progressive((4, 7), pace=pace)
    whole = trained(4, routed=True, variants=rule)
    trained(stop, routed=True, variants=rule, checkpoints=Checkpoints(tmp_path))
    resumed = trained(4, routed=True, variants=rule, checkpoints=Checkpoints(tmp_path))
    assert differences(resumed.state, whole.state) == []


def test_the_proxies_of_a_resumed_run_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted error: a run that goes on with the first ones is another."""
    rule = Progressive((4, 7), pace=(3, 1))
    whole = trained(3, variants=rule)
    trained(1, variants=rule, checkpoints=Checkpoints(tmp_path))
    kept = tuple(name for name in run_record._MANAGED if name != "proxies")
    monkeypatch.setattr(run_record, "_MANAGED", kept)
    trained(1, variants=rule, checkpoints=Checkpoints(tmp_path / "other"))
    resumed = trained(3, variants=rule, checkpoints=Checkpoints(tmp_path / "other"))
    assert differences(resumed.state, whole.state)


def test_the_journal_says_what_was_trained(tmp_path: Path) -> None:
    """The step's name, its exact peak, and the block's movement."""
    path = tmp_path / "journal.jsonl"
    pace = Movement(window=2, patience=9, most_rounds=2)
    trained(4, routed=True, variants=Progressive((4, 7), pace=pace), journal=path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    trained_rows = [r for r in rows if r["kind"] == "client" and r["phase"] == "train"]
    names = [row["variant"] for row in trained_rows]
    assert names == ["block 1 of 2"] * 10 + ["block 2 of 2"] * 10
    for row in trained_rows:
        assert row["peak_bytes"] == row["predicted_peak_bytes"]
    rounds = [row for row in rows if row["kind"] == "round"]
    shown = [row.get("effective_movement") for row in rounds]
    assert shown == [None, 1.0, None, 1.0]  # Two states are a straight line.


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"variants": Progressive(("4", "none"), pace=(1, 1))}, "no unit is 'none'"),
        ({"variants": Progressive((7, 4), pace=(1, 1))}, "must rise"),
        ({"variants": Progressive((4, 9), pace=(1, 1))}, "behind the last"),
        ({"variants": Progressive((4, 8), pace=(1, 1))}, "no proxy stands for"),
        ({"variants": Progressive((5, 7, 8), pace=(1, 1, 1))}, "no proxy stands"),
        ({"variants": Progressive((2, 4, 7), pace=(1,) * 3)}, "no trainable param"),
        ({"server_steps": (ServerData(loader(0)),)}, "ServerData"),
        ({"kept_units": frozenset({0})}, "kept_units"),
    ],
)
def test_what_cannot_be_trained_in_steps_is_refused(
    changes: dict[str, Any], problem: str
) -> None:
    """Before the first round, with the reason."""
    with pytest.raises(InvalidTask, match=problem):
        strategy_of((), **{"variants": RULE, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"is_local": lambda name: name == "8.weight"},
        {"defence": Defence(after="0", clip=1.0, noise=1.0)},
    ],
)
def test_tasks_that_count_whole_units_are_refused(changes: dict[str, Any]) -> None:
    """Local layers and defences."""
    with pytest.raises(InvalidTask, match="does not go with training in steps"):
        strategy_of((), task=replace(TASK, **changes), variants=RULE)
