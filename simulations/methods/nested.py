"""NestedRounds: each client trains the largest submodel of the model that fits it.

What HeteroFL and DepthFL have in common: a ladder of smaller models whose states are
parts of the whole one's, chosen by memory and averaged value by value.
"""

import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, final

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord

from flwr_smartsplit import Route, Task, predicted_peak_bytes, profile_chain
from flwr_smartsplit.errors import RefusedReply
from flwr_smartsplit.flower.journal.rows import Row, skipped_row
from flwr_smartsplit.flower.registry import Member
from flwr_smartsplit.flower.serde.records import (
    from_array_record,
    instruction,
    message_layout,
    plan_to_scalars,
    to_array_record,
)
from flwr_smartsplit.flower.serde.replies import reply_from_content
from flwr_smartsplit.plan.timing import work_of
from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.types import ClientPlan, ClientReply, DeviceProfile, Status
from simulations.methods.method import METHOD
from simulations.methods.sampled import Answer, Merged, Sample
from simulations.report.summary import bytes_text

State = Mapping[str, npt.NDArray[Any]]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one client trained, and how much it counts."""

    state: State  # Its arrays, each with the first values of the whole one
    weight: int  # Its weight, such as its number of examples
    # The rows of an array that it trained, by name; all of them if not given
    rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def cut_state(state: State, shapes: Shapes) -> dict[str, npt.NDArray[Any]]:
    """Take the part of a state that a smaller model holds."""
    return {name: state[name][_first(shape)].copy() for name, shape in shapes.items()}


def average_shares(
    state: State, shares: Iterable[Share]
) -> dict[str, npt.NDArray[Any]]:
    """Replace each value by its weighted mean over the clients that trained it.

    Sums are in float64 and rounded once; they are made in the order of the shares.
    """
    sums = {name: np.zeros(array.shape) for name, array in state.items()}
    weights = {name: np.zeros(array.shape) for name, array in state.items()}
    for share in shares:
        for name, array in share.state.items():
            rows = list(share.rows.get(name, range(len(array))))
            held = _first(array.shape)
            sums[name][held][rows] += share.weight * array[rows].astype(np.float64)
            weights[name][held][rows] += share.weight
    return {
        name: np.divide(
            sums[name],
            weights[name],
            out=array.astype(np.float64),
            where=weights[name] > 0,
        ).astype(array.dtype)
        for name, array in state.items()
    }


def unusable(state: State, shapes: Shapes) -> list[str]:
    """Name what a client should not have sent, as SmartSplit refuses it, too."""
    return [
        name
        for name in sorted({*state, *shapes})
        if name not in state
        or name not in shapes
        or state[name].shape != shapes[name]
        or not np.isfinite(state[name]).all()
    ]


def _first(shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Select the first values along every axis."""
    return tuple(slice(size) for size in shape)


