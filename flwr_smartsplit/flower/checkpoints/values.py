"""Values as JSON and arrays, and back. Nothing is pickled.

A value becomes a tree: plain JSON, and objects whose one key names a type. Its arrays
go into a mapping beside it, under names that say what they are.
"""

import enum
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from logging import Logger
from pathlib import PurePath
from random import Random
from types import MethodType, ModuleType
from typing import Any, get_args, get_type_hints

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.common import Parameters

from flwr_smartsplit.errors import SmartSplitError
from flwr_smartsplit.flower.serde.records import from_array_record, to_array_record
from flwr_smartsplit.plan.selection.history import History
from flwr_smartsplit.types import Failure, Variant

Arrays = dict[str, npt.NDArray[Any]]

_PLAIN = (bool, int, float, str, type(None))
_IN_SAFETENSORS = {np.dtype(kind).str for kind in "?bhiqBHIQefdF"}
_SEQUENCES = {kind.__name__: kind for kind in (tuple, set, frozenset)}
_MAPPINGS = {kind.__name__: kind for kind in (dict, OrderedDict, Counter)}
_RECORDS = {kind.__name__: kind for kind in (MetricRecord, ConfigRecord)}
_HARMLESS = (type, ModuleType, Logger, PurePath, enum.Enum)


class NotKept(SmartSplitError):
    """A value has no form in a checkpoint."""


def _types_in(*hints: Any) -> dict[str, Any]:
    """Find the dataclasses and enums that annotations name, and those inside them."""
    found: dict[str, Any] = {}
    left = list(hints)
    while left:
        hint = left.pop()
        left += get_args(hint)
        is_ours = is_dataclass(hint) or (
            isinstance(hint, type) and issubclass(hint, enum.Enum)
        )
        if is_ours and hint.__name__ not in found:
            found[hint.__name__] = hint
            left += get_type_hints(hint).values() if is_dataclass(hint) else ()
    return found


_TYPES = _types_in(History, Failure, Parameters, Variant)


def to_tree(value: Any, arrays: Arrays, path: str) -> Any:
    """Write a value, its arrays under names that begin with ``path``."""
    kind, name = type(value), type(value).__name__
    written: Any

    def inner(part: Any, key: object) -> Any:
        return to_tree(part, arrays, f"{path}.{key}")

    if kind in _PLAIN:
        return value
    if kind is list:
        return [inner(each, index) for index, each in enumerate(value)]
    if isinstance(value, np.ndarray | np.generic):
        written = _array(np.asarray(value), arrays, path)
        return {"array" if isinstance(value, np.ndarray) else "number": written}
    if isinstance(value, torch.Tensor) and not value.is_sparse:
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        dtype = str(value.dtype).removeprefix("torch.")
        return {"tensor": [inner(flat.numpy(), dtype), dtype, list(value.shape)]}
    if kind is bytes:
        written = to_tree(np.frombuffer(value, np.uint8), arrays, path)
    elif _SEQUENCES.get(name) is kind:
        written = inner(list(value), name)
    elif _MAPPINGS.get(name) is kind or _RECORDS.get(name) is kind:
        pairs = enumerate(value.items())
        written = [[inner(k, f"key {i}"), inner(v, k)] for i, (k, v) in pairs]
    elif kind is ArrayRecord:
        written = to_tree(from_array_record(value), arrays, path)
    elif _TYPES.get(name) is kind and is_dataclass(kind):
        each = (field.name for field in fields(kind))
        written = {key: inner(getattr(value, key), key) for key in each}
    elif _TYPES.get(name) is kind:
        written = value.value
    else:
        raise NotKept(f"{path} is a {name}, which a checkpoint cannot hold.")
    return {name: written}


def _array(array: npt.NDArray[Any], arrays: Arrays, path: str) -> list[Any]:
    """Store an array as it is if safetensors knows its dtype, else as bytes."""
    if array.dtype.hasobject:
        raise NotKept(f"{path} is an array of objects: a checkpoint cannot hold it.")
    while path in arrays:
        path += "'"
    flat = np.require(array, requirements="C").reshape(-1)
    is_known = array.dtype.str in _IN_SAFETENSORS
    arrays[path] = flat.reshape(array.shape) if is_known else flat.view(np.uint8)
    return [path, array.dtype.str, list(array.shape)]


