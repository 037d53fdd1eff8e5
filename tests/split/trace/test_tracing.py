"""From forward to units: both modes, any names, and the module left as it was."""

from functools import partial

import hypothesis.strategies as st
import pytest
import torch
import torchvision
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn import functional

from flwr_smartsplit.errors import NotSplittable
from flwr_smartsplit.split.chain import Chain
from tests.models import FunctionalDropout, SmallCNN, seeded, small_cnn
from tests.oracle import compare


def run_cut(chain: Chain, cut: int, inputs: Tensor, *, training: bool) -> Tensor:
    """Run both sides of a cut in one mode, from the same random numbers."""
    torch.manual_seed(4)
    head = chain.segment(0, cut).train(training)
    return chain.segment(cut, len(chain)).train(training)(head(inputs))


def run_whole(model: nn.Module, inputs: Tensor, *, training: bool) -> Tensor:
    """Run the stock model from the same random numbers."""
    torch.manual_seed(4)
    return model.train(training)(inputs)


def parts(output: Tensor | tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Number the tensors of an output."""
    outputs = output if isinstance(output, tuple) else (output,)
    return {str(index): value for index, value in enumerate(outputs)}


def differing_cuts(model: nn.Module, inputs: Tensor) -> list[tuple[int, bool]]:
    """List (cut, training) where the two sides do not give the model's outputs."""
    chain = Chain.from_module(model, inputs)
    assert len(chain) > 1
    wrong = []
    for training in (True, False):
        expected = run_whole(model, inputs, training=training)
        for cut in range(1, len(chain)):
            found = run_cut(chain, cut, inputs, training=training)
            if compare(parts(expected), parts(found)):
                wrong.append((cut, training))
    return wrong


# --- names ----------------------------------------------------------------------------

# A Segment has its own attributes, a generated function its own variables.
TRICKY_NAMES = (
    "units",
    "start",
    "streams",
    "step",
    "inputs",
    "boundary",
    "root",
    "x",
    "targets",
    "name",
    "Segment",
    "output",
    "0",
)


def named(names: tuple[str, ...]) -> nn.Module:
    """Build a model of linear layers with the given names."""
    model = nn.Sequential()
    for name in names:
        model.add_module(name, nn.Linear(3, 3))
    return model


@settings(max_examples=5)
@given(st.permutations(TRICKY_NAMES))
def test_children_may_have_any_name(names):
    """No child's name clashes with a segment's own attributes or with another."""
    model = named(tuple(names))
    chain = Chain.from_module(model, torch.zeros(1, 3))
    assert chain.unit_names == tuple(names)
    assert differing_cuts(model, torch.randn(2, 3)) == []
    whole = chain.segment(0, len(chain)).state_dict()
    assert compare(model.state_dict(), whole) == []


@settings(max_examples=40)
@given(
    st.lists(
        st.sampled_from(["a", "A", "a_1", "a_2", "f", "t"]), min_size=2, max_size=6
    )
)
def test_unit_names_are_unique_however_often_a_module_is_called(calls):
    """Modules called again and operations without a module get names of their own."""

    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 3)
            for name in ("a", "A", "a_1", "a_2"):
                self.add_module(name, nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            for call in calls:
                if call == "t":
                    x = x.tanh()
                else:
                    x = x * 2 if call == "f" else self.get_submodule(call)(x)
            return x

    chain = Chain.from_module(Calls(), torch.zeros(1, 3))
    assert len(chain) == 1 + len(calls)
    assert len(set(chain.unit_names)) == len(chain)


# --- modes ----------------------------------------------------------------------------


class DropoutBetween(nn.Module):
    """Dropout as an operation of a module with children."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.last = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.dropout(self.first(x), 0.5, training=self.training)
        return self.last(x)


@pytest.mark.parametrize(
    "model_fn",
    [
        lambda: nn.Sequential(nn.Linear(3, 3), FunctionalDropout(), nn.Linear(3, 3)),
        DropoutBetween,
    ],
    ids=["in a leaf", "between children"],
)
def test_functional_dropout_follows_the_segments_mode(model_fn):
    """It drops in training and does nothing in evaluation, on whichever side."""
    model = model_fn()
    inputs = torch.randn(8, 3)
    assert differing_cuts(model, inputs) == []
    chain = Chain.from_module(model, inputs)
    assert [unit.is_random for unit in chain.units] == [False, True, False]
    runs = partial(chain.segment(0, 2).train(), inputs)
    assert not torch.equal(runs(), runs())
    runs = partial(chain.segment(0, 2).eval(), inputs)
    assert torch.equal(runs(), runs())


class AuxiliaryHead(nn.Module):
    """Other code, and other outputs, in training."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.helper = nn.Linear(3, 2)
        self.last = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.second(self.first(x).relu())
        if self.training:
            return self.last(x), self.helper(x)
        return self.last(x)


def test_a_head_that_only_training_runs_stays_with_its_unit():
    """Training gives the pair, evaluation the one, and every name has one place."""
    model = AuxiliaryHead()
    assert differing_cuts(model, torch.randn(2, 3)) == []
    chain = Chain.from_module(model, torch.zeros(1, 3))
    last = chain.segment(len(chain) - 1, len(chain)).state_dict()
    assert {"helper.weight", "last.weight"} <= set(last)


def test_a_network_with_auxiliary_classifiers_can_be_cut():
    """GoogLeNet's three training outputs and its one in evaluation are unchanged."""
    model = seeded(
        partial(
            torchvision.models.googlenet,
            weights=None,
            num_classes=10,
            init_weights=False,
        )
    )
    inputs = torch.randn(2, 3, 64, 64)
    chain = Chain.from_module(model, inputs)
    assert len(chain) > 10
    for training in (True, False):
        expected = run_whole(model, inputs, training=training)
        found = run_cut(chain, 9, inputs, training=training)
        assert type(found) is type(expected)
        for one, other in zip(expected, found, strict=True):
            assert torch.equal(one, other)


class Misaligned(nn.Module):
    """An operation more in one mode, so that the same names mean other places."""

    def __init__(self, extra_in: bool) -> None:
        super().__init__()
        self.extra_in = extra_in
        self.a = nn.Linear(3, 3)
        self.b = nn.Linear(3, 3)
        self.c = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.training is self.extra_in:
            x = functional.relu(x)
        x = functional.relu(self.b(x))
        x = functional.relu(self.c(x))
        return x * 2


@pytest.mark.parametrize("extra_in", [True, False], ids=["training", "evaluation"])
def test_modes_with_different_operations_are_cut_where_both_agree(extra_in):
    """A place counts only if it divides parameters alike in both modes."""
    model = Misaligned(extra_in)
    assert differing_cuts(model, torch.randn(4, 3)) == []
    chain = Chain.from_module(model, torch.zeros(1, 3))
    for cut in range(1, len(chain)):
        head, tail = chain.segment(0, cut), chain.segment(cut, len(chain))
        assert not set(head.state_dict()) & set(tail.state_dict())


def test_a_wrong_mode_would_be_seen():
    """The comparison of this file tells training from evaluation."""
    model = DropoutBetween()
    inputs = torch.randn(8, 3)
    found = run_cut(Chain.from_module(model, inputs), 1, inputs, training=False)
    expected = run_whole(model, inputs, training=True)
    assert compare({"x": expected}, {"x": found})


# --- parameters without a module ------------------------------------------------------


class ReadEarly(nn.Module):
    """Read a parameter long before it is used."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((3,), 2.0))
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale
        return torch.relu(self.second(self.first(x)) * scale)


def test_a_parameter_belongs_where_it_is_used_not_where_it_is_read():
    """A parameter read at the top of forward goes to the unit that uses it."""
    model = ReadEarly()
    assert differing_cuts(model, torch.randn(2, 3)) == []
    chain = Chain.from_module(model, torch.zeros(1, 3))
    owners = [i for i, unit in enumerate(chain.units) if "scale" in unit.reads]
    assert [chain.unit_names[i] for i in owners] == ["mul"]


class BufferArithmetic(nn.Module):
    """Compute with buffers only, and count in one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.last = nn.Linear(3, 3)
        self.register_buffer("shift", torch.zeros(3))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        x = self.first(x) - self.shift.exp()
        return torch.relu(self.last(x))


def test_buffers_are_read_when_a_unit_runs_not_when_it_is_traced():
    """What is computed from a buffer follows its value; what writes it still does."""
    model = BufferArithmetic()
    inputs = torch.randn(2, 3)
    chain = Chain.from_module(model, inputs)
    assert model.calls == 0
    model.shift += 2
    expected = model(inputs)
    assert model.calls == 1
    for count, cut in enumerate(range(1, len(chain)), start=2):
        head, tail = chain.segment(0, cut), chain.segment(cut, len(chain))
        assert torch.equal(tail(head(inputs)), expected)
        assert model.calls == count


# --- the module is left as it was -----------------------------------------------------


def flags(model: nn.Module) -> dict[str, bool]:
    """Note which modules are in training mode."""
    return {name: module.training for name, module in model.named_modules()}


def test_modes_state_and_chance_are_left_as_they_were():
    """Reading a model changes neither its modes, nor its values, nor the generator."""
    model = small_cnn().eval()
    model.block.train()
    before = flags(model), {n: v.clone() for n, v in model.state_dict().items()}
    generator = torch.get_rng_state()
    Chain.from_module(model, torch.zeros(1, 3, 12, 12))
    assert flags(model) == before[0]
    assert compare(before[1], model.state_dict()) == []
    assert torch.equal(torch.get_rng_state(), generator)


class Branching(nn.Module):
    """A forward that depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return x if x.sum() > 0 else -x


def test_a_model_that_cannot_be_traced_is_named_and_left_as_it_was():
    """The error names the model, says why, and modes are restored."""
    model = Branching().eval()
    with pytest.raises(NotSplittable, match=r"cannot trace Branching: .* branch on"):
        Chain.from_module(model, torch.zeros(1, 3))
    assert flags(model) == {"": False, "first": False}


def test_the_functions_of_a_chain_do_not_hold_the_model():
    """A unit runs on whatever root it is given, here a model with other values."""
    chain = Chain.from_module(small_cnn(), torch.zeros(1, 3, 12, 12))
    other = SmallCNN().eval()
    values: Tensor = torch.randn(2, 3, 12, 12)
    expected = other(values)
    for unit in chain.units:
        values = unit.eval_forward(other, values)
    assert torch.equal(values, expected)


class LoopsOverInput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return sum(row for row in x)


def test_the_line_that_cannot_be_traced_is_named():
    """The place is the model's own, not torch's."""
    with pytest.raises(NotSplittable) as caught:
        Chain.from_module(LoopsOverInput(), torch.zeros(1, 3))
    line = LoopsOverInput.forward.__code__.co_firstlineno + 1
    assert f"It is line {line} of {__file__}, in LoopsOverInput" in str(caught.value)
