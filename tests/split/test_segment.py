"""Segments and their runner: one part of a step, at whatever place."""

from contextlib import AbstractContextManager, nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from flwr_smartsplit.memory.cap import memory_cap
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.task import Task
from flwr_smartsplit.train.rng import stream
from flwr_smartsplit.train.segment_runner import SegmentRunner
from tests.models import (
    OPTIMIZERS,
    SMALL_CNN_RANDOM,
    batches_of,
    small_cnn,
    task_of,
)
from tests.oracle import compare

NUM_UNITS = 13


def chain_of(model: nn.Module) -> Chain:
    """Read a model of the small network's inputs."""
    return Chain.from_module(model, torch.zeros(1, 3, 12, 12))


def task(optimizer: str = "sgd") -> Task:
    """Make the small network's task."""
    return task_of(small_cnn, optimizer=OPTIMIZERS[optimizer])


class Listener:
    """Note which streams are opened, and make each unit's numbers its own."""

    def __init__(self) -> None:
        self.opened: list[tuple[int, int]] = []

    def __call__(self, step: int, unit: int) -> AbstractContextManager[None]:
        self.opened.append((step, unit))
        return stream(100 * step + unit)


# --- streams --------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 3, 5])
def test_each_random_unit_runs_under_its_own_stream(start):
    """Streams are opened for (step, index in the chain), in training, in order."""
    listener = Listener()
    chain = chain_of(small_cnn())
    values = batches_of(1, 2)[0][0]
    if start:
        values = chain.segment(0, start)(values).detach()
    segment = chain.segment(start, NUM_UNITS).train()
    segment(values, streams=listener, step=4)
    units = [unit for unit in SMALL_CNN_RANDOM.values() if unit >= start]
    assert listener.opened == [(4, unit) for unit in units]
    listener.opened.clear()
    segment.eval()(values, streams=listener, step=4)
    assert listener.opened == []


def test_a_units_numbers_do_not_depend_on_the_cut():
    """Wherever the chain is cut, each unit draws what it draws in the whole."""
    chain = chain_of(small_cnn())
    inputs = batches_of(1, 2)[0][0]
    run = partial(chain.segment(0, NUM_UNITS).train(), streams=Listener())
    expected = run(inputs)
    assert torch.equal(run(inputs), expected)
    assert not torch.equal(run(inputs, step=1), expected)
    for cut in range(1, NUM_UNITS):
        head, tail = (
            chain.segment(0, cut).train(),
            chain.segment(cut, NUM_UNITS).train(),
        )
        torch.manual_seed(cut)
        boundary = head(inputs, streams=Listener())
        assert torch.equal(tail(boundary, streams=Listener()), expected)


def test_the_generator_is_put_back_after_a_random_unit():
    """Under streams, a step leaves torch's own generator where it was."""
    chain = chain_of(small_cnn())
    before = torch.get_rng_state()
    runner = SegmentRunner(chain.segment(0, NUM_UNITS), task(), streams=Listener())
    runner.finish(*batches_of(1, 2)[0], step=0, inputs_are_boundary=False)
    assert torch.equal(torch.get_rng_state(), before)


# --- one step in two parts ------------------------------------------------------------


def whole_step(model: nn.Module, optimizer: str) -> dict[str, Tensor]:
    """Do one step of the whole chain; return everything."""
    runner = SegmentRunner(
        chain_of(model).segment(0, NUM_UNITS), task(optimizer), streams=Listener()
    )
    loss, gradients = runner.finish(
        *batches_of(1, 4)[0], step=0, inputs_are_boundary=False
    )
    assert gradients == ()
    return everything(model) | {"loss": loss}


