"""Describe what functions and objects do, as values with a stable ``repr``.

What has the same description computes the same. Profiles on disk and chains in memory
are kept under it.
"""

import dis
import hashlib
import sys
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from functools import partial
from threading import Lock, RLock
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_PLAIN = (
    *(bool, int, float, complex, str, bytes, type(None), ModuleType),
    *(torch.Size, torch.dtype, torch.device, torch.layout, torch.memory_format),
)
PACKAGES = ("torch", "torchvision", "transformers", "peft", "numpy")
_LIBRARIES = {*PACKAGES, *sys.stdlib_module_names}
LOCKS = (type(Lock()), type(RLock()))


def layout_of(tensor: Tensor) -> tuple[Any, ...]:
    """Describe a tensor without its values."""
    return tuple(tensor.shape), str(tensor.dtype), tensor.stride()


def values_of(tensor: Tensor) -> tuple[Any, ...]:
    """Describe a tensor with its values."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().to_dense().contiguous()
    data = plain.reshape(-1).view(torch.uint8).numpy()
    return *layout_of(plain), hashlib.sha256(data.data).hexdigest()


class Describer:
    """Reduce functions, objects and containers to values with a stable ``repr``.

    What cannot be described becomes a unique number, so that what depends on it is
    made again and never mistaken for another. ``tensor`` describes tensors;
    ``in_function`` and ``in_global`` say whether one was found in a function, or in a
    global variable that a function reads.
    """

    def __init__(self, tensor: Callable[[Tensor], Any] = layout_of) -> None:
        self._tensor = tensor
        self._seen: dict[int, tuple[int, Any]] = {}
        self.in_function = self.in_global = False

    def __call__(self, value: Any) -> Any:  # noqa: PLR0911 - one for each kind
        """Describe a value by what it does; each object once."""
        if isinstance(value, _PLAIN):
            return value
        if id(value) in self._seen:
            return "seen", self._seen[id(value)][0]
        # Keep it alive so that its id stays unique.
        self._seen[id(value)] = len(self._seen), value
        if isinstance(value, Mapping):
            return [(self(key), self(item)) for key, item in value.items()]
        if isinstance(value, list | tuple | set | frozenset):
            items = [self(item) for item in value]
            return sorted(map(repr, items)) if isinstance(value, set) else items
        wrapped = _wrapped(value)
        if wrapped:
            return type(value).__name__, *map(self, wrapped)
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, np.ndarray) and not value.dtype.hasobject:
            return value.dtype.str, value.shape, value.tobytes()
        if isinstance(value, type):
            return self._class(value)
        return self._object(value)

    def _object(self, value: Any) -> Any:
        name = getattr(value, "__qualname__", None)
        if isinstance(name, str):  # A function written in C.
            return getattr(value, "__module__", ""), name
        kind = type(value)
        has_settings = hasattr(value, "__dict__")
        if not has_settings or kind.__module__ in sys.stdlib_module_names:
            if isinstance(value, ContextVar):
                return kind.__name__, value.name, self(_held_now(value))
            if kind in LOCKS:  # They compute nothing.
                return kind.__name__
            text = repr(value)
            return uuid.uuid4().hex if " at 0x" in text else text
        skipped = ("training", "_parameters", "_buffers", "_modules")
        settings = {k: v for k, v in vars(value).items() if k not in skipped}
        return self._class(kind), self(settings)

    def _function(self, function: FunctionType) -> Any:
        outside = self.in_function, self.in_global
        self.in_function = True
        cells = [_content(cell) for cell in function.__closure__ or ()]
        own = (function.__defaults__, function.__kwdefaults__, cells)
        described = [self(value) for value in own]
        self.in_global = True
        used = []
        if not _is_library(function):
            names = sorted(set(_globals_read(function.__code__)))
            read = [name for name in names if name in function.__globals__]
            used = [(name, self(function.__globals__[name])) for name in read]
        self.in_function, self.in_global = outside
        code = _parts(function.__code__)
        return function.__module__, function.__qualname__, code, *described, used

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


class PartDescriber(Describer):
    """Also describes modules that are held by other things than modules."""

    def __init__(
        self,
        tensor: Callable[[Tensor], Any],
        module: Callable[[nn.Module], Any],
        lock: Callable[[], None],
    ) -> None:
        super().__init__(tensor)
        self._module = module
        self._lock = lock

    def _object(self, value: Any) -> Any:
        if type(value) in LOCKS and not self.in_global:
            self._lock()
        described = super()._object(value)
        if isinstance(value, nn.Module) and not self.in_global:
            return described, self._module(value)
        return described


def _held_now(variable: ContextVar[Any]) -> Any:
    try:
        return variable.get()
    except LookupError:
        return None


def _wrapped(value: Any) -> tuple[Any, ...]:
    """Return what a value is a thin wrapper of, if it is one."""
    if isinstance(value, partial):
        return value.func, value.args, value.keywords
    if isinstance(value, MethodType):
        return value.__func__, value.__self__
    if isinstance(value, staticmethod | classmethod):
        return (value.__func__,)
    if isinstance(value, property):
        return value.fget, value.fset, value.fdel
    # A recurrent layer has some to its parameters.
    return (value(),) if isinstance(value, weakref.ref) else ()


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # Not bound yet.
        return None


def _globals_read(code: CodeType) -> Iterator[str]:
    """Name the global variables that a function reads, and the functions in it."""
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield step.argval
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _globals_read(constant)


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
