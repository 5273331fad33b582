"""What is measured of a model, and the record of it: perplexity, tasks, scores, provenance."""
