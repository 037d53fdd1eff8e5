"""Codec names: how the boundary at each cut of a route is written."""

RAW = "raw"
"""Every tensor as it is."""


def codec_at(codecs: tuple[str, ...], index: int) -> str:
    """Return the codec of a route's ``index``-th cut; ``RAW`` if none is named.

    Examples
    --------
    >>> codec_at((), 0), codec_at(("int8", "raw"), 0)
    ('raw', 'int8')
    """
    return codecs[index] if codecs else RAW
