"""The byte form of every request to an edge, and of every reply.

A message is a prefix, a head and a body. The prefix holds a magic word, the version,
and the head's length and CRC-32. The head is JSON: plain values, and objects whose one
key names a type. The body holds the message's arrays in C order, in the order in which
the head mentions them, each padded to a multiple of 16 bytes.

Nothing is pickled. ``decode`` builds only the types that requests and replies declare,
checks every field against its annotation, and copies no array.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from functools import cache, lru_cache
from math import isfinite, prod
from struct import Struct
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints
from zlib import crc32

import numpy as np
import numpy.typing as npt

from flwr_smartsplit import errors
from flwr_smartsplit.edge import cut_moves, protocol
from flwr_smartsplit.edge.protocol import Request, StrategyRequest
from flwr_smartsplit.errors import EdgeError, RefusedMessage
from flwr_smartsplit.types import Variant

Piece = bytes | memoryview  # A message is one or several in a row

VERSION = 1
MAX_HEAD_BYTES = 2**24
MAX_VALUES = 2**20
MAX_DIMS = 32

_MAGIC = b"SmSp"
_PREFIX = Struct("<4sIII")
_ALIGNMENT = 16
_INTEGERS = range(-(2**63), 2**64)
_UNCHANGED = (bool, int, str, NoneType)
_KEYS = (*_UNCHANGED, float)
_NOT_FINITE = {repr(value): value for value in map(float, ("nan", "inf", "-inf"))}
_DTYPES = {
    dtype.newbyteorder("<").str: dtype.newbyteorder("<")
    for dtype in map(np.dtype, "?bhiqBHIQefdFD")
}
_BUILTIN_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, IndexError, KeyError),
    *(LookupError, MemoryError, NotImplementedError, OSError, RuntimeError),
    *(TypeError, ValueError),
)
_ONE_RELEASE = "use one release of flwr_smartsplit everywhere."


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_ENCODER = json.JSONEncoder(separators=(",", ":"), check_circular=False)
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _refuse_if(is_wrong: bool, text: str, *numbers: int) -> None:
    if is_wrong:
        raise RefusedMessage(text.format(*numbers) if numbers else text)


def encode(message: Any) -> list[Piece]:
    """Write a request, a reply or an exception; large arrays are not copied.

    Raises ``RefusedMessage`` if the message holds a value that has no byte form.
    """
    writer = _Writer()
    try:
        head = _ENCODER.encode(writer.tree(message)).encode("ascii")
    except RecursionError as error:
        raise RefusedMessage("values are nested too deep.") from error
    head += b" " * (-(_PREFIX.size + len(head)) % _ALIGNMENT)
    _refuse_if(
        len(head) > MAX_HEAD_BYTES,
        f"the head of a {type(message).__name__} takes {len(head)} bytes, of "
        f"{MAX_HEAD_BYTES} allowed: send fewer names and values.",
    )
    prefix = _PREFIX.pack(_MAGIC, VERSION, len(head), crc32(head))
    return [prefix + head, *writer.body]


def checksum(message: Any) -> int:
    """Return a message's CRC-32, to tell a repeated one from a changed one."""
    code = 0
    for piece in encode(message):
        code = crc32(piece, code)
    return code


