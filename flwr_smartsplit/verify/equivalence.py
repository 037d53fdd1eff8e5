"""Prove on a given model that cutting changes nothing and that costs are predicted.

The truth is a plain PyTorch loop over the stock module, which knows no units. Each cut
then trains the same batches through ``train_locally`` and an edge in this process, over
the bytes of the wire, and everything is compared to the last bit.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map

from flwr_smartsplit.device.local_training import (
    Conditions,
    Outcome,
    evaluate_locally,
    train_locally,
)
from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.hosts.local import LocalEdge
from flwr_smartsplit.edge.tensors import state_digest
from flwr_smartsplit.memory.cap import CapMode
from flwr_smartsplit.memory.meter import unmetered
from flwr_smartsplit.split.build import build_chain, state_of
from flwr_smartsplit.split.segment import Batch
from flwr_smartsplit.task import Task
from flwr_smartsplit.train.optimizer_in_backward import one_by_one
from flwr_smartsplit.train.rng import UnitStreams
from flwr_smartsplit.train.threads import torch_threads
from flwr_smartsplit.types import ClientPlan, Route, Status
from flwr_smartsplit.verify.reference import Batches, train_stock

State = Mapping[str, npt.NDArray[Any]]

_CLIENT, _ROUND, _SEED = "check", 1, 0


@dataclass(frozen=True, slots=True)
class CutCheck:
    """What one route gave, compared with the stock model.

    ``differences`` names what is not the stock model's to the last bit.
    """

    route: Route
    differences: tuple[str, ...]
    measured_peak_bytes: int


class RouteChecker:
    """Train a task whole and along routes, and compare.

    Use it as a context manager: it hosts an edge in this process. Give at least two
    batches of one size, so that the optimizer's state counts.
    """

    def __init__(self, task: Task, batches: Batches) -> None:
        self.chain = build_chain(task)
        self._batches = batches
        self._gradients = _GradientLog(task.optimizer_fn)
        self._outputs = _OutputLog(task.loss_fn)
        self._task = replace(task, optimizer_fn=self._gradients, loss_fn=self._outputs)
        with torch.random.fork_rng():
            torch.manual_seed(_SEED)
            model = task.model_fn()
        self._state = state_of(model)
        self._digest = state_digest(self._state)
        with torch_threads(1):
            self._truth = train_stock(
                model,
                self._task,
                batches,
                chain=self.chain,
                streams=UnitStreams(_SEED, _ROUND, _CLIENT),
            )
        self._true_gradients = self._gradients.take(_names([model], model))
        self._true_outputs = self._outputs.take()
        self._final = state_of(model)
        self._edge = LocalEdge()
        self._address = ""

    def __enter__(self) -> Self:
        self._address = self._edge.start(self._task)
        try:
            self._send(wire.HoldState(self._digest, self._state))
        except BaseException:
            self._edge.stop(self._address)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._edge.stop(self._address)

    def check(self, route: Route) -> CutCheck:
        """Train and evaluate along one route, and compare with the stock model."""
        plan = ClientPlan(
            client_key=_CLIENT,
            round_number=_ROUND,
            route=route,
            seed=_SEED,
            state_digest=self._digest,
            edge_addresses=dict.fromkeys(route.edges(), self._address),
        )
        differences: list[str] = []
        peak_bytes = 0
        try:
            outcome = self._run(plan, differences)
            peak_bytes = outcome.report.peak_bytes
        except Exception as error:
            differences.append(f"{type(error).__name__}: {error}")
        self._gradients.clear()
        self._outputs.take()
        self._send(wire.Release(_ROUND, self._digest))
        return CutCheck(route, tuple(differences), measured_peak_bytes=peak_bytes)

    def _run(self, plan: ClientPlan, differences: list[str]) -> Outcome:
        """Train and evaluate; add what differs to the list."""
        size = len(self.chain)
        # The order in which their optimizers are made.
        legs = (*plan.route.device_legs(size), *plan.route.edge_legs(size))
        state = {
            name: self._state[name]
            for leg in plan.route.device_legs(size)
            for name in self.chain.state_names(leg.start, leg.stop)
        }
        conditions = Conditions(
            task=self._task, connect=self._connect, cap_mode=CapMode.STRICT
        )
        outcome = train_locally(plan, state, self._fresh(self._batches), conditions)
        report = outcome.report
        if report.status is not Status.OK:
            differences.append(f"training ends with: {report.message}")
            return outcome
        segments = [self.chain.segment(leg.start, leg.stop) for leg in legs]
        gradients = self._gradients.take(_names(segments, self.chain.model))
        differences += _differing(self._true_gradients, gradients)
        differences += _loss_differences("loss", report.loss, self._truth.train_loss)
        differences += self._state_differences(outcome)
        # The last batch may be smaller.
        ends = self._fresh((self._batches[0], self._batches[-1]))
        loss = evaluate_locally(plan, state, ends, conditions).loss
        differences += _loss_differences("evaluation loss", loss, self._truth.eval_loss)
        if self._outputs.take() != self._true_outputs:
            differences.append("evaluation outputs")
        return outcome

    def _state_differences(self, outcome: Outcome) -> list[str]:
        """Compare the final state; fetch an edge's tail if its digest differs."""
        found = dict(outcome.state)
        elsewhere: set[str] = set()
        for receipt in outcome.receipts:
            tail = {name: self._final[name] for name in receipt.names}
            elsewhere |= tail.keys()
            if state_digest(tail) != receipt.digest:
                entry = wire.Entry(receipt.session, receipt.digest, 1)
                sums = self._send(wire.Commit(_ROUND, (entry,))).sums
                found |= {n: sums[n].mean(self._final[n].dtype) for n in tail}
        # State that no unit uses is at no place; training must not change it.
        unused = self._final.keys() - found.keys() - elsewhere
        first = self.chain.first_names
        found |= {n: self._state[n] for n in unused if first[n] == n}
        return [
            f"state {name}"
            for name, values in found.items()
            if _bits(values) != _bits(self._final[name])
        ]

    def _fresh(self, batches: Batches) -> Iterator[tuple[Batch, Tensor]]:
        """Yield copies of batches, as a loader does."""
        for batch in batches:
            yield tree_map(torch.clone, batch)

    def _connect(self, place: str, address: str) -> wire.Transport:
        del place
        return self._edge.connect(address)

    def _send(self, request: wire.Request[wire.ReplyT]) -> wire.ReplyT:
        return self._edge.connect(self._address).send(request)


