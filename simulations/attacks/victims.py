"""The device that is attacked: its task, its images, and how it trains.

Images are divided into halves: the device's own, and the attacker's, who has images of
the same kind. The device trains for one round, by the package's own loop.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from flwr_smartsplit import Defence, Route, Task
from flwr_smartsplit.device.local_training import Conditions, Outcome, train_locally
from flwr_smartsplit.edge.hosts.edge import Edge
from flwr_smartsplit.edge.hosts.local import LocalEdge
from flwr_smartsplit.edge.tensors import state_digest
from flwr_smartsplit.memory.cap import CapMode
from flwr_smartsplit.profile.task_profiles import profile_of
from flwr_smartsplit.server.edge_pool import EdgePool
from flwr_smartsplit.split.build import build_chain, materialise, state_of
from flwr_smartsplit.split.segment import Segment
from flwr_smartsplit.train.rng import stream
from flwr_smartsplit.types import ClientPlan, DeviceProfile
from simulations.experiments.clients import build_task
from simulations.experiments.data import Images, load_images
from simulations.experiments.experiment import Experiment

BATCH_SIZE = 16
State = dict[str, Any]
Change = Callable[[Task], Task]


@dataclass(frozen=True, slots=True)
class Examples:
    """Images as the model takes them, with their classes."""

    images: Tensor
    classes: Tensor

    def loader(self) -> DataLoader[Any]:
        """Load them in the device's batches, shuffled."""
        dataset = TensorDataset(self.images, self.classes)
        return DataLoader(dataset, BATCH_SIZE, shuffle=True, drop_last=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Victim:
    """A device with its images, and those of the attacker."""

    task: Task
    own: Examples
    attackers: Examples
    test: Examples
    pixels: Callable[[Tensor], Tensor]  # Makes pixels from 0 to 1 of images
    seed: int

    @classmethod
    def of(cls, experiment: Experiment, *, seed: int) -> "Victim":
        """Divide the training images, by turns."""
        found = load_images(experiment)
        train = _examples(found, found.x_train, found.y_train)
        most = float(found.x_train.max())
        mean, std = (torch.from_numpy(each) for each in (found.mean, found.std))
        return cls(
            task=build_task(experiment),
            own=Examples(train.images[::2], train.classes[::2]),
            attackers=Examples(train.images[1::2], train.classes[1::2]),
            test=_examples(found, found.x_test, found.y_test),
            pixels=lambda x: (
                (x * std.view(-1, 1, 1) + mean.view(-1, 1, 1)) / most
            ).clamp(0, 1),
            seed=seed,
        )

    def defended(self, defence: Defence | None) -> "Victim":
        """Give the device a defence."""
        return replace(self, task=replace(self.task, defence=defence))

    def cut_after(self, unit: str) -> int:
        """Return the cut behind a unit, and behind the defence after it."""
        chain = build_chain(self.task)
        return max(chain.unit_names.index(unit) + 1, chain.num_defended)

    # longer than 40 lines because it is one round, from the state to the report
    def train(
        self,
        route: Route,
        *,
        epochs: int,
        edge: Edge | None = None,
        is_checked: bool = False,
    ) -> Outcome:
        """Train one round along a route; what is drawn depends on the seed alone."""
        chain = build_chain(self.task)
        with stream(self.seed):
            state = state_of(self.task.model_fn())
        used = LocalEdge() if edge is None else edge
        pool = EdgePool([used] if route.cuts else [], self.task)
        digest = state_digest(state)
        pool.prepare(digest)
        addresses, _ = pool.hold(pool.names, digest, state)
        plan = ClientPlan(
            client_key="victim",
            round_number=1,
            route=route,
            seed=self.seed,
            state_digest=digest,
            edge_addresses=addresses,
        )
        device = DeviceProfile(
            client_key="victim",
            budget_bytes=None,
            num_examples=len(self.own.classes) // BATCH_SIZE * BATCH_SIZE,
            batch_size=BATCH_SIZE,
            num_epochs=epochs,
        )
        profile = profile_of(self.task, batch_size=BATCH_SIZE)
        plan = pool.signed(plan, device, profile, is_train=True)
        names = {
            name
            for leg in route.device_legs(len(chain))
            for name in chain.state_names(leg.start, leg.stop)
        }
        conditions = Conditions(
            task=self.task,
            connect=lambda _, address: used.connect(address),
            cap_mode=CapMode.OFF,
            local_epochs=epochs,
            ratings={} if is_checked else None,
            noise_seed=self.seed,
        )
        try:
            mine = {name: state[name] for name in names}
            return train_locally(plan, mine, self.own.loader(), conditions)
        finally:
            pool.stop()

    def head(self, state: State, cut: int) -> Segment:
        """Build what stands before a cut, ready to evaluate."""
        segment = materialise(build_chain(self.task), 0, cut, state)
        segment.eval()
        return segment

    @torch.no_grad()
    def boundaries(self, state: State, cut: int, images: Tensor) -> Tensor:
        """Compute what crosses a cut, noise included."""
        head = self.head(state, cut)
        with stream(self.seed + 1):
            found: Tensor = head(images)
        return found

    def accuracy(self, state: State) -> float:
        """Count which fraction of the test images the defended model knows."""
        scores = self.boundaries(state, len(build_chain(self.task)), self.test.images)
        return float((scores.argmax(1) == self.test.classes).float().mean())


def _examples(found: Images, x: Any, y: Any) -> Examples:
    stored = torch.from_numpy(x.reshape(*x.shape[:3], -1)).float()
    scaled = (stored - torch.from_numpy(found.mean)) / torch.from_numpy(found.std)
    return Examples(scaled.permute(0, 3, 1, 2).contiguous(), torch.from_numpy(y))


# --- kinds of training that the check must know as honest -----------------------------


def batch_norm_network(model_fn: Callable[[], nn.Module]) -> nn.Module:
    """Build a network with BatchNorm in place of GroupNorm."""
    model = model_fn()
    layers = OrderedDict(model.named_children())
    for name, layer in layers.items():
        if isinstance(layer, nn.GroupNorm):
            layers[name] = nn.BatchNorm2d(layer.num_channels)
    return nn.Sequential(layers)


def frozen_front(model_fn: Callable[[], nn.Module]) -> nn.Module:
    """Build a network whose first convolution is not trained."""
    model = model_fn()
    next(model.children()).requires_grad_(False)
    return model


KINDS: dict[str, Change] = {
    "as it is": lambda task: task,
    "batch norm": lambda task: replace(
        task, model_fn=partial(batch_norm_network, task.model_fn)
    ),
    "frozen front": lambda task: replace(
        task, model_fn=partial(frozen_front, task.model_fn)
    ),
    "micro-batches": lambda task: replace(task, accumulate=2),
    "labels on the device": lambda task: task,
    "clipped": lambda task: replace(task, max_gradient_norm=1.0),
}
U_SHAPED = "labels on the device"
