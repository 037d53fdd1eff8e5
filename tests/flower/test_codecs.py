"""Whole federated runs whose boundaries are coded."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flwr_smartsplit import (
    BFloat16,
    DeviceTraits,
    Float16,
    Integer,
    Link,
    Packed,
    PruneSchedule,
    Raw,
    Route,
    TopK,
    codec_by_rate,
    cut_at_gate,
    gated,
)
from flwr_smartsplit.edge.hosts.local import LocalEdge
from flwr_smartsplit.flower.serde.records import plan_from_config, to_array_record
from flwr_smartsplit.split.build import state_of
from flwr_smartsplit.types import Codec
from tests.edge.hosts.served import ServedEdge
from tests.flower.apps import (
    Run,
    apps,
    legacy_app,
    message_app,
    messages,
    run,
    smart_split,
)
from tests.flower.legacy import legacy_smart_split, run_legacy
from tests.tasks import TASK, differences, tiny_cnn

EDGES = (LocalEdge(name="near"), LocalEdge(name="far"))
ROUTES = {
    "c0": Route.whole(),
    "c1": Route.split(4, edge="far"),
    "c2": Route.u_shape(3, 7, edge="near"),
    "c3": Route((2, 4, 8), ("device", "near", "far", "device")),
}
LOSSY: list[Codec] = [
    Float16(),
    BFloat16(),
    Integer(),
    Integer(bits=4, back_bits=16),
    TopK(fraction=0.2),
    TopK(fraction=0.2, random_share=0.1, values="float16"),
]


def trained(codec: Any, *, num_rounds: int = 2, **changes: Any) -> Run:
    """Train and evaluate, each client on its own kind of route."""
    facts: dict[str, Any] = {
        "choose_route": lambda request: ROUTES[request.device.client_key],
        "fraction_evaluate": 1.0,
        "codec": codec,
    }
    strategy = smart_split(EDGES, **{**facts, **changes})
    clients = apps([None] * len(ROUTES), edges=EDGES)
    return run(clients, strategy, num_rounds=num_rounds)


def losses(made: Run) -> list[Any]:
    """List the losses of training and evaluation."""
    phases = made.result.train_metrics_clientapp, made.result.evaluate_metrics_clientapp
    return [metrics["loss"] for phase in phases for metrics in phase.values()]


@pytest.fixture(scope="module")
def plain() -> Run:
    """Train without a codec."""
    return trained(Raw())


def test_packed_is_the_run_without_a_codec(plain: Run, tmp_path: Path) -> None:
    """The same bits everywhere; the journal says what was saved."""
    path = tmp_path / "journal.jsonl"
    made = trained(Packed(), journal=path)
    assert made.kinds() == plain.kinds() == []
    assert differences(made.state, plain.state) == []
    assert losses(made) == losses(plain)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    split = [r for r in rows if r["kind"] == "client" and r["route"] != "whole"]
    assert len(split) == 4 * (len(ROUTES) - 1)
    for row in split:
        assert row["codecs"] == ["packed"] * row["route"].count(">")
        ways = ("up", "down")
        sent, plain_bytes = (
            [row[f"edge_bytes_{kind}{way}"] for way in ways] for kind in ("", "raw_")
        )
        assert all(one <= other for one, other in zip(sent, plain_bytes, strict=True))
        assert 0 < sum(sent) < sum(plain_bytes)
    whole = [r for r in rows if r["kind"] == "client" and r["route"] == "whole"]
    assert not any("edge_bytes_raw_up" in row or "codecs" in row for row in whole)


@pytest.mark.parametrize("codec", LOSSY, ids=str)
def test_every_codec_trains(codec: Codec, plain: Run) -> None:
    """Everybody takes part, and the model is another one."""
    made = trained(codec, num_rounds=1)
    assert made.kinds() == []
    assert differences(made.state, plain.state) != []


def test_a_link_between_edges_chooses_the_codec_and_is_priced() -> None:
    """A slow one gets the smallest code, and its time is in the predicted seconds."""
    slow = Link(up_bytes_per_second=1e3, down_bytes_per_second=2e3, latency_seconds=0.1)
    fast = Link(up_bytes_per_second=1e9, down_bytes_per_second=1e9)
    choose = codec_by_rate({1e6: Raw(), 0.0: Integer()})
    rows: dict[str, Any] = {}
    for name, links in (("known", {"far": slow}), ("unknown", {})):
        edges = (LocalEdge(name="near", links=links), LocalEdge(name="far"))
        found: list[Any] = []
        strategy = smart_split(
            edges,
            choose_route=lambda _: ROUTES["c3"],
            codec=choose,
            on_row=(found.append,),
        )
        traits = DeviceTraits(flops_per_second=1e9, link=fast)
        clients = [message_app(i, edges=edges, traits=traits) for i in range(2)]
        run(clients, strategy, num_rounds=1)
        rows[name], _ = (
            row for row in found if row["kind"] == "client" and row["phase"] == "train"
        )
    assert rows["known"]["codecs"] == ["raw", "integer:8", "raw"]
    assert "codecs" not in rows["unknown"]
    # A batch of 4: 144 values forward in cut 4 and 8 bytes for each row; 24 return
    # through both edges in cut 8, and so do their gradients.
    coded, returned = 4 * (144 + 8), 4 * 24 * 4
    each = (coded + returned) * (1 / 1e3 + 1 / 2e3) + 2 * 2 * 0.1
    more = rows["known"]["predicted_seconds"] - rows["unknown"]["predicted_seconds"]
    assert more / rows["known"]["num_steps"] == pytest.approx(each, rel=1e-4)


def test_both_apis_round_alike() -> None:
    """The same bits, and what is drawn is the same."""
    codec = LOSSY[-1]
    clients = [legacy_app(index, edges=EDGES) for index in range(len(ROUTES))]
    strategy = legacy_smart_split(
        EDGES,
        choose_route=lambda request: ROUTES[request.device.client_key],
        fraction_evaluate=1.0,
        codec=codec,
    )
    made, other = trained(codec), run_legacy(clients, strategy)
    assert made.kinds() == other.kinds() == []
    assert differences(made.state, other.state) == []


def test_raw_sends_what_no_codec_sends(plain: Run) -> None:
    """Plans, messages and states; nothing says that there are codecs."""
    other = trained(codec_by_rate({0.0: Raw()}))
    for made in (plain, other):
        for message in messages(made.grid, "train", "evaluate"):
            (config,) = message.content.config_records.values()
            assert not any("codec" in str(value) for value in config.values())
    assert differences(other.state, plain.state) == []


def test_slow_links_get_smaller_codes() -> None:
    """By the function of the user's, for each client; the route counts its price."""
    rates = [1e7, 1e5, 1e3]
    links = [Link(up_bytes_per_second=r, down_bytes_per_second=r) for r in rates]
    clients = [
        message_app(index, traits=DeviceTraits(flops_per_second=1e5, link=link))
        for index, link in enumerate(links)
    ]
    choose = codec_by_rate({1e6: Packed(), 1e4: Integer(), 0.0: TopK()})
    strategy = smart_split(codec=choose, choose_route=lambda _: Route.split(3))
    made = run(clients, strategy)
    assert made.kinds() == []
    found = {}
    for message in messages(made.grid, "train"):
        (config,) = message.content.config_records.values()
        plan = plan_from_config(config)
        assert plan is not None
        found[plan.client_key] = plan.codecs
    assert found == {"c0": (Packed(),), "c1": (Integer(),), "c2": (TopK(),)}


