"""Build a task's model as a template: its parameters have shapes, and no memory.

``model_fn`` runs with every parameter on the meta device from its registration on.
Where that would change what it builds, it runs as ever, and its parameters are emptied
when it is done: the whole model then takes its memory for that moment.
"""

import hashlib
import random
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from itertools import combinations, zip_longest
from logging import getLogger
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flwr_smartsplit.errors import InvalidTask, NotSplittable
from flwr_smartsplit.split.description import PartDescriber, layout_of, values_of
from flwr_smartsplit.split.layout import num_spanned
from flwr_smartsplit.task import Task

building = threading.RLock()
"""Held while models are built: ``nn.Module`` is changed for all threads."""

_log = getLogger("flwr")
_NUM_OTHER_DRAWS = 3
_FORWARD_HOOKS = (
    *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
)
_GRADIENT_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


class _Emptier:
    """Frees parameters' memory in place: whoever holds a parameter still does.

    ``num_other`` other random numbers are drawn whenever a parameter may miss its own.
    """

    def __init__(self, num_other: int = 0) -> None:
        self._num_other = num_other
        self._used: dict[int, list[tuple[Any, ...]]] = {}

    def empty(self, param: Tensor | None) -> None:
        """Free one parameter's memory."""
        if param is None or is_lazy(param) or param.layout is not torch.strided:
            return
        self._note_memory(param)
        if param.is_meta:
            return
        with torch.no_grad():
            empty = torch.empty_like(param, device="meta")
            empty.requires_grad_(param.requires_grad)
            torch._C._swap_tensor_impl(param, empty)
        self._note_memory(param)
        if self._num_other:
            torch.rand(self._num_other)

    def _note_memory(self, param: Tensor) -> None:
        storage, size = param.untyped_storage(), param.element_size()
        start = param.storage_offset() * size
        stop = start + num_spanned(tuple(param.shape), param.stride()) * size
        # As long as it is referred to, no other storage gets this number.
        note = start, stop, weakref.ref(param), StorageWeakRef(storage)
        self._used.setdefault(storage._cdata, []).append(note)

    def shared_memory(self, names: Mapping[int, str]) -> Iterator[tuple[str, str]]:
        """Find parameters, by identity, that were made in the same memory."""
        for notes in self._used.values():
            known = [
                (names[id(owner())], start, stop)
                for start, stop, owner, _ in notes
                if owner() is not None and id(owner()) in names
            ]
            for (one, start, stop), (two, low, high) in combinations(known, 2):
                if one != two and start < high and low < stop:
                    yield one, two


@contextmanager
def parameters_on_meta(emptier: _Emptier | None = None) -> Iterator[None]:
    """Move every parameter registered in this thread to the meta device, in place."""
    register = nn.Module.register_parameter
    thread = threading.get_ident()
    emptier = emptier or _Emptier()

    def register_on_meta(
        module: nn.Module, name: str, param: nn.Parameter | None
    ) -> None:
        if threading.get_ident() == thread:
            emptier.empty(param)
        register(module, name, param)

    with building:
        nn.Module.register_parameter = register_on_meta  # type: ignore
        try:
            yield
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]


def template_of(task: Task, known: str = "") -> tuple[nn.Module, str]:
    """Build a task's model without parameters' values; also return its mark.

    Two models with one mark differ in nothing but the values of their state; one with a
    ``known`` mark is built once. Generators are left as they were. Raises
    ``InvalidTask`` if the model cannot be built, or has something that a place that
    builds a part of it would lose.
    """
    try:
        model, findings = _built_on_meta(task.model_fn, known)
        lost = findings.on_meta
        why = f"{lost[0]} is computed from them" if lost else ""
    except InvalidTask:
        raise
    except _NeedsValues as error:
        why = str(error)
    except Exception as error:
        why = f"without them it fails: {type(error).__name__}: {error}".splitlines()[0]
    if why:
        model, findings = _built_with_values(task.model_fn, why, known)
    findings.refuse()
    return model, findings.mark


