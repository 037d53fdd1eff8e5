"""Codec names: how the boundary at each cut of a route is encoded."""

RAW = "raw"  # every tensor as it is


def codec_at(codecs: tuple[str, ...], index: int) -> str:
    """Return the codec of a route's ``index``-th cut; ``RAW`` if none is named."""
    return codecs[index] if codecs else RAW
