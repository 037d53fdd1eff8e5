"""Profiles on disk, under a digest of everything they depend on."""

import hashlib
import os
import uuid
from collections.abc import Iterator, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.task import Task
from flwr_smartsplit.types import WHOLE, ChainProfile, Variant

_PLAIN = (
    *(bool, int, float, complex, str, bytes, type(None), ModuleType),
    *(torch.Size, torch.dtype, torch.device, torch.layout, torch.memory_format),
)
_PACKAGES = ("torch", "torchvision", "transformers", "peft", "numpy")
_LIBRARIES = (*_PACKAGES, "builtins", "functools", "collections", "typing", "abc")


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
    yield [(name, _version(name)) for name in _PACKAGES]
    for source in sorted(Path(__file__).parent.glob("*.py")):
        yield source.name, source.read_bytes()
    yield batch_size
    examples = chain.example_inputs, task.example_targets
    yield tree_map(lambda x: (_shape(x), x.stride()), examples)
    describe = _Describer()
    for unit in chain.units:
        yield unit.name, unit.reads, unit.is_random, describe(unit.forward)
    for name, module in chain.model.named_modules():
        yield name, module.extra_repr(), describe(module)
    for named in (chain.model.named_parameters(), chain.model.named_buffers()):
        for name, tensor in named:
            yield name, _shape(tensor), tensor.stride(), tensor.requires_grad
    yield describe(task.loss_fn), describe(task.optimizer_fn)
    yield str(task.autocast_dtype), task.max_gradient_norm is not None, task.accumulate


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _shape(tensor: Tensor) -> tuple[tuple[int, ...], str]:
    return tuple(tensor.shape), str(tensor.dtype)


class _Describer:
    """Reduce functions, objects and containers to values with a stable ``repr``.

    What cannot be described becomes a unique number, so that its profile is computed
    again and never mistaken for another.
    """

    def __init__(self) -> None:
        self._seen: dict[int, Any] = {}

    def __call__(self, value: Any) -> Any:  # noqa: PLR0911 - one for each kind
        """Describe a value by what it does; each object once."""
        if isinstance(value, _PLAIN):
            return value
        if id(value) in self._seen:
            return "seen"
        self._seen[id(value)] = value  # Keep it alive so that its id stays unique.
        if isinstance(value, Mapping):
            return [(self(key), self(item)) for key, item in value.items()]
        if isinstance(value, list | tuple | set | frozenset):
            items = [self(item) for item in value]
            return sorted(map(repr, items)) if isinstance(value, set) else items
        if isinstance(value, partial):
            return "partial", *map(self, (value.func, value.args, value.keywords))
        if isinstance(value, MethodType):
            return "method", self(value.__func__), self(value.__self__)
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, Tensor):
            return _shape(value), value.stride()
        if isinstance(value, type):
            return self._class(value)
        name = getattr(value, "__qualname__", None)
        if isinstance(name, str):  # A function written in C.
            return getattr(value, "__module__", ""), name
        if not hasattr(value, "__dict__"):
            return uuid.uuid4().hex
        skipped = ("training", "_parameters", "_buffers", "_modules")
        settings = {k: v for k, v in vars(value).items() if k not in skipped}
        return self._class(type(value)), self(settings)

    def _function(self, function: FunctionType) -> Any:
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
        used = [
            (name, self(function.__globals__[name]))
            for name in function.__code__.co_names
            if name in function.__globals__ and not _is_library(function)
        ]
        return (
            function.__module__,
            function.__qualname__,
            _parts(function.__code__),
            *map(self, (function.__defaults__, function.__kwdefaults__, cells)),
            used,
        )

    def _class(self, kind: type) -> Any:
        """Describe the methods of a class that is not a library's."""
        own = [base for base in kind.__mro__ if not _is_library(base)]
        methods = [
            (name, self(value))
            for base in own
            for name, value in sorted(vars(base).items())
            if isinstance(value, FunctionType | staticmethod | classmethod | property)
            or isinstance(value, _PLAIN)
        ]
        return kind.__module__, kind.__qualname__, methods


def _is_library(thing: Any) -> bool:
    """Say whether a package version stands for this code."""
    return str(getattr(thing, "__module__", "")).split(".")[0] in _LIBRARIES


def _parts(code: CodeType) -> Any:
    """Take a code object apart; its own ``repr`` holds an address."""
    constants = [
        _parts(const) if isinstance(const, CodeType) else const
        for const in code.co_consts
    ]
    return code.co_code, code.co_names, constants