def test_what_is_no_codec_is_refused_at_once() -> None:
    """Before anything is planned."""
    with pytest.raises(TypeError, match="'int8' is no codec"):
        smart_split(codec="int8")
    with pytest.raises(TypeError, match=r"Packed.* is no codec: give .*Packed\(\)"):
        smart_split(codec=Packed)


def differences_over(edge: Any) -> list[str]:
    """Train with a codec in this process and over an edge, and compare."""
    codec, route = TopK(fraction=0.2, random_share=0.2), Route.u_shape(2, 6)
    found = [
        run(
            apps([None, None], edges=edges),
            smart_split(edges, codec=codec, choose_route=lambda _: route),
        )
        for edges in ((LocalEdge(),), (edge,))
    ]
    assert [made.kinds() for made in found] == [[], []]
    return differences(found[0].state, found[1].state)


def test_it_is_the_same_over_a_network() -> None:
    """The bits of gRPC's edge; Ray's are in tests/edge/hosts/test_ray.py."""
    assert differences_over(ServedEdge()) == []


def linked(kind: Any, flops: float = 1e6) -> list[Any]:
    """Make clients behind a slow link, a fast one, and one that nobody knows."""
    rates = 1e3, 1e9
    links = [Link(up_bytes_per_second=r, down_bytes_per_second=r) for r in rates]
    return [
        kind(index, traits=DeviceTraits(flops_per_second=flops, link=link))
        for index, link in enumerate([*links, None])
    ]


