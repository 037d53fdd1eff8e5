"""EdgeService: what overlaps while a tail is being sealed."""

from pathlib import Path
from typing import Any

import pytest

from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.service import EdgeService
from flwr_smartsplit.edge.state_store import StateStore
from flwr_smartsplit.edge.tensors import state_digest
from flwr_smartsplit.errors import StaleSession
from tests.tasks import SEED, TASK, initial_state, tiny_chain


def test_a_session_opened_during_a_seal_outlives_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The seal of the earlier opening fails, and takes nothing of the later one."""
    state = initial_state()
    service = EdgeService(TASK, spill_dir=tmp_path, incarnation="life")
    service.handle(wire.HoldState(state_digest(state), state))

    def open_session(token: str) -> str:
        opened = service.handle(
            wire.OpenSession(
                session="s",
                place="edge",
                round_number=1,
                client_key="c0",
                start=2,
                stop=len(tiny_chain()),
                state_digest=state_digest(state),
                seed=SEED,
                num_threads=1,
                token=token,
            )
        )
        return opened.incarnation

    earlier, later = open_session("a"), []
    put = StateStore.put_tail

    def put_slowly(spill: StateStore, *args: Any) -> str:
        monkeypatch.setattr(StateStore, "put_tail", put)
        later.append(open_session("b"))
        return put(spill, *args)

    monkeypatch.setattr(StateStore, "put_tail", put_slowly)
    with pytest.raises(StaleSession):
        service.handle(wire.Seal("s", earlier, 0))
    (receipt,) = service.handle(wire.Seal("s", later[0], 0))
    assert receipt.num_steps == 0
