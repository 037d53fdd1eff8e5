"""Variants: what part of the global model a client trains.

Channels that must be kept or left out together are a group. A variant names those that
it keeps of each; which values of the state these are follows from the model alone. Or
it is a step of progressive training: a frozen front, and proxies for what comes later.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, pairwise
from math import ceil
from operator import lt
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from flwr_smartsplit.types.sizes import plain

Region = tuple[npt.NDArray[np.int64] | None, ...]
"""For each axis of an array, which indices; None for all."""

Regions = Mapping[str, Region]
"""By name of the state; an array without one is there whole."""


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis of the state along which a group's channels lie, in order."""

    name: str  # Of the array
    axis: int
    repeat: int = 1  # Entries for each channel: more than one behind a flattening


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelGroup:
    """Channels that are kept or left out together, wherever they are stored.

    Parameters
    ----------
    name : str
        The array of the state that makes them, such as ``"conv1.weight"``.
    size : int
        How many there are.
    multiple : int
        They are kept in runs of so many: a GroupNorm's groups stay whole.
    axes : tuple[Axis, ...]
        Where they are stored.
    unscaled : tuple[str, ...]
        The modules that make them and that no normalisation follows.
    makers : tuple[Axis, ...]
        Where the weights lie that make them: several, where layers' outputs are added.
    """

    name: str
    size: int
    multiple: int = 1
    axes: tuple[Axis, ...]
    unscaled: tuple[str, ...] = ()
    makers: tuple[Axis, ...] = ()

    def share(self, rate: float, *, shift: int = 0) -> tuple[int, ...]:
        """List at least a share of the channels, in whole runs, from a run of them on.

        Examples
        --------
        >>> group = ChannelGroup(name="a.weight", size=8, multiple=2, axes=())
        >>> group.share(0.5), group.share(0.5, shift=3)
        ((0, 1, 2, 3), (0, 1, 6, 7))
        """
        each, num_runs = self.multiple, self.size // self.multiple
        num_kept = ceil(rate * num_runs)
        runs = sorted((shift + index) % num_runs for index in range(num_kept))
        return tuple(run * each + channel for run in runs for channel in range(each))


MAX_CHANNELS = 2**20
"""The most that a variant that was read may keep: what is forged takes no memory."""


