"""Where a model can be cut, and the reason at each place where it cannot."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from flwr_smartsplit.errors import InvalidTask, NotSplittable
from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.split.trace.facts import find_facts
from tests.models import Residual, task_of

Operation = Callable[[Tensor], Tensor]


class Between(nn.Module):
    """A linear layer, operations written as functions, and a linear layer."""

    def __init__(self, *operations: Operation) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.operations = operations
        self.last = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for operation in self.operations:
            x = operation(x)
        return self.last(x)


def read(model: nn.Module) -> Chain:
    """Read a model of four inputs as a chain."""
    return Chain.from_module(model, torch.zeros(1, 4))


def sequence(*modules: nn.Module) -> nn.Module:
    """Put modules between two linear layers."""
    return nn.Sequential(nn.Linear(4, 4), *modules, nn.Linear(4, 4))


# --- in-place operators ---------------------------------------------------------------

# The operation that writes, as a function, a method or a module; what is written may be
# the boundary, a view of it, or all that a view was taken from.
WRITES_INTO_FIRST: dict[str, nn.Module] = {
    "function": Between(functional.relu_),
    "function with inplace=": Between(partial(functional.elu, inplace=True)),
    "method": Between(lambda x: x.add_(1)),
    "method, result unused": Between(lambda x: (x.mul_(2), x)[1]),
    "module": sequence(nn.ReLU(inplace=True)),
    "random module": sequence(nn.Dropout(0.5, inplace=True)),
    "out=": Between(lambda x: torch.neg(x.detach(), out=x.detach()) + x),
    "part of it": Between(lambda x: x.narrow(1, 0, 1).zero_() + x),
    "by index": Between(lambda x: x.index_fill_(1, torch.tensor([0]), 0.0)),
    "copy into it": Between(lambda x: x.copy_(x.tanh())),
    "view": Between(lambda x: x.view(-1, 2, 2), lambda x: x.relu_().flatten(1)),
    "module on a view": sequence(nn.Flatten(0), nn.ReLU(True), nn.Unflatten(0, (2, 4))),
    "transposed": Between(lambda x: x.t(), lambda x: x.sigmoid_().t()),
    "slice": Between(lambda x: torch.cat([x[:, :2].mul_(2), x[:, 2:]], 1)),
    "detached": Between(lambda x: (x.detach().zero_(), x)[1]),
}


@pytest.mark.parametrize("model", WRITES_INTO_FIRST.values(), ids=WRITES_INTO_FIRST)
def test_no_cut_where_a_later_operation_writes_into_the_boundary(model):
    """Whoever writes, and through whatever view, the place is refused and says why."""
    chain = read(model)
    place = "_0" if isinstance(chain.model, nn.Sequential) else "first"
    assert "writes into it, or a view of it, in place" in chain.refusals[place]


WRITES_ELSEWHERE: dict[str, nn.Module] = {
    "nothing": Between(torch.relu),
    "a copy": Between(lambda x: x.clone().add_(1)),
    "a sum, as torch.fx reads +=": Between(lambda x: x.__iadd__(1)),
    "a fresh tensor": Between(lambda x: torch.zeros_like(x).copy_(x)),
    "its own output": Between(lambda x: (x * 2).relu_()),
    "a view of its own": Between(lambda x: (x + 1).view(-1, 2, 2).mul_(2).flatten(1)),
}


@pytest.mark.parametrize("model", WRITES_ELSEWHERE.values(), ids=WRITES_ELSEWHERE)
def test_writing_elsewhere_forbids_nothing(model):
    """An in-place operator on something else leaves the boundary alone."""
    chain = read(model)
    assert "first" not in chain.refusals
    assert chain.unit_names[0] == "first"


def test_a_write_before_the_boundary_forbids_nothing():
    """What is written before it crosses is what crosses."""
    chain = read(sequence(nn.ReLU(inplace=True), nn.Sigmoid()))
    assert chain.unit_names == ("1", "2", "3")


def test_a_write_two_units_later_is_seen():
    """A view may pass through several units before it is written."""
    model = sequence(nn.Flatten(), nn.Identity(), nn.ReLU(inplace=True))
    chain = read(model)
    assert chain.unit_names == ("3", "4")
    assert chain.refusals.keys() == {"_0", "_1", "_2"}


# --- what comes before ----------------------------------------------------------------


def test_frozen_layers_are_units_like_any_other():
    """No gradient comes back to where nothing before can be trained."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    model[:2].requires_grad_(False)
    chain = read(model)
    assert chain.unit_names == ("0", "1", "2", "3")
    flags = [unit.gradients for unit in chain.units]
    assert flags == [(False,), (False,), (True,), ()]


