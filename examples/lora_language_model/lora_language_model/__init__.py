"""Federated LoRA fine-tuning of a small language model."""

from importlib.util import find_spec

if find_spec("flwr_smartsplit") is None:
    raise ModuleNotFoundError(
        "lora_language_model needs flwr_smartsplit in this environment. Install it "
        "from its source: pip install /path/to/flwr_smartsplit. Not by its name: no "
        "package index has it yet, and whoever registers it could run code here."
    )