def everything(model: nn.Module) -> dict[str, Tensor]:
    """Copy a model's state and gradients."""
    gradients = {
        f"gradient {name}": parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return gradients | {n: value.clone() for n, value in model.state_dict().items()}


def split_step(model: nn.Module, cut: int, optimizer: str) -> dict[str, Tensor]:
    """Do the same step with two runners, which share nothing but the boundary."""
    chain, listener = chain_of(model), Listener()
    head = SegmentRunner(chain.segment(0, cut), task(optimizer), streams=listener)
    tail = SegmentRunner(
        chain.segment(cut, NUM_UNITS), task(optimizer), streams=listener
    )
    inputs, targets = batches_of(1, 4)[0]
    (boundary,) = head.forward(inputs, step=0, inputs_are_boundary=False)
    loss, gradients = tail.finish(
        boundary.clone(), targets, step=0, inputs_are_boundary=True
    )
    assert len(gradients) == 1
    assert head.backward(lambda: gradients) == ()
    return everything(model) | {"loss": loss}


@pytest.mark.every(5)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("cut", range(1, NUM_UNITS))
def test_two_runners_do_the_step_of_one(cut, optimizer):
    """Loss, gradients, buffers and updated parameters are the same bits."""
    expected = whole_step(small_cnn(), optimizer)
    assert compare(expected, split_step(small_cnn(), cut, optimizer)) == []


@pytest.mark.parametrize("cuts", [(2, 3), (1, 9), (6, 12)])
def test_a_segment_in_the_middle_passes_the_gradient_on(cuts):
    """Three runners do the step of one: a hop takes a gradient and gives one."""
    model, listener = small_cnn(), Listener()
    chain = chain_of(model)
    bounds = zip((0, *cuts), (*cuts, NUM_UNITS), strict=True)
    head, hop, tail = (
        SegmentRunner(chain.segment(*pair), task("adam"), streams=listener)
        for pair in bounds
    )
    inputs, targets = batches_of(1, 4)[0]
    first = head.forward(inputs, step=0, inputs_are_boundary=False)
    second = hop.forward(first, step=0, inputs_are_boundary=True)
    loss, gradients = tail.finish(second, targets, step=0, inputs_are_boundary=True)
    passed_on = hop.backward(lambda: gradients)
    head.backward(lambda: passed_on)
    found = everything(model) | {"loss": loss}
    assert compare(whole_step(small_cnn(), "adam"), found) == []


# --- the boundary's gradient ----------------------------------------------------------


def test_the_boundary_gradient_keeps_its_strides():
    """It is given as backward computed it; reading ``.grad`` would re-lay it out."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Flatten())
    chain = Chain.from_module(model, torch.zeros(1, 3, 4))
    runner = SegmentRunner(chain.segment(1, 2), task_of(nn.Identity, shape=(4,)))
    strided = torch.randn(3, 2, 3).permute(1, 2, 0).requires_grad_()
    seen: list[Tensor] = []
    strided.register_hook(seen.append)
    runner.segment(strided).backward(torch.ones(2, 9))
    runner.forward(strided.detach(), step=0, inputs_are_boundary=True)
    (gradient,) = runner.backward(lambda: (torch.ones(2, 9),))
    assert gradient.stride() == seen[0].stride() != strided.stride()
    assert torch.equal(gradient, seen[0])


def test_a_boundary_may_come_as_a_tuple_of_one():
    """Loaders give tuples, wires give tensors."""
    chain = chain_of(small_cnn())
    boundary = chain.segment(0, 5)(batches_of(1, 2)[0][0]).detach()
    gradients = []
    for value in (boundary, (boundary,)):
        tail = SegmentRunner(
            chain.own_segment(5, NUM_UNITS), task(), streams=Listener()
        )
        targets = batches_of(1, 2)[0][1]
        _, (gradient,) = tail.finish(value, targets, step=0, inputs_are_boundary=True)
        gradients.append(gradient)
    assert torch.equal(*gradients)


def test_what_comes_in_is_left_as_it_was():
    """A runner neither changes its inputs nor makes them require gradients."""
    chain = chain_of(small_cnn())
    boundary = chain.segment(0, 5)(batches_of(1, 2)[0][0]).detach()
    before = boundary.clone()
    tail = SegmentRunner(chain.segment(5, NUM_UNITS), task(), streams=Listener())
    tail.finish(boundary, batches_of(1, 2)[0][1], step=0, inputs_are_boundary=True)
    assert torch.equal(boundary, before)
    assert not boundary.requires_grad
    assert boundary.grad is None


# --- the course of a step -------------------------------------------------------------


def test_gradients_do_not_pile_up_over_steps():
    """Each step starts from none: the second step alone gives the second gradients."""
    runner = SegmentRunner(
        chain_of(small_cnn()).segment(0, NUM_UNITS),
        task_of(small_cnn, optimizer=partial(torch.optim.SGD, lr=0.0)),
        streams=Listener(),
    )
    batches = batches_of(2, 4)
    for inputs, targets in (*batches, batches[1]):
        last = [
            p.grad.clone() for p in runner.segment.parameters() if p.grad is not None
        ]
        runner.finish(inputs, targets, step=0, inputs_are_boundary=False)
    assert last
    assert all(
        torch.equal(p.grad, g)
        for p, g in zip(runner.segment.parameters(), last, strict=True)
    )


def test_backward_without_forward_is_refused():
    """A step's graph is used once."""
    runner = SegmentRunner(chain_of(small_cnn()).segment(0, 3), task())
    with pytest.raises(RuntimeError, match="backward without forward"):
        runner.backward(lambda: (torch.zeros(1),))
    inputs = batches_of(1, 2)[0][0]
    (boundary,) = runner.forward(inputs, step=0, inputs_are_boundary=False)
    runner.backward(lambda: (torch.ones_like(boundary),))
    with pytest.raises(RuntimeError, match="backward without forward"):
        runner.backward(lambda: (torch.ones_like(boundary),))


def test_nothing_of_a_step_stays_in_memory():
    """After a step only parameters, gradients, buffers and state are alive."""
    inputs, targets = batches_of(1, 4)[0]
    segment = chain_of(small_cnn()).segment(0, NUM_UNITS)
    runner = SegmentRunner(segment, task("momentum"))
    with memory_cap(None) as meter:
        meter.track(segment)
        runner.finish(inputs, targets, step=0, inputs_are_boundary=False)
        buffers = sum(buffer.nbytes for buffer in segment.buffers())
        parameters = sum(parameter.nbytes for parameter in segment.parameters())
        batch = inputs.nbytes + targets.nbytes  # Counted from its first use.
        assert meter.live_bytes == 3 * parameters + buffers + batch


def test_a_segment_without_parameters_passes_gradients_and_updates_nothing():
    """A place may hold units that only compute."""
    chain = chain_of(small_cnn())
    tail = SegmentRunner(chain.segment(NUM_UNITS - 1, NUM_UNITS), task())
    assert tail.optimizer is None
    scores, targets = torch.randn(4, 10), torch.tensor([1, 2, 3, 4])
    loss, (gradient,) = tail.finish(scores, targets, step=0, inputs_are_boundary=True)
    leaf = scores.clone().requires_grad_()
    expected = functional.cross_entropy(functional.log_softmax(leaf, 1), targets)
    expected.backward()
    assert torch.equal(loss, expected.detach())
    assert torch.equal(gradient, leaf.grad)


def test_frozen_parameters_stay_as_they_are():
    """Only parameters that require gradients reach the optimizer."""
    model = small_cnn()
    model.conv2.requires_grad_(False)
    before = everything(model)
    runner = SegmentRunner(
        chain_of(model).segment(0, NUM_UNITS), task("adam"), streams=Listener()
    )
    runner.finish(*batches_of(1, 4)[0], step=0, inputs_are_boundary=False)
    changed = {line.split(":")[0] for line in compare(before, everything(model))}
    assert not {"conv2.weight", "conv2.bias", "gradient conv2.weight"} & changed
    assert {"conv1.weight", "classify.weight"} <= changed


def test_evaluation_makes_no_graph_and_changes_nothing():
    """In evaluation there is no gradient, no chance, and no running statistic."""
    model = small_cnn()
    before = everything(model)
    runner = SegmentRunner(chain_of(model).segment(0, NUM_UNITS), task())
    inputs = batches_of(1, 4)[0][0]
    outputs = [runner.evaluate(inputs) for _ in range(2)]
    assert torch.equal(*outputs)
    assert not outputs[0].requires_grad
    assert compare(before, everything(model)) == []
    assert torch.equal(outputs[0], small_cnn().eval()(inputs))


def test_training_after_evaluation_is_training():
    """A runner sets the mode of every step itself."""
    model = small_cnn()
    runner = SegmentRunner(
        chain_of(model).segment(0, NUM_UNITS), task(), streams=Listener()
    )
    inputs, targets = batches_of(1, 4)[0]
    runner.evaluate(inputs)
    loss, _ = runner.finish(inputs, targets, step=0, inputs_are_boundary=False)
    found = everything(model) | {"loss": loss}
    assert compare(whole_step(small_cnn(), "sgd"), found) == []


def test_a_wrong_stream_or_a_lost_update_would_be_seen():
    """The comparison of this file sees other chance, and a step not taken."""
    expected = whole_step(small_cnn(), "sgd")
    runner = SegmentRunner(
        chain_of(model := small_cnn()).segment(0, NUM_UNITS),
        task(),
        streams=lambda *_: nullcontext(),
    )
    loss, _ = runner.finish(*batches_of(1, 4)[0], step=0, inputs_are_boundary=False)
    wrong = compare(expected, everything(model) | {"loss": loss})
    assert any(line.startswith("loss") for line in wrong)
    stale = expected | {"conv1.weight": small_cnn().conv1.weight.detach()}
    assert len(compare(expected, stale)) == 1
