"""What a task is made of, as named texts that are alike wherever the task is alike.

Client, edge and strategy each build the task from their own code. They compare these
texts before anything is trained, since a part trained by another loss, learning rate or
precision would go unnoticed. There are no addresses, paths or hashes of Python in them.
"""

import dis
import enum
import hashlib
import json
import re
import sys
import sysconfig
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from flwr_smartsplit.errors import InvalidTask
from flwr_smartsplit.task import Task

Facts = Mapping[str, str]
"""Texts by the name of a field, such as ``optimizer_fn.lr``."""

_PACKAGE = __name__.partition(".")[0]
_COPY = "copy of "
_EXAMPLES = ("example_inputs", "example_targets")
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.Size)
_LONGEST_TEXT = 80
_MOST_SHOWN = 3
_BY_VALUE = (nn.Parameter, Tensor, np.ndarray)


def task_facts(task: Task, model: nn.Module) -> dict[str, str]:
    """Describe a task; ``model`` is one that its ``model_fn`` built.

    Code counts by what it does: a user's own functions and classes with their bytecode,
    closures, defaults and the globals they use; a library's by its version. Values of
    parameters and of saved buffers do not count, since the strategy sends them.
    """
    describe = _Describer(_own_packages(task))
    for field in fields(task):
        value = getattr(task, field.name)
        if field.name in _EXAMPLES:
            value = tree_map(_example_text, value)
        describe(field.name, value)
    describe.model(model)
    return {
        **_versions(describe.libraries),
        **{f"torch.{name}": str(value) for name, value in torch_settings().items()},
        **describe.facts,
    }


def digest_of(facts: Facts) -> str:
    """Identify a task by SHA-256 over what it is made of."""
    own = ((n, text) for n, text in facts.items() if not n.startswith(_COPY))
    return _sha(json.dumps(sorted(own)))


def code_copies(task: Task) -> dict[str, str]:
    """Say which copy of the task's own packages this machine's process has imported.

    Only two on one machine are compared: the folder counts if the content differs.
    """
    found = {}
    for package in sorted(_own_packages(task)):
        start = getattr(sys.modules.get(package), "__file__", None)
        if start is not None and Path(start).name == "__init__.py":
            folder = Path(start).resolve().parent
            content = hashlib.sha256()
            for path in sorted(folder.rglob("*.py")):
                content.update(path.relative_to(folder).as_posix().encode())
                content.update(path.read_bytes())
            name = f"{_COPY}{package} on {_machine()}"
            found[name] = f"{folder} #{content.hexdigest()[:12]}"
    return found


@cache
def _machine() -> str:
    """Identify this machine among others, and tell nothing else of it."""
    try:
        text = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        text = str(uuid.getnode())
    return _sha(text)[:8]


def require_same_task(facts: Facts, wanted: Facts, *, whose: str) -> None:
    """Raise ``InvalidTask`` with the fields that differ from the strategy's."""
    names = [n for n in [*wanted, *facts] if facts.get(n) != wanted.get(n)]
    names = [n for n in dict.fromkeys(names) if not _is_elsewhere(n, facts, wanted)]
    if not names:
        return
    shown = "; ".join(
        f"{name} is {facts.get(name, 'missing')} there and "
        f"{wanted.get(name, 'missing')} in the strategy"
        for name in names[:_MOST_SHOWN]
    )
    more = f"; and {len(names) - _MOST_SHOWN} more" if len(names) > _MOST_SHOWN else ""
    raise InvalidTask(
        f"{whose} has another task than the strategy: {shown}{more}. Give every place "
        "the same Task, code, versions and settings of torch. (If the code was changed "
        "or copied: a process that runs still, such as a SuperLink, may have imported "
        "the old one; stop it and start again.)"
    )


def _is_elsewhere(name: str, one: Facts, other: Facts) -> bool:
    """Say whether a field is of a machine or device that one of the two is not on."""
    is_in_both = name in one and name in other
    if name.startswith(_COPY) and is_in_both:
        sides = zip(*(x[name].rpartition(" ")[::2] for x in (one, other)), strict=True)
        return any(mine == theirs for mine, theirs in sides)
    return name.startswith(("torch.cud", _COPY)) and not is_in_both


