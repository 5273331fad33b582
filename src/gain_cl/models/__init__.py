"""Models by family: where they come from, how they are loaded, their forward pass and loss.

``Loaded`` and ``targets`` are here for plugins (docs/extending.md).
"""

from gain_cl.models.families import targets
from gain_cl.models.load import Loaded

__all__ = ["Loaded", "targets"]
