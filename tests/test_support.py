"""What is supported and what is refused: one test for each row of docs/support.md.

Supported means: with any mix of routes the numbers are those of the whole model, bit
for bit. Refused means: an error that says why.
"""

import re
from collections.abc import Callable, Iterator
from copy import deepcopy
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
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from flwr_smartsplit import Route, Task, build_client_app, proximal
from flwr_smartsplit.edge.hosts.local import LocalEdge
from flwr_smartsplit.errors import InvalidTask, SmartSplitError
from flwr_smartsplit.flower.serde.records import from_array_record, to_array_record
from flwr_smartsplit.plan.routes import RouteRequest, deepest_split
from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.verify.equivalence import RouteChecker, example_batches
from tests.flower.apps import (
    Run,
    initial_arrays,
    legacy_app,
    make_client,
    message_app,
    peak_of,
    run,
    smart_split,
)
from tests.flower.legacy import legacy_smart_split, run_legacy
from tests.models import unet
from tests.tasks import (
    BATCH_SIZE,
    NUM_CLASSES,
    SHAPE,
    TASK,
    differences,
    initial_state,
    loader,
    tiny_chain,
    tiny_cnn,
)

PAGE = Path(__file__).parents[1] / "docs" / "support.md"
EDGES = (LocalEdge(name="near"), LocalEdge(name="far"))
ROUTES = (
    Route.whole(),
    Route.split(4, edge="near"),
    Route.u_shape(2, 7, edge="far"),
    Route.hops((3, 6), edges=("near", "far")),
)


def in_turn(request: RouteRequest) -> Route:
    """Give the clients all four kinds of route."""
    return ROUTES[request.index % len(ROUTES)]


def check_every_kind(**changes: Any) -> None:
    """Compare all four kinds of route with a plain loop over the stock module."""
    task = replace(TASK, example_targets=torch.arange(NUM_CLASSES), **changes)
    with RouteChecker(task, example_batches(task, batch_size=BATCH_SIZE)) as checker:
        for route in ROUTES:
            assert checker.check(route).differences == (), route


def train_mixed(
    task: Task = TASK, *, make: Callable[..., ClientApp] = message_app, **changes: Any
) -> Run:
    """Train four clients on four kinds of route."""
    return _trained(task, make, EDGES, choose_route=in_turn, **changes)


def train_whole(
    task: Task = TASK, *, make: Callable[..., ClientApp] = message_app, **changes: Any
) -> Run:
    """Train the same clients whole."""
    return _trained(task, make, (), **changes)


def _trained(task: Task, make: Any, edges: Any, **changes: Any) -> Run:
    start = {k: changes.pop(k, None) for k in ("train_config", "arrays")}
    clients = [make(index, task=task, edges=EDGES) for index in range(len(ROUTES))]
    made = run(clients, smart_split(edges, task=task, **changes), **start)
    assert made.kinds() == []
    return made


# --- training -------------------------------------------------------------------------


def frozen_cnn() -> nn.Module:
    """Build the small network with its first convolution and norm frozen."""
    model = tiny_cnn()
    for parameter in list(model.parameters())[:4]:
        parameter.requires_grad_(False)
    return model


def matrices_only(parameters: Any) -> Optimizer:
    """Build an optimizer that takes no vectors."""
    return torch.optim.SGD([p for p in parameters if p.ndim > 1], lr=0.05)


def test_frozen_layers() -> None:
    """A frozen front goes one way, and keeps its values in a federation, too."""
    check_every_kind(model_fn=frozen_cnn)
    task = replace(TASK, model_fn=frozen_cnn)
    mixed = train_mixed(task)
    assert differences(mixed.state, train_whole(task).state) == []
    moved = set(differences(mixed.state, initial_state()))
    parameters = dict(frozen_cnn().named_parameters())
    assert moved.isdisjoint(n for n, p in parameters.items() if not p.requires_grad)


def test_optimizers_that_choose() -> None:
    """A place may have nothing that its optimizer takes."""
    check_every_kind(optimizer_fn=matrices_only)


