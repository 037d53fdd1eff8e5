"""What the rest of a model takes at an edge, for one client."""

from flwr_smartsplit.types import ChainProfile


def tail_bytes(profile: ChainProfile, start: int, stop: int) -> tuple[int, int]:
    """Say what a session takes at most in memory, and sealed on disk."""
    units = profile.units[start:stop]
    resident = sum(unit.resident_bytes for unit in units)
    disk = sum(unit.parameter_bytes + unit.buffer_bytes for unit in units)
    return resident + units[0].return_bytes, disk
