"""One file per figure: ``build(run) -> Figure`` and ``png(run) -> bytes``. Everything is drawn from a record."""