def test_skip_connections() -> None:
    """Several tensors may cross a cut, if a task says so."""
    inputs = torch.zeros(1, 3, 12, 12)
    check_every_kind(model_fn=unet, max_boundary_tensors=8, example_inputs=inputs)


def lower_rate(optimizer: Optimizer, config: Any) -> None:
    """Set the learning rate that the strategy sends."""
    for group in optimizer.param_groups:
        group["lr"] = config["lr"] / config["server-round"]


def test_learning_rate_by_round() -> None:
    """``train_config`` reaches every place; without a rate nothing moves anywhere."""
    task = replace(TASK, schedule_fn=lower_rate)
    config = ConfigRecord({"lr": 0.05})
    # Evaluation has another config, no optimizer, and so no schedule.
    facts: dict[str, Any] = {"fraction_evaluate": 1.0}
    mixed = train_mixed(task, train_config=deepcopy(config), **facts)
    whole = train_whole(task, train_config=deepcopy(config))
    assert differences(mixed.state, whole.state) == []
    assert differences(mixed.state, train_mixed().state) != []
    still = train_mixed(task, train_config=ConfigRecord({"lr": 0.0}))
    moved = set(differences(still.state, initial_state()))
    trained = {name for name, _ in tiny_cnn().named_parameters()}
    assert not moved & trained


def test_learning_rate_that_nobody_sends() -> None:
    """The error names what is missing and what there is."""
    task = replace(TASK, schedule_fn=lower_rate)
    clients = [message_app(index, task=task) for index in range(2)]
    made = run(clients, smart_split(EDGES, task=task, seed=0), num_rounds=1)
    cause = made.strategy.failures[0].cause
    assert "schedule_fn reads 'lr' from the round's config" in cause
    assert "which has ['server-round']" in cause


def warm_up(optimizer: Optimizer, config: Any) -> Any:
    """Raise the learning rate over the first steps."""
    del config
    return torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=2)


def test_learning_rate_by_step() -> None:
    """A torch scheduler, stepped at every place."""
    check_every_kind(schedule_fn=warm_up)


def plateau(optimizer: Optimizer, config: Any) -> Any:
    """Ask for a metric that no place has."""
    del config
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)


def test_learning_rate_by_metric() -> None:
    """No place knows the metric."""
    task = replace(TASK, schedule_fn=plateau)
    clients = [message_app(index, task=task) for index in range(2)]
    made = run(clients, smart_split(EDGES, task=task, seed=0), num_rounds=1)
    assert made.kinds() == [("c0", "failed"), ("c1", "failed")]
    assert "needs no metric" in made.strategy.failures[0].cause


def test_class_weights() -> None:
    """Anything that can be pickled and takes outputs and targets."""
    weights = torch.tensor([1.0, 5.0, 0.1])
    check_every_kind(loss_fn=partial(nn.functional.cross_entropy, weight=weights))
    check_every_kind(loss_fn=nn.CrossEntropyLoss(weight=weights, label_smoothing=0.1))


def focal(outputs: Tensor, targets: Tensor, *, gamma: float) -> Tensor:
    """Weigh hard examples more (Lin et al., 2017)."""
    losses = nn.functional.cross_entropy(outputs, targets, reduction="none")
    return ((1 - torch.exp(-losses)) ** gamma * losses).mean()


def test_custom_losses() -> None:
    """At the edge, or on the device where labels stay there."""
    check_every_kind(loss_fn=partial(focal, gamma=2.0))


class Trained(nn.Module):
    """A loss that would have to be trained, too."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Scale the outputs."""
        return nn.functional.cross_entropy(outputs * self.temperature, targets)


def test_losses_with_parameters() -> None:
    """They belong to the model."""
    with pytest.raises(TypeError, match="parameters of its own"):
        replace(TASK, loss_fn=Trained())


