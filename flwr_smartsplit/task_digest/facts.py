"""What a task is made of, as named texts that are alike wherever the task is alike.

Client, edge and strategy each build the task from their own code. They compare these
texts before anything is trained, since a part trained by another loss, learning rate or
precision would go unnoticed. There are no addresses, paths or hashes of Python in them.
"""

import hashlib
import json
import sys
import uuid
from collections.abc import Mapping
from dataclasses import fields
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from flwr_smartsplit.errors import InvalidTask
from flwr_smartsplit.task import Task
from flwr_smartsplit.task_digest.describer import PACKAGE, Describer, sha
from flwr_smartsplit.task_digest.torch_settings import torch_settings

Facts = Mapping[str, str]
"""Texts by the name of a field, such as ``optimizer_fn.lr``."""

_COPY = "copy of "
_OF_A_PLACE = (_COPY, "torch.cud")  # Of a machine, or its accelerator
_EXAMPLES = ("example_inputs", "example_targets")
_MOST_SHOWN = 3
_ByPackages = dict[frozenset[str], Describer]
_known_models: "WeakKeyDictionary[nn.Module, _ByPackages]" = WeakKeyDictionary()


def task_facts(
    task: Task, model: nn.Module, *, is_anew: bool = False
) -> dict[str, str]:
    """Describe a task; ``model`` is one that its ``model_fn`` built.

    Code counts by what it does: a user's own functions and classes with their bytecode,
    closures, defaults and the globals they use; a library's by its version. Values of
    parameters and of saved buffers do not count, since the strategy sends them. What
    functions refer to counts as this process first saw it, or ``is_anew`` as it is.
    """
    describe = Describer(_own_packages(task), is_anew=is_anew)
    for field in fields(task):
        value = getattr(task, field.name)
        if field.name in _EXAMPLES:
            value = tree_map(_example_text, value)
        describe(field.name, value)
    found = _model_facts(task, model, is_anew=is_anew)
    return {
        **_versions(describe.libraries | found.libraries),
        **{f"torch.{name}": str(value) for name, value in torch_settings().items()},
        **describe.facts,
        **found.facts,
    }


def _model_facts(task: Task, model: nn.Module, *, is_anew: bool) -> Describer:
    """Describe a model: once, since it is a template, unless ``is_anew``.

    Tasks that share it may have other packages of their own.
    """
    own = _own_packages(task)
    known = {} if is_anew else _known_models.setdefault(model, {})
    if own not in known:
        known[own] = Describer(own, is_anew=is_anew)
        known[own].model(model)
    return known[own]


def all_facts(task: Task, model: nn.Module, *, is_anew: bool = False) -> dict[str, str]:
    """Describe a task and the copies of its packages, to be compared at the start."""
    return {**task_facts(task, model, is_anew=is_anew), **code_copies(task)}


def settings_facts(task: Task, settings: Mapping[str, Any]) -> dict[str, str]:
    """Describe what else a run is made of, as ``task_facts`` describes its task."""
    describe = Describer(_own_packages(task))
    for name, value in settings.items():
        describe(name, value)
    return describe.facts


def facts_digest(facts: Facts) -> str:
    """Identify a task by SHA-256 over what it is made of, wherever it is."""
    known = [item for item in facts.items() if not item[0].startswith(_OF_A_PLACE)]
    return sha(json.dumps(sorted(known)))


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
    return sha(text)[:8]


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
    return name.startswith(_OF_A_PLACE) and not is_in_both


# --- versions and packages ------------------------------------------------------------


def _versions(libraries: set[str]) -> dict[str, str]:
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    found = {"version.python": python}
    for name in sorted({PACKAGE, "torch", *libraries}):
        # What follows a plus says for which device it was built.
        found[f"version.{name}"] = _version(name).partition("+")[0]
    return found


@cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return str(getattr(sys.modules.get(package), "__version__", "unknown"))


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
        *("numpy", "flwr", PACKAGE),
    }


def _example_text(tensor: Any) -> str:
    """Describe one example of a batch; values and their number do not matter."""
    if not isinstance(tensor, Tensor):
        return type(tensor).__name__
    return f"{tensor.dtype} {tuple(tensor.shape[1:])} strides {tensor.stride()[1:]}"
