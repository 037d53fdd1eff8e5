"""Power-of-choice: of twice as many clients as wanted, those whose loss is highest.

A selection of one's own, shown in docs/howto/selection.md. From Cho, Wang, Joshi:
Towards Understanding Biased Client Selection in Federated Learning. AISTATS 2022.
"""

from math import inf

from flwr_smartsplit import Selection, SelectionRequest
from simulations.methods.method import Method, split_strategy


def power_of_choice(request: SelectionRequest) -> Selection:
    """Draw twice as many clients as wanted; take those of the highest last loss."""
    num_drawn = min(2 * request.num_clients, len(request.candidates))
    drawn = request.rng.sample(request.candidates, num_drawn)
    seen = request.history.latest
    losses = {key: observation.loss_rms for key, observation in seen.items()}
    drawn.sort(key=lambda each: losses.get(each.client_key, inf), reverse=True)
    return request.take(drawn)  # Each on its best route for which an edge has room.


POWER_OF_CHOICE = Method(
    name="power_of_choice",
    summary="of clients drawn at random, those whose loss is highest",
    strategy_fn=lambda setting: split_strategy(setting, select=power_of_choice),
)
