"""Describer: functions, objects and containers as named texts, whatever process.

A user's own code counts by what it does, a library's by its name and version.
"""

import dis
import enum
import hashlib
import re
import sys
from collections import deque
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache, partial
from numbers import Number
from pathlib import Path, PurePath
from types import CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PACKAGE = __name__.partition(".")[0]
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.Size)
_LONGEST_TEXT = 80
_WRITTEN = (
    Number,
    PurePath,
    SimpleNamespace,
    bytearray,
    deque,
    range,
    re.Pattern,
    slice,
)
"""Python's own objects whose ``repr`` says what they are."""
_BY_VALUE = (nn.Parameter, Tensor, np.ndarray)
_HERE = "<here>"
_first_seen: dict[tuple[int, str], tuple[Any, dict[str, str], set[str]]] = {}
"""By a module's globals or a closure's cell, which it keeps, and the name in them."""


@cache
def _is_installed(package: str) -> bool:
    """Say whether a top-level package is a library: installed, or Python's own."""
    if package in sys.stdlib_module_names or package in {PACKAGE, "torch", "numpy"}:
        return True
    path = getattr(sys.modules.get(package), "__file__", None)
    if path is None:
        return False
    return not {"site-packages", "dist-packages"}.isdisjoint(Path(path).parts)


def sha(text: str | bytes) -> str:
    """Digest a text or bytes by SHA-256."""
    data = text.encode(errors="backslashreplace") if isinstance(text, str) else text
    return hashlib.sha256(data).hexdigest()


def _short(text: str) -> str:
    """Keep a text that people can read; identify a longer one by its beginning."""
    if len(text) <= _LONGEST_TEXT:
        return text
    return f"{text[: _LONGEST_TEXT // 2]}... #{sha(text)[:12]}"


def _tensor_text(value: Any, *, with_values: bool = True) -> str:
    text = f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, nn.Parameter) and not value.requires_grad:
        text += " frozen"
    if not with_values or (isinstance(value, Tensor) and value.is_meta):
        return text
    if isinstance(value, Tensor):
        value = value.detach().cpu().to_dense() if value.is_sparse else value.detach()
        value = value.cpu().resolve_conj().resolve_neg().contiguous()
        if value.numel() == 1:
            return f"{text} {value.item()!r}"
        value = value.flatten().view(torch.uint8).numpy()
    elif value.dtype.hasobject:
        return text
    return f"{text} #{sha(np.ascontiguousarray(value).tobytes())[:12]}"


def _name(thing: Any) -> str:
    return str(getattr(thing, "__qualname__", type(thing).__qualname__))