class SignDescent(Optimizer):
    """An optimizer of one's own that takes parameters one by one."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Move by the gradients' signs, with a counter as state."""
        del closure
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    state["count"] = state.get("count", torch.zeros_like(parameter)) + 1
                    rate = group["lr"] / state["count"]
                    parameter.sub_(parameter.grad.sign() * rate)


@pytest.mark.parametrize(
    "optimizer_fn",
    [
        partial(SignDescent, lr=0.01),
        partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
        partial(torch.optim.RMSprop, lr=0.01),
        partial(torch.optim.SGD, lr=0.05, nesterov=True, momentum=0.9),
    ],
)
def test_custom_optimizers(optimizer_fn: Any) -> None:
    """torch's and one's own, as long as parameters are stepped one by one."""
    check_every_kind(optimizer_fn=optimizer_fn)


def test_optimizers_over_all_parameters() -> None:
    """LBFGS looks at all parameters at once, and more than once."""
    task = replace(TASK, optimizer_fn=torch.optim.LBFGS)
    with pytest.raises(InvalidTask, match=r"LBFGS|closure"):
        run([message_app(0, task=task)] * 2, smart_split(EDGES, task=task, seed=0))


def test_clipping_by_norm() -> None:
    """One norm over all places; the clip bites."""
    check_every_kind(max_gradient_norm=0.1)
    clipped = train_mixed(replace(TASK, max_gradient_norm=0.1))
    assert differences(clipped.state, train_mixed().state) != []


