"""One run, from its plan to its record. Read run.py first."""
