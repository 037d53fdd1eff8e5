"""What a progressive training needs of the server: checked steps, and their proxies.

Proxies are in no whole model. Their state is the strategy's, and is merged like any.
"""

from collections.abc import Sequence
from typing import Any

from flwr_smartsplit.edge.protocol import State
from flwr_smartsplit.errors import InvalidTask
from flwr_smartsplit.server.hybrid import HybridFL
from flwr_smartsplit.server.server_data import ServerData
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.split.stages.proxies import PROXIES, first_values
from flwr_smartsplit.task import Task
from flwr_smartsplit.types import Constraints, Variant


def first_proxies(
    chain: Chain,
    task: Task,
    steps: Sequence[Variant],
    *,
    constraints: Constraints,
    server_steps: Sequence[object],
    seed: int,
) -> State:
    """Check that a task can be trained in steps; return the proxies' first values.

    Raises
    ------
    InvalidTask
        If a step is none of this model, trains nothing of its own, or the task or
        strategy has something that counts units of the whole model or trains all of it.
    """
    if not any(step.is_step for step in steps):
        return {}
    problem = _problem(task, constraints, server_steps)
    if problem:
        raise InvalidTask(
            f"{problem} does not go with training in steps: leave one out."
        )
    kinds: dict[str, Any] = {}
    for step in steps:
        mine = chain.under(step)
        kinds |= {
            name: kind
            for name, kind in mine.kinds.items()
            if name.startswith(f"{PROXIES}.") and name not in chain.kinds
        }
        stop = step.proxies[0][0] if step.proxies else len(chain)
        own = list(chain.unit_parameters.values())[step.frozen : stop]
        if not any(own):
            raise InvalidTask(
                f"the step {step.name!r} trains units {step.frozen} to {stop - 1}, "
                "which have no trainable parameters: choose blocks that do."
            )
    return first_values(kinds, seed)


def _problem(
    task: Task, constraints: Constraints, server_steps: Sequence[object]
) -> str:
    if task.is_local is not None:
        return "Task(is_local=...), whose units may be frozen or missing in a step,"
    if task.defence is not None:
        return "Task(defence=...), which counts the whole model's units,"
    if constraints.kept_units:
        return "Constraints(kept_units=...), which counts the whole model's units,"
    whole = [each for each in server_steps if isinstance(each, ServerData | HybridFL)]
    if whole:
        return f"{type(whole[0]).__name__}, which trains the whole model,"
    return ""
