"""Server, devices, data and Flower: what is supported and what is refused.

One test for each row of docs/support.md, with those of the other ``test_support_*.py``.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import (
    LocalDpMod,
    adaptiveclipping_mod,
    arrays_size_mod,
    fixedclipping_mod,
    message_size_mod,
)
from flwr.common import ndarrays_to_parameters
from flwr.server import strategy as legacy
from flwr.serverapp import strategy as flower
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from flwr_smartsplit import Checkpoints, GrpcEdge, Route, build_client_app
from flwr_smartsplit.errors import InvalidTask, SmartSplitError
from flwr_smartsplit.flower.serde.records import from_array_record, to_array_record
from flwr_smartsplit.plan.routes import RouteRequest, deepest_split
from tests.edge.hosts.served import Authority, serving
from tests.flower.apps import (
    initial_arrays,
    legacy_app,
    make_client,
    message_app,
    peak_of,
    run,
    smart_split,
)
from tests.flower.legacy import legacy_smart_split, run_legacy
from tests.killed_runs import Kind, run_kind
from tests.support import (
    EDGES,
    in_turn,
    train_mixed,
    train_whole,
)
from tests.tasks import (
    BATCH_SIZE,
    NUM_CLASSES,
    SHAPE,
    TASK,
    differences,
    initial_state,
    loader,
    tiny_cnn,
)

# --- the server -----------------------------------------------------------------------


def fed(name: str, **changes: Any) -> Any:
    """Make one of Flower's strategies with a server step."""
    facts: dict[str, Any] = {"eta": 0.01, "tau": 1e-3}
    if name == "FedAvgM":
        facts = {"server_learning_rate": 0.5, "server_momentum": 0.9}
    return getattr(flower, name)(fraction_evaluate=0.0, **facts, **changes)


SERVER_OPTIMIZERS = ("FedAdam", "FedYogi", "FedAdagrad", "FedAvgM")


@pytest.mark.every(2)
@pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
def test_server_optimizers(name: str) -> None:
    """Mixed routes give whole routes' bits, which are Flower's own, over three rounds.

    Two clients of one size: Flower's mean in float32 is then as exact as ours. Its
    float64 state between rounds is kept, and so is a planted change of it seen.
    """
    mixed = train_mixed(strategy=fed(name))
    assert differences(mixed.state, train_whole(strategy=fed(name)).state) == []
    assert differences(mixed.state, train_mixed().state) != []

    def two() -> list[ClientApp]:
        return [message_app(i, train_loader=loader(1)) for i in range(2)]

    stock = run(two(), fed(name), num_rounds=3).state
    ours = smart_split((), strategy=fed(name), seed=0)
    found = run(two(), ours, num_rounds=3).state
    trained = {name for name, _ in tiny_cnn().named_parameters()}
    rounded = {n: stock[n].astype(a.dtype) for n, a in found.items()}
    assert trained.isdisjoint(differences(found, rounded))


@pytest.mark.every(3)
@pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
def test_server_optimizers_under_the_legacy_api(name: str) -> None:
    """Flower's legacy strategy of the same name takes the same step."""
    inner = getattr(legacy, name)
    initial = ndarrays_to_parameters(list(initial_state().values()))
    facts: dict[str, Any] = {"eta": 0.01, "tau": 1e-3}
    if name == "FedAvgM":
        facts = {"server_learning_rate": 0.5, "server_momentum": 0.9}
    strategy = inner(fraction_evaluate=0.0, initial_parameters=initial, **facts)
    clients = [legacy_app(i, edges=EDGES) for i in range(4)]
    ours = legacy_smart_split(EDGES, choose_route=in_turn, strategy=strategy)
    found = run_legacy(clients, ours).state
    assert differences(found, train_mixed(strategy=fed(name)).state) == []


@pytest.mark.parametrize(
    "strategy",
    [
        flower.Krum(num_malicious_nodes=1),
        flower.MultiKrum(num_malicious_nodes=1, num_nodes_to_select=1),
        flower.FedMedian(),
        flower.FedTrimmedAvg(),
        flower.Bulyan(num_malicious_nodes=0),
        flower.QFedAvg(client_learning_rate=0.1),
        flower.DifferentialPrivacyServerSideFixedClipping(flower.FedAvg(), 1.0, 1.0, 2),
    ],
    ids=lambda strategy: type(strategy).__name__,
)
def test_strategies_that_compare_whole_models(strategy: Any) -> None:
    """Tails are merged at edges; no single client's model is anywhere whole."""
    name = type(strategy).__name__
    with pytest.raises(TypeError, match=f"strategy={name}: .* nowhere whole when they"):
        smart_split(strategy=strategy)


# --- what stays on the device ---------------------------------------------------------


def is_normalisation(name: str) -> bool:
    """BatchNorm stays local, as in FedBN."""
    return name.startswith("1.")


