"""NestedRounds: each client trains the largest variant of the model that fits it.

What HeteroFL and DepthFL have in common: a ladder of smaller models whose states are
parts of the whole one's, chosen by memory and averaged value by value.
"""

import pickle
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, final

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from flwr_smartsplit import Route, Task, predicted_peak_bytes, profile_chain
from flwr_smartsplit.errors import RefusedReply
from flwr_smartsplit.flower.journal.journal import Journal
from flwr_smartsplit.flower.journal.rows import Row, skipped_row
from flwr_smartsplit.flower.registry import Member
from flwr_smartsplit.flower.serde.records import (
    from_array_record,
    instruction,
    last_line,
    message_dialect,
    plan_to_scalars,
    to_array_record,
)
from flwr_smartsplit.flower.serde.replies import reply_from_content
from flwr_smartsplit.plan.timing import work_of
from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.types import ClientPlan, ClientReply, DeviceProfile, Status
from simulations.experiments.rows import ACCEPTED
from simulations.experiments.sampling import Sampler
from simulations.methods.journalled import client_row, payload_bytes, round_row
from simulations.methods.method import Setting
from simulations.methods.submodels.nested import (
    Shapes,
    Share,
    State,
    average_shares,
    cut_state,
    unusable,
)
from simulations.report.summary import bytes_text

