"""Frozen parts and adapters: every cut is offered, exact, and predicted to the byte."""

from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import nn

from flwr_smartsplit.errors import NotSplittable
from flwr_smartsplit.plan.checkpointing.peak_memory import predicted_peak_bytes
from flwr_smartsplit.plan.tail_memory import tail_bytes
from flwr_smartsplit.profile.profile import profile_chain
from flwr_smartsplit.split import fake_tensors
from flwr_smartsplit.split.build import build_chain, materialise, state_of
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.split.huggingface import decoder_units, encoder_units
from flwr_smartsplit.split.segment import Unit
from flwr_smartsplit.types import ChainProfile, Route
from flwr_smartsplit.verify.equivalence import RouteChecker
from tests.adapters import FROZEN, PEFT, lora, with_lora
from tests.architectures import BATCH_SIZE, Architecture, hugging_face_model
from tests.models import OPTIMIZERS
from tests.slow_cases import daily

# make test-all has the others, which show the same of more models.
DAILY = {
    "adapters by hand",
    "biases only",
    "frozen middle",
    "norm behind a frozen layer",
}
DAILY |= {"peft: convolutions", "peft: tied gpt"}
ALL = FROZEN | {f"peft: {name}": each for name, each in PEFT.items()}


def check_routes(architecture: Architecture, shapes: list[tuple[int, int]]) -> None:
    """Compare with the stock model, and the peaks with the prediction."""
    routes = [Route.whole(), *map(Route.split, range(1, architecture.num_units))]
    routes += [Route.u_shape(*shape) for shape in shapes]
    task = architecture.task(OPTIMIZERS["adam"])
    with RouteChecker(task, architecture.batches(task)) as checker:
        assert len(checker.chain) == architecture.num_units
        profile = profile_chain(checker.chain, batch_size=BATCH_SIZE, task=task)
        for route in routes:
            check = checker.check(route)
            assert check.differences == (), str(route)
            assert check.measured_peak_bytes == predicted_peak_bytes(profile, route)


@pytest.mark.every(3)
@pytest.mark.parametrize("name", daily(DAILY.__contains__, ((each,) for each in ALL)))
def test_every_cut_is_exact_and_takes_what_is_predicted(name: str) -> None:
    """Loss, gradients and state are the stock model's; one u-shape, too."""
    check_routes(ALL[name], [(1, ALL[name].num_units - 1)])


@pytest.mark.parametrize("name", ["biases only", "norm behind a frozen layer"])
def test_gradients_that_fakes_leave_out_or_add_would_be_seen(name, monkeypatch):
    """Where parts are frozen, the CPU computes other ones than torch's fakes."""
    task = ALL[name].task(OPTIMIZERS["adam"])

    def predicted() -> list[int]:
        found = profile_chain(build_chain(task), batch_size=BATCH_SIZE, task=task)
        return [unit.device_peak_bytes for unit in found.units]

    right = predicted()
    monkeypatch.setattr(fake_tensors, "_MASKED", set())
    assert predicted() != right


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_so_is_every_u_shape(name: str) -> None:
    """Wherever the frozen parts are."""
    cuts = range(1, ALL[name].num_units)
    check_routes(ALL[name], [(i, j) for i in cuts for j in cuts if i < j])


@pytest.mark.every(2)
@pytest.mark.parametrize("name", ALL)
def test_only_what_is_trained_comes_back(name: str) -> None:
    """Frozen parameters do not; the boundary behind a frozen front is one-way."""
    task = ALL[name].task(OPTIMIZERS["sgd"])
    chain = build_chain(task)
    parameters = dict(chain.model.named_parameters(remove_duplicate=False))
    frozen = {n for n, p in parameters.items() if not p.requires_grad}
    trained = parameters.keys() - frozen
    assert frozen
    changed = set(chain.changed_names(0, len(chain)))
    assert changed & parameters.keys() == trained
    for index, unit in enumerate(chain.units[:-1]):
        before = trained & set(chain.state_names(0, index + 1))
        assert any(unit.gradients) == bool(before)


# --- tied embeddings ------------------------------------------------------------------


def tied_profile(architecture: Architecture) -> tuple[ChainProfile, int]:
    """Profile a tied decoder; return also the size of its embeddings."""
    task = architecture.task(OPTIMIZERS["adam"])
    chain = build_chain(task)
    profile = profile_chain(chain, batch_size=BATCH_SIZE, task=task)
    return profile, chain.model.get_input_embeddings().weight.nbytes


