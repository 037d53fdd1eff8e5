"""Prove on one's own model that cutting changes nothing, and that costs are known.

The truth is a plain PyTorch loop over the stock module, which knows no units. Each
cut then trains the same batches through ``train_locally`` and an edge in this process,
over the bytes of the wire, and everything is compared to the last bit.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from flwr_smartsplit.model.building import build_chain, state_of
from flwr_smartsplit.model.cap import CapMode
from flwr_smartsplit.model.chain import Chain
from flwr_smartsplit.model.dry_run import fake_batch, fake_copy
from flwr_smartsplit.model.memory import unmetered
from flwr_smartsplit.model.segment import Batch
from flwr_smartsplit.runtime import transport as wire
from flwr_smartsplit.runtime.local_edge import LocalEdge
from flwr_smartsplit.runtime.randomness import derived_seed
from flwr_smartsplit.runtime.threads import torch_threads
from flwr_smartsplit.runtime.training import (
    Conditions,
    Outcome,
    evaluate_locally,
    train_locally,
)
from flwr_smartsplit.runtime.wire import state_digest
from flwr_smartsplit.task import Task
from flwr_smartsplit.types import ClientPlan, Route, Status

Batches = Sequence[tuple[Batch, Tensor]]
State = Mapping[str, npt.NDArray[Any]]

_CLIENT, _ROUND, _SEED = "check", 1, 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CutCheck:
    """What one route gave beside the stock model.

    Parameters
    ----------
    route : Route
        The route that was trained.
    differences : tuple[str, ...]
        What is not the stock model's to the last bit; empty if all is.
    measured_peak_bytes : int
        The most that the device held.
    """

    route: Route
    differences: tuple[str, ...]
    measured_peak_bytes: int


class RouteChecker:
    """Train a task whole and along routes, and compare.

    Use it as a context manager: it hosts an edge in this process.

    Parameters
    ----------
    task : Task
        What to check.
    batches : Sequence[tuple[inputs, targets]]
        What to train on: two of one size at least, so that the optimizer's state
        counts.

    Examples
    --------
    >>> from functools import partial
    >>> task = Task(
    ...     model_fn=partial(nn.Sequential, nn.Linear(4, 4), nn.Linear(4, 2)),
    ...     loss_fn=nn.functional.cross_entropy,
    ...     optimizer_fn=partial(torch.optim.SGD, lr=0.1),
    ...     example_inputs=torch.zeros(1, 4),
    ...     example_targets=torch.arange(2),
    ... )
    >>> with RouteChecker(task, example_batches(task, batch_size=3)) as checker:
    ...     checker.check(Route.split(1)).differences
    ()
    """

    def __init__(self, task: Task, batches: Batches) -> None:
        self.chain = build_chain(task)
        self._batches = batches
        self._gradients = _GradientLog(task.optimizer_fn)
        self._task = replace(task, optimizer_fn=self._gradients)
        model = _built(task)
        self._state = state_of(model)
        self._digest = state_digest(self._state)
        with torch_threads(1):
            self._truth = _train_stock(model, self.chain, self._task, batches)
        self._gradients.name([model])
        self._true_gradients = self._gradients.take()
        self._final = state_of(model)
        self._edge = LocalEdge()
        self._address = ""

    def __enter__(self) -> Self:
        """Start the edge."""
        self._address = self._edge.start(self._task)
        self._send(wire.HoldState(self._digest, self._state))
        return self

    def __exit__(self, *_: object) -> None:
        """End the edge and delete its files."""
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
        self._gradients.take()
        self._send(wire.Release(_ROUND, self._digest))
        return CutCheck(
            route=route,
            differences=tuple(differences),
            measured_peak_bytes=peak_bytes,
        )

    def _run(self, plan: ClientPlan, differences: list[str]) -> Outcome:
        """Train and evaluate; add what differs to the list."""
        legs = plan.route.legs(len(self.chain))
        names = self.chain.state_names(0, legs[0].stop)
        state = {name: self._state[name] for name in names}
        conditions = Conditions(
            task=self._task, connect=self._connect, cap_mode=CapMode.STRICT
        )
        outcome = train_locally(plan, state, self._fresh(), conditions)
        report = outcome.report
        if report.status is not Status.OK:
            differences.append(f"training ends with: {report.message}")
            return outcome
        self._gradients.name([self.chain.segment(leg.start, leg.stop) for leg in legs])
        differences += _differing(self._true_gradients, self._gradients.take())
        if report.loss != self._truth.train_loss:
            differences.append(f"loss {report.loss!r}, not {self._truth.train_loss!r}")
        differences += self._state_differences(outcome)
        loss = evaluate_locally(plan, state, self._fresh(), conditions).loss
        if loss != self._truth.eval_loss:
            differences.append(
                f"evaluation loss {loss!r}, not {self._truth.eval_loss!r}"
            )
        return outcome

    def _state_differences(self, outcome: Outcome) -> list[str]:
        """Compare what device and edge ended with; look into a tail if it differs."""
        found = dict(outcome.state)
        elsewhere: set[str] = set()
        for receipt in outcome.receipts:
            tail = {name: self._final[name] for name in receipt.names}
            elsewhere |= tail.keys()
            if state_digest(tail) != receipt.digest:
                entry = wire.Entry(receipt.session, receipt.digest, 1)
                sums = self._send(wire.Commit(_ROUND, (entry,))).sums
                found |= {n: sums[n].mean(self._final[n].dtype) for n in tail}
        # What no unit uses is at no place; training must not change it.
        resting = self._final.keys() - found.keys() - elsewhere
        found |= {name: self._state[name] for name in resting}
        return [
            f"state {name}"
            for name, values in found.items()
            if not np.array_equal(values, self._final[name], equal_nan=True)
        ]

    def _fresh(self) -> Iterator[tuple[Batch, Tensor]]:
        """Yield batches that nobody else holds, as a loader does."""
        for batch in self._batches:
            yield tree_map(torch.clone, batch)

    def _connect(self, place: str, address: str) -> wire.Transport:
        del place
        return self._edge.connect(address)

    def _send(self, request: wire.Request[wire.ReplyT]) -> wire.ReplyT:
        return self._edge.connect(self._address).send(request)


def example_batches(task: Task, *, batch_size: int, seed: int = 0) -> Batches:
    """Draw batches like the task's examples: two of one size, then a smaller one.

    Floating-point inputs are drawn from a normal distribution; all else is drawn from
    the values that the examples have, such as class numbers and tokens.
    """
    rng = torch.Generator().manual_seed(seed)

    def draw(example: Tensor, size: int) -> Tensor:
        choices = example.flatten()
        shape = (size, *example.shape[1:])
        return choices[torch.randint(choices.numel(), shape, generator=rng)]

    def draw_input(size: int, example: Tensor) -> Tensor:
        if example.is_floating_point():
            shape = (size, *example.shape[1:])
            return torch.randn(shape, generator=rng, dtype=example.dtype)
        return draw(example, size)

    sizes = [batch_size, batch_size, *([batch_size - 1] if batch_size > 2 else [])]  # noqa: PLR2004
    return [
        (
            tree_map(partial(draw_input, size), task.example_inputs),
            draw(task.example_targets, size),
        )
        for size in sizes
    ]


# --- the stock model ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Truth:
    """Mean losses of the stock model: before training, and while it trained."""

    eval_loss: float
    train_loss: float


def _built(task: Task) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(_SEED)
        return task.model_fn()


def _train_stock(
    model: nn.Module, chain: Chain, task: Task, batches: Batches
) -> _Truth:
    """Evaluate and train the module in a plain loop."""
    model.eval()
    with torch.no_grad():
        eval_loss = _mean_loss(
            (task.loss_fn(_call(model, inputs), targets), targets)
            for inputs, targets in batches
        )
    model.train()
    optimizer = task.optimizer_fn([p for p in model.parameters() if p.requires_grad])
    firsts = _first_draws(chain, batches[0][0])
    losses = []
    for step, (inputs, targets) in enumerate(batches):
        optimizer.zero_grad()
        with _Chance(firsts, step) if firsts else nullcontext():
            outputs = _call(model, inputs)
        loss = task.loss_fn(outputs, targets)
        loss.backward()
        optimizer.step()
        losses.append((loss.detach(), targets))
    return _Truth(eval_loss, _mean_loss(losses))


def _call(model: nn.Module, inputs: Batch) -> Any:
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def _mean_loss(losses: Iterable[tuple[Tensor, Tensor]]) -> float:
    total, examples = 0.0, 0
    for loss, targets in losses:
        total += float(loss) * int(targets.shape[0])
        examples += int(targets.shape[0])
    return total / examples


class _Draws(TorchDispatchMode):
    """Count the operators that draw random numbers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.drawing()
            self.count += 1
        return func(*args, **(kwargs or {}))

    def drawing(self) -> None:
        """Act before an operator that draws."""