def example_batches(task: Task, *, batch_size: int, seed: int = 0) -> Batches:
    """Draw batches like the task's examples: two of one size, then a smaller one.

    Floating-point inputs are drawn from a normal distribution; everything else from the
    values in the examples, such as class numbers and tokens. So an example of zeros
    only checks one class and one token: give examples with all of them.
    """
    rng = torch.Generator().manual_seed(seed)

    def draw(size: int, example: Tensor, *, is_input: bool = True) -> Tensor:
        shape = (size, *example.shape[1:])
        if is_input and example.is_floating_point():
            return torch.randn(shape, generator=rng, dtype=example.dtype)
        choices = example.flatten()
        return choices[torch.randint(choices.numel(), shape, generator=rng)]

    sizes = [batch_size, batch_size, *([batch_size - 1] if batch_size > 2 else [])]  # noqa: PLR2004
    return [
        (
            tree_map(partial(draw, size), task.example_inputs),
            draw(size, task.example_targets, is_input=False),
        )
        for size in sizes
    ]


class _GradientLog:
    """Make optimizers that record a digest of every gradient that they get."""

    def __init__(self, optimizer_fn: Callable[..., Optimizer]) -> None:
        self._optimizer_fn = optimizer_fn
        self._taken: list[list[list[str]]] = []

    def __call__(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        parameters = list(parameters)
        taken: list[list[str]] = [[] for _ in parameters]
        self._taken.append(taken)  # First, since it may take none of them.
        optimizer = self._optimizer_fn(parameters)
        seen = dict(zip(map(id, parameters), taken, strict=True))

        def write(optimizer: Optimizer, *_: Any) -> None:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        seen[id(parameter)].append(_digest(parameter.grad))

        optimizer.register_step_pre_hook(one_by_one(write))
        return optimizer

    def take(self, owners: Sequence[Sequence[str]]) -> dict[str, str]:
        """Name the digests by each optimizer's parameters; return them, start over."""
        named = {
            f"gradient {name} of step {step}": digest
            for names, taken in zip(owners, self._taken, strict=True)
            for name, digests in zip(names, taken, strict=True)
            for step, digest in enumerate(digests)
        }
        self.clear()
        return named

    def clear(self) -> None:
        """Forget what was recorded."""
        self._taken = []


def _names(segments: Sequence[nn.Module], model: nn.Module) -> list[list[str]]:
    """Name each segment's trained parameters as the model does; skip empty segments.

    A tied parameter has several names; the model's first one counts.
    """
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    owners = (
        [known[id(p)] for p in segment.parameters() if p.requires_grad]
        for segment in segments
    )
    return [names for names in owners if names]


class _OutputLog:
    """A loss that records a digest of every output that it gets in evaluation."""

    def __init__(self, loss_fn: Callable[[Any, Any], Tensor]) -> None:
        self._loss_fn = loss_fn
        self._digests: list[list[str]] = []

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        if not torch.is_grad_enabled():
            leaves = tree_leaves(outputs)
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            self._digests.append([_digest(tensor) for tensor in tensors])
        return self._loss_fn(outputs, targets)

    def take(self) -> list[list[str]]:
        """Return what was recorded, and start over."""
        digests, self._digests = self._digests, []
        return digests


@unmetered()
def _digest(tensor: Tensor) -> str:
    dense = tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()
    values = dense.resolve_conj().resolve_neg().contiguous().flatten()
    digest = hashlib.sha256(repr((tuple(tensor.shape), tensor.dtype)).encode())
    digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _bits(values: npt.NDArray[Any]) -> tuple[str, tuple[int, ...], bytes]:
    return values.dtype.str, values.shape, values.tobytes()


def _loss_differences(name: str, found: float, expected: float) -> list[str]:
    is_same = found == expected or (math.isnan(found) and math.isnan(expected))
    return [] if is_same else [f"{name} {found!r}, not {expected!r}"]


def _differing(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    names = [*expected, *(name for name in found if name not in expected)]
    return [name for name in names if expected.get(name) != found.get(name)]
