"""What a model's state may hold, through whole federated runs, on every kind of route.

The truth is FedAvg in plain Python: the stock model, the stock loop, and a mean in
fractions.
"""

from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import FedAdam, FedAvg
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from flwr_smartsplit import Route, RouteRequest, Task
from flwr_smartsplit.edge.hosts.local import LocalEdge
from flwr_smartsplit.errors import InvalidTask, SmartSplitError
from flwr_smartsplit.split.build import build_chain, state_of
from tests.flower.apps import arrays_of, legacy_app, message_app, run, smart_split
from tests.tasks import State, differences, state_bytes

EDGES = (LocalEdge(name="near"), LocalEdge(name="far"))
SIZES = (4, 8, 12)


def task_of(model_fn: Callable[[], nn.Module], **changes: Any) -> Task:
    """Make a task of vectors of eight numbers and three classes."""
    facts = {
        "loss_fn": nn.functional.cross_entropy,
        "optimizer_fn": partial(torch.optim.SGD, lr=0.5),
        "example_inputs": torch.zeros(1, 8),
        "example_targets": torch.zeros(1, dtype=torch.int64),
    }
    return Task(model_fn=model_fn, **{**facts, **changes})


def batches(client: int) -> DataLoader[Any]:
    """Make a client's loader, in order."""
    chance = torch.Generator().manual_seed(client)
    size = SIZES[client]
    inputs = torch.randn(size, 8, generator=chance)
    targets = torch.randint(0, 3, (size,), generator=chance)
    return DataLoader(TensorDataset(inputs, targets), batch_size=4)


def start_of(task: Task) -> State:
    """Draw the state a run starts from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return state_of(task.model_fn())


def routes(size: int) -> list[Route]:
    """List the kinds of route that a chain has."""
    found = [Route.whole(), *(Route.split(c, edge="near") for c in (1, size - 1))]
    if size > 2:
        found.append(Route.u_shape(1, size - 1, edge="far"))
        found.append(Route.hops((1, size - 1), edges=("near", "far")))
    return found


def federated(
    task: Task,
    choose: Callable[[int], Route],
    *,
    start: State | None = None,
    make: Callable[..., Any] = message_app,
    num_rounds: int = 2,
    **changes: Any,
) -> Any:
    """Run three clients; ``choose`` gives the route of each."""
    apps = [
        make(i, task=task, edges=EDGES, train_loader=batches(i))
        for i in range(len(SIZES))
    ]

    def choose_route(request: RouteRequest) -> Route:
        return choose(int(request.device.client_key[1:]))

    arrays = ArrayRecord({n: Array(a) for n, a in (start or start_of(task)).items()})
    strategy = smart_split(EDGES, task=task, choose_route=choose_route, **changes)
    return run(apps, strategy, arrays=arrays, num_rounds=num_rounds)


def stock_fedavg(task: Task, *, num_rounds: int = 2) -> State:
    """Do the same with the stock model in plain loops."""
    state = start_of(task)
    for _ in range(num_rounds):
        finals = []
        for client in range(len(SIZES)):
            model = loaded(task, state)
            parameters = [p for p in model.parameters() if p.requires_grad]
            optimizer = task.optimizer_fn(parameters)
            for inputs, targets in batches(client):
                optimizer.zero_grad()
                task.loss_fn(model(inputs), targets).backward()
                optimizer.step()
            finals.append(state_of(model))
        state = {
            name: mean([f[name] for f in finals], old) for name, old in state.items()
        }
    return state


def loaded(task: Task, state: State) -> nn.Module:
    """Load a state into the stock model."""
    model = task.model_fn()
    tensors = {n: torch.from_numpy(np.array(a)) for n, a in state.items()}
    model.load_state_dict(tensors, strict=True)
    return model.train()


def mean(arrays: list[Any], like: Any) -> Any:
    """Average arrays with the clients' weights, exactly, and round once."""
    if like.dtype.kind == "c":
        parts = [
            mean([getattr(a, p) for a in arrays], like.real) for p in ("real", "imag")
        ]
        return (parts[0] + 1j * parts[1]).astype(like.dtype)
    flat = [a.reshape(-1).tolist() for a in arrays]
    values = [one(each, like.dtype) for each in zip(*flat, strict=True)]
    return np.array(values, like.dtype).reshape(like.shape)