class Describer:
    """Collect facts about functions, objects and containers, by their place in a task.

    What cannot be looked into counts by its type.
    """

    def __init__(self, own: frozenset[str], *, is_anew: bool = False) -> None:
        self.facts: dict[str, str] = {}
        self._is_anew = is_anew
        self.libraries: set[str] = set()
        self._own = own
        self._known: set[int] = set()  # Code is described once, where it comes first.
        self._open: set[int] = set()  # What is being described, against circles.

    def __call__(self, path: str, value: Any) -> None:
        """Describe a value and what it holds."""
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, str | PurePath) and PurePath(value).is_absolute():
            self.facts[path] = f"a path to {PurePath(value).name}"
        elif isinstance(value, _PLAIN):
            self.facts[path] = _short(repr(value))
        elif isinstance(value, _BY_VALUE):
            self.facts[path] = _tensor_text(value)
        elif isinstance(value, ModuleType):
            self.facts[path] = f"module {value.__name__}"
        elif isinstance(value, torch.device):  # Every place has its own.
            self.facts[path] = "a device"
        elif isinstance(value, FunctionType | type):
            self._code(path, value)
        elif id(value) in self._open:
            self.facts[path] = "a part of itself"
        else:
            self._open.add(id(value))
            self._inside(path, value)
            self._open.discard(id(value))

    def model(self, model: nn.Module) -> None:
        """Describe the modules that were built, one fact each, and their classes."""
        for name, module in model.named_modules():
            within = Describer(self._own)
            within._known, within.libraries = self._known, self.libraries
            within._settings("", module)
            saved = module._buffers.keys() - module._non_persistent_buffers_set
            for key, tensor in {**module._parameters, **module._buffers}.items():
                if tensor is not None:
                    values = key in module._buffers and key not in saved
                    text = _tensor_text(tensor, with_values=values)
                    within.facts[key] = text
            facts = ", ".join(f"{k} {v}".strip() for k, v in within.facts.items())
            text = f"{_name(type(module))}({module.extra_repr()}) {facts}"
            self.facts[f"model {name}".strip()] = _short(text)
            self._code(f"class {_name(type(module))}", type(module))

    def _inside(self, path: str, value: Any) -> None:
        if isinstance(value, enum.Enum):
            self.facts[path] = str(value)
        elif isinstance(value, partial):
            self(path, value.func)
            for index, each in enumerate(value.args):
                self(f"{path}[{index}]", each)
            for key, each in sorted(value.keywords.items()):
                self(f"{path}.{key}", each)
        elif isinstance(value, Mapping):
            self.facts[path] = f"{type(value).__name__} of {len(value)}"
            for key, each in sorted(value.items(), key=lambda item: repr(item[0])):
                self(f"{path}[{key!r}]", each)
        elif isinstance(value, list | tuple):
            self.facts[path] = f"{type(value).__name__} of {len(value)}"
            for index, each in enumerate(value):
                self(f"{path}[{index}]", each)
        elif isinstance(value, set | frozenset):
            self.facts[path] = _short(f"set of {sorted(map(_plain_text, value))}")
        elif isinstance(value, MethodType):
            self(path, value.__func__)
            self(f"{path}.self", value.__self__)
        elif hasattr(value, "__wrapped__"):  # As functools.cache makes it.
            self(path, value.__wrapped__)
        else:
            self._object(path, value)

    def _object(self, path: str, value: Any) -> None:
        if isinstance(getattr(value, "__qualname__", None), str):  # Written in C.
            self._library(value)
            self.facts[path] = f"{getattr(value, '__module__', '')}.{_name(value)}"
        elif isinstance(value, nn.Module):
            self._code(path, type(value))
            for name, module in value.named_modules():
                at = f"{path}.{name}".rstrip(".")
                self._settings(at, module)
                for key, tensor in {**module._parameters, **module._buffers}.items():
                    self(f"{at}.{key}", tensor)
        else:
            self._code(path, type(value))
            package = type(value).__module__.partition(".")[0]
            if isinstance(value, _WRITTEN):
                self.facts[path] += f" {_plain_text(value)}"
            elif package not in sys.stdlib_module_names:  # Not a logger or a lock.
                self._settings(path, value)

    def _settings(self, path: str, value: Any) -> None:
        """Describe an object's attributes; a module's own bookkeeping left out."""
        is_module = isinstance(value, nn.Module)
        slots = [f.name for f in fields(value)] if is_dataclass(value) else []
        attributes = {n: getattr(value, n) for n in slots if hasattr(value, n)}
        attributes |= getattr(value, "__dict__", {})
        for key, each in sorted(attributes.items()):
            if key.endswith("_hash"):  # Of an object: each process has its own.
                continue
            if not is_module or not (key.startswith("_") or key == "training"):
                self(f"{path}.{key}".lstrip("."), each)

    def _code(self, path: str, value: Any) -> None:
        """Describe a function or class; a library's is known by its version."""
        if not self._is_own(value):
            self._library(value)
            self.facts[path] = f"{value.__module__}.{_name(value)}"
        elif isinstance(value, type):
            self.facts[path] = f"class {_name(value)}"
            if id(value) not in self._known:
                self._known.add(id(value))
                self._class(path, value)
        else:
            self.facts[path] = f"{_name(value)} #{_code_digest(value.__code__)}"
            if id(value) not in self._known:
                self._known.add(id(value))
                self._function(path, value)

    def _function(self, path: str, function: FunctionType) -> None:
        cells = zip(
            function.__code__.co_freevars, function.__closure__ or (), strict=True
        )
        for name, cell in cells:
            try:
                self._bound(cell, f"{path}.{name}", cell.cell_contents)
            except ValueError:  # It has no value yet.
                self.facts[f"{path}.{name}"] = "empty"
        for index, each in enumerate(function.__defaults__ or ()):
            self(f"{path}.default[{index}]", each)
        for name, each in sorted((function.__kwdefaults__ or {}).items()):
            self(f"{path}.{name}", each)
        known = function.__globals__
        for name, each in self._globals_of(function.__code__, known).items():
            self._bound(known, f"{path}.{name}", each, name=name)

    def _bound(self, owner: Any, path: str, value: Any, *, name: str = "") -> None:
        """Describe what a function's name stands for, as it was first seen here.

        Functions count their calls and note what they see in such places. That makes
        no other task of the one that began.
        """
        if isinstance(value, FunctionType | type | ModuleType):
            self(path, value)
            return
        key = id(owner), name
        if self._is_anew or key not in _first_seen:
            within = Describer(self._own, is_anew=self._is_anew)
            within._open = self._open
            within(_HERE, value)
            _first_seen[key] = owner, within.facts, within.libraries
        _, facts, libraries = _first_seen[key]
        self.facts.update({at.replace(_HERE, path, 1): x for at, x in facts.items()})
        self.libraries |= libraries

    def _class(self, path: str, kind: type) -> None:
        for base in kind.__bases__:
            if base is not object:
                self(f"{path}.{_name(base)}", base)
        for name, each in sorted(vars(kind).items()):
            each = getattr(each, "__func__", each)  # noqa: PLW2901 - static and class methods
            if isinstance(each, property):
                each = each.fget  # noqa: PLW2901
            is_data = isinstance(each, _PLAIN) and not name.startswith("__")
            if is_data or isinstance(each, FunctionType | partial):
                self(f"{path}.{name}", each)

    def _globals_of(self, code: CodeType, known: Mapping[str, Any]) -> dict[str, Any]:
        """Find the globals that code uses, and what it takes from modules among them.

        Values in a library's module, such as ``os.environ``, are not the task's.
        """
        found: dict[str, Any] = {}
        for name, *attributes in _loaded(code):
            path, value, is_own = name, known.get(name), name in known
            for attribute in attributes:
                if not isinstance(value, ModuleType):
                    break
                is_own = self._is_own_package(value.__name__)
                path, value = f"{path}.{attribute}", getattr(value, attribute, None)
            if not isinstance(value, ModuleType) and (
                is_own or isinstance(value, FunctionType | type)
            ):
                found[path] = value
        return dict(sorted(found.items()))

    def _is_own(self, thing: Any) -> bool:
        return self._is_own_package(str(getattr(thing, "__module__", "")))

    def _is_own_package(self, module: str) -> bool:
        package = module.partition(".")[0]
        return package in self._own or not _is_installed(package)

    def _library(self, thing: Any) -> None:
        package = str(getattr(thing, "__module__", None) or "builtins").partition(".")[
            0
        ]
        if package not in sys.stdlib_module_names:
            self.libraries.add(package)


