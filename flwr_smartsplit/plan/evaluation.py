"""What a device needs to evaluate a batch: forward only, in the units of a profile."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate

from flwr_smartsplit.types import ChainProfile, DeviceProfile, StepBytes, UnitCost


def forward_only(profile: ChainProfile) -> ChainProfile:
    """Take from a training step's costs those of evaluating as large a batch.

    There are no gradients and no optimizer; a unit holds what enters it and what its
    forward allocates. Nothing is recomputed.
    """
    held: list[int] = []  # The most while each unit runs
    entering = [0]  # What enters each unit; the batch has its own number
    for unit in profile.units:
        step, entered = unit.step, entering[-1]
        made = max(step.output_bytes, unit.boundary_bytes, step.crossing_bytes)
        held.append(max(entered + step.passing_peak_bytes, made))
        entering.append(made if made or not step.passing_peak_bytes else entered)
    held.append(entering[-1] + profile.loss.forward_peak_bytes)
    static = accumulate(
        (unit.parameter_bytes + unit.buffer_bytes for unit in profile.units),
        initial=profile.batch_bytes,
    )
    next(static)
    last = len(profile.units) - 1
    units = []
    for index, (unit, below) in enumerate(zip(profile.units, static, strict=True)):
        once = below - profile.repeated_bytes(range(index + 1))
        peak = once + max(held if index == last else held[: index + 1])
        # What came back stays until the loss is there.
        returned = max(held[index], entering[index] + max(held[index + 1 :]))
        units.append(
            replace(
                _forward_only(unit, peak, returned),
                static_bytes=once,
                leaving_bytes=entering[index + 1],
                entered_bytes=entering[index],
            )
        )
    return replace(profile, units=tuple(units), updates_last=False)


def _forward_only(unit: UnitCost, peak_bytes: int, return_bytes: int) -> UnitCost:
    return UnitCost(
        name=unit.name,
        parameter_bytes=unit.parameter_bytes,
        buffer_bytes=unit.buffer_bytes,
        frozen_bytes=unit.frozen_bytes,
        gradient_bytes=0,
        optimizer_state_bytes=0,
        saved_bytes=0,
        boundary_bytes=unit.boundary_bytes,
        forward_flops=unit.forward_flops,
        device_peak_bytes=peak_bytes,
        waiting_bytes=0,
        return_bytes=return_bytes,
        crossing=tuple(replace(each, has_gradient=False) for each in unit.crossing),
        step=StepBytes(
            backward_peak_bytes=peak_bytes, can_rerun=False, is_output_saved=False
        ),
    )


def evaluating(
    clients: Mapping[str, DeviceProfile],
) -> tuple[frozenset[int], dict[str, DeviceProfile]]:
    """Give clients the batch sizes that they evaluate; list those nobody trains.

    Where clients evaluate batches as large as they train, the price of a training step
    covers both.
    """
    sizes = {
        c.eval_batch_size for c in clients.values() if c.eval_batch_size is not None
    }
    trained = {c.batch_size for c in clients.values() if c.eval_batch_size is None}
    found = {
        key: replace(each, batch_size=each.eval_batch_size or each.batch_size)
        for key, each in clients.items()
    }
    return frozenset(sizes - trained), found
