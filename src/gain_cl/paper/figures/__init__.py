"""Figures of an experiment: a module each, ``build(study) -> Figure``."""