def test_frozen_tied_embeddings_are_held_once_at_each_place() -> None:
    """A device with both ends holds one, an edge with the last unit its own."""
    profile, size = tied_profile(PEFT["tied gpt"])
    (shared,) = profile.shared
    assert (shared.units, shared.num_bytes) == ((0, 3), size)
    assert profile.repeated_bytes(range(4)) == size
    assert profile.repeated_bytes([0, 1]) == profile.repeated_bytes([2, 3]) == 0
    alone, _ = tied_profile(lora("GPT2LMHeadModel", "c_attn", "c_fc"))
    route = Route.u_shape(1, 3)
    assert (
        predicted_peak_bytes(alone, route) - predicted_peak_bytes(profile, route)
        == size
    )
    assert tail_bytes(profile, 1, 4) == tail_bytes(alone, 1, 4)


def test_a_second_segment_of_a_place_shares_the_frozen_tensors_of_the_first() -> None:
    """And only those; without it each has its own."""
    chain = build_chain(PEFT["tied gpt"].task(OPTIMIZERS["sgd"]))
    state = state_of(PEFT["tied gpt"].model_fn())
    first = materialise(chain, 0, 1, state)
    last = materialise(chain, 3, 4, state, beside=[first])
    other = materialise(chain, 3, 4, state)
    name = "base_model.model.transformer.wte.weight"
    tied = "base_model.model.lm_head.weight"
    assert last.get_parameter(tied) is first.get_parameter(name)
    assert other.get_parameter(tied) is not first.get_parameter(name)


def test_trained_tied_embeddings_are_still_one_unit() -> None:
    """Both sides would train them."""
    tied = hugging_face_model("GPT2LMHeadModel", tie_word_embeddings=True)
    assert len(build_chain(tied.task(OPTIMIZERS["sgd"]))) == 1


class Codebook(nn.Module):
    """A frozen matrix that is used twice, and maybe moved by forward."""

    def __init__(self, *, is_moved: bool) -> None:
        super().__init__()
        self.is_moved = is_moved
        self.codes = nn.Parameter(torch.eye(8), requires_grad=False)
        self.middle = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.middle(x @ self.codes).relu()
        if self.is_moved:
            self.codes.add_(1.0)
        return x @ self.codes


def test_a_frozen_tensor_that_forward_writes_is_not_used_on_both_sides() -> None:
    """Each side would have its own, and see only its own writes."""
    inputs = torch.zeros(2, 8)
    still = Chain.from_module(Codebook(is_moved=False), inputs)
    moved = Chain.from_module(Codebook(is_moved=True), inputs)
    assert len(still) > 1
    assert any("both sides of it use codes" in why for why in moved.refusals.values())


def test_an_edges_disk_has_no_frozen_parameters() -> None:
    """It keeps what is merged."""
    for architecture in (PEFT["tied gpt"], FROZEN["frozen middle"]):
        task = architecture.task(OPTIMIZERS["sgd"])
        chain = build_chain(task)
        profile = profile_chain(chain, batch_size=BATCH_SIZE, task=task)
        state = chain.model.state_dict()
        for start in range(1, len(chain)):
            changed = chain.changed_names(start, len(chain))
            found = tail_bytes(profile, start, len(chain)).disk_bytes
            assert found == sum(state[name].nbytes for name in changed)


# --- what peft may be -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("PromptTuningConfig", {"num_virtual_tokens": 2}),
        ("PrefixTuningConfig", {"num_virtual_tokens": 2}),
    ],
)
def test_adapters_that_are_no_modules_of_the_model_are_refused(kind, config) -> None:
    """They add tokens, which the units would lose."""
    peft = import_module("peft")
    base = hugging_face_model("GPT2LMHeadModel").model_fn()
    options = {"task_type": "CAUSAL_LM", **config}
    model = peft.get_peft_model(base, getattr(peft, kind)(**options))
    with pytest.raises(NotSplittable, match=f"while {kind} adds to its forward"):
        decoder_units(model)


def test_a_model_of_peft_around_another_class_is_refused_by_its_own_name() -> None:
    """As the class itself is."""
    model = with_lora(lambda: nn.Sequential(nn.Linear(2, 2)), target_modules=["0"])
    with pytest.raises(NotSplittable, match="encoder_units has no units for Sequenti"):
        encoder_units(model)


def test_a_unit_that_skips_its_adapters_is_seen() -> None:
    """The planted error: a layer whose adapters are switched off while it runs."""

    def deaf_units(model: nn.Module) -> list[Unit]:
        first, layer, *others = encoder_units(model)
        return [first, replace(layer, forward=partial(switched_off, layer)), *others]

    bert = replace(PEFT["tied bert"], units_fn=deaf_units)
    task = bert.task(OPTIMIZERS["sgd"])
    with RouteChecker(task, bert.batches(task)) as checker:
        assert checker.check(Route.split(2)).differences


def switched_off(unit: Unit, root: nn.Module, *values: Any) -> Any:
    """Run a unit without its adapters."""
    layers = [m for m in root.modules() if hasattr(m, "disable_adapters")]
    for layer in layers:
        layer._disable_adapters = True
    try:
        return unit.forward(root, *values)
    finally:
        for layer in layers:
            layer._disable_adapters = False
