"""Training: what is supported and what is refused, as docs/support.md says.

Supported means: with any mix of routes the numbers are those of the whole model, bit
for bit. Refused means: an error that says why.
"""

from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord
from torch import Tensor, nn
from torch.optim import Optimizer

from flwr_smartsplit import proximal
from flwr_smartsplit.errors import InvalidTask, SmartSplitError
from tests.flower.apps import (
    message_app,
    run,
    smart_split,
)
from tests.models import unet
from tests.support import (
    EDGES,
    check_every_kind,
    train_mixed,
    train_whole,
)
from tests.tasks import (
    TASK,
    differences,
    initial_state,
    tiny_cnn,
)

# --- training -------------------------------------------------------------------------


def frozen_cnn() -> nn.Module:
    """Build the small network with its first convolution and norm frozen."""
    model = tiny_cnn()
    for parameter in list(model.parameters())[:4]:
        parameter.requires_grad_(False)
    return model


def matrices_only(parameters: Any) -> Optimizer:
    """Build an optimizer that takes no vectors."""
    return torch.optim.SGD([p for p in parameters if p.ndim > 1], lr=0.05)


def test_frozen_layers() -> None:
    """A frozen front goes one way, and keeps its values in a federation, too."""
    check_every_kind(model_fn=frozen_cnn)
    task = replace(TASK, model_fn=frozen_cnn)
    mixed = train_mixed(task)
    assert differences(mixed.state, train_whole(task).state) == []
    moved = set(differences(mixed.state, initial_state()))
    parameters = dict(frozen_cnn().named_parameters())
    assert moved.isdisjoint(n for n, p in parameters.items() if not p.requires_grad)


def test_optimizers_that_choose() -> None:
    """A place may have nothing that its optimizer takes."""
    check_every_kind(optimizer_fn=matrices_only)


def test_skip_connections() -> None:
    """Several tensors may cross a cut, if a task says so."""
    inputs = torch.zeros(1, 3, 12, 12)
    check_every_kind(model_fn=unet, max_boundary_tensors=8, example_inputs=inputs)


def lower_rate(optimizer: Optimizer, config: Any) -> None:
    """Set the learning rate that the strategy sends."""
    for group in optimizer.param_groups:
        group["lr"] = config["lr"] / config["server-round"]


def test_learning_rate_by_round() -> None:
    """``train_config`` reaches every place; without a rate nothing moves anywhere."""
    task = replace(TASK, schedule_fn=lower_rate)
    config = ConfigRecord({"lr": 0.05})
    # Evaluation has another config, no optimizer, and so no schedule.
    facts: dict[str, Any] = {"fraction_evaluate": 1.0}
    mixed = train_mixed(task, train_config=deepcopy(config), **facts)
    whole = train_whole(task, train_config=deepcopy(config))
    assert differences(mixed.state, whole.state) == []
    assert differences(mixed.state, train_mixed().state) != []
    still = train_mixed(task, train_config=ConfigRecord({"lr": 0.0}))
    moved = set(differences(still.state, initial_state()))
    trained = {name for name, _ in tiny_cnn().named_parameters()}
    assert not moved & trained


def test_learning_rate_that_nobody_sends() -> None:
    """The error names what is missing and what there is."""
    task = replace(TASK, schedule_fn=lower_rate)
    clients = [message_app(index, task=task) for index in range(2)]
    strategy = smart_split(EDGES, task=task, seed=0)
    with pytest.raises(SmartSplitError, match="nobody's training was merged"):
        run(clients, strategy, num_rounds=1)
    cause = strategy.failures[0].cause
    assert "schedule_fn reads 'lr' from the round's config" in cause
    assert "which has ['server-round']" in cause


def warm_up(optimizer: Optimizer, config: Any) -> Any:
    """Raise the learning rate over the first steps."""
    del config
    return torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=2)


def test_learning_rate_by_step() -> None:
    """A torch scheduler, stepped at every place."""
    check_every_kind(schedule_fn=warm_up)


def plateau(optimizer: Optimizer, config: Any) -> Any:
    """Ask for a metric that no place has."""
    del config
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)


def test_learning_rate_by_metric() -> None:
    """No place knows the metric."""
    task = replace(TASK, schedule_fn=plateau)
    clients = [message_app(index, task=task) for index in range(2)]
    with pytest.raises(SmartSplitError, match=r"2 x .* needs no metric"):
        run(clients, smart_split(EDGES, task=task, seed=0), num_rounds=1)