# --- torch's settings -----------------------------------------------------------------


def torch_settings() -> dict[str, Any]:
    """Read the process-wide settings of torch that change numbers."""
    return {name: get() for name, get, _ in _settings()}


def apply_torch_settings(settings: Mapping[str, Any]) -> None:
    """Set this process as another one is set, as far as torch can be set from here."""
    for name, get, put in _settings():
        if name in settings and get() != settings[name]:
            put(settings[name])


def _settings() -> Iterator[tuple[str, Callable[[], Any], Callable[[Any], object]]]:
    """Yield each setting's name, and how to read and write it."""
    of = torch.backends
    yield "default_dtype", torch.get_default_dtype, torch.set_default_dtype
    yield (
        "deterministic_algorithms",
        torch.get_deterministic_debug_mode,
        torch.set_deterministic_debug_mode,
    )
    yield (
        "float32_matmul_precision",
        _matmul_precision,
        torch.set_float32_matmul_precision,
    )
    yield "flush_denormal", _flushes_denormal, torch.set_flush_denormal
    yield (
        "mkldnn.enabled",
        torch._C._get_mkldnn_enabled,
        torch._C._set_mkldnn_enabled,
    )
    yield (
        "mha_fastpath",
        of.mha.get_fastpath_enabled,
        of.mha.set_fastpath_enabled,
    )
    for kind in ("flash", "mem_efficient", "math"):
        read = getattr(of.cuda, f"{kind}_sdp_enabled")
        yield f"{kind}_attention", read, getattr(of.cuda, f"enable_{kind}_sdp")
    parts = ["mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn"]
    names = [(f"{part}.fp32_precision", "none") for part in parts]
    names.append(("mkldnn.deterministic", "False"))
    if torch.cuda.is_available():
        names += [
            *((f"cudnn.{n}", "") for n in ("enabled", "benchmark", "deterministic")),
            *((f"cudnn.{n}.fp32_precision", "none") for n in ("conv", "rnn")),
            ("cuda.matmul.fp32_precision", "none"),
            ("cuda.matmul.allow_fp16_reduced_precision_reduction", ""),
            ("cuda.matmul.allow_bf16_reduced_precision_reduction", ""),
        ]
    for name, default in names:
        *path, last = name.split(".")
        owner: Any = of
        for part in path:
            owner = getattr(owner, part, None)
        yield (
            name,
            partial(getattr, owner, last, default),
            partial(setattr, owner, last),
        )


def _matmul_precision() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # Set in part by torch's newer names, which are read below.
        return "mixed"


def _flushes_denormal() -> bool:
    tiny = torch.tensor(1e-310, dtype=torch.float64)
    return bool((tiny * 1 == 0).item())


# --- versions and libraries -----------------------------------------------------------


def _versions(libraries: set[str]) -> dict[str, str]:
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    found = {"version.python": python}
    for name in sorted({_PACKAGE, "torch", *libraries}):
        # What follows a plus says for which device it was built.
        found[f"version.{name}"] = _version(name).partition("+")[0]
    return found


@cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return str(getattr(sys.modules.get(package), "__version__", "unknown"))


@cache
def _is_installed(package: str) -> bool:
    """Say whether a top-level package is a library: installed, or Python's own."""
    if package in sys.stdlib_module_names or package in {_PACKAGE, "torch", "numpy"}:
        return True
    path = getattr(sys.modules.get(package), "__file__", None)
    if path is None:
        return False
    folders = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    parents = Path(path).resolve().parents
    return any(Path(folder).resolve() in parents for folder in folders)


def _own_packages(task: Task) -> frozenset[str]:
    """Name the packages of the task's own functions, wherever they are installed."""
    found = set()
    for field in fields(task):
        function = getattr(task, field.name)
        while isinstance(function, partial):
            function = function.func
        package = str(getattr(function, "__module__", "")).partition(".")[0]
        if package and not _has_version(package):
            found.add(package)
    return frozenset(found)


def _has_version(package: str) -> bool:
    return package in sys.stdlib_module_names or package in {
        *("torch", "torchvision", "torchaudio", "transformers", "timm", "peft"),
        *("numpy", "flwr", _PACKAGE),
    }


