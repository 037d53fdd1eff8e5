"""What a loader yields, as a training step takes it, and how much of it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from flwr_smartsplit.errors import InvalidTask
from flwr_smartsplit.split.segment import Batch
from flwr_smartsplit.types.sizes import whole

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


def sizes_of(
    loader: Any, num_examples: Any = None, batch_size: Any = None
) -> tuple[int | None, int | None]:
    """Read the examples of a pass and of a batch off a loader, where not given.

    What its sampler draws counts, not the data set, of which that may be a part.
    """
    batches = getattr(loader, "batch_sampler", None)
    if batch_size is None:
        batch_size = getattr(loader, "batch_size", None)
    if batch_size is None:
        batch_size = getattr(batches, "batch_size", None)
    if batch_size is not None:
        batch_size = whole(batch_size, "batch_size")
    if num_examples is not None:
        num_examples = whole(num_examples, "num_examples")
    elif batch_size is not None:
        num_examples = _num_drawn(loader, batches, batch_size)
    return num_examples, batch_size


def _num_drawn(loader: Any, batches: Any, batch_size: int) -> int | None:
    """Count the examples that a loader draws in one pass; None if it does not say."""
    source: Any = getattr(loader, "dataset", None)
    if isinstance(loader, DataLoader) and not isinstance(source, IterableDataset):
        # Without automatic batches, the sampler draws whole batches.
        source = getattr(batches, "sampler", None)
    try:
        # The last batch may be small, or left out.
        return min(len(source), len(loader) * batch_size)
    except (TypeError, NotImplementedError):
        return len(source) if hasattr(source, "__len__") else None
