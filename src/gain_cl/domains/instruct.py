"""Say what a model reads of a document, and what of that is scored: text as it stands, turns with
or without a chat template. Torch-free."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from gain_cl.config.schema import Domain
from gain_cl.domains.read import template_text
from gain_cl.domains.text import Document, Turn, plain
from gain_cl.errors import DataError, PreemptedError
from gain_cl.system import signals

SECONDS = 20.0
"""For a chat template to write one document. Most take less than a thousandth."""

BREAK = "\ufdd0"
"""No character. It stands within special tokens that data writes out, so that no tokenizer finds
them: they are spelt as text and forge no turn. tokens.tokenize takes it out."""
DATE = "26 Jul 2024"
"""The date_string of every template. With today's date the text would change every day."""


@dataclass(frozen=True)
class Chat:
    """A chat template. prefix_id: the token before every text. where: where it comes from."""

    template: str
    prefix_id: int | None
    where: str
    tokenizer: Any = field(repr=False)


class Piece(NamedTuple):
    """A part of what the model reads, tokenised apart, so that no token holds some of two. Where it
    is scored, its UTF-8 bytes first to last are the data's own. The others are marks of the
    template."""

    text: str
    scored: bool = False
    first: int = 0
    last: int = 0


def find_chat(domain: Domain, tokenizer: Any, prefix_id: int | None = None) -> Chat | None:
    """Return the chat template of a domain; None when it names none. DataError: the domain asks for
    the tokenizer's own and there is none, or the template writes today's date."""
    named = getattr(domain.source, "template", None)
    if named is None:
        return None
    where, template = f"domain {domain.name}", template_text(domain)
    if template is None:
        try:
            template = str(tokenizer.get_chat_template())
        except ValueError:
            do = "set source.chat_template to FILE.jinja (null, where prompt and completion do)"
            raise DataError("the tokenizer of the model has no chat template", where, do) from None
    if "strftime_now" in template and "date_string" not in template:
        what = "the chat template writes today's date: its text would change from day to day"
        do = "copy it to a FILE.jinja, write a fixed date there and set source.chat_template to it"
        raise DataError(what, where, do)
    return Chat(template, prefix_id, where if named == "model" else named, tokenizer)


def special_tokens(tokenizer: Any) -> re.Pattern[str]:
    """Return what finds the special tokens of a tokenizer in text."""
    known = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    return re.compile("|".join(map(re.escape, sorted(known, reverse=True))) or "(?!)")


def show(document: Document, chat: Chat | None, special: re.Pattern[str]) -> list[Piece]:
    """Return a document in pieces. DataError: the template fails, or does not write the turns one
    after the other as they stand."""

    def spelt(text: str) -> str:
        return special.sub(lambda found: BREAK.join(found[0]), text)

    if isinstance(document, str):
        return [_scored(spelt(document), spelt(document))]
    turns = [Turn(*map(spelt, turn)) for turn in document]
    if chat is None:
        answer = turns[-1].content
        return [Piece(plain(tuple(turns)).removesuffix(answer)), _scored(answer, answer)]
    pieces, done = list[Piece](), ""
    whole = _render(chat, turns, False)
    for number, (role, content) in enumerate(turns):
        if role != "assistant":
            continue
        before = _render(chat, turns[:number], True)
        after = _render(chat, turns[: number + 1], False)
        said = after.removeprefix(before)
        own = content if content in said else content.strip()
        grows = before.startswith(done) and after.startswith(before) and whole.startswith(after)
        if not grows or own not in said:
            what = (
                "the chat template does not write turns one after the other, answers as they stand"
            )
            do = "use one that writes a turn the same whatever follows, and whose "
            do += "add_generation_prompt ends where the assistant's text begins"
            raise DataError(what, chat.where, do)
        pieces += [Piece(before.removeprefix(done)), _scored(said, own)]
        done = after
    return pieces


def _scored(text: str, own: str) -> Piece:
    """Return a piece that is scored, of which ``own`` is the data's."""
    first, size = (len(t.replace(BREAK, "").encode()) for t in (text[: text.index(own)], own))
    return Piece(text, True, first, first + size)


def _render(chat: Chat, turns: list[Turn], add_generation_prompt: bool) -> str:
    """Return turns as the template writes them, in transformers' sandbox. A template comes from
    others and may raise any exception."""
    try:
        with signals.at_once(SECONDS):
            text = chat.tokenizer.apply_chat_template(
                [turn._asdict() for turn in turns],
                chat_template=chat.template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                date_string=DATE,
                strftime_now=None,
            )
        return str(text)
    except PreemptedError:
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(
            f"the chat template fails: {reason}", chat.where, "check the template"
        ) from error
