"""What is read of rows: their text, or their chat through the chat template; never ids or addresses."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from pocketllm.errors import ExtraError, SourceError
from pocketllm.recover.lora_task import read_items
from pocketllm.source import text_for
from pocketllm.text.chat import Chat, pieces
from pocketllm.text.read import read_answered, read_calibration, read_text
from pocketllm.text.windows import read_windows
from tests import tiny

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# As templates of reasoning models do: of earlier answers only what follows the reasoning stays.
FORGETFUL = (
    "{% for m in messages %}[{{ m.role }}]"
    "{% if loop.last %}{{ m.content }}{% else %}{{ m.content.split('#')[-1] }}{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]<think>{% endif %}"
)
ASKED = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "Two."}]
SHARED = [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "Two."}]


def tokenizer(template: str | None = TEMPLATE) -> Any:
    made = tiny.tokenizer()
    made.chat_template = template
    return made


def rows(path: Path, *values: Any) -> Path:
    path.write_text("\n".join(map(json.dumps, values)), encoding="utf-8")
    return path


CHATS = [
    {"id": "row-0", "messages": ASKED, "source": "https://example.org"},
    {"conversations": SHARED, "id": "x"},
    {
        "conversation": [
            {"role": "user", "content": [{"type": "text", "text": "1+1?"}, {"type": "image"}]},
            ASKED[1],
        ]
    },
    ASKED,
    {"prompt": "1+1?", "response": "Two.", "id": "x"},
    {"prompt": "1+1?", "completion": "Two."},
    {"instruction": "1+1?", "output": "Two.", "input": ""},
]


@pytest.mark.parametrize("row", CHATS, ids=str)
def test_chats_go_through_the_template(row: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = rows(tmp_path / "a.jsonl", row)
    wanted = "[user]1+1?</s>[assistant]Two.</s>"
    assert read_calibration(path, tokenizer=tokenizer()) == wanted
    windows = read_windows(tokenizer(), (str(path),), 8)  # distillation and its validation
    assert tokenizer().decode(windows[0]) == "[user]1+"
    assert not caplog.messages


def test_system_turns_inputs_and_tool_calls_reach_the_template(tmp_path: Path) -> None:
    path = rows(
        tmp_path / "a.jsonl",
        {"system": "Be brief.", "conversations": SHARED},
        {"instruction": "Add.", "input": "1 2", "output": "3"},
    )
    found = read_calibration(path, tokenizer=tokenizer())
    assert found == (
        "[system]Be brief.</s>[user]1+1?</s>[assistant]Two.</s>\n\n[user]Add.\n\n1 2</s>[assistant]3</s>"
    )
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    calling = "{% for m in messages %}{{ m.content }}{{ m.tool_calls[0].name if m.tool_calls }}{% endfor %}"
    path = rows(tmp_path / "b.jsonl", {"messages": [ASKED[0], call]})
    assert read_calibration(path, tokenizer=tokenizer(calling)) == "1+1?add"


def test_without_a_template_turns_are_apart_and_one_warning_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows(tmp_path / "a.jsonl", {"id": "x", "messages": ASKED}, {"conversations": SHARED})
    rows(tmp_path / "b.jsonl", {"messages": ASKED})
    one = "user: 1+1?\n\nassistant: Two."
    assert read_calibration(tmp_path, tokenizer=tokenizer(None)) == "\n\n".join([one] * 3)
    (message,) = caplog.messages
    assert message.startswith(f"{tmp_path}: contains chats, but the tokenizer has no chat template")
    caplog.clear()
    read_items(tokenizer(None), (str(tmp_path),), 40)
    assert len(caplog.messages) == 1
    caplog.clear()
    path = rows(tmp_path / "c.jsonl", {"prompt": "1+1? ", "response": "Two."})
    assert read_calibration(path, tokenizer=tokenizer(None)) == "1+1? Two." and not caplog.messages


TEXTS = [
    ({"text": "yes", "messages": ASKED, "content": "no"}, "yes"),
    ({"content": "yes", "url": "https://example.org/a", "sha": "deadbeef"}, "yes"),
    ({"id": "no", "story": "yes", "content": None}, "yes"),
    ({"prefix": "ye", "gold_completion": "s"}, "yes"),
    ({"text": None, "id": "no"}, ""),
    ({"messages": [], "id": "no"}, ""),
    ({"label": 3}, ""),
    ("yes", "yes"),
]


@pytest.mark.parametrize(("row", "wanted"), TEXTS, ids=str)
def test_text_is_read_by_its_field(row: Any, wanted: str, tmp_path: Path) -> None:
    path = rows(tmp_path / "a.jsonl", "before", row)
    assert read_calibration(path, tokenizer=tokenizer()) == f"before\n\n{wanted}"


WRONG = [
    (
        {"review": "good", "id": "x"},
        "row 3: got the fields review, id, none of which is known .* rename the one",
    ),
    ([["deep"]], "row 3: got a list, none of which"),
    ({"messages": "hello"}, r"row 3: its chat is a str; wanted a list of \{role, content\}"),
    ({"messages": [ASKED[0], {"role": "user"}]}, "row 3: turn 2 of its chat has no role, or no text"),
    ({"messages": [{"content": "hello"}]}, "row 3: turn 1 of its chat has no role, or no text"),
    ({"messages": ["hello"]}, "row 3: turn 1 of its chat has no role, or no text"),
    ({"prompt": ["p"], "response": "r"}, "row 3 is not an instruction; wanted .* as strings"),
]


@pytest.mark.parametrize(("row", "words"), WRONG, ids=str)
def test_rows_that_nobody_understands_are_named(row: Any, words: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'"before"\n\n{json.dumps(row)}\n')  # the number is that of the line
    with pytest.raises(SourceError, match=rf"a\.jsonl: {words}"):
        read_calibration(path)


def test_templates_that_write_the_date_give_the_same_text_every_day(tmp_path: Path) -> None:
    path = rows(tmp_path / "a.jsonl", {"messages": ASKED})
    dated = tokenizer("{{ strftime_now('%d %b %Y') }}: {{ messages[0].content }}")
    assert read_calibration(path, tokenizer=dated) == "26 Jul 2024: 1+1?"


def test_a_template_that_refuses_a_chat(tmp_path: Path) -> None:
    refusing = tokenizer("{{ raise_exception('no system role') }}")
    path = rows(tmp_path / "a.jsonl", {"messages": ASKED})
    with pytest.raises(SourceError, match=r"a\.jsonl: row 1: .* refuses this chat \(no system role\)"):
        read_calibration(path, tokenizer=refusing)


def test_data_sets_of_the_hub_are_read_by_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    found: list[Any] = [{"messages": ASKED, "id": "x"}] * 3
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: found)
    assert read_calibration("owner/name", 10, tokenizer()) == "\n\n".join(
        ["[user]1+1?</s>[assistant]Two.</s>"] * 2
    )
    assert len(read_answered("owner/name")) == 3
    found[0] = {"review": "good"}
    with pytest.raises(SourceError, match="owner/name: row 1: got the fields review"):
        read_calibration("owner/name")


def learned(chat: Chat, template: str | None) -> list[str]:
    return [text for text, is_learned in pieces(chat, tokenizer(template)) if is_learned]


def test_only_answers_are_learned(tmp_path: Path) -> None:
    turns = (*ASKED, {"role": "user", "content": "And?"}, {"role": "assistant", "content": "why#No."})
    chat = Chat(turns, "a: row 1")
    assert "".join(text for text, _ in pieces(chat, tokenizer())) == (
        "[user]1+1?</s>[assistant]Two.</s>[user]And?</s>[assistant]why#No.</s>"
    )
    assert learned(chat, TEMPLATE) == ["Two.</s>", "why#No.</s>"]
    assert learned(chat, None) == ["Two.", "why#No."]
    assert learned(Chat((turns[2], turns[3], *ASKED), ""), FORGETFUL) == [
        "Two.</s>"
    ]  # the first is changed later
    assert learned(Chat((*ASKED, turns[2]), ""), TEMPLATE) == ["Two.</s>"]
    path = rows(tmp_path / "a.jsonl", *[{"text": "unused", "messages": ASKED}] * 2)
    item = read_items(tokenizer(), (str(path),), 60)[0]
    assert tokenizer().decode(item.ids) == "[user]1+1?</s>[assistant]Two.</s>"
    assert tokenizer().decode(item.ids[item.learned]) == "Two.</s>" and item.weight == 5
    item = read_items(tokenizer(None), (str(path),), 60)[0]
    assert tokenizer().decode(item.ids[item.learned]) == "Two.</s>"


def merging(template: str = TEMPLATE) -> Any:
    """A tokenizer that joins what pieces of a chat would divide: `]T` and `.<`."""
    characters = list(map(chr, range(32, 127)))
    pairs = [("]", "T"), (".", "<"), ("w", "o")]
    vocabulary = {token: n for n, token in enumerate([*characters, *("".join(pair) for pair in pairs)])}
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE(vocabulary, pairs)))
    made.chat_template = template
    return made


@pytest.mark.parametrize("is_fast", [True, False])
def test_a_chat_is_tokenized_at_once_as_for_generation(
    is_fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", is_fast)
    made = merging()
    path = rows(tmp_path / "a.jsonl", *[{"messages": [*ASKED, *ASKED]}] * 2)
    item = read_items(made, (str(path),), 100)[0]
    wanted = made.apply_chat_template([*ASKED, *ASKED], tokenize=True, return_dict=False)
    assert item.ids.tolist() == wanted
    tokens = made.convert_ids_to_tokens(item.ids[item.learned])
    assert tokens == ["]T", "wo", ".<", "/", "s", ">"] * 2
    assert item.ids[item.learned].tolist() != [
        token for _ in range(2) for token in made("Two.</s>")["input_ids"]
    ]
    assert len(read_items(made, (str(path),), 30)[0].ids) == 30


def test_chats_without_answers_are_skipped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = rows(tmp_path / "a.jsonl", *[{"messages": ASKED}] * 2, {"messages": ASKED[:1]})
    assert len(read_items(tokenizer(), (str(path),), 60)) == 2
    assert caplog.messages == [f"{path}: 1 of 3 chats have no answer of the assistant; they are skipped"]
    rows(path, {"messages": ASKED}, "a text")
    with pytest.raises(SourceError, match=r"a\.jsonl: row 2 is not an instruction or a chat, others are"):
        read_items(tokenizer(), (str(path),), 60)


def test_halves_of_surrogate_pairs_are_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "cut \\ud83d"}\n{"text": "\\udE00 as well"}\n{"text": "\\ud83d\\ude00"}')
    assert read_calibration(path) == "cut \ufffd\n\n\ufffd as well\n\n\U0001f600"
    assert caplog.messages == [
        f"{path}: 2 rows (the first is row 1) contain half of a surrogate pair, such as a cut emoji; it is replaced "
        "by U+FFFD"
    ]
    whole = tmp_path / "a.json"
    whole.write_text('[{"messages": [{"role": "user", "content": "\\ud83d."}]}]')
    assert read_calibration(whole, tokenizer=tokenizer()) == "[user]\ufffd.</s>"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks(encoding: str, tmp_path: Path) -> None:
    for name, content in (
        ("a.jsonl", '{"text": "hällo"}'),
        ("a.json", '[{"text": "hällo"}]'),
        ("a.txt", "hällo"),
    ):
        (tmp_path / name).write_bytes(content.encode(encoding))
        assert read_calibration(tmp_path / name) == "hällo"
    (tmp_path / "b.txt").write_bytes(b"\xfe\xff" + "hällo".encode("utf-16-be"))
    assert read_text(tmp_path / "b.txt") == "hällo"


def test_compressed_text_and_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one"))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "two"}\n'))
    (tmp_path / "c.json.gz").write_bytes(gzip.compress(b'["three"]'))
    parquet.write_table(pyarrow.table({"id": ["x", "y"], "text": ["four", None]}), tmp_path / "d.parquet")
    assert read_calibration(tmp_path) == "one\n\ntwo\n\nthree\n\nfour\n\n"
    chats = tmp_path / "e.parquet"
    parquet.write_table(pyarrow.table({"messages": [ASKED]}), chats)
    assert read_calibration(chats, tokenizer=tokenizer()) == "[user]1+1?</s>[assistant]Two.</s>"
    with pytest.raises(SourceError, match=r"none\.parquet: no such file"):
        read_calibration(tmp_path / "none.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ExtraError, match=r"e\.parquet: .* pip install 'pocketllm-codec\[hub\]'"):
        read_calibration(chats)


def test_a_text_to_measure_on_is_read_as_rows(tmp_path: Path) -> None:
    made = tokenizer()
    made.save_pretrained(tmp_path / "model")
    chat = {"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "Two."}]}
    path, packed = tmp_path / "chats.jsonl", tmp_path / "chats.jsonl.gz"
    path.write_text(json.dumps({**chat, "id": "row-0"}))
    packed.write_bytes(gzip.compress(path.read_bytes()))
    written = "[user]1+1?</s>[assistant]Two.</s>"
    for file in (path, packed):
        assert text_for(file, tmp_path / "model") == read_text(file, made) == written
    plain = tmp_path / "plain.txt.gz"
    plain.write_bytes(gzip.compress(b"plain text"))
    assert text_for(plain, tmp_path / "nowhere") == "plain text"  # needs no tokenizer
    with pytest.raises(SourceError, match=r"nowhere\.jsonl: no such file"):
        text_for(tmp_path / "nowhere.jsonl", tmp_path / "model")
    with pytest.raises(SourceError, match="nowhere"):
        text_for(path, tmp_path / "nowhere")
