"""The byte form of every request and reply: what crosses to an edge, and back.

A message is a prefix, a head and a body. The prefix has a magic word, the version, and
length and CRC-32 of the head. The head is JSON: plain values, and objects of one key,
which names a type. The body is the message's arrays as they lie in memory, in the order
in which the head mentions them, each at a multiple of 16 bytes.

Nothing is pickled. ``decode`` makes only the types that requests and replies declare,
checks every field against its annotation, and copies no array.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum
from functools import cache
from math import isfinite, prod
from struct import Struct
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints
from zlib import crc32

import numpy as np
import numpy.typing as npt

from flwr_smartsplit import errors
from flwr_smartsplit.edge import cut_moves, protocol
from flwr_smartsplit.edge.protocol import Request
from flwr_smartsplit.errors import EdgeError, RefusedMessage

Piece = bytes | memoryview
"""Bytes as a host carries them; a message is one or several in a row."""

VERSION = 1
MAX_HEAD_BYTES = 2**24
MAX_VALUES = 2**20
MAX_DIMS = 32

_MAGIC = b"SmSp"
_PREFIX = Struct("<4sIII")
_ALIGNMENT = 16
_INTEGERS = range(-(2**63), 2**64)
_PLAIN = (bool, int, float, str, NoneType)
_UNCHANGED = (bool, int, str, NoneType)
_NOT_FINITE = {repr(value): value for value in map(float, ("nan", "inf", "-inf"))}
_DTYPES = {
    dtype.newbyteorder("<").str: dtype.newbyteorder("<")
    for dtype in map(np.dtype, "?bhiqBHIQefdFD")
}
_MISFIT = object()


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_ENCODER = json.JSONEncoder(separators=(",", ":"), check_circular=False)
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
_BUILTIN_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, IndexError, KeyError),
    *(LookupError, MemoryError, NotImplementedError, OSError, RuntimeError),
    *(TypeError, ValueError),
)
_ONE_RELEASE = "use one release of flwr_smartsplit everywhere."


# --- writing --------------------------------------------------------------------------


def encode(message: Any) -> list[Piece]:
    """Write a request, a reply or an exception as bytes; large arrays are not copied.

    Returns
    -------
    list[Piece]
        The bytes, in pieces that follow each other.

    Raises
    ------
    RefusedMessage
        If the message holds a value that has no byte form.
    """
    arrays: list[npt.NDArray[np.uint8]] = []
    try:
        head = _ENCODER.encode(_written(message, arrays)).encode("ascii")
    except RecursionError as error:
        raise RefusedMessage("values lie too deep in each other.") from error
    head += b" " * (-(_PREFIX.size + len(head)) % _ALIGNMENT)
    if len(head) > MAX_HEAD_BYTES:
        raise RefusedMessage(
            f"the head of a {type(message).__name__} takes {len(head)} bytes, of "
            f"{MAX_HEAD_BYTES} allowed: send fewer names and values."
        )
    pieces: list[Piece] = [_PREFIX.pack(_MAGIC, VERSION, len(head), crc32(head)) + head]
    for array in arrays:
        pieces.append(array.data)
        if array.nbytes % _ALIGNMENT:
            pieces.append(bytes(-array.nbytes % _ALIGNMENT))
    return pieces


def _written(value: Any, arrays: list[npt.NDArray[np.uint8]]) -> Any:
    """Return a value as JSON has it, and collect the arrays in it."""
    name = type(value).__name__

    def inner(item: Any) -> Any:
        return item if type(item) in _UNCHANGED else _written(item, arrays)

    tree: Any
    match value:
        case _ if MESSAGE_TYPES.get(name) is type(value):
            hints = _hints(MESSAGE_TYPES[name])
            tree = {name: {key: inner(getattr(value, key)) for key in hints}}
        case np.ndarray() | np.generic():
            tree = {"array": _collected(np.asarray(value), arrays)}
        case float() if not isfinite(value):
            tree = {"float": repr(float(value))}
        case str() | int() | float() | None:
            tree = value
        case bytes():
            tree = {"bytes": _collected(np.frombuffer(value, np.uint8), arrays)[1][0]}
        case list():
            tree = [inner(item) for item in value]
        case tuple():
            tree = {"tuple": [inner(item) for item in value]}
        case Mapping():
            tree = {"map": [[inner(key), inner(item)] for key, item in value.items()]}
        case Exception():
            tree = {"error": _written_error(value, inner)}
        case _:
            raise RefusedMessage(
                f"a {name} cannot be sent to or from an edge: use "
                "tensors, numbers, texts, bytes, lists, tuples and mappings."
            )
    return tree


def _collected(
    array: npt.NDArray[Any], arrays: list[npt.NDArray[np.uint8]]
) -> tuple[str, list[int]]:
    """Add an array to the body; return its dtype and shape for the head."""
    kind = array.dtype.str
    if kind not in _DTYPES:
        raise RefusedMessage(
            f"an array of {array.dtype} cannot be sent: convert it to one of "
            f"{', '.join(map(str, _DTYPES.values()))}."
        )
    plain = np.require(array, requirements="C")
    arrays.append(plain.reshape(-1).view(np.uint8))
    return kind, list(array.shape)


def _written_error(error: Exception, write: Callable[[Any], Any]) -> list[Any]:
    """Name the error, or the nearest of its bases that the other end knows."""
    cls = next((c for c in type(error).__mro__ if c in _ERRORS.values()), EdgeError)
    text = str(error)
    if cls is not type(error):
        text = f"{type(error).__name__}: {text}"
    facts = {}
    for name, fact in vars(error).items():
        try:
            facts[name] = write(fact)
        except RefusedMessage:
            facts[name] = repr(fact)
    return [cls.__name__, text, facts]


# --- reading --------------------------------------------------------------------------


def decode(*pieces: Piece) -> Any:
    """Read a request, a reply or an exception; arrays are views of the bytes.

    Parameters
    ----------
    *pieces : Piece
        All bytes of one message, in one piece or as ``encode`` divided them.

    Raises
    ------
    RefusedMessage
        If the bytes are no message of this version, or a value is not what its field
        may hold. No other exception is raised, whatever the bytes are.
    """
    body = _Body([memoryview(piece) for piece in pieces if len(piece)])
    magic, version, size, checksum = _PREFIX.unpack(body.take(_PREFIX.size))
    if magic != _MAGIC:
        raise RefusedMessage(f"a message begins with {_MAGIC!r}, not {magic!r}.")
    if version != VERSION:
        raise RefusedMessage(
            f"the message has version {version}, this side reads {VERSION}: "
            + _ONE_RELEASE
        )
    if size > MAX_HEAD_BYTES:
        raise RefusedMessage(f"a head of {size} bytes; {MAX_HEAD_BYTES} are allowed.")
    head = body.take(size)
    if crc32(head) != checksum:
        raise RefusedMessage(
            "the head does not fit its checksum: it changed on the way."
        )
    text = bytes(head)
    if sum(map(text.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise RefusedMessage(f"the head has more than {MAX_VALUES} values.")
    try:
        message = _Reader(body).value(_DECODER.decode(text.decode("ascii")))
    except RecursionError as error:
        raise RefusedMessage("values lie too deep in each other.") from error
    except ValueError as error:
        raise RefusedMessage(f"the head is not JSON: {error}") from error
    body.end()
    return message


class _Body:
    """Give out bytes from the front, as views."""

    def __init__(self, pieces: list[memoryview]) -> None:
        self._pieces = pieces

    def take(self, size: int) -> memoryview:
        if size == 0:
            return memoryview(b"")
        first = self._pieces[0] if self._pieces else memoryview(b"")
        if size > len(first):
            raise RefusedMessage(
                f"{size} bytes should follow, and {len(first)} do: it was cut short."
            )
        if size == len(first):
            del self._pieces[0]
        else:
            self._pieces[0] = first[size:]
        return first[:size]

    def take_array(self, size: int) -> memoryview:
        values = self.take(size)
        if any(self.take(-size % _ALIGNMENT)):
            raise RefusedMessage("the bytes between two arrays are not 0.")
        return values

    def end(self) -> None:
        if self._pieces:
            left = sum(map(len, self._pieces))
            raise RefusedMessage(f"{left} bytes follow the end of the message.")


@dataclass(frozen=True)
class _Reader:
    """Make values of what JSON has."""

    body: _Body

    def value(self, tree: Any) -> Any:
        """Read one value, with those inside it."""
        kind = type(tree)
        if kind is dict:
            if len(tree) != 1:
                raise RefusedMessage(f"an object has one key, not {len(tree)}.")
            return self._tagged(*tree.popitem())
        if kind is list:
            return list(map(self.value, tree))
        if kind is int and tree not in _INTEGERS:
            raise RefusedMessage("an integer has more than 64 bits.")
        return tree

    def _tagged(self, tag: str, inner: Any) -> Any:
        value: Any
        match tag, inner:
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
                    f"{tag!r:.99} with a {type(inner).__name__} is nothing that this "
                    f"side knows: {_ONE_RELEASE}"
                )
        return value

    def _mapping(self, pairs: list[Any]) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for pair in pairs:
            if not isinstance(pair, list) or len(pair) != 2:  # noqa: PLR2004
                raise RefusedMessage("an entry of a mapping is no pair.")
            key, item = map(self.value, pair)
            if not isinstance(key, _PLAIN) or key in found:
                raise RefusedMessage(f"{key!r:.99} is no key, or comes twice.")
            found[key] = item
        return found

    def _array(self, dtype: str, shape: list[Any]) -> npt.NDArray[Any]:
        if dtype not in _DTYPES:
            raise RefusedMessage(
                f"arrays are of {', '.join(_DTYPES)}, not of {dtype!r:.99}."
            )
        if len(shape) > MAX_DIMS or not all(
            type(size) is int and 0 <= size < _INTEGERS.stop for size in shape
        ):
            raise RefusedMessage(f"{shape[:9]} is no shape of an array.")
        kind = _DTYPES[dtype]
        data = self.body.take_array(prod(shape) * kind.itemsize)
        try:
            return np.ndarray(shape, kind, data)
        except (ValueError, OverflowError) as error:
            raise RefusedMessage(f"{shape} is no shape of an array: {error}") from error

    def _message(self, cls: type, given: Mapping[str, Any]) -> Any:
        name, hints = cls.__name__, _hints(cls)
        parts = {key: self.value(item) for key, item in given.items()}
        unknown = sorted(parts.keys() - hints.keys())
        missing = [
            f.name
            for f in fields(cls)
            if f.name not in parts and f.default is f.default_factory is MISSING
        ]
        if unknown or missing:
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
        if name not in _ERRORS:
            raise RefusedMessage(f"{name!r:.99} is no error that may travel: {text}")
        facts = {key: self.value(item) for key, item in given.items()}
        cls: Any = _ERRORS[name]
        for key, hint in _hints(cls).items():
            facts[key] = fitted(facts.get(key), hint, f"{name}.{key}")
        error: Exception = cls(text)
        vars(error).update(facts)
        return error


# --- types ----------------------------------------------------------------------------


@cache
def _hints(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls)


@cache
def reply_hint(request: Any) -> Any:
    """Return what a class of requests declares as its reply."""
    bases = getattr(request, "__orig_bases__", ())
    return next((get_args(b)[0] for b in bases if get_origin(b) is Request), Any)


def _message_types() -> dict[str, Any]:
    """Find all requests, their replies, and what both are made of."""
    hints: list[Any] = [
        thing
        for module in (protocol, cut_moves)
        for thing in vars(module).values()
        if isinstance(thing, type) and issubclass(thing, Request)
    ]
    found: dict[str, Any] = {}
    while hints:
        hint = hints.pop()
        hints += get_args(hint)
        if not isinstance(hint, type) or not is_dataclass(hint):
            continue
        if found.get(hint.__name__) is not hint:
            if hint.__name__ in found:
                raise TypeError(f"two messages are named {hint.__name__}.")
            found[hint.__name__] = hint
            hints += [reply_hint(hint), *_hints(hint).values()]
    return found


def fitted(value: Any, hint: Any, where: str) -> Any:
    """Return a value if it is what an annotation says; an enum's member is looked up.

    Raises
    ------
    RefusedMessage
        If it is something else.
    """
    found = _fit(value, hint)
    if found is _MISFIT:
        raise RefusedMessage(f"{where} is a {type(value).__name__}, and not {hint}.")
    return found


def _fit(value: Any, hint: Any) -> Any:
    kind = type(value)
    if hint is Any or kind is hint:
        return value
    origin, args = _parts(hint)
    found: Any = _MISFIT
    if kind in args and origin is Union:
        found = value
    elif origin is Union:
        options = (_fit(value, option) for option in args)
        found = next((item for item in options if item is not _MISFIT), _MISFIT)
    elif kind is tuple and origin is tuple and args[1:] == (...,):
        items = tuple(_fit(item, args[0]) for item in value)
        found = _MISFIT if any(item is _MISFIT for item in items) else items
    elif kind is dict and origin in (Mapping, dict):
        pairs = {_fit(k, args[0]): _fit(v, args[1]) for k, v in value.items()}
        misfits = (k is _MISFIT or v is _MISFIT for k, v in pairs.items())
        found = _MISFIT if any(misfits) else pairs
    elif kind is np.ndarray and hint in (bool, int, float) and value.ndim == 0:
        found = _fit(value.item(), hint)
    elif kind is np.ndarray and origin is np.ndarray:
        (scalar,) = get_args(args[1])
        found = value if scalar in (Any, value.dtype.type) else _MISFIT
    elif kind is int and hint is float:
        found = value
    elif kind is str and isinstance(hint, type) and issubclass(hint, Enum):
        found = next((member for member in hint if member.value == value), _MISFIT)
    return found


@cache
def _parts(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    origin = get_origin(hint)
    return Union if origin is UnionType else origin, get_args(hint)


MESSAGE_TYPES: Mapping[str, Any] = _message_types()
"""Every type that ``decode`` may make, by the name that the head gives it."""

_ERRORS: Mapping[str, type[Exception]] = {
    cls.__name__: cls
    for cls in (*vars(errors).values(), *_BUILTIN_ERRORS)
    if isinstance(cls, type) and issubclass(cls, Exception)
}