def from_tree(  # noqa: PLR0911 - a list of cases
    tree: Any, arrays: Mapping[str, npt.NDArray[Any]]
) -> Any:
    """Read what ``to_tree`` wrote; arrays are copies, which may be changed."""
    if type(tree) is list:
        return [from_tree(each, arrays) for each in tree]
    if type(tree) is not dict:
        return tree
    ((tag, inner),) = tree.items()
    value: Any
    if tag in {"array", "number"}:
        name, dtype, shape = inner
        value = arrays[name].reshape(-1).view(dtype).reshape(shape).copy()
        return value if tag == "array" else value[()]
    if tag == "tensor":
        flat, dtype = from_tree(inner[0], arrays), getattr(torch, inner[1])
        tensor = torch.empty(inner[2], dtype=dtype)
        if flat.size:
            tensor.reshape(-1).view(torch.uint8).copy_(torch.from_numpy(flat))
        return tensor
    if _TYPES.get(tag) and is_dataclass(_TYPES[tag]):
        return _TYPES[tag](**{k: from_tree(v, arrays) for k, v in inner.items()})
    value = from_tree(inner, arrays)
    if tag == "bytes":
        return value.tobytes()
    if tag in _MAPPINGS | _RECORDS:
        return (_MAPPINGS | _RECORDS)[tag](dict(map(tuple, value)))
    if tag == "ArrayRecord":
        return to_array_record(value)
    return (_SEQUENCES | _TYPES)[tag](value)


# --- what changes in objects ----------------------------------------------------------

_Holder = tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]


def _holder(value: Any) -> _Holder | None:
    """Return how to read and to set the state of an object that has one of its own."""
    if isinstance(value, Random):
        return Random.getstate, Random.setstate
    if isinstance(value, np.random.Generator):
        return lambda g: g.bit_generator.state, _set_bits
    if isinstance(value, torch.Generator):
        return torch.Generator.get_state, torch.Generator.set_state
    if not isinstance(value, type) and hasattr(value, "load_state_dict"):
        kind = type(value)
        return kind.state_dict, kind.load_state_dict
    return None


def _set_bits(generator: np.random.Generator, state: Any) -> None:
    generator.bit_generator.state = state


def object_tree(thing: Any, arrays: Arrays, path: str) -> tuple[Any, list[str]]:
    """Write what an object holds now, and list the attributes that are left out.

    An object with ``state_dict`` and ``load_state_dict`` says itself what that is. Of
    any other, its attributes are written: plain data, arrays, random generators, and
    objects with a ``state_dict``.
    """
    thing = thing.__self__ if isinstance(thing, MethodType) else thing
    holder = _holder(thing)
    if holder is not None:  # What is in it, its author can change.
        return {"held": to_tree(holder[0](thing), arrays, path)}, []
    written, left_out = {}, []
    for name, value in _attributes(thing).items():
        holder, size = _holder(value), len(arrays)
        held = value if holder is None else holder[0](value)
        try:
            tree = to_tree(held, arrays, f"{path}.{name}")
        except NotKept:
            for orphan in [*arrays][size:]:
                del arrays[orphan]
            if not _is_harmless(value):
                left_out.append(f"{path}.{name} ({type(value).__name__})")
        else:
            written[name] = [holder is not None, tree]
    return {"attributes": written}, left_out


def set_object(thing: Any, tree: Any, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Give an object what ``object_tree`` wrote.

    Tensors are changed in place, since an optimizer may hold them, too.
    """
    thing = thing.__self__ if isinstance(thing, MethodType) else thing
    if "held" in tree:
        holder = _holder(thing)
        assert holder is not None
        holder[1](thing, from_tree(tree["held"], arrays))
        return
    attributes = _attributes(thing)
    for name, (is_held, inner) in tree["attributes"].items():
        value, now = from_tree(inner, arrays), attributes.get(name)
        holder = _holder(now) if is_held else None
        if holder is not None:
            holder[1](now, value)
        elif isinstance(now, torch.Tensor) and isinstance(value, torch.Tensor):
            now.data = value.to(now.device)
        else:
            attributes[name] = value


def _attributes(thing: Any) -> dict[str, Any]:
    return {} if isinstance(thing, type) else getattr(thing, "__dict__", {})


def _is_harmless(value: Any) -> bool:
    """Say whether a value that is not kept cannot change: code, names, frozen ones."""
    settings: Any = getattr(type(value), "__dataclass_params__", None)
    is_frozen = settings is not None and settings.frozen
    is_code = callable(value) and not getattr(value, "__dict__", None)
    return is_code or is_frozen or isinstance(value, _HARMLESS)
