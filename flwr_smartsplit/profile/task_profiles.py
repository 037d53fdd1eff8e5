"""The costs of a task's chain, cached per process."""

from concurrent.futures import ThreadPoolExecutor
from threading import Lock

from flwr_smartsplit.profile.cache import profile_digest
from flwr_smartsplit.profile.profile import profile_chain
from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.task import Task
from flwr_smartsplit.types import WHOLE, ChainProfile, Variant

_profiles: dict[str, ChainProfile] = {}
_lock = Lock()


def profile_of(
    task: Task, *, batch_size: int, variant: Variant = WHOLE
) -> ChainProfile:
    """Find the costs of a task's chain, once per process, batch size and variant."""
    return profile_once(build_chain(task), task, batch_size=batch_size, variant=variant)


def profile_once(
    chain: Chain, task: Task, *, batch_size: int, variant: Variant = WHOLE
) -> ChainProfile:
    """Find a chain's costs, once per process for all chains with the same digest.

    The dry run has its own thread: meters and modes are per thread, and the caller may
    be inside a metered step. Variants of one size cost the same.
    """
    variant = variant.leading()
    chain = chain.under(variant)
    digest = profile_digest(chain, batch_size=batch_size, task=task, variant=variant)
    with _lock:
        if digest not in _profiles:
            with ThreadPoolExecutor(max_workers=1) as aside:
                found = aside.submit(
                    profile_chain, chain, batch_size=batch_size, task=task
                )
                _profiles[digest] = found.result()
        return _profiles[digest]
