"""Chains: names stay the model's own, parts add up to the whole, copies are copies."""

from collections.abc import Callable
from functools import partial

import hypothesis.strategies as st
import pytest
import torch
import torchvision
from hypothesis import given, reject, settings
from torch import Tensor, nn
from torch.nn import functional

from flwr_smartsplit.errors import InvalidRoute, InvalidTask, NotSplittable
from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.split.chain import MAX_VARIANTS, Chain
from flwr_smartsplit.split.template import parameters_on_meta
from flwr_smartsplit.types import WHOLE, Variant, width_of
from tests.models import resnet18, small_cnn, task_of
from tests.oracle import compare

WIDTH = 6


def googlenet() -> nn.Module:
    """Build a network with branches, and other outputs in training."""
    return torchvision.models.googlenet(
        weights=None, num_classes=10, init_weights=False
    )


CHAINS: dict[str, Callable[[], Chain]] = {
    "small": lambda: build_chain(task_of(small_cnn)),
    "resnet18": lambda: build_chain(task_of(resnet18, shape=(3, 32, 32))),
    "googlenet": lambda: build_chain(task_of(googlenet, shape=(3, 64, 64))),
}


def shared_names(head: nn.Module, tail: nn.Module) -> set[str]:
    """Name what two segments both hold."""
    return set(head.state_dict()) & set(tail.state_dict())


def test_a_segment_keeps_the_models_own_names():
    """Units [2, 5) yield ``2.weight``, and values are the model's own tensors."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
    segment = Chain.from_module(model, torch.zeros(1, 4)).segment(2, 5)
    names = [f"{i}.{kind}" for i in (2, 3, 4) for kind in ("weight", "bias")]
    assert list(segment.state_dict()) == names
    assert segment.get_parameter("3.bias") is model[3].bias


@pytest.mark.every(2)
@pytest.mark.parametrize("name", CHAINS)
def test_the_two_sides_of_every_cut_hold_every_name_once(name):
    """Whatever the cut, its sides have no name in common and miss none."""
    chain = CHAINS[name]()
    everything = list(chain.model.state_dict())
    for cut in range(1, len(chain)):
        head, tail = chain.segment(0, cut), chain.segment(cut, len(chain))
        assert not shared_names(head, tail)
        assert {*head.state_dict(), *tail.state_dict()} == set(everything)
        sides = [chain.state_names(0, cut), chain.state_names(cut, len(chain))]
        for names, side in zip(sides, (head, tail), strict=True):
            assert set(names) == set(side.state_dict())
            assert list(names) == sorted(names, key=everything.index)


def test_a_name_on_both_sides_would_be_seen():
    """Overlapping segments do share names."""
    chain = CHAINS["small"]()
    assert shared_names(chain.segment(0, 2), chain.segment(1, 3)) == {
        f"norm1.{name}"
        for name in (
            "weight",
            "bias",
            "running_mean",
            "running_var",
            "num_batches_tracked",
        )
    }


class Unused(nn.Module):
    """A model with a layer that its forward never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.spare = nn.Linear(4, 4)
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x))


def test_a_part_that_is_never_run_belongs_to_nobody():
    """A place is asked for exactly the names that its segment can give back."""
    chain = Chain.from_module(Unused(), torch.zeros(1, 4))
    for start, stop in ((0, 1), (1, 2), (0, 2)):
        held = chain.segment(start, stop).state_dict()
        assert set(chain.state_names(start, stop)) == set(held)


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (2, 1), (-1, 2), (0, 14)])
def test_a_range_outside_the_chain_is_refused_with_the_bounds(start, stop):
    """The error says what was asked and what would do."""
    with pytest.raises(InvalidRoute, match=r"chain of 13 units.*stop <= 13"):
        CHAINS["small"]().segment(start, stop)


def storages(module: nn.Module) -> set[int]:
    """Identify the memory a module's tensors lie in."""
    plain = [
        value
        for child in module.modules()
        for value in vars(child).values()
        if isinstance(value, Tensor)
    ]
    tensors = [*module.parameters(), *module.buffers(), *plain]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


