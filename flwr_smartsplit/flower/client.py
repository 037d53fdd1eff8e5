"""SmartSplitNumPyClient: the on-device manager as a Flower ``NumPyClient``."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy.typing as npt
import torch
from flwr.app import ArrayRecord, Context, RecordDict
from flwr.client import NumPyClient
from torch.utils.data import DataLoader, IterableDataset

from flwr_smartsplit.device.budget_adapter import Adapter
from flwr_smartsplit.device.local_training import (
    Conditions,
    Loader,
    Outcome,
    evaluate_locally,
    train_locally,
)
from flwr_smartsplit.device.step_timer import StepSeconds
from flwr_smartsplit.edge.hosts.edge import Edge
from flwr_smartsplit.edge.protocol import Transport
from flwr_smartsplit.errors import EdgeUnreachable, InvalidTask
from flwr_smartsplit.flower.round_exchange import device_names, moved_plan, returned
from flwr_smartsplit.flower.serde.records import (
    PARTITION,
    Arrays,
    Scalar,
    Scalars,
    config_values,
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
from flwr_smartsplit.memory.budget import MemoryBudget, as_budget
from flwr_smartsplit.memory.cap import CapMode
from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.task import Task
from flwr_smartsplit.types import (
    NO_TRAITS,
    ClientPlan,
    DeviceProfile,
    DeviceTraits,
    Route,
    StepReport,
)
from flwr_smartsplit.types.sizes import plain, whole

_WEIGHT = "num-examples"
_LOCAL = "smartsplit.local"


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
        The edges this client can reach, such as ``(RayEdge(),)``.
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
        A sampled cap meters the first two steps of each shape, then every nth step.
    owns_process : bool
        Whether this client has its process for itself: it then measures the resident
        set too, and the system refuses memory beyond the plan's budget plus 32 MiB.
    step_seconds : Callable[[ClientPlan, Route, RecomputePlan], float], optional
        A training step's time on a simulated device; without it, steps are timed.
    seed : int
        Seed under a stock strategy; ``SmartSplit`` sends its own.
    context : Context, optional
        Keeps ``Task.is_local`` state between rounds; ``build_client_app`` sets it.
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
        step_seconds: StepSeconds | None = None,
        seed: int = 0,
        context: Context | None = None,
    ) -> None:
        self.task = task
        client_key = _key_of(client_key)
        self._budget = _budget_of(client_key, budget_bytes)
        self._moves = isinstance(budget_bytes, MemoryBudget)
        self.train_loader = train_loader
        self.eval_loader = eval_loader
        self._seed = whole(seed, "seed")
        self.context = context
        self._edges = _by_name(edges)
        num_examples, batch_size = _sizes(train_loader, num_examples, batch_size)
        if num_examples is None or batch_size is None:
            raise InvalidTask(
                "the training loader does not say how many examples it draws and in "
                "which batches: give num_examples and batch_size."
            )
        eval_size = _sizes(eval_loader)[1]
        self._profile = DeviceProfile(
            client_key=client_key,
            budget_bytes=None,  # It may move.
            num_examples=num_examples,
            batch_size=batch_size,
            eval_batch_size=None if eval_size == batch_size else eval_size,
            num_epochs=whole(local_epochs, "local_epochs"),
            traits=traits,
        )
        self._conditions = Conditions(
            task=task,
            connect=self._connect,
            cap_mode=cap_mode,
            meter_every=whole(meter_every, "meter_every"),
            local_epochs=self._profile.num_epochs,
            batch_size=self._profile.batch_size,
            owns_process=owns_process,
            step_seconds=step_seconds,
        )

    @property
    def profile(self) -> DeviceProfile:
        """The client's profile, with its present budget."""
        budget_bytes = self._budget.read(step=0, live_bytes=0)
        return replace(self._profile, budget_bytes=budget_bytes)

    def profile_scalars(self) -> Scalars:
        """Write the profile, with the partition that Flower's simulation gives."""
        config = {} if self.context is None else self.context.node_config
        partition = {name: n for name, n in config.items() if name == PARTITION}
        return {**profile_to_scalars(self.profile), **partition}

    def train(self, plan: ClientPlan, state: Arrays) -> Outcome:
        """Do this client's part of a training round."""
        state = {**state, **self._local(plan)}
        conditions = self._conditions
        if not _is_stock(plan) and (self._moves or plan.cohort is not None):
            size = self._profile.batch_size
            adapter = Adapter(self._budget, self.task, batch_size=size)
            conditions = replace(conditions, between_steps=adapter)
        outcome = train_locally(plan, state, self.train_loader, conditions)
        if _is_stock(plan) and outcome.state:
            # A stock strategy wants every name back, also those no unit uses.
            whole = build_chain(self.task).with_aliases({**state, **outcome.state})
            return replace(outcome, state=whole)
        return self._without_local(outcome)

    def test(self, plan: ClientPlan, state: Arrays) -> StepReport:
        """Do this client's part of an evaluation round."""
        loader = self.train_loader if self.eval_loader is None else self.eval_loader
        state = {**state, **self._local(plan)}
        size = self._profile.eval_batch_size or self._profile.batch_size
        conditions = replace(self._conditions, batch_size=size)
        return evaluate_locally(plan, state, loader, conditions)

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
        names = self.device_names(plan)
        outcome = self.train(plan, dict(zip(names, parameters, strict=True)))
        names = self.device_names(moved_plan(plan, outcome.report.moves))
        arrays = [outcome.state[name] for name in names if name in outcome.state]
        return arrays, outcome.report.num_examples, _scalars(plan, outcome)

    def evaluate(
        self, parameters: list[npt.NDArray[Any]], config: dict[str, Scalar]
    ) -> tuple[float, int, dict[str, Scalar]]:
        """Evaluate along the route in Flower's legacy API."""
        plan = self.plan_for(config)
        names = self.device_names(plan)
        report = self.test(plan, dict(zip(names, parameters, strict=True)))
        return report.loss, report.num_examples, _scalars(plan, evaluated(report))

    # --- what stays on the device --------------------------------------------------

    def _local(self, plan: ClientPlan) -> Arrays:
        """Read this client's local state from Flower's context, if there is any yet."""
        if self.task.is_local is None or _is_stock(plan):
            return {}
        record = self._records().get(_LOCAL)
        names = set(self.device_names(plan))
        kept = from_array_record(record) if isinstance(record, ArrayRecord) else {}
        return {name: array for name, array in kept.items() if name in names}

    def _without_local(self, outcome: Outcome) -> Outcome:
        """Move local state to Flower's context, and keep the rest to send."""
        if self.task.is_local is None or not outcome.state:
            return outcome
        sent = returned(outcome.state, self.task.is_local)
        own = {n: a for n, a in outcome.state.items() if n not in sent}
        self._records()[_LOCAL] = to_array_record(own)
        return replace(outcome, state={name: outcome.state[name] for name in sent})

    def _records(self) -> RecordDict:
        """Return the records that Flower keeps for this node between messages."""
        if self.context is None:
            raise InvalidTask(
                f"client {self._profile.client_key!r}: the task's is_local keeps state "
                "on the device, in Flower's context: give the client context=context."
            )
        return self.context.state

    def _connect(self, place: str, address: str) -> Transport:
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


