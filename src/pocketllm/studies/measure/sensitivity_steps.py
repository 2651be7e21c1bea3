"""Which parts of a model suffer most: code everything, put back one part at a time, measure the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from pocketllm.config import CodecConfig, CompressConfig, preset
from pocketllm.model import possible_bpw
from pocketllm.studies.definition import Measurement, Progress, Setup, Step
from pocketllm.studies.measure.compressed_models import (
    calibration_texts,
    check_texts,
    coded,
    dense_model,
    fitting,
    inputs,
    installed,
    task_names,
    tasks_of,
)
from pocketllm.studies.measure.task_scores import scores

if TYPE_CHECKING:
    from pocketllm.report import MatrixFacts


Groups = Callable[[Sequence["MatrixFacts"]], Mapping[str, list["MatrixFacts"]]]
_TASKS = ("arc_easy", "piqa")
ALL, FFN, ATTENTION, ENDS = "everything", "FFN", "attention", "embedding and head"
"""Names of groups of matrices."""
DENSE, BLOCKS = "dense-tasks", "plain-block-tasks"
"""Keys of steps."""


@dataclass(frozen=True)
class _Size:
    """context, windows: of the text, cut to the positions that the model has. limit: documents of a task."""

    context: int
    windows: int
    limit: int


def _size(setup: Setup) -> _Size:
    return _Size(256, 2, 0) if setup.quick else _Size(512, 8, 200)


def configs(setup: Setup) -> dict[str, CompressConfig]:
    """Every matrix at the same bits: 4 a weight plain, 3 calibrated (where the whole model loses about alike)."""
    codec = CodecConfig(epochs=0, kmeans_iterations=8, sample_per_codeword=64)
    d, size = (2, 256) if setup.quick else (3, 4096)
    plain = CompressConfig(
        codec=codec, vector_len=d, codebook_size=size, codebook_scope="kind", seed=setup.seed
    )
    if setup.quick:
        return {"plain": plain}
    base = preset("calibrated-10x")
    assert base.calibration is not None
    text = replace(base.calibration, tokens=16384, texts=calibration_texts())
    calibrated = replace(base, calibration=text, overrides=(("*", 3.0),), seed=setup.seed)
    _, all_bits = possible_bpw(setup.source(), calibrated)  # 3 of indices, and what lies beside them
    return {"plain": plain, "calibrated": replace(calibrated, target_bpw=all_bits)}


def part_of(matrix: MatrixFacts) -> str:
    """FFN, attention, or embedding and head."""
    if matrix.block is None:
        return ENDS
    return ATTENTION if "attn" in matrix.kind or "attention" in matrix.kind else FFN


def parts(matrices: Sequence[MatrixFacts]) -> dict[str, list[MatrixFacts]]:
    """Name -> matrices: everything, the three parts, and each kind inside the blocks."""
    found: dict[str, list[MatrixFacts]] = {ALL: list(matrices)}
    for name in (FFN, ATTENTION, ENDS):
        found[name] = [m for m in matrices if part_of(m) == name]
    for kind in dict.fromkeys(m.kind for m in matrices if m.block is not None):
        found[kind] = [m for m in matrices if m.kind == kind]
    return {name: members for name, members in found.items() if members}


def blocks(matrices: Sequence[MatrixFacts]) -> dict[str, list[MatrixFacts]]:
    """Number of a block -> its matrices."""
    numbers = sorted({m.block for m in matrices if m.block is not None})
    return {str(number): [m for m in matrices if m.block == number] for number in numbers}


def saved_bytes(matrices: Iterable[MatrixFacts]) -> float:
    """Bytes in bf16 less stored bytes, with the share of codebooks and decoders."""
    return sum(m.weights * (16 - (m.bpw or 0.0)) / 8 for m in matrices)


def steps(setup: Setup) -> list[Step]:
    size = _size(setup)
    check_texts(setup, size.context, size.windows)
    steps = []
    for path in configs(setup):
        steps.append(Step(f"{path}-parts", partial(_measure, setup, path, parts)))
    steps.append(Step("plain-blocks", partial(_measure, setup, "plain", blocks)))
    if size.limit and tasks():
        steps.append(Step(DENSE, partial(_dense_tasks, setup)))
        steps += [Step(f"{path}-tasks", partial(_tasks, setup, path, parts)) for path in configs(setup)]
        steps.append(Step(BLOCKS, partial(_tasks, setup, "plain", blocks)))
    return steps


def tasks() -> list[str]:
    """Those of the two that small models can do whose files are here."""
    return [name for name in task_names() if name in _TASKS]


def _measure(setup: Setup, path: str, groups: Groups, progress: Progress) -> dict[str, Any]:
    """Perplexity and divergence with each group of matrices compressed and the rest dense."""
    from pocketllm.evaluate import text_divergence
    from pocketllm.model import Matrices
    from pocketllm.report import read_model

    folder = coded(setup, path, configs(setup)[path], lambda share: progress(share / 2))
    chosen = groups(read_model(folder, check=False).matrices)
    model, tokenizer = dense_model(setup)
    reference, _ = dense_model(setup)
    matrices, size = Matrices.open(folder), _size(setup)
    context, windows = fitting(setup, size.context), size.windows
    text = setup.evaluation_texts()[0]
    found: dict[str, Any] = {}
    for done, (name, members) in enumerate(chosen.items()):
        with installed(model, matrices, [m.name for m in members]):
            seen = text_divergence(model, reference, tokenizer, text.text, context, windows)
        found[name] = {
            "weights": sum(m.weights for m in members),
            "saved_bytes": saved_bytes(members),
            "bpw": sum(m.weights * (m.bpw or 0.0) for m in members) / sum(m.weights for m in members),
            "perplexity": seen.perplexity,
            "kl": seen.kl,
            "kl_stderr": seen.kl_stderr,
            "window_kl": seen.window_kl,
        }
        dense = seen.reference_perplexity
        progress(0.5 + (done + 1) / len(chosen) / 2)
    return {"groups": found, "dense": dense, "text": text.name, "context": context, "windows": windows}


def _dense_tasks(setup: Setup, progress: Progress) -> dict[str, Any]:
    loaded = dense_model(setup)
    names, limit = tasks(), _size(setup).limit
    return {"tasks": scores(tasks_of(setup, lambda: loaded, names, limit, progress)), "limit": limit}


def _tasks(setup: Setup, path: str, groups: Groups, progress: Progress) -> dict[str, Any]:
    """Zero-shot tasks with each group of matrices compressed and the rest dense."""
    from pocketllm.model import Matrices
    from pocketllm.report import read_model

    folder = coded(setup, path, configs(setup)[path])
    chosen = groups(read_model(folder, check=False).matrices)
    loaded, matrices = dense_model(setup), Matrices.open(folder)
    names, limit = tasks(), _size(setup).limit
    found: dict[str, Any] = {}
    for position, (name, members) in enumerate(chosen.items()):

        def told(share: float, position: int = position) -> None:
            progress((position + share) / len(chosen))

        with installed(loaded[0], matrices, [m.name for m in members]):
            scored = tasks_of(setup, lambda: loaded, names, limit, told)
        found[name] = {"saved_bytes": saved_bytes(members), "tasks": scores(scored)}
    return {"groups": found, "limit": limit}


MEASUREMENT = Measurement(
    steps=steps, on_text=True, inputs=lambda setup: {} if setup.quick else inputs(tasks=tasks())
)
