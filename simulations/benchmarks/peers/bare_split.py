"""The least that two processes take for a split step: torch, a socket, and no more.

No checks, no meter, no merge, and bytes without headers: both sides know the sizes.
What this costs beyond the plain loop, split training between two processes costs at
least.
"""

import multiprocessing
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from simulations.benchmarks.peers.work import Batches

_SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True, slots=True, kw_only=True)
class Halves:
    """Both halves of a network, and how they are trained."""

    front: nn.Module
    tail: nn.Module
    optimizer_fn: Callable[..., torch.optim.Optimizer]
    loss_fn: Callable[[Any, Any], Tensor]


@contextmanager
def bare_split(halves: Halves, batches: Batches) -> Iterator[Callable[[], float]]:
    """Start the tail's process; yield what trains all batches once: the mean loss."""
    here, there = socket.socketpair()
    with torch.no_grad():
        shapes = [tuple(halves.front(inputs).shape) for inputs, _ in batches]
    shaped = list(zip(shapes, [targets for _, targets in batches], strict=True))
    edge = _SPAWN.Process(target=_serve, args=(halves, there, shaped), daemon=True)
    edge.start()
    there.close()
    try:
        yield lambda: _train(halves, here, batches)
    finally:
        here.close()
        edge.join()


def _train(halves: Halves, edge: socket.socket, batches: Batches) -> float:
    """Train the front, which goes on from where it ended before."""
    optimizer = halves.optimizer_fn(halves.front.parameters())
    halves.front.train()
    loss, total = torch.zeros(()), 0.0
    for inputs, _ in batches:
        optimizer.zero_grad()
        boundary = halves.front(inputs)
        edge.sendall(_bytes_of(boundary.detach()))
        gradient = torch.empty_like(boundary)
        if not (_filled(edge, gradient) and _filled(edge, loss)):
            raise EOFError("the tail's process has ended")
        boundary.backward(gradient)
        optimizer.step()
        total += loss.item()
    return total / len(batches)


def _serve(halves: Halves, device: socket.socket, shaped: list[Any]) -> None:
    """Train the tail, again and again, until the socket is closed."""
    torch.set_num_threads(1)
    halves.tail.train()
    while True:
        optimizer = halves.optimizer_fn(halves.tail.parameters())
        for shape, targets in shaped:
            boundary = torch.empty(shape)
            if not _filled(device, boundary):
                return
            boundary.requires_grad_()
            optimizer.zero_grad()
            loss = halves.loss_fn(halves.tail(boundary), targets)
            loss.backward()
            assert boundary.grad is not None
            device.sendall(_bytes_of(boundary.grad))
            device.sendall(_bytes_of(loss.detach()))
            optimizer.step()


def _bytes_of(tensor: Tensor) -> memoryview:
    flat: Any = tensor.contiguous().numpy().reshape(-1)
    return memoryview(flat).cast("B")


def _filled(sender: socket.socket, tensor: Tensor) -> bool:
    """Receive a tensor's values in place; say whether they came before the end."""
    left = _bytes_of(tensor)
    while left:
        size = sender.recv_into(left)
        if not size:
            return False
        left = left[size:]
    return True
