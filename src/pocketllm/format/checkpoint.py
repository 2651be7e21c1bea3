"""The compressed model on disk. FORMAT.md specifies it; this file describes and verifies it.

A parameter P of the model is stored as `P.indices` (packed) and `P.row_scale`; codebooks and decoders as
`pocketllm.codebooks.I`, `pocketllm.decoders.J.up` and `.down`; everything else under its own name.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pocketllm.errors import ConfigError, FormatError
from pocketllm.files import need_regular, read_object, sha256_file
from pocketllm.format.layout import (
    FORMAT_VERSION as FORMAT_VERSION,
    PARTS,
    READABLE_VERSIONS,
    STORE as STORE,
    Layout as Layout,
)
from pocketllm.format.mapped_pages import MappedPages
from pocketllm.format.report import check_report
from pocketllm.format.trust import check_folder, check_sizes, weights_of
from pocketllm.format.weight_files import DTYPE_NAMES, checksum as checksum
from pocketllm.source.model_files import is_plain

REPORT_NAME = "pocketllm.json"
"""The file in a compressed model's folder that holds its report; it identifies such a folder."""


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def is_compressed(folder: Path) -> bool:
    """Whether a folder claims to be a model compressed by pocketllm."""
    if os.path.lexists(folder / REPORT_NAME):
        return True
    try:
        return bool(read_object(folder / "config.json")["quantization_config"]["quant_method"] == STORE)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def check_dense(folder: Path, name: str, option: str = "") -> None:
    """Check that the model given as the dense one is not compressed.

    Args:
        name: of the model, as the user gave it. option: how to name the dense one, for example `with --against`.

    Raises:
        ConfigError: it is compressed; names the model it was made from, if known.
    """
    if not is_compressed(folder):
        return
    try:
        source = f" (it was made from {read_report(folder)['model']})"
    except FormatError:
        source = ""
    with_option = f" {option}" if option else ""
    raise ConfigError(f"{name}: is already compressed; name the dense model{with_option}{source}")


def read_report(folder: Path) -> dict[str, Any]:
    """The report of a compressed model.

    Raises:
        FormatError: not a compressed model, or the report is damaged.
    """
    path = folder / REPORT_NAME
    if not os.path.lexists(path):
        if is_compressed(folder):
            raise FormatError(
                f"{folder}: no {REPORT_NAME} (save_pretrained does not write one): only pocketllm.load and generate "
                "read such a folder; use the folder that pocketllm wrote"
            )
        raise FormatError(f"{folder}: no {REPORT_NAME}; not a model compressed by pocketllm")
    need_regular(path, FormatError)
    try:
        report = read_object(path)
        if report.get("format_version") not in READABLE_VERSIONS:
            raise FormatError(
                f"{path}: format_version is {report.get('format_version')!r}, this version reads 2 and 3; "
                "update pocketllm-codec"
            )
        check_report(report)
        _check_files(report.get("files"))
    except (OSError, ValueError, OverflowError) as error:
        raise FormatError(f"{path}: damaged ({error}); fetch the model again") from error
    return report


def _check_files(files: Any) -> None:
    if not isinstance(files, dict) or not files:
        raise ValueError("no list of files")
    for name, facts in files.items():
        whole = isinstance(facts, dict) and {"bytes", "sha256"} <= facts.keys()
        if not whole or name == REPORT_NAME or not all(map(is_plain, name.split("/"))):
            raise ValueError(f"files: malformed entry {name!r}")


def verify(folder: Path, is_partial: bool = False) -> Layout:
    """Check that a compressed model is complete and unaltered.

    Without a report, as in folders written by `save_pretrained`, only the encoded tensors have checksums.

    Args:
        is_partial: files that the report names, other than weights, may be missing.

    Raises:
        FormatError: names the file, and the tensor if one is damaged.
    """
    with verifying(folder, is_partial, every_tensor=True) as layout:
        return layout