def _sizes(
    loader: Any, num_examples: Any = None, batch_size: Any = None
) -> tuple[int | None, int | None]:
    """Read the examples of a pass and of a batch off a loader, where not given.

    What its sampler draws counts, not the data set, of which that may be a part.
    """
    batches = getattr(loader, "batch_sampler", None)
    if batch_size is None:
        batch_size = getattr(loader, "batch_size", None)
    if batch_size is None:
        batch_size = getattr(batches, "batch_size", None)
    if batch_size is not None:
        batch_size = whole(batch_size, "batch_size")
    if num_examples is not None:
        num_examples = whole(num_examples, "num_examples")
    elif batch_size is not None:
        num_examples = _num_drawn(loader, batches, batch_size)
    return num_examples, batch_size


def _num_drawn(loader: Any, batches: Any, batch_size: int) -> int | None:
    """Count the examples that a loader draws in one pass; None if it does not say."""
    source: Any = getattr(loader, "dataset", None)
    if isinstance(loader, DataLoader) and not isinstance(source, IterableDataset):
        # Without automatic batches, the sampler draws whole batches.
        source = getattr(batches, "sampler", None)
    try:
        # The last batch may be small, or left out.
        return min(len(source), len(loader) * batch_size)
    except (TypeError, NotImplementedError):
        return len(source) if hasattr(source, "__len__") else None