def _plain_text(value: Any) -> str:
    """Write a value that cannot be looked into, without its address."""
    try:
        return _short(re.sub(r" at 0x[0-9a-f]+", "", repr(value)))
    except Exception:
        return type(value).__name__


@cache
def _code_digest(code: CodeType) -> str:
    return sha(repr(_parts(code)))[:12]


@cache
def _loaded(code: CodeType) -> tuple[tuple[str, ...], ...]:
    """List the names that code reads from its globals, with attributes behind them."""
    found: list[tuple[str, ...]] = []
    is_open = False
    for step in dis.get_instructions(code):
        if step.opname in {"LOAD_GLOBAL", "LOAD_NAME"}:
            found.append((str(step.argval),))
            is_open = True
        elif step.opname in {"LOAD_ATTR", "LOAD_METHOD"} and is_open:
            found[-1] += (str(step.argval),)
        elif step.opname != "EXTENDED_ARG":  # It belongs to the next.
            is_open = False
    nested = (each for each in code.co_consts if isinstance(each, CodeType))
    return (*found, *(name for each in nested for name in _loaded(each)))


def _parts(code: CodeType) -> Any:
    """Take a code object apart: what it does, without names of files and lines."""
    return (
        code.co_code,
        code.co_exceptiontable,
        code.co_names,
        (code.co_argcount, code.co_kwonlyargcount, code.co_flags),
        [_constant(each) for each in code.co_consts],
    )


def _constant(value: Any) -> Any:
    if isinstance(value, CodeType):
        return _parts(value)
    if isinstance(value, frozenset):  # Python orders it anew in every process.
        return sorted(map(repr, value))
    return value
