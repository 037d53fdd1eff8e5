"""What a loader yields, as a training step takes it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flwr_smartsplit.errors import InvalidTask
from flwr_smartsplit.split.segment import Batch

_PAIR = 2


def own_batch(batch: Any, example_targets: Any) -> tuple[Batch, Any]:
    """Own a loader's batch ``(inputs, targets)``.

    Inputs are a tensor, a sequence or a mapping; targets are nested as the task's
    example targets. Raises ``InvalidTask`` for anything else.
    """
    if not isinstance(batch, tuple | list) or len(batch) != _PAIR:
        raise InvalidTask(
            f"the loader yields {_kind(batch)}; let it yield (inputs, targets), for "
            "instance by a collate_fn."
        )
    inputs, targets = batch
    owned: Batch
    if isinstance(inputs, Mapping):
        owned = {key: _own(value) for key, value in inputs.items()}
    elif isinstance(inputs, tuple | list):
        owned = tuple(map(_own, inputs))
    else:
        owned = _own(inputs)
    return owned, _as_example(targets, example_targets)


def _as_example(targets: Any, example: Any) -> Any:
    """Own targets, nested as the example is."""
    if isinstance(example, Tensor) and isinstance(targets, Tensor):
        return _own(targets)
    if example is None and targets is None:
        return None
    if isinstance(example, Mapping) and isinstance(targets, Mapping):
        if example.keys() == targets.keys():
            return {key: _as_example(targets[key], example[key]) for key in example}
    elif isinstance(example, tuple | list) and isinstance(targets, tuple | list):
        if len(example) == len(targets):
            pairs = zip(targets, example, strict=True)
            owned = [_as_example(*pair) for pair in pairs]
            is_named = hasattr(example, "_fields")
            return type(example)(*owned) if is_named else tuple(owned)
    raise InvalidTask(
        f"the loader yields targets in {_kind(targets)}, and the task's "
        f"example_targets are {_kind(example)}: give example_targets as your loader "
        "yields them (a tensor, a tuple or dict of tensors, or None), or change what "
        "it yields by a collate_fn."
    )


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with {', '.join(map(str, value))}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"a {type(value).__name__} of {len(value)}"
    return "None" if value is None else f"a {type(value).__name__}"


def _own(tensor: Any) -> Tensor:
    """Copy a view of a larger tensor: a batch must not keep the data set alive."""
    if not isinstance(tensor, Tensor):
        raise InvalidTask(
            f"the loader's inputs hold a {type(tensor).__name__} ({tensor!r:.40}); "
            "let it yield tensors only, for instance by a collate_fn."
        )
    if tensor.layout is not torch.strided:
        return tensor
    is_view = tensor.untyped_storage().nbytes() > tensor.nbytes
    return tensor.clone() if is_view else tensor
