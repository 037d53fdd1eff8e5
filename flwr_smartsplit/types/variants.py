"""Variants: what of the global model a client trains."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Variant:
    """What of the global model a client trains; today, all of it.

    A variant that freezes or narrows the model gets its fields here. The plan, the
    session, the receipt and the cache of profiles already tell variants apart.

    Parameters
    ----------
    name : str
        Identifies it in plans, sessions, receipts and caches.
    """

    name: str = "whole"


WHOLE = Variant()
"""The whole model, as it is."""