class _Writer:
    """Turn values into a JSON tree, and collect the arrays in them."""

    def __init__(self) -> None:
        self.body: list[Piece] = []

    def tree(self, value: Any) -> Any:
        cls: Any = type(value)
        tree = self.tree
        if cls in _UNCHANGED:
            return value
        written: Any
        match value:
            case tuple():
                written = {"tuple": list(map(tree, value))}
            case Variant():
                parts = value.to_lists()
                written = {cls.__name__: {key: tree(x) for key, x in parts.items()}}
            case _ if cls in _MESSAGE_CLASSES:
                parts = {key: tree(getattr(value, key)) for key in _hints(cls)}
                written = {cls.__name__: parts}
            case np.ndarray() | np.generic():
                written = {"array": self._array(np.asarray(value))}
            case float() if not isfinite(value):
                written = {"float": repr(float(value))}
            case str() | int() | float():
                written = value
            case bytes():
                written = {"bytes": self._array(np.frombuffer(value, np.uint8))[1][0]}
            case list():
                written = list(map(tree, value))
            case dict() | Mapping():
                written = {"map": [[tree(k), tree(item)] for k, item in value.items()]}
            case Exception():
                written = {"error": self._error(value)}
            case _:
                raise RefusedMessage(
                    f"a {cls.__name__} cannot be sent to or from an edge: use "
                    "tensors, numbers, texts, bytes, lists, tuples and mappings."
                )
        return written

    def _array(self, array: npt.NDArray[Any]) -> tuple[str, list[int]]:
        if array.dtype.str not in _DTYPES:
            raise RefusedMessage(
                f"an array of {array.dtype} cannot be sent: convert it to one of "
                f"{', '.join(map(str, _DTYPES.values()))}."
            )
        plain = array if array.flags.c_contiguous else array.copy()
        self.body.append(plain.reshape(-1).view(np.uint8).data)
        if plain.nbytes % _ALIGNMENT:
            self.body.append(bytes(-plain.nbytes % _ALIGNMENT))
        return array.dtype.str, list(array.shape)

    def _error(self, error: Exception) -> list[Any]:
        """Name the error, or its nearest base that the other end knows."""
        cls = next((c for c in type(error).__mro__ if c in _ERRORS.values()), EdgeError)
        text = str(error) if cls is type(error) else f"{type(error).__name__}: {error}"
        facts = {}
        for name, fact in vars(error).items():
            size = len(self.body)
            try:
                facts[name] = self.tree(fact)
            except RefusedMessage:
                del self.body[size:]
                facts[name] = repr(fact)
        return [cls.__name__, text, facts]


def decode(*pieces: Piece) -> Any:
    """Read a request, a reply or an exception; arrays are views of the bytes.

    The pieces are as ``encode`` returned them, or joined. If they are not a message of
    this version, or a field is invalid, ``RefusedMessage`` is raised, and nothing else.
    """
    reader = _Reader([view for view in map(_view, pieces) if len(view)])
    magic, version, size, code = _PREFIX.unpack(reader.take(_PREFIX.size))
    _refuse_if(magic != _MAGIC, f"a message begins with {_MAGIC!r}, not {magic!r}.")
    _refuse_if(
        version != VERSION,
        f"the message has version {version}, this side reads {VERSION}: {_ONE_RELEASE}",
    )
    _refuse_if(
        size > MAX_HEAD_BYTES, f"a head of {size} bytes; {MAX_HEAD_BYTES} are allowed."
    )
    head = bytes(reader.take(size))
    _refuse_if(crc32(head) != code, "the head does not match its checksum.")
    num_values = sum(map(head.count, (b",", b"[", b"{")))
    _refuse_if(num_values > MAX_VALUES, f"the head has more than {MAX_VALUES} values.")
    try:
        message = reader.value(_DECODER.decode(head.decode("ascii")))
    except RecursionError as error:
        raise RefusedMessage("values are nested too deep.") from error
    except ValueError as error:
        raise RefusedMessage(f"the head is not JSON: {error}") from error
    left = sum(map(len, reader.pieces))
    _refuse_if(left > 0, f"{left} bytes follow the end of the message.")
    return message


def _view(piece: Any) -> memoryview:
    is_buffer = isinstance(piece, bytes | bytearray | memoryview | np.ndarray)
    view = memoryview(piece) if is_buffer else memoryview(b"")
    is_flat = view.format == "B" and view.ndim == 1 and view.contiguous
    if not is_buffer or not is_flat:
        raise RefusedMessage(f"a message is bytes, and not a {type(piece).__name__}.")
    return view


