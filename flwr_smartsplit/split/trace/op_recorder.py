"""What operators write, save and cost, and whether they draw random numbers."""

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from flwr_smartsplit.split.trace.expressions import STATISTICS


@dataclass
class NodeFacts:
    """What the dry run saw of one node of a graph.

    ``shape`` is the value's when it was made; ``written`` the storages that the node
    wrote; ``changed_state`` names the state that it changes or may change;
    ``saved`` the bytes of each storage saved for backward, without the model's own;
    ``num_before_saved`` how many of its ``operators`` had run when it saved last;
    ``fills_saved`` whether it wrote a tensor that was saved before, in ``places``;
    ``repeats`` whether a second run computes the same and changes nothing; ``changed``
    names what it changes that is no tensor of the model, with the object it is in, of
    all that it ``reached``; ``rereads`` the trained parameters that it reads without a
    gradient.
    """

    value: Any = None
    shape: tuple[int, ...] = ()
    written: set[int] = field(default_factory=set)
    is_random: bool = False
    changed_state: set[str] = field(default_factory=set)
    operators: list[Any] = field(default_factory=list)
    flops: int = 0
    saved: dict[int, int] = field(default_factory=dict)
    num_before_saved: int = 0
    repeats: bool = True
    places: set[Any] = field(default_factory=set)
    fills_saved: bool = False
    writes_inputs: bool = False
    changed: dict[str, int] = field(default_factory=dict)
    reached: frozenset[int] = frozenset()
    rereads: set[str] = field(default_factory=set)


class Recorder(TorchDispatchMode):
    """Record what operators do to storages, what they cost, and the random ones.

    It writes to ``facts``; ``own`` are the model's storages, ``trained`` the names of
    those that are trained.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.facts = NodeFacts()
        self.own: set[int] = set()
        self.trained: dict[int, str] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run the operator and record what it is declared to do."""
        kwargs = kwargs or {}
        given = list(itertools.zip_longest(func._schema.arguments, args))
        is_fixed = any(a and a.name == "training" and v is False for a, v in given)
        for argument, value in given:
            if argument is None or not _is_written(argument):
                continue
            if is_fixed and argument.name in STATISTICS:  # A BatchNorm in evaluation
                continue
            named = kwargs.get(argument.name) if value is None else value
            self.facts.written |= storages_of(named)
            # RReLU's noise. Torch ends a rerun when all is saved, before it is filled.
            self.facts.fills_saved |= not _places(named).isdisjoint(self.facts.places)
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.facts.is_random = True
        self._note_rereads(tree_leaves((args, kwargs)))
        result = func(*args, **kwargs)
        self.facts.operators.append(func)
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            self.facts.flops += int(count(*args, **kwargs, out_val=result))
        return result

    def _note_rereads(self, values: list[Any]) -> None:
        """Note trained parameters of which a value is read without a gradient."""
        for value in values:
            if isinstance(value, Tensor) and not (
                value.requires_grad and torch.is_grad_enabled()
            ):
                keys = storages_of(value) & self.trained.keys()
                self.facts.rereads |= {self.trained[key] for key in keys}

    def note_saved(self, tensor: Tensor) -> Tensor:
        """Record that a tensor is saved for backward; return it."""
        for key in storages_of(tensor) - self.own:
            self.facts.places |= _places(tensor)
            self.facts.saved[key] = tensor.untyped_storage().nbytes()
        self.facts.num_before_saved = len(self.facts.operators)
        return tensor


def _is_written(argument: Any) -> bool:
    alias = argument.alias_info
    return argument.name in STATISTICS or (alias is not None and alias.is_write)


def storages_of(value: Any) -> set[int]:
    """Identify the storages of a value's tensors."""
    return {
        leaf.untyped_storage()._cdata
        for leaf in tree_leaves(value)
        if isinstance(leaf, Tensor) and leaf.layout is torch.strided
    }


def _places(value: Any) -> set[Any]:
    """List where in memory tensors are."""
    return {
        (key, leaf.storage_offset(), leaf.shape, leaf.stride())
        for leaf in tree_leaves(value)
        if isinstance(leaf, Tensor)
        for key in storages_of(leaf)
    }
