"""The benefit of a decoder: the same stored bits spent on decoders or on codebooks, before and after recovery."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pocketllm
from pocketllm.compression import Event
from pocketllm.config import CodecConfig, CompressConfig, DistillConfig, LoopConfig
from pocketllm.evaluate import text_divergence
from pocketllm.format import read_report
from pocketllm.plan import classify
from pocketllm.report import block_of
from pocketllm.studies.definition import Measurement, Progress, Setup, Step, portion
from pocketllm.studies.measure import compressed_models as models
from pocketllm.studies.measure.significance import mean

FLOAT16_BYTES = 2
_QUICK = ("none-kind", "mlp-kind", "affine-matrix", "mlp-matrix", "none-model")


@dataclass(frozen=True)
class Size:
    """blocks: coded ones, in the middle of the model. codewords: K of the reference, at d = 4.

    steps, batch, context: of the distillation. windows: measured, each four times as long. Both are cut to the
    positions that the model has.
    """

    blocks: int
    codewords: int
    steps: int
    batch: int
    context: int
    windows: int


@dataclass(frozen=True)
class Variant:
    """A way to spend the bits other than those of the indices. equal: whether it must match the reference's bytes."""

    shown: str
    config: CompressConfig
    equal: bool


def size_of(setup: Setup) -> Size:
    if setup.quick:
        return Size(blocks=2, codewords=256, steps=4, batch=2, context=128, windows=1)
    return Size(blocks=6, codewords=1024, steps=16, batch=4, context=128, windows=8)


def variants(setup: Setup) -> dict[str, Variant]:
    """Every variant by key; the reference is `none-kind`, whose bytes the others spend otherwise."""
    size, source = size_of(setup), setup.source()
    base = _base(setup, size)
    matrices, _ = classify(source, base)
    kinds, count = len({m.kind for m in matrices}), len(matrices)
    d = base.codec.vector_len
    codebook = size.codewords * d * FLOAT16_BYTES
    budget = kinds * codebook

    def add(key: str, shown: str, codebooks: str, decoders: str, equal: bool = True, **codec: Any) -> None:
        """Add a variant with as many codewords as the budget allows, at most K; none if it allows none."""
        chosen = replace(base.codec, **codec)
        number = {"matrix": count, "kind": kinds, "model": 1}
        spent = number[decoders] * chosen.decoder_bits // 8
        each = (budget - spent) // (number[codebooks] * d * FLOAT16_BYTES)
        used = min(size.codewords, each)
        if used < 2:
            return
        config = replace(
            base, codec=chosen, codebook_size=used, codebook_scope=codebooks, decoder_scope=decoders
        )
        found[key] = Variant(shown, config, equal)

    found: dict[str, Variant] = {}
    add("none-kind", "none; a codebook per kind", "kind", "kind", depth=0)
    add("mlp-kind", "MLP per kind, a codebook per kind", "kind", "kind")
    add("row-kind", "MLP with RLN per kind (published form)", "kind", "kind", decoder="row")
    add("affine-matrix", "affine per matrix, a codebook per kind", "kind", "matrix", depth=1, hidden=0)
    width = (budget - codebook) // (count * 2 * base.codec.depth * d * FLOAT16_BYTES)
    if width >= 2 * d:  # the least that can start as the identity
        add("mlp-matrix", f"MLP (width {width}) per matrix, one codebook", "model", "matrix", hidden=width)
    add("none-model", "none; one codebook", "model", "model", equal=False, depth=0)
    return found


def calibrated_variants(setup: Setup) -> dict[str, Variant]:
    """The same question on the calibrated path, where decoders start as the identity and are trained later."""
    own = _base(setup, size_of(setup))
    base = replace(
        models.calibrated("calibrated-16x", tokens=8192, sensitivity_tokens=1024),
        keep_embeddings=True,
        seed=setup.seed,
        dense_first=own.dense_first,
        dense_last=own.dense_last,
    )
    none = replace(base, codec=replace(base.codec, depth=0), decoder_scope="model")
    mlp = replace(base, decoder_scope="matrix")
    return {
        "calibrated-none": Variant("none; one codebook", none, True),
        "calibrated-mlp": Variant("MLP per matrix, one codebook", mlp, True),
    }


