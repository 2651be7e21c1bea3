"""What a row of JSON or of a data set gives a model to read: a text, or a chat.

Ids, addresses and other metadata are never read. The first of these that a row has is used:

1. the field `text`;
2. a chat: `messages`, `conversations` or `conversation`, a list of `{role, content}` or `{from, value}`;
3. an instruction: `instruction` and `output` (optionally `input`), or `prompt` and `response` (or `completion`);
4. a text continued: `prefix` and `completion` or `gold_completion`;
5. one of `TEXT_FIELDS`.
"""

from __future__ import annotations

from typing import Any

from pocketllm.errors import SourceError
from pocketllm.text.chat import Chat, Turn
from pocketllm.text.instructions import INSTRUCTION_FORMS, prompt_of, question_of

Document = str | Chat  # what a row gives

TEXT_FIELDS = (
    *("content", "contents", "raw_content", "document", "passage", "story", "article", "body"),
    *("paragraph", "page_content", "code", "sentence"),
)
_CHAT_FIELDS = ("messages", "conversations", "conversation")
_CONTINUED = (("prefix", "completion"), ("prefix", "gold_completion"))
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
_PASSED_ON = ("name", "tool_calls", "tool_call_id", "reasoning_content")  # which chat templates know


def document_of(row: Any, where: str, prefer_chat: bool = False) -> Document:
    """The text or chat of a row; empty if the row holds no string, or its text is null.

    Args:
        where: file and row, for messages. prefer_chat: look for chats and instructions before `text`.

    Raises:
        SourceError: a malformed chat or instruction, or strings under no field that is known.
    """
    if isinstance(row, str):
        return row
    if isinstance(row, list) and all(isinstance(item, str) for item in row):
        return "\n\n".join(row)
    has_text = isinstance(row, dict) and isinstance(row.get("text"), str)
    if has_text and not prefer_chat:
        return str(row["text"])
    chat = chat_of(row, where)
    if chat is not None:
        return chat
    fields = row if isinstance(row, dict) else {}
    for pair in _CONTINUED:
        if all(isinstance(fields.get(field), str) for field in pair):
            return "".join(fields[field] for field in pair)
    for field in ("text", *TEXT_FIELDS):
        if isinstance(fields.get(field), str):
            return str(fields[field])
    known = [field for field in ("text", *_CHAT_FIELDS, *TEXT_FIELDS) if field in fields]
    if not _has_text(row) or (known and not any(fields[field] for field in known)):
        return ""
    found = f"the fields {', '.join(map(str, fields))}" if fields else f"a {type(row).__name__}"
    raise SourceError(
        f"{where}: got {found}, none of which is known to hold text; rename the one to be read to `text`, or use "
        "`messages` (role, content), `prompt` and `response`, or `instruction` and `output`"
    )


def chat_of(row: Any, where: str) -> Chat | None:
    """The chat or instruction of a row; None if it is neither.

    Raises:
        SourceError: it has the fields of one, but not the values; names the row.
    """
    if isinstance(row, list) and row and all(isinstance(turn, dict) for turn in row):
        return _conversation(row, where) if {"role", "from"} & row[0].keys() else None
    if not isinstance(row, dict):
        return None
    for field in _CHAT_FIELDS:
        if row.get(field):
            chat = _conversation(row[field], where)
            system = row.get("system")
            if isinstance(system, str) and system and chat.turns[0]["role"] != "system":
                return Chat(({"role": "system", "content": system}, *chat.turns), where)
            return chat
    pair = prompt_of(row)
    if pair is not None:
        question, answer = question_of(row), pair[1]
        turns: tuple[Turn, ...] = (
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        )
        return Chat(turns, where, plain=pair)
    if any(form <= row.keys() for form in INSTRUCTION_FORMS):
        raise SourceError(
            f"{where} is not an instruction; wanted `instruction` and `output` (optionally `input`), or `prompt` and "
            "`response`, as strings in every row"
        )
    return None


def _conversation(turns: Any, where: str) -> Chat:
    """Turns in either form, with roles by the names that chat templates know.

    Raises:
        SourceError: not a list of objects, or one without role or text.
    """
    wanted = "wanted a list of {role, content} or {from, value}"
    if not isinstance(turns, list):
        raise SourceError(f"{where}: its chat is a {type(turns).__name__}; {wanted}")
    return Chat(
        tuple(_turn(turn, f"{where}: turn {n} of its chat", wanted) for n, turn in enumerate(turns, 1)), where
    )


def _turn(turn: Any, where: str, wanted: str) -> Turn:
    fields = turn if isinstance(turn, dict) else {}
    role = fields.get("role", fields.get("from"))
    parts = fields.get("content", fields.get("value"))
    if isinstance(parts, list):  # text and images; the text is read
        parts = "\n".join(p["text"] for p in parts if isinstance(p, dict) and isinstance(p.get("text"), str))
    passed = {field: fields[field] for field in _PASSED_ON if fields.get(field) is not None}
    if not isinstance(role, str) or not (
        isinstance(parts, str) or (parts is None and "tool_calls" in passed)
    ):
        raise SourceError(f"{where} has no role, or no text; {wanted}")
    return {"role": _ROLES.get(role.lower(), role), "content": parts or "", **passed}


def _has_text(value: Any) -> bool:
    """Whether there is a string in it, however deep."""
    if isinstance(value, dict | list):
        return any(map(_has_text, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str) and bool(value.strip())
