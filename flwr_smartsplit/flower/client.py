"""SmartSplitNumPyClient: the on-device manager as a Flower ``NumPyClient``."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy.typing as npt
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.client import NumPyClient
from torch import nn

from flwr_smartsplit.device.batches import sizes_of
from flwr_smartsplit.device.budget_adapter import Adapter
from flwr_smartsplit.device.gradient_check import Ratings, check_classes
from flwr_smartsplit.device.local_training import (
    Conditions,
    Loader,
    Outcome,
    evaluate_locally,
    train_locally,
)
from flwr_smartsplit.device.step_timer import StepSeconds
from flwr_smartsplit.edge.hosts.addresses import is_address
from flwr_smartsplit.edge.hosts.edge import Edge
from flwr_smartsplit.edge.hosts.grpc import GrpcEdge
from flwr_smartsplit.edge.protocol import Transport
from flwr_smartsplit.edge.tensors import state_digest
from flwr_smartsplit.errors import EdgeUnreachable, InvalidTask
from flwr_smartsplit.flower.checkpoints.local_states import LocalStates
from flwr_smartsplit.flower.rounds.exchange import (
    device_names,
    frozen_names,
    moved_plan,
    returned,
)
from flwr_smartsplit.flower.serde.records import (
    PARTITION,
    Arrays,
    Scalar,
    Scalars,
    config_values,
    facts_to_scalars,
    from_array_record,
    plan_from_config,
    profile_to_scalars,
    to_array_record,
)
from flwr_smartsplit.flower.serde.replies import (
    client_metrics,
    evaluated,
    reply_to_scalars,
)
from flwr_smartsplit.memory.budget import (
    MemoryBudget,
    as_budget,
    reads_the_machine,
)
from flwr_smartsplit.memory.cap import CapMode
from flwr_smartsplit.profile.accelerator_memory import accelerator_overhead
from flwr_smartsplit.profile.task_profiles import profile_of
from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.task import Task
from flwr_smartsplit.task_digest.facts import all_facts, facts_digest, task_facts
from flwr_smartsplit.train.torch_device import CPU, as_device
from flwr_smartsplit.types import (
    NO_TRAITS,
    ClientPlan,
    DeviceProfile,
    DeviceTraits,
    Route,
    Status,
    StepReport,
)
from flwr_smartsplit.types.sizes import plain, whole
from flwr_smartsplit.verify.guard import Guard

_WEIGHT = "num-examples"
_FROZEN = "smartsplit.frozen"
_RATINGS = "smartsplit.gradients"


class SmartSplitNumPyClient(NumPyClient):
    """Train the front of a model on a device, under a memory cap.

    Works under ``SmartSplit``, as it is or through ``build_client_app``. Under a
    stock Flower strategy, which sends no plan, it trains the whole model without
    a cap.

    Parameters
    ----------
    task : Task
        Model, loss and optimizer.
    train_loader : Iterable
        Batches ``(inputs, targets)``; they are iterated anew each round.
    eval_loader : Iterable, optional
        Batches for evaluation; by default, those of ``train_loader``.
    client_key : str or int
        A name that stays the same in all rounds and runs, such as the partition id.
    budget_bytes : int or MemoryBudget, optional
        What this device's tensors may take; None is no limit. A ``MemoryBudget`` is
        read between batches, and the device adapts to it.
    edges : Sequence[Edge]
        The edges this client can reach, such as ``(RayEdge(),)``; none are needed for
        edges on a network, whose addresses and certificates come with each plan.
    traits : DeviceTraits
        What else the strategy may know of this device: speed, links, label counts.
    num_examples, batch_size : int, optional
        Of one pass and of a batch; read off ``train_loader`` and its sampler if not
        given.
    local_epochs : int
        Passes over the training loader in each round.
    cap_mode : CapMode or str
        Meters some steps (``"sampled"``), all (``"strict"``) or none (``"off"``).
    meter_every : int
        A sampled cap meters the first two steps of each kind of batch, then every nth.
    owns_process : bool
        Whether this client has its process for itself: it then measures the resident
        set too, and the system refuses memory beyond the plan's budget plus 32 MiB.
    device : str or torch.device
        Where this client computes: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, or ``"auto"``,
        which takes the first GPU that this process sees, and the CPU where it sees
        none. On CUDA, ``budget_bytes`` is memory of the GPU.
    step_seconds : Callable[[ClientPlan, Route, RecomputePlan], float], optional
        A training step's time on a simulated device; without it, steps are timed.
    seed : int
        Seed under a stock strategy; ``SmartSplit`` sends its own.
    context : Context, optional
        Keeps ``Task.is_local`` state between rounds, and frozen weights, which are then
        sent once; ``build_client_app`` sets it.
    local_folder : str or Path, optional
        Keeps ``Task.is_local`` state in files instead, for when this process or the run
        starts again; each client_key has its own in it.
    check_gradients : bool
        Send nothing more to an edge whose gradients do not follow the labels, as one
        that hijacks training; for tasks with one class for each example.
    noise_seed : int, optional
        Makes the noise of ``Task.defence`` the same in every run, for tests; who knows
        it can take the noise off. By default, the noise is new in each round.
    """

    # longer than 40 lines because each thing a client owns is an argument
    def __init__(  # noqa: PLR0913
        self,
        task: Task,
        train_loader: Loader,
        eval_loader: Loader | None = None,
        *,
        client_key: str | int,
        budget_bytes: int | MemoryBudget | None = None,
        edges: Sequence[Edge] = (),
        traits: DeviceTraits = NO_TRAITS,
        num_examples: int | None = None,
        batch_size: int | None = None,
        local_epochs: int = 1,
        cap_mode: CapMode | str = CapMode.SAMPLED,
        meter_every: int = 50,
        owns_process: bool = False,
        device: str | torch.device = CPU,
        step_seconds: StepSeconds | None = None,
        seed: int = 0,
        context: Context | None = None,
        local_folder: str | Path | None = None,
        check_gradients: bool = False,
        noise_seed: int | None = None,
    ) -> None:
        self.task = task
        if check_gradients:
            check_classes(task.example_targets)
        client_key = _key_of(client_key)
        self._budget = _budget_of(client_key, budget_bytes)
        self._moves = isinstance(budget_bytes, MemoryBudget)
        self.train_loader = train_loader
        self.eval_loader = eval_loader
        self._seed = whole(seed, "seed")
        self.context = context
        self._local_states = LocalStates(local_folder, client_key)
        self._edges = _by_name(edges)
        num_examples, batch_size = sizes_of(train_loader, num_examples, batch_size)
        if num_examples is None or batch_size is None:
            raise InvalidTask(
                "the training loader does not say how many examples it draws and in "
                "which batches: give num_examples and batch_size."
            )
        eval_size = sizes_of(eval_loader)[1]
        self._profile = DeviceProfile(
            client_key=client_key,
            budget_bytes=None,  # It may move.
            num_examples=num_examples,
            batch_size=batch_size,
            eval_batch_size=None if eval_size == batch_size else eval_size,
            num_epochs=whole(local_epochs, "local_epochs"),
            traits=traits,
            keeps_local=local_folder is not None,
        )
        self._conditions = Conditions(
            task=task,
            connect=self._connect,
            cap_mode=cap_mode,
            meter_every=whole(meter_every, "meter_every"),
            local_epochs=self._profile.num_epochs,
            batch_size=self._profile.batch_size,
            owns_process=owns_process,
            device=_device_of(client_key, device, budget_bytes),
            step_seconds=step_seconds,
            ratings={} if check_gradients else None,
            noise_seed=noise_seed,
        )

    @property
    def profile(self) -> DeviceProfile:
        """The client's profile, with its present budget."""
        budget_bytes = self._budget.read(step=0, live_bytes=0)
        if budget_bytes is not None:
            budget_bytes = max(0, budget_bytes - self._spare_bytes)
        return replace(self._profile, budget_bytes=budget_bytes)

    @cached_property
    def _spare_bytes(self) -> int:
        """What the strategy may not plan with: an accelerator takes it beyond plans."""
        if self._conditions.device.type == "cpu":
            return 0
        size = self._profile.batch_size
        return accelerator_overhead(
            build_chain(self.task), batch_size=size, task=self.task
        )

    def profile_scalars(self) -> Scalars:
        """Write profile and task, with the partition that Flower's simulation gives."""
        config = {} if self.context is None else self.context.node_config
        partition = {name: n for name, n in config.items() if name == PARTITION}
        told = facts_to_scalars(self._facts(all_facts))
        return {**profile_to_scalars(self.profile), **partition, **told}

    def train(self, plan: ClientPlan, state: Arrays) -> Outcome:
        """Do this client's part of a training round."""
        self._check_task(plan)
        known = self._known(plan, state, is_train=True)
        if known is None:
            return Outcome(state={}, receipts=(), report=_not_held(plan))
        conditions = self._conditions
        if plan.budget_bytes is not None:
            conditions = replace(conditions, spare_bytes=self._spare_bytes)
        if not _is_stock(plan) and (self._moves or plan.cohort is not None):
            size = self._profile.batch_size
            adapter = Adapter(self._budget, self.task, batch_size=size)
            conditions = replace(conditions, between_steps=adapter)
        if conditions.ratings is not None and self.context is not None:
            kept = self.context.state.config_records
            ratings = cast(Ratings, kept.setdefault(_RATINGS, ConfigRecord()))
            conditions = replace(conditions, ratings=ratings)
        outcome = train_locally(plan, known, self.train_loader, conditions)
        if _is_stock(plan) and outcome.state:
            # A stock strategy wants every name back, also those no unit uses.
            whole = build_chain(self.task).with_aliases({**known, **outcome.state})
            return replace(outcome, state=whole)
        report = self._noted(plan, outcome.report)
        return self._without_local(plan, replace(outcome, report=report))

    def test(self, plan: ClientPlan, state: Arrays) -> StepReport:
        """Do this client's part of an evaluation round."""
        loader = self.train_loader if self.eval_loader is None else self.eval_loader
        self._check_digest(plan)
        known = self._known(plan, state, is_train=False)
        if known is None:
            return _not_held(plan)
        size = self._profile.eval_batch_size or self._profile.batch_size
        conditions = replace(self._conditions, batch_size=size)
        if plan.budget_bytes is not None:
            conditions = replace(conditions, spare_bytes=self._spare_bytes)
        report = evaluate_locally(plan, known, loader, conditions)
        return self._noted(plan, report)

    def plan_for(self, config: Any) -> ClientPlan:
        """Read a config's plan, or make the one that a stock strategy implies."""
        plan = plan_from_config(config)
        if plan is None:
            round_number = int(config.get("server-round", 0))
            plan = ClientPlan(
                client_key=self._profile.client_key,
                round_number=round_number,
                route=Route.whole(),
                # Without a number, all rounds would shuffle alike.
                seed=self._seed if round_number else int(torch.randint(2**62, ())),
                edge_addresses={},
                config=config_values(config),
            )
        return plan

    def device_names(self, plan: ClientPlan) -> tuple[str, ...]:
        """Name the state of this client's device segments, in the model's order."""
        chain = build_chain(self.task)
        if _is_stock(plan):
            return tuple(chain.model.state_dict())
        return device_names(plan, chain)

    # --- NumPyClient --------------------------------------------------------------

    def get_properties(self, config: dict[str, Scalar]) -> dict[str, Scalar]:
        """Return this client's profile for the strategy's planning."""
        del config
        return self.profile_scalars()

    def fit(
        self, parameters: list[npt.NDArray[Any]], config: dict[str, Scalar]
    ) -> tuple[list[npt.NDArray[Any]], int, dict[str, Scalar]]:
        """Train in Flower's legacy API."""
        plan = self.plan_for(config)
        names = self._sent_names(plan)
        outcome = self.train(plan, dict(zip(names, parameters, strict=True)))
        names = self.device_names(moved_plan(plan, outcome.report.moves))
        arrays = [outcome.state[name] for name in names if name in outcome.state]
        return arrays, outcome.report.num_examples, _scalars(plan, outcome)

    def evaluate(
        self, parameters: list[npt.NDArray[Any]], config: dict[str, Scalar]
    ) -> tuple[float, int, dict[str, Scalar]]:
        """Evaluate along the route in Flower's legacy API."""
        plan = self.plan_for(config)
        names = self._sent_names(plan)
        report = self.test(plan, dict(zip(names, parameters, strict=True)))
        return report.loss, report.num_examples, _scalars(plan, evaluated(report))

    def _sent_names(self, plan: ClientPlan) -> tuple[str, ...]:
        """Name the arrays that come with a plan, in their order."""
        names = self.device_names(plan)
        if plan.sends_frozen:
            return names
        kept = set(frozen_names(plan, build_chain(self.task)))
        return tuple(name for name in names if name not in kept)

    # --- the same task everywhere, and an exact one --------------------------------

    def _facts(
        self, describe: Callable[[Task, nn.Module], dict[str, str]] = task_facts
    ) -> dict[str, str]:
        return describe(self.task, build_chain(self.task).model)

    def _check_digest(self, plan: ClientPlan) -> None:
        """Refuse a plan for another task: this process may have started anew."""
        if plan.task_digest and plan.task_digest != facts_digest(self._facts()):
            raise InvalidTask(
                f"client {plan.client_key!r}: its task is no longer the one that it "
                "compared with the strategy's. Start the run again with one code "
                "everywhere."
            )

    def _check_task(self, plan: ClientPlan) -> None:
        """Refuse another task, and one whose chain is not exact on this device."""
        self._check_digest(plan)
        guard = Guard(
            mode=plan.verify,
            place=f"client {plan.client_key!r}",
            is_client=True,
            may_recompute=plan.constraints.recompute,
            budget_bytes=self.profile.budget_bytes,
        )
        size = self._profile.batch_size
        guard.verify(
            self.task,
            lambda: profile_of(self.task, batch_size=size),
            config=plan.config,
            task_digest=plan.task_digest,
        )

    # --- what stays on the device --------------------------------------------------

    def _known(
        self, plan: ClientPlan, state: Arrays, *, is_train: bool
    ) -> Arrays | None:
        """Add what this node keeps to what came; None if it does not keep the frozen.

        Frozen state that comes is kept in Flower's context, if the client has one.
        """
        if plan.frozen_digest:
            names = frozen_names(plan, build_chain(self.task))
            kept: Any = {}
            if self.context is not None:
                kept = self.context.state.get(_FROZEN, kept)
            if not plan.sends_frozen:
                mine = {name: kept[name] for name in names if name in kept}
                state = {**from_array_record(ArrayRecord(mine)), **state}
            frozen = {name: state[name] for name in names if name in state}
            if state_digest(frozen) != plan.frozen_digest:
                return None
            if plan.sends_frozen and self.context is not None:
                both = {**kept, **to_array_record(frozen)}
                self.context.state[_FROZEN] = ArrayRecord(both)
        return {**state, **self._local(plan, is_train=is_train)}

    def _noted(self, plan: ClientPlan, report: StepReport) -> StepReport:
        """Tell the strategy whether this node keeps the frozen state of a plan."""
        digest = "" if self.context is None else plan.frozen_digest
        return replace(report, frozen_digest=digest)

    def _local(self, plan: ClientPlan, *, is_train: bool) -> Arrays:
        """Read this client's local state, if there is any yet."""
        if self.task.is_local is None or _is_stock(plan):
            return {}
        kept = self._local_states.read(plan, self.context, is_train=is_train)
        names = set(self.device_names(plan))
        return {name: array for name, array in kept.items() if name in names}

    def _without_local(self, plan: ClientPlan, outcome: Outcome) -> Outcome:
        """Keep local state here, and the rest to send."""
        if self.task.is_local is None or not outcome.state:
            return outcome
        sent = returned(outcome.state, self.task.is_local)
        own = {n: a for n, a in outcome.state.items() if n not in sent}
        self._local_states.write(plan, self.context, own)
        return replace(outcome, state={name: outcome.state[name] for name in sent})

    def _connect(self, place: str, address: str) -> Transport:
        if place not in self._edges and is_address(address):
            return GrpcEdge(name=place).connect(address)
        if place not in self._edges:
            raise EdgeUnreachable(
                f"client {self._profile.client_key!r} knows no edge {place!r}, only "
                f"{sorted(self._edges)}: give it the strategy's edges."
            )
        return self._edges[place].connect(address)


