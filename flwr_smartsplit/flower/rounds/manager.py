"""CentralManager: plan and settle rounds, for both strategies.

It knows clients by client_key and states by name, whichever of Flower's APIs carries
them, so the same replies give the same bits.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from logging import INFO, getLogger
from typing import Any

from flwr_smartsplit.edge.hosts.edge import Edge
from flwr_smartsplit.edge.protocol import State
from flwr_smartsplit.edge.regions import cut_state
from flwr_smartsplit.edge.tensors import digest_of
from flwr_smartsplit.errors import InvalidTask, RefusedReply
from flwr_smartsplit.flower.journal.journal import Journal
from flwr_smartsplit.flower.journal.round_log import RoundLog, most_common
from flwr_smartsplit.flower.planning import Settings
from flwr_smartsplit.flower.rounds.exchange import (
    Dispatch,
    Phase,
    Sent,
    changed_names,
    device_names,
    frozen_names,
    returned,
)
from flwr_smartsplit.flower.rounds.observations import (
    client_outcomes,
    observed,
)
from flwr_smartsplit.flower.rounds.outstanding import Outstanding
from flwr_smartsplit.flower.rounds.planner import PhasePlanner
from flwr_smartsplit.flower.serde.records import config_values
from flwr_smartsplit.flower.server_optimizer import ServerOptimizer, TakeStep
from flwr_smartsplit.plan.selection.history import NO_HISTORY, Observation
from flwr_smartsplit.plan.selection.speed_estimates import with_speeds
from flwr_smartsplit.plan.variants.variants import (
    RoundOutcome,
    learns,
    shown_of,
    steps_of,
)
from flwr_smartsplit.profile.example_shapes import (
    longer_than_example,
    longest,
)
from flwr_smartsplit.server.acceptance import check_evaluation, refusal
from flwr_smartsplit.server.aggregation import (
    RoundStart,
    RoundSummary,
    Settled,
    WeighedMixing,
    cut_steps,
    next_state,
    prepare,
    settle_round,
    state_like,
)
from flwr_smartsplit.server.edge_pool import EdgePool
from flwr_smartsplit.server.global_state import GlobalState, KeptByNodes
from flwr_smartsplit.server.offers import check_narrowable, groups_for
from flwr_smartsplit.server.steps import first_proxies
from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.task import Task
from flwr_smartsplit.train.metric_names import check_metrics
from flwr_smartsplit.types import (
    WHOLE,
    Assignment,
    ClientPlan,
    ClientReply,
    DeviceProfile,
    Failure,
    RoundPlan,
    Shapes,
    Variant,
    within,
)

_log = getLogger("flwr")


class CentralManager:
    """Give each chosen client its route, and merge the replies.

    ``take_step`` is the inner strategy's server step, if it has one; ``num_states`` is
    how many global states edges may have to hold at once.
    """

    def __init__(
        self,
        task: Task,
        edges: Sequence[Edge],
        settings: Settings,
        *,
        take_step: TakeStep | None = None,
        num_states: int = 2,
    ) -> None:
        self.task = task
        self.settings = settings
        self.chain = build_chain(task, anew=True)
        self.edges = EdgePool(edges, task, num_states=num_states)
        journal = Journal(settings.journal, settings.on_row)
        self.rounds = RoundLog(journal, settings.planning.clock)
        self.round_plans: list[RoundPlan] = []
        self.history = NO_HISTORY
        self.variants_memory: Any = None  # What the rule of variants has learned
        if edges:
            self.chain.require_cuts()
        check_metrics(self.chain, task)
        check_narrowable(self.chain, task, settings.planning.variants)
        self.planner = PhasePlanner(task, self.chain, settings, self.edges)
        self.server_steps = settings.server_steps
        if take_step is not None:
            step = ServerOptimizer(take_step, self.chain.parameter_names)
            self.server_steps = (step, *settings.server_steps)
        self.shapes: dict[str, Shapes] = {}  # Of the longest examples, by client
        self.outstanding = Outstanding()
        self.has_merged = False
        self._newest = 0
        self._state: State = {}
        self.proxies = self._first_proxies()  # Trained, and in no whole model
        names = self.chain.changed_names(0, len(self.chain))
        self._changing = frozenset(names) | self.proxies.keys()
        self._sent = GlobalState()
        self._kept = KeptByNodes()

    @property
    def base(self) -> Variant:
        """What of the task's model is trained: less than all, once it is pruned."""
        rule: Any = self.settings.planning.variants
        base: Variant = WHOLE
        if hasattr(rule, "base"):
            base = rule.base(self.variants_memory)
        return base

    def _first_proxies(self) -> State:
        planning = self.settings.planning
        return first_proxies(
            self.chain,
            self.task,
            steps_of(planning.variants, self.chain.unit_names),
            constraints=planning.constraints,
            server_steps=self.settings.server_steps,
            seed=self.settings.seed,
        )

    @property
    def state(self) -> State:
        """The newest global state."""
        return self._state

    def summary(self) -> None:
        """Log the settings in Flower's format."""
        _log.log(INFO, "\t├──> Splitting:")
        _log.log(INFO, "\t│\t├──Units: %d", len(self.chain))
        _log.log(INFO, "\t│\t└──Edges: %s", ", ".join(self.edges.names) or "none")

    def close(self) -> None:
        """End the edges; drop outstanding phases."""
        self.outstanding.clear()
        self.edges.stop()

    def begin(
        self, phase: Phase, state: State, clients: Mapping[str, DeviceProfile]
    ) -> Dispatch:
        """Plan a phase: what each chosen client is sent."""
        self.chain.check_aliases(state)
        state = {**state, **self.proxies}
        if not self._sent.is_still(state):
            self._state = state
            self._sent = GlobalState.of(state, self._changing, self.base)
        dispatch = self._started(phase, clients)
        if phase.is_train:
            self._newest = phase.round_number
        clients = self._with_shapes(self.planner.begun(phase, clients))
        plan, addresses = self._planned(phase, clients)
        dispatch.edge_phase = self.edges.phase
        if self.task.schedule_fn is None:
            self.rounds.warn_of_unread(phase.config)
        self.rounds.write_plan(plan, clients, is_train=phase.is_train)
        cohort = self.planner.cohort(
            phase, plan, clients, self.history, edges=tuple(addresses)
        )
        for assignment in plan.assignments:
            key = assignment.client_key
            client_plan = self.planner.client_plan(
                assignment,
                phase,
                clients[key],
                digest=dispatch.digest,
                addresses=addresses,
            )
            client_plan = replace(
                client_plan,
                cohort=cohort and cohort.for_steps(clients[key].num_steps),
                importance=self.history.importance.get(key, 0.0),
            )
            sent = self._sent_to(clients[key], client_plan, assignment)
            dispatch.add(self._without_kept(sent), clients[key], self.edges)
        self.outstanding.add(dispatch)
        return dispatch

    def _sent_to(
        self, device: DeviceProfile, plan: ClientPlan, assignment: Assignment
    ) -> Sent:
        """Say what goes to a client by its plan, and what comes back."""
        costs = self.planner.costs(device.batch_kind, plan.accumulate, plan.variant)
        back = returned(changed_names(plan, self.chain), self.task.is_local)
        return Sent(
            plan,
            device_names(plan, self.chain),
            back,
            assignment,
            costs,
            regions=self.chain.regions(plan.variant, of=self.base),
            device=device,
        )

    def why_nothing_merged(self) -> str:
        """Say why all rounds so far left the model as it was."""
        causes = [failure.cause for failure in self.rounds.failures]
        causes += [why for plan in self.round_plans[-1:] for why in plan.unfit_causes]
        return (
            "nobody's training was merged in any round, so the model is still the "
            f"initial one: {most_common(causes)}"
        )

    def take(self, version: int, *, is_train: bool) -> Dispatch | None:
        """Return an outstanding phase and forget it; None if there is none."""
        return self.outstanding.take(version, is_train=is_train)

    def settle(
        self,
        dispatch: Dispatch,
        replies: Iterable[ClientReply],
        failures: Sequence[Failure],
    ) -> Settled:
        """End a training phase: refuse, commit, drop, merge, mix, step."""
        received = self.settings.planning.clock()
        replies = list(self._noted(replies))
        self._note_kept(dispatch, replies)
        settled = settle_round(
            replies,
            round_number=dispatch.round_number,
            expected=dispatch.expectations(self.chain, replies),
            current=self._state,
            edges=self.edges,
        )
        failures = [*failures, *settled.failures]
        client_seconds = self.settings.planning.client_seconds
        seen = tuple(observed(dispatch, settled.accepted, client_seconds))
        self.history = self.history.after(seen)
        settled = replace(settled, state=self._after(dispatch, settled, failures))
        if self._learn_variants(dispatch, settled.accepted, seen):
            settled = replace(settled, state=self._state)
        self._end(dispatch, settled.accepted, failures, received)
        self.has_merged = self.has_merged or settled.state is not None
        if not settled.accepted:
            unfit = self.round_plans[-1].unfit_causes
            causes = [*(failure.cause for failure in failures), *unfit]
            self.rounds.write_unmerged(dispatch.round_number, causes)
        return settled

    def _after(
        self, dispatch: Dispatch, settled: Settled, failures: Sequence[Failure]
    ) -> State | None:
        """Return the next state; None if nothing changes the present one."""
        state, settings = settled.state, self.settings
        summary = RoundSummary(
            round_number=dispatch.round_number,
            staleness=dispatch.oldest(settled.accepted, newest=self._newest),
            reports={key: reply.report for key, reply in settled.accepted.items()},
            failures=tuple(failures),
            config=dispatch.config,
            label_counts=dispatch.label_counts,
        )
        if state is not None:
            if isinstance(settings.mixing, WeighedMixing):
                dispatch.weight = settings.mixing.weight(summary)
            state = next_state(
                self._state,
                state,
                summary,
                mixing=settings.mixing,
                server_steps=self.server_steps,
                fixed=self._fixed(dispatch, settled.accepted),
            )
        if settings.between_rounds is not None:
            seen = self._whole(self._state if state is None else state)
            changed = settings.between_rounds(dispatch.round_number, seen, summary)
            if changed is not None:
                changed = state_like(seen, changed, maker=settings.between_rounds)
                state = {**(state or self.proxies), **changed}
        if state is None:
            return None
        self._state = self.chain.with_aliases(state)
        self.proxies = {name: state[name] for name in self.proxies}
        # Nobody holds it yet; the phase that sends it names it.
        self._sent = GlobalState(rest=self._sent.rest)
        return self._whole(self._state)

    def _whole(self, state: State) -> State:
        """Leave out what is in no whole model."""
        return {n: array for n, array in state.items() if n not in self.proxies}

    def _fixed(
        self, dispatch: Dispatch, accepted: Mapping[str, ClientReply]
    ) -> frozenset[str]:
        """Name what no step of a round trains, if the model is trained in steps."""
        chains = [self.chain.under(dispatch.sent[k].plan.variant) for k in accepted]
        if all(chain is self.chain for chain in chains):
            return frozenset()
        trained = (chain.changed_names(0, len(chain)) for chain in chains)
        return frozenset(self._state).difference(*trained)

    def _learn_variants(
        self,
        dispatch: Dispatch,
        accepted: Mapping[str, ClientReply],
        seen: Iterable[Observation],
    ) -> bool:
        """Let a rule that learns see how a round ended; say if it made the model less.

        Then the state is cut, and with it what the server's steps remember.
        """
        rule: Any = self.settings.planning.variants
        if not accepted or not learns(rule):
            return False
        before = self.base
        outcome = RoundOutcome(
            round_number=dispatch.round_number,
            clients=client_outcomes(dispatch, accepted, seen),
            state=self._state,
            groups=groups_for(rule, self.chain, before),
            units=self.chain.unit_parameters,
            memory=self.variants_memory,
            seconds_of=partial(self._seconds, dispatch),
        )
        self.variants_memory = rule.learned(outcome)
        if self.base == before:
            return False
        regions = self.chain.regions(self.base, of=before)
        self._state, self._sent = cut_state(self._state, regions), GlobalState()
        cut_steps(self.server_steps, regions)
        return True

    def _seconds(
        self, dispatch: Dispatch, client_key: str, variant: Variant
    ) -> float | None:
        """Predict a client's round, by what was learned of its speed."""
        device = dispatch.sent[client_key].device
        if device is None:
            return None
        steps = self.history.steps.get(client_key, ())
        device = with_speeds(device, steps, ())
        return self.planner.seconds(device, within(self.base, variant))

    def _started(self, phase: Phase, clients: Mapping[str, DeviceProfile]) -> Dispatch:
        """Begin a phase, and tell the server's steps of a round to train."""
        dispatch = Dispatch(
            phase.round_number,
            phase.is_train,
            self.settings.planning.clock(),
            version=phase.round_number,
            digest=self._sent.digest,
            proxies=self.proxies,
            rest=self._sent.rest,
            config=config_values(phase.config),
            label_counts={k: c.traits.label_counts for k, c in clients.items()},
        )
        if phase.is_train:
            start = RoundStart(
                round_number=dispatch.round_number,
                task=self.task,
                seed=self.settings.seed,
                state=self._state,
                parameter_names=self.chain.parameter_names,
                variant=self.base,
                label_counts=dispatch.label_counts,
            )
            rule: Any = self.settings.planning.variants
            prepare((*self.server_steps, rule), start)
        return dispatch

    def _without_kept(self, sent: Sent) -> Sent:
        """Leave out the frozen arrays that a client's node has kept."""
        if sent.plan.variant != self.base and not sent.plan.variant.is_step:
            # What it had of them may be another part.
            return sent
        frozen = self._sent.digests_of(frozen_names(sent.plan, self.chain))
        if not frozen:
            return sent
        is_sent = not self._kept.has(sent.plan.client_key, frozen)
        plan = replace(sent.plan, frozen_digest=digest_of(frozen), sends_frozen=is_sent)
        return replace(sent, plan=plan, frozen=frozen)

    def _note_kept(self, dispatch: Dispatch, replies: Iterable[ClientReply]) -> None:
        """Remember which nodes say that they have kept what they were sent."""
        for reply in replies:
            sent = dispatch.sent.get(reply.client_key)
            if sent is not None and reply.round_number == dispatch.round_number:
                digest = reply.report.frozen_digest
                self._kept.learn(reply.client_key, sent.frozen, digest)

    def assess(
        self,
        dispatch: Dispatch,
        replies: Iterable[ClientReply],
        failures: Sequence[Failure],
    ) -> dict[str, ClientReply]:
        """End an evaluation phase; return the accepted replies, in client_key order."""
        received = self.settings.planning.clock()
        accepted: dict[str, ClientReply] = {}
        failures = list(failures)
        replies = sorted(self._noted(replies), key=lambda r: r.client_key)
        self._note_kept(dispatch, replies)
        for reply in replies:
            try:
                check_evaluation(reply, round_number=dispatch.round_number)
            except RefusedReply as error:
                failures.append(refusal(reply, error))
            else:
                accepted[reply.client_key] = reply
        self._end(dispatch, accepted, failures, received)
        return accepted

    def _noted(self, replies: Iterable[ClientReply]) -> list[ClientReply]:
        """Note who met longer examples than the task's: they are priced at those."""
        replies = list(replies)
        for reply in replies:
            before = self.shapes.get(reply.client_key, ())
            seen = longest(reply.report.example_shapes, before)
            shapes = longer_than_example(seen, self.task)
            if shapes:
                self.shapes[reply.client_key] = shapes
        return replies

    def _with_shapes(
        self, clients: Mapping[str, DeviceProfile]
    ) -> dict[str, DeviceProfile]:
        return {
            key: replace(client, example_shapes=self.shapes.get(key, ()))
            for key, client in clients.items()
        }

    def _end(
        self,
        dispatch: Dispatch,
        accepted: Mapping[str, ClientReply],
        failures: list[Failure],
        received_seconds: float,
    ) -> None:
        """Let edges drop what no outstanding client needs; log the phase."""
        newest, phase = self._newest, self.edges.phase
        self.edges.let_go(
            self.outstanding.over(
                dispatch, self._sent, newest=newest, phase=phase, chain=self.chain
            )
        )
        rule = self.settings.planning.variants
        self.rounds.write_phase(
            dispatch,
            accepted,
            failures,
            edge_bytes_so_far=self.edges.traffic_bytes(),
            shown=shown_of(rule, self.variants_memory) if dispatch.is_train else {},
            received_seconds=received_seconds,
        )

    # --- planning -----------------------------------------------------------------

    def _planned(
        self, phase: Phase, clients: Mapping[str, DeviceProfile]
    ) -> tuple[RoundPlan, Mapping[str, str]]:
        """Plan, have the edges in use hold the state, and return all addresses."""
        fleet, unpriced = self.planner.priced(clients)
        self.rounds.write_failures(unpriced, phase.round_number, phase="profile")
        if unpriced and not fleet:
            raise InvalidTask(unpriced[0].cause)
        make = partial(
            self.planner.plan,
            phase,
            fleet,
            history=self.history,
            memory=self.variants_memory,
            base=self.base,
        )
        plan, addresses, unready = self.edges.planned(self._sent, make)
        self.rounds.write_failures(unready, phase.round_number, phase="edge")
        if phase.is_train:
            self.round_plans.append(plan)
        return plan, addresses
