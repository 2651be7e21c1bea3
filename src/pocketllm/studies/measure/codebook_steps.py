"""Error and perplexity over codebook size and vector length, at equal bits and at equal size."""

from __future__ import annotations

import dataclasses
import shutil
from functools import partial
from typing import Any

import pocketllm
from pocketllm.codec import predicted_nmse
from pocketllm.config import CodecConfig, CompressConfig
from pocketllm.format import read_report
from pocketllm.plan import classify
from pocketllm.runtime import Matrices
from pocketllm.studies.definition import Measurement, Progress, Setup, Step, portion
from pocketllm.studies.measure import compressed_models as models, trials
from pocketllm.studies.measure.trials import Rows, Training, digits

_MOST = 1 << 20
GRID = (  # (d, log2 K)
    *((1, n) for n in (1, 2, 3, 4)),
    *((2, n) for n in (2, 4, 6, 8)),
    *((3, n) for n in (9, 12)),
    *((4, n) for n in (4, 8, 12)),
    *((6, n) for n in (6, 9, 12)),
    *((8, n) for n in (4, 8, 12)),
    *((12, n) for n in (6, 12)),
    *((16, n) for n in (8, 12)),
)
QUICK_GRID = ((1, 1), (1, 2), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8))
MODELS = ((1, 4), (2, 8), (3, 12), (2, 6), (4, 12))  # at 4 and at 3 bits
QUICK_MODELS = ((1, 4), (2, 8))
_CONTEXT, _WINDOWS, _QUICK_WINDOWS = 512, 16, 4


def steps(setup: Setup) -> list[Step]:
    """One matrix at each size; then the model at a few."""
    quick, matrix = setup.quick, trials.up_projection(setup)
    grid, most = (QUICK_GRID, 1 << 17) if quick else (GRID, _MOST)
    models.check_texts(setup, _extent(setup))
    rows = trials.reader(setup, matrix, most, ((d, 1 << n) for d, n in grid))
    shared = sum(m.kind == matrix.kind for m in classify(setup.source(), CompressConfig())[0])
    made = [Step(f"grid.{d}x{1 << n}", partial(_point, rows, d, n, setup.seed, shared)) for d, n in grid]
    dense = Step("model.dense", lambda progress: _perplexity(setup, *models.dense_model(setup), progress))
    sizes = QUICK_MODELS if quick else MODELS
    return [*made, dense, *(Step(f"model.{d}x{1 << n}", partial(_model, setup, d, 1 << n)) for d, n in sizes)]


def _extent(setup: Setup) -> models.Extent:
    return models.Extent(_CONTEXT, _QUICK_WINDOWS if setup.quick else _WINDOWS)


def _config(d: int) -> CodecConfig:
    base = dataclasses.replace(CodecConfig(), kmeans_iterations=10, epochs=1)
    return CompressConfig(codec=base).codec_for(d)


def _point(rows: Rows, d: int, index_bits: int, seed: int, shared: int, progress: Progress) -> dict[str, Any]:
    """One size on one matrix."""
    matrix, config, size = rows(), _config(d), 1 << index_bits
    trial = trials.train(matrix.weight, Training(config, size), seed, progress)
    bits, weights = trials.stored_bits(matrix.weight, config, size), matrix.weight.numel()
    own, common = bits["indices"] + bits["row_scales"], bits["codebook"] + bits["decoder"]
    return {
        "matrix": matrix.facts(),
        "vector_len": d,
        "codebook_size": size,
        "index_bits": index_bits,
        "index_bpw": index_bits / d,
        "bits": bits,
        "bpw_alone": (own + common) / weights,
        "bpw_shared": (own + common / shared) / weights,
        "shared_by": shared,
        "nmse": digits(trial.nmse),
        "kmeans_nmse": digits(trial.start),
        "predicted_nmse": digits(predicted_nmse(d, index_bits)),
        "used": digits(float((trial.counts > 0).double().mean())),
        "seconds": round(trial.seconds, 1),
    }


def _perplexity(setup: Setup, model: Any, tokenizer: Any, progress: Progress) -> dict[str, Any]:
    text, extent = setup.evaluation_texts()[0], _extent(setup)
    context = models.fitting(setup, extent.context)
    found = pocketllm.perplexity(model, tokenizer, text.text, context, extent.windows, progress)
    return {**dataclasses.asdict(found), "text": text.name, "dtype": str(model.dtype)}


def _model(setup: Setup, d: int, size: int, progress: Progress) -> dict[str, Any]:
    """The model with a codebook for each kind, embedding and head left dense."""
    codec = dataclasses.replace(_config(d), sample_per_codeword=64)
    config = CompressConfig(
        codec=codec,
        vector_len=d,
        codebook_size=size,
        codebook_scope="kind",
        keep_embeddings=True,
        seed=setup.seed,
    )
    folder = models.compressed(setup, f"model-{d}x{size}", config, portion(progress, 0, 0.8))
    report, matrices = read_report(folder), Matrices.open(folder)
    model, tokenizer = models.dense_model(setup)
    with models.installed(model, matrices, [m["name"] for m in report["matrices"]]):
        measured = _perplexity(setup, model, tokenizer, portion(progress, 0.8, 1))
    shutil.rmtree(folder)
    return {
        **measured,
        "vector_len": d,
        "codebook_size": size,
        "index_bpw": (size - 1).bit_length() / d,
        "bpw": report["bpw_matrices"],
        "nmse": digits(models.mean_nmse(report)),
    }


MEASUREMENT = Measurement(steps, on_text=True)
