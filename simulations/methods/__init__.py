"""The methods that experiments compare, one file each."""

from simulations.method import Method
from simulations.methods.depthfl import DEPTHFL
from simulations.methods.drop_weak import DROP_WEAK
from simulations.methods.fedavg import FEDAVG
from simulations.methods.heterofl import HETEROFL
from simulations.methods.smartsplit import SMARTSPLIT
from simulations.methods.stock import STOCK

METHODS: dict[str, Method] = {
    method.name: method
    for method in (FEDAVG, DROP_WEAK, SMARTSPLIT, HETEROFL, DEPTHFL, *STOCK)
}
"""Every method by its name, in the order of reports."""
