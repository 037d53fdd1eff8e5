"""What a strategy compares at the start of a run: every task, then the chain."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.task import Task
from flwr_smartsplit.task_digest.facts import (
    Facts,
    all_facts,
    facts_digest,
    require_same_task,
)
from flwr_smartsplit.types import ChainProfile, Verify
from flwr_smartsplit.verify.guard import Guard


class StartChecks:
    """Compare clients' tasks with the strategy's, and the chain with its module."""

    def __init__(self, task: Task, guard: Guard) -> None:
        self._task = task
        self._guard = guard
        self._is_verified = False

    @cached_property
    def facts(self) -> Facts:
        """What the task is made of, when it is first asked for."""
        return all_facts(self._task, build_chain(self._task).model, is_anew=True)

    @property
    def mode(self) -> Verify:
        """How often the chain is compared, at clients, too."""
        return self._guard.mode

    @property
    def digest(self) -> str:
        """The digest of the task."""
        return facts_digest(self.facts)

    def require_same(self, found: Facts, client_key: str) -> None:
        """Raise ``InvalidTask`` if a client answers with another task than this one."""
        require_same_task(found, self.facts, whose=f"client {client_key!r}")

    def verify(self, profile: ChainProfile, config: Mapping[str, Any]) -> None:
        """Raise ``NotExact`` if the chain does not train as the stock module; once."""
        if not self._is_verified:
            self._guard.verify(
                self._task, lambda: profile, config=config, task_digest=self.digest
            )
            self._is_verified = True
