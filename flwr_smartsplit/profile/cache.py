"""Profiles on disk, under a digest of everything they depend on."""

import hashlib
import os
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.split.description import PACKAGES, Describer, layout_of
from flwr_smartsplit.task import Task
from flwr_smartsplit.types import WHOLE, ChainProfile, Variant


def profile_digest(
    chain: Chain, *, batch_size: int, task: Task, variant: Variant = WHOLE
) -> str:
    """Identify a profile by model, batch, loss, optimizer and variant.

    Functions and classes count with their code, constants, closures and the globals
    they name. Library code counts by its version.
    """
    digest = hashlib.sha256(repr(variant).encode())
    for fact in _facts(chain, batch_size, task):
        digest.update(repr(fact).encode())
    return digest.hexdigest()


def read_profile(cache_dir: Path, digest: str) -> ChainProfile | None:
    """Read a profile; None if the file is missing or damaged."""
    try:
        text = _path(cache_dir, digest).read_text(encoding="utf-8")
        return ChainProfile.from_json(text)
    except (OSError, ValueError):
        return None


def write_profile(cache_dir: Path, digest: str, profile: ChainProfile) -> None:
    """Write a profile atomically, so that no reader sees half of it."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    path = _path(cache_dir, digest)
    draft = path.with_suffix(f".{os.getpid()}.draft")
    draft.write_text(profile.to_json(), encoding="utf-8")
    draft.replace(path)


def _path(cache_dir: Path, digest: str) -> Path:
    return cache_dir / f"{digest}.json"


def _facts(chain: Chain, batch_size: int, task: Task) -> Iterator[Any]:
    """List what a profile depends on, as values whose ``repr`` is stable."""
    yield [(name, _version(name)) for name in PACKAGES]
    for source in sorted(Path(__file__).parent.glob("*.py")):
        yield source.name, source.read_bytes()
    yield batch_size
    examples = chain.example_inputs, task.example_targets
    yield tree_map_only(Tensor, layout_of, examples)
    yield _values(task.example_targets)  # A loss may look at them.
    describe = Describer()
    for unit in chain.units:
        yield unit.name, unit.reads, unit.is_random, describe(unit.forward)
        yield unit.can_rerun, unit.changed, unit.rereads
    for name, module in chain.model.named_modules():
        yield name, module.extra_repr(), describe(module)
    for named in (chain.model.named_parameters(), chain.model.named_buffers()):
        for name, tensor in named:
            yield name, layout_of(tensor), tensor.requires_grad
    yield describe(task.loss_fn), describe(task.optimizer_fn)
    yield str(task.autocast_dtype), task.max_gradient_norm is not None, task.accumulate


def _values(targets: Any) -> list[str]:
    leaves = [leaf for leaf in tree_leaves(targets) if isinstance(leaf, Tensor)]
    return [hashlib.sha256(repr(leaf.tolist()).encode()).hexdigest() for leaf in leaves]


@cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
