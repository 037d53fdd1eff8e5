"""A selection of one's own: what the page shows is what runs; it chooses by loss."""

from pathlib import Path
from random import Random

from flwr_smartsplit.plan.selection.history import NO_HISTORY
from flwr_smartsplit.plan.selection.selection import EDGES_FULL, NOT_SAMPLED
from flwr_smartsplit.types import EdgeProfile, Route
from simulations.methods import METHODS, power_of_choice
from simulations.methods.power_of_choice import POWER_OF_CHOICE
from tests.plan.fleets import candidate, request, seen

SOURCE = Path(power_of_choice.__file__).read_text(encoding="utf-8")
PAGE = Path(__file__).parents[3] / "docs" / "howto" / "selection.md"
FLEET = [candidate(key, seconds=(9.0, 1.0)) for key in "abcd"]
HISTORY = NO_HISTORY.after(
    seen(key, loss_rms=loss) for key, loss in {"a": 1.0, "b": 3.0, "c": 2.0}.items()
)


def test_who_never_took_part_comes_first_and_then_the_highest_loss() -> None:
    """Of four candidates two are wanted, so all are drawn."""
    found = power_of_choice.power_of_choice(
        request(FLEET, num_clients=2, history=HISTORY)
    )
    assert [each.client_key for each in found.chosen] == ["d", "b"]
    assert found.passed == {"a": NOT_SAMPLED, "c": NOT_SAMPLED}


def test_only_who_is_drawn_can_be_taken() -> None:
    """Of one wanted, two are drawn."""
    chosen = {
        each.client_key
        for seed in range(40)
        for each in power_of_choice.power_of_choice(
            request(FLEET, history=HISTORY, rng=Random(seed))
        ).chosen
    }
    assert chosen == {"b", "c", "d"}  # a has the lowest loss of any two.


def test_edges_are_never_asked_for_more_than_they_have() -> None:
    """Who finds no room takes another route, or gives way to the next."""
    edges = (EdgeProfile(name="x", memory_bytes=25),)
    found = power_of_choice.power_of_choice(
        request(FLEET, num_clients=2, history=HISTORY, edges=edges)
    )
    routes = {each.client_key: each.option.route for each in found.chosen}
    assert routes == {"d": Route.split(2, edge="x"), "b": Route.whole()}
    assert EDGES_FULL not in found.passed.values()


def test_it_is_a_method_of_thirty_lines_with_two_names_and_the_page_shows_it() -> None:
    """As short as the page says."""
    assert METHODS["power_of_choice"] is POWER_OF_CHOICE
    assert len(SOURCE.splitlines()) <= 30
    (line,) = [line for line in SOURCE.splitlines() if "from flwr_smartsplit" in line]
    assert line == "from flwr_smartsplit import Selection, SelectionRequest"
    function = SOURCE[SOURCE.index("def power") : SOURCE.index("\n\n\nPOWER")]
    assert function in PAGE.read_text(encoding="utf-8")
