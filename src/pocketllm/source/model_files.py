"""The files of a model's folder: which ones hold the weights, and which are copied with them.

Weights are read only from safetensors files inside the folder. If a folder names its weights in several ways,
those that transformers would read are read, or the folder is refused as ambiguous.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from pocketllm.errors import PocketError, SourceError
from pocketllm.files import files_below, need_regular, read_object

WEIGHTS_NAME, INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.joblib")
OTHER_WEIGHTS = ("*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.gguf", "*.ot", "*.tflite", "*.npz", "*.npy")
_ADAPTER = ("adapter_config.json",)
_WRITTEN_ANEW = ("config.json", "pocketllm*.json")
_MOST_COUNT = 4096  # layers or experts that need no proof by stored tensors
_COUNTS = re.compile(r"(num_(hidden_|decoder_|encoder_)?layers|n_layers?|num_.*experts|n_.*experts)$")


def need_config(folder: Path) -> dict[str, Any]:
    """The object in a model folder's config.json.

    Raises:
        SourceError: no model folder, or its config.json cannot be read.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise SourceError(f"{folder}: no such folder")
    if not os.path.lexists(path):
        raise SourceError(f"{folder}: no config.json; wanted a Hugging Face model folder")
    need_regular(path, SourceError)
    try:
        return read_object(path)
    except (OSError, ValueError) as error:
        raise SourceError(
            f"{path}: damaged, so that transformers cannot build this model ({error}); fetch it again"
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a model folder; pickles are never among them.

    Raises:
        SourceError: no model folder, no safetensors, a shard that is missing, names that lead out of the folder, or
            weights under several names.
    """
    named = need_config(folder).get("transformers_weights")
    files = _explicit(folder, named) if named is not None else _found(folder)
    for file in files:
        need_regular(file, SourceError)
    return files


def unusual_name(folder: Path) -> str | None:
    """The name of a weight file or index that transformers reads only when it is named in the configuration."""
    if need_config(folder).get("transformers_weights") is not None:
        return None  # it is
    files = weight_files(folder)
    index = _only_index(folder)
    usual = (folder / WEIGHTS_NAME).is_file() or index == INDEX_NAME or (index is None and len(files) > 1)
    return None if usual else index or files[0].name


def _explicit(folder: Path, named: Any) -> list[Path]:
    """The weights that config.json names."""
    where = f"{folder / 'config.json'}: transformers_weights"
    if not isinstance(named, str) or not is_plain(named):
        raise SourceError(f"{where}: got {named!r}, wanted the name of a file in the folder")
    if named.endswith(".safetensors.index.json"):
        return _shards(folder / named)
    if not named.endswith(".safetensors"):
        raise SourceError(f"{where}: got {named!r}; only *.safetensors is read, pickles are never loaded")
    return [folder / named]


def _found(folder: Path) -> list[Path]:
    single, index = folder / WEIGHTS_NAME, _only_index(folder)
    if index is not None:
        shards = _shards(folder / index)
        if single.is_file() and index == INDEX_NAME and shards != [single]:
            raise SourceError(
                f"{folder}: {WEIGHTS_NAME} and the shards of {index} are two sets of weights; "
                "remove the one that is not the model's"
            )
        return [single] if single.is_file() else shards
    files = [single] if os.path.lexists(single) else sorted(folder.glob("*.safetensors"))
    if len(files) > 1 and not _is_complete([file.name for file in files]):
        raise SourceError(
            f"{folder}: several *.safetensors files ({', '.join(file.name for file in files[:3])}) and neither "
            f"{WEIGHTS_NAME} nor an index that says which are the model's; remove the others"
        )
    if files:
        return files
    if any(next(folder.glob(pattern), None) for pattern in PICKLES):
        raise SourceError(
            f"{folder}: only pickle weights (*.bin, *.pt); pickles can run code and are never loaded. "
            "Convert the model to safetensors first (save_pretrained does)"
        )
    raise SourceError(f"{folder}: no *.safetensors file; wanted a Hugging Face model folder with weights")


def _only_index(folder: Path) -> str | None:
    """The name of the index of shards, None without one."""
    if os.path.lexists(folder / INDEX_NAME):
        return INDEX_NAME
    others = sorted(path.name for path in folder.glob("*.safetensors.index.json"))
    if os.path.lexists(folder / WEIGHTS_NAME) or not others:
        return None
    if len(others) > 1:
        raise SourceError(f"{folder}: several indexes of shards ({', '.join(others)}); remove all but one")
    return others[0]


def _is_complete(names: list[str]) -> bool:
    """Whether files are all the shards of one set, `NAME-00001-of-0000N.safetensors`."""
    matches = [re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.safetensors", name) for name in names]
    found = [(match[1], int(match[3]), int(match[2])) for match in matches if match]
    wanted = [(found[0][0], len(names), number + 1) for number in range(len(names))] if found else []
    return len(found) == len(names) and found == wanted


def is_plain(name: str) -> bool:
    """Whether a name is that of a file in the folder itself."""
    return Path(name).name == name and "\\" not in name and "\0" not in name and name not in ("", ".", "..")


def _shards(index: Path) -> list[Path]:
    need_regular(index, SourceError)
    try:
        named = sorted({str(name) for name in read_object(index)["weight_map"].values()})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise SourceError(f"{index}: damaged ({error!r}); fetch it again") from error
    for name in named:
        if not is_plain(name) or not name.endswith(".safetensors"):
            raise SourceError(
                f"{index}: names {name!r}; only *.safetensors in the same folder are read, pickles never"
            )
        if not os.path.lexists(index.parent / name):
            raise SourceError(f"{index.parent}: {name} is named in {index.name} but missing; fetch it")
    if not named:
        raise SourceError(f"{index}: damaged (names no file); fetch it again")
    return [index.parent / name for name in named]


def check_counts(
    config: Any, stored: Iterable[tuple[int, ...]], where: Path, error: type[PocketError]
) -> None:
    """Check that a configuration has no more layers or experts than its files can hold tensors for.

    A model is built before its weights are compared, which could take forever with a made-up number.

    Args:
        stored: shapes of the stored tensors. where: the file that holds the configuration.

    Raises:
        error: naming the key.
    """
    shapes = list(stored)
    most = max([_MOST_COUNT, len(shapes), *(size for shape in shapes for size in shape)])
    for key, value in _numbers(config):
        if _COUNTS.match(key) and value > most:
            raise error(f"{where}: {key} is {value}, the files hold {len(shapes)} tensors; fetch it again")


def _numbers(value: Any, key: str = "") -> Iterable[tuple[str, float]]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _numbers(item, str(name))
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int | float):
        yield key, value


def companions(folder: Path) -> tuple[list[str], dict[str, str]]:
    """The other files of a model's folder.

    Returns:
        (names of the files to copy, files left out and why). Names are relative, with `/`.

    Raises:
        SourceError: a file to copy is not a regular file, or is a link that leads out of the folder.
    """
    names = list(files_below(folder, SourceError))
    others = {name.split("/")[0] for name in names if "/" in name and _weights_of(name)}
    read = {file.name for file in weight_files(folder)}
    kept, left = [], dict[str, str]()
    for name in names:
        top, below, _ = name.partition("/")
        if below and top in others:
            left[f"{top}/"] = "holds weights of its own"
        elif reason := _weights_of(name):
            if name not in read and not name.endswith(".index.json"):
                left[name] = reason
        elif _matches(name, _ADAPTER):
            left[name] = "an adapter, which is not part of the model"
        elif not _matches(name, _WRITTEN_ANEW):
            need_regular(folder / name, SourceError)
            kept.append(name)
    return kept, left


def _weights_of(name: str) -> str:
    """Why a file counts as weights; empty if it does not."""
    if _matches(name, PICKLES):
        return "a pickle, which is never read"
    if _matches(name, OTHER_WEIGHTS):
        return "weights for another framework"
    return "not the model's weights" if _matches(name, ("*.safetensors", "*.index.json")) else ""


def _matches(name: str, patterns: Iterable[str]) -> bool:
    leaf = name.rsplit("/", 1)[-1].lower()
    return any(fnmatch(leaf, pattern) for pattern in patterns)