@dataclass(frozen=True)  # Without slots: what follows from it is remembered in it.
class Variant:
    """What part of the global model a client trains.

    A smaller model has the global one's units and names, and fewer channels in them. A
    merge is value by value, over the clients that trained it.

    Parameters
    ----------
    name : str
        What the journal calls it, such as ``"width 0.5"``.
    kept : Mapping[str, tuple[int, ...]]
        For each channel group by name, the channels kept, in increasing order; a group
        that is not named keeps all.
    is_scaled : bool
        Whether, in training, outputs are divided by the share of their channels that is
        kept, where no normalisation does so anyway: HeteroFL's scaler.
    frozen : int
        How many of the first units run forward only, in evaluation mode: they are
        neither trained nor sent back.
    proxies : tuple[tuple[int, ...], ...]
        Runs ``[start, stop)`` of later units for each of which one small unit stands.

    Raises
    ------
    ValueError
        If a group keeps nothing, or its channels are not increasing from 0; or if runs
        of units are empty, overlap, begin in the frozen ones, or come with channels.

    Examples
    --------
    >>> Variant("half", {"conv1.weight": (0, 1)}).kept
    {'conv1.weight': (0, 1)}
    """

    name: str = "whole"
    kept: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    is_scaled: bool = False
    frozen: int = 0
    proxies: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        self._check_step()
        kept = {name: _plain_ones(self.kept[name]) for name in sorted(self.kept)}
        for name, channels in kept.items():
            if not channels or not _are_increasing(channels):
                raise ValueError(
                    f"variant {self.name!r} keeps channels {channels!r:.80} of "
                    f"{name!r}: name at least one, in increasing order from 0."
                )
        object.__setattr__(self, "kept", kept)

    def __hash__(self) -> int:
        """Hash what is compared."""
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave out the hash, which is another one in each process."""
        parts = self.name, self.kept, self.is_scaled, self.frozen, self.proxies
        return type(self), parts

    @cached_property
    def _hash(self) -> int:
        step = self.frozen, self.proxies
        return hash((self.name, *self.kept.items(), self.is_scaled, step))

    @property
    def is_step(self) -> bool:
        """Whether it freezes units, or replaces some."""
        return bool(self.frozen or self.proxies)

    def _check_step(self) -> None:
        runs = tuple(tuple(map(plain, run)) for run in self.proxies)
        object.__setattr__(self, "frozen", plain(self.frozen))
        object.__setattr__(self, "proxies", runs)
        bounds = [self.frozen, *(bound for run in runs for bound in run)]
        is_right = all(type(bound) is int for bound in bounds) and self.frozen >= 0
        is_right = is_right and all(len(run) == 2 for run in runs)  # noqa: PLR2004
        if not is_right or not (
            all(start < stop for start, stop in runs)
            and all(one <= other for one, other in pairwise(bounds))
        ):
            raise ValueError(
                f"variant {self.name!r} freezes {self.frozen!r:.40} units and has "
                f"proxies for {self.proxies!r:.80}: give runs (start, stop) of units "
                "that follow each other behind the frozen ones."
            )
        if self.is_step and self.kept:
            raise ValueError(
                f"variant {self.name!r} mixes what does not go together: a step has "
                "all channels."
            )

    def leading(self) -> Self:
        """Return the variant of this size that keeps each group's first channels.

        Both cost the same, and their models differ in values only.
        """
        return self._leading

    @cached_property
    def _leading(self) -> Self:
        first = {name: tuple(range(len(each))) for name, each in self.kept.items()}
        sizes = ",".join(str(len(each)) for each in first.values())
        return replace(self, name=f"of {sizes}" if first else self.name, kept=first)

    def to_lists(self) -> dict[str, Any]:
        """Write it as plain values: of each group where runs of channels begin and end.

        Examples
        --------
        >>> Variant("some", {"conv1.weight": (0, 1, 2, 7)}).to_lists()["kept"]
        {'conv1.weight': [0, 3, 7, 8]}
        """
        return dict(self._lists)

    @cached_property
    def _lists(self) -> dict[str, Any]:
        runs = {name: _runs_of(channels) for name, channels in self.kept.items()}
        found = {"name": self.name, "kept": runs, "is_scaled": self.is_scaled}
        if self.is_step:
            found |= {"frozen": self.frozen, "proxies": [*map(list, self.proxies)]}
        return found

    @classmethod
    def from_lists(cls, values: Mapping[str, Any]) -> Self:
        """Read what ``to_lists`` wrote.

        Raises
        ------
        ValueError
            If these are not its values, or more than ``MAX_CHANNELS`` channels.
        """
        name, runs, is_scaled = map(values.get, _FIELDS)
        frozen, proxies = values.get("frozen", 0), values.get("proxies", [])
        is_form = isinstance(name, str) and isinstance(is_scaled, bool)
        is_form = is_form and type(frozen) is int and isinstance(proxies, list)
        is_form = is_form and all(isinstance(run, list) for run in proxies)
        if not (
            is_form
            and isinstance(runs, Mapping)
            and values.keys() <= {*_FIELDS, *_STEP}
        ):
            raise ValueError(f"{sorted(values)!r:.80} are not a variant's values.")
        _check_runs(runs)
        kept = {
            group: tuple(chain.from_iterable(map(range, ends[::2], ends[1::2])))
            for group, ends in runs.items()
        }
        replaced = tuple(map(tuple, proxies))
        return cls(str(name), kept, bool(is_scaled), int(frozen), replaced)


_FIELDS = ("name", "kept", "is_scaled")
_STEP = ("frozen", "proxies")
WHOLE = Variant()


def _plain_ones(channels: Sequence[int]) -> tuple[int, ...]:
    """Take numbers of other libraries as Python's; a large model has many channels."""
    return tuple(
        channels if set(map(type, channels)) == {int} else map(plain, channels)
    )


def _are_increasing(channels: tuple[int, ...]) -> bool:
    is_index = set(map(type, channels)) == {int}
    return is_index and channels[0] >= 0 and all(map(lt, channels, channels[1:]))


def _runs_of(channels: Sequence[int]) -> list[int]:
    """List where each run of neighbours begins, and where it has ended."""
    here = np.asarray(channels)
    gaps = np.flatnonzero(np.diff(here) > 1)
    starts, stops = here[[0, *(gaps + 1)]], here[[*gaps, -1]] + 1
    return [int(end) for end in np.column_stack((starts, stops)).reshape(-1)]


def _check_runs(runs: Mapping[Any, Any]) -> None:
    """Check that runs are increasing, apart, and together no more than allowed."""
    num_channels = 0
    for name, ends in runs.items():
        is_list = isinstance(ends, list) and set(map(type, ends)) == {int}
        if not is_list or len(ends) % 2 or not 0 <= ends[0] or not _rise(ends):
            raise ValueError(
                f"the runs of {name!r:.80} are {ends!r:.80}: give where each begins "
                "and where it has ended, in increasing order from 0."
            )
        num_channels += sum(ends[1::2]) - sum(ends[::2])
    if num_channels > MAX_CHANNELS:
        raise ValueError(f"{num_channels} channels, of {MAX_CHANNELS} allowed.")


def _rise(ends: list[int]) -> bool:
    return all(one < other for one, other in pairwise(ends))