def plans_of(grid: Any) -> dict[str, Any]:
    """Return the last plan of each client."""
    found = {}
    for message in messages(grid, "train"):
        for config in message.content.config_records.values():
            plan = plan_from_config(config)
            if plan is not None:
                found[plan.client_key] = plan
    return found


def test_by_default_a_slow_link_gets_what_is_exact_and_smaller(tmp_path: Path) -> None:
    """The others send what they always sent; the journal says why."""
    path = tmp_path / "journal.jsonl"
    route = {"choose_route": lambda _: Route.split(3)}
    made = run(linked(message_app), smart_split(journal=path, **route))
    raw = run(linked(message_app), smart_split(codec=Raw(), **route))
    assert made.kinds() == raw.kinds() == []
    assert differences(made.state, raw.state) == []
    codecs = {key: plan.codecs for key, plan in plans_of(made.grid).items()}
    assert codecs == {"c0": (Packed(),), "c1": (), "c2": ()}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    why = {r["client_key"]: r["why"] for r in rows if r["kind"] == "client"}
    assert [key for key in why if "codecs for this cut: raw" in why[key]] == [
        "c0",
        "c1",
    ]


def test_route_and_codec_are_chosen_together_in_both_apis() -> None:
    """The legacy API's choices are those of the Message API, to the bit."""
    codecs = Raw(), Integer(), TopK(fraction=0.3)
    made = run(linked(message_app), smart_split(codec=codecs))
    other = run_legacy(linked(legacy_app), legacy_smart_split(codec=codecs))
    assert made.kinds() == other.kinds() == []
    assert differences(made.state, other.state) == []
    chosen = {key: plan.codecs for key, plan in plans_of(made.grid).items()}
    assert chosen == {key: plan.codecs for key, plan in plans_of(other.grid).items()}
    with pytest.raises(TypeError, match="'int8' is no codec"):
        smart_split(codec=(Raw(), "int8"))


def test_packed_finds_a_gates_zeros_both_ways(tmp_path: Path) -> None:
    """The bits of a run without it, while few channels are open and while all are."""
    task = replace(TASK, model_fn=gated(tiny_cnn, "6", encoder=False))
    arrays = to_array_record(state_of(task.model_fn()))
    found, path = [], tmp_path / "journal.jsonl"
    for codec in (Raw(), Packed()):
        strategy = smart_split(
            task=task,
            choose_route=cut_at_gate,
            between_rounds=PruneSchedule.deprune(budget=2, rounds=3, full_rounds=1),
            codec=codec,
            journal=path if codec == Packed() else None,
        )
        members = apps([None] * 2, task=task)
        found.append(run(members, strategy, num_rounds=3, arrays=arrays))
    assert [made.kinds() for made in found] == [[], []]
    assert differences(found[0].state, found[1].state) == []
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    few = [row for row in rows if row["kind"] == "client" and row["round"] < 3]
    assert len(few) == 4
    for row in few:
        assert row["edge_bytes_up"] < 0.6 * row["edge_bytes_raw_up"]
        assert row["edge_bytes_down"] < 0.6 * row["edge_bytes_raw_down"]
