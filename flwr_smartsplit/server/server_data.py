"""ServerData: the server trains on data of its own, as much as these help the round.

FedDU's rule. The formulas are the paper's as its code has them; what is ours is said
in ``docs/howto/server-data.md``.

References
----------
Zhang, Liu, Jia, Zhou, Dai, Dou: FedDUAP: Federated Learning with Dynamic Update and
Adaptive Pruning Using Shared Insensitive Data. IJCAI 2022. arXiv:2204.11536.
Liu et al.: Efficient Federated Learning Using Dynamic Update and Adaptive Pruning with
Momentum on Shared Server Data. ACM TIST 2024. arXiv:2408.05678.
"""

from collections.abc import Iterator
from dataclasses import KW_ONLY, InitVar, asdict, dataclass, field, fields, replace
from logging import INFO, WARNING, getLogger
from math import isfinite
from typing import Any

from flwr_smartsplit.device.local_training import Loader
from flwr_smartsplit.edge.protocol import State
from flwr_smartsplit.errors import InvalidTask, SmartSplitError
from flwr_smartsplit.plan.divergence import (
    Holding,
    divergence_bits,
    pooled,
    server_weight,
)
from flwr_smartsplit.server.aggregation import RoundStart, RoundSummary
from flwr_smartsplit.server.own_data import (
    ACCURACY,
    OptimizerFn,
    OwnData,
    between,
    epochs_of,
)
from flwr_smartsplit.types.sizes import plain

_LEAST_WEIGHT = 0.001
_MOST_NAMED = 10
_log = getLogger("flwr")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerTraining:
    """What the server did after one round.

    Parameters
    ----------
    round_number : int
        The round.
    accuracy, loss : float
        Of the merged model, on the server's data.
    weight : float
        How far the state went towards the server's own; at most 0.001 trains nothing.
    loss_after : float
        Of the state that this made.
    is_undone : bool
        Whether the merged state was kept after all.
    """

    round_number: int
    accuracy: float
    loss: float
    weight: float
    loss_after: float
    is_undone: bool