def one(values: tuple[Any, ...], dtype: Any) -> Any:
    """Average single values."""
    if not np.isfinite(values).all():
        return values[0]
    total = sum(
        (Fraction(v) * w for v, w in zip(values, SIZES, strict=True)), Fraction(0)
    )
    quotient = total / sum(SIZES)
    if dtype.kind == "b":
        return quotient != 0
    return int(quotient) if dtype.kind in "iu" else float(quotient)


def far_from(found: State, expected: State) -> list[str]:
    """Name the arrays that differ by more than a last bit or two; others exactly."""
    return [
        name
        for name, array in expected.items()
        if found[name].dtype != array.dtype
        or not (
            np.allclose(found[name], array, rtol=1e-5, atol=1e-6, equal_nan=True)
            if array.dtype.kind in "fc"
            else np.array_equal(found[name], array)
        )
    ]


# --- several names for one tensor -----------------------------------------------------


class Repeated(nn.Module):
    """One layer three times, as ALBERT has it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, layer = nn.Linear(8, 8), nn.Linear(8, 8)
        self.layers = nn.ModuleList([layer] * 3)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Run it three times."""
        x = torch.relu(self.first(x))
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.last(x)


class Shortcut(nn.Module):
    """A second name for a layer inside, before the first."""

    def __init__(self) -> None:
        super().__init__()
        body = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.norm = body[1]
        self.body, self.head = body, nn.Linear(8, 3)
        self.start = self.body[0]

    def forward(self, x: Tensor) -> Tensor:
        """Use the body."""
        return self.head(self.body(x))


class Tied(nn.Module):
    """Two layers with one weight, used apart, and one that only has a second name."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))
        self.c.weight = self.b.weight
        self.alias = self.a.weight
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Use all."""
        x = torch.relu(self.b(torch.relu(self.a(x))))
        return self.last(torch.relu(self.c(x)))


@pytest.mark.parametrize("model_fn", [Repeated, Shortcut, Tied])
@pytest.mark.parametrize("kind", [0, 2])  # With the clients' numbers: all five.
def test_every_name_of_a_tensor_has_its_trained_value(model_fn: Any, kind: int) -> None:
    """In the final arrays, loaded into the stock model, on every kind of route."""
    task = task_of(model_fn)
    kinds = routes(len(build_chain(task)))
    made = federated(task, lambda i: kinds[(kind + i) % len(kinds)])
    assert made.kinds() == []
    assert far_from(made.state, stock_fedavg(task)) == []
    start = start_of(task)
    assert set(differences(made.state, start)) == start.keys()
    names: dict[int, list[str]] = {}
    for name, tensor in model_fn().state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    groups = [group for group in names.values() if len(group) > 1]
    assert groups
    for first, *others in groups:
        for other in others:
            assert made.state[first].tobytes() == made.state[other].tobytes()


def test_names_of_one_tensor_under_server_optimizers_and_stock_strategies() -> None:
    """A server's step reaches all names; so does a client under a stock FedAvg."""
    task = task_of(Repeated)
    adam = {"strategy": FedAdam(fraction_evaluate=0.0, eta=0.1)}
    made = federated(task, lambda i: Route.split(1, edge="near"), **adam)
    assert made.kinds() == []
    stock = run(
        [message_app(i, task=task, train_loader=batches(i)) for i in range(3)],
        FedAvg(fraction_evaluate=0.0),
        arrays=ArrayRecord({n: Array(a) for n, a in start_of(task).items()}),
        num_rounds=1,
    )
    for state in (made.state, stock.state):
        for index in (1, 2):
            for leaf in ("weight", "bias"):
                found = state[f"layers.{index}.{leaf}"]
                assert (found == state[f"layers.0.{leaf}"]).all()


def test_names_of_one_tensor_with_two_values_are_refused() -> None:
    """Such arrays are not the state of any model of the task."""
    task = task_of(Repeated)
    start = start_of(task)
    start["layers.1.bias"] = start["layers.1.bias"] + 1
    with pytest.raises(InvalidTask, match=r"layers\.1\.bias and layers\.0\.bias: two"):
        federated(task, lambda _: Route.whole(), start=start)