def test_no_cut_after_layers_that_never_get_a_gradient():
    """They can be trained, but what comes after looks at their values only."""
    chain = read(Between(lambda x: x.detach()))
    assert "no gradient comes back to it" in chain.refusals["detach"]


class InputFirst(nn.Module):
    """Work on the inputs before the first parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.last = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x / 255 - 0.5))


def test_no_cut_in_the_preparation_of_the_inputs():
    """Operations on the raw batch stay with the first trainable layer."""
    chain = read(InputFirst())
    assert chain.unit_names == ("first", "last")
    assert set(chain.refusals.values()) == {
        "no layer with parameters is before it; the nearest cut is after first"
    }


# --- shared parameters ----------------------------------------------------------------


class TiedWeights(nn.Module):
    """The last layer has the first one's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.middle = nn.Linear(4, 4)
        self.last = nn.Linear(4, 4)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.middle(self.first(x))))


class TiedFromOutside(nn.Module):
    """One parameter, made before either of its layers gets it."""

    def __init__(self) -> None:
        super().__init__()
        weight = nn.Parameter(torch.randn(4, 4))
        self.first = nn.Linear(4, 4)
        self.middle = nn.Linear(4, 4)
        self.last = nn.Linear(4, 4)
        self.first.weight = weight
        self.last.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.middle(self.first(x))))


class SharedLayer(nn.Module):
    """One layer is called at the beginning and at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.middle = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(torch.tanh(self.middle(self.first(x))))


class SharedBuffer(nn.Module):
    """One BatchNorm without parameters counts on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.middle = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.tanh(self.middle(self.norm(self.first(x)))))


class SharedScale(nn.Module):
    """A parameter of the model itself is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.middle = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) * self.scale
        return torch.relu(torch.tanh(self.middle(x)) * self.scale)


class WeightByName(nn.Module):
    """A layer's weight is also used as a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.middle = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.middle(self.first(x)))
        return torch.relu(functional.linear(x, self.first.weight))


TIED: dict[Callable[[], nn.Module], str] = {
    TiedWeights: "first.weight",
    TiedFromOutside: "first.weight",
    SharedLayer: "first.bias, first.weight",
    SharedBuffer: "norm.num_batches_tracked, norm.running_mean, norm.running_var",
    SharedScale: "scale",
    WeightByName: "first.weight",
}


@pytest.mark.parametrize("from_task", [False, True], ids=["module", "task"])
@pytest.mark.parametrize(("model_fn", "names"), TIED.items())
def test_no_cut_between_two_uses_of_one_tensor(model_fn, names, from_task):
    """A parameter or buffer is at one place only, also when built on meta."""
    if from_task:
        chain = build_chain(task_of(model_fn, shape=(4,)))
    else:
        chain = read(model_fn())
    for place in ("middle", "tanh"):
        assert chain.refusals[place].startswith(f"both sides of it use {names};")
    for cut in range(1, len(chain)):
        head, tail = chain.segment(0, cut), chain.segment(cut, len(chain))
        assert not {id(t) for t in (*head.parameters(), *head.buffers())} & {
            id(t) for t in (*tail.parameters(), *tail.buffers())
        }


