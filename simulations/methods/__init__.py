"""The methods that experiments compare, one file each."""

from simulations.methods.blocks import BY_BLOCK
from simulations.methods.chance import RANDOM
from simulations.methods.crossing import CROSSINGS
from simulations.methods.depthfl import DEPTHFL
from simulations.methods.drop_weak import DROP_WEAK
from simulations.methods.fedavg import FEDAVG
from simulations.methods.heterofl import HETEROFL
from simulations.methods.method import Method
from simulations.methods.oort import OORT
from simulations.methods.power_of_choice import POWER_OF_CHOICE
from simulations.methods.server_steps import SERVER_STEPS
from simulations.methods.smartsplit import CODED, SMARTSPLIT, VARIANTS
from simulations.methods.splitfed import SPLITFED
from simulations.methods.stock import STOCK
from simulations.methods.widths import BY_WIDTH

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        FEDAVG,
        *STOCK,
        DROP_WEAK,
        OORT,
        POWER_OF_CHOICE,
        HETEROFL,
        *BY_WIDTH,
        DEPTHFL,
        *BY_BLOCK,
        SPLITFED,
        RANDOM,
        SMARTSPLIT,
        CODED,
        *VARIANTS,
        *CROSSINGS,
        *SERVER_STEPS,
    )
}
"""Every method by its name, in the order of reports."""
