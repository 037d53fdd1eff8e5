"""Threads: the plan's number is in force, in this thread and in all beside it."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from flwr_smartsplit.train.threads import torch_threads


def test_the_number_is_set_and_restored() -> None:
    """Also when what runs inside fails, and when contexts nest."""
    before = torch.get_num_threads()
    with torch_threads(2):
        assert torch.get_num_threads() == 2
        with torch_threads(1):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    with pytest.raises(RuntimeError, match="on purpose"), torch_threads(2):
        raise RuntimeError("on purpose")
    assert torch.get_num_threads() == before


def test_threads_that_finish_do_not_change_those_that_go_on() -> None:
    """Each keeps its own number, whoever restores his in the meantime."""
    values = torch.ones(64, 64)

    def work(num_threads: int) -> set[int]:
        seen = set()
        for _ in range(30):
            with torch_threads(num_threads):
                values @ values
                seen.add(torch.get_num_threads())
        return seen

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, [1, 2, 1, 2])) == [{1}, {2}, {1}, {2}]