def _scalars(plan: ClientPlan, outcome: Outcome) -> dict[str, Scalar]:
    return {
        **client_metrics(outcome.report, _WEIGHT),
        **reply_to_scalars(plan, outcome),
    }


def _not_held(plan: ClientPlan) -> StepReport:
    cause = "were changed on the way" if plan.sends_frozen else "are not kept here"
    return StepReport(
        status=Status.NOT_HELD,
        message=f"client {plan.client_key!r}: the frozen weights of this round "
        f"({plan.frozen_digest[:12]}) {cause}, as after a restart. It sits the round "
        "out, and is sent them in the next.",
        metrics={},
    )


def _is_stock(plan: ClientPlan) -> bool:
    """Tell whether ``plan_for`` made the plan for a stock strategy."""
    return not plan.state_digest


def _by_name(edges: Sequence[Edge]) -> dict[str, Edge]:
    if not isinstance(edges, list | tuple):
        raise TypeError(f"edges is {edges!r}; give a tuple, such as (RayEdge(),).")
    return {edge.name: edge for edge in edges}


def _budget_of(client_key: str, budget_bytes: Any) -> MemoryBudget:
    try:
        return as_budget(budget_bytes)
    except ValueError as error:
        raise ValueError(f"client {client_key!r}: {error}") from error


def _device_of(client_key: str, device: Any, budget: Any) -> torch.device:
    found = as_device(device)
    if found.type != "cpu" and reads_the_machine(budget):
        raise InvalidTask(
            f"client {client_key!r} computes on {found}, and MemoryBudget.free_memory "
            "reads the machine's memory: give it "
            "available_bytes=lambda: torch.cuda.mem_get_info()[0]."
        )
    return found


def _key_of(client_key: Any) -> str:
    """Read a key, which may be a number such as a partition's."""
    key = plain(client_key)
    if isinstance(key, int) and not isinstance(key, bool):
        key = str(key)
    if not isinstance(key, str):
        raise TypeError(f"client_key is {client_key!r}: give a text or whole number.")
    if not key.isprintable() and key != key.encode(errors="replace").decode():
        raise ValueError(f"client_key is {client_key!r}, which is no Unicode text.")
    return key
