"""8 to 20 times smaller: perplexity on several kinds of text, and zero-shot tasks; where does it become brittle?"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from pocketllm.config import CodecConfig, CompressConfig, preset
from pocketllm.studies.definition import Measurement, Progress, Setup, Step
from pocketllm.studies.measure.compressed_models import (
    calibration_texts,
    check_texts,
    coded,
    compressed_model,
    dense_model,
    fitting,
    inputs,
    mean_nmse,
    task_names,
    tasks_of,
)
from pocketllm.studies.measure.task_scores import scores

RATIOS = ("8x", "10x", "16x", "20x")
"""The paper's: against fp32, over the compressed matrices."""
FILE_RATIOS = (8.0, 10.0)
"""Of the whole bf16 checkpoint to the whole output folder."""


def settings(setup: Setup) -> dict[str, CompressConfig]:
    """Every compression by key, PATH-RATIO; `files` in the path: the ratio is that of whole files."""
    if setup.quick:
        codec = CodecConfig(epochs=0, kmeans_iterations=4, sample_per_codeword=64)
        small = CompressConfig(codec=codec, vector_len=2, codebook_size=256, codebook_scope="kind")
        found = {"plain-8x": small, "plain-16x": replace(small, vector_len=4)}
        return {key: replace(config, seed=setup.seed) for key, config in found.items()}
    found = {f"plain-{ratio}": _quickly(preset(f"paper-{ratio}")) for ratio in RATIOS}
    found |= {f"calibrated-{ratio}": _little_text(preset(f"calibrated-{ratio}")) for ratio in RATIOS}
    for ratio in FILE_RATIOS:
        whole = _little_text(preset("calibrated-8x"))
        found[f"calibrated-files-{ratio:g}x"] = replace(whole, target_bpw=None, target_ratio=ratio)
    return {key: replace(config, seed=setup.seed) for key, config in found.items()}


def _quickly(config: CompressConfig) -> CompressConfig:
    """The preset with codebooks fitted to a quarter of the sample, in half the rounds."""
    codec = config.codec
    fast = replace(codec, epochs=1, kmeans_iterations=5, max_sample=codec.max_sample // 4)
    return replace(config, codec=fast)


def _little_text(config: CompressConfig) -> CompressConfig:
    """The preset with a quarter of the calibration text."""
    assert config.calibration is not None
    calibration = config.calibration
    less = replace(calibration, tokens=calibration.tokens // 4, texts=calibration_texts())
    return replace(config, calibration=less)


def steps(setup: Setup) -> list[Step]:
    check_texts(setup, *_extent(setup)[:2])
    steps = [Step("dense", partial(_dense, setup))]
    return steps + [Step(key, partial(_compressed, setup, key)) for key in settings(setup)]


def _dense(setup: Setup, progress: Progress) -> dict[str, Any]:
    loaded = dense_model(setup)
    return _measured(setup, loaded, progress)


def _compressed(setup: Setup, key: str, progress: Progress) -> dict[str, Any]:
    """Compress, measure, and keep the figures alone."""
    import shutil

    from pocketllm.model import read_report

    folder = coded(setup, key, settings(setup)[key], lambda share: progress(0.7 * share))
    report = read_report(folder)
    loaded = compressed_model(setup, folder)
    found = _measured(setup, loaded, lambda share: progress(0.7 + 0.3 * share))
    shutil.rmtree(folder)
    return {
        **found,
        "nmse": mean_nmse(report),
        **{
            name: report[name]
            for name in (
                *("bpw_matrices", "bpw_all", "bytes_on_disk", "ratio_matrices_fp32"),
                *("ratio_files_bf16", "ratio_files_fp32"),
            )
        },
    }


def _extent(setup: Setup) -> tuple[int, int, int]:
    """(tokens of a window, windows of a text, documents of a task)."""
    return (256, 2, 0) if setup.quick else (512, 4, 200)


def _measured(setup: Setup, loaded: tuple[Any, Any], progress: Progress) -> dict[str, Any]:
    """Perplexity by text, accuracy by task; each as `scored.scores` keeps it."""
    from pocketllm import perplexity

    model, tokenizer = loaded
    context, windows, limit = _extent(setup)
    context = fitting(setup, context)
    texts = setup.evaluation_texts()
    found: dict[str, Any] = {"context": context, "windows": windows, "limit": limit, "perplexity": {}}
    for done, text in enumerate(texts):
        seen = perplexity(model, tokenizer, text.text, context, windows)
        found["perplexity"][text.name] = seen.perplexity
        progress(0.3 * (done + 1) / len(texts))
    names = task_names() if limit else []
    scored = (
        tasks_of(setup, lambda: loaded, names, limit, lambda share: progress(0.3 + 0.7 * share))
        if names
        else {}
    )
    found["tasks"] = scores(scored)
    return found


MEASUREMENT = Measurement(
    steps,
    on_text=True,
    several_texts=True,
    inputs=lambda setup: {} if setup.quick else inputs(tasks=task_names()),
)