def test_a_shared_module_without_tensors_forbids_nothing():
    """One ReLU may be called on both sides."""
    relu = nn.ReLU()
    chain = read(nn.Sequential(nn.Linear(4, 4), relu, nn.Linear(4, 4), relu))
    assert chain.refusals == {}
    assert len(chain) == 4


# --- what crosses ---------------------------------------------------------------------


class Pair(nn.Module):
    """Two tensors travel together through the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.recurrent = nn.LSTM(4, 4, batch_first=True)
        self.last = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        values, _ = self.recurrent(self.first(x).unsqueeze(1))
        return self.last(values.squeeze(1))


def test_no_cut_at_a_value_that_is_not_one_tensor():
    """A recurrent layer returns a tuple; only one tensor may cross."""
    chain = read(Pair())
    assert chain.refusals == {
        "recurrent": "its value is a tuple, not one tensor; the nearest cut is after "
        "unsqueeze"
    }
    assert chain.unit_names == ("first", "unsqueeze", "recurrent", "last")


def test_a_residual_block_is_one_unit():
    """Inside a skip two tensors are alive, so there is no place at all."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Residual(4), nn.Conv2d(4, 4, 3))
    chain = Chain.from_module(model, torch.zeros(1, 3, 12, 12))
    assert chain.unit_names == ("0", "1.drop", "relu", "2")
    assert chain.refusals == {}


# --- the dry run ----------------------------------------------------------------------


def test_an_example_that_does_not_fit_is_named():
    """The error gives the shapes and what torch said."""
    with pytest.raises(InvalidTask, match=r"\[\(1, 5\)\].*5.*Give example") as info:
        Chain.from_module(nn.Sequential(nn.Linear(4, 4)), torch.zeros(1, 5))
    assert info.value.shapes == [(1, 5)]


def test_batch_norm_with_a_cumulative_average_can_be_read():
    """``momentum=None`` reads a counter, which a dry run must know."""
    model = sequence(nn.BatchNorm1d(4, momentum=None))
    assert read(model).unit_names == ("0", "1", "2")


RANDOM = {
    "dropout": nn.Dropout(0.5),
    "alpha dropout": nn.AlphaDropout(0.5),
    "noisy relu": nn.RReLU(),
    "attention": nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1),
}
NOT_RANDOM = {
    "relu": nn.ReLU(),
    "batch norm": nn.BatchNorm1d(4),
    "no dropout": nn.Dropout(0.0),
}


@pytest.mark.parametrize("module", RANDOM.values(), ids=RANDOM)
def test_modules_that_draw_random_numbers_are_known(module):
    """Every module that moves the generator in training is marked."""
    before = torch.get_rng_state()
    module.train()(torch.randn(2, 4))
    assert not torch.equal(before, torch.get_rng_state())
    assert [unit.is_random for unit in read(sequence(module)).units][1]


@pytest.mark.parametrize("module", NOT_RANDOM.values(), ids=NOT_RANDOM)
def test_modules_that_draw_nothing_are_not_marked(module):
    """A module that leaves the generator alone needs no stream."""
    assert not any(unit.is_random for unit in read(sequence(module)).units)


@pytest.mark.parametrize(
    "operation",
    [
        partial(functional.dropout, p=0.5),
        torch.rand_like,
        torch.bernoulli,
        functional.gumbel_softmax,
        lambda x: x + torch.randn(x.shape),
        lambda x: x.clone().uniform_(),
    ],
    ids=["dropout", "rand_like", "bernoulli", "gumbel", "randn", "uniform_"],
)
def test_functions_that_draw_random_numbers_are_known(operation):
    """A function is no less random than a module."""
    model = Between(torch.sigmoid, operation)
    graph = fx.symbolic_trace(model).graph
    facts = find_facts(model, graph, (torch.zeros(1, 4),))
    assert any(fact.is_random for fact in facts.values())


def test_reading_a_model_that_branches_on_values_is_refused():
    """The dry run never guesses: what cannot be traced is an error."""
    with pytest.raises(NotSplittable):
        read(Between(lambda x: x if x.sum() > 0 else -x))
