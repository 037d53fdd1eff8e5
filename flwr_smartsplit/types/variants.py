"""Variants: what part of the global model a client trains."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Variant:
    """What part of the global model a client trains; today, all of it.

    A variant that freezes or narrows the model gets its fields here. Plans, sessions,
    receipts and the profile cache already tell variants apart by ``name``.
    """

    name: str = "whole"


WHOLE = Variant()
