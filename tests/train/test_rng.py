"""Randomness: every draw depends on who draws and when, never on who runs beside it."""

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from flwr_smartsplit.train.rng import UnitStreams, derived_seed, stream

PARTS = st.lists(st.one_of(st.integers(0, 9), st.text(max_size=2)), max_size=4)


def draw(streams: UnitStreams, step: int, unit: int) -> list[float]:
    """Draw some numbers under one unit's stream."""
    with streams(step, unit):
        drawn: list[float] = torch.rand(5).tolist()
    return drawn


@given(one=PARTS, other=PARTS)
def test_every_part_changes_the_seed(one: list[Any], other: list[Any]) -> None:
    """Also the type and the grouping of the parts."""
    assert (derived_seed(*one) == derived_seed(*other)) == (one == other)
    assert 0 <= derived_seed(*one) < 2**63


def test_a_stream_hangs_on_seed_round_client_step_and_unit() -> None:
    """Changing one of them changes the numbers; repeating all repeats them."""
    base = UnitStreams(0, 1, "a")
    first = draw(base, 2, 3)
    assert draw(UnitStreams(0, 1, "a"), 2, 3) == first
    others = [
        draw(UnitStreams(1, 1, "a"), 2, 3),
        draw(UnitStreams(0, 2, "a"), 2, 3),
        draw(UnitStreams(0, 1, "b"), 2, 3),
        draw(base, 3, 3),
        draw(base, 2, 4),
    ]
    assert len({tuple(numbers) for numbers in [first, *others]}) == 6


def test_order_is_no_matter() -> None:
    """Streams can be opened in any order, and as often as needed."""
    streams = UnitStreams(5, 1, "a")
    places = [(step, unit) for step in range(4) for unit in range(4)]
    forward = {place: draw(streams, *place) for place in places}
    random.Random(0).shuffle(places)
    assert {place: draw(streams, *place) for place in places} == forward


def test_threads_do_not_disturb_each_other() -> None:
    """Eight threads that draw at once get what each would get alone."""
    keys = [f"c{client}" for client in range(8)]
    alone = [[draw(UnitStreams(0, 1, k), s, 0) for s in range(40)] for k in keys]

    def work(key: str) -> list[list[float]]:
        return [draw(UnitStreams(0, 1, key), step, 0) for step in range(40)]

    with ThreadPoolExecutor(len(keys)) as pool:
        for _ in range(3):
            assert list(pool.map(work, keys)) == alone


def test_the_process_generator_is_left_as_it_was() -> None:
    """After a stream, also one that failed, torch draws what it would have drawn."""
    before = torch.default_generator.get_state()
    with stream(3):
        torch.rand(7)
        with stream(4):
            torch.rand(3)
    with pytest.raises(RuntimeError, match="on purpose"), stream(3):
        torch.rand(7)
        raise RuntimeError("on purpose")
    assert torch.equal(torch.default_generator.get_state(), before)


def test_an_inner_stream_leaves_the_outer_one_as_it_was() -> None:
    """Streams nest."""
    with stream(3):
        whole = torch.rand(4)
    with stream(3):
        parts = [torch.rand(2)]
        with stream(9):
            torch.rand(5)
        parts.append(torch.rand(2))
    assert torch.equal(torch.cat(parts), whole)


# --- loaders --------------------------------------------------------------------------


class Augmented(Dataset[Tensor]):
    """Examples that torch's generator disturbs each time they are read."""

    def __len__(self) -> int:
        """Count them."""
        return 10

    def __getitem__(self, index: int) -> Tensor:
        """Read one, with noise."""
        return index + torch.rand(1)


def passes(streams: UnitStreams, epoch: int, between: Any = lambda: None) -> list[Any]:
    """Go through an augmented, shuffled loader once."""
    loader = DataLoader(Augmented(), batch_size=3, shuffle=True)
    batches = []
    for batch in streams.batches(loader, epoch):
        batches.append(batch.flatten().tolist())
        between()
    return batches


def test_shuffling_and_augmentation_are_derived() -> None:
    """They repeat for one client, round and epoch, and differ otherwise."""
    first = passes(UnitStreams(0, 1, "a"), 0)
    assert sorted(int(value) for batch in first for value in batch) == list(range(10))
    torch.manual_seed(99)
    assert passes(UnitStreams(0, 1, "a"), 0) == first
    assert passes(UnitStreams(0, 1, "a"), 1) != first
    assert passes(UnitStreams(0, 2, "a"), 0) != first
    assert passes(UnitStreams(0, 1, "b"), 0) != first


def test_what_is_drawn_between_batches_changes_no_batch() -> None:
    """A step may draw as much as it likes while the loader waits."""
    quiet = passes(UnitStreams(0, 1, "a"), 0)
    loud = passes(UnitStreams(0, 1, "a"), 0, between=lambda: torch.rand(17))
    assert loud == quiet


def test_a_loader_leaves_the_process_generator_as_it_was() -> None:
    """While a batch is used and at the end, even if nobody finishes."""
    before = torch.default_generator.get_state()
    loader = DataLoader(Augmented(), batch_size=3, shuffle=True)
    for _ in UnitStreams(0, 1, "a").batches(loader, 0):
        assert torch.equal(torch.default_generator.get_state(), before)
    for _ in UnitStreams(0, 1, "a").batches(loader, 0):
        break
    assert torch.equal(torch.default_generator.get_state(), before)


def test_loaders_in_threads_do_not_disturb_each_other() -> None:
    """Six clients that load at once get the batches each would get alone."""
    keys = [f"c{client}" for client in range(6)]
    alone = [passes(UnitStreams(0, 1, key), 0) for key in keys]
    with ThreadPoolExecutor(len(keys)) as pool:
        for _ in range(3):
            together = list(pool.map(lambda k: passes(UnitStreams(0, 1, k), 0), keys))
            assert together == alone


def test_an_error_of_the_loader_comes_through() -> None:
    """And leaves the generator as it was."""

    def broken() -> Any:
        yield 1
        torch.rand(1)
        raise OSError("disk on fire")

    before = torch.default_generator.get_state()
    with pytest.raises(OSError, match="disk on fire"):
        list(UnitStreams(0, 1, "a").batches(broken(), 0))
    assert torch.equal(torch.default_generator.get_state(), before)


def test_any_iterable_is_a_loader() -> None:
    """A plain list of batches works, and an empty one ends at once."""
    data = TensorDataset(torch.arange(4))
    assert len(list(UnitStreams(0, 1, "a").batches(data, 0))) == 4
    assert list(UnitStreams(0, 1, "a").batches([], 0)) == []