class WithConstants(nn.Module):
    """A model with a buffer outside its state, and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.register_buffer("mask", torch.ones(4), persistent=False)
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x) * self.mask)
        return functional.relu(self.last(x + torch.arange(4.0)))


def test_replicas_share_nothing():
    """Two copies of a segment have no memory in common, nor with the model."""
    chain = Chain.from_module(WithConstants(), torch.zeros(1, 4))
    first, second = (chain.own_segment(0, len(chain)) for _ in range(2))
    model = storages(chain.model)
    assert len(storages(first)) == len(storages(second)) == len(model)
    assert not storages(first) & storages(second)
    assert not (storages(first) | storages(second)) & model
    assert storages(chain.segment(0, len(chain))) & model  # this one does share


def test_what_a_replica_does_is_not_seen_by_another():
    """A step of one replica leaves the other, and the model, as they were."""
    chain = Chain.from_module(WithConstants(), torch.zeros(1, 4))
    before = {n: v.clone() for n, v in chain.model.state_dict().items()}
    first, second = (chain.own_segment(0, len(chain)) for _ in range(2))
    first(torch.randn(3, 4)).square().sum().backward()
    torch.optim.SGD(first.parameters(), lr=1.0).step()
    assert compare(before, second.state_dict()) == []
    assert compare(before, chain.model.state_dict()) == []
    changed = {line.split(":")[0] for line in compare(before, first.state_dict())}
    assert {"last.weight", "norm.running_mean", "norm.num_batches_tracked"} <= changed
    assert all(
        p.grad is None for p in (*second.parameters(), *chain.model.parameters())
    )


def test_a_model_without_places_says_so():
    """A single unit cannot be cut; the error carries each place's reason."""
    chain = Chain.from_module(nn.Sequential(nn.Linear(4, 2)), torch.zeros(1, 4))
    with pytest.raises(NotSplittable, match="Sequential cannot be cut anywhere: it is"):
        chain.require_cuts()
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    chain = Chain.from_module(model, torch.zeros(1, 4))
    with pytest.raises(NotSplittable, match="_0: _1 writes into it"):
        chain.require_cuts()
    CHAINS["small"]().require_cuts()


# --- any model ------------------------------------------------------------------------


class Skip(nn.Module):
    """Go around a layer, which must not be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + functional.relu(self.norm(self.inner(x)))


class TwoCalls(nn.Module):
    """Call one layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.inner(x).tanh())


class Halves(nn.Module):
    """Use two views of one tensor, one of them written in place."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.mul(2)
        left, right = x[:, : WIDTH // 2], x[:, WIDTH // 2 :]
        return torch.cat([right, left.mul_(3)], dim=1)


class Scale(nn.Module):
    """Read a parameter without a module."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((WIDTH,), 1.5))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.scale).view(-1, 2, WIDTH // 2).flatten(1)


PIECES: dict[str, Callable[[], nn.Module]] = {
    "linear": partial(nn.Linear, WIDTH, WIDTH),
    "batchnorm": partial(nn.BatchNorm1d, WIDTH),
    "relu": nn.ReLU,
    "relu_": partial(nn.ReLU, inplace=True),
    "dropout": partial(nn.Dropout, 0.5),
    "dropout_": partial(nn.Dropout, 0.5, inplace=True),
    "identity": nn.Identity,
    "skip": Skip,
    "two calls": TwoCalls,
    "halves": Halves,
    "scale": Scale,
}


