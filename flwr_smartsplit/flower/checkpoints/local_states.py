"""LocalStates: what a task keeps on a device, in Flower's context or in files.

Flower keeps a context for one run, in memory. Files outlive the process and the run. A
resumed run may go back some rounds, so a file is kept for each of those.
"""

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy.typing as npt
from flwr.app import ArrayRecord, Context

from flwr_smartsplit.errors import InvalidTask
from flwr_smartsplit.flower.checkpoints import files
from flwr_smartsplit.flower.checkpoints.values import from_tree, to_tree
from flwr_smartsplit.flower.serde.records import (
    Arrays,
    from_array_record,
    to_array_record,
)
from flwr_smartsplit.types import ClientPlan

_LOCAL = "smartsplit.local"


class LocalStates:
    """Read and write one client's local state, by run and round.

    ``folder`` may be shared by clients of different keys; without one, the state is
    kept in the context that is given.
    """

    def __init__(self, folder: str | Path | None, client_key: str) -> None:
        self._key = client_key
        self.folder: Path | None = None
        if folder is not None:
            digest = hashlib.sha256(repr(client_key).encode()).hexdigest()[:16]
            readable = re.sub(r"[^A-Za-z0-9_-]", "_", client_key)[:40]
            self.folder = Path(folder).absolute() / f"{readable}-{digest}"

    def read(
        self, plan: ClientPlan, context: Context | None, *, is_train: bool
    ) -> Arrays:
        """Return the state before a round's training, or after it; nothing if new."""
        if self.folder is None:
            record = self._context(context).state.get(_LOCAL)
            return from_array_record(record) if isinstance(record, ArrayRecord) else {}
        folder = self.folder / plan.lineage
        last = plan.round_number - is_train
        number = next((n for n in files.numbers_in(folder) if n <= last), None)
        if number is None:
            return {}
        try:
            run, arrays = files.read(folder, number)
        except files.Damaged as error:
            raise InvalidTask(
                f"client {self._key!r}: its local state in {folder / str(number)} is "
                f"damaged: {error}. Delete that folder, and the client begins with an "
                "older state, or with the global values."
            ) from error
        state: Arrays = from_tree(run["state"], arrays)
        return state

    def write(self, plan: ClientPlan, context: Context | None, state: Arrays) -> None:
        """Keep the state after a round's training, and those a resumed run may need."""
        if self.folder is None:
            self._context(context).state[_LOCAL] = to_array_record(state)
            return
        folder, here = self.folder / plan.lineage, plan.round_number
        first = here if plan.resumable_round < 0 else plan.resumable_round
        older = [number for number in files.numbers_in(folder) if number < here]
        needed = [number for number in older if number > first]
        needed += [number for number in older if number <= first][:1]
        for number in files.numbers_in(folder):
            if number >= here:
                files.delete(folder, number)
        arrays: dict[str, npt.NDArray[Any]] = {}
        tree = to_tree(dict(state), arrays, "state")
        files.write(folder, here, {"client_key": self._key, "state": tree}, arrays)
        for number in set(older) - set(needed):
            files.delete(folder, number)

    def _context(self, context: Context | None) -> Context:
        if context is None:
            raise InvalidTask(
                f"client {self._key!r}: the task's is_local keeps state on the device, "
                "in Flower's context or in files: give the client context=context, or "
                "local_folder=..."
            )
        return context
