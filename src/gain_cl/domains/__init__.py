"""Domains: where text comes from (read, recipes, generate, text, instruct) and what a run makes of
it (tokens, domain, stream, checks, overlap). Torch-free."""

from gain_cl.domains.checks import check_domains, check_texts
from gain_cl.domains.domain import Domain
from gain_cl.domains.read import collect_documents, documents, pin_domain
from gain_cl.domains.stream import Block, Blocks, Doc, Mixture, Stream
from gain_cl.domains.tokens import in_token_cache, prepare_domain, tokenize

__all__ = [
    "Block",
    "Blocks",
    "Doc",
    "Domain",
    "Mixture",
    "Stream",
    "check_domains",
    "check_texts",
    "collect_documents",
    "documents",
    "in_token_cache",
    "pin_domain",
    "prepare_domain",
    "tokenize",
]
