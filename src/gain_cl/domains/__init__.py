"""Domains: where text comes from (read, recipes, generate) and what a run makes of it (base).
Torch-free."""

from gain_cl.domains.checks import check
from gain_cl.domains.domain import Domain
from gain_cl.domains.read import collect, documents, foresee, pin, tokenised
from gain_cl.domains.stream import Block, Blocks, Doc, Mixture, Stream
from gain_cl.domains.tokens import prepare, tokenize

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
