"""What the units of a chain cost, as plain numbers."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Self

from flwr_smartsplit.types.codecs import NO_CODING, RAW, Codec, Coding, TensorCost

Shapes = tuple[tuple[int, ...], ...]
"""The shapes of one example's tensors: inputs, then targets."""

GATE = "channel_gate"
"""The last part of the name of each gate's unit: only open channels cross behind it."""

BatchKind = int | tuple[int, Shapes]
"""A batch size; and the shapes of its examples where they are not the task's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBytes:
    """What one unit allocates and frees during a step, for plans that recompute."""

    saved_bytes: int = 0  # What forward saves for backward, its output if that is saved
    kept_bytes: int = 0  # What of it is left when the unit's own backward begins
    forward_peak_bytes: int = 0  # The most that forward allocates
    rerun_peak_bytes: int = 0  # The same up to the last tensor saved, where it ends
    passing_peak_bytes: int = 0  # The same where nothing is saved for backward
    # Saved tensors, gradients of input and output, of parameters, temporaries
    backward_peak_bytes: int = 0
    left_bytes: int = 0  # Gradients that backward leaves until the end of the step
    output_bytes: int = 0  # Its output's storage; 0 if it is its input's
    gradient_bytes: int = 0  # The gradient of its output
    # The gradients where backward first needs what was saved; None if nothing was
    arriving_bytes: int | None = None
    # Where several tensors after it need gradients: all that cross and were made since
    # a single one did. ``output_bytes`` is then what of them no unit saves.
    crossing_bytes: int = 0
    # What later units use besides its output: it stays even if this one runs again
    context_bytes: int = 0
    is_output_saved: bool = True  # Whether ``saved_bytes`` includes the output
    # Of forward up to the last result saved; in a selective step, of what backward
    # recomputes. A ``Rerun`` of a selective unit costs both.
    rerun_flops: int = 0
    can_rerun: bool = True  # Whether a second run repeats the first, changing nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitCost:
    """What one unit holds, and what crosses the boundary after it."""

    name: str  # In its chain
    parameter_bytes: int
    buffer_bytes: int  # Of its buffers, and of tensors that are neither
    gradient_bytes: int  # Of its parameters
    optimizer_state_bytes: int
    saved_bytes: int  # Activations: what its forward allocates and backward needs
    boundary_bytes: int  # Its output for one micro-batch; 0 for the last unit
    forward_flops: int  # A multiply-add is two
    # The most that a device holds in a training step if this is its last unit
    device_peak_bytes: int
    waiting_bytes: int  # What of it stays while the rest of the step runs elsewhere
    # The most that a step takes from here on where it returns to the device, without
    # the parameters, buffers and optimizer state of these units
    return_bytes: int
    frozen_bytes: int = 0  # Of its parameters that are not trained
    keeps_gradient: bool = False  # From micro-batch to micro-batch
    head_update_bytes: int = 0  # What the optimizer needs if this is the last unit here
    tail_update_bytes: int = 0  # And if it is the first
    # Whether a cut may move past it in a round: not if it keeps more than tensors
    can_move: bool = True
    crossing: tuple[TensorCost, ...] = ()  # The tensors of its output
    # What a device holds when they are about to leave: what always stays, and the rest
    static_bytes: int = 0
    leaving_bytes: int = 0
    # If the step returns to the device from here on: what came, and what is left of the
    # step when the gradient of that goes
    entered_bytes: int = 0
    left_bytes: int = 0
    codec: Codec = RAW  # At the cut after it, with what that costs
    coding: Coding = NO_CODING
    step: StepBytes = StepBytes()  # What plans to recompute are made from
    selective_step: StepBytes | None = None  # None if being selective saves nothing

    @property
    def resident_bytes(self) -> int:
        """What a place that trains this unit always holds of it."""
        stays = self.parameter_bytes + self.buffer_bytes + self.optimizer_state_bytes
        return stays + self.gradient_bytes - self.new_gradient_bytes

    @property
    def new_gradient_bytes(self) -> int:
        """Size of the gradients that backward allocates; 0 where they stay."""
        return 0 if self.keeps_gradient else self.gradient_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossed:
    """What crosses one cut when a batch is predicted, and what one place then holds."""

    after: str  # The unit before the cut
    tensors: tuple[TensorCost, ...]
    live_bytes: int  # At that place, before anything is coded, or has come
    is_sent: bool  # By that place
    is_received: bool


@dataclass(frozen=True, slots=True)
class SharedTensor:
    """A frozen parameter of several units, which a place holds once."""

    units: tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainProfile:
    """The exact costs of a chain for one batch size and optimizer.

    Parameters
    ----------
    batch_size : int
        Examples per step.
    batch_bytes : int
        Size of a batch with its targets.
    units : tuple[UnitCost, ...]
        The costs of each unit, in order.
    updates_last : bool
        Whether all gradients are kept until the last is there, to be clipped together.
    loss : StepBytes
        What the loss allocates and frees, after the last unit.
    targets_bytes : int
        Size of one micro-batch's targets.
    num_micro_batches : int
        Micro-batches of a step; 1 without accumulation.
    shared : tuple[SharedTensor, ...]
        What the costs of several units count, such as a frozen tied embedding.
    """

    batch_size: int
    batch_bytes: int
    units: tuple[UnitCost, ...]
    updates_last: bool = False
    loss: StepBytes = StepBytes()
    targets_bytes: int = 0
    num_micro_batches: int = 1
    shared: tuple[SharedTensor, ...] = ()

    def repeated_bytes(self, units: Iterable[int]) -> int:
        """Add up what the costs of units at one place count more than once.

        Parameters
        ----------
        units : Iterable[int]
            All units of the place.
        """
        held = set(units)
        counts = ((len(held.intersection(t.units)), t.num_bytes) for t in self.shared)
        return sum(size * (count - 1) for count, size in counts if count > 1)

    def to_json(self) -> str:
        """Write the profile as JSON, with the fields' names as keys, without codecs."""
        values = asdict(self)
        for unit in values["units"]:
            del unit["codec"], unit["coding"]
        return json.dumps(values)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what ``to_json`` wrote.

        Raises
        ------
        ValueError
            If it is not such a profile.
        """
        try:
            read = json.loads(text)
            units = tuple(_unit(**unit) for unit in read.pop("units"))
            shared = tuple(
                SharedTensor(tuple(each["units"]), each["num_bytes"])
                for each in read.pop("shared")
            )
            loss = StepBytes(**read.pop("loss"))
            return cls(units=units, loss=loss, shared=shared, **read)
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(
                f"this is not a chain's profile as JSON: {error}. Make a new one with "
                "profile_chain(...).to_json()."
            ) from error


def _unit(*, step: Any, selective_step: Any, crossing: Any, **costs: Any) -> UnitCost:
    selective = None if selective_step is None else StepBytes(**selective_step)
    tensors = (TensorCost(**{**t, "shape": tuple(t["shape"])}) for t in crossing)
    return UnitCost(
        step=StepBytes(**step),
        selective_step=selective,
        crossing=tuple(tensors),
        **costs,
    )