class _Reader:
    """Build values from a JSON tree, and their arrays from the bytes of the body."""

    def __init__(self, pieces: list[memoryview]) -> None:
        self.pieces = pieces

    def take(self, size: int) -> memoryview:
        """Return the next bytes as a view; they are in one piece."""
        first = self.pieces.pop(0) if size and self.pieces else memoryview(b"")
        text = "{} bytes should follow, and {} do: it was cut short."
        _refuse_if(size > len(first), text, size, len(first))
        if size < len(first):
            self.pieces.insert(0, first[size:])
        return first[:size]

    def value(self, tree: Any) -> Any:
        kind = type(tree)
        if kind is dict:
            _refuse_if(len(tree) != 1, "an object has one key, not {}.", len(tree))
            return self._tagged(*tree.popitem())
        if kind is list:
            return list(map(self.value, tree))
        if kind is int and tree not in _INTEGERS:
            raise RefusedMessage("an integer has more than 64 bits.")
        return tree

    def _tagged(self, tag: str, inner: Any) -> Any:
        value: Any
        match tag, inner:
            case "Variant", dict():
                value = self._variant(inner)
            case _, dict() if tag in MESSAGE_TYPES:
                value = self._message(MESSAGE_TYPES[tag], inner)
            case "tuple", list():
                value = tuple(map(self.value, inner))
            case "array", [str() as dtype, list() as shape]:
                value = self._array(dtype, shape)
            case "map", list():
                value = self._mapping(inner)
            case "float", str() if inner in _NOT_FINITE:
                value = _NOT_FINITE[inner]
            case "bytes", int():
                value = self._array("|u1", [inner]).tobytes()
            case "error", [str() as name, str() as text, dict() as facts]:
                value = self._error(name, text, facts)
            case _:
                raise RefusedMessage(
                    f"{tag!r:.99} with a {type(inner).__name__} is unknown here: "
                    + _ONE_RELEASE
                )
        return value

    def _variant(self, given: Mapping[str, Any]) -> Variant:
        try:
            parts = {key: self.value(item) for key, item in given.items()}
            return Variant.from_lists(parts)
        except ValueError as error:
            raise RefusedMessage(f"Variant: {error}") from error

    def _mapping(self, pairs: list[Any]) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for pair in pairs:
            is_pair = isinstance(pair, list) and len(pair) == 2  # noqa: PLR2004
            _refuse_if(not is_pair, "an entry of a mapping is no pair.")
            key, item = map(self.value, pair)
            is_key = isinstance(key, _KEYS) and key not in found
            _refuse_if(not is_key, f"{key!r:.99} is no key, or comes twice.")
            found[key] = item
        return found

    def _array(self, dtype: str, shape: list[Any]) -> npt.NDArray[Any]:
        if dtype not in _DTYPES:
            raise RefusedMessage(
                f"arrays are of {', '.join(_DTYPES)}, not of {dtype!r:.99}."
            )
        is_shape = len(shape) <= MAX_DIMS and all(
            type(size) is int and 0 <= size < _INTEGERS.stop for size in shape
        )
        _refuse_if(not is_shape, f"{shape[:9]} is no shape of an array.")
        num_bytes = prod(shape) * _DTYPES[dtype].itemsize
        data, padding = self.take(num_bytes), self.take(-num_bytes % _ALIGNMENT)
        _refuse_if(any(padding), "the bytes between two arrays are not 0.")
        try:
            return np.ndarray(shape, _DTYPES[dtype], data)
        except (ValueError, OverflowError) as error:
            raise RefusedMessage(f"{shape} is no shape of an array: {error}") from error

    def _message(self, cls: type, given: Mapping[str, Any]) -> Any:
        name, hints = cls.__name__, _hints(cls)
        parts = {key: self.value(item) for key, item in given.items()}
        if not _required(cls) <= parts.keys() <= hints.keys():
            unknown = sorted(parts.keys() - hints.keys())
            missing = [key for key in hints if key in _required(cls) - parts.keys()]
            raise RefusedMessage(
                f"{name} has fields {', '.join(hints)}; unknown: {unknown[:9]}, "
                f"missing: {missing}: {_ONE_RELEASE}"
            )
        for key, part in parts.items():
            if type(part) is not hints[key]:
                parts[key] = fitted(part, hints[key], f"{name}.{key}")
        try:
            return cls(**parts)
        except ValueError as error:
            raise RefusedMessage(f"{name}: {error}") from error

    def _error(self, name: str, text: str, given: Mapping[str, Any]) -> Exception:
        may_travel = name in _ERRORS
        _refuse_if(not may_travel, f"{name!r:.99} is no error that may travel: {text}")
        facts = {key: self.value(item) for key, item in given.items()}
        cls: Any = _ERRORS[name]
        for key, hint in _hints(cls).items():
            facts[key] = fitted(facts.get(key), hint, f"{name}.{key}")
        error: Exception = cls(text)
        vars(error).update(facts)
        return error


