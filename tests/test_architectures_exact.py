"""Models of every common kind: each cut is exact, and its bytes are known.

Or a place must not be cut, and the reason says so.
"""

import re
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from flwr_smartsplit.errors import NotSplittable
from flwr_smartsplit.plan.checkpointing.peak_memory import predicted_peak_bytes
from flwr_smartsplit.profile.profile import profile_chain
from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.types import Route
from flwr_smartsplit.verify.equivalence import RouteChecker
from tests.architectures import (
    ARCHITECTURES,
    BATCH_SIZE,
    HUGGING_FACE,
    HUGGING_FACE_TIED,
    LENGTH,
    TIED,
    TOKENS,
    VOCABULARY,
    WIDTH,
    Architecture,
    TwoInputs,
    attention_layer,
    tokens_loss,
)
from tests.models import OPTIMIZERS

# Adam holds most; tests/profile has every optimizer.
WITH_ADAM = [pytest.param("momentum", marks=pytest.mark.slow), "adam"]


def assert_every_route_is_exact(architecture: Architecture, optimizer: str) -> None:
    """Compare the whole model and each cut with the stock model and the prediction."""
    task = architecture.task(OPTIMIZERS[optimizer])
    with RouteChecker(task, architecture.batches(task)) as checker:
        chain = checker.chain
        assert len(chain) == architecture.num_units
        profile = profile_chain(chain, batch_size=BATCH_SIZE, task=task)
        for route in (Route.whole(), *map(Route.split, range(1, len(chain)))):
            check = checker.check(route)
            assert check.differences == ()
            expected = predicted_peak_bytes(profile, route)
            assert check.measured_peak_bytes == expected


@pytest.mark.every(3)
@pytest.mark.parametrize("optimizer", WITH_ADAM)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_cut_is_exact_and_its_bytes_are_known(name, optimizer):
    """Losses, gradients and states are the stock model's; the peak is the predicted."""
    assert_every_route_is_exact(ARCHITECTURES[name], optimizer)


@pytest.mark.every(2)
@pytest.mark.parametrize("optimizer", WITH_ADAM)
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_every_cut_of_a_hugging_face_model_is_exact_and_its_bytes_are_known(
    name, optimizer
):
    """So is what cannot be traced, with dropout and padded examples."""
    pytest.importorskip("transformers")
    assert_every_route_is_exact(HUGGING_FACE[name], optimizer)


# --- places that must not be cut ------------------------------------------------------


@pytest.mark.every(4)
@pytest.mark.parametrize(
    ("architecture", "parameter", "place"),
    [
        (TIED["bert"], "tokens.weight", "layers_0"),
        (TIED["gpt"], "tokens.weight", "norm"),
        (
            HUGGING_FACE_TIED["bert"],
            "bert.embeddings.word_embeddings.weight",
            "bert.encoder.layer.0",
        ),
        (HUGGING_FACE_TIED["gpt"], "transformer.wte.weight", "transformer.h.1"),
    ],
    ids=["bert", "gpt", "hugging face bert", "hugging face gpt"],
)
def test_tied_embeddings_are_refused_by_the_name_of_the_parameter(
    architecture, parameter, place
):
    """A parameter that the first and the last unit use leaves no place to cut."""
    if architecture.units_fn is not None:
        pytest.importorskip("transformers")
    chain = build_chain(architecture.task(OPTIMIZERS["sgd"]))
    assert len(chain) == architecture.num_units == 1
    assert chain.refusals[place] == (
        f"both sides of it use {parameter}; no other place can be cut"
    )
    reason = re.escape(f"{place}: both sides of it use {parameter}")
    with pytest.raises(NotSplittable, match=f"cannot be cut anywhere: .*{reason}"):
        chain.require_cuts()


class SharedMask(nn.Module):
    """A GPT whose layers use one mask, which the model holds."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([attention_layer(), attention_layer()])
        self.head = nn.Linear(WIDTH, VOCABULARY)
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        for layer in self.layers:
            x = layer(x, src_mask=self.mask, is_causal=True)
        return self.head(x)


def test_a_mask_that_several_layers_share_is_named():
    """Between layers that read one buffer of the model there is no cut, only around."""
    shared = Architecture(
        model_fn=SharedMask,
        inputs=TOKENS,
        targets=TOKENS,
        loss_fn=tokens_loss,
        num_units=3,
    )
    chain = build_chain(shared.task(OPTIMIZERS["sgd"]))
    assert chain.refusals == {
        "layers_0": "both sides of it use mask; the nearest cut is after layers.1"
    }
    assert_every_route_is_exact(shared, "adam")


@pytest.mark.parametrize("by_name", [False, True], ids=["tuple", "dict"])
def test_nothing_is_cut_before_a_late_input_has_joined(by_name):
    """What the inputs go through on their own is one unit with the place they meet."""
    late = ARCHITECTURES[f"late input, {'dict' if by_name else 'tuple'}"]
    chain = build_chain(late.task(OPTIMIZERS["sgd"]))
    assert chain.unit_names == ("table", "head")
    assert chain.units[0].reads == ("deep.0", "deep.1", "image", "table")


class JoinsAtTheEnd(TwoInputs):
    """Let the second input in when nothing is left to do."""

    def forward(self, image, table):
        return self.head(self.deep(self.image(image))) + table


def test_an_input_that_joins_at_the_end_leaves_no_place_and_is_named():
    """What is still needed all along leaves no cut."""
    late = Architecture(
        model_fn=partial(JoinsAtTheEnd, meet_late=True),
        inputs=(torch.zeros(2, 8), torch.zeros(2, 3)),
        targets=torch.arange(2),
        loss_fn=torch.nn.functional.cross_entropy,
        num_units=1,
    )
    chain = build_chain(late.task(OPTIMIZERS["sgd"]))
    with pytest.raises(NotSplittable, match="table: it is still needed next to"):
        chain.require_cuts()


def test_a_recurrent_layers_states_are_refused_as_a_tuple():
    """A GRU returns two tensors; the cut comes after one of them is taken."""
    chain = build_chain(ARCHITECTURES["gru"].task(OPTIMIZERS["sgd"]))
    assert chain.unit_names == ("tokens", "gru", "head")
    assert chain.refusals["gru"].startswith("its value is a tuple, not one tensor")
