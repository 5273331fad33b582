"""Domains: where text comes from (read, recipes, generate) and what a run makes of it (base). Torch-free."""

from gain_cl.domains.base import Block, Blocks, Doc, Domain, Mixture, Stream, check, prepare, tokenize
from gain_cl.domains.read import collect, documents, foresee, pin, tokenised

__all__ = [
    "Block",
    "Blocks",
    "Doc",
    "Domain",
    "Mixture",
    "Stream",
    "check",
    "collect",
    "documents",
    "foresee",
    "pin",
    "prepare",
    "tokenised",
    "tokenize",
]
