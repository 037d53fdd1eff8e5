"""Client, edge and strategy refuse to train two different tasks, naming the field."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from flwr_smartsplit.edge import service
from flwr_smartsplit.errors import InvalidTask, RefusedReply, SmartSplitError
from flwr_smartsplit.flower.client import SmartSplitNumPyClient
from flwr_smartsplit.flower.serde.records import facts_from_scalars, facts_to_scalars
from flwr_smartsplit.task import Task
from tests.flower.apps import apps, legacy_app, message_app, run
from tests.flower.legacy import run_legacy
from tests.tasks import TASK, differences, tiny_cnn


def frozen_rate() -> Task:
    return replace(TASK, optimizer_fn=partial(torch.optim.SGD, lr=0.0, momentum=0.9))


def with_dropout() -> nn.Sequential:
    model = tiny_cnn()
    model[3] = nn.Dropout(0.5)
    return model


OTHERS = {
    "rate": (frozen_rate(), "optimizer_fn.lr is 0.0 there and 0.05 in the strategy"),
    "dropout": (replace(TASK, model_fn=with_dropout), "model_fn is with_dropout"),
    "loss": (
        replace(TASK, loss_fn=nn.CrossEntropyLoss(label_smoothing=0.1)),
        "loss_fn is torch.nn.modules.loss.CrossEntropyLoss there",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_client_with_another_task_is_left_out_and_the_others_count(name):
    other, words = OTHERS[name]
    done = run([message_app(0, task=other), message_app(1), message_app(2)])
    assert {kind for _, kind in done.kinds()} == {"failed"}
    assert words in done.strategy.failures[0].cause
    assert "client 'c0' has another task" in done.strategy.failures[0].cause
    without = run([message_app(1), message_app(2)])
    # Clients are drawn by key, so the same two train the same steps.
    assert differences(done.state, without.state) == []


def test_the_same_under_the_legacy_api():
    done = run_legacy([legacy_app(0, task=frozen_rate()), legacy_app(1), legacy_app(2)])
    assert done.kinds()
    assert "optimizer_fn.lr is 0.0 there" in done.strategy.failures[0].cause


def test_a_run_in_which_every_client_has_another_task_ends_at_the_start():
    with pytest.raises(SmartSplitError, match=r"can take part.*optimizer_fn\.lr"):
        run(apps([None, None], task=frozen_rate()))


def test_an_equal_task_made_anew_is_the_same_task():
    """Each process makes its own partial, loss and examples."""
    again = replace(
        TASK,
        optimizer_fn=partial(torch.optim.SGD, momentum=0.9, lr=0.05),
        example_inputs=torch.ones(3, 1, 6, 6),
        example_targets=torch.ones(3, dtype=torch.int64),
    )
    assert run(apps([None, None], task=again)).kinds() == []


def test_an_edge_with_another_task_ends_the_run(monkeypatch):
    """Planted: its code is another one's."""
    facts = service.task_facts
    monkeypatch.setattr(
        service,
        "task_facts",
        lambda *args: {**facts(*args), "loss_fn": "old_loss #1234"},
    )
    with pytest.raises(InvalidTask, match=r"edge .*loss_fn is old_loss #1234 there"):
        run(apps([None, None]))


def test_a_client_whose_code_changed_since_it_was_asked_is_a_failure(monkeypatch):
    """Its process was started anew, with other code: planted after the profile."""
    asked: list[int] = []
    facts = SmartSplitNumPyClient._facts

    def changing(self: SmartSplitNumPyClient, *args: Any) -> dict[str, str]:
        asked.append(1)
        found = facts(self, *args)
        return {**found, "loss_fn": "new"} if len(asked) > 2 else found

    monkeypatch.setattr(SmartSplitNumPyClient, "_facts", changing)
    with pytest.raises(SmartSplitError, match="its task is no longer the one"):
        run(apps([None, None]), num_rounds=1)


@pytest.mark.parametrize(
    "scalars",
    [{}, {"task": "x"}, {"task": b"x"}, facts_to_scalars([])],  # type: ignore
)
def test_an_answer_that_does_not_say_its_task_is_refused(scalars: Any):
    with pytest.raises(RefusedReply, match="does not say what its task is"):
        facts_from_scalars(scalars)


def test_settings_that_the_strategy_alone_has_are_named(monkeypatch):
    """Planted: the client's process has another default dtype."""
    facts = SmartSplitNumPyClient._facts
    monkeypatch.setattr(
        SmartSplitNumPyClient,
        "_facts",
        lambda self, *args: {
            **facts(self, *args),
            "torch.default_dtype": "torch.float64",
        },
    )
    with pytest.raises(
        SmartSplitError,
        match=r"torch.default_dtype is torch.float64 there and torch.float32 in",
    ):
        run(apps([None, None]))
