"""Channel groups: what is understood is narrowed, everything else stays whole."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm

from flwr_smartsplit.errors import NotSplittable
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.split.narrow.channels import find_channels
from flwr_smartsplit.split.narrow.narrowed import narrowed
from flwr_smartsplit.split.narrow.narrowing import narrowed_module
from flwr_smartsplit.types import width_of
from tests.split.narrow.masks import is_masked

EXAMPLE = torch.zeros(1, 3, 8, 8)


class Between(nn.Module):
    """A convolution, anything, and a convolution."""

    def __init__(self, what: Callable[..., Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.parts = nn.ModuleDict(parts)
        self.scale = nn.Parameter(torch.ones(8, 1, 1))
        self.what = what
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Run all three."""
        outputs: Tensor = self.last(self.what(self, self.first(x)))
        return outputs


def module(part: nn.Module) -> Between:
    """Put a module between."""
    return Between(lambda root, x: root.parts["it"](x), it=part)


def plain(what: Callable[[Tensor], Tensor]) -> Between:
    """Put a function of the value between."""
    return Between(lambda root, x: what(x))


def names(model: nn.Module, example: Tensor = EXAMPLE) -> list[str]:
    """Name a model's groups."""
    return [group.name for group in find_channels(model, example).groups]


def squeezed(root: Any, x: Tensor) -> Tensor:
    """Excite channels by their means, as written in most repositories."""
    batch, channels, _, _ = x.size()
    y = functional.adaptive_avg_pool2d(x, 1).view(batch, channels)
    y = root.parts["up"](functional.relu(root.parts["down"](y)))
    return x * y.view(batch, channels, 1, 1).expand_as(x)


UNDERSTOOD = {
    "relu": module(nn.ReLU(inplace=True)),
    "batch norm": module(nn.BatchNorm2d(8)),
    "instance norm": module(nn.InstanceNorm2d(8, affine=True)),
    "group norm": module(nn.GroupNorm(4, 8)),
    "depthwise": module(nn.Conv2d(8, 8, 3, groups=8, padding=1)),
    "pool": module(nn.AvgPool2d(2)),
    "upsample": module(nn.Upsample(scale_factor=2)),
    "prelu": module(nn.PReLU()),
    "numbers": plain(lambda x: 2 * x + 1),
    "skip": Between(lambda root, x: x + root.parts["it"](x), it=nn.Conv2d(8, 8, 1)),
    "in place": Between(
        lambda root, x: root.parts["it"](x).add_(x), it=nn.Conv2d(8, 8, 1)
    ),
    "functions": plain(lambda x: functional.max_pool2d(torch.relu(x), 2)),
    "methods": plain(lambda x: x.contiguous().sigmoid().clamp(0, 1)),
    "spatial mean": plain(lambda x: x * x.mean([2, 3], keepdim=True)),
    "squeeze and excite": Between(squeezed, down=nn.Linear(8, 4), up=nn.Linear(4, 8)),
    "transposed": module(nn.ConvTranspose2d(8, 8, 2)),
}
WHOLE = {
    "spatial attention": plain(lambda x: x * torch.sigmoid(x.mean(1, keepdim=True))),
    "softmax": plain(lambda x: torch.softmax(x, 1)),
    "concatenation": plain(lambda x: torch.cat([x[:, :4], x[:, 4:]], 1)),
    "a slice": plain(lambda x: x[:, torch.arange(8).flip(0)]),
    "shuffled": module(nn.ChannelShuffle(2)),
    "layer norm": module(nn.LayerNorm([8, 8, 8])),
    "local response": module(nn.LocalResponseNorm(2)),
    "a parameter": Between(lambda root, x: x * root.scale),
    "a layer's weight": Between(
        lambda root, x: functional.conv2d(x, root.parts["it"].weight),
        it=nn.Conv2d(8, 8, 1),
    ),
    "a baked number": plain(lambda x: x.view(-1, 8, 8, 8)),
    "the number of channels": plain(lambda x: x / x.shape[1]),
    "a mean over channels": plain(lambda x: x - x.mean((1, 2, 3), keepdim=True)),
    "grouped": module(nn.Conv2d(8, 8, 1, groups=2)),
    "group norm without values": module(nn.GroupNorm(4, 8, affine=False)),
    "a subclass": module(type("Mine", (nn.ReLU,), {})()),
    "parametrized": module(spectral_norm(nn.Conv2d(8, 8, 1))),
    "pooled channels": plain(
        lambda x: functional.max_pool3d(x, (2, 1, 1)).repeat(1, 2, 1, 1)
    ),
    "transposed axes": plain(lambda x: x.transpose(1, 2)),
}


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_what_is_understood_is_narrowed(name: str) -> None:
    """And the narrow model is the masked one, in evaluation."""
    model = UNDERSTOOD[name]
    channels = find_channels(model, EXAMPLE)
    assert "first.weight" in [group.name for group in channels.groups]
    variant = width_of(channels.groups, 0.5, shift=1)
    small = narrowed_module(model, channels.groups, variant)
    assert small.first.out_channels == 4  # type: ignore[union-attr]
    small.train()(torch.randn(2, 3, 8, 8)).sum().backward()
    assert is_masked(model, channels.groups, variant, EXAMPLE)


