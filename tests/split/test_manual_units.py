"""Units listed by hand: checked before they are trusted, joined where they must be."""

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from flwr_smartsplit.errors import InvalidTask, NotSplittable
from flwr_smartsplit.plan.checkpointing.peak_memory import predicted_peak_bytes
from flwr_smartsplit.profile.profile import profile_chain
from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.split.segment import Unit
from flwr_smartsplit.split.template import parameters_on_meta
from flwr_smartsplit.task import Task
from flwr_smartsplit.types import Route
from flwr_smartsplit.verify.equivalence import RouteChecker, example_batches
from tests.models import OPTIMIZERS

WIDTH, CLASSES = 4, 3
EXAMPLE = torch.zeros(1, WIDTH)


class ThreeLayers(nn.Module):
    """A model that units can be listed of in many ways, right and wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(0.5)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.full((WIDTH,), 1.5))
        self.register_buffer("shift", torch.arange(4.0), persistent=False)
        self.last = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.first(x)).relu()
        return self.last((self.second(x) * self.scale + self.shift).tanh())


def first(root, x):
    return root.drop(root.first(x)).relu()


def second(root, x):
    return (root.second(x) * root.scale + root.shift).tanh()


def last(root, x):
    return root.last(x)


FIRST = Unit("first", first, ("first", "drop"))
SECOND = Unit("second", second, ("second", "scale", "shift"))
LAST = Unit("last", last, ("last",))


def three_units(model: nn.Module) -> list[Unit]:
    """List them as they are."""
    del model
    return [FIRST, SECOND, LAST]


def chain_of(*units: Unit, model: nn.Module | None = None) -> Chain:
    """Make a chain of the model above, or another."""
    return Chain.from_units(model or ThreeLayers(), units, EXAMPLE)


# --- lists that are no chain ----------------------------------------------------------


@pytest.mark.parametrize(
    ("units", "problem"),
    [
        ([], "the list is empty"),
        (
            [FIRST, SECOND, Unit("first", last, ("last",))],
            "two units are named 'first'",
        ),
        (
            [FIRST, SECOND, Unit("last", last, ("last", "lost.weight"))],
            "lost.weight is not in the model",
        ),
        ([FIRST, SECOND], "last.weight is trained, but no unit reads it"),
        (
            [FIRST, Unit("second", second, ("second", "shift")), LAST],
            "scale is trained, but no unit reads it",
        ),
    ],
    ids=["empty", "double name", "unknown name", "unread module", "unread parameter"],
)
def test_what_is_wrong_with_a_list_is_named(units, problem):
    """The error is raised before anything is run."""
    with pytest.raises(
        NotSplittable, match="these units are no chain of ThreeLayers"
    ) as e:
        chain_of(*units)
    assert problem in str(e.value)


def test_all_problems_of_a_list_are_named_at_once():
    """Nobody has to mend them one by one."""
    with pytest.raises(NotSplittable) as refused:
        chain_of(FIRST, FIRST, Unit("last", last, ("lost",)))
    assert str(refused.value) == (
        "these units are no chain of ThreeLayers: two units are named 'first'; lost is "
        "not in the model; scale is trained, but no unit reads it; second.weight is "
        "trained, but no unit reads it; second.bias is trained, but no unit reads it; "
        "last.weight is trained, but no unit reads it; last.bias is trained, but no "
        "unit reads it."
    )


def test_a_frozen_parameter_need_not_be_read():
    """It is at no place, and training cannot change it."""
    model = ThreeLayers()
    model.spare = nn.Linear(2, 2).requires_grad_(False)
    assert len(chain_of(*three_units(model), model=model)) == 3


def test_a_read_that_is_not_declared_is_named_with_its_unit():
    """A unit sees only what it reads, so a segment elsewhere could not run it."""
    greedy = Unit("second", second, ("second", "scale"))
    everything = Unit("last", last, ("last", "shift"))
    with pytest.raises(InvalidTask, match=r"unit 'second' of ThreeLayers .*'shift'"):
        chain_of(FIRST, greedy, everything)


def test_a_unit_that_raises_is_named_with_its_reason():
    """So is one that does not take what the one before it returns."""

    def broken(root, x):
        raise ValueError("not today.")

    with pytest.raises(InvalidTask, match=r"unit 'second' of ThreeLayers .*not today"):
        chain_of(FIRST, Unit("second", broken, SECOND.reads), LAST)
    narrow = Unit("first", lambda root, x: first(root, x)[:, :2], FIRST.reads)
    with pytest.raises(InvalidTask, match="unit 'second' of ThreeLayers cannot run"):
        chain_of(narrow, SECOND, LAST)


TAKES_TWO = replace(SECOND, forward=lambda root, x, y: second(root, x + y))


@pytest.mark.parametrize(
    ("give", "gradients"),
    [
        (lambda root, x: (first(root, x), root.first(x)), (True, True)),
        (lambda root, x: (x, first(root, x)), (False, True)),
        (lambda root, x: first(root, x).detach(), (False,)),
    ],
    ids=["two", "the second", "none"],
)
def test_any_tensors_of_a_boundary_may_need_a_gradient(give, gradients):
    """The dry run finds out which."""
    takes = TAKES_TWO if len(gradients) > 1 else SECOND
    chain = chain_of(replace(FIRST, forward=give), takes, LAST)
    assert chain.unit_names == ("first", "second", "last")
    assert chain.units[0].gradients == gradients


# --- places that must not be cut ------------------------------------------------------


def in_place(root, x):
    return second(root, x.mul_(2))


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        (
            FIRST,
            replace(SECOND, forward=in_place),
            "second writes into it, or a view of it, in place",
        ),
        (
            FIRST,
            replace(SECOND, eval_forward=in_place),
            "second writes into it, or a view of it, in place",
        ),
        (
            replace(FIRST, forward=lambda root, x: [first(root, x)]),
            replace(SECOND, forward=lambda root, x: second(root, x[0])),
            "its value is a list, not one tensor or several",
        ),
        (
            replace(FIRST, forward=lambda root, x: (first(root, x), 2)),
            TAKES_TWO,
            "its value is a tuple, not one tensor or several",
        ),
        (
            replace(FIRST, forward=lambda root, x: (first(root, x),) * 2),
            TAKES_TWO,
            "two of the tensors of its value are one",
        ),
        (
            replace(FIRST, forward=lambda root, x: x * 2, reads=()),
            replace(SECOND, reads=(*SECOND.reads, *FIRST.reads)),
            "no layer with parameters is before it",
        ),
        (
            FIRST,
            replace(SECOND, reads=(*SECOND.reads, "first.bias")),
            "both sides of it use first.bias",
        ),
    ],
    ids=[
        "in place",
        "in place in evaluation",
        "list",
        "not only tensors",
        "one tensor twice",
        "no parameters",
        "read twice",
    ],
)
def test_units_between_which_there_must_be_no_cut_become_one(before, after, reason):
    """The reason is kept, with the nearest place that can be cut."""
    chain = chain_of(before, after, LAST)
    assert chain.unit_names == ("second", "last")
    assert chain.refusals == {"first": f"{reason}; the nearest cut is after second"}
    assert chain.units[0].reads == tuple(sorted({*before.reads, *after.reads}))


def test_a_joined_unit_computes_what_its_parts_do():
    """In training and in evaluation, and under a stream if a part draws."""
    model = ThreeLayers()
    writes = Unit("second", in_place, SECOND.reads, eval_forward=second)
    chain = chain_of(FIRST, writes, LAST, model=model)
    assert [unit.is_random for unit in chain.units] == [True, False]
    segment, x = chain.own_segment(0, 2), torch.randn(5, WIDTH)
    assert torch.equal(segment.eval()(x), model.eval()(x))
    torch.manual_seed(3)
    found = segment.train()(x)
    torch.manual_seed(3)
    model.train()
    assert torch.equal(found, last(model, in_place(model, first(model, x))))


def test_a_parameter_with_two_names_leaves_no_cut_between_its_units():
    """It would be trained twice apart."""
    model = ThreeLayers()
    model.second.weight = model.first.weight
    chain = chain_of(*three_units(model), model=model)
    assert chain.unit_names == ("second", "last")
    assert chain.refusals["first"].startswith("both sides of it use first.weight")
    model = ThreeLayers()
    model.last = model.first
    with pytest.raises(
        NotSplittable, match=r"second: both sides .* first\.weight; no oth"
    ):
        chain_of(*three_units(model), model=model).require_cuts()


# --- chains ---------------------------------------------------------------------------


def test_a_unit_that_draws_is_found_without_being_told():
    """The dry run sees it, whatever the unit says of itself."""
    wrong = Unit("last", last, ("last",), is_random=True)
    found = [unit.is_random for unit in chain_of(FIRST, SECOND, wrong).units]
    assert found == [True, False, False]


def test_evaluation_may_be_other_code():
    """Each mode runs its own, whole or cut."""
    model = ThreeLayers()
    doubled = Unit("last", last, ("last",), lambda root, x: last(root, x) * 2)
    chain = chain_of(FIRST, SECOND, doubled, model=model)
    x = torch.randn(2, WIDTH)
    head, tail = chain.own_segment(0, 2), chain.own_segment(2, 3)
    assert torch.equal(tail.eval()(head.eval()(x)), model.eval()(x) * 2)
    assert torch.equal(tail.train()(head.eval()(x)), model(x))


def test_evaluation_that_gives_something_else_is_joined():
    """A place counts only where both modes can be cut."""
    lists = Unit("first", first, FIRST.reads, lambda r, x: [first(r, x)])
    takes = Unit("second", second, SECOND.reads, lambda r, x: second(r, x[0]))
    chain = chain_of(lists, takes, LAST)
    assert chain.unit_names == ("second", "last")
    assert chain.refusals["first"].startswith("its value is a list")


def test_the_model_and_its_modes_are_not_touched():
    """Its parameters may be on meta, for the dry run has none."""
    with parameters_on_meta():
        model = ThreeLayers()
    model.drop.eval()
    chain = chain_of(*three_units(model), model=model)
    assert model.training
    assert not model.drop.training
    assert all(parameter.is_meta for parameter in chain.model.parameters())
    assert list(chain.segment(1, 2).state_dict()) == [
        "scale",
        "second.weight",
        "second.bias",
    ]


# --- through a whole task -------------------------------------------------------------


def context_first(root, x, mask):
    return first(root, x), mask


def context_second(root, x, mask):
    return second(root, x) * mask, mask


def context_last(root, x, mask):
    return last(root, x * mask)


class Masked(ThreeLayers):
    """Let a second input, which needs no gradient, reach every unit."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return context_last(self, *context_second(self, *context_first(self, x, mask)))


