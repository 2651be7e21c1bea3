"""Which parts of a model suffer most: encode everything, use one encoded part at a time, measure the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from pocketllm.config import CodecConfig, CompressConfig
from pocketllm.evaluate import text_divergence
from pocketllm.plan import possible_bpw
from pocketllm.report import MatrixFacts, read_model
from pocketllm.runtime import Matrices
from pocketllm.studies.definition import Measurement, Progress, Setup, Step, portion
from pocketllm.studies.measure import compressed_models as models
from pocketllm.studies.measure.compressed_models import Extent, inputs, task_names, task_results

Groups = Callable[[Sequence[MatrixFacts]], Mapping[str, list[MatrixFacts]]]
Model = tuple[Any, Any]
"""Model and tokenizer."""
Measure = Callable[[Model, list[MatrixFacts], Progress], dict[str, Any]]
_TASKS = ("arc_easy", "piqa")
ALL, FFN, ATTENTION, ENDS = "everything", "FFN", "attention", "embedding and head"
"""Names of groups of matrices."""
DENSE, BLOCKS = "dense-tasks", "plain-block-tasks"
"""Keys of steps."""


def _extent(setup: Setup) -> Extent:
    return Extent(context=256, windows=2) if setup.quick else Extent(context=512, windows=8, limit=200)


def configs(setup: Setup) -> dict[str, CompressConfig]:
    """Every matrix at the same bits: 4 a weight plain, 3 calibrated (where the two lose about as much)."""
    codec = CodecConfig(epochs=0, kmeans_iterations=8, sample_per_codeword=64)
    d, size = (2, 256) if setup.quick else (3, 4096)
    plain = CompressConfig(
        codec=codec, vector_len=d, codebook_size=size, codebook_scope="kind", seed=setup.seed
    )
    if setup.quick:
        return {"plain": plain}
    base = models.calibrated("calibrated-10x", tokens=16384)
    chosen = replace(base, overrides=(("*", 3.0),), seed=setup.seed)
    _, all_bits = possible_bpw(setup.source(), chosen)  # 3 of indices, and what lies beside them
    return {"plain": plain, "calibrated": replace(chosen, target_bpw=all_bits)}


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
    """Losses on text by part and by block; then on tasks, where there are any."""
    extent = _extent(setup)
    models.check_texts(setup, extent)
    paths = list(configs(setup))
    made = [Step(f"{path}-parts", partial(_on_text, setup, path, parts)) for path in paths]
    made.append(Step("plain-blocks", partial(_on_text, setup, "plain", blocks)))
    if extent.limit and tasks():
        made.append(Step(DENSE, partial(_dense_on_tasks, setup)))
        made += [Step(f"{path}-tasks", partial(_on_tasks, setup, path, parts)) for path in paths]
        made.append(Step(BLOCKS, partial(_on_tasks, setup, "plain", blocks)))
    return made


def tasks() -> list[str]:
    """Those of the two that small models can do whose files are here."""
    return [name for name in task_names() if name in _TASKS]


def _by_group(
    setup: Setup, path: str, groups: Groups, progress: Progress, measure: Measure
) -> dict[str, dict[str, Any]]:
    """Group -> what is measured with its matrices compressed and the rest dense."""
    folder = models.compressed(setup, path, configs(setup)[path], portion(progress, 0, 0.5))
    chosen = groups(read_model(folder, check=False).matrices)
    model, matrices, found = models.dense_model(setup), Matrices.open(folder), {}
    for number, (name, members) in enumerate(chosen.items()):
        begin, end = (0.5 + 0.5 * place / len(chosen) for place in (number, number + 1))
        with models.installed(model[0], matrices, [m.name for m in members]):
            found[name] = measure(model, members, portion(progress, begin, end))
    return found


def _on_text(setup: Setup, path: str, groups: Groups, progress: Progress) -> dict[str, Any]:
    """Perplexity and divergence by group."""
    extent, text, (reference, _) = _extent(setup), setup.evaluation_texts()[0], models.dense_model(setup)
    context, windows = models.fitting(setup, extent.context), extent.windows
    dense: list[float] = []

    def measure(model: Model, members: list[MatrixFacts], progress: Progress) -> dict[str, Any]:
        seen = text_divergence(model[0], reference, model[1], text.text, context, windows)
        dense.append(seen.reference_perplexity)
        progress(1.0)
        weights = sum(m.weights for m in members)
        return {
            "weights": weights,
            "saved_bytes": saved_bytes(members),
            "bpw": sum(m.weights * (m.bpw or 0.0) for m in members) / weights,
            **{key: getattr(seen, key) for key in ("perplexity", "kl", "kl_stderr", "window_kl")},
        }

    found = _by_group(setup, path, groups, progress, measure)
    return {"groups": found, "dense": dense[-1], "text": text.name, "context": context, "windows": windows}


def _dense_on_tasks(setup: Setup, progress: Progress) -> dict[str, Any]:
    limit = _extent(setup).limit
    return {"tasks": task_results(models.dense_model(setup), tasks(), limit, progress), "limit": limit}


def _on_tasks(setup: Setup, path: str, groups: Groups, progress: Progress) -> dict[str, Any]:
    """Zero-shot tasks by group."""
    names, limit = tasks(), _extent(setup).limit

    def measure(model: Model, members: list[MatrixFacts], progress: Progress) -> dict[str, Any]:
        return {"saved_bytes": saved_bytes(members), "tasks": task_results(model, names, limit, progress)}

    return {"groups": _by_group(setup, path, groups, progress, measure), "limit": limit}


MEASUREMENT = Measurement(
    steps, on_text=True, inputs=lambda setup: {} if setup.quick else inputs(tasks=tasks())
)
