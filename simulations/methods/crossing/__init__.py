"""How a boundary crosses one cut: with one codec, or through a learned gate.

All of these methods train the model ``gated`` from the same first state, and everybody
is cut at its gate: they differ in what crosses, and in nothing else.
"""

from simulations.methods.crossing.codecs import CODECS
from simulations.methods.crossing.gates import GATES

CROSSINGS = (*CODECS, *GATES)
"""One crossing in ten ways, ``raw`` first."""
