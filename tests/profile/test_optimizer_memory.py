"""What optimizers hold and need: any of them, to the byte, whatever way they step."""

from collections.abc import Iterable
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flwr_smartsplit.errors import InvalidTask
from flwr_smartsplit.profile.optimizer_memory import OptimizerCosts
from flwr_smartsplit.profile.profile import profile_chain
from flwr_smartsplit.split.build import build_chain
from tests.models import OptimizerFn, task_of
from tests.route_peaks import peaks_of

FLOAT = 4
BATCH_SIZE = 3
SHAPE = (40,)

OPTIMIZERS: dict[str, OptimizerFn] = {
    "plain": partial(torch.optim.SGD, lr=0.1),
    "plain, decay": partial(torch.optim.SGD, lr=0.1, weight_decay=0.1),
    "nesterov": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "momentum, foreach": partial(torch.optim.SGD, lr=0.1, momentum=0.9, foreach=True),
    "adam, foreach": partial(torch.optim.Adam, weight_decay=0.1, foreach=True),
    "adamw, foreach": partial(torch.optim.AdamW, amsgrad=True, foreach=True),
    "adamw": partial(torch.optim.AdamW, weight_decay=0.1, amsgrad=True),
    "nadam": partial(torch.optim.NAdam, weight_decay=0.1),
    "radam": partial(torch.optim.RAdam, weight_decay=0.1),
    "adagrad": partial(torch.optim.Adagrad, weight_decay=0.1),
    "rmsprop": partial(
        torch.optim.RMSprop, weight_decay=0.1, momentum=0.9, centered=True
    ),
    "rmsprop, foreach": partial(torch.optim.RMSprop, momentum=0.9, foreach=True),
    "adadelta": partial(torch.optim.Adadelta, weight_decay=0.1),
}