def masked_units(model: nn.Module) -> list[Unit]:
    """Pass the mask on as context."""
    del model
    return [
        Unit("first", context_first, FIRST.reads),
        Unit("second", context_second, SECOND.reads),
        Unit("last", context_last, LAST.reads),
    ]


def task_of(model_fn, units_fn, inputs=EXAMPLE) -> Task:
    """Make a classification task."""
    return Task(
        model_fn=model_fn,
        loss_fn=functional.cross_entropy,
        optimizer_fn=OPTIMIZERS["adam"],
        example_inputs=inputs,
        example_targets=torch.arange(CLASSES),
        units_fn=units_fn,
    )


@pytest.mark.parametrize(
    "task",
    [
        task_of(ThreeLayers, three_units),
        task_of(Masked, masked_units, (EXAMPLE, EXAMPLE)),
        task_of(Masked, masked_units, {"mask": EXAMPLE, "x": EXAMPLE}),
    ],
    ids=["one tensor", "context", "context by name"],
)
def test_every_cut_between_declared_units_is_exact(task):
    """As for traced ones: numbers are the stock model's, bytes are the predicted."""
    assert build_chain(task).unit_names == ("first", "second", "last")
    with RouteChecker(task, example_batches(task, batch_size=4)) as checker:
        profile = profile_chain(checker.chain, batch_size=4, task=task)
        for route in (Route.whole(), Route.split(1), Route.split(2)):
            check = checker.check(route)
            assert check.differences == ()
            assert check.measured_peak_bytes == predicted_peak_bytes(profile, route)


