"""Planning: how clients and their routes are chosen, for both strategies."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flwr_smartsplit.flower.journal.journal import OnRow
from flwr_smartsplit.flower.rounds.observations import ClientSeconds
from flwr_smartsplit.plan.advisor import Advisor
from flwr_smartsplit.plan.codec_choice import CodecChoice
from flwr_smartsplit.plan.routes import ChooseRoute
from flwr_smartsplit.plan.selection.selection import Select
from flwr_smartsplit.plan.selection.utility import BY_UTILITY
from flwr_smartsplit.plan.variants.variants import Variants, Whole
from flwr_smartsplit.server.aggregation import BetweenRounds, Mixing, ServerStep
from flwr_smartsplit.types import NO_CONSTRAINTS, Constraints
from flwr_smartsplit.types.sizes import whole

WHOLE_MODEL = Whole()


@dataclass(frozen=True, slots=True, kw_only=True)
class Planning:
    """How a round is planned: who trains, along which route.

    Parameters
    ----------
    select : Callable[[SelectionRequest], Selection]
        Chooses who trains, and each one's route and plan of those that its memory
        allows: ``SelectByUtility()`` or ``select_at_random``, for instance.
    choose_route : Callable[[RouteRequest], Route], optional
        Chooses each client's route beforehand: ``deepest_split``, or
        ``deepest_u_shape`` if labels must stay on the devices.
    constraints : Constraints
        What every route must respect, such as ``Constraints(min_device_units=2)``.
    variants : Variants
        What a client is offered to train, the most wanted first, such as
        ``Widths((1.0, 0.5, 0.25))``: a narrower model only where no route of a wider
        one fits. By default, the whole model.
    advisor : Advisor, optional
        Lets edges move cuts and release slow, unimportant clients in a round, such as
        ``StragglerAdvisor()``; ``docs/results.md`` says why it is off by default.
    client_seconds : Callable[[ClientPlan, StepReport], float], optional
        How long a client's part took, such as ``measured_seconds``, from which unknown
        speeds are learned; by default, as long as was predicted from its traits.
    num_threads : int
        Torch threads at every place.
    clock : Callable[[], float]
        Seconds that only move forward.
    profile_timeout_seconds : float
        How long to wait for the profiles that clients are asked for.

    Raises
    ------
    TypeError
        If something cannot choose clients or routes, or constrain them.
    """

    select: Select = BY_UTILITY
    choose_route: ChooseRoute | None = None
    constraints: Constraints = NO_CONSTRAINTS
    variants: Variants = WHOLE_MODEL
    advisor: Advisor | None = None
    client_seconds: ClientSeconds | None = None
    num_threads: int = 1
    clock: Callable[[], float] = time.perf_counter
    profile_timeout_seconds: float = 120.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_threads", whole(self.num_threads, "num_threads"))
        if self.choose_route is not None and not callable(self.choose_route):
            raise TypeError(
                f"choose_route is {self.choose_route!r}; give a function of a "
                "RouteRequest, such as deepest_split or deepest_u_shape, or None."
            )
        if not callable(self.select):
            raise TypeError(
                f"select is {self.select!r}; give a function of a "
                "SelectionRequest, such as SelectByUtility() or select_at_random."
            )
        if not callable(getattr(self.variants, "offered", None)):
            raise TypeError(
                f"variants is {self.variants!r:.80}; give something that offers them, "
                "such as Widths((1.0, 0.5, 0.25)) or Whole()."
            )
        if not isinstance(self.constraints, Constraints):
            raise TypeError(
                f"constraints is {self.constraints!r}; give a Constraints, such as "
                "Constraints(min_device_units=2)."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The arguments of both strategies that ``SmartSplit`` explains."""

    planning: Planning
    mixing: Mixing
    server_steps: tuple[ServerStep, ...]
    seed: int
    journal: str | Path | None
    on_row: Sequence[OnRow]
    between_rounds: BetweenRounds | None
    codec: CodecChoice
