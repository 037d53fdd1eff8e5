"""An edge that hijacks training, after FSHA (Pasquini et al., CCS 2021).

It trains an autoencoder on images of its own whose code has the boundary's shape, and a
discriminator that tells such codes from boundaries. The gradients that it returns make
the device's boundaries look like codes, which its decoder inverts. It answers all else
as an honest edge does, and reports that edge's loss.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from flwr_smartsplit import Task
from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.hosts.edge import Edge, Host
from flwr_smartsplit.edge.hosts.local import LocalHost
from flwr_smartsplit.edge.tensors import WireTensor
from flwr_smartsplit.types import EDGE, EdgeProfile
from simulations.attacks.networks import adam, descend, perceptron

Forge = Callable[[Tensor], Tensor]
"""Makes the gradient that is returned for a boundary."""


class Hijacker:
    """Forge gradients for the boundaries of one cut, and invert these boundaries."""

    def __init__(self, images: Tensor, boundary_size: int, *, seed: int) -> None:
        self._images, self._chance = images, torch.Generator().manual_seed(seed)
        image_size = images[0].numel()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._encoder = perceptron(image_size, boundary_size)
            self._decoder = perceptron(boundary_size, image_size)
            self._judge = perceptron(boundary_size, 1)
        self._coding = adam(self._encoder, self._decoder)
        self._judging = adam(self._judge)

    def __call__(self, boundary: Tensor) -> Tensor:
        """Train on a boundary, and return a gradient for it."""
        with torch.enable_grad():
            drawn = torch.randint(
                len(self._images), (len(boundary),), generator=self._chance
            )
            images = self._images[drawn]
            codes = self._encoder(images)
            descend(F.mse_loss(self._decoder(codes), images.flatten(1)), self._coding)
            aim = boundary.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self._distance(aim, looks_real=1), aim)
            told_apart = self._distance(boundary.detach(), looks_real=0)
            told_apart = told_apart + self._distance(codes.detach(), looks_real=1)
            descend(told_apart, self._judging)
        return gradient

    def _distance(self, codes: Tensor, *, looks_real: int) -> Tensor:
        judged = self._judge(codes)
        wanted = torch.full_like(judged, looks_real)
        return F.binary_cross_entropy_with_logits(judged, wanted)

    @torch.no_grad()
    def invert(self, boundary: Tensor) -> Tensor:
        """Reconstruct the images behind a boundary."""
        found: Tensor = self._decoder(boundary)
        return found.view(-1, *self._images.shape[1:])


@dataclass(frozen=True, slots=True)
class ForgedTransport:
    """Replace the gradients in an edge's replies."""

    inner: wire.Transport
    forge: Forge
    boundaries: dict[str, Tensor] = field(default_factory=dict)  # By session

    def send(self, request: wire.Request[wire.ReplyT]) -> wire.ReplyT:
        """Send on; forge what returns for a boundary of a single tensor."""
        if isinstance(request, wire.Forward):
            boundary = request.boundary[0]
            assert isinstance(boundary, WireTensor)
            self.boundaries[request.session] = boundary.unpack()
        reply = self.inner.send(request)
        if isinstance(reply, wire.Stepped) and reply.gradients:
            assert isinstance(request, wire.Forward | wire.Backward)
            forged = self.forge(self.boundaries[request.session])
            packed = WireTensor.pack(forged)
            return replace(reply, gradients=(packed,))
        return reply


@dataclass(frozen=True, slots=True)
class ForgingHost:
    """Run an honest edge, and forge the gradients on their way back."""

    forge: Forge
    inner: Host = field(default_factory=LocalHost)

    def start(self, task: Task, profile: EdgeProfile) -> str:
        """Start the edge."""
        return self.inner.start(task, profile)

    def connect(self, address: str) -> ForgedTransport:
        """Reach the edge through the forger."""
        return ForgedTransport(self.inner.connect(address), self.forge)

    def stop(self, address: str) -> None:
        """Stop the edge."""
        self.inner.stop(address)


def forging_edge(forge: Forge, *, name: str = EDGE) -> Edge:
    """Describe an edge in this process that forges gradients."""
    return Edge(EdgeProfile(name=name), ForgingHost(forge))
