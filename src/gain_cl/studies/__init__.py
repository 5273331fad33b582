"""An experiment: its runs, what they are compared by, and its verdicts."""