# --- values ---------------------------------------------------------------------------


def _sha(text: str | bytes) -> str:
    data = text.encode(errors="backslashreplace") if isinstance(text, str) else text
    return hashlib.sha256(data).hexdigest()


def _short(text: str) -> str:
    """Keep a text that people can read; identify a longer one by its beginning."""
    if len(text) <= _LONGEST_TEXT:
        return text
    return f"{text[: _LONGEST_TEXT // 2]}... #{_sha(text)[:12]}"


def _example_text(tensor: Any) -> str:
    """Describe one example of a batch; values and their number do not matter."""
    if not isinstance(tensor, Tensor):
        return type(tensor).__name__
    return f"{tensor.dtype} {tuple(tensor.shape[1:])} strides {tensor.stride()[1:]}"


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
    return f"{text} #{_sha(np.ascontiguousarray(value).tobytes())[:12]}"


def _name(thing: Any) -> str:
    return str(getattr(thing, "__qualname__", type(thing).__qualname__))


class _Describer:
    """Collect facts about functions, objects and containers, by their place in a task.

    What cannot be looked into counts by its type.
    """

    def __init__(self, own: frozenset[str]) -> None:
        self.facts: dict[str, str] = {}
        self.libraries: set[str] = set()
        self._own = own
        self._known: set[int] = set()  # Code is described once, where it comes first.
        self._open: set[int] = set()  # What is being described, against circles.

    def __call__(self, path: str, value: Any) -> None:
        """Describe a value and what it holds."""
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, _PLAIN):
            self.facts[path] = _short(repr(value))
        elif isinstance(value, _BY_VALUE):
            self.facts[path] = _tensor_text(value)
        elif isinstance(value, ModuleType):
            self.facts[path] = f"module {value.__name__}"
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
            within = _Describer(self._own)
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
        elif hasattr(value, "__dict__"):
            self._code(path, type(value))
            self._settings(path, value)
        else:
            self._code(path, type(value))
            self.facts[path] += f" {_plain_text(value)}"

    def _settings(self, path: str, value: Any) -> None:
        """Describe an object's attributes; a module's own bookkeeping left out."""
        is_module = isinstance(value, nn.Module)
        for key, each in sorted(vars(value).items()):
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
            self.facts[path] = (
                f"{_name(value)} #{_sha(repr(_parts(value.__code__)))[:12]}"
            )
            if id(value) not in self._known:
                self._known.add(id(value))
                self._function(path, value)

    def _function(self, path: str, function: FunctionType) -> None:
        cells = zip(
            function.__code__.co_freevars, function.__closure__ or (), strict=True
        )
        for name, cell in cells:
            try:
                self(f"{path}.{name}", cell.cell_contents)
            except ValueError:  # It has no value yet.
                self.facts[f"{path}.{name}"] = "empty"
        for index, each in enumerate(function.__defaults__ or ()):
            self(f"{path}.default[{index}]", each)
        for name, each in sorted((function.__kwdefaults__ or {}).items()):
            self(f"{path}.{name}", each)
        for name, each in _globals_of(function.__code__, function.__globals__).items():
            self(f"{path}.{name}", each)

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

    def _is_own(self, thing: Any) -> bool:
        package = str(getattr(thing, "__module__", "")).partition(".")[0]
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


def _globals_of(code: CodeType, known: Mapping[str, Any]) -> dict[str, Any]:
    """Find the globals that code uses, and what it takes from modules among them."""
    found: dict[str, Any] = {}
    path, value = "", None
    for step in dis.get_instructions(code):
        if step.opname in {"LOAD_GLOBAL", "LOAD_NAME"} and step.argval in known:
            path, value = str(step.argval), known[step.argval]
        elif step.opname in {"LOAD_ATTR", "LOAD_METHOD"} and isinstance(
            value, ModuleType
        ):
            path = f"{path}.{step.argval}"
            value = getattr(value, str(step.argval), None)
        else:
            value = None
            continue
        if not isinstance(value, ModuleType):
            found[path], value = value, None
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found |= _globals_of(constant, known)
    return dict(sorted(found.items()))