def clipped_by_value(parameters: Any) -> Optimizer:
    """Clip each number of each gradient right before the step."""
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)

    def clip(optimizer: Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            nn.utils.clip_grad_value_(group["params"], 0.01)

    optimizer.register_step_pre_hook(clip)
    return optimizer


def test_clipping_by_value() -> None:
    """A hook of the optimizer, since each number stands for itself."""
    check_every_kind(optimizer_fn=clipped_by_value)


def test_mixed_precision() -> None:
    """bfloat16 crosses the wire as it is."""
    check_every_kind(autocast_dtype=torch.bfloat16)


def test_mixed_precision_with_loss_scaling() -> None:
    """A scale that skips steps would have to be agreed between places."""
    with pytest.raises(ValueError, match="loss scaling"):
        replace(TASK, autocast_dtype=torch.float16)


def test_fedprox() -> None:
    """The term at every place; by hand for one parameter."""
    sgd = partial(torch.optim.SGD, lr=0.5)
    check_every_kind(optimizer_fn=partial(proximal, optimizer_fn=sgd, mu=0.1))
    adam = partial(torch.optim.Adam, lr=0.01)
    check_every_kind(optimizer_fn=partial(proximal, optimizer_fn=adam, mu=0.1))
    weight = nn.Parameter(torch.tensor([1.0]))
    optimizer = proximal([weight], optimizer_fn=sgd, mu=0.5)
    for expected in (0.0, -0.75):  # 1 - 0.5 * 2; 0 - 0.5 * (2 + 0.5 * (0 - 1))
        weight.grad = torch.tensor([2.0])
        optimizer.step()
        assert weight.item() == expected


def test_fedprox_costs_what_is_predicted() -> None:
    """The copy of the parameters is part of the price."""
    sgd = partial(torch.optim.SGD, lr=0.5)
    task = replace(TASK, optimizer_fn=partial(proximal, optimizer_fn=sgd, mu=0.1))
    chain = tiny_chain()
    from flwr_smartsplit import predicted_peak_bytes, profile_chain  # noqa: PLC0415

    profile = profile_chain(chain, batch_size=BATCH_SIZE, task=task)
    with RouteChecker(task, example_batches(task, batch_size=BATCH_SIZE)) as checker:
        for route in ROUTES:
            measured = checker.check(route).measured_peak_bytes
            assert measured == predicted_peak_bytes(profile, route)


# --- the model ------------------------------------------------------------------------


def altered(change: Callable[[Any], Any]) -> Callable[[], nn.Module]:
    """Build the small network and change it."""

    def model_fn() -> nn.Module:
        model = tiny_cnn()
        change(model)
        return model

    return model_fn


def check_model(change: Callable[[Any], Any], **changes: Any) -> None:
    """Compare the changed network on all four kinds of route with the stock model."""
    check_every_kind(model_fn=altered(change), **changes)


def refuse_model(change: Callable[[Any], Any], match: str) -> None:
    """See that the strategy cannot be made, with no edge either."""
    for edges in ((), EDGES):
        with pytest.raises(SmartSplitError, match=match):
            smart_split(edges, task=replace(TASK, model_fn=altered(change)))


def test_everyday_model_functions() -> None:
    """Values may be moved, assigned and looked at; layers may be parametrized."""

    def assigned(model: Any) -> None:
        model[0].weight.data = torch.ones(4, 1, 3, 3)
        model.to("cpu")

    check_model(assigned)
    check_model(lambda model: parametrizations.spectral_norm(model[8]))
    check_model(lambda model: parametrizations.weight_norm(model[4]))


class Shifted(nn.ReLU):
    """A layer with a constant that is drawn after all parameters."""

    def forward(self, input: Tensor) -> Tensor:
        """Add it."""
        return super().forward(input) + self.shift


def test_constants_of_a_model() -> None:
    """``model_fn`` seeds, makes layers, and draws a constant."""

    def model_fn() -> nn.Module:
        torch.manual_seed(3)
        model = tiny_cnn()
        model[2] = Shifted()
        model[2].shift = torch.rand(())
        return model

    check_every_kind(model_fn=model_fn)


def repeated() -> nn.Module:
    """Build a network with one layer twice."""
    layer = nn.Conv2d(4, 4, 3, padding=1)
    first = nn.Conv2d(1, 4, 3, padding=1)
    norms = [nn.BatchNorm2d(4) for _ in range(3)]
    end = nn.Sequential(nn.Flatten(), nn.Linear(144, NUM_CLASSES))
    return nn.Sequential(
        first, norms[0], layer, norms[1], layer, norms[2], end, nn.ELU()
    )


def test_several_names_of_one_tensor() -> None:
    """On mixed routes, both names of the layer have its value."""
    start = repeated().state_dict()
    task = replace(TASK, model_fn=repeated)
    made = run(
        [message_app(index, task=task, edges=EDGES) for index in range(len(ROUTES))],
        smart_split(EDGES, task=task, choose_route=in_turn_of(len(build_chain(task)))),
        arrays=ArrayRecord(start),
    )
    assert made.kinds() == []
    for name in ("weight", "bias"):
        assert (made.state[f"2.{name}"] == made.state[f"4.{name}"]).all()
        assert (made.state[f"4.{name}"] != start[f"4.{name}"].numpy()).any()


def in_turn_of(size: int) -> Callable[[RouteRequest], Route]:
    """Give the clients kinds of route in a chain of this size."""
    kinds = (
        Route.whole(),
        Route.split(1, edge="near"),
        Route.u_shape(1, size - 1, edge="far"),
        Route.hops((1, size - 1), edges=("near", "far")),
    )
    return lambda request: kinds[request.index % len(kinds)]


def decayed(parameters: Any) -> Optimizer:
    """Let weights decay unless an attribute says that they must not."""
    groups = [
        {"params": [p], "weight_decay": 0.0 if hasattr(p, "no_decay") else 0.5}
        for p in parameters
    ]
    return torch.optim.SGD(groups, lr=0.05)


def test_attributes_of_parameters() -> None:
    """They are kept at every place, and in the dry run."""

    def mark(model: Any) -> None:
        for layer in (model[4], model[8]):
            layer.weight.no_decay = True

    check_model(mark, optimizer_fn=decayed)


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor([1 + 2j]),
        torch.tensor([2**53 + 1]),
        torch.tensor([True, False]),
        torch.tensor([1 / 3], dtype=torch.float64),
        torch.tensor([1 / 3], dtype=torch.float16),
    ],
    ids=lambda value: str(value.dtype),
)
def test_dtypes_of_a_state(value: Tensor) -> None:
    """A counter and what it stands beside come back exactly."""
    task = replace(TASK, model_fn=altered(lambda m: m[1].register_buffer("own", value)))
    arrays = ArrayRecord({**initial_arrays(), **ArrayRecord({"1.own": value})})
    order = task.model_fn().state_dict()
    arrays = ArrayRecord({name: arrays[name] for name in order})
    mixed, whole = (make(task, arrays=arrays) for make in (train_mixed, train_whole))
    assert differences(mixed.state, whole.state) == []
    assert mixed.state["1.own"].tobytes() == value.numpy().tobytes()


