"""Timeline: the rounds of a run in simulated seconds, from its journal and a clock."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

from simulations.experiments.rows import MethodRun
from simulations.fleets.clock import Clock, Spent


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """What the rounds of one run would have taken on its fleet."""

    # Simulated seconds of each round that was finished: those of its slowest client
    seconds_by_round: dict[int, float]
    # Simulated seconds since the start, and accuracy then, for each evaluation
    accuracies: tuple[tuple[float, float], ...]
    # device_joules, edge_joules: of all rounds and clients together
    device_joules: float
    edge_joules: float

    @property
    def seconds(self) -> float:
        """Simulated seconds of all rounds, one after the other."""
        return sum(self.seconds_by_round.values())

    def seconds_to(self, accuracy: float) -> float | None:
        """Return the simulated seconds until a share is right; None if it never is."""
        reached = (at for at, value in self.accuracies if value >= accuracy)
        return next(reached, None)


def timeline_of(run: MethodRun, clock: Clock) -> Timeline:
    """Lay the rounds of a run along the clock."""
    spent: dict[int, list[Spent]] = {row.round: [] for row in run.rounds}
    for row in run.training():
        if row.round in spent:
            spent[row.round].append(clock.spent(row))
    seconds = {
        number: max((each.seconds for each in of_clients), default=0.0)
        for number, of_clients in sorted(spent.items())
    }
    ends = dict(zip(seconds, accumulate(seconds.values()), strict=True))
    return Timeline(
        seconds_by_round=seconds,
        accuracies=tuple(
            (ends.get(row.round, 0.0), row.accuracy)
            for row in run.evaluations
            if row.round in ends or row.round == 0
        ),
        device_joules=sum(e.device_joules for each in spent.values() for e in each),
        edge_joules=sum(e.edge_joules for each in spent.values() for e in each),
    )


def common_accuracy(runs: Iterable[MethodRun]) -> float | None:
    """Return the highest accuracy that every run reaches; None if one has none.

    A time to an accuracy can be compared where everybody gets there.
    """
    best = [
        max((row.accuracy for row in run.evaluations), default=None) for run in runs
    ]
    known = [accuracy for accuracy in best if accuracy is not None]
    return min(known) if known and len(known) == len(best) else None
