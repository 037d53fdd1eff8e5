"""Plans and profiles to Flower records and back. Replies are in replies.py.

Flower's two APIs lay out the same contents differently. Ours travel as scalars in one
record, because legacy clients accept nothing else.
"""

import base64
import json
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from flwr_smartsplit.errors import RefusedReply
from flwr_smartsplit.types import (
    ClientPlan,
    Cohort,
    Constraints,
    DeviceProfile,
    DeviceTraits,
    Link,
    RecomputePlan,
    Route,
    Variant,
    codec_from,
    codec_values,
)
from flwr_smartsplit.types.sizes import plain

Arrays = Mapping[str, npt.NDArray[Any]]
Scalar = bool | bytes | float | int | str
Scalars = dict[str, Any]  # Flower's own types are invariant.
RecordT = TypeVar("RecordT", ArrayRecord, ConfigRecord)

ARRAYS = "arrays"
CONFIG = "config"
OURS = "smartsplit"
PARTITION = "partition-id"
PROFILE_ACTION = "smartsplit_profile"

_PREFIX = "smartsplit."
_PLAN = f"{_PREFIX}plan"
_BYTES = f"{_PREFIX}bytes"
_TASK = "task"
_MOST_FACTS_BYTES = 2**22
_NO_BUDGET = -1
_MOST_CLASSES = 10_000
"""A client that claims more would widen the tables of all others."""
_TOO_MANY = 2**53


@dataclass(frozen=True, slots=True)
class RecordLayout:
    """One API's type of a profile request, and its keys of arrays and config."""

    name: str
    profile_type: str
    train_keys: tuple[str, str]
    evaluate_keys: tuple[str, str]


LEGACY = RecordLayout(
    name="NumPyClient",
    profile_type="get_properties",
    train_keys=("fitins.parameters", "fitins.config"),
    evaluate_keys=("evaluateins.parameters", "evaluateins.config"),
)


def message_layout(arrays_key: str = ARRAYS, config_key: str = CONFIG) -> RecordLayout:
    """Make the Message API's layout, with the strategy's record keys."""
    keys = arrays_key, config_key
    return RecordLayout("Message API", f"query.{PROFILE_ACTION}", keys, keys)


def last_line(reason: object) -> str:
    """Return the last line of an error's text, without colours."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(reason))
    lines = [line.strip().removesuffix("'>") for line in text.splitlines()]
    return next(filter(None, reversed(lines)), "no reason given")


# --- arrays -----------------------------------------------------------------------


def to_array_record(state: Arrays) -> ArrayRecord:
    """Put named arrays into a record, in their order."""
    return ArrayRecord({name: Array(array) for name, array in state.items()})


def from_array_record(record: ArrayRecord) -> dict[str, npt.NDArray[Any]]:
    """Read named arrays from a record."""
    return {name: array.numpy() for name, array in record.items()}


def records_of(content: RecordDict, kind: type[RecordT]) -> list[RecordT]:
    """List a message's records of one kind.

    Flower's ``content.array_records`` does so too, but checks each type anew.
    """
    return [record for record in content.values() if isinstance(record, kind)]


def config_of(content: RecordDict) -> Scalars:
    """Join a message's config records, whatever keys they have."""
    config: Scalars = {}
    for record in records_of(content, ConfigRecord):
        config |= dict(record)
    return config


def arrays_of(content: RecordDict) -> dict[str, npt.NDArray[Any]]:
    """Join a message's array records, whatever keys they have."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    for record in records_of(content, ArrayRecord):
        arrays |= from_array_record(record)
    return arrays


def record_bytes(content: RecordDict) -> int:
    """Count a message's payload in bytes: arrays and text."""
    records = records_of(content, ArrayRecord)
    arrays = sum(len(array.data) for record in records for array in record.values())
    return arrays + sum(map(text_bytes, records_of(content, ConfigRecord)))


def text_bytes(scalars: Mapping[str, Any]) -> int:
    """Count the payload of scalars in bytes: text only, as numbers are headers."""
    return sum(len(each) for each in scalars.values() if isinstance(each, str | bytes))


# --- profiles ---------------------------------------------------------------------


def profile_to_scalars(profile: DeviceProfile) -> Scalars:
    """Write a profile as scalars."""
    budget, eval_size = profile.budget_bytes, profile.eval_batch_size
    return {
        **({} if eval_size is None else {"eval-batch-size": eval_size}),
        **({"keeps-local": True} if profile.keeps_local else {}),
        "client-key": profile.client_key,
        "budget-bytes": _NO_BUDGET if budget is None else budget,
        "num-examples": profile.num_examples,
        "batch-size": profile.batch_size,
        "num-epochs": profile.num_epochs,
        "traits": json.dumps(asdict(profile.traits)),
    }


def facts_to_scalars(facts: Mapping[str, str]) -> Scalars:
    """Write what a task is made of: much of it repeats, so compressed."""
    return {_TASK: zlib.compress(json.dumps(facts).encode())}


def facts_from_scalars(scalars: Mapping[str, Any]) -> dict[str, str]:
    """Read what a client's task is made of; RefusedReply if that makes no sense."""
    try:
        data = zlib.decompressobj().decompress(scalars[_TASK], _MOST_FACTS_BYTES)
        return {str(key): str(text) for key, text in json.loads(data).items()}
    except (AttributeError, KeyError, TypeError, ValueError, zlib.error) as error:
        raise RefusedReply(
            f"the client's answer does not say what its task is ({error!r:.80}): use "
            "one version of flwr-smartsplit everywhere.",
            kind="refused",
        ) from error


