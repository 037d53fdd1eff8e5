"""What the server adds to the mean: its own data, momentum, and pruning.

All of these methods sample clients as ``fedavg`` does and give them routes: on devices
without a limit, everybody trains the whole model.
"""

from simulations.methods.server_steps.feddu import FEDDU
from simulations.methods.server_steps.feddum import FEDDUM
from simulations.methods.server_steps.feddumap import FEDDUMAP
from simulations.methods.server_steps.hybrid import HYBRID

SERVER_STEPS = (HYBRID, *FEDDU, *FEDDUM, FEDDUMAP)
"""The server's data as one client more, first."""
