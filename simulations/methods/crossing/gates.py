"""Gates: every client is cut behind the gate, and few channels are open, by phases.

A phase with few open channels sends them as ``TopK`` of that share in float16, which
changes no number there (``CodedGates``); one with all of them as ``Packed``.

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

from flwr_smartsplit import CodecRequest, Packed, PruneSchedule, TopK, cut_at_gate
from flwr_smartsplit.edge.protocol import State
from flwr_smartsplit.gates import OPEN
from flwr_smartsplit.server.aggregation import RoundSummary
from flwr_smartsplit.server.gate_schedule import GatePhase
from flwr_smartsplit.types import GATE, Codec
from simulations.experiments.errors import ExperimentError
from simulations.methods.method import Method, Setting, split_strategy

FEW, SOME = 4, 16
"""How many channels are open: VCCprune's 4, and as many on prune's way there."""


class CodedGates:
    """A ``PruneSchedule``, and the codec that suits each of its phases.

    What a gate behind a ReLU lets through are float16 values, none of them outside the
    open channels. ``TopK`` of that share sends them all, and the gradient at the same
    places; elsewhere in the open channels the value is +0, and the ReLU passes no
    gradient. So no number changes. With all channels open, ``Packed`` changes none.
    """

    def __init__(self, schedule: PruneSchedule) -> None:
        self.schedule = schedule
        self.share = 1.0  # Of the channels: those open in the next round

    def first_state(self, state: State) -> State:
        """Return a run's first state with the gate as round 1 has it."""
        return self._seen(self.schedule.first_state(state))

    def __call__(self, round_number: int, state: State, summary: RoundSummary) -> State:
        """Return the state of the round after this one."""
        return self._seen(self.schedule(round_number, state, summary))

    def codec(self, request: CodecRequest) -> Codec:
        """Choose by what is open in this round."""
        del request
        if self.share == 1:
            return Packed()
        return TopK(fraction=self.share, values="float16")

    def _seen(self, state: State) -> State:
        """Note how many channels are open."""
        (is_open,) = (v for k, v in state.items() if k.endswith(f"{GATE}.{OPEN}"))
        self.share = float(is_open.mean())
        return state


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
        coded = CodedGates(phases(setting.experiment.num_rounds))
    except ValueError as error:
        raise ExperimentError(
            f"{setting.experiment.num_rounds} --rounds are too few for the phases of "
            "a gate, of which deprune has 2 and prune 3."
        ) from error
    more = {"between_rounds": coded, "codec": coded.codec}
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