def _built_on_meta(
    model_fn: Callable[[], nn.Module], known: str
) -> tuple[nn.Module, "_Findings"]:
    def build(turn: int = 0) -> tuple[nn.Module, _Findings, bool]:
        emptier, draws = _Emptier(turn), _Draws(turn)
        with _own_chance(turn) as has_drawn, parameters_on_meta(emptier), draws:
            model = _checked(model_fn())
            drew = draws.count > 0 or has_drawn()
        if draws.lacks:
            raise _NeedsValues(f"{draws.lacks} does nothing without them")
        return model, _Findings(model, emptier), drew

    model, findings, drew = build()
    is_new = findings.mark != known
    for turn in range(1, _NUM_OTHER_DRAWS + 1) if drew and is_new else ():
        if build(turn)[1].mark != findings.mark:
            raise _NeedsValues("it draws constants")
    return model, findings


def _built_with_values(
    model_fn: Callable[[], nn.Module], why: str, known: str
) -> tuple[nn.Module, "_Findings"]:
    def build(turn: int = 0) -> tuple[nn.Module, _Findings, int]:
        with building, _own_chance(turn):
            model = _checked(model_fn())
        num_bytes = sum(p.nbytes for p in model.parameters() if not is_lazy(p))
        return model, _Findings(model, _Emptier()), num_bytes

    try:
        model, findings, num_bytes = build()
        _warn(type(model).__name__, why, num_bytes)
        findings.refuse()
        is_new = findings.mark != known
        for turn in range(1, _NUM_OTHER_DRAWS + 1) if is_new else ():
            findings.compare(build(turn)[1])
    except (InvalidTask, NotSplittable):
        raise
    except Exception as error:
        raise InvalidTask(
            f"model_fn fails: {type(error).__name__}: {str(error).rstrip('.')}."
        ) from error
    return model, findings


@contextmanager
def _own_chance(turn: int) -> Iterator[Callable[[], bool]]:
    """Leave all generators as they were; from turn 1 on, begin with other numbers.

    Yields a function that says whether Python's or NumPy's generator has been used.
    """

    def state() -> tuple[Any, ...]:
        numpys: Any = np.random.get_state()  # noqa: NPY002 - a model_fn may use it
        return random.getstate(), numpys

    def has_drawn() -> bool:
        (python, numpys), (old, olds) = state(), before
        is_numpy = numpys[2] != olds[2] or not np.array_equal(numpys[1], olds[1])
        return bool(python != old) or is_numpy

    outside = before = state()
    with torch.random.fork_rng(devices=[]):
        try:
            if turn:
                torch.manual_seed(turn)
                random.seed(turn)
                np.random.seed(turn)  # noqa: NPY002
                before = state()
            yield has_drawn
        finally:
            random.setstate(outside[0])
            np.random.set_state(outside[1])  # noqa: NPY002


@cache
def _warn(name: str, why: str, num_bytes: int) -> None:
    """Warn once in a process."""
    _log.warning(
        "model_fn of %s needs the values of its parameters (%s): each process that "
        "trains a part of it holds all %d bytes of them while it builds.",
        name,
        why,
        num_bytes,
    )


def _checked(model: Any) -> nn.Module:
    if isinstance(model, torch.jit.ScriptModule | torch._dynamo.OptimizedModule):
        raise InvalidTask(
            f"model_fn returns a {type(model).__name__}, which cannot be built in "
            "parts: return the module itself, without torch.compile or torch.jit."
        )
    if not isinstance(model, nn.Module):
        raise InvalidTask(
            f"model_fn returns a {type(model).__name__}: return an nn.Module."
        )
    return model


class _NeedsValues(Exception):
    """A model is another one without its parameters' values."""


