"""Merge two clients as a round does, and load the result into the stock model."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from flwr_smartsplit.edge.weighted_mean import add_states, merge

State = Mapping[str, npt.NDArray[Any]]
_WEIGHTS = (3, 5)


def merge_differences(model: nn.Module, before: State, after: State) -> list[str]:
    """Name what the mean of two states is not, or what the model does not take.

    The truth is a plain mean in float64; whole numbers are truncated, as
    ``load_state_dict`` does.
    """
    merged = merge(before, add_states(zip((before, after), _WEIGHTS, strict=True)))
    differences = [
        f"merge of {name} ({array.dtype})"
        for name, array in merged.items()
        if array.tobytes() != _mean(before[name], after[name]).tobytes()
    ]
    tensors = {name: torch.from_numpy(np.array(a)) for name, a in merged.items()}
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        return [*differences, f"loading the result: {error}"]
    loaded = model.state_dict()
    return differences + [
        f"loading of {name}"
        for name, tensor in tensors.items()
        if not torch.equal(loaded[name].nan_to_num(), tensor.nan_to_num())
    ]


def _mean(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if one.dtype.kind == "c":
        mean = np.empty_like(one)
        mean.real, mean.imag = _mean(one.real, other.real), _mean(one.imag, other.imag)
        return mean
    first, second = (each.astype(np.float64) for each in (one, other))
    mean = (first * _WEIGHTS[0] + second * _WEIGHTS[1]) / sum(_WEIGHTS)
    if one.dtype.kind != "f":
        mean = np.trunc(mean)
    return np.asarray(mean.astype(one.dtype))
