"""A stranger gets nothing from an edge with a secret; one without is noticed."""

from pathlib import Path

from flwr_smartsplit.edge.gate.gate import Terms
from flwr_smartsplit.edge.gate.run_keys import secret_digest
from flwr_smartsplit.edge.hosts.addresses import Address
from simulations.faults.stranger import (
    FLOWERS_OWN,
    Try,
    problems,
    requests_without_secrets,
    shown,
)
from tests.edge.hosts.served import Authority, serving


def tries(folder: Path, terms: Terms) -> list[Try]:
    """Try an edge with TLS that this process serves."""
    with serving(folder, authority=Authority.make(folder), terms=terms) as served:
        address = Address.read(served.address)
        return [
            Try(
                process="edge",
                port=1,
                address="127.0.0.1",
                what=what,
                answer=answer,
                is_let_in=is_let_in,
            )
            for what, answer, is_let_in in requests_without_secrets(address)
        ]


def test_an_edge_with_a_secret_gives_nothing(tmp_path: Path) -> None:
    """Not one of the requests is done."""
    found = tries(tmp_path, Terms(admin_digest=secret_digest("the admin secret")))
    assert len(found) == 5
    assert problems(found) == []


def test_an_edge_without_one_is_seen(tmp_path: Path) -> None:
    """The planted error: whoever comes first begins a run."""
    found = problems(tries(tmp_path, Terms()))
    assert any("begin a run, no secret: Welcome" in each for each in found)


def test_what_flower_gives_to_everybody_is_shown_and_no_problem() -> None:
    """A SuperLink without accounts lists its runs to whoever asks."""
    made = Try(
        process="superlink",
        port=1,
        address="127.0.0.1",
        what=f"{FLOWERS_OWN[0]}list-runs",
        answer="OK, 10 bytes",
        is_let_in=True,
    )
    assert problems([made]) == []
    assert [*shown([made]).columns[-1].cells] == ["1 that Flower gives to all"]
