"""The schema of a configuration, and where its presets are."""
