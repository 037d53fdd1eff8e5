"""Profiles on disk, under a digest of everything they depend on."""

import hashlib
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from flwr_smartsplit.model.chain import Chain
from flwr_smartsplit.task import Task
from flwr_smartsplit.types import ChainProfile


def profile_digest(chain: Chain, *, batch_size: int, task: Task) -> str:
    """Identify a profile by model, batch, loss, optimizer, and who computes it.

    Of a function, its own code and constants count, not what it calls in turn.

    Parameters
    ----------
    chain : Chain
        The chain that is profiled.
    batch_size : int
        Examples per step.
    task : Task
        Supplies loss, optimizer and targets.
    """
    digest = hashlib.sha256()
    for fact in _facts(chain, batch_size, task):
        digest.update(repr(fact).encode())
    return digest.hexdigest()


def read_profile(cache_dir: Path, digest: str) -> ChainProfile | None:
    """Read a profile, if it is there and whole."""
    try:
        text = _path(cache_dir, digest).read_text(encoding="utf-8")
        return ChainProfile.from_json(text)
    except (OSError, ValueError):
        return None


def write_profile(cache_dir: Path, digest: str, profile: ChainProfile) -> None:
    """Write a profile so that nobody ever reads half of it."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    path = _path(cache_dir, digest)
    draft = path.with_suffix(f".{os.getpid()}.draft")
    draft.write_text(profile.to_json(), encoding="utf-8")
    draft.replace(path)


def _path(cache_dir: Path, digest: str) -> Path:
    return cache_dir / f"{digest}.json"


def _facts(chain: Chain, batch_size: int, task: Task) -> Iterator[Any]:
    """List what a profile depends on, as values whose ``repr`` is stable."""
    yield torch.__version__
    for source in sorted(Path(__file__).parent.glob("*.py")):
        yield source.name, source.read_bytes()
    yield batch_size
    yield tree_map(_shape, (chain.example_inputs, task.example_targets))
    for unit in chain.units:
        yield unit.name, unit.reads, unit.is_random, _code(unit.forward)
    for name, module in chain.model.named_modules():
        kind = type(module)
        yield name, kind.__module__, kind.__qualname__, module.extra_repr()
        yield _code(kind.forward), _settings(module)
    for named in (chain.model.named_parameters(), chain.model.named_buffers()):
        for name, tensor in named:
            yield name, _shape(tensor), tensor.stride(), tensor.requires_grad
    yield _code(task.loss_fn)
    yield _code(task.optimizer_fn)


def _settings(module: nn.Module) -> list[tuple[str, Any]]:
    """List a module's own attributes; of what is no plain value, only the type."""
    plain = (bool, int, float, str, bytes, tuple, type(None))
    return [
        (name, value if isinstance(value, plain) else type(value).__qualname__)
        for name, value in sorted(vars(module).items())
        if name != "training"
    ]


def _shape(tensor: Tensor) -> tuple[tuple[int, ...], str]:
    return tuple(tensor.shape), str(tensor.dtype)


def _code(function: Any) -> Any:
    """Describe a function by what it does; anything else by what it shows."""
    if isinstance(function, partial):
        return _code(function.func), function.args, sorted(function.keywords.items())
    code = getattr(function, "__code__", None)
    name = (getattr(function, "__module__", ""), getattr(function, "__qualname__", ""))
    if not isinstance(code, CodeType):
        return name, type(function).__qualname__, repr(function)
    cells = [
        cell.cell_contents for cell in getattr(function, "__closure__", None) or ()
    ]
    return name, _parts(code), function.__defaults__, [_code(cell) for cell in cells]


def _parts(code: CodeType) -> Any:
    """Take a code object apart; its own ``repr`` holds an address."""
    constants = [
        _parts(const) if isinstance(const, CodeType) else const
        for const in code.co_consts
    ]
    return code.co_code, code.co_names, constants
