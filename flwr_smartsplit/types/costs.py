"""What the units of a chain cost, as plain numbers."""

import json
from dataclasses import asdict, dataclass
from typing import Any, Self


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBytes:
    """What one unit makes and frees during a step, for plans that recompute.

    Parameters
    ----------
    saved_bytes : int
        What its forward leaves to backward, with its output if anyone keeps that.
    kept_bytes : int
        What of that is still there when its own backward begins.
    forward_peak_bytes : int
        The most that it makes in its forward.
    rerun_peak_bytes : int
        The same up to the last tensor that it saves, where a rerun ends.
    passing_peak_bytes : int
        The same where nothing is kept for backward.
    backward_peak_bytes : int
        The most in its backward: what it kept, both gradients of its boundaries,
        temporaries, gradients of its parameters.
    left_bytes : int
        Gradients that its backward leaves until the end of the step.
    output_bytes : int
        Size of the storage of its output; 0 if its input's storage serves.
    gradient_bytes : int
        Size of the gradient of its output.
    arriving_bytes : int or None
        Size of the gradients where its backward first asks for what it saved; None if
        it saves nothing.
    crossing_bytes : int
        Where more than one tensor needs a gradient after it: size of all that cross and
        were made since a single one did. Then ``output_bytes`` is the part of them that
        nobody saves, and no rerun begins there.
    is_output_saved : bool
        Whether ``saved_bytes`` has the output.
    rerun_flops : int
        Floating-point operations of its forward up to the last result that it saves.
        In a selective step: of what its backward runs again. A ``Rerun`` of a selective
        unit costs both.
    can_rerun : bool
        Whether it may run twice: not if it changes tensors, except a BatchNorm's.
    """

    saved_bytes: int = 0
    kept_bytes: int = 0
    forward_peak_bytes: int = 0
    rerun_peak_bytes: int = 0
    passing_peak_bytes: int = 0
    backward_peak_bytes: int = 0
    left_bytes: int = 0
    output_bytes: int = 0
    gradient_bytes: int = 0
    arriving_bytes: int | None = None
    crossing_bytes: int = 0
    is_output_saved: bool = True
    rerun_flops: int = 0
    can_rerun: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitCost:
    """What one unit holds and what crosses the boundary after it.

    Parameters
    ----------
    name : str
        The unit's name in its chain.
    parameter_bytes, buffer_bytes : int
        Size of its parameters, and of its buffers and other tensors.
    gradient_bytes, optimizer_state_bytes : int
        Size of its parameters' gradients, and of what the optimizer keeps for them.
    saved_bytes : int
        What its forward makes and backward needs: its saved activations.
    keeps_gradient : bool
        Whether gradients stay through the step, from micro-batch to micro-batch.
    boundary_bytes : int
        Size of its output for one micro-batch, with its context; 0 for the last unit.
    forward_flops : int
        Floating-point operations of its forward; a multiply-add is two.
    device_peak_bytes : int
        The most a device holds during a training step when this is its last unit:
        parameters, gradients, optimizer state, batch, activations, boundary gradient.
    waiting_bytes : int
        What of that stays while the rest of the step runs elsewhere: activations.
    return_bytes : int
        The most that the rest of the step, from this unit on, takes where it comes
        back to: its incoming boundary, activations, gradients, temporaries. The
        parameters, buffers and optimizer state of these units come on top.
    head_update_bytes, tail_update_bytes : int
        Most that the optimizer makes and frees after backward where this unit is the
        last on a device, and where it is the first.
    step : StepBytes
        What plans that recompute are made from.
    selective_step : StepBytes, optional
        The same if its cheap operators run twice; None if it has none worth it.
    """

    name: str
    parameter_bytes: int
    buffer_bytes: int
    gradient_bytes: int
    optimizer_state_bytes: int
    saved_bytes: int
    boundary_bytes: int
    forward_flops: int
    device_peak_bytes: int
    waiting_bytes: int
    return_bytes: int
    keeps_gradient: bool = False
    head_update_bytes: int = 0
    tail_update_bytes: int = 0
    step: StepBytes = StepBytes()
    selective_step: StepBytes | None = None

    @property
    def resident_bytes(self) -> int:
        """What a place that trains this unit holds of it at any moment."""
        stays = self.parameter_bytes + self.buffer_bytes + self.optimizer_state_bytes
        return stays + self.gradient_bytes - self.new_gradient_bytes

    @property
    def new_gradient_bytes(self) -> int:
        """Size of the gradients that backward makes, none where they stay."""
        return 0 if self.keeps_gradient else self.gradient_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainProfile:
    """The exact costs of a chain at one batch size and optimizer.

    Parameters
    ----------
    batch_size : int
        Examples per step.
    batch_bytes : int
        Size of a batch, its targets included.
    units : tuple[UnitCost, ...]
        The costs of each unit, in order.
    updates_last : bool
        Whether all gradients are kept until all are there, to be clipped together.
    loss : StepBytes
        What the loss makes and frees, after the last unit.
    targets_bytes : int
        Size of the targets alone, of one micro-batch.
    num_micro_batches : int
        Into how many parts a batch is divided; 1 without accumulation.

    Examples
    --------
    >>> profile = ChainProfile(batch_size=8, batch_bytes=128, units=())
    >>> ChainProfile.from_json(profile.to_json()) == profile
    True
    """

    batch_size: int
    batch_bytes: int
    units: tuple[UnitCost, ...]
    updates_last: bool = False
    loss: StepBytes = StepBytes()
    targets_bytes: int = 0
    num_micro_batches: int = 1

    def to_json(self) -> str:
        """Write the profile as JSON, with the names of the fields as keys."""
        return json.dumps(asdict(self))

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
            return cls(units=units, loss=StepBytes(**read.pop("loss")), **read)
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(
                f"this is not a chain's profile as JSON: {error}. Make one anew with "
                "profile_chain(...).to_json()."
            ) from error


def _unit(*, step: Any, selective_step: Any, **costs: Any) -> UnitCost:
    selective = None if selective_step is None else StepBytes(**selective_step)
    return UnitCost(step=StepBytes(**step), selective_step=selective, **costs)
