"""Domains: where text comes from (read, recipes, generate) and what a run makes of it (base). Torch-free."""

from gain_cl.domains.base import Blocks, Doc, Domain, check, prepare, tokenize
from gain_cl.domains.read import collect, documents, foresee, pin, tokenised

__all__ = ["Blocks", "Doc", "Domain", "check", "collect", "documents", "foresee", "pin", "prepare", "tokenised", "tokenize"]