Config = Mapping[str, float | int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Submodel:
    """One of the models that a client may train."""

    name: str  # What the journal calls it, such as ``"width 0.25"``
    config: Config  # Asks a client for it
    shapes: Shapes  # Its arrays
    peak_bytes: int  # The most that a device holds in a training step of it
    step_flops: float  # Floating-point operations of such a step


def submodel_of(task: Task, *, name: str, config: Config, batch_size: int) -> Submodel:
    """Work out what a submodel holds and needs, by a dry run."""
    needs = _needs(pickle.dumps(task), batch_size)
    return Submodel(name=name, config=config, **needs)


@lru_cache(maxsize=32)
def _needs(pickled_task: bytes, batch_size: int) -> dict[str, Any]:
    """Find shapes and costs once for all experiments that train the same: seconds."""
    task: Task = pickle.loads(pickled_task)
    chain = build_chain(task)
    profile = profile_chain(chain, batch_size=batch_size, task=task)
    state = chain.model.state_dict()
    return {
        "shapes": {key: tuple(tensor.shape) for key, tensor in state.items()},
        "peak_bytes": predicted_peak_bytes(profile, Route.whole()),
        "step_flops": work_of(profile, Route.whole()).device_flops,
    }


def largest_that_fits(
    submodels: Sequence[Submodel], budget_bytes: int | None
) -> Submodel | None:
    """Choose the first of the submodels, largest first, that a device can hold."""
    if budget_bytes is None:
        return submodels[0]
    fitting = (each for each in submodels if each.peak_bytes <= budget_bytes)
    return next(fitting, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ladder:
    """What a method adds to the rounds."""

    method: str  # Its name: clients ask it for their task
    submodels: tuple[
        Submodel, ...
    ]  # From the largest, the global model, to the smallest
    config_fn: Callable[[int], Config] = lambda _: {}  # Told to all, by round
    # The rows that a client trains, by client_key, where it trains not all
    rows_fn: Callable[[str], Mapping[str, tuple[int, ...]]] = lambda _: {}


@final
class NestedRounds:
    """Send every sampled client the submodel it can hold; average what comes back.

    Clients are drawn as FedAvg draws them, without a look at their budgets. Who then
    can hold no submodel sits out. Each client trains under its budget as a cap.
    """

    def __init__(self, ladder: Ladder, *, seed: int) -> None:
        self._ladder = ladder
        self._seed = seed
        self._state: State = {}
        self._asked: dict[str, tuple[DeviceProfile, Submodel]] = {}

    def ask(
        self,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
        sample: Sample,
    ) -> tuple[list[Message], list[Row]]:
        """Send each sampled client the largest submodel that fits it."""
        self._state, self._asked = from_array_record(arrays), {}
        messages, rows = [], []
        for key, member in sample.chosen.items():
            profile = member.profile
            submodel = largest_that_fits(self._ladder.submodels, profile.budget_bytes)
            if submodel is None:
                cause = self._cause(profile.budget_bytes or 0)
                rows.append(skipped_row(profile, cause, server_round, is_unfit=True))
                continue
            self._asked[key] = profile, submodel
            messages.append(self._message(server_round, submodel, member, config))
        return messages, rows

    def merge(self, server_round: int, answers: Sequence[Answer]) -> Merged:
        """Average value by value over the clients that trained it, by examples."""
        del server_round
        read = [self._read(key, message) for key, message in answers]
        accepted = [reply for reply, _ in read if reply is not None]
        shares = [
            Share(
                state=reply.state,
                weight=reply.report.num_examples,
                rows=self._ladder.rows_fn(reply.client_key),
            )
            for reply in accepted
        ]
        return Merged(
            to_array_record(average_shares(self._state, shares)),
            MetricRecord({"num-clients": len(accepted)}),
            [row for _, row in read],
        )

    def _message(
        self,
        server_round: int,
        submodel: Submodel,
        member: Member,
        config: ConfigRecord,
    ) -> Message:
        """Write to one client: its part of the state, its submodel and its cap."""
        profile = member.profile
        plan = ClientPlan(
            client_key=profile.client_key,
            round_number=server_round,
            route=Route.whole(),
            seed=self._seed,
            budget_bytes=profile.budget_bytes,
            predicted_peak_bytes=submodel.peak_bytes,
            edge_addresses={},
        )
        told: dict[str, Any] = {
            **config,
            METHOD: self._ladder.method,
            **self._ladder.config_fn(server_round),
            **submodel.config,
            **plan_to_scalars(plan),
        }
        record = to_array_record(cut_state(self._state, submodel.shapes))
        return Message(
            instruction(message_layout(), record, told, is_train=True),
            message_type=MessageType.TRAIN,
            dst_node_id=member.node_id,
        )

    def _read(self, key: str, message: Message) -> tuple[ClientReply | None, Row]:
        """Read a reply, and say what it adds to the client's row."""
        profile, submodel = self._asked[key]
        row: Row = {
            "route": submodel.name,
            "budget_bytes": profile.budget_bytes,
            "predicted_peak_bytes": submodel.peak_bytes,
        }
        if message.has_error():
            return None, row
        try:
            reply = reply_from_content(message.content)
        except RefusedReply as error:
            return None, row | {"status": error.kind, "cause": str(error)}
        report = reply.report
        row |= {
            "peak_bytes": report.peak_bytes,
            "num_examples": report.num_examples,
            "loss": report.loss,
            "seconds": report.seconds,
            "num_steps": report.num_steps,
            "step_flops": submodel.step_flops,
        }
        if report.status is not Status.OK:
            return None, row | {"status": report.status, "cause": report.message}
        wrong = unusable(reply.state, submodel.shapes)
        if wrong:
            cause = f"not what was asked for, or not finite: {', '.join(wrong)}"
            return None, row | {"status": "refused", "cause": cause}
        return reply, row

    def _cause(self, budget_bytes: int) -> str:
        smallest = self._ladder.submodels[-1]
        return (
            f"no submodel fits: the smallest ({smallest.name}) needs "
            f"{bytes_text(smallest.peak_bytes)}, the budget is "
            f"{bytes_text(budget_bytes)}"
        )