def is_head(name: str) -> bool:
    """The classifier is personal."""
    return name.startswith("8.")


def kept(grid: Any) -> list[dict[str, Any]]:
    """Read what each client keeps in Flower's context."""
    return [
        from_array_record(node.context.state["smartsplit.local"])
        for node in grid._nodes.values()
    ]


@pytest.mark.parametrize("make", [message_app])
def test_layers_kept_local(make: Any) -> None:
    """They leave no device, are not merged, and are each client's own next round."""
    task = replace(TASK, is_local=is_normalisation)

    def choose(request: RouteRequest) -> Route:
        return in_turn(request)

    clients = [make(index, task=task, edges=EDGES) for index in range(4)]
    mixed = run(clients, smart_split(EDGES, task=task, seed=7, choose_route=choose))
    assert mixed.kinds() == []
    clients = [make(index, task=task, edges=EDGES) for index in range(4)]
    whole = run(clients, smart_split(EDGES, task=task, seed=7))
    assert differences(mixed.state, whole.state) == []
    local = [name for name in initial_state() if is_normalisation(name)]
    start = initial_state()
    assert all((mixed.state[n] == start[n]).all() for n in local)
    for reply in mixed.grid.replied:
        if reply.metadata.message_type == "train":
            assert not set(reply.content["arrays"]) & set(local)
    ours, theirs = kept(mixed.grid), kept(whole.grid)
    assert all(differences(a, b) == [] for a, b in zip(ours, theirs, strict=True))
    assert differences(ours[0], ours[1]) != []


def test_a_personal_last_layer() -> None:
    """Routes that would take it from the device are not taken."""
    task = replace(TASK, is_local=is_head)
    small = peak_of(Route.split(4))
    clients = [message_app(0, task=task), message_app(1, small, task=task)]
    strategy = smart_split(
        EDGES, task=task, seed=0, choose_route=deepest_split, min_train_nodes=1
    )
    run(clients, strategy, num_rounds=1)
    (plan,) = strategy.round_plans
    assert [a.client_key for a in plan.assignments] == ["c0"]
    assert "no route fits" in plan.skipped["c1"]


def test_local_layers_need_flowers_context() -> None:
    """A ``NumPyClient`` is not given it by itself; nothing is lost silently."""
    task = replace(TASK, is_local=is_normalisation)
    client = make_client(0, task=task)
    with pytest.raises(InvalidTask, match="context=context"):
        client.fit(list(initial_state().values()), plan_scalars())


def plan_scalars() -> dict[str, Any]:
    """Send a plan by hand."""
    from flwr_smartsplit.flower.serde.records import plan_to_scalars  # noqa: PLC0415
    from tests.tasks import client_plan  # noqa: PLC0415

    return plan_to_scalars(client_plan(0, Route.whole(), initial_state()))


# --- data -----------------------------------------------------------------------------


class Augmented(Dataset[Any]):
    """Images that are flipped and noised anew each time."""

    def __init__(self, client: int) -> None:
        chance = torch.Generator().manual_seed(client)
        self.images = torch.randn(9, *SHAPE, generator=chance)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index]
        if torch.rand(()) < 0.5:
            image = image.flip(-1)
        return image + 0.1 * torch.randn(SHAPE), index % NUM_CLASSES


def augmented_app(index: int, **changes: Any) -> ClientApp:
    """Make a client whose data are augmented, in an order of its own."""
    loader = DataLoader(Augmented(index), batch_size=BATCH_SIZE, shuffle=True)
    return message_app(index, train_loader=loader, **changes)


def test_augmentation() -> None:
    """torch's generator is derived for the loader, too: by round and client."""
    mixed, whole = train_mixed(make=augmented_app), train_whole(make=augmented_app)
    assert differences(mixed.state, whole.state) == []
    torch.manual_seed(99)  # What happened before in the process is no matter.
    assert differences(train_mixed(make=augmented_app).state, whole.state) == []
    assert differences(train_mixed(make=augmented_app, seed=8).state, whole.state) != []


def sized_app(index: int, **changes: Any) -> ClientApp:
    """Make a client with a batch size of its own."""
    loader = DataLoader(Augmented(index), batch_size=2 + index, shuffle=True)
    return message_app(index, train_loader=loader, **changes)


def test_batch_sizes_of_ones_own() -> None:
    """Each client is priced at its own."""
    mixed, whole = train_mixed(make=sized_app), train_whole(make=sized_app)
    assert differences(mixed.state, whole.state) == []


# --- Flower ---------------------------------------------------------------------------


def counting_app(index: int, **changes: Any) -> ClientApp:
    """Make a client that counts its messages in Flower's context."""

    def client_fn(context: Context) -> Any:
        record = context.state.setdefault("mine", ConfigRecord({"count": 0}))
        assert isinstance(record, ConfigRecord)
        record["count"] = int(str(record["count"])) + 1
        return make_client(index, **changes)

    return build_client_app(client_fn)