def profile_from_content(content: RecordDict) -> DeviceProfile:
    """Read a profile from a reply in either layout."""
    return profile_from_scalars(config_of(content))


def profile_from_scalars(scalars: Mapping[str, Any]) -> DeviceProfile:
    """Read a profile; RefusedReply if something is missing or makes no sense."""
    try:
        budget = int(scalars["budget-bytes"])
        if budget < _NO_BUDGET:
            raise ValueError("a budget below 0")
        size = scalars.get("eval-batch-size")
        return DeviceProfile(
            client_key=str(scalars["client-key"]),
            budget_bytes=None if budget == _NO_BUDGET else budget,
            num_examples=_count("num-examples", scalars["num-examples"]),
            batch_size=_count("batch-size", scalars["batch-size"]),
            num_epochs=_count("num-epochs", scalars.get("num-epochs", 1)),
            keeps_local=bool(scalars.get("keeps-local", False)),
            eval_batch_size=None if size is None else _count("eval-batch-size", size),
            traits=_traits(json.loads(str(scalars.get("traits", "{}")))),
        )
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise RefusedReply(
            f"the client's profile lacks or misspells {error}; it has "
            f"{sorted(scalars)}. Wrap the client in SmartSplitNumPyClient.",
            kind="refused",
        ) from error


def _count(name: str, value: Any) -> int:
    """Read a count of at least 1; a JSON number is exact below 2**53."""
    count = int(value)
    if not 1 <= count < _TOO_MANY:
        raise ValueError(f"{name} {str(count)[:40]}, of which there is at least 1")
    return count


def _traits(values: dict[str, Any]) -> DeviceTraits:
    """Read a device's traits; raise for unknown or impossible ones."""
    link, counts = values.pop("link", None), values.pop("label_counts", None)
    links = dict(values.pop("edge_links", {}))
    if counts is not None and len(counts) > _MOST_CLASSES:
        raise ValueError(f"label counts of {len(counts)} classes")
    return DeviceTraits(
        link=None if link is None else Link(**link),
        edge_links={str(edge): Link(**each) for edge, each in links.items()},
        label_counts=None if counts is None else tuple(map(int, counts)),
        **values,
    )


# --- plans ------------------------------------------------------------------------


def config_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """List what a user's config says, for ``Task.schedule_fn``; none of it is ours."""
    return {
        name: list(value) if isinstance(value, list | tuple) else value
        for name, value in config.items()
        if not name.startswith(_PREFIX)
    }


def plan_to_scalars(plan: ClientPlan) -> Scalars:
    """Write a plan as one JSON text without its default values."""
    given = ((field, getattr(plan, field.name)) for field in fields(plan))
    values = {
        field.name: _WRITE.get(field.name, _as_it_is)(value)
        for field, value in given
        if value != field.default
    }
    return {_PLAN: json.dumps(values, default=_as_json)}


def _as_json(value: Any) -> Any:
    """Write what JSON lacks: bytes, and numbers of other libraries."""
    if isinstance(value, bytes):
        return {_BYTES: base64.b64encode(value).decode()}
    return plain(value)


def _from_json(values: dict[str, Any]) -> Any:
    """Read what ``_as_json`` wrote."""
    return base64.b64decode(values[_BYTES]) if values.keys() == {_BYTES} else values


def plan_from_config(config: Mapping[str, Any]) -> ClientPlan | None:
    """Read a message's plan; None if a stock strategy sent the message."""
    if _PLAN not in config:
        return None
    values = json.loads(str(config[_PLAN]), object_hook=_from_json)
    read = {name: _READ.get(name, _as_it_is)(value) for name, value in values.items()}
    return ClientPlan(**read)


def _as_it_is(value: Any) -> Any:
    return value


_WRITE: Mapping[str, Callable[[Any], Any]] = {
    "route": asdict,
    "recompute": RecomputePlan.to_lists,
    "constraints": lambda c: {**asdict(c), "kept_units": sorted(c.kept_units)},
    "variant": Variant.to_lists,
    "codecs": lambda codecs: list(map(codec_values, codecs)),
    "cohort": asdict,
}
_READ: Mapping[str, Callable[[Any], Any]] = {
    "route": lambda v: Route(tuple(v["cuts"]), tuple(v["places"])),
    "recompute": RecomputePlan.from_lists,
    "constraints": lambda v: Constraints(
        **{**v, "kept_units": frozenset(v["kept_units"])}
    ),
    "variant": Variant.from_lists,
    "codecs": lambda values: tuple(map(codec_from, values)),
    "cohort": lambda v: Cohort(**v),
}


def instruction(
    layout: RecordLayout,
    record: ArrayRecord,
    config: Mapping[str, Any],
    *,
    is_train: bool,
) -> RecordDict:
    """Make one client's message, with records that no other message shares."""
    if layout is LEGACY:
        config = legacy_scalars(config)
        record = ArrayRecord({str(i): a for i, a in enumerate(record.values())})
    arrays_key, config_key = layout.train_keys if is_train else layout.evaluate_keys
    return RecordDict({arrays_key: record, config_key: ConfigRecord(dict(config))})


def legacy_scalars(config: Mapping[str, Any]) -> Scalars:
    """Leave out the lists, which Flower's legacy API cannot send; the plan has them."""
    return {k: v for k, v in config.items() if not isinstance(v, list | tuple)}


def profile_request(layout: RecordLayout) -> RecordDict:
    """Make the message that asks a client for its profile."""
    if layout is LEGACY:
        return RecordDict({"getpropertiesins.config": ConfigRecord()})
    return RecordDict()
