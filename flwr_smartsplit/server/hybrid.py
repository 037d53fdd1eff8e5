"""HybridFL: the server is one client more, in every round.

References
----------
Yoshida, Nishio, Morikura, Yamamoto, Yonetani: Hybrid-FL for Wireless Networks:
Cooperative Learning Mechanism Using Non-IID Data. ICC 2020. arXiv:1905.07210.
"""

from typing import Any

from flwr_smartsplit.device.local_training import Loader
from flwr_smartsplit.edge.protocol import State
from flwr_smartsplit.server.aggregation import RoundStart, RoundSummary
from flwr_smartsplit.server.own_data import OptimizerFn, OwnData, between, epochs_of


class HybridFL:
    """A server step: mean the clients' mean with what the server trains from the start.

    The server begins where the clients began, and counts by its examples as they do. As
    the mean was rounded before, the last bits are not those of a real client.

    Parameters
    ----------
    loader : Iterable
        The server's examples, as a client's loader yields them.
    epochs : int
        Passes over them in a round.
    optimizer_fn : Callable[[Iterable[nn.Parameter]], Optimizer], optional
        The server's optimizer; the task's if not given.
    """

    def __init__(
        self,
        loader: Loader,
        *,
        epochs: int = 1,
        optimizer_fn: OptimizerFn | None = None,
    ) -> None:
        self.epochs, self.optimizer_fn = epochs_of(epochs), optimizer_fn
        self._data = OwnData(loader)
        self.num_examples, _ = self._data.counted()

    def prepare(self, start: RoundStart) -> None:
        """Take the task; before a run's first round, see whether the examples fit."""
        fn = self.optimizer_fn
        if self._data.begin(start, epochs=self.epochs, optimizer_fn=fn):
            self._data.check(start.state)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing, for a checkpoint: rounds follow from seed and number."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up nothing."""

    def step(self, before: State, after: State, summary: RoundSummary) -> State:
        """Return the next state."""
        told = summary.round_number, summary.config
        theirs = sum(each.num_examples for each in summary.reports.values())
        own = self._data.trained(before, *told)
        return between(after, own, self.num_examples / (self.num_examples + theirs))