def fitted(value: Any, hint: Any, where: str) -> Any:  # noqa: PLR0911 - a list of cases
    """Return a value of the annotated type, or refuse it; find an enum's member."""
    kind = type(value)
    if hint is Any or kind is hint:
        return value
    origin, args = _parts_of(hint)
    if origin in (Union, UnionType):
        if kind in args:
            return value
        for option in args:
            with suppress(RefusedMessage):
                return fitted(value, option, where)
    elif kind is tuple and origin is tuple and args[1:] == (...,):
        item_hint = args[0]
        return tuple([fitted(item, item_hint, where) for item in value])
    elif kind is dict and origin in (Mapping, dict):
        key, item = args
        return {fitted(k, key, where): fitted(v, item, where) for k, v in value.items()}
    elif kind is np.ndarray and hint in (bool, int, float) and value.ndim == 0:
        return fitted(value.item(), hint, where)
    elif kind is np.ndarray and scalar_type(hint) in (Any, value.dtype.type):
        return value
    elif kind is int and hint is float:
        return value
    elif kind is str and isinstance(hint, type) and issubclass(hint, Enum):
        with suppress(ValueError):
            return hint(value)
    raise RefusedMessage(f"{where} is a {kind.__name__}, and not {hint}.")


def scalar_type(hint: Any) -> Any:
    """Return what an annotated array holds; None where no array is annotated."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is np.ndarray:
        return get_args(args[1])[0]
    # Since NumPy 2.5, NDArray is an alias of its own, with the scalar as its argument.
    return args[0] if args and origin is get_origin(npt.NDArray[Any]) else None


@cache
def _hints(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls)


@cache
def _required(cls: Any) -> frozenset[str]:
    """Name the fields that have no default."""
    all_fields = fields(cls)
    has_none = (f.name for f in all_fields if f.default is f.default_factory is MISSING)
    return frozenset(has_none)


@lru_cache(maxsize=1024)
def _parts_of(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    return get_origin(hint), get_args(hint)


@cache
def reply_hint(request: Any) -> Any:
    """Return what a class of requests declares as its reply."""
    kinds = (Request, StrategyRequest)
    bases = getattr(request, "__orig_bases__", ())
    return next((get_args(b)[0] for b in bases if get_origin(b) in kinds), Any)


def _message_types() -> dict[str, Any]:
    """Find all requests, their replies, and what both are made of."""
    hints: list[Any] = [
        thing
        for module in (protocol, cut_moves)
        for thing in vars(module).values()
        if isinstance(thing, type)
        and issubclass(thing, Request)
        and thing is not StrategyRequest
    ]
    found: dict[str, Any] = {}
    while hints:
        hint = hints.pop()
        hints += get_args(hint)
        if isinstance(hint, type) and is_dataclass(hint) and hint not in found.values():
            if found.setdefault(hint.__name__, hint) is not hint:
                raise TypeError(f"two messages are named {hint.__name__}.")
            hints += [reply_hint(hint), *_hints(hint).values()]
    return found


MESSAGE_TYPES: Mapping[str, Any] = _message_types()
"""Every type that ``decode`` may build, by its name in the head."""

_MESSAGE_CLASSES = frozenset(MESSAGE_TYPES.values())

_ERRORS: Mapping[str, type[Exception]] = {
    cls.__name__: cls
    for cls in (*vars(errors).values(), *_BUILTIN_ERRORS)
    if isinstance(cls, type) and issubclass(cls, Exception)
}
