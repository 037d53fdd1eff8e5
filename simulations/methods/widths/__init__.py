"""Methods in which clients train slices of the channels, on the package's variants."""

from simulations.methods.widths.allsmall import ALLSMALL
from simulations.methods.widths.fedrolex import FEDROLEX
from simulations.methods.widths.heterofl_widths import HETEROFL_WIDTHS
from simulations.methods.widths.whale import WHALE

BY_WIDTH = (HETEROFL_WIDTHS, FEDROLEX, ALLSMALL, *WHALE)
"""In the order of reports."""
