"""Pace: how many clients train at once, and after how many replies it is merged.

Pure values and functions of them: who may be asked, and which merge ends a round.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flwr_smartsplit.types.sizes import whole

WINDOW_ROUNDS = 10
"""``max_share`` is of the replies merged in so many rounds' work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """When an asynchronous run asks and merges; ``AsyncSmartSplit`` explains it.

    Raises
    ------
    ValueError
        If a number is out of range.
    """

    clients_at_once: int
    merge_every: int = 1
    max_staleness: int | None = None
    max_share: float | None = None
    poll_seconds: float = 0.1

    def __post_init__(self) -> None:
        for name in ("clients_at_once", "merge_every"):
            object.__setattr__(self, name, whole(getattr(self, name), name))
        if not 1 <= self.merge_every <= self.clients_at_once:
            raise ValueError(
                f"merge_every is {self.merge_every} and clients_at_once "
                f"{self.clients_at_once}: merge after at least 1 reply, and at most as "
                "many as are trained at once."
            )
        if self.max_staleness is not None and whole(self.max_staleness, "tau") < 0:
            raise ValueError(
                f"max_staleness is {self.max_staleness}: give 0 or more, or None."
            )
        if not self.poll_seconds > 0:
            raise ValueError(f"poll_seconds is {self.poll_seconds}: give more than 0.")
        if self.max_share is not None and not self.window**-1 <= self.max_share <= 1:
            raise ValueError(
                f"max_share is {self.max_share}: give at least 1 of the last "
                f"{self.window} replies, {1 / self.window:.3g}, and at most 1."
            )

    @property
    def window(self) -> int:
        """Of how many merged replies ``max_share`` is a share."""
        return WINDOW_ROUNDS * self.clients_at_once

    def merges_by(self, round_number: int) -> int:
        """Count the merges up to the end of a round: as much work as a synchronous one.

        >>> [Pace(clients_at_once=10, merge_every=4).merges_by(r) for r in (1, 2, 3)]
        [3, 5, 8]
        """
        return -(-round_number * self.clients_at_once // self.merge_every)

    def round_of(self, merge: int) -> int:
        """Return the round to which a merge, counted from 1, belongs.

        >>> [Pace(clients_at_once=10, merge_every=4).round_of(m) for m in range(1, 6)]
        [1, 1, 1, 2, 2]
        """
        return (merge - 1) * self.merge_every // self.clients_at_once + 1

    def within_share(self, keys: Iterable[str], merged: Sequence[str]) -> list[str]:
        """List those who may still be asked, after whose replies were merged.

        >>> pace = Pace(clients_at_once=1, max_share=0.2)  # 2 of the last 10
        >>> pace.within_share("abc", "aab")
        ['b', 'c']
        """
        if self.max_share is None:
            return list(keys)
        counts = Counter(merged[-self.window :])
        most = self.max_share * self.window
        return [key for key in keys if counts[key] + 1 <= most]
