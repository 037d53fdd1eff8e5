"""CutMover: the device's side of moving a cut between two steps."""

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
    """Moves units between the device's first segment and the first edge."""

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
        """Move the cut from one unit to another; return the first segment's new runner.

        ``step`` counts the steps done; the last update waits for ``norm``. Raises
        ``RefusedMove`` or ``MemoryCapExceeded`` if it is impossible; the cut is then
        unchanged, here and at the edge.
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
            raise RuntimeError("the edge moved the cut and did not send its units.")
        try:
            with self.cap.building():
                more = remake(num_steps=step, arriving=unpack_units(arriving))
                self.cap.track(more.segment, more.optimizer)
        except (MemoryCapExceeded, RefusedMove):
            edge.move(step, before, arriving, norm)
            raise
        return more
