"""The methods that experiments compare, one file each."""

from simulations.method import Method
from simulations.methods.chance import RANDOM
from simulations.methods.drop_weak import DROP_WEAK
from simulations.methods.fedavg import FEDAVG
from simulations.methods.oort import OORT
from simulations.methods.smartsplit import SMARTSPLIT, VARIANTS
from simulations.methods.splitfed import SPLITFED

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        FEDAVG,
        DROP_WEAK,
        SPLITFED,
        OORT,
        RANDOM,
        SMARTSPLIT,
        *VARIANTS,
    )
}
"""Every method by its name, in the order of reports."""
