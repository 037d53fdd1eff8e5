"""own_model: a model of one's own, and labels that stay on the device."""

from importlib.util import find_spec

if find_spec("flwr_smartsplit") is None:
    raise ModuleNotFoundError(
        "own_model needs flwr_smartsplit in this environment. Install it from its "
        "source: pip install /path/to/flwr_smartsplit. Not by its name: no package "
        "index has it yet, and whoever registers the name could run code here."
    )
