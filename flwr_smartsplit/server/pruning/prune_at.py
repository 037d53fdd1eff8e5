"""PruneAt: at the end of one round the global model loses channels, for good (FedAP).

What is sourced, and what is ours, is said in ``docs/howto/pruning.md``.

References
----------
Zhang, Liu, Jia, Zhou, Dai, Dou: FedDUAP: Federated Learning with Dynamic Update and
Adaptive Pruning Using Shared Insensitive Data. IJCAI 2022. arXiv:2204.11536.
Liu et al.: Efficient Federated Learning Using Dynamic Update and Adaptive Pruning with
Momentum on Shared Server Data. ACM TIST 2024. arXiv:2408.05678.
"""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from logging import INFO, getLogger
from math import prod
from typing import Any, Literal

import torch

from flwr_smartsplit.errors import InvalidTask, SmartSplitError
from flwr_smartsplit.plan.variants.pruning import (
    filters_of,
    flat_share,
    pruned,
)
from flwr_smartsplit.plan.variants.variants import (
    RoundOutcome,
    VariantRequest,
    Variants,
    Whole,
    learns,
)
from flwr_smartsplit.server.aggregation import RoundStart
from flwr_smartsplit.server.pruning.ranks import measured_ranks
from flwr_smartsplit.server.pruning.spectrum import hessian_spectrum
from flwr_smartsplit.server.server_data import ServerData
from flwr_smartsplit.split.build import build_chain, materialise
from flwr_smartsplit.split.segment import Segment
from flwr_smartsplit.train.rng import derived_seed
from flwr_smartsplit.train.threads import torch_threads
from flwr_smartsplit.types import WHOLE, Variant
from flwr_smartsplit.types.sizes import plain, whole

_log = getLogger("flwr")
_NOTHING_LESS = Whole()
_DEFENCE = (
    "PruneAt measures the model on the server's data, and the task's defence adds "
    'noise to what it computes: give PruneAt(score="norm") and a number as its rate.'
)


@dataclass(frozen=True, slots=True, kw_only=True)
class HessianRate:
    """Choose how much to prune by the curvature of the loss on the server's data.

    FedAP's rule, as its code has it; see ``flat_share``. There all clients estimate a
    rate, too, on the server's machine; here the server's data alone decide.

    Parameters
    ----------
    probes : int
        Random directions.
    iterations : int
        Steps of Lanczos' method from each. Every step keeps a vector as large as the
        model, in float64.
    """

    probes: int = 1
    iterations: int = 50

    def __post_init__(self) -> None:
        for name in ("probes", "iterations"):
            number = whole(getattr(self, name), name)
            object.__setattr__(self, name, number)
            if number < 1:
                raise ValueError(f"HessianRate({name}={number}): give at least 1.")


