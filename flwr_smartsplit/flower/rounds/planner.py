"""PhasePlanner: price the clients of a phase, plan it, and write each one's plan."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from random import Random
from typing import Any

from flwr_smartsplit.errors import InvalidTask
from flwr_smartsplit.flower.planning import WHOLE_MODEL, Settings
from flwr_smartsplit.flower.rounds.exchange import Phase
from flwr_smartsplit.flower.rounds.observations import cohort_in
from flwr_smartsplit.flower.serde.records import config_values
from flwr_smartsplit.plan.evaluation import evaluating, forward_only
from flwr_smartsplit.plan.rounds import Offers, Routing, plan_round
from flwr_smartsplit.plan.selection.history import History
from flwr_smartsplit.plan.selection.selection import select_at_random
from flwr_smartsplit.plan.timing import round_seconds, work_of
from flwr_smartsplit.plan.variants.variants import Variants, steps_of, wants_fisher
from flwr_smartsplit.profile.example_shapes import with_example_shapes
from flwr_smartsplit.profile.task_profiles import profile_once
from flwr_smartsplit.server.edge_pool import EdgePool
from flwr_smartsplit.server.offers import offered
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.task import Task
from flwr_smartsplit.train.rng import derived_seed
from flwr_smartsplit.train.unit_migration import kept_units
from flwr_smartsplit.types import (
    WHOLE,
    Assignment,
    BatchKind,
    ChainProfile,
    ClientPlan,
    Cohort,
    DeviceProfile,
    Failure,
    RoundPlan,
    Route,
    Variant,
    Work,
)


class PhasePlanner:
    """Plan phases of one task by one strategy's settings.

    It remembers only what a step costs, and what phase it is in.
    """

    def __init__(
        self, task: Task, chain: Chain, settings: Settings, edges: EdgePool
    ) -> None:
        self._task, self._chain = task, chain
        self._settings, self._edges = settings, edges
        constraints = settings.planning.constraints
        kept = constraints.kept_units | kept_units(chain, task)
        self._constraints = replace(constraints, kept_units=kept)
        self._profiles: dict[tuple[BatchKind, int, Variant], ChainProfile] = {}
        self._whole_work: dict[tuple[BatchKind, Variant], Work] = {}
        self._forward_only: frozenset[int] = frozenset()

    def begun(
        self, phase: Phase, clients: Mapping[str, DeviceProfile]
    ) -> Mapping[str, DeviceProfile]:
        """Note what a phase is priced at; return the clients at its batch sizes."""
        self._forward_only = frozenset()
        if not phase.is_train:
            self._forward_only, clients = evaluating(clients)
        return clients

    def priced(
        self, clients: Mapping[str, DeviceProfile]
    ) -> tuple[list[DeviceProfile], list[Failure]]:
        """List the clients whose batch size works, and why others' does not."""
        found: list[DeviceProfile] = []
        failures: list[Failure] = []
        for key, client in clients.items():
            try:
                self._profile(client.batch_kind)
            except InvalidTask as error:
                failed = Failure(client_key=key, kind="failed", cause=str(error))
                failures.append(failed)
            else:
                found.append(client)
        return found, failures

    def plan(
        self,
        phase: Phase,
        fleet: Sequence[DeviceProfile],
        edges: Sequence[str],
        *,
        history: History,
        memory: Any,
        base: Variant,
    ) -> RoundPlan:
        """Choose who takes part, and what each one trains along which route."""
        planning = self._settings.planning
        rule = planning.variants if phase.is_train else WHOLE_MODEL
        seed = derived_seed(
            self._settings.seed, phase.round_number, int(phase.is_train)
        )
        offers = self._offers(rule, phase.round_number, base, memory)
        costs = partial(self.costs, variant=self._step(rule, offers, fleet, base))
        return plan_round(
            fleet,
            {b: costs(b) for b in {d.batch_kind for d in fleet}},
            round_number=phase.round_number,
            num_clients=phase.sample_size(len(fleet)),
            routing=Routing(
                edges=self._edges.profiles(edges),
                select=planning.select if phase.is_train else select_at_random,
                choose_route=planning.choose_route,
                constraints=self._constraints,
                codec=self._settings.codec,
                variants=offers,
                costs=self.costs,
            ),
            rng=Random(seed),
            history=history,
        )

    def _offers(
        self, rule: Variants, round_number: int, base: Variant, memory: Any
    ) -> Offers:
        return partial(
            offered,
            rule,
            round_number=round_number,
            chain=self._chain,
            base=base,
            memory=memory,
            seconds_of=self.seconds,
        )

    def _step(
        self, rule: Variants, offers: Offers, fleet: Sequence[Any], base: Variant
    ) -> Variant:
        """Return what a round's units and cuts are of: a step, or what is left."""
        has_steps = fleet and steps_of(rule, self._chain.unit_names)
        return offers(fleet[0])[0] if has_steps else base

    def costs(
        self, batch: BatchKind, accumulate: int = 1, variant: Variant = WHOLE
    ) -> ChainProfile:
        """Profile a step of this phase: of training, or forward only."""
        profile = self._profile(batch, accumulate, variant)
        is_forward = profile.batch_size in self._forward_only
        return forward_only(profile) if is_forward else profile

    def seconds(self, device: DeviceProfile, variant: Variant) -> float | None:
        """Predict how long a round takes a device on its own; None without a speed."""
        if device.traits.flops_per_second is None:
            return None
        kind = device.batch_kind, variant.leading()
        if kind not in self._whole_work:
            profile = self._profile(device.batch_kind, variant=variant)
            self._whole_work[kind] = work_of(profile, Route.whole())
        return round_seconds(self._whole_work[kind], device)

    def cohort(
        self,
        phase: Phase,
        plan: RoundPlan,
        clients: Mapping[str, DeviceProfile],
        history: History,
        *,
        edges: Sequence[str],
    ) -> Cohort | None:
        """Return what edges compare clients with; None without an advisor."""
        advisor = self._settings.planning.advisor
        if advisor is None or not phase.is_train:
            return None
        profiles = self._edges.profiles(edges)
        return cohort_in(advisor, plan.assignments, clients, history, edges=profiles)

    def client_plan(
        self,
        assignment: Assignment,
        phase: Phase,
        device: DeviceProfile,
        *,
        digest: str,
        addresses: Mapping[str, str],
    ) -> ClientPlan:
        """Write what a client is told, but for what edges' advice needs."""
        option, rule = assignment.option, self._settings.planning.variants
        return ClientPlan(
            client_key=assignment.client_key,
            round_number=phase.round_number,
            route=option.route,
            seed=self._settings.seed,
            num_threads=self._settings.planning.num_threads,
            budget_bytes=assignment.budget_bytes,
            recompute=option.recompute,
            predicted_peak_bytes=option.peak_bytes,
            variant=option.variant,
            codecs=option.codecs,
            accumulate=option.accumulate,
            wants_fisher=phase.is_train and wants_fisher(rule),
            state_digest=digest,
            edge_addresses={e: addresses[e] for e in option.route.edges()},
            config=config_values(phase.config),
            num_examples=device.num_examples,
            constraints=self._constraints,
        )

    def _profile(
        self, batch: BatchKind, accumulate: int = 1, variant: Variant = WHOLE
    ) -> ChainProfile:
        """Profile the chain, once for each kind of batch, micro-batches and variant."""
        kind = batch, max(accumulate, self._task.accumulate), variant.leading()
        if kind not in self._profiles:
            batch_size, shapes = (batch, ()) if isinstance(batch, int) else batch
            chain, task = with_example_shapes(self._chain, self._task, shapes)
            self._profiles[kind] = profile_once(
                chain,
                replace(task, accumulate=kind[1]),
                batch_size=batch_size,
                variant=variant,
            )
        return self._profiles[kind]