class _Draws(TorchDispatchMode):
    """Count draws of values, and draw others where a parameter on meta draws none.

    It notes what does not run on meta: torch's parametrizations ignore that.
    """

    def __init__(self, num_other: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._num_other = num_other
        self.count = 0
        self.lacks = ""  # An operator that needs values; its caller may go on without.

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operator."""
        kwargs = kwargs or {}
        try:
            result = func(*args, **kwargs)
        except NotImplementedError:
            self.lacks = str(func)
            raise
        if torch.Tag.nondeterministic_seeded in func.tags:
            if any(leaf.is_meta for leaf in tree_leaves(result)):
                torch.rand(self._num_other, generator=kwargs.get("generator"))
            else:
                self.count += 1
        return result


class _Findings:
    """What a built model consists of, besides the values of its state.

    ``mark`` identifies it, ``on_meta`` names what has no values though it is no state.
    """

    def __init__(self, model: nn.Module, emptier: _Emptier) -> None:
        for module in model.modules():
            for parameter in module._parameters.values():
                emptier.empty(parameter)
        self.model = model
        self.on_meta: list[str] = []
        self._state = {id(t): name for name, t in reversed([*_named(model)])}
        self._problems = [
            f"{one} and {two} are two parameters in the same memory: assign one "
            "parameter to both attributes"
            for one, two in emptier.shared_memory(self._state)
        ]
        self._where = ""
        self._describe = PartDescriber(self._described, self._held, self._lock)
        facts: list[tuple[str, Any]] = []
        for prefix, module in model.named_modules():
            self._where = prefix
            facts.append((prefix, self._describe(type(module))))
            unsaved = {
                n: module._buffers[n] for n in module._non_persistent_buffers_set
            }
            for name, value in {**vars(module), **unsaved}.items():
                if name not in ("training", "_parameters", "_buffers", "_modules"):
                    self._where = f"{prefix}.{name}".lstrip(".")
                    facts.append((self._where, self._describe(_unnumbered(value))))
        facts += [
            (name, (*layout_of(tensor), tensor.requires_grad))
            for name, tensor in _named(model)
            if not is_lazy(tensor)
        ]
        self._facts = [(name, _digest(fact)) for name, fact in facts]
        self.mark = _digest(self._facts)

    def _described(self, tensor: Tensor) -> Any:
        """Describe a tensor that an attribute holds, and note what is wrong with it."""
        where, describe = self._where, self._describe
        name = self._state.get(id(tensor))
        if describe.in_global:
            return layout_of(tensor)
        if name is not None:
            if describe.in_function:
                self._function_holds(name)
            return "state", name
        if isinstance(tensor, nn.Parameter):
            self._problems.append(
                f"{where} holds a parameter that is not registered: assign it to an "
                "attribute of its module, too"
            )
        elif tensor.grad_fn is not None:
            self._problems.append(
                f"{where} is computed from parameters in model_fn: detach it, or "
                "compute it in forward"
            )
        elif tensor.is_meta:
            self.on_meta.append(where)
        else:
            return values_of(tensor)
        return layout_of(tensor)

    def _held(self, module: nn.Module) -> Any:
        """Describe a module that an attribute or a function holds."""
        if self._describe.in_function:
            self._function_holds(f"a {type(module).__name__}")
        if any(module is each for each in self.model.modules()):
            return "module"
        tensors = [*module.parameters(), *module.buffers()]
        if any(tensor.is_meta for tensor in tensors):
            self.on_meta.append(self._where)
            return "without values"
        return [values_of(tensor) for tensor in tensors]

    def _lock(self) -> None:
        self._problems.append(
            f"{self._where} is a lock, which cannot be copied: keep it in a global "
            "variable"
        )

    def compare(self, other: "_Findings") -> None:
        """Raise ``InvalidTask`` if another call of ``model_fn`` built another model."""
        for mine, others in zip_longest(self._facts, other._facts):
            if mine != others:
                name = (mine or others)[0]
                raise InvalidTask(
                    f"{name or type(self.model).__name__} is another one each time "
                    "model_fn is called, so that each place would have its own: seed "
                    "what draws it in model_fn, or register it as a buffer."
                )

    def _function_holds(self, what: str) -> None:
        self._problems.append(
            f"{self._where} is a function that holds {what}, and a part that is built "
            "has another one: let the function take it as an argument"
        )

    def refuse(self) -> None:
        """Raise for what a place that builds a part of the model would lose."""
        if not any(is_lazy(tensor) for _, tensor in _named(self.model)):
            _refuse_hooks(self.model)  # A lazy layer has some of its own.
        problems = [f"{name} has no values" for name in self.on_meta]
        problems += [
            f"{name or type(module).__name__} has an extra state, which is not sent: "
            "register a buffer"
            for name, module in self.model.named_modules()
            if type(module).get_extra_state is not nn.Module.get_extra_state
        ]
        for name, tensor in _named(self.model):
            problems += [f"{name} {what}" for what in _problems_of(tensor)]
        problems = list(dict.fromkeys([*self._problems, *problems]))
        if problems:
            more = f" ({len(problems)} problems in all)" if problems[1:] else ""
            raise InvalidTask(
                f"{type(self.model).__name__} cannot be built in parts: "
                f"{problems[0]}.{more}"
            )


def _unnumbered(value: Any) -> Any:
    """Drop the numbers of a module's hooks: torch counts all that it ever had."""
    is_numbered = isinstance(value, OrderedDict) and all(
        isinstance(key, int) for key in value
    )
    return [*value.values()] if is_numbered else value


def _digest(fact: Any) -> str:
    return hashlib.sha256(repr(fact).encode()).hexdigest()


def _problems_of(tensor: Tensor) -> Iterator[str]:
    """Say what of a tensor of the state would be lost."""
    if is_lazy(tensor):
        yield "has no shape yet: call the model once on an example in model_fn"
        return
    kind = type(tensor)
    if isinstance(tensor, nn.Parameter) and kind is not nn.Parameter:
        yield (
            f"is a {kind.__name__}, a kind of parameter that is not kept: make it an "
            "nn.Parameter, and set what it needs as an attribute of it"
        )
    if any(getattr(tensor, hooks, None) for hooks in _GRADIENT_HOOKS):
        yield (
            "has a gradient hook, which is not kept: change gradients in a hook of the "
            "optimizer (register_step_pre_hook), or in forward"
        )
    if tensor.layout is not torch.strided:
        yield f"is {tensor.layout}: use a dense tensor"
    elif not _is_in_numpy(tensor.dtype):
        dtype = str(tensor.dtype).removeprefix("torch.")
        yield (
            f"is {dtype}, which NumPy does not have; Flower sends NumPy arrays. Use "
            "float32 or float16"
        )
    elif tensor.dtype is torch.complex128:
        yield (
            "is complex128, which the safetensors files of an edge do not have: use "
            "complex64"
        )


@cache
def _is_in_numpy(dtype: torch.dtype) -> bool:
    try:
        torch.empty(0, dtype=dtype).numpy()
    except (TypeError, RuntimeError):
        return False
    return True


def _refuse_hooks(model: nn.Module) -> None:
    """Raise ``NotSplittable`` for what is called beside a module's own forward.

    A trace may lose it, and a dry run would call it.
    """
    for name, module in model.named_modules():
        found = [h for kind in _FORWARD_HOOKS for h in getattr(module, kind).values()]
        if not found and "forward" not in vars(module):
            continue
        own = {type(hook).__module__ for hook in found}
        advice = "Do in forward what it does."
        if own & {"torch.nn.utils.weight_norm", "torch.nn.utils.spectral_norm"}:
            advice = "Use torch.nn.utils.parametrizations, which needs no hook."
        raise NotSplittable(
            f"{type(model).__name__} cannot be built in parts: the forward of "
            f"{name or 'the model'} ({type(module).__name__}) is changed by a hook or "
            f"on the instance. {advice}"
        )


def _named(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name the parameters and the saved buffers, those with several names each time."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        unsaved = module._non_persistent_buffers_set
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in unsaved:
                yield f"{prefix}.{name}".lstrip("."), tensor
