"""From presets and a command line to a checked configuration. Torch-free."""
