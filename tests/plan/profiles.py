"""Chains made of numbers, for policies that see nothing else."""

from collections.abc import Sequence

from flwr_smartsplit.types import ChainProfile, DeviceProfile, UnitCost


def chain_of(peaks: Sequence[int], *, batch_size: int = 4) -> ChainProfile:
    """Make a chain whose device peaks, unit by unit, are given."""
    return ChainProfile(
        batch_size=batch_size,
        batch_bytes=4,
        units=tuple(
            UnitCost(
                name=str(index),
                parameter_bytes=8,
                buffer_bytes=0,
                gradient_bytes=8,
                optimizer_state_bytes=0,
                saved_bytes=16,
                boundary_bytes=16,
                forward_flops=32,
                device_peak_bytes=peak,
                waiting_bytes=16,
                return_bytes=32,
            )
            for index, peak in enumerate(peaks)
        ),
    )


def device(
    key: str, budget_bytes: int | None = None, *, batch_size: int = 4
) -> DeviceProfile:
    """Make a client."""
    return DeviceProfile(
        client_key=key,
        budget_bytes=budget_bytes,
        num_examples=10,
        batch_size=batch_size,
    )
