"""Prove on a given model that cutting changes nothing and that costs are predicted.

The truth is a plain PyTorch loop over the stock module, which knows no units. Each cut
then trains the same batches through ``train_locally`` and an edge in this process, over
the bytes of the wire, and everything is compared to the last bit.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from flwr_smartsplit.device.local_training import (
    Conditions,
    Outcome,
    evaluate_locally,
    train_locally,
)
from flwr_smartsplit.device.route_runner import RouteRunner
from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.hosts.local import LocalEdge
from flwr_smartsplit.edge.tensors import state_digest
from flwr_smartsplit.errors import RefusedMove
from flwr_smartsplit.memory.cap import CapMode
from flwr_smartsplit.split.build import build_chain, materialise, state_of
from flwr_smartsplit.split.fake_tensors import rows_of_targets
from flwr_smartsplit.split.segment import Batch
from flwr_smartsplit.task import Task
from flwr_smartsplit.train.optimizer_in_backward import one_by_one
from flwr_smartsplit.train.rng import UnitStreams
from flwr_smartsplit.train.threads import torch_threads
from flwr_smartsplit.types import (
    KEEP_ALL,
    WHOLE,
    ClientPlan,
    Codec,
    RecomputePlan,
    Route,
    Status,
    Variant,
    is_lossless,
)
from flwr_smartsplit.verify.crossed import let_cross
from flwr_smartsplit.verify.listener import Listener, digest_of
from flwr_smartsplit.verify.merging import merge_differences
from flwr_smartsplit.verify.reference import (
    Batches,
    call,
    first_draws,
    seeded_draws,
    train_stock,
)

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
    edge_bytes: int = 0  # Of all messages to and from the edges
    plain_edge_bytes: int = 0  # What these would be without a codec


class RouteChecker:
    """Train a task whole and along routes, and compare; or a variant of its model.

    Use it as a context manager: it hosts an edge in this process. Give at least two
    batches of one size, so that the optimizer's state counts.
    """

    def __init__(
        self,
        task: Task,
        batches: Batches,
        *,
        cap_mode: CapMode = CapMode.STRICT,
        config: Mapping[str, Any] | None = None,
        ends: Batches | None = None,
        variant: Variant = WHOLE,
    ) -> None:
        self._variant = variant
        self._whole = build_chain(task)
        self.chain = self._whole.under(variant)
        self._batches = batches
        # To evaluate; the last batch may be smaller.
        self._ends = (batches[0], batches[-1]) if ends is None else ends
        self._cap_mode = cap_mode
        self._config = dict(config or {})
        self._gradients = _GradientLog(task.optimizer_fn)
        self._outputs = _OutputLog(task.loss_fn)
        self._task = replace(task, optimizer_fn=self._gradients, loss_fn=self._outputs)
        self._train_stock(Route.whole(), ())
        self._edge = LocalEdge()
        self._address = ""

    @property
    def is_finite(self) -> bool:
        """Whether training the stock model left its loss and state finite."""
        became_infinite = (
            np.isfinite(self._state[name]).all() and not np.isfinite(array).all()
            for name, array in self._final.items()
        )
        return math.isfinite(self._truth.train_loss) and not any(became_infinite)

    def _train_stock(self, route: Route, codecs: tuple[Codec, ...]) -> None:
        """Train the stock model, with codecs at a route's cuts if there are any."""
        with torch.random.fork_rng():
            torch.manual_seed(_SEED)
            model = self._task.model_fn()
        held = state_of(model)
        model = self._whole.narrowed(model, self._variant)
        self._state = state_of(model)
        self._held = {**self._state, **held}  # Proxies are in no whole model.
        self._digest = state_digest(self._held)
        self._codecs = codecs
        named: dict[str, Any] = {}
        if codecs:
            seed = _SEED, _ROUND, _CLIENT, "codec"
            seeds = [(*seed, number) for number in range(len(codecs), 0, -1)]
            at = zip(route.cuts, zip(codecs, seeds, strict=True), strict=True)
            forward = let_cross(model, self.chain, dict(at))
            named = {"name_step": partial(setattr, forward, "step")}
        with torch_threads(1):
            self._truth = train_stock(
                model,
                self._task,
                self._batches,
                chain=self.chain,
                streams=UnitStreams(_SEED, _ROUND, _CLIENT),
                config=self._config,
                ends=self._ends,
                **named,
            )
        self._true_gradients = self._gradients.take(_names([model], model))
        self._true_outputs = self._outputs.take()
        self._final = state_of(model)

    def __enter__(self) -> Self:
        self._address = self._edge.start(self._task)
        try:
            self._send(wire.HoldState(self._digest, self._held))
        except BaseException:
            self._edge.stop(self._address)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._edge.stop(self._address)

    def check(
        self,
        route: Route,
        *,
        recompute: tuple[RecomputePlan, RecomputePlan] = (KEEP_ALL, KEEP_ALL),
        move_to: int | None = None,
        is_evaluated: bool = True,
        codecs: tuple[Codec, ...] = (),
    ) -> CutCheck:
        """Train and evaluate along one route, and compare with the stock model.

        With ``codecs`` at the route's cuts, the stock model has them at the same units,
        unless all are lossless: these must give the numbers of the stock model alone.
        ``recompute`` has the plan of the first step and that of all others. Between the
        two, the first cut moves to ``move_to``, unless an exact move is refused.
        """
        rounding = () if all(map(is_lossless, codecs)) else codecs
        if rounding or self._codecs:
            self._train_stock(route, rounding)
        self._changes = _Changes(recompute[1], move_to)
        self._is_evaluated = is_evaluated
        plan = ClientPlan(
            client_key=_CLIENT,
            round_number=_ROUND,
            route=route,
            seed=_SEED,
            state_digest=self._digest,
            edge_addresses=dict.fromkeys(route.edges(), self._address),
            recompute=recompute[0],
            config=self._config,
            codecs=codecs,
            variant=self._variant,
        )
        differences: list[str] = []
        check = CutCheck(route, (), measured_peak_bytes=0)
        try:
            report = self._run(plan, differences).report
            sent = report.sent_bytes + report.received_bytes
            plain = report.plain_sent_bytes + report.plain_received_bytes
            check = CutCheck(route, (), report.peak_bytes, sent, plain or sent)
        except Exception as error:
            differences.append(f"{type(error).__name__}: {error}")
        self._gradients.clear()
        self._outputs.take()
        self._send(wire.Release(_ROUND, self._digest))
        return replace(check, differences=tuple(differences))

    def merge_differences(self) -> list[str]:
        """Merge a trained client and an untrained one, and load the result."""
        return merge_differences(self._task.model_fn(), self._state, self._final)

    def first_difference(self) -> tuple[str, str]:
        """Name the unit and the value that first differ in one forward of all units.

        Looks at what enters and leaves each module that has no others inside.
        """
        inputs, streams = self._batches[0][0], UnitStreams(_SEED, _ROUND, _CLIENT)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            stock = self._task.model_fn().train()
            segment = materialise(self.chain, 0, len(self.chain), self._state).train()
            firsts = first_draws(self.chain, inputs)
            draws = seeded_draws(firsts, streams, 0) if firsts else nullcontext()
            with Listener(stock, stock) as wanted, draws:
                call(stock, tree_map(torch.clone, inputs))
            with Listener(segment, stock) as found:
                segment(tree_map(torch.clone, inputs), streams=streams)
        for one, other in zip(wanted, found, strict=False):
            if one != other:
                unit = self._unit_of(one[0]) or self._unit_of(other[0])
                if one[0] != other[0]:
                    return unit, f"{one[0]}, where {other[0]} runs"
                which = "input" if one[1] != other[1] else "output"
                return unit, f"the {which} of {one[0]}"
        return self.chain.unit_names[-1], "what follows the last module"

    def _unit_of(self, module: str) -> str:
        """Name the unit that reads a module."""
        for unit in self.chain.units:
            if any(f"{module}.".startswith(f"{name}.") for name in unit.reads):
                return unit.name
        return ""

    def _run(self, plan: ClientPlan, differences: list[str]) -> Outcome:
        """Train and evaluate; add what differs to the list."""
        size = len(self.chain)
        state = {
            name: self._state[name]
            for leg in plan.route.device_legs(size)
            for name in self.chain.state_names(leg.start, leg.stop)
        }
        conditions = Conditions(
            task=self._task,
            connect=self._connect,
            cap_mode=self._cap_mode,
            between_steps=self._changes,
        )
        outcome = train_locally(plan, state, self._fresh(self._batches), conditions)
        report = outcome.report
        if report.status is not Status.OK:
            differences.append(f"training ends with: {report.message}")
            return outcome
        gradients = self._gradients.take(*self._owners(plan.route))
        differences += _differing(self._true_gradients, gradients)
        differences += _loss_differences("loss", report.loss, self._truth.train_loss)
        differences += self._state_differences(outcome)
        if not self._is_evaluated:
            return outcome
        ends = self._fresh(self._ends)
        loss = evaluate_locally(plan, state, ends, conditions).loss
        differences += _loss_differences("evaluation loss", loss, self._truth.eval_loss)
        if self._outputs.take() != self._true_outputs:
            differences.append("evaluation outputs")
        return outcome

    def _owners(self, route: Route) -> tuple[list[list[str]], list[int]]:
        """Name the parameters of each optimizer in the order in which they were made.

        Returns also the number of the first step that each one takes.
        """
        size, moved_to = len(self.chain), self._changes.moved_to
        legs = [*route.device_legs(size), *route.edge_legs(size)]
        first_steps = [0] * len(legs)
        if moved_to is not None:
            moved = route.with_first_cut(moved_to)
            new = [moved.device_legs(size)[0], moved.edge_legs(size)[0]]
            # The side that gives units up asks for the other's last.
            legs += new if moved_to < route.cuts[0] else reversed(new)
            first_steps += [1, 1]
        segments = [self.chain.segment(leg.start, leg.stop) for leg in legs]
        owners = _names(segments, self.chain.model)
        return owners, [
            n for n, s in zip(first_steps, segments, strict=True) if _trained(s)
        ]

    def _state_differences(self, outcome: Outcome) -> list[str]:
        """Compare the final state; fetch an edge's tail if its digest differs."""
        # State that no unit uses is at no place; training must not change it.
        found = {**self._state, **outcome.state}
        for receipt in outcome.receipts:
            tail = {name: self._final[name] for name in receipt.names}
            if state_digest(tail) != receipt.digest:
                entry = wire.Entry(receipt.session, receipt.digest, 1)
                sums = self._send(wire.Commit(_ROUND, (entry,))).sums
                tail = {n: sums[n].mean(self._final[n].dtype) for n in tail}
            found |= tail
        found = self.chain.with_aliases(found)
        return [
            f"state {name}"
            for name, values in found.items()
            if _bits(values) != _bits(self._final[name])
        ]

    def _fresh(self, batches: Batches) -> Iterator[tuple[Batch, Any]]:
        """Yield copies of batches, as a loader does."""
        for batch in batches:
            yield tree_map_only(Tensor, torch.clone, batch)

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

    def draw_targets(size: int) -> Any:
        targets, inputs = task.example_targets, task.example_inputs
        rows = iter(rows_of_targets(targets, inputs, batch_size=size))
        return tree_map_only(
            Tensor, lambda x: draw(next(rows), x, is_input=False), targets
        )

    sizes = [batch_size, batch_size, *([batch_size - 1] if batch_size > 2 else [])]  # noqa: PLR2004
    return [
        (tree_map(partial(draw, size), task.example_inputs), draw_targets(size))
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
                        seen[id(parameter)].append(digest_of(parameter.grad))

        optimizer.register_step_pre_hook(one_by_one(write))
        return optimizer

    def take(
        self, owners: Sequence[Sequence[str]], first_steps: Sequence[int] = (0,)
    ) -> dict[str, str]:
        """Name the digests by each optimizer's parameters; return them, start over.

        Optimizers beyond ``owners`` are those of a move that was refused.
        """
        taken_here = self._taken[: len(owners)]
        named = {
            f"gradient {name} of step {step}": digest
            for names, taken, first in zip(owners, taken_here, first_steps, strict=True)
            for name, digests in zip(names, taken, strict=True)
            for step, digest in enumerate(digests, start=first)
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
    owners = ([known[id(p)] for p in _trained(segment)] for segment in segments)
    return [names for names in owners if names]


def _trained(segment: nn.Module) -> list[nn.Parameter]:
    return [p for p in segment.parameters() if p.requires_grad]


class _Changes:
    """Change the plan and move the first cut between the first two steps."""

    def __init__(self, recompute: RecomputePlan, move_to: int | None) -> None:
        self.moved_to: int | None = None
        self._recompute, self._move_to = recompute, move_to

    def __call__(self, runner: RouteRunner) -> None:
        if runner.num_steps != 1:
            return
        runner.replan(self._recompute)
        if self._move_to is not None:
            with suppress(RefusedMove):  # Nothing was changed, and nothing is wrong.
                runner.move(self._move_to)
                self.moved_to = self._move_to


class _OutputLog:
    """A loss that records a digest of every output that it gets in evaluation."""

    def __init__(self, loss_fn: Callable[[Any, Any], Tensor]) -> None:
        self._loss_fn = loss_fn
        self._digests: list[list[str]] = []

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        if not torch.is_grad_enabled():
            leaves = tree_leaves(outputs)
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            self._digests.append([digest_of(tensor) for tensor in tensors])
        return self._loss_fn(outputs, targets)

    def take(self) -> list[list[str]]:
        """Return what was recorded, and start over."""
        digests, self._digests = self._digests, []
        return digests


def _bits(values: npt.NDArray[Any]) -> tuple[str, tuple[int, ...], bytes]:
    return values.dtype.str, values.shape, values.tobytes()


def _loss_differences(name: str, found: float, expected: float) -> list[str]:
    is_same = found == expected or (math.isnan(found) and math.isnan(expected))
    return [] if is_same else [f"{name} {found!r}, not {expected!r}"]


def _differing(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    names = [*expected, *(name for name in found if name not in expected)]
    return [name for name in names if expected.get(name) != found.get(name)]