def one_step(model: nn.Module, run: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Run forward and backward from fixed numbers; return all that came of it."""
    model.zero_grad()
    torch.manual_seed(5)
    inputs = torch.randn(4, WIDTH)
    output = run(inputs)
    output.square().mean().backward()
    gradients = {
        f"gradient {n}": p.grad.clone()
        for n, p in model.named_parameters()
        if p.grad is not None
    }
    state = {f"state {n}": v.clone() for n, v in model.state_dict().items()}
    return {"output": output.detach()} | gradients | state


def cut_run(chain: Chain, cut: int, *, bend: float = 0.0) -> Callable[[Tensor], Tensor]:
    """Run a chain in two parts that only a detached boundary connects."""

    def run(inputs: Tensor) -> Tensor:
        head, tail = chain.segment(0, cut), chain.segment(cut, len(chain))
        boundary = head.train()(inputs)
        entered = boundary.detach().clone().requires_grad_()
        entered.register_hook(lambda grad: boundary.backward(grad * (1 + bend)))
        return tail.train()(entered)

    return run


@settings(max_examples=30)
@given(st.lists(st.sampled_from(sorted(PIECES)), min_size=1, max_size=6))
def test_any_cut_of_any_model_changes_no_number(kinds):
    """For random models, each cut gives the whole's outputs, gradients and state."""
    torch.manual_seed(len(kinds))
    model = nn.Sequential(
        nn.Linear(WIDTH, WIDTH),
        *(PIECES[kind]() for kind in kinds),
        nn.Linear(WIDTH, 2),
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        expected = one_step(model, model.train())
    except RuntimeError:
        reject()  # The stock model writes over what its own backward needs.
    chain = Chain.from_module(model, torch.zeros(1, WIDTH))
    assert len(set(chain.unit_names)) == len(chain)
    for cut in range(1, len(chain)):
        model.load_state_dict(before)
        head, tail = chain.segment(0, cut), chain.segment(cut, len(chain))
        assert not shared_names(head, tail)
        assert compare(expected, one_step(model, cut_run(chain, cut))) == []


def test_a_boundary_gradient_bent_by_1e_4_would_be_seen():
    """The comparison above sees it in each gradient before the cut, and only there."""
    chain = Chain.from_module(
        nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 2)),
        torch.zeros(1, WIDTH),
    )
    expected = one_step(chain.model, chain.model)
    assert compare(expected, one_step(chain.model, cut_run(chain, 1))) == []
    bent = compare(expected, one_step(chain.model, cut_run(chain, 1, bend=1e-4)))
    names = ["gradient 0.bias", "gradient 0.weight"]
    assert [difference.split(":")[0] for difference in bent] == names


def test_a_chain_can_be_read_without_any_parameter_in_memory():
    """Parameters on meta give the same units as real ones."""
    with parameters_on_meta():
        hollow = small_cnn()
    example = torch.zeros(1, 3, 12, 12)
    chain = Chain.from_module(hollow, example)
    assert all(parameter.is_meta for parameter in chain.model.parameters())
    real = Chain.from_module(small_cnn(), example)
    assert chain.unit_names == real.unit_names
    assert chain.refusals == real.refusals


def test_a_variant_that_nobody_knows_is_named() -> None:
    """The whole model is the chain itself."""
    chain = CHAINS["small"]()
    assert chain.under(WHOLE) is chain
    with pytest.raises(InvalidTask, match="variant 'front' is not known"):
        chain.under(Variant("front"))
    unknown = Variant("front", {"nowhere": (0,)})
    for ask in (chain.under, chain.regions):
        with pytest.raises(InvalidTask, match="no channel group 'nowhere'"):
            ask(unknown)


def test_a_narrow_chain_has_the_example_inputs_of_its_whole() -> None:
    """Also where larger ones were given later: it is priced at those."""
    chain = CHAINS["small"]()
    variant = width_of(chain.channels.groups, 0.5)
    assert chain.under(variant).example_inputs is chain.example_inputs
    larger = torch.zeros(1, 3, 12, 12)
    assert chain.given(larger).under(variant).example_inputs is larger
    assert chain.under(variant).example_inputs is chain.example_inputs


def test_variants_of_one_size_share_a_chain() -> None:
    """Of few sizes: what is old is forgotten."""
    chain = CHAINS["small"]()
    groups = chain.channels.groups
    half = [width_of(groups, 0.5, shift=shift) for shift in range(2)]
    assert chain.under(half[0]) is chain.under(half[1])
    assert chain.under(half[0]).unit_names == chain.unit_names
    assert chain.regions(half[0]) is chain.regions(half[0])
    for shift in range(MAX_VARIANTS + 2):
        chain.regions(Variant(f"{shift}", half[0].kept))
    assert len(chain._regions) == MAX_VARIANTS
