"""The task's metrics: numbers, and none under the name of a number of ours."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from flwr_smartsplit.errors import InvalidTask
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.split.fake_tensors import DryRun, fake_batch, fake_copy
from flwr_smartsplit.task import Task
from flwr_smartsplit.types import OF_EXAMPLES, RESERVED_METRICS


def check_metric_names(names: Iterable[object], reserved: Iterable[str]) -> None:
    """Raise ``InvalidTask`` if metrics have names of ours."""
    names = sorted(map(str, names))
    taken = [name for name in names if name in set(reserved)]
    if taken:
        raise InvalidTask(
            f"metrics_fn returns {', '.join(taken)}, which every report has besides: "
            f"give them other names, such as {f'my_{taken[0]}'!r}."
        )
    counts = [name for name in names if name.endswith(OF_EXAMPLES)]
    if counts:
        raise InvalidTask(
            f"metrics_fn returns {', '.join(counts)}: so is reported over how many "
            "examples a metric is the mean. Give it another name, such as "
            f"{counts[0].removesuffix(OF_EXAMPLES) + '-count'!r}."
        )


def metric_values(metrics: Any) -> dict[str, float]:
    """Read what ``metrics_fn`` returned; raise ``InvalidTask`` if it is no numbers."""
    if not isinstance(metrics, Mapping):
        raise InvalidTask(
            f"metrics_fn returns {metrics!r:.80}: return a mapping of names to numbers."
        )
    check_metric_names(metrics, RESERVED_METRICS)
    values = {}
    for name, value in metrics.items():
        try:
            values[name] = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InvalidTask(
                f"metrics_fn returns {value!r:.80} as {name!r}: return a number, or a "
                "tensor of one element."
            ) from error
    return values


def check_metrics(chain: Chain, task: Task) -> None:
    """Try ``metrics_fn`` on zeros of the outputs' shape, and check what it returns.

    A function that cannot take zeros is checked when the first batch is evaluated.
    """
    if task.metrics_fn is None:
        return
    mode = DryRun()
    try:
        model = fake_copy(chain.segment(0, len(chain)), mode).eval()
        inputs = fake_batch(chain.example_inputs, mode, batch_size=1)
        with mode, torch.no_grad():
            outputs = model(inputs)
        targets = tree_map(lambda target: target[:1], task.example_targets)
        # A copy: it may count what it is given.
        values = copy.deepcopy(task.metrics_fn)(tree_map(_zeros, outputs), targets)
    except Exception:
        return
    metric_values(values)


def _zeros(tensor: object) -> object:
    if not isinstance(tensor, Tensor):
        return tensor
    return torch.zeros(tensor.shape, dtype=tensor.dtype)
