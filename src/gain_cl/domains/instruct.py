"""Instruction data: the text that a model reads of a prompt and a completion, with or without a
chat template. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from gain_cl.config.schema import Domain
from gain_cl.domains.read import template_file
from gain_cl.domains.text import Pair, joint
from gain_cl.errors import DataError

DATE = "26 Jul 2024"
"""date_string of every template: one that writes today's date would be another text every day."""


@dataclass(frozen=True)
class Chat:
    """A chat template. special: the special tokens it may name; prefix_id: the token before every
    text."""

    template: str
    special: dict[str, Any]
    prefix_id: int | None
    where: str
    tokenizer: Any = field(repr=False)


class Shown(NamedTuple):
    """What the model reads: prompt, then completion, which is scored. The UTF-8 bytes first to last
    of the completion are the data's own; the others are marks of the template."""

    prompt: str
    completion: str
    first: int
    last: int


def chat(domain: Domain, tokenizer: Any, prefix_id: int | None = None) -> Chat | None:
    """The chat template of a domain; None when it names none. DataError when the tokenizer has none
    of its own."""
    named = getattr(domain.source, "chat_template", None)
    if named is None:
        return None
    where, template = f"domain {domain.name}", template_file(domain)
    if template is None:
        own = getattr(tokenizer, "chat_template", None)
        template = own.get("default") if isinstance(own, dict) else own
        if not template:
            raise DataError(
                "the tokenizer of the model has no chat template",
                where,
                "set source.chat_template to FILE.jinja or null",
            )
    if "strftime_now" in template and "date_string" not in template:
        do = "copy it to a FILE.jinja, write a fixed date there and set source.chat_template to it"
        raise DataError(
            "the chat template writes today's date: its text would change from day to day",
            where,
            do,
        )
    if prefix_id is None:
        prefix_id = (
            tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        )
    return Chat(
        template,
        dict(tokenizer.special_tokens_map),
        prefix_id,
        named if named != "model" else where,
        tokenizer,
    )


def show(pair: Pair, chat: Chat | None) -> Shown:
    """The text of a pair. DataError when the template fails, or does not write the prompt first and
    then the completion."""
    if chat is None:
        return Shown(pair.prompt + joint(pair), pair.completion, 0, len(pair.completion.encode()))
    asked = [{"role": "user", "content": pair.prompt}]
    before = _render(chat, asked, add_generation_prompt=True)
    whole = _render(
        chat,
        [*asked, {"role": "assistant", "content": pair.completion}],
        add_generation_prompt=False,
    )
    if not whole.startswith(before):
        what = (
            "with the completion the chat template does not begin as it does for the prompt alone"
        )
        raise DataError(
            what,
            chat.where,
            "use a template whose add_generation_prompt ends where the assistant's text begins",
        )
    completion = whole[len(before) :]
    own = next(
        (text for text in (pair.completion, pair.completion.strip()) if text in completion), None
    )
    if own is None:
        raise DataError(
            "the chat template does not write the completion as it stands",
            chat.where,
            "use another template",
        )
    first = len(completion[: completion.index(own)].encode())
    return Shown(before, completion, first, first + len(own.encode()))


def _render(chat: Chat, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    """In transformers' sandbox: a template comes from others, and what it raises is its own."""
    keys = {
        "chat_template": chat.template,
        "tokenize": False,
        "add_generation_prompt": add_generation_prompt,
    }
    try:
        return str(
            chat.tokenizer.apply_chat_template(
                messages, date_string=DATE, strftime_now=None, **keys
            )
        )
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(
            f"the chat template fails: {reason}", chat.where, "check the template"
        ) from error
