"""A mask that every block needs: why there is no cut, and that the way out works."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flwr_smartsplit import Chain, Route, Task, Unit
from flwr_smartsplit.errors import NotSplittable
from flwr_smartsplit.split.trace import tracing
from flwr_smartsplit.verify.equivalence import RouteChecker, example_batches


class Masked(nn.Module):
    """Embeddings, blocks that all take the padding mask, and a head."""

    def __init__(self, *, derived: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
            for _ in range(5)
        )
        self.head = nn.Linear(8, 3)
        self.derived = derived

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Run all blocks under the mask."""
        hidden = self.embed(tokens)
        if self.derived:
            mask = torch.where(mask, -1e9, 0.0)
        for block in self.blocks:
            hidden = block(hidden, src_key_padding_mask=mask)
        outputs: Tensor = self.head(hidden.mean(1))
        return outputs


def embed(root: Any, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Begin, and hand the mask on."""
    return root.embed(tokens), mask


def block(root: Any, hidden: Tensor, mask: Tensor, *, name: str) -> Any:
    """Run one block."""
    return root.get_submodule(name)(hidden, src_key_padding_mask=mask), mask


def head(root: Any, hidden: Tensor, mask: Tensor) -> Tensor:
    """End."""
    del mask
    outputs: Tensor = root.head(hidden.mean(1))
    return outputs


def units(model: nn.Module) -> list[Unit]:
    """List the units by hand, as the refusal says."""
    assert isinstance(model, Masked)
    names = [f"blocks.{index}" for index in range(len(model.blocks))]
    middle = [Unit(name, partial(block, name=name), (name,)) for name in names]
    return [Unit("embed", embed, ("embed",)), *middle, Unit("head", head, ("head",))]


TOKENS = {
    "tokens": torch.arange(1, 9).view(2, 4),
    "mask": torch.tensor([[False] * 4, [False, False, True, True]]),
}


def test_an_input_that_all_blocks_need_is_named_with_the_way_out() -> None:
    chain = Chain.from_module(Masked(), TOKENS)
    assert len(chain) == 3  # No block before the last one ends a unit.
    reason = chain.refusals["mask"]
    assert "still needed next to" in reason
    assert "Task(units_fn=...)" in reason and "return hidden, mask" in reason


def test_a_value_that_all_blocks_need_is_named_with_the_way_out() -> None:
    chain = Chain.from_module(Masked(derived=True), TOKENS)
    reasons = " ".join(chain.refusals.values())
    assert "Task(max_boundary_tensors=...)" in reasons, chain.refusals
    more = Chain.from_module(Masked(derived=True), TOKENS, max_boundary_tensors=2)
    assert len(more) > len(chain)


def test_the_way_out_gives_the_stock_models_numbers() -> None:
    task = Task(
        model_fn=Masked,
        loss_fn=nn.functional.cross_entropy,
        optimizer_fn=partial(torch.optim.SGD, lr=0.1),
        example_inputs=TOKENS,
        example_targets=torch.arange(3),
        units_fn=units,
    )
    with RouteChecker(task, example_batches(task, batch_size=3)) as checker:
        assert checker.chain.unit_names == (
            "embed",
            *map("blocks.{}".format, range(5)),
            "head",
        )
        for cut in range(1, 7):
            assert checker.check(Route.split(cut)).differences == ()


def test_without_it_there_would_be_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: as it was."""
    monkeypatch.setattr(tracing, "_needed_everywhere", lambda *_, **__: {})
    assert Chain.from_module(Masked(), TOKENS).refusals == {}
    with pytest.raises(NotSplittable):
        Chain.from_module(Masked(), torch.zeros(2))
