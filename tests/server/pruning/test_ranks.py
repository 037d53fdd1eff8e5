"""Ranks of feature maps, on layers whose maps are known."""

import torch
from torch import nn

from flwr_smartsplit.server.pruning.ranks import measured_ranks
from flwr_smartsplit.split.narrow.channels import find_channels

INPUTS = torch.eye(4)[None, None].repeat(2, 1, 1, 1)
TARGETS = torch.zeros(2, dtype=torch.int64)


class Tied(nn.Module):
    """Two convolutions whose outputs are added."""

    def __init__(self, *, has_norm: bool = False) -> None:
        super().__init__()
        self.a = nn.Conv2d(1, 3, 1, bias=True)
        self.b = nn.Conv2d(1, 3, 1, bias=True)
        self.norm = nn.BatchNorm2d(3) if has_norm else nn.Identity()
        self.last = nn.Conv2d(3, 2, 1)
        for layer, weights in ((self.a, (1.0, -1.0, 0.0)), (self.b, (2.0, 3.0, 0.0))):
            nn.init.zeros_(layer.bias)
            layer.weight.data = torch.tensor(weights).reshape(3, 1, 1, 1)
        self.a.bias.data[2] = 1.0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return maps, added up over positions."""
        x = self.norm(self.a(inputs)) + self.b(inputs)
        return self.last(torch.relu(x)).mean((2, 3))


def ranks(model: nn.Module, batches=((INPUTS, TARGETS),)) -> list[float]:
    """Measure the first group's."""
    groups = find_channels(model, INPUTS).groups
    return measured_ranks(model, groups, batches)["a.weight"].tolist()


def test_ranks_are_those_of_the_maps_of_all_layers_that_are_added() -> None:
    """The unit matrix has 4, a negative one none after ReLU, a constant one 1."""
    assert ranks(Tied()) == [4 + 4, 0 + 4, 1 + 0]


def test_they_are_means_over_examples() -> None:
    """However the examples come in batches; a map of one row more counts."""
    other = INPUTS.clone()
    other[:, :, 2:] = 0
    both = torch.cat([INPUTS, other])
    targets = torch.zeros(4, dtype=torch.int64)
    wanted = [6.0, 3.0, 1.0]
    assert ranks(Tied(), [(INPUTS, TARGETS), (other, TARGETS)]) == wanted
    assert ranks(Tied(), [(both, targets)]) == wanted


def test_a_normalisation_makes_the_map() -> None:
    """Not the convolution before it."""
    model = Tied(has_norm=True)
    model.norm.weight.data = torch.tensor([-1.0, -1.0, 0.0])
    assert ranks(model) == [0 + 4, 4 + 4, 0 + 0]


def test_nothing_is_left_on_the_model() -> None:
    """No hook stays."""
    model = Tied()
    ranks(model)
    assert not any(each._forward_hooks for each in model.modules())