def _base(setup: Setup, size: Size) -> CompressConfig:
    """Plain coding of some blocks in the middle at d = 4; embedding and head stay as they are."""
    numbers = [block_of(name) for name in setup.source().names()]
    total = max((n for n in numbers if n is not None), default=-1) + 1
    blocks = min(size.blocks, total)
    first = (total - blocks) // 2
    codec = CodecConfig(vector_len=4, epochs=3, kmeans_iterations=15)
    return CompressConfig(
        codec=codec,
        vector_len=4,
        codebook_size=size.codewords,
        keep_embeddings=True,
        dense_first=first,
        dense_last=total - blocks - first,
        seed=setup.seed,
    )


def steps(setup: Setup) -> list[Step]:
    """A step for each variant."""
    size = size_of(setup)
    models.check_texts(setup, models.Extent(4 * size.context, size.windows))
    chosen = variants(setup)
    if setup.quick:
        chosen = {key: chosen[key] for key in _QUICK if key in chosen}
    else:
        chosen |= calibrated_variants(setup)
    return [Step(key, partial(_variant, setup, key, variant)) for key, variant in chosen.items()]


def _variant(setup: Setup, key: str, variant: Variant, progress: Progress) -> dict[str, Any]:
    """Compress, measure, distil, measure."""
    size = size_of(setup)
    size = replace(size, context=models.fitting(setup, size.context))
    folder = models.compressed(setup, key, variant.config, portion(progress, 0, 0.4))
    report, before = read_report(folder), _measured(setup, folder)
    tuned = folder.with_name(f"{key}-tuned")
    distilled = _distilled(setup, size, folder, tuned, portion(progress, 0.5, 0.9))
    parts = report["bytes_by_part"]
    return {
        "shown": variant.shown,
        "equal": variant.equal,
        "codebook_bytes": parts["codebooks"],
        "decoder_bytes": parts["decoders"],
        "codewords": report["matrices"][0]["codebook_size"],
        "bpw": report["bpw_matrices"],
        "nmse": models.mean_nmse(report),
        "start_nmse": mean([mean([*fit["start_nmse"].values()]) for fit in report["fits"]]),
        "trained_nmse": mean([fit["curve"][-1] for fit in report["fits"]]),  # kept or not
        "before": before,
        "after": _measured(setup, tuned),
        "distilled": distilled,
        "config": asdict(size),
    }


def _distilled(setup: Setup, size: Size, folder: Path, tuned: Path, progress: Progress) -> dict[str, Any]:
    """Distil a compressed model into the folder `tuned`; returns the values to report."""
    loop = LoopConfig(
        batch_size=size.batch,
        eval_every=max(2, size.steps // 4),
        checkpoint_every=size.steps,
        seed=setup.seed,
    )
    config = DistillConfig(
        steps=size.steps,
        context=size.context,
        texts=models.calibration_texts(),
        validation_windows=8,
        loop=loop,
    )

    def on_event(event: Event) -> None:
        if event.stage == "train":
            progress(event.share)

    done = pocketllm.distill(folder, tuned, config, device=setup.device, overwrite=True, progress=on_event)
    return {key: value for key, value in asdict(done).items() if key != "output"}


def _measured(setup: Setup, folder: Path) -> dict[str, Any]:
    """Perplexity of a compressed model and its divergence from the dense one."""
    size, text = size_of(setup), setup.evaluation_texts()[0]
    (model, tokenizer), (reference, _) = models.compressed_model(setup, folder), models.dense_model(setup)
    context = models.fitting(setup, 4 * size.context)
    return asdict(text_divergence(model, reference, tokenizer, text.text, context, size.windows))


MEASUREMENT = Measurement(steps, on_text=True, inputs=lambda setup: models.inputs())
