"""Gates: every client is cut behind the gate, and few channels are open, by phases.

``Packed`` writes what crosses: the open channels as float16, and of all channels the
values that are not +0. It changes no number.

References
----------
Mudvari, Vainio, Ofeidis, Tarkoma, Tassiulas: Adaptive Compression-Aware Split Learning
and Inference for Enhanced Network Efficiency (deprune, prune). ACM TOIT 24(4), 2024.
arXiv:2311.05739. What differs: ``docs/decisions/0055-gates-are-units-of-the-model.md``;
there is no encoder here, so that codecs and gates train the same network.
"""

from collections.abc import Callable
from functools import partial

from flwr.serverapp.strategy import Strategy

from flwr_smartsplit import Packed, PruneSchedule, cut_at_gate
from flwr_smartsplit.server.gate_schedule import GatePhase
from simulations.experiments.errors import ExperimentError
from simulations.methods.method import Method, Setting, split_strategy

FEW, SOME = 4, 16
"""How many channels are open: VCCprune's 4, and as many on prune's way there."""


Phases = Callable[[int], PruneSchedule]
"""``phases(num_rounds)`` says what is open in which of so many rounds."""


def always_few(num_rounds: int) -> PruneSchedule:
    """Open few channels in all rounds."""
    return PruneSchedule([GatePhase(rounds=num_rounds, budget=FEW)])


def few_then_all(num_rounds: int) -> PruneSchedule:
    """Open few channels in two thirds of the rounds, and then all."""
    return PruneSchedule.deprune(budget=FEW, rounds=num_rounds)


def all_then_few(num_rounds: int) -> PruneSchedule:
    """Open all channels in three fifths of the rounds, then some, then few."""
    each = max(1, num_rounds // 5)
    return PruneSchedule(
        [
            GatePhase(rounds=num_rounds - 2 * each, budget=None),
            GatePhase(rounds=each, budget=SOME, reset="narrow"),
            GatePhase(rounds=each, budget=FEW, reset="narrow"),
        ]
    )


def build_strategy(setting: Setting, *, phases: Phases) -> Strategy:
    """Build the strategy that cuts behind the gate and opens it in phases."""
    try:
        schedule = phases(setting.experiment.num_rounds)
    except ValueError as error:
        raise ExperimentError(
            f"{setting.experiment.num_rounds} --rounds are too few for the phases of "
            "a gate, of which deprune has 2 and prune 3."
        ) from error
    more = {"between_rounds": schedule, "codec": Packed()}
    return split_strategy(setting, more=more, choose_route=cut_at_gate)


GATES = tuple(
    Method(
        name=name,
        summary=f"everybody is cut at the gate, {which}",
        strategy_fn=partial(build_strategy, phases=phases),
    )
    for name, which, phases in (
        ("gates", f"with {FEW} channels open", always_few),
        ("deprune", f"with {FEW} channels open, and then all", few_then_all),
        ("prune", f"with all channels open, then {SOME}, then {FEW}", all_then_few),
    )
)
"""What a gate lets through: few channels always, at first, or at last."""
