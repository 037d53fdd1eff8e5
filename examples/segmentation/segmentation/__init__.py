"""segmentation: a U-Net that is cut across its skip connections."""

from importlib.util import find_spec

if find_spec("flwr_smartsplit") is None:
    raise ModuleNotFoundError(
        "segmentation needs flwr_smartsplit in this environment. Install it from its "
        "source: pip install /path/to/flwr_smartsplit. Not by its name: no package "
        "index has it yet, and whoever registers the name could run code here."
    )