@dataclass(eq=False)
class ServerData:
    """A server step: train the merged model on the server's own examples (FedDU).

    After a round, the server trains the merged model w on its own loader, which gives
    w', and the next state is ``w + a * (w' - w)``, with the weight::

        a = (1 - accuracy) * share * strength * decay ** (round - 1)
        share = n0 * D(P') / (n0 * D(P') + n' * D(P0))

    ``accuracy`` is that of w on the server's data. n0, P0 and n', P' are the numbers
    and labels of the examples of the server and of the round's clients. D is the
    Jensen-Shannon divergence, in bits, from the labels of all clients that are there.
    So it needs clients that share ``DeviceTraits.label_counts``, or ``noniid``.

    Only the merged clients count. Routes do not matter: the server trains what was
    merged, whole, in its own process, on one thread of the CPU, from random streams
    derived from the run's seed. Targets are class numbers, or the task's ``metrics_fn``
    returns ``"accuracy"``, a share.

    Parameters
    ----------
    loader : Iterable
        The server's examples, as a client's loader yields them.
    epochs : int
        Passes over them in a round.
    strength : float
        C: 0 is federated averaging; a weight above 1 counts as 1.
    decay : float
        By which the weight shrinks from round to round.
    undo_at : float, optional
        The merged state is kept if the loss on the server's data becomes so many times
        what it was; None lets it. It is always kept if the loss is not finite.
    holdout : float
        Share of the examples on which accuracy and loss are measured, and which are not
        trained; 0, as published, measures on those that are trained.
    optimizer_fn : Callable[[Iterable[nn.Parameter]], Optimizer], optional
        The server's optimizer; the task's if not given. The paper's is SGD without
        momentum, at the clients' rate.
    noniid : tuple[float, float], optional
        D(P') and D(P0), from 0 to 1, where clients do not share label counts.

    Attributes
    ----------
    num_examples : int
        Of one pass over the loader, without those that are held out.
    label_counts : tuple[int, ...] or None
        Of each class; None if targets are not class numbers.

    Raises
    ------
    ValueError
        If the loader yields nothing, or a number is out of range.
    """

    loader: InitVar[Loader]
    _: KW_ONLY
    epochs: int = 5
    strength: float = 1.0
    decay: float = 0.999
    undo_at: float | None = 3.0
    holdout: float = 0.0
    optimizer_fn: OptimizerFn | None = None
    noniid: tuple[float, float] | None = None
    num_examples: int = field(init=False)
    label_counts: tuple[int, ...] | None = field(init=False)

    def __post_init__(self, loader: Loader) -> None:
        for each in fields(self):
            if each.init:
                setattr(self, each.name, plain(getattr(self, each.name)))
        self.epochs = epochs_of(self.epochs)
        self._check_numbers()
        self._run = _Run(OwnData(loader, holdout=self.holdout))
        self.num_examples, self.label_counts = self._run.data.counted()
        if self.label_counts is None and self.noniid is None:
            raise ValueError(
                "the server's targets are not class numbers, so nobody can compare "
                "their labels with the clients': give noniid=(D_clients, D_server), "
                "each from 0 (as all clients' labels) to 1 (no class in common)."
            )

    def _check_numbers(self) -> None:
        is_right = 0 <= self.strength < float("inf") and 0 < self.decay <= 1
        if not is_right or (self.undo_at is not None and not self.undo_at > 1):
            raise ValueError(
                f"strength={self.strength}, decay={self.decay}, undo_at="
                f"{self.undo_at}: give a strength of at least 0, a decay above 0 and "
                "at most 1, and an undo_at above 1 or None."
            )
        pair = self.noniid
        is_pair = isinstance(pair, tuple) and len(pair) == len(("clients", "server"))
        if pair is not None and not (is_pair and 0 <= min(pair) <= max(pair) <= 1):
            raise ValueError(
                f"noniid is {pair}: give (D_clients, D_server), each from 0 to 1."
            )

    @property
    def trainings(self) -> tuple[ServerTraining, ...]:
        """What the server did, round by round."""
        return tuple(self._run.trainings)

    def batches(self) -> Iterator[tuple[Any, Any]]:
        """Yield one pass over the examples that are trained, the same one each time."""
        return self._run.data.batches()

    def prepare(self, start: RoundStart) -> None:
        """Before a run's first round, see whether task, examples and labels fit."""
        run = self._run
        fn = self.optimizer_fn
        if not run.data.begin(start, epochs=self.epochs, optimizer_fn=fn):
            return
        silent = [key for key, each in start.label_counts.items() if each is None]
        if silent and self.noniid is None:
            raise InvalidTask(
                f"ServerData compares labels, and {len(silent)} of "
                f"{len(start.label_counts)} clients do not share how many examples of "
                f"each class they have ({', '.join(silent[:_MOST_NAMED])}): give these "
                "clients traits=DeviceTraits(label_counts=...), which reveals them to "
                "the strategy, or give ServerData(noniid=(D_clients, D_server)), each "
                "from 0 (as all clients' labels) to 1 (no class in common)."
            )
        run.data.check(start.state)
        if start.round_number == 1:
            run.trainings = []

    def step(self, before: State, after: State, summary: RoundSummary) -> State:
        """Return the next state."""
        del before
        if not self._run.data.has_begun:
            raise SmartSplitError(
                "ServerData does not know its task: give it to "
                "SmartSplit(server_steps=...), which tells it."
            )
        share = self.strength and self._share(summary)
        if not share:
            return after
        told = summary.round_number, summary.config
        found = self._run.data.measured(after, *told)
        accuracy = found.metrics[ACCURACY]
        weight = min((1 - accuracy) * share, 1.0)
        noted = ServerTraining(
            round_number=summary.round_number,
            accuracy=accuracy,
            loss=found.loss,
            weight=weight,
            loss_after=found.loss,
            is_undone=False,
        )
        if weight <= _LEAST_WEIGHT:
            return self._noted(noted, after)
        mixed = between(after, self._run.data.trained(after, *told), weight)
        loss = self._run.data.measured(mixed, *told).loss
        is_undone = self._is_worse(found.loss, loss)
        noted = replace(noted, loss_after=loss, is_undone=is_undone)
        return self._noted(noted, after if is_undone else mixed)

    def _share(self, summary: RoundSummary) -> float:
        """Work out the weight of a model that is never right."""
        clients = self._clients(summary)
        if clients is None:
            return 0.0
        if self.noniid is not None:
            server_noniid = self.noniid[1]
        else:
            told = pooled(each for each in summary.label_counts.values() if each)
            server_noniid = divergence_bits(self.label_counts or (), told)
        server = Holding(num_examples=self.num_examples, noniid=server_noniid)
        share = server_weight(0.0, server=server, clients=clients)
        return share * self.strength * self.decay ** (summary.round_number - 1)

    def _clients(self, summary: RoundSummary) -> Holding | None:
        """Pool the round's clients; None if none of them shares its label counts."""
        num_examples = sum(each.num_examples for each in summary.reports.values())
        if self.noniid is not None:
            return Holding(num_examples=num_examples, noniid=self.noniid[0])
        known = {k: summary.label_counts.get(k) for k in summary.reports}
        merged = pooled(each for each in known.values() if each)
        if None in known.values() and not self._run.has_warned:
            self._run.has_warned = True
            silent = [key for key, each in known.items() if each is None]
            _log.log(
                WARNING,
                "Clients that came later do not share their label counts (%s): "
                "ServerData weighs by the labels of the others.",
                ", ".join(silent[:_MOST_NAMED]),
            )
        if not merged:
            return None
        told = pooled(each for each in summary.label_counts.values() if each)
        return Holding(num_examples=num_examples, noniid=divergence_bits(merged, told))

    def _is_worse(self, before: float, after: float) -> bool:
        """Say whether to undo; only losses above 0 can be so many times another."""
        if not isfinite(after):
            return True
        return self.undo_at is not None and after >= self.undo_at * before > 0

    def _noted(self, noted: ServerTraining, state: State) -> State:
        """Keep and log what was done; return the state it came to."""
        self._run.trainings.append(noted)
        _log.log(
            INFO,
            "The server's data in round %s: accuracy %.3f, weight %.4f, loss %.4g to "
            "%.4g%s",
            noted.round_number,
            noted.accuracy,
            noted.weight,
            noted.loss,
            noted.loss_after,
            ", undone" if noted.is_undone else "",
        )
        return state

    def state_dict(self) -> dict[str, Any]:
        """Return what was done so far, for a checkpoint."""
        return {"trainings": [asdict(each) for each in self._run.trainings]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what a checkpoint says."""
        self._run.trainings = [ServerTraining(**each) for each in state["trainings"]]


class _Run:
    """What a run needs and leaves; no setting that a resumed run must have, too."""

    __slots__ = ("data", "has_warned", "trainings")

    def __init__(self, data: OwnData) -> None:
        self.data = data
        self.trainings: list[ServerTraining] = []
        self.has_warned = False