class Mixed(nn.Module):
    """Layers of several sizes; some are frozen, one parameter may get no gradient."""

    def __init__(self, *, trains_all: bool = False) -> None:
        super().__init__()
        self.trains_all = trains_all
        self.first = nn.Linear(40, 50)
        self.frozen = nn.Linear(50, 60).requires_grad_(False)
        self.norm = nn.LayerNorm(60)
        self.scale = nn.Parameter(torch.ones(60))
        self.last = nn.Linear(60, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.frozen(torch.relu(self.first(x)))
        scale = self.scale if self.trains_all else self.scale.detach()
        return self.last(torch.relu(self.norm(x)) * scale)


@pytest.mark.every(3)
@pytest.mark.parametrize("trains_all", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_is_predicted_to_the_byte(name, trains_all):
    """Along every route, with frozen parameters and one that gets no gradient."""
    model_fn = partial(Mixed, trains_all=trains_all)
    task = task_of(model_fn, optimizer=OPTIMIZERS[name], shape=SHAPE)
    predicted, measured = peaks_of(task, batch_size=BATCH_SIZE)
    assert predicted == measured
    assert len(predicted) > 4


@pytest.mark.every(3)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_after_clipping_is_predicted_to_the_byte(name):
    """It begins when backward, and the loss, have been freed."""
    task = task_of(Mixed, optimizer=OPTIMIZERS[name], shape=SHAPE)
    task = replace(task, max_gradient_norm=1.0)
    predicted, measured = peaks_of(task, batch_size=BATCH_SIZE)
    assert predicted == measured


def test_an_optimizer_that_looks_at_values_is_refused():
    """Without values there is no dry run; the error says that this is why."""
    task = task_of(Mixed, optimizer=torch.optim.Adafactor, shape=SHAPE)
    with pytest.raises(InvalidTask, match="optimizer must fit the examples and not lo"):
        profile_chain(build_chain(task), batch_size=BATCH_SIZE, task=task)


def test_stepping_one_by_one_would_not_explain_foreach(monkeypatch):
    """If all at once were priced as one by one, too little would be predicted."""
    optimizer = OPTIMIZERS["adam, foreach"]
    one_by_one = OptimizerCosts.temporary_bytes
    monkeypatch.setattr(OptimizerCosts, "temporary_bytes_at_once", one_by_one)
    task = task_of(Mixed, optimizer=optimizer, shape=SHAPE)
    predicted, measured = peaks_of(task, batch_size=BATCH_SIZE)
    assert predicted[1:] != measured[1:]
    assert all(p <= m for p, m in zip(predicted, measured, strict=True))


# --- single numbers -------------------------------------------------------------------

SHAPES = ((5, 7), (7,), (2, 3, 4))
NUM_ELEMENTS = 35 + 7 + 24


@cache
def costs_of(name: str) -> OptimizerCosts:
    """Price one of the optimizers."""
    return OptimizerCosts(task_of(Mixed, optimizer=OPTIMIZERS[name], shape=SHAPE))


def parameters(shapes: Iterable[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    """Make parameters; on meta, since only their form is looked at."""
    return [nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]


@pytest.mark.parametrize(
    ("name", "num_copies", "num_scalars"),
    [
        ("plain", 0, 0),
        ("plain, decay", 0, 0),
        ("nesterov", 1, 0),
        ("adagrad", 1, 1),
        ("rmsprop", 3, 1),
        ("adadelta", 2, 1),
        ("nadam", 2, 2),
        ("adamw", 3, 1),
        ("adamw, foreach", 3, 1),
    ],
)
def test_state_is_copies_of_the_parameters_and_scalars(name, num_copies, num_scalars):
    """Moments are as large as their parameter, and steps are counted in a float."""
    expected = FLOAT * (num_copies * NUM_ELEMENTS + num_scalars * len(SHAPES))
    assert costs_of(name).state_bytes(parameters()) == expected


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nothing_trained_costs_nothing(name):
    """A segment without trained parameters has no state and steps nothing."""
    costs = costs_of(name)
    assert costs.state_bytes([]) == costs.temporary_bytes([]) == 0
    assert costs.temporary_bytes_at_once([]) == 0


@pytest.mark.parametrize(
    ("name", "num_bytes"),
    [
        ("plain", 0),
        ("nesterov", 35 * FLOAT),  # the gradient with the momentum added
        ("plain, decay", 35 * FLOAT),
        ("rmsprop", 2 * 35 * FLOAT),  # the average's square, and the root of the rest
    ],
)
def test_what_a_step_makes_and_frees(name, num_bytes):
    """It is the largest at a time, not the sum over parameters."""
    assert costs_of(name).temporary_bytes(parameters()) == num_bytes


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if "foreach" not in n])
def test_one_by_one_is_the_same_as_at_once_unless_foreach(name):
    """Pairs of neighbours tell what a step of all parameters makes."""
    costs = costs_of(name)
    assert costs.temporary_bytes(parameters()) == costs.temporary_bytes_at_once(
        parameters()
    )


@pytest.mark.parametrize("name", ["adam, foreach", "adamw, foreach"])
def test_foreach_makes_more_at_once(name):
    """Its temporaries are as large as all parameters together."""
    costs = costs_of(name)
    at_once = costs.temporary_bytes_at_once(parameters())
    assert at_once >= NUM_ELEMENTS * FLOAT > costs.temporary_bytes(parameters()) / 3
    assert at_once > costs.temporary_bytes(parameters())


def test_parameters_of_one_form_are_stepped_once():
    """A deep model of equal layers costs as many dry runs as it has forms."""
    built: list[Optimizer] = []

    def counting(values: Iterable[nn.Parameter]) -> Optimizer:
        built.append(torch.optim.SGD(values, lr=0.1, momentum=0.9))
        return built[-1]

    costs = OptimizerCosts(task_of(Mixed, optimizer=counting, shape=SHAPE))
    costs.state_bytes(parameters([(3, 3), (3,)] * 10))
    assert len(built) == 2
    costs.state_bytes(parameters([(3, 3), (4,)]))
    assert len(built) == 3


def test_values_and_gradients_stay_untouched():
    """A dry run works on twins of the parameters."""
    parameter = nn.Parameter(torch.ones(3))
    costs = costs_of("nesterov")
    costs.state_bytes([parameter])
    costs.temporary_bytes([parameter])
    assert parameter.grad is None
    assert torch.equal(parameter, torch.ones(3))
