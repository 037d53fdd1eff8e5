"""Where a place computes: devices that are refused, and what follows a place there."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from flwr_smartsplit.errors import InvalidTask
from flwr_smartsplit.train.torch_device import (
    CPU,
    as_device,
    function_on,
    generators_of,
    in_this_thread,
    placed,
)

META = torch.device("meta")  # Stands for another device where no values are needed.


@pytest.mark.parametrize("device", ["cpu", "cpu:0", torch.device("cpu")])
def test_the_cpu_has_many_names(device: str | torch.device) -> None:
    assert as_device(device) is CPU


def show(monkeypatch: pytest.MonkeyPatch, count: int, **facts: object) -> None:
    """Let this process see some CUDA devices."""
    module = SimpleNamespace(
        is_available=lambda: count > 0, device_count=lambda: count, **facts
    )
    monkeypatch.setattr(torch, "get_device_module", lambda kind: module)
    monkeypatch.setattr(torch.cuda, "is_available", module.is_available)


@pytest.mark.parametrize(("count", "found"), [(0, "cpu"), (1, "cuda:0"), (4, "cuda:0")])
def test_auto_takes_the_first_gpu_that_is_shown(
    count: int, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    show(monkeypatch, count, default_generators=())
    assert as_device("auto") == torch.device(found)


@pytest.mark.parametrize(
    ("device", "count", "words"),
    [
        ("cuda", 0, "sees 0 such devices .*client-resources-num-gpus"),
        ("cuda:2", 2, "'cuda:2', and this process sees 2 such"),
        ("gpu", 1, "give 'cpu', 'cuda'"),
        ("", 1, "give 'cpu', 'cuda'"),
        ("meta", 1, "no values"),
    ],
)
def test_a_device_that_cannot_be_used_is_refused(
    device: str, count: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    show(monkeypatch, count, default_generators=())
    with pytest.raises(InvalidTask, match=words):
        as_device(device)


def test_a_device_whose_randomness_cannot_be_derived_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    show(monkeypatch, 1)
    with pytest.raises(InvalidTask, match="dropout would differ"):
        as_device("mps")


def test_an_accelerators_generator_is_seeded_beside_the_cpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """CUDA has generators only once it was initialised."""
    own, module = torch.Generator(), SimpleNamespace(default_generators=[])
    module.init = lambda: module.default_generators.append(own)
    monkeypatch.setattr(torch, "get_device_module", lambda kind: module)
    assert generators_of(torch.device("cuda", 0)) == [torch.default_generator, own]
    assert generators_of(CPU) == [torch.default_generator]


def test_nested_batches_are_placed_and_other_things_stay() -> None:
    batch = ({"ids": torch.ones(2), "names": ["a"]}, None, 3)
    there = placed(batch, META)
    assert there[0]["ids"].device == META
    assert (there[0]["names"], there[1:]) == (["a"], (None, 3))
    assert placed(batch, CPU) is batch


def test_the_tensors_of_a_loss_follow_and_the_tasks_own_stay() -> None:
    """In a module, in a partial, and in a partial of a partial."""
    weight = torch.ones(3)
    module = nn.CrossEntropyLoss(weight=weight)
    moved = function_on(module, META)
    assert (moved.weight.device, module.weight.device) == (META, CPU)
    inner = function_on(partial(partial(cross_entropy, weight=weight)), META)
    assert inner.keywords["weight"].device == META
    assert function_on(partial(module), META).func.weight.device == META
    assert function_on(module, CPU) is module
    assert function_on(cross_entropy, META) is cross_entropy
    assert function_on(None, META) is None


def test_backward_runs_in_the_callers_thread() -> None:
    before = torch.autograd.is_multithreading_enabled()
    with in_this_thread():
        assert not torch.autograd.is_multithreading_enabled()
    assert torch.autograd.is_multithreading_enabled() is before