@contextmanager
def verifying(folder: Path, is_partial: bool = False, every_tensor: bool = False) -> Iterator[Layout]:
    """`verify`, during which other work is done: weight files are hashed in a thread until the context ends.

    Everything but the contents of weight files is verified before the context begins. An altered file takes
    precedence over an error that the context raises.

    Args:
        every_tensor: compare also the checksums of single tensors; otherwise only if a file differs, to name the
            tensor, and if there is no report.

    Raises:
        FormatError: as `verify`; at the end of the context if a weight file is altered.
    """
    has_report = os.path.lexists(folder / REPORT_NAME) or not is_compressed(folder)
    files = read_report(folder)["files"] if has_report else {}
    if is_partial:
        files = {name: facts for name, facts in files.items() if os.path.lexists(folder / name)}
    check_folder(folder, files.keys(), REPORT_NAME if has_report else None)
    layout, weights = read_layout(folder), weights_of(folder)
    check_sizes(layout, sum(file.stat().st_size for file in weights), folder / "config.json")
    stored = {file.name for file in weights}
    with ThreadPoolExecutor(max_workers=1) as pool, ExitStack() as opened:
        hashed = [
            pool.submit(_altered, folder / name, facts) for name, facts in files.items() if name in stored
        ]
        tensors = _stored_tensors(folder, weights, layout, opened)
        others = [_altered(folder / name, facts) for name, facts in files.items() if name not in stored]
        failure: Exception | None = None
        try:
            if not any(others):
                yield layout
        except Exception as error:  # an altered file may be the cause
            failure = error
        found = [problem for problem in (*others, *(task.result() for task in hashed)) if problem]
        if found or every_tensor or not has_report:
            _check_tensors(tensors, layout)  # first, since it names the tensor
    if found:
        raise FormatError(found[0]) from failure
    if failure is not None:
        raise failure


def _altered(file: Path, facts: Mapping[str, Any]) -> str:
    if not file.is_file():
        return f"{file}: missing; fetch the model again"
    size = file.stat().st_size
    if size != facts["bytes"]:
        return f"{file}: {size} bytes, wanted {facts['bytes']}; truncated or altered, fetch it again"
    if sha256_file(file) != facts["sha256"]:
        return f"{file}: altered (SHA-256 differs from the one in {REPORT_NAME}); fetch it again"
    return ""


_Places = Mapping[str, tuple[Path, Any]]


def _stored_tensors(folder: Path, weights: list[Path], layout: Layout, opened: ExitStack) -> _Places:
    """Tensor name -> its file and a handle on that, after checking that the layout's have their dtype and shape."""
    places = dict[str, tuple[Path, Any]]()
    for file in weights:
        try:
            handle = opened.enter_context(safe_open(str(file), framework="pt"))
        except (SafetensorError, OSError) as error:
            raise FormatError(
                f"{file}: not a readable safetensors file ({error}); truncated or altered, fetch it again"
            ) from error
        places.update(dict.fromkeys(handle.keys(), (file, handle)))
    for name, (dtype, shape) in layout.tensors().items():
        if name not in places:
            raise FormatError(f"{folder}: no *.safetensors file contains {name}; fetch the model again")
        file, handle = places[name]
        stored = handle.get_slice(name)
        if (stored.get_dtype(), tuple(stored.get_shape())) != (DTYPE_NAMES[dtype], shape):
            raise FormatError(
                f"{file}: {name}: stored as {stored.get_dtype()} {tuple(stored.get_shape())}, wanted "
                f"{DTYPE_NAMES[dtype]} {shape}; fetch the file again"
            )
    return places


def _check_tensors(places: _Places, layout: Layout) -> None:
    """Check that every tensor of the layout is unaltered."""
    wanted, pages = layout.tensors(), MappedPages()
    for prefix, crc32 in layout.checksums().items():
        keys = [f"{prefix}.{part}" for part in PARTS if f"{prefix}.{part}" in wanted]
        tensors = [places[key][1].get_tensor(key) for key in keys]
        found = checksum(*tensors)
        pages.drop(*tensors)
        if keys and found != crc32:
            raise FormatError(
                f"{places[keys[0]][0]}: {prefix}: altered (CRC-32 differs); fetch the file again"
            )


def read_layout(folder: Path) -> Layout:
    """The layout in a folder's config.json.

    Raises:
        FormatError: missing, not compressed by pocketllm, or malformed.
    """
    path = folder / "config.json"
    if not os.path.lexists(path):
        raise FormatError(f"{folder}: no config.json; not a compressed model")
    need_regular(path, FormatError)
    try:
        quantization = read_object(path).get("quantization_config") or {}
        if not isinstance(quantization, dict):
            raise ValueError("quantization_config is not an object")
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: damaged ({error}); fetch the model again") from error
    if quantization.get("quant_method") != STORE:
        raise FormatError(f"{path}: not compressed by pocketllm (quant_method is not {STORE!r})")
    body = {k: v for k, v in quantization.items() if k not in ("quant_method", "mode", "producer")}
    return Layout.from_dict(body, str(path))


def file_facts(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of files, for the report."""
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
        for name in sorted(names)
    }
