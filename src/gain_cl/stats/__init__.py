"""Numbers from losses: matrix, answers, inference, fronts, and how they are written. NumPy and
SciPy only, no I/O."""