Config = Mapping[str, float | int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One of the models that a client may train.

    Parameters
    ----------
    name : str
        What the journal calls it, such as ``"width 0.25"``.
    config : Mapping[str, float or int]
        Asks a client for it.
    shapes : Mapping[str, tuple[int, ...]]
        Its arrays.
    peak_bytes : int
        The most that a device holds in a training step of it.
    step_flops : float
        Floating-point operations of such a step.
    """

    name: str
    config: Config
    shapes: Shapes
    peak_bytes: int
    step_flops: float


def variant_of(task: Task, *, name: str, config: Config, batch_size: int) -> Variant:
    """Work out what a variant holds and needs, by a dry run.

    Parameters
    ----------
    task : Task
        What is trained.
    name : str
        What the journal calls it.
    config : Mapping[str, float or int]
        Asks a client for it.
    batch_size : int
        Examples per training step.
    """
    shapes, peak_bytes, step_flops = _needs(pickle.dumps(task), batch_size)
    return Variant(
        name=name,
        config=config,
        shapes=shapes,
        peak_bytes=peak_bytes,
        step_flops=step_flops,
    )


@lru_cache(maxsize=32)
def _needs(pickled_task: bytes, batch_size: int) -> tuple[Shapes, int, float]:
    """Find shapes and costs once for all experiments that train the same: seconds."""
    task: Task = pickle.loads(pickled_task)
    chain = build_chain(task)
    profile = profile_chain(chain, batch_size=batch_size, task=task)
    state = chain.model.state_dict()
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    whole = Route.whole()
    flops = work_of(profile, whole).device_flops
    return shapes, predicted_peak_bytes(profile, whole), flops


def largest_that_fits(
    variants: Sequence[Variant], budget_bytes: int | None
) -> Variant | None:
    """Choose the first of the variants, largest first, that a device can hold.

    Parameters
    ----------
    variants : Sequence[Variant]
        From the largest to the smallest.
    budget_bytes : int or None
        What the device's tensors may take; None for no limit.

    Returns
    -------
    Variant or None
        None, if none fits.
    """
    if budget_bytes is None:
        return variants[0]
    fitting = (each for each in variants if each.peak_bytes <= budget_bytes)
    return next(fitting, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ladder:
    """What a method adds to the rounds.

    Parameters
    ----------
    variants : tuple[Variant, ...]
        From the largest, which is the global model, to the smallest.
    config_fn : Callable[[int], Mapping[str, float or int]]
        What every client is told in a round, besides its variant.
    rows_fn : Callable[[str], Mapping[str, tuple[int, ...]]]
        The rows that a client trains, by client_key, where it trains not all.
    """

    variants: tuple[Variant, ...]
    config_fn: Callable[[int], Config] = lambda _: {}
    rows_fn: Callable[[str], Mapping[str, tuple[int, ...]]] = lambda _: {}


@dataclass(frozen=True, slots=True)
class _Asked:
    """What one client was sent."""

    profile: DeviceProfile
    variant: Variant
    bytes_down: int


@final
class NestedRounds(Strategy):
    """Send every sampled client the variant it can hold; average what comes back.

    Clients are drawn as FedAvg draws them, without a look at their budgets. Who then
    can hold no variant sits out. Each client trains under its budget as a cap.

    Parameters
    ----------
    ladder : Ladder
        The variants.
    setting : Setting
        Says how many clients take part, and where the journal goes.
    """

    def __init__(self, ladder: Ladder, setting: Setting) -> None:
        self._ladder = ladder
        self._seed = setting.experiment.seed
        self._journal = Journal(setting.journal)
        self._sampler = Sampler(setting.experiment)
        self._state: State = {}
        self._asked: dict[str, _Asked] = {}
        self._started_seconds = 0.0

    def summary(self) -> None:
        """Say nothing: the journal says it."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send each sampled client the largest variant that fits it."""
        self._started_seconds = time.perf_counter()
        self._state = from_array_record(arrays)
        self._asked = {}
        sample = self._sampler.draw(server_round, grid)
        for row in sample.rows(server_round):
            self._journal.write(row)
        messages = []
        for key, member in sample.chosen.items():
            budget_bytes = member.profile.budget_bytes
            variant = largest_that_fits(self._ladder.variants, budget_bytes)
            if variant is None:
                self._write_sat_out(server_round, member.profile)
                continue
            message = self._message(server_round, variant, member, config)
            size = payload_bytes(message)
            self._asked[key] = _Asked(member.profile, variant, size)
            messages.append(message)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average value by value over the clients that trained it, by examples."""
        ordered = sorted(replies, key=self._client_key)
        arrived_seconds = time.perf_counter()
        read = [self._read(server_round, message) for message in ordered]
        accepted = [reply for reply, _ in read if reply is not None]
        shares = [
            Share(
                state=reply.state,
                weight=reply.report.num_examples,
                rows=self._ladder.rows_fn(reply.client_key),
            )
            for reply in accepted
        ]
        merged = to_array_record(average_shares(self._state, shares))
        ended_seconds = time.perf_counter()
        for _, row in read:
            self._journal.write(row)
        self._journal.write(
            round_row(
                server_round,
                [asked.bytes_down for asked in self._asked.values()],
                [row for _, row in read],
                seconds=ended_seconds - self._started_seconds,
                aggregation_seconds=ended_seconds - arrived_seconds,
            )
        )
        return merged, MetricRecord({"num-clients": len(accepted)})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask nobody: the global model is evaluated where it is."""
        del server_round, arrays, config, grid
        return []

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return nothing, since nobody was asked."""
        del server_round, replies
        return None

    # --- messages -----------------------------------------------------------------

    def _message(
        self, server_round: int, variant: Variant, member: Member, config: ConfigRecord
    ) -> Message:
        """Write to one client: its part of the state, its variant and its cap."""
        profile = member.profile
        plan = ClientPlan(
            client_key=profile.client_key,
            round_number=server_round,
            route=Route.whole(),
            seed=self._seed,
            budget_bytes=profile.budget_bytes,
            predicted_peak_bytes=variant.peak_bytes,
            edge_addresses={},
        )
        told: dict[str, Any] = {
            **config,
            **self._ladder.config_fn(server_round),
            **variant.config,
            **plan_to_scalars(plan),
        }
        record = to_array_record(cut_state(self._state, variant.shapes))
        return Message(
            instruction(message_dialect(), record, told, is_train=True),
            message_type=MessageType.TRAIN,
            dst_node_id=member.node_id,
        )

    def _client_key(self, message: Message) -> str:
        return self._sampler.client_key(message.metadata.src_node_id)

    def _read(
        self, server_round: int, message: Message
    ) -> tuple[ClientReply | None, Row]:
        """Read a reply, and describe the client's part of the round."""
        key = self._client_key(message)
        asked = self._asked[key]
        row = client_row(server_round, key, "lost") | {
            "route": asked.variant.name,
            "budget_bytes": asked.profile.budget_bytes,
            "predicted_peak_bytes": asked.variant.peak_bytes,
            "bytes_down": asked.bytes_down,
            "bytes_up": payload_bytes(message),
        }
        if message.has_error():
            return None, row | {"cause": last_line(message.error.reason)}
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
            "step_flops": asked.variant.step_flops,
        }
        if report.status is not Status.OK:
            return None, row | {"status": report.status, "cause": report.message}
        wrong = unusable(reply.state, asked.variant.shapes)
        if wrong:
            cause = f"not what was asked for, or not finite: {', '.join(wrong)}"
            return None, row | {"status": "refused", "cause": cause}
        return reply, row | {"status": ACCEPTED}

    def _write_sat_out(self, server_round: int, profile: DeviceProfile) -> None:
        smallest = self._ladder.variants[-1]
        cause = (
            f"no variant fits: the smallest ({smallest.name}) needs "
            f"{bytes_text(smallest.peak_bytes)}, the budget is "
            f"{bytes_text(profile.budget_bytes or 0)}"
        )
        self._journal.write(skipped_row(profile, cause, server_round, is_unfit=True))
