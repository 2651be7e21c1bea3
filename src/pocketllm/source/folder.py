"""The contents of a model folder: weight files, model class, tokenizer."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pocketllm.errors import PocketError, SourceError, reason_of
from pocketllm.files import need_regular, read_object
from pocketllm.source.model_class import build, model_class
from pocketllm.source.model_files import check_counts, companions, need_config, unusual_name, weight_files
from pocketllm.text.vocabulary import Vocabulary
from pocketllm.torch_state import in_default_torch_state

ADAPTER_NAME = "adapter_config.json"
_LFS_POINTER = b"version https://git-lfs"
_TOKENIZERS = ("tokenizer*.json", "tokenizer*.model", "spiece.model", "vocab*", "*.tiktoken", "tekken.json")


def open_safetensors(file: Path, error: type[PocketError] = SourceError) -> Any:
    """A handle on a weight file.

    Raises:
        error: damaged, truncated, or another kind of file.
    """
    need_regular(file, error)
    try:
        return safe_open(str(file), framework="pt").__enter__()
    except (SafetensorError, OSError) as problem:
        with file.open("rb") as stream:
            if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise error(f"{file}: a pointer of Git LFS, not the weights; run 'git lfs pull'") from problem
        raise error(f"{file}: not a readable safetensors file ({problem}); fetch it again") from problem


def copy_file_mode(folder: Path, like: str) -> None:
    """Give the weight files the permissions of the file `like`: safetensors creates them for their owner alone,
    regardless of the umask.
    """
    for path in folder.glob("*.safetensors"):
        shutil.copymode(folder / like, path)


def read_config(folder: Path, trust_remote_code: bool) -> Any:
    """The model's transformers configuration.

    Raises:
        SourceError: no model folder, numbers of layers or experts that its files cannot hold, or transformers
            does not know the model or cannot read its config.json.
    """
    from transformers import AutoConfig

    check_counts(need_config(folder), _stored_shapes(folder), folder / "config.json", SourceError)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, return_dict=True)
    except Exception as error:  # whatever transformers makes of a config.json that it did not expect
        raise _not_built(folder, error) from error


def _stored_shapes(folder: Path) -> list[tuple[int, ...]]:
    """Shapes of the stored tensors; none if a folder holds only a configuration."""
    if not any(folder.glob("*.safetensors")):
        return []
    handles = [open_safetensors(file) for file in weight_files(folder)]
    return [tuple(handle.get_slice(key).get_shape()) for handle in handles for key in handle.keys()]  # noqa: SIM118


def _not_built(folder: Path, error: Exception) -> SourceError:
    reason = reason_of(error)
    hint = "; pass --trust-remote-code if you trust it" if "custom code" in reason else ""
    return SourceError(f"{folder}: transformers cannot build this model ({reason}){hint}")


def meta_model(folder: Path, trust_remote_code: bool, ties: bool = True) -> Any:
    """The model class on the meta device: shapes, no weights.

    Args:
        ties: False builds it with no parameters tied, regardless of its configuration.

    Raises:
        SourceError: transformers does not know the model, or it cannot be untied.
    """
    import torch

    config = read_config(folder, trust_remote_code)
    if not ties:
        untie(config)
    try:
        with torch.device("meta"):
            model = build(config, trust_remote_code)
    except Exception as error:  # as in `read_config`
        raise _not_built(folder, error) from error
    if not ties and getattr(model, "all_tied_weights_keys", None):
        raise SourceError(
            f"{folder}: stores separate values for parameters that {type(model).__name__} always ties "
            f"({next(iter(model.all_tied_weights_keys))}); both cannot be kept"
        )
    return model


def untie(config: Any) -> None:
    """Turn off the tying of parameters in a configuration and in those nested in it."""
    config.tie_word_embeddings = False
    for name in getattr(config, "sub_configs", {}):
        inner = getattr(config, name, None)
        if inner is not None:
            untie(inner)


_DEQUANTIZED = ("fp8", "mxfp4")  # block scales; quant_method of transformers


def dequantizer(folder: Path, trust_remote_code: bool) -> Any:
    """transformers' quantizer that dequantizes a checkpoint while it is read; None for an ordinary one.

    Raises:
        SourceError: quantized in another form.
    """
    from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

    config = read_config(folder, trust_remote_code)
    stored = getattr(config, "quantization_config", None)
    if not stored:
        return None
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    method = str(stored.get("quant_method"))
    if method not in _DEQUANTIZED:
        raise SourceError(
            f"{folder}: the model is already quantized ({method}); compress the unquantized checkpoint instead"
        )
    try:
        settings = AutoQuantizationConfig.from_dict({**stored, "dequantize": True})
        return AutoHfQuantizer.from_config(settings, pre_quantized=True)
    except Exception as error:  # as in `read_config`
        raise _not_built(folder, error) from error


@in_default_torch_state
def load_dense(folder: Path, dtype: Any = "auto", trust_remote_code: bool = False, **placed: Any) -> Any:
    """A dense model with its weights, in evaluation mode.

    Args:
        dtype: of its weights; `auto` is the stored one.
        placed: `device_map` and related arguments of `from_pretrained`.

    Raises:
        SourceError: no safetensors (pickles are never loaded), an adapter among them, or transformers cannot
            load it.
    """
    if (folder / ADAPTER_NAME).exists():
        raise SourceError(
            f"{folder / ADAPTER_NAME}: an adapter next to the weights, which transformers would apply "
            "automatically; move its files to another folder, or merge it into the model first"
        )
    check_generation(folder)
    config, named = read_config(folder, trust_remote_code), unusual_name(folder)
    if named is not None:
        config.transformers_weights = named
    how = {"config": config, "dtype": dtype, "trust_remote_code": trust_remote_code, **placed}
    try:
        model, facts = model_class(config).from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, **how
        )
    except Exception as error:  # transformers raises whatever it comes upon
        raise SourceError(f"{folder}: transformers cannot load this model ({reason_of(error)})") from error
    if named is not None and facts["missing_keys"]:
        missing = min(facts["missing_keys"])
        raise SourceError(f"{folder}: transformers cannot load this model ({named} lacks {missing})")
    if getattr(config, "quantization_config", None) and dtype != "auto":
        model = model.to(dtype)  # what was dequantized is in the dtype of the configuration
    return model.eval()


def read_tokenizer(folder: Path, trust_remote_code: bool, config: Any = None) -> Any:
    """The model's tokenizer, or None if the folder has none.

    config: of the model, if it has been read.

    Raises:
        SourceError: its files cannot be read.
    """
    if not any(next(folder.glob(pattern), None) for pattern in _TOKENIZERS):
        return None
    from transformers import AutoTokenizer

    for path in folder.iterdir():
        if not path.name.startswith(".") and not path.is_dir():
            need_regular(path, SourceError)
    try:
        made = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, config=config)
        made.decode(made("a")["input_ids"])  # some settings are not looked at before they are used
        return made
    except Exception as error:  # transformers and tokenizers raise whatever they come upon
        raise SourceError(
            f"{folder}: its tokenizer cannot be read ({reason_of(error)}); fetch its files again"
        ) from error


def check_generation(folder: Path, error: type[PocketError] = SourceError) -> None:
    """Check that generation_config.json, if there is one, can be used: transformers ignores or trips over a bad one.

    Raises:
        error: naming the file.
    """
    from transformers import GenerationConfig

    path = folder / "generation_config.json"
    if not os.path.lexists(path):
        return
    need_regular(path, error)
    try:
        settings = GenerationConfig(**read_object(path))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
            token = getattr(settings, name)
            several = token if isinstance(token, list) else [] if token is None else [token]
            if not all(isinstance(one, int) and -(2**31) <= one < 2**31 for one in several):
                raise ValueError(f"{name} is {token!r}")
    except Exception as problem:  # as in `read_tokenizer`
        raise error(
            f"{path}: damaged, so that transformers cannot use it ({reason_of(problem)}); fetch it again"
        ) from problem


def check_companions(folder: Path, trust_remote_code: bool) -> None:
    """Check before a long run that what comes along with the weights can be copied and used afterwards.

    Raises:
        SourceError: a file that is no regular one, or a damaged tokenizer or generation_config.json.
    """
    companions(folder)
    check_generation(folder)
    read_tokenizer(folder, trust_remote_code)


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
