"""Sizes, errors and perplexities of several compressed models."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pocketllm.errors import ConfigError
from pocketllm.files import real_path
from pocketllm.recover import check_adapter
from pocketllm.report.evaluations import Evaluation, same_model
from pocketllm.report.model_facts import ModelFacts, mean, read_model, with_adapter
from pocketllm.source import folder_of, name_of

_SAME = 1e-4  # relative; rounding varies with the way of measuring and the number of threads

_SIZES = ("bytes_on_disk", "ratio_files_bf16", "ratio_files_fp32", "bpw_matrices", "bpw_all")
_SETTING = ("text", "context", "windows", "tokens")
_Key = tuple[Path, Path | None]  # what an evaluation is of: model and adapter


@dataclass(frozen=True)
class Compared:
    """One model, perhaps with an adapter, whose bytes are counted in all sizes. ratio_files_*: of all files.

    nmse: mean by weights, nmse_blocks the same without embedding and head; proxy_error: mean by weights over
    the matrices that have one. None where there is none, or where perplexity was not measured; all three with an
    adapter, which changes what the matrices compute.
    """

    name: str
    folder: str
    model: str
    bytes_on_disk: int
    ratio_files_bf16: float
    ratio_files_fp32: float
    bpw_matrices: float
    bpw_all: float
    nmse: float | None
    nmse_blocks: float | None
    proxy_error: float | None
    perplexity: float | None = None
    adapter: str = ""


@dataclass(frozen=True)
class Comparison:
    """Several compressed models, in the order given.

    dense_perplexity: of the dense model in the same setting, if measured. notes: caveats, in words.
    """

    models: tuple[Compared, ...]
    dense_perplexity: float | None = None
    setting: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def compare(
    folders: Sequence[str | Path],
    evaluations: Sequence[Evaluation] = (),
    check: bool = True,
    progress: Callable[[float, str], None] = lambda share, detail: None,
    adapters: Sequence[str | Path] = (),
) -> Comparison:
    """Compare the sizes, errors and perplexities of several compressed models.

    Args:
        folders: the compressed models, folders or Hub ids. check: compare every file with its checksum.
        evaluations: of these folders and of their dense model, all in one setting.
        progress: called with the finished share and the folder in progress.
        adapters: trained on models among the folders; each adds a row after its base.

    Raises:
        FormatError: one is not a compressed model, or damaged; or not an adapter.
        ConfigError: no folder, one given twice, an evaluation of another model, or of different settings, two
            evaluations of one model that differ, or of two dense models; an adapter of none of the models.

    Example:
        >>> [m.name for m in compare(["smol-8x", "smol-16x"]).models]
        ['smol-8x', 'smol-16x']
    """
    paths = [folder_of(folder) for folder in folders]
    if not paths:
        raise ConfigError("no model to compare; name at least one folder")
    places = [real_path(path) for path in paths]
    for path, place in zip(paths, places, strict=True):
        if places.count(place) > 1:
            raise ConfigError(f"{path}: given twice; name every model once")
    bases: dict[Path, list[Path | None]] = {path: [None] for path in paths}
    for adapter in map(Path, adapters):
        bases[base_of(adapter, paths)].append(adapter)
    keys = [_key(path, adapter) for path, added in bases.items() for adapter in added]
    perplexities, dense = _perplexities(keys, evaluations)
    rows = []
    for number, (path, added) in enumerate(bases.items()):
        progress(number / len(paths), str(path))
        model, name = read_model(path, check), _name(path, paths)
        rows += [_row(model, name, adapter, perplexities.get(_key(path, adapter))) for adapter in added]
    progress(1.0, "")
    return Comparison(
        models=tuple(rows),
        dense_perplexity=None if dense is None else dense.perplexity,
        setting=dict(zip(_SETTING, evaluations[0].setting, strict=True)) if evaluations else None,
        notes=_notes(dense, [row.model for row in rows]),
    )


def _notes(dense: Evaluation | None, sources: Sequence[str]) -> tuple[str, ...]:
    """sources: what the models were compressed from."""
    if dense is None or any(same_model(dense.model, source) for source in sources):
        return ()
    named = ", ".join(dict.fromkeys(sources))
    return (f"Note: the dense figure is of {dense.model}; the models were compressed from {named}.",)


def _key(folder: Path, adapter: Path | None) -> _Key:
    return real_path(folder), adapter and real_path(adapter)


def base_of(adapter: Path, folders: Sequence[Path]) -> Path:
    """The folder that an adapter was trained on. Provisional.

    Raises:
        FormatError: not an adapter. ConfigError: none of the folders.
    """
    problems = []
    for folder in folders:
        try:
            check_adapter(adapter, folder)
        except ConfigError as error:
            problems.append(error)
        else:
            return folder
    raise ConfigError(f"{adapter}: fits none of the models to compare; {problems[0]}")


def _perplexities(
    keys: Sequence[_Key], evaluations: Sequence[Evaluation]
) -> tuple[dict[_Key, float], Evaluation | None]:
    """(model -> perplexity, the dense model's evaluation)."""
    found: dict[_Key, Evaluation] = {}
    dense = None
    for e in evaluations:
        if e.setting != evaluations[0].setting:
            raise ConfigError(
                f"{e.model}: evaluated on {e.setting}, {evaluations[0].model} on {evaluations[0].setting} "
                "(text, context, windows, tokens); perplexities in different settings cannot be compared"
            )
        if not e.compressed:
            if dense is not None:
                _check_equal(dense, e, same_model(dense.model, e.model))
            dense = dense or e
            continue
        key = _key(Path(e.model), Path(e.adapter) if e.adapter else None)
        if key not in keys:
            what = f"{e.model} with {e.adapter}" if e.adapter else e.model
            raise ConfigError(f"{what}: was evaluated, but is not among the models to compare")
        _check_equal(found.setdefault(key, e), e)
    return {key: e.perplexity for key, e in found.items()}, dense


def _check_equal(first: Evaluation, second: Evaluation, one_model: bool = True) -> None:
    """Raises ConfigError if two evaluations of one model differ."""
    a, b = first.perplexity, second.perplexity
    if one_model and (first == second or math.isclose(a, b, rel_tol=_SAME)):
        return
    what = "the same model" if one_model else "one dense model"
    dtypes = [f", {e.dtype}" if e.dtype else "" for e in (first, second)]
    raise ConfigError(
        f"two evaluations, {first.model} (perplexity {a:.6g}{dtypes[0]}) and {second.model} "
        f"(perplexity {b:.6g}{dtypes[1]}), wanted one value for {what}; omit one of them"
    )


def _name(path: Path, paths: Sequence[Path]) -> str:
    """The folder's name; the full path where another folder has the same name."""
    name = name_of(path)
    return name if [name_of(other) for other in paths].count(name) == 1 else str(path)


def _row(model: ModelFacts, name: str, adapter: Path | None, perplexity: float | None) -> Compared:
    report = (model if adapter is None else with_adapter(model, adapter)).report
    encoded = model.matrices if adapter is None else ()  # their errors do not include what an adapter adds
    blocks = [m for m in encoded if m.block is not None]
    calibrated = [m for m in encoded if m.proxy_error is not None]
    return Compared(
        name=name if adapter is None else f"{name} + {real_path(adapter).name}",
        adapter=str(adapter or ""),
        folder=str(model.folder),
        model=str(report["model"]),
        **{key: report[key] for key in _SIZES},
        nmse=mean(encoded, lambda m: m.nmse),
        nmse_blocks=mean(blocks, lambda m: m.nmse),
        proxy_error=mean(calibrated, lambda m: m.proxy_error),
        perplexity=perplexity,
    )