@dataclass(frozen=True)
class PruneAt:
    """Prune the global model once: from then on it is a smaller one.

    At the end of the round, V is the size of the parameter at place ``floor(rate * R)``
    of all R by size. Of each convolution's filters, the share of its weights below V
    goes, those of lowest score first; layers whose outputs are added lose the same
    ones. State, profiles, and edges follow: cuts, peaks and messages are those of the
    smaller model. If nobody is merged in that round, it is the next one.

    Parameters
    ----------
    round : int
        The round at whose end the model is pruned.
    rate : float or HessianRate
        Share of the parameters that V is above, at least 0 and below 1; 0 prunes
        nothing.
    score : "rank" or "norm"
        What says which filters go: the mean rank of their feature maps on the
        server's data, or the sum of their weights' sizes.
    data : ServerData, optional
        The server's examples, which ``"rank"`` and ``HessianRate`` need. It may be one
        of ``server_steps``, too.
    variants : Variants
        What clients are offered of the model, whole or pruned; widths are then shares
        of what is left.

    Raises
    ------
    ValueError
        If a number is out of range, or something lacks the server's data.

    Examples
    --------
    >>> PruneAt(30, rate=0.6, score="norm").round
    30
    """

    round: int
    _: KW_ONLY
    rate: float | HessianRate = 0.6
    score: Literal["rank", "norm"] = "rank"
    data: ServerData | None = None
    variants: Variants = _NOTHING_LESS
    _run: "_Run" = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "round", whole(self.round, "round"))
        object.__setattr__(self, "rate", plain(self.rate))
        object.__setattr__(self, "_run", _Run())
        if self.round < 1:
            raise ValueError(f"round is {self.round}: rounds are counted from 1.")
        is_number = isinstance(self.rate, int | float) and self.rate is not True
        if not isinstance(self.rate, HessianRate) and not (
            is_number and 0 <= self.rate < 1
        ):
            raise ValueError(
                f"rate is {self.rate!r:.40}: give a share of the parameters from 0 to "
                "below 1, such as 0.6, or HessianRate()."
            )
        if self.score not in {"rank", "norm"}:
            raise ValueError(f'score is {self.score!r:.40}: give "rank" or "norm".')
        if self._needs_data and not isinstance(self.data, ServerData):
            raise ValueError(
                f"data is {self.data!r:.40}, and ranks and HessianRate are measured on "
                'the server\'s examples: give data=ServerData(loader), or score="norm" '
                "and a number as the rate."
            )
        if learns(self.variants) or hasattr(self.variants, "base"):
            raise ValueError(
                f"variants is {self.variants!r:.80}, which learns from rounds; what it "
                "has learned would be of the model before it was pruned. Give a rule "
                "that does not, such as Widths()."
            )

    @property
    def _needs_data(self) -> bool:
        return self.score == "rank" or isinstance(self.rate, HessianRate)

    def offered(self, request: VariantRequest) -> Sequence[Variant]:
        """Offer what the rule inside does, of the model as it is."""
        return self.variants.offered(request)

    def base(self, memory: Variant | None) -> Variant:
        """Say what is left of the task's model."""
        return WHOLE if memory is None else memory

    def prepare(self, start: RoundStart) -> None:
        """Before a run's first round, see whether the server's examples fit."""
        is_new = self._run.start is None or start.round_number == 1
        self._run.start = start
        if not is_new or not self._needs_data:
            return
        if start.task.defence is not None:
            raise InvalidTask(_DEFENCE)
        if start.round_number <= self.round:
            self._check_data(start)

    def learned(self, outcome: RoundOutcome) -> Variant | None:
        """Decide once what is left; None before that."""
        if outcome.memory is not None or outcome.round_number < self.round:
            memory: Variant | None = outcome.memory
            return memory
        start = self._run.start
        if start is None:
            raise SmartSplitError(
                "PruneAt does not know its task: give it to Planning(variants=...)."
            )
        state, ranks = outcome.state, None
        with torch_threads(1), torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(start.seed, "prune"))
            rate = self._rate(start, state)
            if self.score == "rank" and self.data is not None:
                model = _model(start, state)
                ranks = measured_ranks(model, outcome.groups, self.data.batches())
        left = pruned(
            outcome.groups,
            rate,
            state,
            parameters=start.parameter_names,
            ranks=ranks,
        )
        _log_what_is_left(start, outcome, rate, left)
        return left

    def _rate(self, start: RoundStart, state: Mapping[str, Any]) -> float:
        if not isinstance(self.rate, HessianRate):
            return self.rate
        assert self.data is not None
        model, (inputs, targets) = _model(start, state), next(self.data.batches())
        model.eval()
        values, shares = hessian_spectrum(
            lambda: start.task.loss_fn(model(inputs), targets),
            [p for p in model.parameters() if p.requires_grad],
            probes=self.rate.probes,
            iterations=self.rate.iterations,
            generator=torch.default_generator,
        )
        return flat_share(values.numpy(), shares.numpy())

    def _check_data(self, start: RoundStart) -> None:
        """Compute the first batch's loss."""
        assert self.data is not None
        inputs, targets = next(self.data.batches())
        model = _model(start, start.state).eval()
        try:
            with torch_threads(1), torch.no_grad():
                start.task.loss_fn(model(inputs), targets)
        except Exception as error:  # Whatever a model or a loss can raise.
            raise InvalidTask(
                "the server's examples do not fit the task, so PruneAt cannot measure "
                f"on them: {type(error).__name__}: {error}. Give the server's loader "
                "inputs and targets as the clients' loaders yield them."
            ) from error


class _Run:
    """What a run tells; no setting that a resumed run must have, too."""

    __slots__ = ("start",)

    def __init__(self) -> None:
        self.start: RoundStart | None = None


def _model(start: RoundStart, state: Mapping[str, Any]) -> Segment:
    """Make the whole model with a state's values."""
    chain = build_chain(start.task).under(start.variant)
    return materialise(chain, 0, len(chain), state)


def _log_what_is_left(
    start: RoundStart, outcome: RoundOutcome, rate: float, left: Variant
) -> None:
    """Say what was pruned, and what could not be."""
    chain = build_chain(start.task)
    smaller = chain.under(left).kinds
    before, after = (
        sum(prod(kinds[name][0]) for name in start.parameter_names)
        for kinds in (chain.kinds, smaller)
    )
    fixed = [g.name for g in outcome.groups if not filters_of(g, outcome.state)]
    _log.log(
        INFO,
        "Pruned after round %s at rate %.3g: %s of %s parameters are left (%.1f %%); "
        "channels stay whole in %s",
        outcome.round_number,
        rate,
        after,
        before,
        100 * after / before,
        ", ".join([*fixed, *chain.channels.reasons]) or "no layer",
    )
