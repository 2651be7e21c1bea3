"""Chats as text: through the tokenizer's chat template, or as `role: content` where it has none."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pocketllm.errors import SourceError, reason_of

logger = logging.getLogger(__name__)

# "Today" in templates that write the date, in any format: a later run reads the same text.
_DAY = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"

Turn = dict[str, Any]  # role, content, and what else chat templates know


@dataclass(frozen=True)
class Chat:
    """The turns of a chat. where: file and row, for messages.

    plain: (prompt, answer) of an instruction, for a tokenizer without a chat template.
    """

    turns: tuple[Turn, ...]
    where: str
    plain: tuple[str, str] | None = None

    def __len__(self) -> int:
        """Number of characters in all turns."""
        return sum(len(turn["content"]) for turn in self.turns)

    @property
    def is_answered(self) -> bool:
        """Whether the assistant says something; an instruction always has an answer, if an empty one."""
        return self.plain is not None or any(
            turn["role"] == "assistant" and turn["content"] for turn in self.turns
        )


def has_template(tokenizer: Any) -> bool:
    """Whether a tokenizer (or None) has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def render(documents: Sequence[str | Chat], tokenizer: Any, name: str) -> str:
    """Texts and chats as one text, paragraphs apart.

    Logs a warning if there are chats, but no chat template.

    Args:
        tokenizer: its chat template is used; None has none. name: of the texts, for the warning.

    Raises:
        SourceError: the template refuses a chat; names the row.
    """
    warn_without_template(documents, tokenizer, name)
    texts = (text if isinstance(text, str) else _text(text, tokenizer) for text in documents)
    return "\n\n".join(texts)


def warn_without_template(documents: Sequence[str | Chat], tokenizer: Any, name: str) -> None:
    """Log a warning if there are chats (instructions have a form of their own), but no chat template."""
    if not has_template(tokenizer) and any(isinstance(d, Chat) and d.plain is None for d in documents):
        logger.warning(
            "%s: contains chats, but the tokenizer has no chat template: turns are written as `role: content`, "
            "with empty lines between them",
            name,
        )


def _text(chat: Chat, tokenizer: Any) -> str:
    if has_template(tokenizer):
        return _through_template(chat, chat.turns, tokenizer)
    return "".join(part for part, _ in pieces(chat, tokenizer))


def pieces(chat: Chat, tokenizer: Any) -> list[tuple[str, bool]]:
    """The text of a chat in pieces: (text, whether it is an answer of the assistant, which is to be learned).

    With a chat template an answer includes the tokens that end it. Answers that the template changes later in the
    chat (it may remove their reasoning) are not learned, except for the last.

    Raises:
        SourceError: the template refuses the chat; names the row.
    """
    if not has_template(tokenizer):
        return [(chat.plain[0], False), (chat.plain[1], True)] if chat.plain else _separated(chat.turns)
    full, found, done = _through_template(chat, chat.turns, tokenizer), [], 0
    for n, turn in enumerate(chat.turns):
        if turn["role"] != "assistant" or n == 0:
            continue
        before = _through_template(chat, chat.turns[:n], tokenizer, add_generation_prompt=True)
        until = _through_template(chat, chat.turns[: n + 1], tokenizer)
        start = _common(before, full)  # a template may add more than the answer begins with
        if full.startswith(until) and done <= start < len(until):
            found += [(full[done:start], False), (full[start : len(until)], True)]
            done = len(until)
    return [*found, (full[done:], False)]


def _common(left: str, right: str) -> int:
    """Number of characters with which both texts begin."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(left), len(right)))


def _separated(turns: Sequence[Turn]) -> list[tuple[str, bool]]:
    """`role: content` of every turn, empty lines between them."""
    found: list[tuple[str, bool]] = []
    for n, turn in enumerate(turns):
        head = f"{turn['role']}: " if n == 0 else f"\n\n{turn['role']}: "
        found += [(head, False), (turn["content"], turn["role"] == "assistant")]
    return found


def _through_template(chat: Chat, turns: Sequence[Turn], tokenizer: Any, **settings: Any) -> str:
    try:
        template = tokenizer.get_chat_template()
        dated = _DAY + template if "strftime_now" in template else template
        return str(
            tokenizer.apply_chat_template(list(turns), chat_template=dated, tokenize=False, **settings)
        )
    except Exception as error:  # a template is a program of its own
        raise SourceError(
            f"{chat.where}: the tokenizer's chat template refuses this chat ({reason_of(error)}); "
            "change its roles, or remove it"
        ) from error
