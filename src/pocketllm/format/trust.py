"""Which files of a compressed model's folder may be loaded: those that its report lists, once verified.

transformers, tokenizers and PEFT look for files by name. A file that the report does not list has no checksum,
and a library that read it would load a model other than the one that was written. Such a folder is refused.
"""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatch
from pathlib import Path

from pocketllm.errors import FormatError, SourceError
from pocketllm.files import files_below, need_regular
from pocketllm.format.layout import Layout
from pocketllm.source.model_files import PICKLES, need_config, weight_files

# No library reads these from a model's folder; everything else might be read, by this version or the next.
NOT_READ = (
    *("*.md", "*.rst", "*.html", "*.pdf", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.webp", "*.log"),
    *("license*", "notice*", "copying*"),
)
_ADAPTER = ("adapter_config.json", "adapter_model.*")


def check_folder(folder: Path, listed: Collection[str], report_name: str | None) -> None:
    """Check that a folder contains no file that a library would read without verification.

    Args:
        listed: names of the files that have checksums. report_name: the file that lists them; None if there is
            none, as in folders written by `save_pretrained`.

    Raises:
        FormatError: naming the file.
    """
    for name in files_below(folder, FormatError):
        path = folder / name
        if _matches(name, _ADAPTER):
            raise FormatError(
                f"{path}: an adapter inside the model's folder, which transformers would apply "
                "automatically; remove it, or keep it in a separate folder and pass that with --adapter"
            )
        if name in listed and _matches(name, PICKLES):
            raise FormatError(f"{path}: a pickle, which is never read; remove it, or fetch the model again")
        if report_name is None or name in listed or name == report_name or _matches(name, NOT_READ):
            continue
        raise FormatError(
            f"{path}: not listed in {report_name}, so it cannot be verified, and a library might read it; remove it"
        )
    for name in listed:
        need_regular(folder / name, FormatError)


def weights_of(folder: Path) -> list[Path]:
    """The weight files of a compressed model, those that transformers reads.

    Raises:
        FormatError: no weights, several sets of them, or names that lead out of the folder.
    """
    try:
        if need_config(folder).get("transformers_weights") is not None:
            raise FormatError(
                f"{folder / 'config.json'}: transformers_weights names other weights than the model's; remove it"
            )
        return weight_files(folder)
    except SourceError as error:
        raise FormatError(str(error)) from error


def check_sizes(layout: Layout, nbytes: int, where: Path) -> None:
    """Check that no matrix has more indices than the weight files can hold, before memory is allocated for it.

    Args:
        nbytes: of the weight files. where: the file that holds the layout.

    Raises:
        FormatError: naming the matrix.
    """
    drawn = sum(entry.size * entry.vector_len for entry in layout.codebooks if entry.seed is not None)
    if drawn > max(1 << 27, 64 * nbytes):
        raise FormatError(
            f"{where}: codebooks of {drawn} numbers for {nbytes} bytes of weights; fetch it again"
        )
    for name, entry in layout.matrices.items():
        bits = entry.rows * -(-entry.columns // layout.codebooks[entry.codebook].vector_len)
        if bits > 8 * nbytes:
            raise FormatError(
                f"{where}: {name}: has shape {list(entry.shape)} there, which takes at least {bits // 8} bytes; "
                f"the weight files have {nbytes}; fetch the model again"
            )


def _matches(name: str, patterns: Collection[str]) -> bool:
    leaf = name.rsplit("/", 1)[-1].lower()
    return any(fnmatch(leaf, pattern) for pattern in patterns)
