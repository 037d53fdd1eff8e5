"""The names of the task's metrics: none may be that of a number of ours."""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from flwr_smartsplit.errors import InvalidTask
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.split.fake_tensors import DryRun, fake_batch, fake_copy
from flwr_smartsplit.task import Task
from flwr_smartsplit.types import RESERVED_METRICS


def check_metric_names(names: Iterable[object], reserved: Iterable[str]) -> None:
    """Raise ``InvalidTask`` if metrics have names of ours."""
    taken = sorted(set(map(str, names)) & set(reserved))
    if taken:
        raise InvalidTask(
            f"metrics_fn returns {', '.join(taken)}, which every report has besides: "
            f"give them other names, such as {f'my_{taken[0]}'!r}."
        )


def check_metrics(chain: Chain, task: Task) -> None:
    """Try ``metrics_fn`` on zeros of the outputs' shape, and check the names.

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
        names = list(values)
    except Exception:
        return
    check_metric_names(names, RESERVED_METRICS)


def _zeros(tensor: object) -> object:
    if not isinstance(tensor, Tensor):
        return tensor
    return torch.zeros(tensor.shape, dtype=tensor.dtype)
