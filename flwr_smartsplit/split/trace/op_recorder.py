"""What operators write, save and cost, and whether they draw random numbers."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from flwr_smartsplit.split.fake_tensors import constants_of

_UNDECLARED = ("running_mean", "running_var")
"""Arguments that a BatchNorm writes, though its schema does not say so."""


@dataclass
class NodeFacts:
    """What the dry run saw of one node of a graph.

    ``shape`` is the value's when it was made; ``written`` the storages that the node
    wrote; ``changes_model`` whether it changed a tensor or attribute of the model, and
    ``changed_state`` the names of the state among them;
    ``saved`` the bytes of each storage saved for backward, without the model's own;
    ``num_before_saved`` how many of its ``operators`` had run when it saved last.
    """

    value: Any = None
    shape: tuple[int, ...] = ()
    written: set[int] = field(default_factory=set)
    is_random: bool = False
    changes_model: bool = False
    changed_state: set[str] = field(default_factory=set)
    operators: list[Any] = field(default_factory=list)
    flops: int = 0
    saved: dict[int, int] = field(default_factory=dict)
    num_before_saved: int = 0


class Recorder(TorchDispatchMode):
    """Record what operators do to storages, what they cost, and the random ones.

    It writes to ``facts``; ``own`` are the model's storages.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.facts = NodeFacts()
        self.own: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run the operator and record what it is declared to do."""
        kwargs = kwargs or {}
        given = itertools.zip_longest(func._schema.arguments, args)
        for argument, value in given:
            if argument is None or not _is_written(argument):
                continue
            named = kwargs.get(argument.name) if value is None else value
            self.facts.written |= storages_of(named)
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.facts.is_random = True
        result = func(*args, **kwargs)
        self.facts.operators.append(func)
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            self.facts.flops += int(count(*args, **kwargs, out_val=result))
        return result

    def note_saved(self, tensor: Tensor) -> Tensor:
        """Record that a tensor is saved for backward; return it."""
        for key in storages_of(tensor) - self.own:
            self.facts.saved[key] = tensor.untyped_storage().nbytes()
        self.facts.num_before_saved = len(self.facts.operators)
        return tensor


def _is_written(argument: Any) -> bool:
    alias = argument.alias_info
    return argument.name in _UNDECLARED or (alias is not None and alias.is_write)


def storages_of(value: Any) -> set[int]:
    """Identify the storages of a value's tensors."""
    return {
        leaf.untyped_storage()._cdata
        for leaf in tree_leaves(value)
        if isinstance(leaf, Tensor) and leaf.layout is torch.strided
    }


class StateChanges:
    """Finds out what nodes or units change of a model."""

    def __init__(self, root: nn.Module) -> None:
        self._names: dict[int, set[str]] = {}
        self._state: set[str] = set()
        for name, tensor in (
            *root.named_parameters(remove_duplicate=False),
            *root.named_buffers(remove_duplicate=False),
        ):
            self._state.add(name)
            for key in storages_of(tensor):
                self._names.setdefault(key, set()).add(name)
        self.storages = {*self._names, *storages_of([*constants_of(root).values()])}

    @contextmanager
    def noted(
        self, facts: NodeFacts, part: nn.Module | None, path: str = ""
    ) -> Iterator[None]:
        """Note in its facts what a node changes; ``part`` is its module."""
        before = attributes_of(part)
        yield
        after = attributes_of(part)
        keys = before.keys() | after.keys()
        changed = [key for key in keys if before.get(key) is not after.get(key)]
        names = {".".join(filter(None, (path, *key))) for key in changed}
        if not names <= self._state:
            # A counter, say: it may decide what is changed in another step.
            inside = f"{path}." if path else ""
            names = {name for name in self._state if name.startswith(inside)}
        written = self.storages & facts.written
        facts.changes_model = bool(changed or written)
        facts.changed_state = names.union(*(self._names.get(k, ()) for k in written))


def attributes_of(module: nn.Module | None) -> dict[tuple[str, str], Any]:
    """List the attributes, parameters and buffers of a module and its parts."""
    if module is None:
        return {}
    return {
        (prefix, name): value
        for prefix, part in module.named_modules()
        for values in (vars(part), part._parameters, part._buffers)
        for name, value in values.items()
    }
