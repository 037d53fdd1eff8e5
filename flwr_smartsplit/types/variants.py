"""Variants: what part of the global model a client trains."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Variant:
    """What part of the global model a client trains; today, all of it.

    A variant that freezes part of the model gets its fields here, and ``Chain.under``
    makes its chain. Plans, sessions, receipts and profiles carry it; a merge is per
    name, over the clients that trained it.
    """

    name: str = "whole"


WHOLE = Variant()
