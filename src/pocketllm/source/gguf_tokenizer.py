"""The tokenizer in a GGUF file, rebuilt by transformers, which splits text in the way of GPT-2 unless it knows the name
that the file gives to another way: those that are known here are set, and all others refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pocketllm.errors import SourceError
from pocketllm.files import read_object, write_json
from pocketllm.source.gguf_header import Header

TOKENIZER_ADVICE = "put the model's tokenizer.json and tokenizer_config.json next to the file"
_AS_GPT2 = frozenset(
    (
        *("gpt-2", "phi-2", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "jina-v1-en", "jina-v2-code"),
        *("gigachat", "a.x-4.0", "mellum", "modern-bert", "roberta-bpe", "mpt", "olmo", "jais", "trillion"),
        "granite-docling",
    )
)
_DIGITS = frozenset(
    ("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b", "mellum2")
)
_AS_QWEN2 = frozenset(("stablelm2", "hunyuan", "solar-open"))
_FALCON = "falcon"
"""Names of ways to split, as llama.cpp knows them: that of GPT-2; the same with every digit by itself; that of Qwen 2;
and that of Falcon: at punctuation, then as GPT-2, then digits by threes."""
_AS_LLAMA3 = frozenset(
    (
        *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        *("jina-v5-nano", "tekken"),
    )
)
"""A word that is a token stays one, whatever the merges say, and a text begins with BOS unless the file says no."""
_NORMAL = 1  # of the types of tokens
_FEW = 0.01  # share of tokens that converters may spell otherwise


def write(alone: Path, header: Header, folder: Path) -> None:
    """Rebuild the tokenizer of a file and write it to a folder.

    Its class there is the one that takes tokenizer.json as it is (others split text in their own way), and tokens that
    transformers adds beyond those of the file are left out.

    Args:
        alone: the file, in a folder of its own.

    Raises:
        SourceError: it splits text in a way that is not known here. Whatever transformers raises.
    """
    made = _rebuilt(alone, header)
    made.save_pretrained(folder)
    count = len(header.tokenizer["tokens"])
    path, settings_path = folder / "tokenizer.json", folder / "tokenizer_config.json"
    values, settings = read_object(path), read_object(settings_path)
    beyond = [token["content"] for token in values["added_tokens"] if token["id"] >= count]
    values["added_tokens"] = [token for token in values["added_tokens"] if token["id"] < count]
    write_json(path, values)
    settings = {key: None if value in beyond else value for key, value in settings.items()}
    own = {"padding_side": made.padding_side, "tokenizer_class": "PreTrainedTokenizerFast"}
    write_json(settings_path, {**settings, **own})


def _rebuilt(alone: Path, header: Header) -> Any:
    from transformers import AutoTokenizer

    stored = header.tokenizer
    pre = str(stored["pre"])
    if stored["model"] == "gpt2" and pre not in _known():
        raise SourceError(
            f"{header.file}: its tokenizer cannot be rebuilt (tokenizer.ggml.pre {pre!r} is a way to split text that "
            f"is not known); {TOKENIZER_ADVICE}"
        )
    made: Any = AutoTokenizer.from_pretrained(alone.parent, gguf_file=alone.name)
    backend = made.backend_tokenizer
    if stored["model"] == "gpt2":
        _set_split(backend, pre)
        if pre in _AS_LLAMA3:
            backend.model.ignore_merges = True
            if stored["add_bos_token"] is None and made.bos_token is not None:
                made.add_bos_token = True
    elif stored["model"] == "llama" and not header.architecture.startswith("gemma"):
        _set_spaces(backend, stored["add_space_prefix"] is not False)
    made.decode(made("a")["input_ids"])
    return made


def check_beside(tokenizer: Any, header: Header, names: list[str]) -> None:
    """See that a tokenizer from beside a file is that of its model.

    Args:
        names: of its files.

    Raises:
        SourceError: it has other tokens.
    """
    stored = header.tokenizer
    tokens, types = stored["tokens"] or [], stored["token_type"] or []
    own = {number: token for token, number in tokenizer.get_vocab().items()}
    normal = [n for n in range(len(tokens)) if n >= len(types) or types[n] == _NORMAL]
    off = [n for n in normal if _spelled(own.get(n, "")) != _spelled(tokens[n])]
    if len(off) > _FEW * len(normal):
        number = off[0]
        raise SourceError(
            f"{header.file}: {' and '.join(names)} next to it belong to another model (token {number} is "
            f"{own.get(number)!r}, in the file {tokens[number]!r}); remove them, or put those of this model there"
        )


def _spelled(token: str) -> str:
    """A token with spaces as converters of SentencePiece write them."""
    return token.replace(" ", "▁")


def _known() -> frozenset[str]:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    return _AS_GPT2 | _DIGITS | _AS_QWEN2 | {_FALCON} | frozenset(GGUF_PRE_TOKENIZER_SPLITS)


def _set_split(backend: Any, pre: str) -> None:
    """Set how text is split, where transformers does not."""
    from tokenizers import Regex, pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre in _DIGITS:
        parts = [pre_tokenizers.Digits(individual_digits=True), gpt2]
    elif pre == _FALCON:
        threes = pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), behavior="isolated")
        parts = [pre_tokenizers.Punctuation("contiguous"), gpt2, threes]
    elif pre in _AS_QWEN2:
        split = pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS["qwen2"]), behavior="isolated")
        parts = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    else:
        return
    backend.pre_tokenizer = pre_tokenizers.Sequence(parts)


def _set_spaces(backend: Any, prefix: bool) -> None:
    """Write spaces as SentencePiece does; with `prefix`, a text begins with one."""
    from tokenizers import normalizers

    space = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space]) if prefix else space
    backend.pre_tokenizer = None