@pytest.mark.parametrize("name", WHOLE)
def test_what_is_not_understood_stays_whole(name: str) -> None:
    """With the reason, by the layer that makes the channels."""
    model = WHOLE[name]
    channels = find_channels(model, EXAMPLE)
    assert "first.weight" not in [group.name for group in channels.groups]
    assert channels.reasons["first.weight"]


def test_a_group_without_its_rule_would_be_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The planted error: softmax taken for what does the same to every value."""
    from flwr_smartsplit.split.narrow import operations  # noqa: PLC0415

    monkeypatch.setattr(operations, "EACH", {*operations.EACH, torch.softmax})
    model = WHOLE["softmax"]
    groups = find_channels(model, EXAMPLE).groups
    assert not is_masked(model, groups, width_of(groups, 0.5), EXAMPLE)


def test_channels_that_meet_are_one_group() -> None:
    """All that a skip connection joins, by the name of the first."""
    (group,) = find_channels(UNDERSTOOD["skip"], EXAMPLE).groups
    assert group.name == "first.weight"
    places = [(axis.name, axis.axis) for axis in group.axes]
    assert places == [
        ("first.weight", 0),
        ("first.bias", 0),
        ("parts.it.weight", 1),
        ("parts.it.weight", 0),
        ("parts.it.bias", 0),
        ("last.weight", 1),
    ]
    assert group.unscaled == ("first", "parts.it")


def test_a_group_norm_keeps_its_groups_and_a_flattening_repeats() -> None:
    """GroupNorms of 2 and 3 channels each: runs of 6, of which 12 has two."""
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3),
        nn.GroupNorm(6, 12),
        nn.GroupNorm(4, 12),
        nn.Flatten(),
        nn.Linear(12 * 36, 2),
    )
    (group,) = find_channels(model, EXAMPLE).groups
    assert group.multiple == 6
    assert group.axes[-1].repeat == 36
    assert not group.unscaled
    variant = width_of([group], 0.5)
    assert is_masked(model, [group], variant, EXAMPLE)


class Shared(nn.Module):
    """One layer in two places, and one weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.twice = nn.Conv2d(8, 8, 1)
        self.again = self.twice
        self.last = nn.Conv2d(8, 8, 1)
        self.last.weight = self.twice.weight
        self.end = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Run one layer twice."""
        outputs: Tensor = self.end(self.last(self.again(self.twice(self.first(x)))))
        return outputs


def test_shared_layers_and_weights_have_one_group() -> None:
    """Under all their names, and they stay shared."""
    model = Shared()
    groups = find_channels(model, EXAMPLE).groups
    assert [group.name for group in groups] == ["first.weight"]
    small = narrowed_module(model, groups, width_of(groups, 0.5))
    assert small.twice is small.again
    assert small.last.weight is small.twice.weight  # type: ignore[union-attr]
    assert is_masked(model, groups, width_of(groups, 0.5, shift=3), EXAMPLE)


class Mixed(nn.Module):
    """A layer that is once called with channels that stay whole."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 1)
        self.twice = nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Use one layer on the input, too."""
        outputs: Tensor = self.twice(self.first(x)) + self.twice(x)
        return outputs


def test_a_layer_that_once_reads_what_stays_whole_is_whole() -> None:
    """Else its two inputs would differ in width."""
    assert names(Mixed()) == []


class ByMode(nn.Module):
    """Another layer in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the channels in evaluation only."""
        x = self.first(x)
        outputs: Tensor = self.last(x if self.training else x.softmax(1))
        return outputs


def test_both_modes_are_read() -> None:
    """What only evaluation does keeps channels, too."""
    assert names(ByMode()) == []


def test_a_model_without_groups_says_what_stops_it() -> None:
    """By layer."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Softmax(1), nn.Conv2d(8, 2, 1))
    with pytest.raises(NotSplittable, match=r"0\.weight: 1 is not understood"):
        find_channels(model, EXAMPLE).require_groups(model)


def test_the_model_is_left_as_it_was() -> None:
    """Its mode, its state, its hooks."""
    model = UNDERSTOOD["batch norm"].train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    find_channels(model, EXAMPLE)
    assert model.training
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


class ReadsASize(nn.Module):
    """Scale by how large a layer is, as attention in plain torch often does."""

    def __init__(self, *, from_shape: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.from_shape = from_shape

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(torch.relu(self.a(x)))
        if self.from_shape:
            return self.c(x / 8**0.5)
        return self.c(x / self.b.out_features**0.5)


def test_a_forward_that_reads_the_size_of_a_layer_is_refused() -> None:
    """The narrow module would divide by another number than the chain's units.

    A number in the code is the same in both.
    """
    inputs = torch.zeros(1, 6)
    narrowed(ReadsASize(from_shape=False).eval(), 1.0, inputs)
    with pytest.raises(NotSplittable, match="reads the size of a layer"):
        narrowed(ReadsASize(from_shape=False), 0.5, inputs)
    chain = Chain.from_module(ReadsASize(from_shape=False), inputs)
    half = width_of(chain.channels.groups, 0.5)
    with pytest.raises(NotSplittable, match=r"use a number or a shape"):
        chain.under(half)
    small = narrowed(ReadsASize(from_shape=True), 0.5, inputs)
    assert small.b.out_features == 4
