"""What Python code keeps from one call to the next, besides registered tensors.

Attributes, lists, iterators, generators, NumPy arrays, closures, class attributes and
the globals that user code names: whatever a forward can read that is neither a
parameter nor a buffer. Nothing here knows what a model is for; it walks objects.
"""

import copyreg
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import CodeType, FunctionType, GeneratorType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.utils._python_dispatch import _disable_current_modes

_PLAIN = (bool, int, float, complex, str, bytes, type(None), range, slice)
_LIBRARIES = sys.stdlib_module_names | {
    *("torch", "numpy", "torchvision", "transformers", "flwr_smartsplit"),
}
_SKIPPED = {"training", "_parameters", "_buffers", "_modules"}
# The dicts of hooks that each module has: only those with hooks are looked at.
_HOOKS = {name for name, value in vars(nn.Module()).items() if value == {}} - _SKIPPED
_TRIES = 5

CONSTANT = "_tensor_constant"
"""How the attributes begin that torch.fx adds to a model."""

Copies = list[tuple[Any, Any]]
"""Objects, and shallow copies of them."""


@dataclass
class PythonState:
    """A snapshot: ``values`` by path; ``owners`` has the object each value is in.

    ``reached`` holds every object that can change, and ``parents`` what each is in.
    """

    values: dict[str, Any] = field(default_factory=dict)
    owners: dict[str, int] = field(default_factory=dict)
    parents: dict[int, int] = field(default_factory=dict)
    reached: dict[int, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, *things: Any) -> "PythonState":
        """Take a snapshot of everything that can be reached from some objects."""
        state = cls()
        waiting: list[tuple[str, Any, int]] = [("", thing, 0) for thing in things]
        with _disable_current_modes():
            while waiting:
                waiting += state._parts_noted(*waiting.pop())
        return state

    def changes(
        self, later: "PythonState", *, with_tensors: bool = True
    ) -> dict[str, int]:
        """Find what differs in a later snapshot: paths, and the objects they are in.

        Such an object was there before and after: what code replaces, it keeps in
        something. Without tensors, one tensor is as good as another.
        """
        before, after = self.values, later.values
        skipped = set() if with_tensors else self._tensors() & later._tensors()
        return {
            path: self._owner(path, later)
            for path in {**before, **after}
            if path not in before or path not in after or before[path] != after[path]
            if path not in skipped
        }

    def _owner(self, path: str, later: "PythonState") -> int:
        state = later if path in later.values else self
        owner = state.owners[path]
        while owner and not (owner in self.reached and owner in later.reached):
            owner = state.parents[owner]
        return owner

    def _tensors(self) -> set[str]:
        return {
            path
            for path, value in self.values.items()
            if isinstance(value, tuple) and value[0] is Tensor
        }

    def is_known(self) -> bool:
        """Say whether all code that was reached is known to keep nothing."""
        return all(map(_is_known, self.reached.values()))

    def copied(self) -> Copies:
        """Copy the modules' attributes, the lists and the dicts that were reached."""
        return [
            (thing, dict(vars(thing)) if isinstance(thing, nn.Module) else thing.copy())
            for thing in self.reached.values()
            if isinstance(thing, nn.Module | list) or type(thing) is dict
        ]

    def _parts_noted(
        self, path: str, value: Any, owner: int
    ) -> list[tuple[str, Any, int]]:
        """Note a value, and return its parts."""
        if isinstance(value, _PLAIN):
            is_exact = isinstance(value, int | str)  # 0.0 == -0.0, and nan != nan.
            self._note(path, (type(value), value if is_exact else repr(value)), owner)
        elif isinstance(value, Tensor):
            self._note(path, (Tensor, id(value), value._version), owner)
            self.reached.setdefault(id(value), value)
        elif isinstance(value, np.ndarray):
            self.reached[id(value)], self.parents[id(value)] = value, owner
            content = repr(value.tolist()) if value.dtype.hasobject else value.tobytes()
            self._note(path, (value.shape, str(value.dtype), content), id(value))
        elif isinstance(value, ModuleType | Proxy) or id(value) in self.reached:
            self._note(path, id(value), owner)
        else:
            self._note(path, type(value), owner)
            self.reached[id(value)], self.parents[id(value)] = value, owner
            return [(path + name, part, id(value)) for name, part in _parts(value)]
        return []

    def _note(self, path: str, value: Any, owner: int) -> None:
        self.values[path], self.owners[path] = value, owner


def attribute_of(path: str) -> str:
    """Name the attribute that a path of a state begins with, without parts of it."""
    return path.partition("[")[0].lstrip(".")


def restore(copies: Copies) -> None:
    """Undo what was assigned since, except the constants that torch.fx adds."""
    for thing, before in copies:
        if isinstance(thing, list):
            thing[:] = before
            continue
        values = vars(thing) if isinstance(thing, nn.Module) else thing
        for name in [n for n in values if n not in before]:
            if not str(name).startswith(CONSTANT):
                del values[name]
        values.update(before)


def chance_state() -> tuple[Any, ...]:
    """Read the state of Python's and of NumPy's generator."""
    return random.getstate(), *_numpys_chance()


def _numpys_chance() -> tuple[Any, ...]:
    numbers: Any = np.random.get_state()  # noqa: NPY002 - a forward may use it
    return numbers[1].tobytes(), numbers[2]


