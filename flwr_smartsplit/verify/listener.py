"""Listener: what enters and leaves the modules of a model, as digests."""

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from flwr_smartsplit.memory.meter import unmetered


@unmetered()
def digest_of(tensor: Tensor) -> str:
    """Return a digest of a tensor's shape, dtype and values."""
    dense = tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()
    values = dense.resolve_conj().resolve_neg().contiguous().flatten()
    digest = hashlib.sha256(repr((tuple(tensor.shape), tensor.dtype)).encode())
    digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Listener(ExitStack):
    """List digests of what enters and leaves each inner module of ``named``."""

    def __init__(self, model: nn.Module, named: nn.Module) -> None:
        super().__init__()
        self._found: list[tuple[str, list[str], list[str]]] = []
        inner = {name for name, m in named.named_modules() if not any(m.children())}
        for name, module in model.named_modules():
            if name in inner:
                hook = module.register_forward_hook(partial(self._look, name))
                self.callback(hook.remove)

    def __iter__(self) -> Iterator[tuple[str, list[str], list[str]]]:
        return iter(self._found)

    def _look(self, name: str, module: nn.Module, given: Any, value: Any) -> None:
        del module
        self._found.append((name, _digests(given), _digests(value)))


def _digests(values: Any) -> list[str]:
    return [digest_of(x) for x in tree_leaves(values) if isinstance(x, Tensor)]
