"""Build a task's model as a template: its parameters have shapes, and no memory.

``model_fn`` runs with every parameter on the meta device from its registration on.
Where that would change what it builds, it runs as ever, and its parameters are emptied
when it is done: the whole model then takes its memory for that moment.
"""

import hashlib
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from logging import getLogger
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parameter import UninitializedTensorMixin
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flwr_smartsplit.errors import InvalidTask, NotSplittable
from flwr_smartsplit.split.description import Describer, layout_of, values_of
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
        self.problems: list[str] = []
        self._num_other = num_other
        self._used: dict[int, list[tuple[Any, tuple[int, int], str]]] = {}

    def empty(self, name: str, param: Tensor | None) -> None:
        """Free one parameter's memory."""
        if param is None or _is_lazy(param) or param.layout is not torch.strided:
            return
        self._note_memory(name, param)
        if param.is_meta:
            return
        with torch.no_grad():
            empty = torch.empty_like(param, device="meta")
            empty.requires_grad_(param.requires_grad)
            torch._C._swap_tensor_impl(param, empty)  # type: ignore[attr-defined]
        self._note_memory(name, param)
        if self._num_other:
            torch.rand(self._num_other)

    def _note_memory(self, name: str, param: Tensor) -> None:
        """Note two parameters in the same memory, which would get memory each."""
        storage = param.untyped_storage()
        start = param.storage_offset() * param.element_size()
        stop = start + num_spanned(tuple(param.shape), param.stride()) * (
            param.element_size()
        )
        others = self._used.setdefault(storage._cdata, [])
        self.problems += [
            f"{name} and {other} are two parameters in the same memory: assign one "
            "parameter to both attributes"
            for (held, owner), (low, high), other in others
            if not held.expired() and owner() is not param
            if low < stop and start < high
        ]
        held = StorageWeakRef(storage), weakref.ref(param)
        others.append((held, (start, stop), name))


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
            emptier.empty(name, param)
        register(module, name, param)

    with building:
        nn.Module.register_parameter = register_on_meta  # type: ignore
        try:
            yield
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]


def template_of(task: Task) -> tuple[nn.Module, str]:
    """Build a task's model without parameters' values; also return its mark.

    Two models with one mark differ in nothing but the values of their state. Torch's
    generator is left as it was. Raises ``InvalidTask`` if the model cannot be built, or
    has something that a place that builds a part of it would lose.
    """
    try:
        model, findings = _built_on_meta(task.model_fn)
        lost = findings.on_meta
        why = f"{lost[0]} is computed from them" if lost else ""
    except InvalidTask:
        raise
    except _NeedsValues as error:
        why = str(error)
    except Exception as error:
        why = f"without them it fails: {type(error).__name__}: {error}".splitlines()[0]
    if why:
        model, findings = _built_with_values(task.model_fn, why)
    findings.refuse()
    return model, findings.mark


def _built_on_meta(model_fn: Callable[[], nn.Module]) -> tuple[nn.Module, "_Findings"]:
    def build(num_other: int = 0) -> tuple[nn.Module, _Findings, int]:
        emptier, draws = _Emptier(num_other), _Draws(num_other)
        with torch.random.fork_rng(devices=[]), parameters_on_meta(emptier), draws:
            model = _checked(model_fn())
        return model, _Findings(model, emptier), draws.count

    model, findings, num_draws = build()
    for turn in range(_NUM_OTHER_DRAWS if num_draws else 0):
        if build(turn + 1)[1].mark != findings.mark:
            raise _NeedsValues("it draws random constants after them")
    return model, findings


def _built_with_values(
    model_fn: Callable[[], nn.Module], why: str
) -> tuple[nn.Module, "_Findings"]:
    try:
        with building, torch.random.fork_rng(devices=[]):
            model = _checked(model_fn())
    except InvalidTask:
        raise
    except Exception as error:
        raise InvalidTask(
            f"model_fn fails: {type(error).__name__}: {str(error).rstrip('.')}."
        ) from error
    num_bytes = sum(p.nbytes for p in model.parameters() if not _is_lazy(p))
    findings = _Findings(model, _Emptier())
    _log.warning(
        "model_fn of %s needs the values of its parameters (%s): each process that "
        "trains a part of it holds all %d bytes of them while it builds.",
        type(model).__name__,
        why,
        num_bytes,
    )
    return model, findings


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


def _is_lazy(tensor: Tensor | None) -> bool:
    return isinstance(tensor, UninitializedTensorMixin)


class _NeedsValues(Exception):
    """A model is another one without its parameters' values."""


class _Draws(TorchDispatchMode):
    """Count draws of values, and draw others where a parameter on meta draws none."""

    def __init__(self, num_other: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._num_other = num_other
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operator."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags:
            if any(leaf.is_meta for leaf in tree_leaves(result)):
                torch.rand(self._num_other, generator=kwargs.get("generator"))
            else:
                self.count += 1
        return result


class _PartDescriber(Describer):
    """Also tells of modules that a function holds."""

    def __init__(
        self, tensor: Callable[[Tensor], Any], held: Callable[[str], None]
    ) -> None:
        super().__init__(tensor)
        self._held = held

    def _object(self, value: Any) -> Any:
        is_held = self.in_function and not self.in_global
        if is_held and isinstance(value, nn.Module):
            self._held(f"a {type(value).__name__}")
        return super()._object(value)


class _Findings:
    """What a built model consists of, besides the values of its state.

    ``mark`` identifies it, ``on_meta`` names what has no values though it is no state.
    """

    def __init__(self, model: nn.Module, emptier: _Emptier) -> None:
        for module in model.modules():
            for name, parameter in module._parameters.items():
                emptier.empty(name, parameter)
        self.model = model
        self.on_meta: list[str] = []
        self._problems = emptier.problems
        self._state = {id(t): name for name, t in reversed([*_named(model)])}
        self._where = ""
        self._describe = _PartDescriber(self._described, self._function_holds)
        facts: list[Any] = []
        for prefix, module in model.named_modules():
            self._where = prefix
            facts.append((prefix, self._describe(type(module))))
            unsaved = {
                n: module._buffers[n] for n in module._non_persistent_buffers_set
            }
            for name, value in {**vars(module), **unsaved}.items():
                if name not in ("training", "_parameters", "_buffers", "_modules"):
                    self._where = f"{prefix}.{name}".lstrip(".")
                    facts.append((name, self._describe(value)))
        facts += [
            (name, *layout_of(tensor), tensor.requires_grad)
            for name, tensor in _named(model)
            if not _is_lazy(tensor)
        ]
        self.mark = hashlib.sha256(repr(facts).encode()).hexdigest()

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

    def _function_holds(self, what: str) -> None:
        self._problems.append(
            f"{self._where} is a function that holds {what}, and a part that is built "
            "has another one: let the function take it as an argument"
        )

    def refuse(self) -> None:
        """Raise for what a place that builds a part of the model would lose."""
        if not any(_is_lazy(tensor) for _, tensor in _named(self.model)):
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


def _problems_of(tensor: Tensor) -> Iterator[str]:
    """Say what of a tensor of the state would be lost."""
    if _is_lazy(tensor):
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
