"""One file per table, each made from records alone."""
