"""CutMover: the device's side of a cut that moves between two steps."""

from dataclasses import dataclass
from functools import partial

from flwr_smartsplit.edge.client import EdgeClient
from flwr_smartsplit.edge.cut_moves import unpack_units
from flwr_smartsplit.errors import MemoryCapExceeded, RefusedMove
from flwr_smartsplit.memory.cap import MemoryCap
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.task import Task
from flwr_smartsplit.train.segment_runner import SegmentRunner
from flwr_smartsplit.train.unit_migration import (
    Make,
    check_kept,
    migrated_units,
    rebuilt,
)


@dataclass(frozen=True)
class CutMover:
    """Give the device's first segment units of the edge's, or the edge some of its.

    Parameters
    ----------
    task, chain : Task, Chain
        What is trained.
    cap : MemoryCap
        Watches what the device holds.
    make : Callable[[Segment], SegmentRunner]
        Makes the device's runners.
    """

    task: Task
    chain: Chain
    cap: MemoryCap
    make: Make

    def move(
        self,
        head: SegmentRunner,
        edge: EdgeClient,
        cuts: tuple[int, int],
        *,
        step: int,
        norm: float | None,
    ) -> SegmentRunner:
        """Move a cut; return what runs the first segment from now on.

        Parameters
        ----------
        head, edge : SegmentRunner, EdgeClient
            The first segment so far, and the first edge.
        cuts : tuple[int, int]
            The cut before and after.
        step, norm : int, float or None
            How many steps are done, and the norm that the last update waits for.

        Raises
        ------
        RefusedMove, MemoryCapExceeded
            If it cannot be done; the cut is where it was, here and at the edge.
        """
        before, after = cuts
        remake = partial(rebuilt, head, self.chain, range(after), make=self.make)
        if after < before:
            check_kept(self.chain, self.task, range(after, before))
            fewer = remake(num_steps=step)
            leaving = migrated_units(head, self.chain, after, before)
            edge.move(step, after, leaving, norm)
            return fewer
        arriving = edge.move(step, after, None, norm)
        if arriving is None:
            raise RuntimeError("the edge gave units away and did not send them.")
        try:
            with self.cap.building():
                more = remake(num_steps=step, arriving=unpack_units(arriving))
                self.cap.track(more.segment, more.optimizer)
        except (MemoryCapExceeded, RefusedMove):
            edge.move(step, before, arriving, norm)
            raise
        return more