def forgetful_units(model: nn.Module) -> list[Unit]:
    """Forget the activation at the end of the second unit."""
    del model
    return [
        FIRST,
        Unit("second", lambda r, x: r.second(x) * r.scale + r.shift, SECOND.reads),
        LAST,
    ]


def careless_units(model: nn.Module) -> list[Unit]:
    """Forget it in evaluation only."""
    (wrong,) = [
        unit.forward for unit in forgetful_units(model) if unit.name == "second"
    ]
    return [FIRST, Unit("second", second, SECOND.reads, wrong), LAST]


def test_a_wrong_unit_is_caught_by_the_checker():
    """It is no other chain to the dry run, but its numbers are not the model's."""
    task = task_of(ThreeLayers, forgetful_units)
    with RouteChecker(task, example_batches(task, batch_size=4)) as checker:
        for route in (Route.whole(), Route.split(1), Route.split(2)):
            found = checker.check(route).differences
            assert "gradient second.weight of step 0" in found
            assert any(re.match(r"loss .*, not ", line) for line in found)
            assert "state first.weight" in found


def test_a_unit_that_is_wrong_in_evaluation_only_is_caught_there():
    """Training is exact, so only what evaluation gives differs."""
    task = task_of(ThreeLayers, careless_units)
    with RouteChecker(task, example_batches(task, batch_size=4)) as checker:
        loss, outputs = checker.check(Route.split(2)).differences
    assert loss.startswith("evaluation loss ")
    assert outputs == "evaluation outputs"


def test_copies_of_a_task_share_the_chain_of_their_units():
    """And other units of the same model are another chain."""
    chain = build_chain(task_of(ThreeLayers, three_units))
    assert build_chain(task_of(ThreeLayers, three_units)) is chain
    assert build_chain(task_of(ThreeLayers, forgetful_units)) is not chain
    assert build_chain(task_of(ThreeLayers, None)) is not chain
