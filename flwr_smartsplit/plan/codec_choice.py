"""Which codecs a cut may have: those that the user names, or lossless ones.

Of several, a device gets the one with which its part of a round is fastest, together
with its route.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from flwr_smartsplit.types import (
    CODEC_TYPES,
    RAW,
    ChainProfile,
    Codec,
    DeviceProfile,
    EdgeProfile,
    Link,
    Packed,
    Route,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecRequest:
    """What is known when the codec of one cut of a client is chosen.

    Parameters
    ----------
    device : DeviceProfile
        The client.
    link : Link or None
        Where the cut is between two edges, their link, if it is known; else the fastest
        of the client's links to the edges; None if none is known.
    route : Route
        A route that may be taken.
    crossing_index : int
        Which of the route's cuts, from 0.
    profile : ChainProfile
        Exact costs at the client's batch size.
    """

    device: DeviceProfile
    link: Link | None
    route: Route
    crossing_index: int
    profile: ChainProfile


Codecs = Codec | tuple[Codec, ...]
"""One codec, or several of which the fastest is taken."""

ChooseCodec = Callable[[CodecRequest], Codecs]
"""Chooses the codec of one cut, or some of which the fastest is taken."""

CodecChoice = Codecs | ChooseCodec | None
"""What all cuts may have, or a function that says it; None for lossless ones."""


def lossless(request: CodecRequest) -> Codecs:
    """Accept ``Packed`` where it may be smaller and its time can be told; and ``Raw``.

    It is smaller where no gradient passes what is +0, as behind a ReLU. Its time can be
    told of a device that knows its speed and its link.
    """
    cut = request.route.cuts[request.crossing_index]
    crossing = request.profile.units[cut - 1].crossing
    is_told = request.link is not None and request.device.traits.flops_per_second
    if is_told and any(tensor.blocks for tensor in crossing):
        return RAW, Packed()
    return RAW


@dataclass(frozen=True, slots=True)
class CodecByRate:
    """The codecs whose rate a link reaches; see ``codec_by_rate``."""

    rates: tuple[tuple[float, Codecs], ...]  # The highest first

    def __call__(self, request: CodecRequest) -> Codecs:
        """Choose by the slower direction; the first for a link that is not known."""
        if request.link is None:
            return self.rates[0][1]
        slower = min(
            request.link.up_bytes_per_second, request.link.down_bytes_per_second
        )
        found = (codec for rate, codec in self.rates if slower >= rate)
        return next(found, self.rates[-1][1])


def codec_by_rate(codecs: Mapping[float, Codecs]) -> ChooseCodec:
    """Choose codecs by the rates of links.

    Parameters
    ----------
    codecs : Mapping[float, Codec or tuple[Codec, ...]]
        For each rate in bytes per second what a link has from there on. Slower links
        take that of the lowest rate; those of unknown rate that of the highest.

    Raises
    ------
    ValueError
        If there is none, or a rate is below 0.
    TypeError
        If something is no codec.

    Examples
    --------
    >>> from flwr_smartsplit import Integer, Packed, TopK
    >>> choose = codec_by_rate({1e6: Packed(), 1e5: Integer(), 0: TopK(fraction=0.1)})
    """
    if not codecs or not all(rate >= 0 for rate in codecs):
        raise ValueError(
            f"codec_by_rate has the rates {list(codecs)}: give at least one, in bytes "
            "per second, from 0 on."
        )
    for codec in codecs.values():
        accepted(codec)
    return CodecByRate(tuple(sorted(codecs.items(), key=lambda each: -each[0])))


def accepted(codecs: object) -> tuple[Codec, ...]:
    """List what a cut may have; raise ``TypeError`` for what is no codec."""
    found = codecs if isinstance(codecs, tuple) else (codecs,)
    if not found:
        raise TypeError("() has no codec: give at least one, such as Raw().")
    for codec in found:
        if not isinstance(codec, tuple(CODEC_TYPES.values())):
            raise TypeError(
                f"{codec!r:.99} is no codec: give Raw(), Packed(), Float16(), "
                "BFloat16(), Integer() or TopK()."
            )
    return found


def check_choice(codec: object) -> None:
    """Raise ``TypeError`` for what is neither a codec, nor some, nor a function."""
    if codec is not None and (isinstance(codec, type) or not callable(codec)):
        accepted(codec)


def chosen_codecs(
    choose: CodecChoice,
    device: DeviceProfile,
    profile: ChainProfile,
    edges: Sequence[EdgeProfile],
    *,
    route: Route | None = None,
) -> tuple[tuple[Codec, ...], ...]:
    """Choose the codec at each cut of a chain, for a split there, or of one route.

    Where a cut may have several, there are as many choices for the chain: the first has
    the first codec of each cut, and so on.
    """
    size = len(profile.units)
    choose = lossless if choose is None else choose
    at: list[tuple[Codec, ...]] = [(RAW,) if callable(choose) else accepted(choose)] * (
        size - 1
    )
    if callable(choose):
        links = [device.traits.link_to(edge.name) for edge in edges]
        known = [link for link in links if link is not None]
        fastest = max(known, key=lambda link: link.up_bytes_per_second, default=None)
        named = {edge.name: edge for edge in edges}
        routes = map(Route.split, range(1, size)) if route is None else [route]
        for each in routes:
            for index, cut in enumerate(each.cuts):
                here, there = map(named.get, each.places[index : index + 2])
                link = None if here is None or there is None else here.link_to(there)
                request = CodecRequest(
                    device=device,
                    link=link or fastest,
                    route=each,
                    crossing_index=index,
                    profile=profile,
                )
                at[cut - 1] = accepted(choose(request))
    most = max(map(len, at), default=1)
    return tuple(
        tuple(codecs[min(index, len(codecs) - 1)] for codecs in at)
        for index in range(most)
    )