def test_an_alias_that_is_left_behind_is_seen(monkeypatch: Any) -> None:
    """The planted error: without copying values to aliases, the check above fails."""
    monkeypatch.setattr(
        "flwr_smartsplit.split.chain.Chain.with_aliases", lambda _, state: state
    )
    with pytest.raises((AssertionError, InvalidTask)):
        test_every_name_of_a_tensor_has_its_trained_value(Repeated, 0)


# --- dtypes ---------------------------------------------------------------------------


class Writes(nn.Module):
    """A layer with a buffer that forward writes in every step, in its own dtype."""

    def __init__(self, value: Tensor, step: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("own", value.clone())
        self.register_buffer("still", value.clone())
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        """Write it."""
        with_first = x.detach()[0, 0]
        self.own.copy_(self.step(self.own, with_first))
        return self.norm(self.layer(x))


def buffered(value: Tensor, step: Any) -> nn.Module:
    """Put the layer into a network."""
    return nn.Sequential(
        nn.Linear(8, 8), Writes(value, step), nn.ReLU(), nn.Linear(8, 3)
    )


def add_one(own: Tensor, x: Tensor) -> Tensor:
    """Count."""
    del x
    return own + 1


def add_input(own: Tensor, x: Tensor) -> Tensor:
    """Collect inputs."""
    return own + x.to(own.dtype)


def turn(own: Tensor, x: Tensor) -> Tensor:
    """Turn in the complex plane."""
    return own * torch.exp(1j * x).to(own.dtype)


def note_positive(own: Tensor, x: Tensor) -> Tensor:
    """Remember whether an input was positive."""
    return own | (x > 1)


WRITTEN = {
    "bool": (torch.tensor([False, True]), note_positive),
    "uint8": (torch.tensor([3, 200], dtype=torch.uint8), add_one),
    "int8": (torch.tensor([-3, 100], dtype=torch.int8), add_one),
    "int16": (torch.tensor([-3, 2**14], dtype=torch.int16), add_one),
    "int32": (torch.tensor([-3, 2**30 + 1], dtype=torch.int32), add_one),
    "int64": (torch.tensor([-(2**53) - 1, 2**62 + 3]), add_one),
    "float16": (torch.tensor([1.5, 60000.0], dtype=torch.float16), add_input),
    "float32": (torch.tensor([1 / 3, 3e38, -0.0, 1e-45]), add_input),
    "float64": (torch.tensor([1 / 3, 1e-300, 1e290], dtype=torch.float64), add_input),
    "complex64": (torch.tensor([1 + 2j, -3j]), turn),
    "infinite": (torch.tensor([float("-inf"), 0.0, float("inf")]), add_input),
}
CONSTANT = {
    "nan": torch.tensor([float("nan"), 1.0]),
    "empty": torch.zeros(0, 4),
    "uint16": torch.tensor([65535], dtype=torch.uint16),
    "uint32": torch.tensor([2**31 + 5], dtype=torch.uint32),
    "uint64": torch.tensor([2**63 + 5], dtype=torch.uint64),
}


@pytest.mark.every(5)
@pytest.mark.parametrize("kind", [0, 2])  # With the clients' numbers: all five.
@pytest.mark.parametrize("name", WRITTEN)
def test_buffers_of_every_dtype_are_merged_exactly(name: str, kind: int) -> None:
    """What forward writes is averaged in its dtype; what it does not stays."""
    value, step = WRITTEN[name]
    task = task_of(partial(buffered, value, step))
    kinds = routes(len(build_chain(task)))
    made = federated(task, lambda i: kinds[(kind + i) % len(kinds)])
    assert made.kinds() == []
    expected = stock_fedavg(task)
    assert far_from(made.state, expected) == []
    start = start_of(task)
    assert made.state["1.own"].dtype == start["1.own"].dtype
    assert made.state["1.still"].tobytes() == start["1.still"].tobytes()
    if name in ("int64", "bool", "infinite"):  # Where float64 or a cast would err.
        assert made.state["1.own"].tobytes() == expected["1.own"].tobytes()


@pytest.mark.parametrize("name", CONSTANT)
def test_constants_of_every_dtype_come_back_as_they_were(name: str) -> None:
    """Bit for bit, also beside what is written."""
    value = CONSTANT[name]
    task = task_of(partial(buffered, value, lambda own, x: own))
    kinds = routes(len(build_chain(task)))
    made = federated(task, lambda i: kinds[i])
    assert made.kinds() == []
    for each in ("1.own", "1.still"):
        assert made.state[each].tobytes() == start_of(task)[each].tobytes()


class Rotates(nn.Module):
    """A layer with complex weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        """Take the length of complex numbers."""
        return (x.to(torch.complex64) @ self.weight).abs()


def complex_net() -> nn.Module:
    """Build a network with complex weights."""
    return nn.Sequential(nn.Linear(8, 8), Rotates(), nn.ReLU(), nn.Linear(8, 3))


def test_complex_weights_keep_their_imaginary_part() -> None:
    """On mixed routes they are the stock model's."""
    task = task_of(complex_net)
    kinds = routes(len(build_chain(task)))
    made = federated(task, lambda i: kinds[i + 1])
    assert made.kinds() == []
    expected = stock_fedavg(task)
    assert far_from(made.state, expected) == []
    assert np.abs(made.state["1.weight"].imag).max() > 0.1


@pytest.mark.parametrize("lose", ["imaginary", "low"])
def test_an_inexact_merge_is_seen(monkeypatch: Any, lose: str) -> None:
    """The planted errors: a merge without imaginary parts, or of rounded integers."""
    if lose == "imaginary":
        target = "flwr_smartsplit.edge.weighted_mean._real"
        monkeypatch.setattr(
            target,
            lambda a: np.stack([a.real, 0 * a.real], -1) if a.dtype.kind == "c" else a,
        )
        with pytest.raises(AssertionError):
            test_complex_weights_keep_their_imaginary_part()
    else:
        target = "flwr_smartsplit.edge.weighted_mean._has_exact_products"
        monkeypatch.setattr(target, lambda dtype: True)
        with pytest.raises(AssertionError):
            test_buffers_of_every_dtype_are_merged_exactly("int64", 0)


# --- what is not finite ---------------------------------------------------------------


class Masked(nn.Module):
    """Attention under a causal mask of -inf in its state; BatchNorm in one unit."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(2, 6)
        self.norm = nn.BatchNorm1d(4)
        mask = nn.Transformer.generate_square_subsequent_mask(4)
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        """Attend to what came before."""
        q, k, v = self.qkv(x.reshape(-1, 4, 2)).chunk(3, dim=-1)
        values = torch.softmax(q @ k.transpose(1, 2) + self.mask, dim=-1) @ v
        return (self.norm(values) + x.reshape(-1, 4, 2)).flatten(1)


def masked() -> nn.Module:
    """Put it into a network."""
    return nn.Sequential(nn.Linear(8, 8), Masked(), nn.Linear(8, 3))


@pytest.mark.parametrize("kind", range(3))
def test_a_mask_of_infinities_is_no_failure(kind: int) -> None:
    """It is there from the start; the clients are merged."""
    task = task_of(masked)
    kinds = routes(len(build_chain(task)))
    made = federated(task, lambda i: kinds[kind])
    assert made.kinds() == []
    assert far_from(made.state, stock_fedavg(task)) == []


@pytest.mark.parametrize("route", [Route.whole(), Route.split(1, edge="near")])
def test_what_becomes_infinite_is_refused(route: Route) -> None:
    """Also in an array that had an infinity before."""
    explode = {"optimizer_fn": partial(torch.optim.SGD, lr=1e30)}
    value = torch.tensor([float("inf"), 1.0])

    def grow(own: Tensor, x: Tensor) -> Tensor:
        return own * 1e39

    for task in (
        task_of(masked, **explode),
        task_of(partial(buffered, value, grow)),
    ):
        # The first client has one step, after which it may still be finite.
        try:
            made = federated(task, lambda _: route, num_rounds=1)
        except SmartSplitError as error:
            assert "not finite" in str(error)
        else:
            assert {key for key, _ in made.kinds()} >= {"c1", "c2"}
            assert "not finite" in made.strategy.failures[0].cause


# --- the arrays a run starts from -----------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ">f4"])
def test_initial_arrays_of_another_dtype_are_refused_by_name(dtype: Any) -> None:
    """Else every reply would be refused, and the run end with the initial model."""
    task = task_of(Tied)
    start = {n: a.astype(dtype) for n, a in start_of(task).items()}
    with pytest.raises(InvalidTask, match=r"a\.bias: .* instead of float32"):
        federated(task, lambda _: Route.whole(), start=start)


# --- which names are sent back --------------------------------------------------------


class LowRank(nn.Module):
    """A frozen layer, and a small one beside it that is trained."""

    def __init__(self, rank: int = 2) -> None:
        super().__init__()
        self.base = nn.Linear(8, 8).requires_grad_(False)
        self.base.register_buffer("scale", torch.ones(8))
        self.down = nn.Linear(8, rank, bias=False)
        self.up = nn.Linear(rank, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Add both."""
        return self.base(x) * self.base.scale + self.up(self.down(x))


def adapted() -> nn.Module:
    """Build frozen layers with adapters, some BatchNorm in between, and a head."""
    norm = nn.BatchNorm1d(8).requires_grad_(False)
    return nn.Sequential(LowRank(), norm, nn.ReLU(), LowRank(), nn.Linear(8, 3))


@pytest.mark.parametrize("make", [message_app, legacy_app])
@pytest.mark.parametrize("kind", range(4))
def test_only_what_is_trained_comes_back(kind: int, make: Any) -> None:
    """On every route, the whole one too; the rest is not even merged."""
    task = task_of(adapted)
    kinds = routes(len(build_chain(task)))
    made = federated(task, lambda i: kinds[kind], make=make)
    assert made.kinds() == []
    start, expected = start_of(task), stock_fedavg(task)
    assert far_from(made.state, expected) == []
    moved = set(differences(made.state, start))
    assert not any(".base." in name for name in moved)
    if make is message_app:
        back = [arrays_of(r) for r in made.grid.replied[-len(SIZES) :]]
        assert all(set(each) <= moved for each in back)
        if kinds[kind] == Route.whole():
            assert all(set(each) == moved for each in back)
            assert state_bytes(back[0]) < state_bytes(start) / 2


def matrices(parameters: Any) -> torch.optim.Optimizer:
    """Train matrices only."""
    return torch.optim.SGD([p for p in parameters if p.ndim == 2], lr=0.5)


@pytest.mark.parametrize("kind", range(5))
def test_an_optimizer_that_takes_some_parameters(kind: int) -> None:
    """The others keep their values, also where a place has none of the taken."""
    task = task_of(
        lambda: nn.Sequential(nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3)),
        optimizer_fn=matrices,
    )
    kinds = routes(len(build_chain(task)))
    made = federated(task, lambda i: kinds[kind % len(kinds)])
    assert made.kinds() == []
    assert far_from(made.state, stock_fedavg(task)) == []
    assert differences(made.state, start_of(task)) == ["2.weight"]


