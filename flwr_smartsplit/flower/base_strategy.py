"""SplitStrategy: what ``SmartSplit`` and ``LegacySmartSplit`` share."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from flwr_smartsplit.edge.hosts.edge import Edge
from flwr_smartsplit.errors import SmartSplitError
from flwr_smartsplit.flower.inner_strategy import (
    Api,
    check_proximal,
    check_strategy,
    has_server_step,
)
from flwr_smartsplit.flower.journal.journal import DEFAULT_JOURNAL, OnRow
from flwr_smartsplit.flower.planning import Planning
from flwr_smartsplit.flower.registry import ClientT
from flwr_smartsplit.flower.round_exchange import Dispatch
from flwr_smartsplit.flower.round_manager import (
    BetweenRounds,
    CentralManager,
    Phase,
    Settings,
)
from flwr_smartsplit.server.aggregation import Mixing, Replace, ServerStep
from flwr_smartsplit.task import Task
from flwr_smartsplit.types import Failure, RoundPlan
from flwr_smartsplit.types.sizes import whole

StrategyT = TypeVar("StrategyT")


class SplitStrategy(Generic[StrategyT]):
    """Take the arguments of both strategies, and begin a phase in either API."""

    _api: ClassVar[Api]
    _take_step: ClassVar[Callable[..., Any]]

    def __init__(  # noqa: PLR0913 - what can be chosen, one by one
        self,
        task: Task,
        edges: Sequence[Edge] = (),
        *,
        strategy: StrategyT | None = None,
        planning: Planning = Planning(),
        mixing: Mixing = Replace(),
        server_steps: Sequence[ServerStep] = (),
        seed: int = 0,
        journal: str | Path | None = DEFAULT_JOURNAL,
        on_row: Sequence[OnRow] = (),
        between_rounds: BetweenRounds | None = None,
    ) -> None:
        self.strategy: StrategyT = self._api.base() if strategy is None else strategy
        check_strategy(self.strategy, self._api)
        check_proximal(self.strategy, task)
        settings = Settings(
            planning=planning,
            mixing=mixing,
            server_steps=tuple(server_steps),
            seed=whole(seed, "seed"),
            journal=journal,
            on_row=on_row,
            between_rounds=between_rounds,
        )
        self._given = task, edges, settings
        self._begin_anew()

    def __getstate__(self) -> dict[str, Any]:
        """Copy what was given; a copy begins its own run, without edges or failures."""
        return {k: v for k, v in vars(self).items() if k not in self._of_the_run}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Take what was given, and begin anew."""
        vars(self).update(state)
        self._begin_anew()

    def _begin_anew(self) -> None:
        before = set(vars(self))
        has_step = has_server_step(self.strategy, self._api)
        take_step = partial(self._take_step, self.strategy) if has_step else None
        task, edges, settings = self._given
        self._central = CentralManager(task, edges, settings, take_step=take_step)
        self._set_up(settings.planning.profile_timeout_seconds)
        self._of_the_run = {*vars(self)} - before | {"_of_the_run"}

    def _set_up(self, profile_timeout_seconds: float) -> None:
        """Make what only this API needs."""
        raise NotImplementedError

    @property
    def failures(self) -> list[Failure]:
        """Every client's part that was not merged so far, and why."""
        return self._central.rounds.failures

    @property
    def round_plans(self) -> list[RoundPlan]:
        """Every training plan so far."""
        return self._central.round_plans

    def _begin(
        self,
        phase: Phase,
        state: Mapping[str, Any],
        clients: Mapping[str, ClientT],
        failures: list[Failure],
        *,
        asked: str,
    ) -> Dispatch:
        """Plan a phase for the clients that gave a profile; raise if none did."""
        rounds = self._central.rounds
        rounds.write_failures(failures, phase.round_number, phase="profile")
        if failures and not clients:
            raise SmartSplitError(
                f"none of {asked} says who it is; the first: {failures[0].cause}"
            )
        profiles = {key: client.profile for key, client in clients.items()}
        dispatch = self._central.begin(phase, state, profiles)
        dispatch.contacts = clients
        return dispatch
