"""The contents of a model folder: weight files, model class, tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pocketllm.errors import SourceError, reason_of
from pocketllm.text.vocabulary import Vocabulary

_TOKENIZERS = ("tokenizer*.json", "tokenizer*.model", "spiece.model", "vocab*", "*.tiktoken", "tekken.json")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def open_safetensors(file: Path) -> Any:
    """A handle on a weight file.

    Raises:
        SourceError: damaged, truncated, or another kind of file.
    """
    try:
        return safe_open(str(file), framework="pt").__enter__()
    except (SafetensorError, OSError) as error:
        raise SourceError(f"{file}: not a readable safetensors file ({error}); fetch it again") from error


def copy_file_mode(folder: Path, like: str) -> None:
    """Let whoever may read the file `like` read the weight files, too: safetensors makes them for their owner
    alone, whatever the umask.
    """
    for path in folder.glob("*.safetensors"):
        shutil.copymode(folder / like, path)


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a model folder; pickles are never among them.

    Raises:
        SourceError: no model folder, no safetensors, or a shard that is missing.
    """
    _need_config(folder)
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        return _shards(index)
    files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if files:
        return files
    if any(next(folder.glob(pattern), None) for pattern in _PICKLES):
        raise SourceError(
            f"{folder}: only pickle weights (*.bin, *.pt); pickles can run code and are never loaded. "
            "Convert the model to safetensors first (save_pretrained does)"
        )
    raise SourceError(f"{folder}: no *.safetensors file; wanted a Hugging Face model folder with weights")


def _need_config(folder: Path) -> None:
    if not folder.is_dir():
        raise SourceError(f"{folder}: no such folder")
    if not (folder / "config.json").is_file():
        raise SourceError(f"{folder}: no config.json; wanted a Hugging Face model folder")


def _shards(index: Path) -> list[Path]:
    try:
        named = sorted({str(name) for name in json.loads(index.read_bytes())["weight_map"].values()})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SourceError(f"{index}: damaged ({error!r}); fetch it again") from error
    absent = [name for name in named if not (index.parent / name).is_file()]
    if absent:
        raise SourceError(f"{index.parent}: {absent[0]} is named in {index.name} but missing; fetch it")
    return [index.parent / name for name in named]


def read_config(folder: Path, trust_remote_code: bool) -> Any:
    """The model's transformers configuration.

    Raises:
        SourceError: no model folder, or transformers does not know the model or cannot read its config.json.
    """
    from transformers import AutoConfig

    _need_config(folder)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever transformers makes of a config.json that it did not expect
        raise _not_built(folder, error) from error


def _not_built(folder: Path, error: Exception) -> SourceError:
    reason = reason_of(error)
    hint = "; pass --trust-remote-code if you trust it" if "custom code" in reason else ""
    return SourceError(f"{folder}: transformers cannot build this model ({reason}){hint}")


def meta_model(folder: Path, trust_remote_code: bool) -> Any:
    """The model class on the meta device: shapes, no weights.

    Raises:
        SourceError: transformers does not know the model, or it is quantized already.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = read_config(folder, trust_remote_code)
    if getattr(config, "quantization_config", None):
        raise SourceError(
            f"{folder}: the model is already quantized; compress the unquantized checkpoint instead"
        )
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # as in `read_config`
        raise _not_built(folder, error) from error


def load_dense(folder: Path, dtype: Any = "auto", trust_remote_code: bool = False, **placed: Any) -> Any:
    """A dense model with its weights, in evaluation mode.

    Args:
        dtype: that its weights are held in; `auto` is the stored one.
        placed: `device_map` and what belongs to it, as `from_pretrained` takes it.

    Raises:
        SourceError: no safetensors (pickles are never loaded), or transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM

    weight_files(folder)  # its errors are clearer
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code, **placed
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise SourceError(f"{folder}: transformers cannot load this model ({reason_of(error)})") from error
    return model.eval()


def read_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    """The model's tokenizer, or None if the folder has none.

    Raises:
        SourceError: its files cannot be read.
    """
    if not any(next(folder.glob(pattern), None) for pattern in _TOKENIZERS):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers and tokenizers raise whatever they come upon
        raise SourceError(
            f"{folder}: its tokenizer cannot be read ({reason_of(error)}); fetch its files again"
        ) from error


def need_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer.

    Raises:
        SourceError: the folder has none, or its files cannot be read.
    """
    tokenizer = read_tokenizer(folder, trust_remote_code)
    if tokenizer is None:
        raise no_tokenizer(folder)
    return tokenizer


def no_tokenizer(folder: Path) -> SourceError:
    """The error for a folder without a tokenizer."""
    return SourceError(f"{folder}: has no tokenizer; add its files (tokenizer.json, tokenizer_config.json)")


def read_vocabulary(folder: Path, name: str, trust_remote_code: bool = False) -> Vocabulary:
    """The vocabulary of the model in a folder; its weights are not read.

    Raises:
        SourceError: its configuration cannot be read.
    """
    size = read_config(folder, trust_remote_code).get_text_config().vocab_size
    try:
        tokenizer = read_tokenizer(folder, trust_remote_code)
    except SourceError:  # said by whoever needs it; the size can be compared
        tokenizer = None
    return Vocabulary(name, size, None if tokenizer is None else tokenizer.get_vocab())
