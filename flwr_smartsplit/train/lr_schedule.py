"""The task's learning-rate schedule."""

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from flwr_smartsplit.errors import InvalidTask
from flwr_smartsplit.task import Task


def scheduler_of(
    optimizer: Optimizer | None, task: Task, config: Mapping[str, Any]
) -> LRScheduler | None:
    """Build the scheduler of a new optimizer; None if the task has none.

    Raises ``InvalidTask`` if ``schedule_fn`` reads what the config lacks, or returns
    something else.
    """
    if optimizer is None or task.schedule_fn is None:
        return None
    try:
        scheduler = task.schedule_fn(optimizer, config)
    except KeyError as error:
        raise InvalidTask(
            f"schedule_fn reads {error} from the round's config, which has "
            f"{sorted(config) or 'nothing'}: send it in train_config, or read it by "
            "config.get with a default (smartsplit check sends nothing)."
        ) from error
    if scheduler is not None and (
        not isinstance(scheduler, LRScheduler)
        or isinstance(scheduler, ReduceLROnPlateau)
    ):
        raise InvalidTask(
            f"schedule_fn returns a {type(scheduler).__name__}: return None, or a "
            "torch LRScheduler that is stepped after each step and needs no metric."
        )
    return scheduler