def test_class_weights() -> None:
    """Anything that can be pickled and takes outputs and targets."""
    weights = torch.tensor([1.0, 5.0, 0.1])
    check_every_kind(loss_fn=partial(nn.functional.cross_entropy, weight=weights))
    check_every_kind(loss_fn=nn.CrossEntropyLoss(weight=weights, label_smoothing=0.1))


def focal(outputs: Tensor, targets: Tensor, *, gamma: float) -> Tensor:
    """Weigh hard examples more (Lin et al., 2017)."""
    losses = nn.functional.cross_entropy(outputs, targets, reduction="none")
    return ((1 - torch.exp(-losses)) ** gamma * losses).mean()


def test_custom_losses() -> None:
    """At the edge, or on the device where labels stay there."""
    check_every_kind(loss_fn=partial(focal, gamma=2.0))


class Trained(nn.Module):
    """A loss that would have to be trained, too."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Scale the outputs."""
        return nn.functional.cross_entropy(outputs * self.temperature, targets)


def test_losses_with_parameters() -> None:
    """They belong to the model."""
    with pytest.raises(TypeError, match="parameters of its own"):
        replace(TASK, loss_fn=Trained())


class SignDescent(Optimizer):
    """An optimizer of one's own that takes parameters one by one."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Move by the gradients' signs, with a counter as state."""
        del closure
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    state["count"] = state.get("count", torch.zeros_like(parameter)) + 1
                    rate = group["lr"] / state["count"]
                    parameter.sub_(parameter.grad.sign() * rate)


@pytest.mark.every(2)
@pytest.mark.parametrize(
    "optimizer_fn",
    [
        partial(SignDescent, lr=0.01),
        partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
        partial(torch.optim.RMSprop, lr=0.01),
        partial(torch.optim.SGD, lr=0.05, nesterov=True, momentum=0.9),
    ],
)
def test_custom_optimizers(optimizer_fn: Any) -> None:
    """torch's and one's own, as long as parameters are stepped one by one."""
    check_every_kind(optimizer_fn=optimizer_fn)


def test_optimizers_over_all_parameters() -> None:
    """LBFGS looks at all parameters at once, and more than once."""
    task = replace(TASK, optimizer_fn=torch.optim.LBFGS)
    with pytest.raises(InvalidTask, match=r"LBFGS|closure"):
        run([message_app(0, task=task)] * 2, smart_split(EDGES, task=task, seed=0))


def test_clipping_by_norm() -> None:
    """One norm over all places; the clip bites."""
    check_every_kind(max_gradient_norm=0.1)
    clipped = train_mixed(replace(TASK, max_gradient_norm=0.1))
    assert differences(clipped.state, train_mixed().state) != []


def clipped_by_value(parameters: Any) -> Optimizer:
    """Clip each number of each gradient right before the step."""
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)

    def clip(optimizer: Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            nn.utils.clip_grad_value_(group["params"], 0.01)

    optimizer.register_step_pre_hook(clip)
    return optimizer


def test_clipping_by_value() -> None:
    """A hook of the optimizer, since each number stands for itself."""
    check_every_kind(optimizer_fn=clipped_by_value)


def test_mixed_precision() -> None:
    """bfloat16 crosses the wire as it is."""
    check_every_kind(autocast_dtype=torch.bfloat16, is_exact=False)


def test_mixed_precision_with_loss_scaling() -> None:
    """A scale that skips steps would have to be agreed between places."""
    with pytest.raises(ValueError, match="loss scaling"):
        replace(TASK, autocast_dtype=torch.float16)


def test_fedprox() -> None:
    """The term at every place; by hand for one parameter."""
    sgd = partial(torch.optim.SGD, lr=0.5)
    check_every_kind(optimizer_fn=partial(proximal, optimizer_fn=sgd, mu=0.1))
    adam = partial(torch.optim.Adam, lr=0.01)
    check_every_kind(optimizer_fn=partial(proximal, optimizer_fn=adam, mu=0.1))
    weight = nn.Parameter(torch.tensor([1.0]))
    optimizer = proximal([weight], optimizer_fn=sgd, mu=0.5)
    for expected in (0.0, -0.75):  # 1 - 0.5 * 2; 0 - 0.5 * (2 + 0.5 * (0 - 1))
        weight.grad = torch.tensor([2.0])
        optimizer.step()
        assert weight.item() == expected


def test_fedprox_costs_what_is_predicted() -> None:
    """The copy of the parameters is part of the price."""
    sgd = partial(torch.optim.SGD, lr=0.5)
    prox = partial(proximal, optimizer_fn=sgd, mu=0.1)
    check_every_kind(optimizer_fn=prox)