class _Chance(_Draws):
    """Let the stock model draw what its units draw: seed where each one begins."""

    def __init__(self, firsts: Mapping[int, int], step: int) -> None:
        super().__init__()
        self._firsts = firsts
        self._step = step

    def drawing(self) -> None:
        """Seed torch's generator if a unit's first draw comes now."""
        unit = self._firsts.get(self.count)
        if unit is not None:
            seed = derived_seed(_SEED, _ROUND, _CLIENT, self._step, unit)
            torch.default_generator.manual_seed(seed)


def _first_draws(chain: Chain, inputs: Batch) -> dict[int, int]:
    """Find the number of each unit's first draw among all draws of a forward."""
    mode, draws = FakeTensorMode(), _Draws()
    segment = fake_copy(chain.segment(0, len(chain)), mode).train()
    batch = fake_batch(inputs, mode, batch_size=len(tree_leaves(inputs)[0]))
    counts = [0]
    with mode, draws:
        segment(batch, observe=lambda *_: counts.append(draws.count))
    drawn = enumerate(pairwise(counts))
    return {before: unit for unit, (before, after) in drawn if after > before}


# --- gradients ------------------------------------------------------------------------


class _GradientLog:
    """Make optimizers that write down a digest of every gradient they are given."""

    def __init__(self, optimizer_fn: Callable[..., Optimizer]) -> None:
        self._optimizer_fn = optimizer_fn
        self._steps: list[list[list[str]]] = []
        self._named: dict[str, str] = {}

    def __call__(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """Build an optimizer, as a task's ``optimizer_fn`` does."""
        parameters = list(parameters)
        optimizer = self._optimizer_fn(parameters)
        steps: list[list[str]] = []
        self._steps.append(steps)
        optimizer.register_step_pre_hook(
            lambda *_: steps.append([_digest(p.grad) for p in parameters])
        )
        return optimizer

    def name(self, segments: Sequence[nn.Module]) -> None:
        """Give what was written names, by the segments whose optimizers were built."""
        owners = [
            names
            for segment in segments
            if (names := [n for n, p in segment.named_parameters() if p.requires_grad])
        ]
        for names, steps in zip(owners, self._steps, strict=True):
            for step, digests in enumerate(steps):
                self._named |= {
                    f"gradient {name} of step {step}": digest
                    for name, digest in zip(names, digests, strict=True)
                    if digest
                }

    def take(self) -> dict[str, str]:
        """Return what was written, and start anew."""
        named, self._named, self._steps = self._named, {}, []
        return named


@unmetered()
def _digest(gradient: Tensor | None) -> str:
    if gradient is None:
        return ""
    values = gradient.detach().contiguous().view(torch.uint8)
    return hashlib.sha256(values.numpy().data).hexdigest()


def _differing(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    names = [*expected, *(name for name in found if name not in expected)]
    return [name for name in names if expected.get(name) != found.get(name)]
