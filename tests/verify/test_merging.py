"""A merge of every dtype gives the plain mean and loads; a planted error is named."""

import numpy as np
import pytest
import torch
from torch import nn

from flwr_smartsplit.split.build import state_of
from flwr_smartsplit.verify import merging
from flwr_smartsplit.verify.merging import merge_differences


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2))
        self.of_half = nn.Parameter(torch.randn(4).half())
        for name in ("float64", "int64", "int32", "uint8", "bool"):
            dtype = getattr(torch, name)
            self.register_buffer(f"of_{name}", torch.arange(3).to(dtype))
        self.again = self.weight


def states() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    before = state_of(Odd())
    return before, {name: (a * 7).astype(a.dtype) for name, a in before.items()}


def test_a_mean_of_every_dtype_is_the_plain_one_and_loads():
    assert merge_differences(Odd(), *states()) == []


@pytest.mark.parametrize(
    "name", ["weight", "of_half", "of_float64", "of_int32", "of_bool"]
)
def test_a_wrong_mean_is_found_by_name(name, monkeypatch):
    merge = merging.merge

    def spoilt(*args: object) -> object:
        merged = merge(*args)
        data = merged[name].copy()
        data.view(np.uint8).reshape(-1)[0] ^= 1
        return {**merged, name: data}

    monkeypatch.setattr(merging, "merge", spoilt)
    (found, *_) = merge_differences(Odd(), *states())
    assert found.startswith(f"merge of {name} (")


def test_a_mean_without_the_imaginary_part_is_found(monkeypatch):
    before = {"weight": np.array([1 + 2j, 3j], np.complex64)}
    after = {"weight": np.array([5 - 2j, 1j], np.complex64)}
    mean = merging._mean(before["weight"], after["weight"])
    assert mean.tolist() == [3.5 - 0.5j, 1.75j]
    real = {"weight": mean.real.astype(np.complex64)}
    monkeypatch.setattr(merging, "add_states", list)
    monkeypatch.setattr(merging, "merge", lambda *_: real)
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    assert merge_differences(model, before, after) == ["merge of weight (complex64)"]


def test_a_result_that_the_model_does_not_take_is_found():
    before, after = states()
    found = merge_differences(nn.Linear(3, 2), before, after)
    assert found[-1].startswith("loading the result: ")


def test_names_of_one_tensor_that_disagree_are_found():
    """The second name overwrites the first when the result is loaded."""
    before, after = states()
    after["again"] = after["again"] * 2
    assert "loading of weight" in merge_differences(Odd(), before, after)
