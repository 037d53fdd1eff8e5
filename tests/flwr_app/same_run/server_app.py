"""The server: writes the digest of the final state into a file."""

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from flwr_smartsplit import Planning, SmartSplit
from flwr_smartsplit.edge.tensors import state_digest
from flwr_smartsplit.flower.serde.records import from_array_record
from tests.simulated_app import EDGES, TASK, all_kinds, initial_arrays

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train three rounds on all kinds of route."""
    strategy = SmartSplit(
        TASK,
        EDGES,
        strategy=FedAvg(fraction_evaluate=0.0, min_available_nodes=6),
        planning=Planning(choose_route=all_kinds),
        seed=7,
    )
    result = strategy.start(grid, initial_arrays(), num_rounds=3, timeout=120)
    state = from_array_record(result.arrays)
    Path(str(context.run_config["out"])).write_text(state_digest(state))
