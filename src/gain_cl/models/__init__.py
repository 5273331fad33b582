"""Models by family: where they come from, how they are loaded, their forward pass and loss."""
