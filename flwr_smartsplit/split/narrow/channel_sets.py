"""ChannelSets: which channels belong together, by union-find.

Every layer that makes channels opens a set. Sets are joined where values meet, such as
at a skip connection, and fixed where something uses channels in a way that is not
understood: then all of them stay.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from flwr_smartsplit.types import Axis, ChannelGroup


@dataclass(frozen=True, slots=True)
class Track:
    """The channels along axis 1 of a value: their set, and the entries of each."""

    channels: int
    repeat: int = 1


@dataclass(slots=True)
class _Set:
    name: str  # Of the array that makes the channels
    size: int
    multiple: int = 1
    why_fixed: str = ""
    unscaled: dict[str, None] = field(default_factory=dict)
    makers: dict[Axis, None] = field(default_factory=dict)


class ChannelSets:
    """Sets of channels that are kept or left out together.

    ``aliases`` lists, for each name of the state, all names of its tensor.
    """

    def __init__(self, aliases: Mapping[str, tuple[str, ...]]) -> None:
        self._aliases = aliases
        self._above: list[int] = []
        self._sets: list[_Set] = []
        self._held: dict[tuple[str, int], Track] = {}
        self._whole: dict[tuple[str, int], str] = {}  # What stays whole, and why

    def open(self, name: str, axis: int, size: int) -> Track:
        """Open a set of channels that an array makes, along one of its axes."""
        self._above.append(len(self._above))
        self._sets.append(_Set(name, size, makers={Axis(name, axis): None}))
        made = Track(len(self._above) - 1)
        self.hold(name, axis, made)
        return made

    def join(self, one: Track, other: Track, why: str) -> Track:
        """Join the channels of two values, or fix both where they do not match."""
        first, second = sorted((self._find(one), self._find(other)))
        if first == second and one.repeat == other.repeat:
            return one
        mine, theirs = self._sets[first], self._sets[second]
        if one.repeat != other.repeat or mine.size != theirs.size:
            self.fix(one, why)
            self.fix(other, why)
            return one
        self._above[second] = first
        mine.multiple = math.lcm(mine.multiple, theirs.multiple)
        mine.why_fixed = mine.why_fixed or theirs.why_fixed
        mine.unscaled |= theirs.unscaled
        mine.makers |= theirs.makers
        return one

    def fix(self, track: Track, why: str) -> None:
        """Keep all channels of a value."""
        own = self._sets[self._find(track)]
        own.why_fixed = own.why_fixed or why

    def hold(self, name: str, axis: int, track: Track) -> None:
        """Note that a value's channels lie along an axis of an array of the state."""
        for alias in self._aliases.get(name, (name,)):
            known = self._held.setdefault((alias, axis), track)
            self.join(known, track, f"{name} is used for two widths")

    def keep_whole(self, name: str, axes: Iterable[int], why: str) -> None:
        """Note that an array of the state is used where all of it is needed."""
        for alias in self._aliases.get(name, (name,)):
            for axis in axes:
                self._whole.setdefault((alias, axis), why)

    def keep_runs(self, track: Track, multiple: int) -> None:
        """Keep channels in whole runs of so many."""
        own = self._sets[self._find(track)]
        own.multiple = math.lcm(own.multiple, multiple)

    def leave_unscaled(self, track: Track, module: str) -> None:
        """Note a module that makes channels which nothing normalises."""
        self._sets[self._find(track)].unscaled[module] = None

    def groups(self) -> tuple[ChannelGroup, ...]:
        """List the sets that may lose channels, in the order of the model."""
        self._settle()
        found: dict[int, ChannelGroup] = {}
        for (name, axis), track in self._held.items():
            root = self._find(track)
            own = self._sets[root]
            if own.why_fixed or own.size <= own.multiple:
                continue
            group = found.get(root) or ChannelGroup(
                name=own.name,
                size=own.size,
                multiple=own.multiple,
                axes=(),
                unscaled=tuple(own.unscaled),
                makers=tuple(own.makers),
            )
            axes = (*group.axes, Axis(name, axis, track.repeat))
            found[root] = replace(group, axes=axes)
        return tuple(found[root] for root in sorted(found))

    def reasons(self) -> dict[str, str]:
        """Say of each set that stays whole why, by the array that makes it."""
        self._settle()
        roots: Iterable[int] = sorted({self._find(Track(i)) for i in self._above})
        own = (self._sets[root] for root in roots)
        return {
            each.name: each.why_fixed or f"its {each.size} channels are one run"
            for each in own
            if each.why_fixed or each.size <= each.multiple
        }

    def _settle(self) -> None:
        for place, track in self._held.items():
            if place in self._whole:
                self.fix(track, self._whole[place])
        for root in {self._find(Track(i)) for i in self._above}:
            own = self._sets[root]
            if own.size % own.multiple:
                own.why_fixed = own.why_fixed or "its GroupNorms' groups do not align"

    def _find(self, track: Track) -> int:
        root = track.channels
        while self._above[root] != root:
            root = self._above[root]
        return root
