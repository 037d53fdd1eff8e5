"""A frozen front: nothing comes back for it, nothing of it is sent back, same bits."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from torch import nn

from flwr_smartsplit import Route, RouteRequest, Task
from flwr_smartsplit.edge.hosts.local import LocalEdge
from flwr_smartsplit.split.build import build_chain
from tests.flower.apps import arrays_of, legacy_app, message_app, run, smart_split
from tests.tasks import TASK, State, differences, initial_state, tiny_cnn

FROZEN = ("0.", "1.")
NUM_CLIENTS = 3


def frozen_front() -> nn.Module:
    """Build the tiny network with a front that is not trained, BatchNorm apart."""
    model = tiny_cnn()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(FROZEN))
    return model


TASK_FROZEN: Task = replace(TASK, model_fn=frozen_front)


def split_behind(request: RouteRequest) -> Route:
    """Keep the frozen units, or one more, on the device."""
    return Route.split(2 + int(request.device.client_key[1:]))


@pytest.mark.parametrize("make", [message_app, legacy_app])
def test_a_frozen_front_is_neither_trained_nor_sent_back(
    make: Callable[..., Any],
) -> None:
    """Two rounds equal those of whole models, and frozen names do not come back."""
    apps = [make(index, task=TASK_FROZEN) for index in range(NUM_CLIENTS)]
    strategy = smart_split((LocalEdge(),), task=TASK_FROZEN, choose_route=split_behind)
    made = run(apps, strategy)
    assert made.kinds() == []
    whole = run(
        [message_app(index, task=TASK_FROZEN) for index in range(NUM_CLIENTS)],
        smart_split((), task=TASK_FROZEN),
    )
    assert differences(made.state, whole.state) == []
    start: State = initial_state()
    frozen = {n for n, p in frozen_front().named_parameters() if not p.requires_grad}
    assert frozen
    assert all((made.state[name] == start[name]).all() for name in frozen)
    if make is message_app:
        for reply in made.grid.replied:
            if reply.metadata.message_type == "train":
                assert not frozen & arrays_of(reply).keys()


def test_a_front_of_frozen_units_waits_for_no_gradient() -> None:
    """The edge's reply to a step has none."""
    chain = build_chain(TASK_FROZEN)
    assert chain.units[0].gradients == (False,)
    assert chain.changed_names(0, 1) == ()
    assert set(chain.changed_names(0, 2)) <= {
        "1.running_mean",
        "1.running_var",
        "1.num_batches_tracked",
    }