def test_client_state() -> None:
    """The client's own records in Flower's context stay from round to round."""
    made = train_mixed(make=counting_app)
    counts = [n.context.state["mine"]["count"] for n in made.grid._nodes.values()]
    assert counts == [3, 3, 3, 3]  # its profile, and two rounds


def mod_app(index: int, *mods: Any, **changes: Any) -> ClientApp:
    """Make a client with mods."""
    return build_client_app(lambda context: make_client(index, **changes), mods=mods)


def test_mods_that_look() -> None:
    """They see what the device sends and is sent."""
    seen: list[str] = []

    def note(message: Message, context: Context, call_next: Any) -> Message:
        seen.append(message.metadata.message_type)
        return call_next(message, context)

    make = partial(mod_app, *())
    mixed = train_mixed(
        make=lambda index, **facts: mod_app(
            index, message_size_mod, arrays_size_mod, note, **facts
        )
    )
    assert differences(mixed.state, train_mixed(make=make).state) == []
    assert seen.count("train") == 8


@pytest.mark.parametrize(
    "mod",
    [
        fixedclipping_mod,
        adaptiveclipping_mod,
        LocalDpMod(1.0, 1.0, 1.0, 1e-5),
        secaggplus_mod,
    ],
    ids=["fixedclipping", "adaptiveclipping", "localdp", "secaggplus"],
)
def test_mods_that_change_whole_models(mod: Any) -> None:
    """Differential privacy and secure aggregation would see a part."""
    with pytest.raises(TypeError, match="guarantee would not hold"):
        mod_app(0, mod)


def noisy(message: Message, context: Context, call_next: Any) -> Message:
    """Add noise to what a client sends, as a mod we do not know could."""
    reply = call_next(message, context)
    for key, record in reply.content.array_records.items():
        state = from_array_record(record)
        reply.content[key] = to_array_record(
            {name: np.asarray(array + 1) for name, array in state.items()}
        )
    return reply


@pytest.mark.parametrize("is_legacy", [False, True])
def test_changes_on_the_way(is_legacy: bool) -> None:
    """A reply that is not what the client sent is refused; the others count."""

    def make(index: int, *mods: Any) -> ClientApp:
        if not is_legacy:
            return mod_app(index, *mods)
        return ClientApp(lambda context: make_client(index).to_client(), list(mods))

    made = run([make(0), make(1), make(2, noisy)], num_rounds=1)
    assert made.kinds() == [("c2", "refused")]
    assert "not those it sent" in made.strategy.failures[0].cause


@pytest.mark.parametrize(
    "wrapper",
    [
        flower.DifferentialPrivacyServerSideFixedClipping,
        flower.DifferentialPrivacyClientSideFixedClipping,
    ],
)
def test_differential_privacys_wrappers(wrapper: Any) -> None:
    """They clip and noise whole models of single clients."""
    wrapped = wrapper(smart_split(), 1.0, 1.0, 2)
    with pytest.raises(SmartSplitError, match="nowhere whole when they are split"):
        run([message_app(0), message_app(1)], wrapped)


@pytest.mark.parametrize("api", ["message", "legacy"])
def test_a_run_that_is_resumed(api: str, tmp_path: Path) -> None:
    """Two rounds in two processes give the bits of two in one."""
    kind = Kind(api, "FedAvgM")
    run_kind(kind, Checkpoints(tmp_path), num_rounds=1)
    made = run_kind(kind, Checkpoints(tmp_path, resume="required"), num_rounds=2)
    assert differences(made.state, run_kind(kind, num_rounds=2).state) == []


def test_the_result_loads_into_the_stock_model() -> None:
    """With ``strict=True``, from all kinds of route."""
    made = train_mixed()
    arrays = made.result.arrays
    assert isinstance(arrays, ArrayRecord)
    tiny_cnn().load_state_dict(arrays.to_torch_state_dict(), strict=True)
    assert list(arrays) == list(initial_arrays())


def test_edges_on_a_network(tmp_path: Path) -> None:
    """By TLS, with clients that are given no edge."""
    authority = Authority.make(tmp_path / "certificates")
    with serving(tmp_path / "edge", authority=authority) as served:
        place = f"localhost:{served.server.port}"
        edges = (GrpcEdge(place, root_certificates=authority.roots),)
        clients = [message_app(index, edges=()) for index in range(3)]
        strategy = smart_split(edges, choose_route=lambda _: Route.split(6))
        found = run(clients, strategy)
        assert served.gate.load().num_runs == 0
    whole = run([message_app(index) for index in range(3)], smart_split(()))
    assert not found.kinds()
    routes = {str(a.option.route) for a in found.strategy.round_plans[0].assignments}
    assert routes == {"device[:6] > edge[6:]"}
    assert differences(found.state, whole.state) == []
