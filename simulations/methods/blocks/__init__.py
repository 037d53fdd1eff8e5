"""Methods that train a model block by block, on the package's variants."""

from simulations.methods.blocks.profl import PROFL, PROFL_ROUTES

BY_BLOCK = (PROFL, PROFL_ROUTES)
"""In the order of reports."""