@contextmanager
def chance_restored() -> Iterator[None]:
    """Restore torch's, Python's and NumPy's generators afterwards."""
    numbers = np.random.get_state()  # noqa: NPY002 - a model may use it
    before = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(before)
        np.random.set_state(numbers)  # noqa: NPY002


def draws(run: Callable[[], Any]) -> bool:
    """Say whether a function draws from Python's or NumPy's generators in this thread.

    A profiler sees this thread's calls of Python's. For NumPy's there is none, so a
    function draws if their state changes at every try.
    """
    shared = random.random.__self__  # type: ignore[attr-defined]
    drawn = []
    changes = []

    def look(frame: object, event: str, called: Any) -> None:
        del frame
        if event == "c_call" and getattr(called, "__self__", None) is shared:
            drawn.append(called)

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        for _ in range(_TRIES):
            numbers = _numpys_chance()
            run()
            changes.append(numbers != _numpys_chance())
    finally:
        sys.setprofile(before)
    return bool(drawn) or all(changes)


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """List the parts of an object in which code can keep something."""
    if isinstance(value, dict):
        yield from ((f"[{key!r}]", item) for key, item in list(dict.items(value)))
    elif isinstance(value, list | tuple):
        yield from ((f"[{index}]", item) for index, item in enumerate(value))
    elif isinstance(value, set | frozenset):
        yield from ((f"[{item}]", item) for item in sorted(map(repr, value)))
    elif isinstance(value, nn.Module):
        skipped = _SKIPPED.union(n for n in _HOOKS if not vars(value).get(n))
        yield from _attributes(value, skipped)
        yield from ((f".{name}", part) for name, part in value._modules.items())
        yield from _parts_of_class(type(value))
    elif isinstance(value, FunctionType):
        yield from _parts_of_function(value)
    elif isinstance(value, MethodType):
        yield from (("", value.__self__), ("", value.__func__))
    elif isinstance(value, torch.Generator):
        yield ".state", bytes(value.get_state().tolist())
    elif isinstance(value, GeneratorType):
        frame = value.gi_frame
        yield ".frame", None if frame is None else (frame.f_lasti, frame.f_locals)
    elif isinstance(value, type):
        yield from _parts_of_class(value)
    elif is_library(type(value)):
        yield ".state", _reduced(value)
    else:
        yield from _parts_of_instance(value)


def _parts_of_instance(value: Any) -> Iterator[tuple[str, Any]]:
    if hasattr(value, "__dict__"):
        yield from _attributes(value, set())
    for name in copyreg._slotnames(type(value)):  # type: ignore[attr-defined]
        yield f".{name}", getattr(value, name, None)
    yield from _parts_of_class(type(value))


def _attributes(value: Any, skipped: set[str]) -> Iterator[tuple[str, Any]]:
    for name, part in list(vars(value).items()):
        if name not in skipped:
            yield f".{name}", part


def _parts_of_class(kind: type) -> Iterator[tuple[str, Any]]:
    """List the attributes of a user's class, and what its methods can change."""
    for base in kind.__mro__:
        if not is_library(base):
            for name, part in list(vars(base).items()):
                if not name.startswith("__") or name in ("__init__", "__call__"):
                    inner = part.fget if isinstance(part, property) else part
                    yield f".{name}", getattr(inner, "__func__", inner)


def _parts_of_function(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """List what a user's function can change: closures, defaults and globals."""
    if is_library(function):
        return
    for name, cell in zip(
        function.__code__.co_freevars, function.__closure__ or (), strict=True
    ):
        try:
            yield f"<{name}>", cell.cell_contents
        except ValueError:
            continue  # It is not filled yet.
    yield "", (function.__defaults__, function.__kwdefaults__, vars(function))
    for name in sorted(_names(function.__code__)):
        if name in function.__globals__:
            yield f"<{name}>", function.__globals__[name]


@cache
def _names(code: CodeType) -> frozenset[str]:
    """List what code names, in strings too, and what the functions inside it name."""
    strings = (const for const in code.co_consts if isinstance(const, str))
    inner = (const for const in code.co_consts if isinstance(const, CodeType))
    return frozenset(code.co_names).union(strings, *map(_names, inner))


def names_in_code(model: nn.Module, name: str) -> bool:
    """Say whether user code that a model can reach names something."""
    return any(
        name in _names(thing.__code__)
        for thing in PythonState.of(model).reached.values()
        if isinstance(thing, FunctionType) and not is_library(thing)
    )


def _reduced(value: Any) -> Any:
    """Read a library's object as pickle would; None if it cannot be."""
    try:
        found = value.__reduce_ex__(4)
    except Exception:
        return None
    if isinstance(found, str):
        return found
    _, *parts = found
    return [
        list(part) if isinstance(part, Iterator) and index > 1 else part
        for index, part in enumerate(parts)
    ]


def is_library(thing: Any) -> bool:
    """Say whether a library that is known to keep nothing has this code."""
    return str(getattr(thing, "__module__", "")).split(".")[0] in _LIBRARIES


def _is_known(thing: Any) -> bool:
    name = getattr(thing, "__module__", None) or type(thing).__module__
    return str(name).split(".")[0] in _LIBRARIES
