"""The peaks of a task's routes, as predicted and as measured."""

from flwr_smartsplit.plan.checkpointing.peak_memory import predicted_peak_bytes
from flwr_smartsplit.profile.profile import profile_chain
from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.task import Task
from flwr_smartsplit.types import Route
from flwr_smartsplit.verify.equivalence import RouteChecker, example_batches


def peaks_of(task: Task, *, batch_size: int) -> tuple[list[int], list[int]]:
    """Predict and measure the peak of the whole route and of each cut.

    Each must be exact, too.
    """
    chain = build_chain(task)
    profile = profile_chain(chain, batch_size=batch_size, task=task)
    routes = [Route.whole(), *map(Route.split, range(1, len(chain)))]
    with RouteChecker(task, example_batches(task, batch_size=batch_size)) as checker:
        checks = [checker.check(route) for route in routes]
    assert [check.differences for check in checks] == [()] * len(routes)
    predicted = [predicted_peak_bytes(profile, route) for route in routes]
    return predicted, [check.measured_peak_bytes for check in checks]
