"""SplitStrategy: what ``SmartSplit`` and ``LegacySmartSplit`` share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import cached_property, partial
from logging import WARNING, getLogger
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

from flwr_smartsplit.edge.hosts.edge import Edge
from flwr_smartsplit.errors import SmartSplitError
from flwr_smartsplit.flower.checkpoints.checkpoints import Checkpoints
from flwr_smartsplit.flower.checkpoints.run_record import RunRecord, State
from flwr_smartsplit.flower.inner_strategy import (
    Api,
    arguments_of,
    check_proximal,
    check_strategy,
    has_server_step,
)
from flwr_smartsplit.flower.journal.journal import DEFAULT_JOURNAL, OnRow
from flwr_smartsplit.flower.planning import Planning, Settings
from flwr_smartsplit.flower.registry import ClientKeys, ClientT, Owners
from flwr_smartsplit.flower.rounds.exchange import Dispatch, Phase
from flwr_smartsplit.flower.rounds.manager import CentralManager
from flwr_smartsplit.plan.codec_choice import CodecChoice, check_choice
from flwr_smartsplit.plan.variants.variants import check_rounds
from flwr_smartsplit.server.aggregation import (
    BetweenRounds,
    Mixing,
    Replace,
    ServerStep,
    state_like,
)
from flwr_smartsplit.task import Task
from flwr_smartsplit.task_digest.facts import settings_facts
from flwr_smartsplit.types import Failure, RoundPlan, Variant
from flwr_smartsplit.types.sizes import whole
from flwr_smartsplit.verify.guard import Guard
from flwr_smartsplit.verify.start import StartChecks

StrategyT = TypeVar("StrategyT")
_MOST_NAMED = 10
_log = getLogger("flwr")


class SplitStrategy(Generic[StrategyT]):
    """Take the arguments of both strategies, and begin a phase in either API."""

    _api: ClassVar[Api]
    _take_step: ClassVar[Callable[..., Any]]
    _num_states = 2  # That edges may have to hold at once

    def __init__(  # noqa: PLR0913 - what can be chosen, one by one
        self,
        task: Task,
        edges: Sequence[Edge] = (),
        *,
        strategy: StrategyT | None = None,
        planning: Planning = Planning(),
        codec: CodecChoice = None,
        mixing: Mixing = Replace(),
        server_steps: Sequence[ServerStep] = (),
        seed: int = 0,
        journal: str | Path | None = DEFAULT_JOURNAL,
        on_row: Sequence[OnRow] = (),
        between_rounds: BetweenRounds | None = None,
        verify: Literal["once", "always", False] = "once",
        checkpoints: Checkpoints | None = None,
        client_keys: ClientKeys = "bound",
    ) -> None:
        if verify not in {"once", "always", False}:
            raise ValueError(f'verify is {verify!r}: give "once", "always" or False.')
        self.strategy: StrategyT = self._api.base() if strategy is None else strategy
        check_strategy(self.strategy, self._api)
        check_proximal(self.strategy, task)
        check_choice(codec)
        recompute = planning.constraints.recompute
        guard = Guard(mode=verify or "off", may_recompute=recompute)
        self._start = StartChecks(task, guard)
        settings = Settings(
            planning=planning,
            mixing=mixing,
            server_steps=tuple(server_steps),
            seed=whole(seed, "seed"),
            journal=journal,
            on_row=on_row,
            between_rounds=between_rounds,
            codec=codec,
        )
        self._given, self._checkpoints = (task, edges, settings), checkpoints
        self._client_keys = client_keys
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
        self._central = CentralManager(
            task,
            edges,
            settings,
            take_step=take_step,
            num_states=self._num_states,
        )
        steps = enumerate(self._central.server_steps)
        objects: dict[str, object] = {
            f"server_steps[{index}]": step for index, step in steps
        }
        objects |= {"strategy": self.strategy, "mixing": settings.mixing}
        objects["between_rounds"] = settings.between_rounds
        for name in ("select", "choose_route", "client_seconds", "advisor"):
            objects[name] = getattr(settings.planning, name)
        self._owners = Owners(self._client_keys)
        objects["client_keys"] = self._owners
        self._record = RunRecord(self._checkpoints, self._central, objects)
        self._has_warned = False
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
    def variant(self) -> Variant:
        """What of the task's model is trained: less than all, once it is pruned."""
        return self._central.base

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
        self._warn_of_lost(clients)
        rounds = self._central.rounds
        rounds.write_failures(failures, phase.round_number, phase="profile")
        if failures and not clients:
            raise SmartSplitError(
                f"none of {asked} can take part; the first: {failures[0].cause}"
            )
        profiles = {key: client.profile for key, client in clients.items()}
        dispatch = self._central.begin(phase, state, profiles)
        dispatch.contacts = clients
        if phase.is_train:
            self._verify(dispatch)
        told: dict[str, Any] = {
            "task_digest": self._start.digest,
            "verify": self._start.mode,
        }
        if self._central.task.is_local is not None:
            told["lineage"] = self._record.lineage
            told["resumable_round"] = self._record.oldest()
        for key, sent in dispatch.sent.items():
            dispatch.sent[key] = replace(sent, plan=replace(sent.plan, **told))
        return dispatch

    def _first_state(self, given: Callable[[], State]) -> State | None:
        """Let ``between_rounds`` change the first state; None if it does not."""
        between: Any = self._given[2].between_rounds
        if not hasattr(between, "first_state"):
            return None
        state = given()
        return state_like(state, between.first_state(state), maker=between)

    # --- checkpoints --------------------------------------------------------------

    def _take_up(
        self, num_rounds: int | None, first: Callable[[], State], **configs: Any
    ) -> State | None:
        """Go on from the newest checkpoint; return its state, or None to start anew.

        ``between_rounds`` may have another first state than the one given.
        """

        def settings() -> dict[str, str]:
            return {**self._settings, **settings_facts(self._central.task, configs)}

        check_rounds(self._given[2].planning.variants, num_rounds)
        saved = self._record.begin(num_rounds, lambda: self._start.digest, settings)
        return self._first_state(first) if saved is None else saved

    @cached_property
    def _settings(self) -> dict[str, str]:
        """What must be alike where a run is resumed, as it was before round 1."""
        task, edges, settings = self._given
        planning = {
            field.name: getattr(settings.planning, field.name)
            for field in fields(Planning)
            if field.name not in {"clock", "profile_timeout_seconds"}
        }
        values = {
            "strategy": arguments_of(self.strategy),
            "edges": [edge.profile for edge in edges],
            "planning": planning,
            "mixing": settings.mixing,
            "server_steps": settings.server_steps,
            "between_rounds": settings.between_rounds,
            "seed": settings.seed,
        }
        steps = settings.server_steps
        firsts = [next(i for i, s in enumerate(steps) if s is step) for step in steps]
        if len({*firsts}) < len(steps):
            values["server_steps that are one object"] = firsts
        if settings.codec is not None:
            values["codec"] = settings.codec
        return settings_facts(task, values)

    def _warn_of_lost(self, clients: Mapping[str, ClientT]) -> None:
        """Say once whose own state a resumed run has lost."""
        is_resumed = self._record.done > 0 and not self._has_warned
        if self._central.task.is_local is None or not is_resumed:
            return
        self._has_warned = True
        lost = [key for key, each in clients.items() if not each.profile.keeps_local]
        if lost:
            _log.log(
                WARNING,
                "What the task's is_local keeps on the devices is lost for %s clients "
                "(%s): they begin with the global values. Give every client a "
                "local_folder.",
                len(lost),
                ", ".join(lost[:_MOST_NAMED]),
            )

    def _verify(self, dispatch: Dispatch) -> None:
        """Compare the chain with the stock module before anything is trained."""
        for sent in dispatch.sent.values():
            if sent.profile is not None:
                whole = self._central.planner.costs(sent.profile.batch_size)
                is_step = sent.plan.variant.is_step
                profile = whole if is_step else sent.profile
                self._start.verify(profile, sent.plan.config)
                return
