"""Error and perplexity over codebook size and vector length, at equal bits and at equal size."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

from pocketllm.codec import predicted_nmse
from pocketllm.config import CodecConfig, CompressConfig
from pocketllm.plan import Matrix
from pocketllm.studies.definition import Measurement, Progress, Setup, Step, portion
from pocketllm.studies.measure.trials import (
    Rows,
    Training,
    check_size,
    digits,
    sample,
    stored_bits,
    train,
    up_projection,
)

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
    from pocketllm.studies.measure.compressed_models import Extent, check_texts

    quick = setup.quick
    matrix, most = up_projection(setup), 1 << 17 if quick else _MOST
    check_texts(setup, Extent(_CONTEXT, _QUICK_WINDOWS if quick else _WINDOWS))
    check_size(matrix, most, ((d, 1 << n) for d, n in (QUICK_GRID if quick else GRID)))
    rows = partial(sample, setup, matrix, most)
    shared = _count(setup, matrix)
    made = [
        Step(f"grid.{d}x{1 << n}", partial(_point, rows, d, n, setup.seed, shared))
        for d, n in (QUICK_GRID if quick else GRID)
    ]
    made.append(Step("model.dense", partial(_dense, setup)))
    for d, n in QUICK_MODELS if quick else MODELS:
        made.append(Step(f"model.{d}x{1 << n}", partial(_model, setup, d, 1 << n)))
    return made


def _count(setup: Setup, matrix: Matrix) -> int:
    """Matrices of a kind in the model."""
    from pocketllm.plan import classify

    return sum(m.kind == matrix.kind for m in classify(setup.source(), CompressConfig())[0])


def _config(d: int) -> CodecConfig:
    base = dataclasses.replace(CodecConfig(), kmeans_iterations=10, epochs=1)
    return CompressConfig(codec=base).codec_for(d)


def _point(rows: Rows, d: int, index_bits: int, seed: int, shared: int, progress: Progress) -> dict[str, Any]:
    """One size on one matrix."""
    matrix, config, size = rows(), _config(d), 1 << index_bits
    trial = train(matrix.weight, Training(config, size), seed, progress)
    bits, weights = stored_bits(matrix.weight, config, size), matrix.weight.numel()
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


def _dense(setup: Setup, progress: Progress) -> dict[str, Any]:
    from pocketllm.studies.measure.compressed_models import dense_model

    return _perplexity(setup, *dense_model(setup), progress)


def _perplexity(setup: Setup, model: Any, tokenizer: Any, progress: Progress) -> dict[str, Any]:
    from pocketllm import perplexity
    from pocketllm.studies.measure.compressed_models import fitting

    text, windows = setup.evaluation_texts()[0], _QUICK_WINDOWS if setup.quick else _WINDOWS
    context = fitting(setup, _CONTEXT)
    found = perplexity(model, tokenizer, text.text, context, windows, progress)
    return {**dataclasses.asdict(found), "text": text.name, "dtype": str(model.dtype)}


def _model(setup: Setup, d: int, size: int, progress: Progress) -> dict[str, Any]:
    """The model with a codebook for each kind, embedding and head left dense."""
    import shutil

    from pocketllm.format import read_report
    from pocketllm.runtime import Matrices
    from pocketllm.studies.measure.compressed_models import compressed, dense_model, installed, mean_nmse

    codec = dataclasses.replace(_config(d), sample_per_codeword=64)
    config = CompressConfig(
        codec=codec,
        vector_len=d,
        codebook_size=size,
        codebook_scope="kind",
        keep_embeddings=True,
        seed=setup.seed,
    )
    folder = compressed(setup, f"model-{d}x{size}", config, portion(progress, 0, 0.8))
    report, matrices = read_report(folder), Matrices.open(folder)
    model, tokenizer = dense_model(setup)
    with installed(model, matrices, [m["name"] for m in report["matrices"]]):
        measured = _perplexity(setup, model, tokenizer, portion(progress, 0.8, 1))
    shutil.rmtree(folder)
    return {
        **measured,
        "vector_len": d,
        "codebook_size": size,
        "index_bpw": (size - 1).bit_length() / d,
        "bpw": report["bpw_matrices"],
        "nmse": digits(mean_nmse(report)),
    }


MEASUREMENT = Measurement(steps=steps, on_text=True)