LATE: list[int] = []


class Late(nn.Module):
    """Writes a buffer in later steps only, by something that no module holds."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("own", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Write it, if it is late."""
        if LATE:
            self.own.add_(1)
        return x


class LateLoader:
    """A loader from whose first batch on it is late."""

    batch_size = 4

    def __iter__(self) -> Any:
        """Yield a client's batches."""
        LATE.append(1)
        yield from batches(1)


@pytest.mark.parametrize("route", [Route.whole(), Route.split(1, edge="near")])
def test_a_change_that_no_dry_run_saw_is_refused(route: Route) -> None:
    """It would not come back, and nobody would notice."""
    task = task_of(lambda: nn.Sequential(nn.Linear(8, 8), Late(), nn.Linear(8, 3)))
    app = message_app(
        0, task=task, edges=EDGES, train_loader=LateLoader(), num_examples=8
    )
    alone = {"min_available_nodes": 1, "min_train_nodes": 1}
    strategy = smart_split(EDGES, task=task, choose_route=lambda _: route, **alone)
    arrays = ArrayRecord({n: Array(a) for n, a in start_of(task).items()})
    with pytest.raises(SmartSplitError, match=r"training changes 1\.own, and a"):
        run([app], strategy, arrays=arrays, num_rounds=1)
    LATE.clear()
    assert [failure.client_key for failure in strategy.failures] == ["c0"]
