"""The meter and what comes from elsewhere: arguments, numpy, loaders, other threads."""

import sys
import threading
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from flwr_smartsplit.memory.cap import MemoryCap, memory_cap
from flwr_smartsplit.memory.meter import MemoryMeter, unmetered

FLOAT = 4


# --- what existed before --------------------------------------------------------------


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x.sum(),
        lambda x: x[:3].add_(1),
        lambda x: x.resize_(100),
        lambda x: torch.cat([x[:1], x]),
        lambda x: torch.zeros(200)[x],
        lambda x: torch.neg(torch.zeros(100, dtype=x.dtype), out=x),
        lambda x: torch.searchsorted(torch.ones(100), 1.0, sorter=x),
        lambda x: torch.zeros(5, dtype=x.dtype).set_(x),
        lambda x: torch.zeros(5, dtype=x.dtype).set_(x.untyped_storage()),
    ],
    ids="argument part itself list index out keyword set_ storage".split(),
)
def test_what_was_there_before_counts_from_its_first_use(use):
    """With its whole storage, however it is handed to an operator, until it is gone."""
    before = torch.zeros(100, dtype=torch.int64)
    with memory_cap(None) as meter:
        assert meter.live_bytes == 0
        use(before)
        assert meter.live_bytes == 100 * 8
        del before
        assert meter.live_bytes == 0


def test_numpys_memory_counts_while_a_tensor_uses_it():
    """From the tensor's first use; two tensors made of one array count as two."""
    array = np.zeros(100, dtype=np.float32)
    tensor = torch.from_numpy(array)
    with memory_cap(None) as meter:
        assert meter.live_bytes == 0
        tensor.add_(1)
        tensor.numpy()[:] = 2
        assert meter.live_bytes == 100 * FLOAT
        torch.from_numpy(array[:10]).add_(tensor[0])
        assert meter.live_bytes == 100 * FLOAT
        del tensor
        assert meter.live_bytes == 0
    assert array[0] == 4
    assert meter.peak_bytes == 110 * FLOAT


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_loaders_batch_counts_in_the_step_that_uses_it(num_workers):
    """Made here or in a worker's process; what is fetched ahead does not count."""
    loader = DataLoader(
        TensorDataset(torch.arange(80.0)),
        batch_size=10,
        num_workers=num_workers,
        multiprocessing_context="spawn" if num_workers else None,
    )
    cap = MemoryCap(None, mode="sampled", every=1)
    kept = []
    for (batch,) in loader:
        kept.append(batch)
        assert cap.live_bytes == 0
        with cap.step(batch):
            assert batch.sum() >= 0
            assert cap.live_bytes == 10 * FLOAT
    assert len(kept) == 8
    assert 11 * FLOAT <= cap.peak_bytes < 12 * FLOAT


PARTS = {
    "coo": ("_indices", "_values"),
    "csr": ("crow_indices", "col_indices", "values"),
    "bsr": ("crow_indices", "col_indices", "values"),
    "csc": ("ccol_indices", "row_indices", "values"),
    "bsc": ("ccol_indices", "row_indices", "values"),
}


@pytest.mark.parametrize("layout", PARTS)
def test_a_sparse_tensor_is_its_parts(layout):
    """Values and indices, tracked, used and forgotten."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse .* support is in beta state")
        sparse = torch.eye(4).to_sparse(
            layout=getattr(torch, f"sparse_{layout}"),
            blocksize=(1, 1) if layout.startswith("bs") else None,
        )
    parts = [getattr(sparse, part)() for part in PARTS[layout]]
    meter = MemoryMeter()
    for count in (meter.track, lambda x: x.clone()):
        with meter:
            count(sparse)
        held = sum(part.untyped_storage().nbytes() for part in parts)
        assert meter.live_bytes == held
        meter.forget(sparse)
        assert meter.live_bytes == 0


def test_what_is_forgotten_does_not_count_though_it_lives():
    """Until it is used again; that it dies later takes nothing off twice."""
    meter, batch = MemoryMeter(), {"x": [torch.zeros(10)], "y": torch.zeros(5)}
    unknown = torch.zeros(3)
    with meter:
        meter.track(batch)
        meter.forget(batch, unknown)
        assert meter.live_bytes == 0
        batch["y"].add_(1)
        assert meter.live_bytes == 5 * FLOAT
        batch.clear()
        assert (meter.live_bytes, meter.peak_bytes) == (0, 15 * FLOAT)


# --- threads --------------------------------------------------------------------------


def test_each_thread_has_its_own_account():
    """What another thread makes, meters or leaves unmetered changes nothing here."""
    barrier = threading.Barrier(3, timeout=30)
    peaks: dict[int, int] = {}

    def work(size: int) -> None:
        with memory_cap(None) as meter:
            barrier.wait()
            for _ in range(20):
                values = torch.zeros(size)
                values = values.sin()
            barrier.wait()
            peaks[size] = meter.peak_bytes

    def work_unmetered() -> None:
        with unmetered():
            barrier.wait()
            _ = torch.zeros(1000)
            barrier.wait()

    threads = [threading.Thread(target=work, args=(size,)) for size in (100, 7)]
    threads.append(threading.Thread(target=work_unmetered))
    with memory_cap(None) as meter:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert peaks == {100: 2 * 100 * FLOAT, 7: 2 * 7 * FLOAT}
    assert meter.peak_bytes == 0


def test_threads_that_enter_one_meter_are_added_up():
    """Whatever the order: nothing is lost, and what crosses over counts once."""
    meter, start = MemoryMeter(), threading.Barrier(4, timeout=30)
    kept: list[Tensor] = []
    here = torch.zeros(1000)

    def work(size: int) -> None:
        with meter:
            start.wait()
            for _ in range(300):
                values = here[:size].clone() + 1
            kept.append(values)

    threads = [threading.Thread(target=work, args=(size,)) for size in range(1, 5)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert meter.live_bytes == (1000 + 1 + 2 + 3 + 4) * FLOAT
    assert meter.live_bytes <= meter.peak_bytes <= (1000 + 3 * 10) * FLOAT
    kept.clear()
    assert meter.live_bytes == here.nbytes


def test_what_another_thread_made_counts_from_its_first_use_here():
    """As a batch that is fetched ahead."""
    made: list[Tensor] = []
    with memory_cap(None) as meter:
        thread = threading.Thread(target=lambda: made.append(torch.zeros(100)))
        thread.start()
        thread.join()
        assert meter.live_bytes == 0
        made[0].add_(1)
        assert meter.live_bytes == 100 * FLOAT
