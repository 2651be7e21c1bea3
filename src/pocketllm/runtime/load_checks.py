"""What is checked whenever transformers loads a compressed model, whether `pocketllm.load` asks for it or not."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from pocketllm.errors import FormatError, LoadError
from pocketllm.format import checkpoint as ckpt
from pocketllm.format.mapped_pages import MappedPages
from pocketllm.runtime.layers import Codebook, packed_matrices
from pocketllm.source.folder import check_generation
from pocketllm.source.model_files import check_counts, need_config

_verified: ContextVar[Path | None] = ContextVar("_verified", default=None)


def verify_folder(folder: Path, is_partial: bool = False) -> None:
    """Check the files of a compressed model, and that its configuration asks for nothing that they cannot hold.

    Args:
        is_partial: files that the report names may be missing, as in a Hub cache that transformers fills.

    Raises:
        FormatError: names the file.
    """
    _check_configuration(folder, ckpt.verify(folder, is_partial))


@contextmanager
def verifying_folder(folder: Path) -> Iterator[None]:
    """`verify_folder`, with weight files hashed during the context, and single tensors where there is no report.

    Raises:
        FormatError: as `verify_folder`; at the end of the context if a weight file is altered.
    """
    with ckpt.verifying(folder) as layout:
        _check_configuration(folder, layout)
        yield


def _check_configuration(folder: Path, layout: ckpt.Layout) -> None:
    shapes = [shape for _, shape in layout.tensors().values()]
    shapes += [entry.shape for entry in layout.matrices.values()]
    config = {key: value for key, value in need_config(folder).items() if key != "quantization_config"}
    check_counts(config, shapes, folder / "config.json", FormatError)
    check_generation(folder, FormatError)


@contextmanager
def known_as_verified(folder: Path) -> Iterator[None]:
    """Inside this, transformers loads a folder that has been verified just before."""
    token = _verified.set(folder)
    try:
        yield
    finally:
        _verified.reset(token)


def verify_before_building(config: Any) -> Path | None:
    """Verify the local folder that a configuration was read from, before a model of its sizes is built.

    Args:
        config: transformers' configuration of the model.

    Returns:
        The folder; None if the configuration does not say where it comes from, or that is no local folder.

    Raises:
        FormatError: as `verify_folder`.
    """
    folder = Path(config.name_or_path or "")
    if not config.name_or_path or not ckpt.is_compressed(folder):
        return None
    if folder != _verified.get():
        verify_folder(folder)
    return folder


def verify_before_reading(files: Sequence[str] | None, verified: Path | None) -> None:
    """Check the weight files that transformers has chosen, before it reads them.

    Args:
        files: their paths; None if the weights come from elsewhere. verified: the folder that was verified before.

    Raises:
        FormatError: a pickle, files of several folders, or as `verify_folder`.
    """
    paths = [Path(file) for file in files or ()]
    for path in paths:
        if path.suffix != ".safetensors" or path.parent != paths[0].parent:
            raise FormatError(
                f"{path}: only *.safetensors in the model's folder ({paths[0].parent}) are read, pickles never; "
                "remove what names it"
            )
    if paths and paths[0].parent != verified:
        verify_folder(paths[0].parent, is_partial=True)


def check_shapes(model: nn.Module, layout: ckpt.Layout) -> None:
    """Check that the parameters in the layout exist in this model, with the same shapes.

    Raises:
        FormatError: names the parameter.
    """
    for name, entry in layout.matrices.items():
        try:
            shape = tuple(model.get_parameter(name).shape)
        except AttributeError as error:
            raise FormatError(
                f"config.json: {name} is listed as compressed, but the model has no such parameter"
            ) from error
        if shape != entry.shape:
            raise FormatError(f"config.json: {name} has shape {entry.shape} there, but {shape} in the model")


def is_named(model: Any) -> bool:
    """Whether a model is of the class that its configuration names."""
    return type(model).__name__ in (model.config.architectures or ())


def check_filled(model: Any, tied: Mapping[str, str], hidden: Collection[str], loading: Any) -> None:
    """Take over from transformers what to say of tensors that no file holds: it would fill them at random.

    A class that config.json does not name may have a head of its own, which starts with random numbers.

    Args:
        tied: parameter -> the packed one that it is tied to. hidden: stored tensors that transformers does not fill.
        loading: its record of what was loaded.

    Raises:
        LoadError: naming the tensor.
    """
    loading.unexpected_keys -= set(hidden)
    type(model)._adjust_missing_and_unexpected_keys(model, loading)
    folder, inner = model.name_or_path or "the model", f"{model.base_model_prefix}."
    has_own_head = not is_named(model) and model.base_model is not model
    missing = sorted(key for key in loading.missing_keys if not has_own_head or key.startswith(inner))
    if missing:
        raise LoadError(
            f"{folder}: no file contains {missing[0]} ({len(missing)} tensors missing), so it was newly initialized; "
            "fetch the model again, or save it again"
        )
    apart = sorted(set(loading.unexpected_keys) & set(tied))
    if apart:
        raise LoadError(
            f"{folder}: a file contains {apart[0]}, which config.json ties to {tied[apart[0]]}; set "
            "tie_word_embeddings to false there if it is an independent parameter, otherwise remove it"
        )


def take_over_missing(model: Any, tied: Mapping[str, str], hidden: Collection[str] = ()) -> None:
    """Let `check_filled` judge what transformers finds missing when it has loaded a model."""
    model._keys_to_ignore_on_load_missing = None  # whatever is missing is reported
    model._adjust_missing_and_unexpected_keys = partial(check_filled, model, tied, hidden)


def give_back_missing(model: Any) -> None:
    """Undo `take_over_missing`."""
    del model._keys_to_ignore_on_load_missing, model._adjust_missing_and_unexpected_keys


def verify_loaded(model: nn.Module, layout: ckpt.Layout, is_mapped: bool = False) -> None:
    """Check that the packed tensors in memory are those of the layout.

    Args:
        is_mapped: they were read straight from files whose contents are verified on their own.

    Raises:
        LoadError: a layer is not compressed, or was not filled.
        FormatError: the bytes differ from those written.
    """
    packed = packed_matrices(model)
    _need_all(layout.matrices, packed)
    store = getattr(model, ckpt.STORE)
    expected: list[tuple[str, nn.Module, str]]
    expected = [(name, m, layout.matrices[name].crc32) for name, m in packed.items()]
    for n, codebook in enumerate(layout.codebooks):
        expected.append((f"{ckpt.STORE}.codebooks.{n}", store.codebooks[n], codebook.crc32))
    for n, decoder in enumerate(layout.decoders):
        expected.append((f"{ckpt.STORE}.decoders.{n}", store.decoders[n], decoder.crc32))
    pages = None if is_mapped else MappedPages()
    for name, module, crc32 in expected:
        buffers = [module.value()] if isinstance(module, Codebook) else list(module.buffers(recurse=False))
        if any(buffer.is_meta for buffer in buffers):
            raise LoadError(f"{name}: was not loaded; the files do not contain it")
        if pages is None and not isinstance(module, Codebook):  # a codebook may be made from a seed
            continue
        if ckpt.checksum(*buffers) != crc32:
            raise FormatError(f"{name}: altered (CRC-32 differs from config.json); fetch the model again")
        if pages is not None:
            pages.drop(*buffers)


def _need_all(wanted: Collection[str], packed: Collection[str]) -> None:
    missing = sorted(set(wanted) - set(packed))
    if missing:
        raise LoadError(f"{missing[0]}: did not load compressed ({len(missing)} of {len(wanted)})")
