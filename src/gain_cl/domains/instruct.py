"""Instruction data: the text that a model reads of a prompt and a completion, with or without a
chat template. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from gain_cl.config.schema import Domain
from gain_cl.domains.read import template_text
from gain_cl.domains.text import Pair, joint
from gain_cl.errors import DataError, PreemptedError
from gain_cl.system import signals

SECONDS = 20.0
"""For a chat template to write one document. Most take less than a thousandth."""

DATE = "26 Jul 2024"
"""The date_string of every template. With today's date the text would change every day."""


@dataclass(frozen=True)
class Chat:
    """A chat template. special: the special tokens it may name. prefix_id: the token before every
    text. where: where it comes from."""

    template: str
    special: dict[str, Any]
    prefix_id: int | None
    where: str
    tokenizer: Any = field(repr=False)


class Shown(NamedTuple):
    """What the model reads: the prompt, then the completion, which is scored. The UTF-8 bytes first
    to last of the completion are the data's own. The others are marks of the template."""

    prompt: str
    completion: str
    first: int
    last: int


def find_chat(domain: Domain, tokenizer: Any, prefix_id: int | None = None) -> Chat | None:
    """Return the chat template of a domain; None when it names none. DataError: the domain asks for
    the tokenizer's own and there is none, or the template writes today's date."""
    named = getattr(domain.source, "chat_template", None)
    if named is None:
        return None
    where, template = f"domain {domain.name}", template_text(domain)
    if template is None:
        template = getattr(tokenizer, "chat_template", None)
        if isinstance(template, dict):
            template = template.get("default")
        if not template:
            do = "set source.chat_template to FILE.jinja or null"
            raise DataError("the tokenizer of the model has no chat template", where, do)
    if "strftime_now" in template and "date_string" not in template:
        what = "the chat template writes today's date: its text would change from day to day"
        do = "copy it to a FILE.jinja, write a fixed date there and set source.chat_template to it"
        raise DataError(what, where, do)
    if prefix_id is None:
        bos = tokenizer.bos_token_id
        prefix_id = tokenizer.eos_token_id if bos is None else bos
    where = where if named == "model" else named
    return Chat(template, dict(tokenizer.special_tokens_map), prefix_id, where, tokenizer)


def show_pair(pair: Pair, chat: Chat | None) -> Shown:
    """Return the text of a pair. DataError: the template fails, or does not write the prompt first
    and then the completion."""
    if chat is None:
        return Shown(pair.prompt + joint(pair), pair.completion, 0, len(pair.completion.encode()))
    asked = [{"role": "user", "content": pair.prompt}]
    before = _render(chat, asked, add_generation_prompt=True)
    answered = [*asked, {"role": "assistant", "content": pair.completion}]
    whole = _render(chat, answered, add_generation_prompt=False)
    if not whole.startswith(before):
        what = (
            "with the completion the chat template does not begin as it does for the prompt alone"
        )
        do = "use a template whose add_generation_prompt ends where the assistant's text begins"
        raise DataError(what, chat.where, do)
    completion = whole[len(before) :]
    own = pair.completion if pair.completion in completion else pair.completion.strip()
    if own not in completion:
        what = "the chat template does not write the completion as it stands"
        raise DataError(what, chat.where, "use another template")
    first = len(completion[: completion.index(own)].encode())
    return Shown(before, completion, first, first + len(own.encode()))


def _render(chat: Chat, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    """Return messages as the template writes them, in transformers' sandbox. A template comes from
    others and may raise any exception."""
    try:
        with signals.at_once(SECONDS):
            text = chat.tokenizer.apply_chat_template(
                messages,
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