def width_of(
    groups: Iterable[ChannelGroup],
    rate: float,
    *,
    shift: int = 0,
    is_scaled: bool = False,
) -> Variant:
    """Make the variant that keeps a share of every group's channels.

    Raises
    ------
    ValueError
        If the share is not in ``(0, 1]``.
    """
    if not 0 < rate <= 1:
        raise ValueError(f"a width is {rate!r:.40}: give a share in (0, 1].")
    groups = tuple(groups)
    kept = {group.name: group.share(rate, shift=shift) for group in groups}
    if all(len(kept[group.name]) == group.size for group in groups):
        return WHOLE
    return Variant(f"width {rate:g}", kept, is_scaled=is_scaled)


def kept_problem(variant: Variant, groups: Iterable[ChannelGroup]) -> str:
    """Say what a model's groups lack of what a variant keeps; ``""`` if nothing."""
    by_name = {group.name: group for group in groups}
    for name, channels in variant.kept.items():
        group = by_name.get(name)
        if group is None:
            known = ", ".join(by_name) or "none"
            return f"the model has no channel group {name!r}; its groups are {known}"
        if channels[-1] >= group.size:
            return f"{name!r} has {group.size} channels, so none is {channels[-1]}"
        runs = np.array(channels) // group.multiple
        counts = np.unique(runs, return_counts=True)[1]
        if (counts != group.multiple).any():
            return (
                f"a GroupNorm normalises the channels of {name!r} by {group.multiple}, "
                "so they are kept in whole runs of as many"
            )
    return ""


def regions_of(groups: Iterable[ChannelGroup], variant: Variant) -> Regions:
    """Find which values of the state a variant has; whole arrays are left out.

    Examples
    --------
    >>> group = ChannelGroup(name="a.weight", size=3, axes=(Axis("a.weight", 0),))
    >>> regions = regions_of([group], Variant("two", {"a.weight": (0, 2)}))
    >>> regions["a.weight"][0].tolist()
    [0, 2]
    """
    found: dict[str, dict[int, npt.NDArray[np.int64]]] = {}
    for group in groups:
        channels = variant.kept.get(group.name, ())
        if len(channels) in (0, group.size):
            continue
        first = np.array(channels, dtype=np.int64)
        for axis in group.axes:
            entries = first[:, None] * axis.repeat + np.arange(axis.repeat)
            found.setdefault(axis.name, {})[axis.axis] = entries.reshape(-1)
    return {
        name: tuple(axes.get(index) for index in range(max(axes) + 1))
        for name, axes in found.items()
    }


# --- a variant of a variant -----------------------------------------------------------


def groups_under(
    groups: Iterable[ChannelGroup], base: Variant
) -> tuple[ChannelGroup, ...]:
    """Return the groups of the model that a variant keeps, which may be narrowed again.

    Those of which one run is left are not among them.
    """
    sized = (
        replace(group, size=len(base.kept.get(group.name, ())) or group.size)
        for group in groups
    )
    return tuple(group for group in sized if group.size > group.multiple)


def within(base: Variant, variant: Variant) -> Variant:
    """Say what a variant of a smaller model keeps of the whole one.

    Examples
    --------
    >>> within(Variant("pruned", {"a": (0, 2, 5)}), Variant("two", {"a": (0, 2)})).kept
    {'a': (0, 5)}
    """
    if variant == WHOLE:
        return base
    if base == WHOLE:
        return variant
    kept = dict(base.kept)
    for name, channels in variant.kept.items():
        there = base.kept.get(name)
        kept[name] = channels if there is None else tuple(there[c] for c in channels)
    name = f"{variant.name} of {base.name}"
    return Variant(name, kept, is_scaled=variant.is_scaled)


def inside(base: Variant, variant: Variant) -> Variant:
    """Say what a variant of the whole model keeps of a smaller one: ``within``, undone.

    Examples
    --------
    >>> inside(Variant("pruned", {"a": (0, 2, 5)}), Variant("two", {"a": (0, 5)})).kept
    {'a': (0, 2)}

    Raises
    ------
    ValueError
        If it keeps channels that the smaller model has not.
    """
    if base == WHOLE:
        return variant
    kept = {}
    for name in {**base.kept, **variant.kept}:
        has, wants = base.kept.get(name), variant.kept.get(name)
        if has is None and wants is not None:
            kept[name] = wants
        elif has is not None and wants != has:
            at = {channel: index for index, channel in enumerate(has)}
            missing = [c for c in wants or () if c not in at]
            if wants is None or missing:
                raise ValueError(
                    f"variant {variant.name!r} keeps channels of {name!r} that "
                    f"{base.name!r} has not: {missing or 'all'}."
                )
            kept[name] = tuple(at[channel] for channel in wants)
    return replace(variant, kept=kept)
