"""Serving: gives edges a trained model, and devices what they need to predict."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from torch import Tensor

from flwr_smartsplit.edge.gate.rules import LENIENCY, SPARE_BYTES
from flwr_smartsplit.edge.hosts.edge import Edge
from flwr_smartsplit.edge.protocol import Limits
from flwr_smartsplit.edge.tensors import state_digest
from flwr_smartsplit.errors import (
    EdgeUnreachable,
    InvalidRoute,
    InvalidTask,
    NoFeasibleRoute,
    bytes_text,
)
from flwr_smartsplit.plan.coding import coded_peak_bytes
from flwr_smartsplit.profile.forward_memory import Forwarded, dry_forward
from flwr_smartsplit.serve.offer import Offer
from flwr_smartsplit.server.edge_pool import EdgePool
from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.task import Task
from flwr_smartsplit.task_digest.facts import task_facts
from flwr_smartsplit.types import RAW, ClientPlan, Codec, Route
from flwr_smartsplit.types.sizes import whole, whole_bytes


class Serving:
    """Let devices predict with a model that runs on them and at edges.

    It holds the secret with which edges take the model and openings are signed, in this
    process's memory: an offer is good until it is closed, or an edge's lease ends.

    Parameters
    ----------
    task : Task
        The model, and examples of its inputs; loss and optimizer are not used.
    state : Mapping[str, Tensor or NDArray]
        The trained values by the model's names, such as
        ``result.arrays.to_torch_state_dict()``.
    edges : Sequence[Edge]
        Where the rest of the model runs, such as ``(RayEdge(),)``. They hold one copy
        of their units for all devices.
    num_threads : int
        Of torch, at every place: with another number, outputs may differ in their last
        bits.

    Raises
    ------
    InvalidTask
        If the state is not one of the task's model, or parts of it stay on the devices
        that trained them (``Task.is_local``).

    Examples
    --------
    >>> import torch
    >>> from functools import partial
    >>> task = Task(
    ...     model_fn=partial(torch.nn.Linear, 4, 2),
    ...     loss_fn=torch.nn.functional.cross_entropy,
    ...     optimizer_fn=partial(torch.optim.SGD, lr=0.1),
    ...     example_inputs=torch.zeros(1, 4),
    ...     example_targets=torch.zeros(1, dtype=torch.int64),
    ... )
    >>> with Serving(task, torch.nn.Linear(4, 2).state_dict(), edges=()) as serving:
    ...     offer = serving.offer(batch_size=8)
    >>> str(offer.plan.route), offer.predicted_peak_bytes  # weights, batch, outputs
    ('whole', 232)
    """

    def __init__(
        self,
        task: Task,
        state: Mapping[str, Any],
        edges: Sequence[Edge],
        *,
        num_threads: int = 1,
    ) -> None:
        if task.is_local is not None:
            raise InvalidTask(
                "the task has is_local state, which stays on the devices that trained "
                "it, and nobody here has it: serve a task without is_local, with the "
                "state of one device."
            )
        self._task = task
        self._chain = build_chain(task)
        self._state = {name: _array(value) for name, value in state.items()}
        kinds = {n: (tuple(a.shape), str(a.dtype)) for n, a in self._state.items()}
        self._chain.check_state(kinds)
        self._digest = state_digest(self._state)
        self._pool = EdgePool(edges, task)
        self._num_threads = _at_least_one(num_threads, "num_threads")
        self._num_offers = 0
        self._known: dict[tuple[Route, int], Forwarded] = {}

    def offer(
        self,
        route: Route | None = None,
        *,
        batch_size: int,
        budget_bytes: int | None = None,
        codec: Codec = RAW,
        client_key: str = "",
    ) -> Offer:
        """Make what one device needs to predict, and have its edges hold the model.

        Parameters
        ----------
        route : Route, optional
            Where the units run. If none is given, the whole model if it fits the
            budget; else the deepest cut to the first edge that does.
        batch_size : int
            The most examples in a batch.
        budget_bytes : int, optional
            The cap of the device's tensors; None is no limit.
        codec : Codec
            How boundaries are written, at all cuts. Outputs are sent as they are.
        client_key : str
            The device's name, in logs and errors; also what a defence's noise is
            derived from.

        Raises
        ------
        NoFeasibleRoute
            If the route does not fit the budget, or none does, with the least bytes.
        InvalidRoute
            If the route leaves the chain, or the device before the task's defence.
        EdgeUnreachable
            If an edge of the route cannot be reached.
        """
        batch_size = _at_least_one(batch_size, "batch_size")
        if budget_bytes is not None:
            budget_bytes = whole_bytes(budget_bytes, "budget_bytes")
        if route is None:
            route = self._deepest(batch_size, budget_bytes, codec)
        self._check(route)
        costs = self._costs(route, batch_size, codec)
        _check_fits(route, costs, batch_size, budget_bytes)
        self._num_offers += 1
        plan = ClientPlan(
            client_key=client_key or f"device-{self._num_offers}",
            round_number=1,
            attempt=self._num_offers,  # So that each opens sessions of its own.
            route=route,
            seed=0,
            num_threads=self._num_threads,
            budget_bytes=budget_bytes,
            state_digest=self._digest,
            edge_addresses=self._held(route.edges()),
            predicted_peak_bytes=costs.peak_bytes,
            codecs=() if codec == RAW else (codec,) * len(route.cuts),
        )
        return Offer(
            plan=self._signed(plan, batch_size, costs),
            state=self._device_state(route),
            batch_size=batch_size,
            facts=self._facts,
        )

    def close(self) -> None:
        """End all offers, and have the edges delete the model."""
        self._pool.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @cached_property
    def _facts(self) -> Mapping[str, str]:
        return task_facts(self._task, self._chain.model)

    def _costs(self, route: Route, batch_size: int, codec: Codec) -> Forwarded:
        kind = route, batch_size
        if kind not in self._known:
            self._known[kind] = dry_forward(self._task, route, batch_size=batch_size)
        raw, codecs = self._known[kind], (codec,) * len(route.cuts)
        peak = coded_peak_bytes(raw.peak_bytes, raw.crossings, codecs)
        return replace(raw, peak_bytes=peak)

    def _deepest(
        self, batch_size: int, budget_bytes: int | None, codec: Codec
    ) -> Route:
        """Choose the whole model or the deepest cut that fits."""
        whole_one = Route.whole()
        if budget_bytes is None or not self._pool.names:
            return whole_one
        if self._costs(whole_one, batch_size, codec).peak_bytes <= budget_bytes:
            return whole_one
        edge = self._pool.names[0]
        first, size = max(1, self._chain.num_defended), len(self._chain)
        routes = [Route.split(c, edge=edge) for c in range(size - 1, first - 1, -1)]
        peaks = (self._costs(r, batch_size, codec).peak_bytes for r in routes)
        fitting = (r for r, p in zip(routes, peaks, strict=True) if p <= budget_bytes)
        return next(fitting, routes[-1] if routes else whole_one)

    def _check(self, route: Route) -> None:
        first = route.device_legs(len(self._chain))[0]
        if first.stop < self._chain.num_defended:
            raise InvalidRoute(
                f"route {route} leaves the device at {first.stop}, before the task's "
                f"defence: cut at {self._chain.num_defended} or later."
            )
        missing = [edge for edge in route.edges() if edge not in self._pool.names]
        if missing:
            raise InvalidRoute(
                f"route {route} needs the edges {missing}; given are "
                f"{list(self._pool.names)}."
            )

    def _held(self, edges: Sequence[str]) -> dict[str, str]:
        """Have edges hold the state; return their addresses."""
        if not edges:
            return {}
        _, failures = self._pool.prepare(self._digest)
        addresses, more = self._pool.hold(edges, self._digest, self._state)
        missing = [edge for edge in edges if edge not in addresses]
        if missing:
            causes = " ".join(failure.cause for failure in (*failures, *more))
            raise EdgeUnreachable(f"edges {missing} cannot hold the model: {causes}")
        return {edge: addresses[edge] for edge in edges}

    def _signed(
        self, plan: ClientPlan, batch_size: int, costs: Forwarded
    ) -> ClientPlan:
        if not plan.route.cuts:
            return plan
        limits = Limits(
            num_examples=None,
            step_examples=batch_size,
            step_bytes=LENIENCY * costs.largest_bytes + SPARE_BYTES,
            least_start=plan.route.cuts[0],
            ends_at_edge=False,  # No labels come.
        )
        return self._pool.sign(
            plan, limits, is_trained=False, batch_size=batch_size, predicts=True
        )

    def _device_state(self, route: Route) -> dict[str, npt.NDArray[Any]]:
        legs = route.device_legs(len(self._chain))
        names = {
            n for leg in legs for n in self._chain.state_names(leg.start, leg.stop)
        }
        return {name: array for name, array in self._state.items() if name in names}


def _at_least_one(number: int, name: str) -> int:
    if whole(number, name) < 1:
        raise ValueError(f"{name} is {number}: give at least 1.")
    return whole(number, name)


def _array(value: Any) -> npt.NDArray[Any]:
    plain = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
    return np.array(plain, order="C")


def _check_fits(
    route: Route, costs: Forwarded, batch_size: int, budget_bytes: int | None
) -> None:
    needed = costs.peak_bytes
    if budget_bytes is None or needed <= budget_bytes:
        return
    raise NoFeasibleRoute(
        f"to predict along {route} takes {bytes_text(needed)} at batch size "
        f"{batch_size}, the budget is {bytes_text(budget_bytes)}. Lower the batch "
        "size, cut earlier, or raise the budget.",
        needed_bytes=needed,
        budget_bytes=budget_bytes,
    )
