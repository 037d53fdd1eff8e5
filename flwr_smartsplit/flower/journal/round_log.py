"""RoundLog: the log and journal of every round."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from logging import ERROR, INFO, WARNING, getLogger

from flwr_smartsplit.flower.journal.journal import Journal
from flwr_smartsplit.flower.journal.rows import (
    Row,
    client_rows,
    failure_row,
    round_row,
    skipped_row,
)
from flwr_smartsplit.flower.rounds.exchange import Dispatch
from flwr_smartsplit.types import ClientReply, DeviceProfile, Failure, RoundPlan

_log = getLogger("flwr")
_READ = {"server-round", "proximal-mu", "proximal_mu"}

_MOST_CAUSES = 3


class RoundLog:
    """Log in Flower's format, write one journal row per client, keep the failures."""

    def __init__(self, journal: Journal, clock: Callable[[], float]) -> None:
        self.failures: list[Failure] = []
        self._journal = journal
        self._clock = clock
        self._edge_bytes = 0
        self._sitting_out: dict[str, str] = {}
        self._unread: set[str] = set()
        self.round_of: Callable[[int], int] | None = None
        """Says in which of Flower's rounds a merge is, if they are not the same."""

    def warn_of_unread(self, config: Mapping[str, object]) -> None:
        """Warn once of config entries that nothing reads."""
        unread = sorted(config.keys() - _READ - self._unread)
        if unread:
            self._unread |= set(unread)
            _log.log(
                WARNING,
                "%s of the config reach the clients, but nothing reads them: give the "
                "Task a schedule_fn(optimizer, config) that does.",
                unread,
            )

    def write_plan(
        self, plan: RoundPlan, profiles: Mapping[str, DeviceProfile], *, is_train: bool
    ) -> None:
        """Log the routes and unfit clients; write rows for all that were not chosen."""
        phase = "train" if is_train else "evaluate"
        _log.log(
            INFO,
            "configure_%s: Sampled %s nodes (out of %s)",
            phase,
            len(plan.assignments),
            len(profiles),
        )
        routes = Counter(str(each.option.route) for each in plan.assignments)
        for route, num_clients in routes.items():
            _log.log(INFO, "\t> Route %s: %s clients", route, num_clients)
        for key, reason in plan.skipped.items():
            if key in plan.unfit and reason != self._sitting_out.get(key):
                self._sitting_out[key] = reason
                _log.log(INFO, "\t> Client %s sits out: %s", key, reason)
            row = skipped_row(
                profiles[key],
                reason,
                plan.round_number,
                phase=phase,
                is_unfit=key in plan.unfit,
            )
            self._write(row)

    def write_failures(
        self, failures: list[Failure], round_number: int, *, phase: str
    ) -> None:
        """Write failures from before anything was sent."""
        self.failures += failures
        for failure in failures:
            _log.log(WARNING, "\t> %s: %s", failure.client_key, failure.cause)
            self._write(failure_row(failure, round_number, phase))

    def write_unmerged(self, round_number: int, causes: Sequence[str]) -> None:
        """Log that a round of training changed nothing, and why."""
        _log.log(
            ERROR,
            "Round %s merged nothing, and leaves the model as it was: %s",
            round_number,
            most_common(causes),
        )

    def write_phase(
        self,
        dispatch: Dispatch,
        accepted: Mapping[str, ClientReply],
        failures: list[Failure],
        *,
        edge_bytes_so_far: int,
        shown: Mapping[str, float],
        received_seconds: float,
    ) -> None:
        """Write the outcome of every message that was sent, and the phase's sums."""
        _log.log(
            INFO if accepted or not failures else WARNING,
            "%s: Received %s results and %s failures",
            "aggregate_train" if dispatch.is_train else "aggregate_evaluate",
            len(accepted),
            len(failures),
        )
        self.failures += failures
        for failure in failures:
            key, kind = failure.client_key, failure.kind
            _log.log(WARNING, "\t> Client %s %s: %s", key, kind, failure.cause)
        for row in client_rows(dispatch, accepted, failures):
            self._write(row)
        now = self._clock()
        row = round_row(
            dispatch,
            accepted,
            failures,
            edge_state_bytes=edge_bytes_so_far - self._edge_bytes,
            seconds=now - dispatch.started_seconds,
            aggregation_seconds=now - received_seconds,
        )
        self._write({**shown, **row})
        self._edge_bytes = edge_bytes_so_far

    def _write(self, row: Row) -> None:
        """Write a row; of an asynchronous run, with the merge and Flower's round."""
        if self.round_of is not None:
            merge = row["round"]
            assert isinstance(merge, int)
            row = {**row, "round": self.round_of(merge), "merge": merge}
        self._journal.write(row)


def most_common(causes: Sequence[str]) -> str:
    """List the most common causes with their counts."""
    if not causes:
        return "no client was chosen."
    counts = Counter(causes)
    listed = [f"{count} x {cause}" for cause, count in counts.most_common(_MOST_CAUSES)]
    left_out = len(counts) - len(listed)
    return " | ".join([*listed, *([f"and {left_out} more."] if left_out > 0 else [])])
