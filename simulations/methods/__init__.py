"""The methods that experiments compare, one file each."""

from simulations.method import Method
from simulations.methods.drop_weak import DROP_WEAK
from simulations.methods.fedavg import FEDAVG
from simulations.methods.smartsplit import SMARTSPLIT

METHODS: dict[str, Method] = {
    method.name: method for method in (FEDAVG, DROP_WEAK, SMARTSPLIT)
}
"""Every method by its name, in the order of reports."""