def test_a_mask_of_infinities() -> None:
    """It is merged like any constant, also in a unit that has statistics."""

    def mask(model: Any) -> None:
        model[1].register_buffer("mask", torch.tensor([0.0, float("-inf")]))

    check_model(mask)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float8_e5m2, torch.complex128], ids=str
)
def test_dtypes_that_cannot_be_sent(dtype: torch.dtype) -> None:
    """The error names the tensor and what to use."""
    value = torch.zeros(1).to(dtype)
    refuse_model(lambda m: m[1].register_buffer("own", value), "1.own is .*: use|Use")


def test_hooks() -> None:
    """The error names the layer or the weight, and where to do it instead."""
    refuse_model(lambda m: m[2].register_forward_hook(print), r"forward of 2 \(ReLU\)")
    refuse_model(lambda m: m[4].weight.register_hook(print), "4.weight has a gradient")
    refuse_model(lambda m: nn.utils.weight_norm(m[4]), "nn.utils.parametrizations")


class Grows(nn.Module):
    """Makes its layer in forward."""

    def forward(self, x: Tensor) -> Tensor:
        """Run it."""
        if not hasattr(self, "layer"):
            self.layer = nn.Linear(x.shape[1], NUM_CLASSES)
        return self.layer(x)


def test_layers_made_in_forward() -> None:
    """They would be in no state that is sent."""
    refuse_model(lambda model: model.__setitem__(8, Grows()), "in __init__")


# --- the server -----------------------------------------------------------------------


def fed(name: str, **changes: Any) -> Any:
    """Make one of Flower's strategies with a server step."""
    facts: dict[str, Any] = {"eta": 0.01, "tau": 1e-3}
    if name == "FedAvgM":
        facts = {"server_learning_rate": 0.5, "server_momentum": 0.9}
    return getattr(flower, name)(fraction_evaluate=0.0, **facts, **changes)


SERVER_OPTIMIZERS = ("FedAdam", "FedYogi", "FedAdagrad", "FedAvgM")


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


def test_the_result_loads_into_the_stock_model() -> None:
    """With ``strict=True``, from all kinds of route."""
    made = train_mixed()
    arrays = made.result.arrays
    assert isinstance(arrays, ArrayRecord)
    tiny_cnn().load_state_dict(arrays.to_torch_state_dict(), strict=True)
    assert list(arrays) == list(initial_arrays())


# --- the page -------------------------------------------------------------------------


ROW = re.compile(r"^\| .* \| (?:yes|refused) \| .* \| `(test_\w+)` \|$", re.MULTILINE)


def rows() -> Iterator[str]:
    """List the tests that the page names."""
    yield from ROW.findall(PAGE.read_text(encoding="utf-8"))


def missing(named: list[str], defined: set[str]) -> list[str]:
    """List rows without a test, and tests without a row."""
    return sorted(set(named) ^ defined)


def test_each_row_has_a_test_and_each_test_a_row() -> None:
    """And a planted row without one is seen."""
    defined = {
        name
        for name, value in globals().items()
        if name.startswith("test_") and callable(value)
    } - {"test_each_row_has_a_test_and_each_test_a_row"}
    named = list(rows())
    assert missing(named, defined) == []
    assert missing([*named, "test_of_nothing"], defined) == ["test_of_nothing"]
