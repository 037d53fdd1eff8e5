"""What operators do: the storages they write, and whether they draw numbers."""

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class NodeFacts:
    """What the dry run saw of one node of a graph."""

    value: Any = None
    shape: tuple[int, ...] = ()
    written: set[int] = field(default_factory=set)
    is_random: bool = False


class Recorder(TorchDispatchMode):
    """Note the storages that operators write, and the random operators."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.facts = NodeFacts()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the operator and note what it is declared to do."""
        kwargs = kwargs or {}
        given = itertools.zip_longest(func._schema.arguments, args)
        for argument, value in given:
            if argument is None or argument.alias_info is None:
                continue
            if argument.alias_info.is_write:
                named = kwargs.get(argument.name) if value is None else value
                self.facts.written |= storages_of(named)
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.facts.is_random = True
        return func(*args, **kwargs)


def storages_of(value: Any) -> set[int]:
    """Identify the storages of a value's tensors."""
    return {
        leaf.untyped_storage()._cdata
        for leaf in tree_leaves(value)
        if isinstance(leaf, Tensor) and leaf.layout is torch.strided
    }
