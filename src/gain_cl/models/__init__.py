"""Models by family: where they come from, how they are loaded, their forward pass and loss.

These names are here for plugins (docs/extending.md).
"""

from gain_cl.models.families import input_width, output_width, targets
from gain_cl.models.load import Loaded

__all__ = ["Loaded", "input_width", "output_width", "targets"]
