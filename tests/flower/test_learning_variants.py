"""A rule of variants that learns is told how each round ended, and remembers it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flwr_smartsplit import Checkpoints, RoundOutcome, Variant, VariantRequest
from flwr_smartsplit.errors import SmartSplitError
from flwr_smartsplit.types import width_of
from tests.flower.apps import legacy_app, message_app, run
from tests.flower.apps import smart_split as strategy_of
from tests.flower.legacy import legacy_smart_split, run_legacy
from tests.tasks import State, differences, initial_state

NAME = "0.weight"


@dataclass(frozen=True)
class Narrowing:
    """Keep a channel less in each round; what is told is noted in ``seen``."""

    seen: list[RoundOutcome]

    def offered(self, request: VariantRequest) -> Sequence[Variant]:
        rounds, _ = request.memory or (0, None)
        return (width_of(request.groups, 1 - rounds / 4),)

    def learned(self, outcome: RoundOutcome) -> Any:
        self.seen.append(outcome)
        rounds, _ = outcome.memory or (0, None)
        return rounds + 1, outcome.state[NAME]


def trained(num_rounds: int = 3, **changes: Any) -> tuple[list[RoundOutcome], State]:
    """Train two clients by the rule."""
    seen: list[RoundOutcome] = []
    strategy = strategy_of((), variants=Narrowing(seen), **changes)
    made = run([message_app(0), message_app(1)], strategy, num_rounds=num_rounds)
    return seen, made.state


def test_a_rule_is_told_what_came_of_a_round() -> None:
    """What was trained, by whom, and the state that the next round begins with."""
    seen, state = trained()
    assert [each.round_number for each in seen] == [1, 2, 3]
    assert [[*each.clients] for each in seen] == [["c0", "c1"]] * 3
    names = [{c.variant.name for c in each.clients.values()} for each in seen]
    assert names == [{"whole"}, {"width 0.75"}, {"width 0.5"}]
    assert np.array_equal(seen[-1].state[NAME], state[NAME])
    assert not np.array_equal(seen[0].state[NAME], initial_state()[NAME])
    assert [each.memory and each.memory[0] for each in seen] == [None, 1, 2]
    for outcome in seen:
        for client in outcome.clients.values():
            assert client.num_examples > 0
            assert client.loss > 0


def test_both_apis_tell_the_same() -> None:
    """Under Flower's older API, too."""
    seen, state = trained()
    old: list[RoundOutcome] = []
    strategy = legacy_smart_split((), variants=Narrowing(old))
    made = run_legacy([legacy_app(0), legacy_app(1)], strategy, num_rounds=3)
    assert differences(made.state, state) == []
    assert [each.memory and each.memory[0] for each in old] == [None, 1, 2]
    assert [[*each.clients] for each in old] == [[*each.clients] for each in seen]


def test_a_resumed_run_remembers(tmp_path: Path) -> None:
    """What was learned is in the checkpoint."""
    truth, state = trained(4)
    trained(2, checkpoints=Checkpoints(tmp_path))
    seen, resumed = trained(4, checkpoints=Checkpoints(tmp_path))
    assert [each.memory[0] for each in seen] == [2, 3]
    assert np.array_equal(seen[0].memory[1], truth[1].state[NAME])
    assert differences(resumed, state) == []


def test_a_resumed_run_that_forgets_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted error: the memory is left out of the checkpoint."""
    from flwr_smartsplit.flower.checkpoints import run_record  # noqa: PLC0415

    _, state = trained(4)
    kept = tuple(n for n in run_record._MANAGED if n != "variants_memory")
    monkeypatch.setattr(run_record, "_MANAGED", kept)
    trained(2, checkpoints=Checkpoints(tmp_path))
    seen, resumed = trained(4, checkpoints=Checkpoints(tmp_path))
    assert seen[0].memory is None
    assert differences(resumed, state)


def test_only_those_merged_count() -> None:
    """Whom nothing fits is not told of; if nobody is merged, the rule is not asked."""
    seen: list[RoundOutcome] = []
    strategy = strategy_of((), variants=Narrowing(seen))
    run([message_app(0, 1), message_app(1)], strategy, num_rounds=1)
    assert [[*each.clients] for each in seen] == [["c1"]]
    strategy = strategy_of((), variants=Narrowing(seen))
    with pytest.raises(SmartSplitError, match="still the initial"):
        run([message_app(0, 1), message_app(1, 1)], strategy, num_rounds=1)
    assert len(seen) == 1
