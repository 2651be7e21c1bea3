"""8 to 20 times smaller: perplexity on several kinds of text, zero-shot tasks, and where quality breaks down."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import pocketllm
from pocketllm.config import CodecConfig, CompressConfig, preset
from pocketllm.format import read_report
from pocketllm.studies.definition import Measurement, Progress, Setup, Step, portion
from pocketllm.studies.measure import compressed_models as models
from pocketllm.studies.measure.compressed_models import Extent, inputs, task_names

RATIOS = ("8x", "10x", "16x", "20x")
"""The paper's: against fp32, over the compressed matrices."""
FILE_RATIOS = (8.0, 10.0)
"""Bytes of the bf16 checkpoint over bytes of the output folder, all files counted."""
_RATIOS = ("ratio_matrices_fp32", "ratio_files_bf16", "ratio_files_fp32")
_REPORTED = ("bpw_matrices", "bpw_all", "bytes_on_disk", *_RATIOS)


def settings(setup: Setup) -> dict[str, CompressConfig]:
    """Every compression by key, PATH-RATIO; `files` in the path: the ratio counts all files."""
    if setup.quick:
        codec = CodecConfig(epochs=0, kmeans_iterations=4, sample_per_codeword=64)
        small = CompressConfig(codec=codec, vector_len=2, codebook_size=256, codebook_scope="kind")
        found = {"plain-8x": small, "plain-16x": replace(small, vector_len=4)}
        return {key: replace(config, seed=setup.seed) for key, config in found.items()}
    found = {f"plain-{ratio}": _quickly(preset(f"paper-{ratio}")) for ratio in RATIOS}
    found |= {f"calibrated-{ratio}": _on_less_text(f"calibrated-{ratio}") for ratio in RATIOS}
    for ratio in FILE_RATIOS:
        config = _on_less_text("calibrated-8x")
        found[f"calibrated-files-{ratio:g}x"] = replace(config, target_bpw=None, target_ratio=ratio)
    return {key: replace(config, seed=setup.seed) for key, config in found.items()}


def _quickly(config: CompressConfig) -> CompressConfig:
    """The preset with codebooks fitted to a quarter of the sample, in half the rounds."""
    codec = config.codec
    fast = replace(codec, epochs=1, kmeans_iterations=5, max_sample=codec.max_sample // 4)
    return replace(config, codec=fast)


def _on_less_text(name: str) -> CompressConfig:
    """The preset with a quarter of the calibration text."""
    usual = preset(name).calibration
    assert usual is not None
    return models.calibrated(name, tokens=usual.tokens // 4)


def steps(setup: Setup) -> list[Step]:
    """The dense model, then every compression."""
    models.check_texts(setup, _extent(setup))
    dense = Step("dense", lambda progress: _measured(setup, models.dense_model(setup), progress))
    return [dense, *(Step(key, partial(_compressed, setup, key)) for key in settings(setup))]


def _compressed(setup: Setup, key: str, progress: Progress) -> dict[str, Any]:
    """Compress, measure, and keep the figures alone."""
    folder = models.compressed(setup, key, settings(setup)[key], portion(progress, 0, 0.7))
    report, model = read_report(folder), models.compressed_model(setup, folder)
    found = _measured(setup, model, portion(progress, 0.7, 1))
    shutil.rmtree(folder)
    return {**found, "nmse": models.mean_nmse(report), **{name: report[name] for name in _REPORTED}}


def _extent(setup: Setup) -> Extent:
    return Extent(context=256, windows=2) if setup.quick else Extent(context=512, windows=4, limit=200)


def _measured(setup: Setup, model: tuple[Any, Any], progress: Progress) -> dict[str, Any]:
    """Perplexity by text, results by task."""
    extent, texts = _extent(setup), setup.evaluation_texts()
    context, perplexities = models.fitting(setup, extent.context), {}
    for done, text in enumerate(texts):
        seen = pocketllm.perplexity(*model, text.text, context, extent.windows)
        perplexities[text.name] = seen.perplexity
        progress(0.3 * (done + 1) / len(texts))
    names = task_names() if extent.limit else []
    return {
        **asdict(extent),
        "context": context,
        "perplexity": perplexities,
        "tasks": models.task_results(model, names, extent.limit, portion(progress, 0.3, 1)),
    }


MEASUREMENT = Measurement(
    steps,
    on_text=True,
    several_texts=True,
    inputs=lambda setup: {} if setup.quick else inputs(tasks=task_names()),
)
