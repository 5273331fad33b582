"""Files, locks, signals, hashes, packages and the hub: what a run needs of the machine.
Torch-free."""
