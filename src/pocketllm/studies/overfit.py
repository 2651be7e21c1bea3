"""One projection alone: the error that is reached, beside the error that is possible at that rate."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pocketllm.codec.matrix_codec import MatrixCodec
from pocketllm.config import CodecConfig, Safeguards
from pocketllm.studies.rates import bits_for_mse, gaussian_mse, lloyd_max
from pocketllm.studies.registry import STUDIES
from pocketllm.studies.study import Progress, Results, Setup, Step, Study, Table
from pocketllm.studies.style import COLOURS, INK, look, number, plain_ticks
from pocketllm.studies.trials import (
    OURS,
    PUBLISHED,
    UNGUARDED,
    Sample,
    as_stored,
    digits,
    mean_square_error,
    sample,
    settings,
    stored_bits,
    train,
    up_projection,
)

_MOST, _BATCH = 1 << 20, 4096
TRAININGS = {
    "published": "published start",
    "guarded": "published start, guarded",
    "ours": "our start",
}
CURVES = ((8, 4096), (4, 256))  # (d, K)
SWEEP = (
    *((8, 1 << n) for n in (8, 10, 12, 14, 15)),
    *((4, 1 << n) for n in (8, 10, 12, 14)),
    *((2, 1 << n) for n in (6, 8, 9, 10, 12)),
    *((1, 1 << n) for n in range(3, 14)),
)
QUICK_SWEEP = ((8, 256), (4, 256), (2, 64), (2, 1024), *((1, 1 << n) for n in range(3, 14, 2)))
TWINS = ((8, 4096), (4, 256), (4, 4096), (2, 1024))
QUICK_TWINS = ((4, 256), (2, 1024))
TARGET = 1e-4
_TARGETS = {"MSE": TARGET, "RMSE": TARGET**2}  # as mean square errors


def steps(setup: Setup) -> list[Step]:
    """The bound; trainings; k-means and codec over the rates; the same of a Gaussian matrix."""
    quick = setup.quick
    chosen = partial(sample, setup, up_projection(setup), 1 << 17 if quick else _MOST)
    made = [Step("bound", lambda progress: _bound(chosen()))]
    for d, size in ((8, 256),) if quick else CURVES:
        for name in TRAININGS:
            how = _training(name, d, quick)
            made.append(Step(f"curve.{name}.{d}x{size}", partial(_curve, chosen, how, size, setup.seed)))
    for d, size in QUICK_SWEEP if quick else SWEEP:
        made.append(Step(f"sweep.{d}x{size}", partial(_point, chosen, d, size, setup.seed)))
    for d, size in QUICK_TWINS if quick else TWINS:
        made.append(Step(f"twin.{d}x{size}", partial(_twin, chosen, d, size, setup.seed)))
    return made


def _training(name: str, vector_len: int, quick: bool) -> tuple[CodecConfig, Safeguards]:
    config = dataclasses.replace(
        OURS if name == "ours" else PUBLISHED, vector_len=vector_len, batch_size=_BATCH
    )
    if quick and name != "ours":
        config = dataclasses.replace(config, epochs=20, batch_size=1024)
    return config, UNGUARDED if name == "published" else Safeguards()


def _bound(matrix: Sample) -> dict[str, Any]:
    squares = matrix.weight.double().square().mean(dim=1)
    rates = [n / 4 for n in range(1, 57)]
    return {
        "matrix": matrix.facts(),
        "levels_of_32": _levels(matrix.weight),
        "bits": rates,
        "mse": [digits(gaussian_mse(squares, rate)) for rate in rates],
        "impossible_below_bits": {name: bits_for_mse(squares, mse) for name, mse in _TARGETS.items()},
    }


def _levels(weight: Tensor, run: int = 32) -> int:
    """The most different values in any aligned run of so many weights in a row."""
    runs = weight[:, : weight.shape[1] // run * run].reshape(-1, run).sort(dim=1).values
    return 1 + int((runs[:, 1:] != runs[:, :-1]).sum(dim=1).max()) if len(runs) else run


def _curve(
    chosen: Any, how: tuple[CodecConfig, Safeguards], size: int, seed: int, progress: Progress
) -> dict[str, Any]:
    """A training, beside k-means and the bound at the rate of its indices."""
    matrix, (config, guards) = chosen(), how
    trial = train(matrix.weight, config, size, seed, guards, progress)
    square = matrix.facts()["mean_square"]
    return {
        "settings": settings(config, guards),
        "steps": len(trial.steps),
        "mse_over_epochs": [digits(square * value) for value in trial.curve],
        "unfinished": len(trial.curve) < config.epochs,
        **_measured(matrix.weight, config, size, trial.mse),
        "seconds": round(trial.seconds, 1),
    }


def _measured(weight: Tensor, config: CodecConfig, size: int, mse: float) -> dict[str, Any]:
    """What a code of the matrix comes to, in bits and in errors."""
    bits = stored_bits(weight, config, size)
    rate = bits["indices"] / weight.numel()
    return {
        "vector_len": config.vector_len,
        "codebook_size": size,
        "bits": bits,
        "index_bpw": rate,
        "bpw": sum(bits.values()) / weight.numel(),
        "nmse": digits(mse / float(weight.double().square().mean())),
        "mse": digits(mse),
        "bound_mse": digits(gaussian_mse(weight.double().square().mean(dim=1), rate)),
    }


def _lookup(d: int, epochs: int) -> CodecConfig:
    """The look-up form without row scales: k-means in the weights' own units, then training."""
    return CodecConfig(vector_len=d, row_scale=False, kmeans_iterations=10, epochs=epochs, batch_size=_BATCH)


def _point(chosen: Any, d: int, size: int, seed: int, progress: Progress) -> dict[str, Any]:
    matrix, config = chosen(), _lookup(d, 2)
    if d == 1:
        return _scalar(matrix.weight, size)
    trial = train(matrix.weight, config, size, seed, progress=progress)
    kmeans = trial.start * float(matrix.weight.double().square().mean())
    return {"kmeans_mse": digits(kmeans), **_measured(matrix.weight, config, size, trial.mse)}


def _scalar(weight: Tensor, size: int) -> dict[str, Any]:
    """A scalar quantizer as a codec: networks have nothing to add to numbers that stand alone."""
    config = _lookup(1, 0)
    codec = MatrixCodec(config, nn.Parameter(lloyd_max(weight, size)))
    for net in (codec.encoder, codec.decoder):
        net.reset("identity", torch.Generator())
        net.to(weight.device)
    kmeans = mean_square_error(weight, codec)
    measured = _measured(weight, config, size, mean_square_error(weight, as_stored(codec)))
    return {"kmeans_mse": digits(kmeans), **measured}


def _twin(chosen: Any, d: int, size: int, seed: int, progress: Progress) -> dict[str, Any]:
    """k-means of a Gaussian matrix with the same shape and the same scale of each row."""
    weight = chosen().weight
    drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)).to(weight.device)
    drawn *= (weight.square().mean(dim=1) / drawn.square().mean(dim=1)).sqrt()[:, None]
    trial = train(drawn, _lookup(d, 0), size, seed, progress=progress)
    return _measured(drawn, _lookup(d, 0), size, trial.mse)


def _named(results: Results, what: str) -> dict[str, Mapping[str, Any]]:
    """Key without its first word -> values."""
    return {key.split(".", 1)[1]: value for key, value in results.items() if key.startswith(f"{what}.")}


def tables(results: Results) -> list[Table]:
    """The targets, the trainings, the rates, the twins."""
    return [_targets(results), _trainings(results), _rates(results), _twins(results)]


def _first(results: Results, mse: float) -> Mapping[str, Any] | None:
    """The point of least bits that reaches an error."""
    reached = [p for p in _named(results, "sweep").values() if p["mse"] < mse]
    return min(reached, key=lambda p: p["bpw"]) if reached else None


def _targets(results: Results) -> Table:
    rows = []
    square = results["bound"]["matrix"]["mean_square"]
    for name, mse in _TARGETS.items():
        found = _first(results, mse)
        cells = (
            ["not reached"] * 4
            if found is None
            else [
                f"d = {found['vector_len']}, K = {found['codebook_size']}",
                f"{found['index_bpw']:.2f}",
                f"{found['bpw']:.2f}",
                number(found["mse"] if name == "MSE" else found["mse"] ** 0.5),
            ]
        )
        needed = results["bound"]["impossible_below_bits"][name]
        rows.append([f"{name} < {TARGET:g}", number(mse / square), f"{needed:.2f}", *cells])
    header = ["target", "as nmse", "impossible below, bits", "reached first by", "index bits", "all bits"]
    return Table(
        "Where the target belongs",
        [*header, "error there"],
        rows,
        f"Mean square of the weights: {number(square)}. Impossible below: for independent Gaussian rows with "
        "the scales of these rows, known for nothing. Reached first: the fewest bits of those tried below, "
        "codebook and decoder counted for this matrix alone.",
    )


def _trainings(results: Results) -> Table:
    rows = []
    for key, c in _named(results, "curve").items():
        ours = _named(results, "curve")[f"ours.{c['vector_len']}x{c['codebook_size']}"]
        rows.append(
            [
                str(c["vector_len"]),
                str(c["codebook_size"]),
                TRAININGS[key.split(".")[0]],
                str(c["steps"]),
                f"{c['index_bpw']:.2f}",
                number(c["nmse"]),
                number(c["mse"]),
                number(c["mse"] ** 0.5),
                f"{c['mse'] / ours['mse']:.3f}",
                f"{c['mse'] / c['bound_mse']:.2f}",
            ]
        )
    header = ["d", "K", "training", "steps", "index bits", "nmse", "MSE", "RMSE", "MSE, ours = 1"]
    note = (
        "Row scales are stored. Best state met. The last column: MSE over the least possible for Gaussian rows at "
        "the rate of the indices."
    )
    return Table("Training on it", [*header, "over the bound"], rows, note)


def _rates(results: Results) -> Table:
    rows = []
    for p in sorted(_named(results, "sweep").values(), key=lambda p: p["index_bpw"]):
        rows.append(
            [
                str(p["vector_len"]),
                str(p["codebook_size"]),
                f"{p['index_bpw']:.2f}",
                f"{p['bpw']:.2f}",
                number(p["kmeans_mse"]),
                number(p["mse"]),
                number(p["mse"] ** 0.5),
                number(p["nmse"]),
                f"{p['mse'] / p['bound_mse']:.2f}",
            ]
        )
    header = ["d", "K", "index bits", "all bits", "k-means MSE", "codec MSE", "codec RMSE", "codec nmse"]
    note = (
        "No row scales. Codec: look-up form trained from k-means, codebook and decoder in 16 bits; k-means in "
        "32. d = 1: the scalar quantizer of Lloyd and Max. Over the bound: at the bits of the indices; codebooks "
        "that are large for one matrix hold a part of it themselves."
    )
    return Table("Over the rates", [*header, "over the bound"], rows, note)


def _twins(results: Results) -> Table:
    rows = []
    sweep = _named(results, "sweep")
    for key, twin in _named(results, "twin").items():
        own = sweep.get(key)
        cells = (
            ["", ""] if own is None else [number(own["kmeans_mse"]), f"{own['kmeans_mse'] / twin['mse']:.3f}"]
        )
        rows.append([str(twin["vector_len"]), str(twin["codebook_size"]), number(twin["mse"]), *cells])
    header = ["d", "K", "Gaussian, MSE", "weights, MSE", "weights over Gaussian"]
    return Table("A Gaussian matrix with the same row scales, k-means", header, rows)


def findings(results: Results) -> list[str]:
    """Where the target is reached, where it is impossible, what training reaches at a rate."""
    bound = results["bound"]
    found = [_target_words(results, name, mse) for name, mse in _TARGETS.items()]
    found += [
        _curve_words(results, size)
        for size in dict.fromkeys(k.split(".")[1] for k in _named(results, "curve"))
    ]
    ratios = [
        own["kmeans_mse"] / twin["mse"]
        for key, twin in _named(results, "twin").items()
        if (own := _named(results, "sweep").get(key)) is not None
    ]
    if ratios:
        found.append(
            f"k-means leaves {min(ratios):.2f} to {max(ratios):.2f} times the error on these weights that it "
            "leaves on a Gaussian matrix with the same row scales."
        )
    if bound["levels_of_32"] <= 16:
        found.append(
            f"These weights have been quantized before: no run of 32 holds more than {bound['levels_of_32']} "
            "different values. A code that knew the levels would be exact at about 5 bits per weight; the "
            "bound is one for Gaussian rows, and none of the codes here looks for levels."
        )
    return found


def _target_words(results: Results, name: str, mse: float) -> str:
    needed = results["bound"]["impossible_below_bits"][name]
    first = _first(results, mse)
    if mse >= results["bound"]["matrix"]["mean_square"]:
        return f"{name} below {TARGET:g}: zeros reach it, since the weights are no larger."
    reached = (
        "none of the codes tried reaches it"
        if first is None
        else f"reached from {first['index_bpw']:.2f} bits of indices on (d = {first['vector_len']}, K = "
        f"{first['codebook_size']}; {first['bpw']:.2f} bits with codebook and decoder)"
    )
    return f"{name} below {TARGET:g}: {reached}; impossible below {needed:.2f} bits for Gaussian rows."


def _curve_words(results: Results, size: str) -> str:
    curves = {name: results[f"curve.{name}.{size}"] for name in TRAININGS}
    ours = curves["ours"]
    told = ", ".join(f"{title} {number(curves[name]['mse'] ** 0.5)}" for name, title in TRAININGS.items())
    return (
        f"At {ours['index_bpw']:.2f} bits (d = {ours['vector_len']}, K = {ours['codebook_size']}) the RMSE comes "
        f"to: {told}; at least {number(ours['bound_mse'] ** 0.5)} for Gaussian rows."
    )


def draw(results: Results, figure: Any) -> None:
    """RMSE over training; MSE over the rate, with the targets and the bound."""
    figure.set_size_inches(12, 4.8)
    left, right = figure.subplots(1, 2)
    sizes = list(dict.fromkeys(key.split(".")[1] for key in _named(results, "curve")))
    for size in sizes:
        _draw_curves(left, results, size, legend=size == sizes[0])
    left.set_yscale("log")
    plain_ticks(left.yaxis, minor=True)
    left.set_xlabel("share of training")
    left.set_title("RMSE over training", fontsize=11)
    left.legend(fontsize=9, frameon=False)
    _draw_rates(right, results)


def _draw_curves(axes: Any, results: Results, size: str, legend: bool) -> None:
    for n, (name, title) in enumerate(TRAININGS.items()):
        values = results[f"curve.{name}.{size}"]["mse_over_epochs"]
        x = [(i + 1) / len(values) for i in range(len(values))]
        axes.plot(x, [v**0.5 for v in values], label=title if legend else None, **{**look(n), "marker": ""})
    c = results[f"curve.ours.{size}"]
    limit = c["bound_mse"] ** 0.5
    axes.axhline(limit, color=INK, lw=1, ls=":")
    axes.text(1, limit, f"bound at {c['index_bpw']:.2f} bits", ha="right", va="bottom", fontsize=8.5)


def _draw_rates(axes: Any, results: Results) -> None:
    bound = results["bound"]
    axes.plot(bound["bits"], bound["mse"], color=INK, lw=1, ls=":", label="Gaussian rows: the bound")
    points = list(_named(results, "sweep").values())
    for n, d in enumerate(sorted({p["vector_len"] for p in points})):
        own = sorted((p for p in points if p["vector_len"] == d), key=lambda p: p["index_bpw"])
        x, y = [p["index_bpw"] for p in own], [p["mse"] for p in own]
        axes.plot(x, y, label=f"d = {d}, indices alone", **look(n))
        axes.plot([p["bpw"] for p in own], y, color=COLOURS[n], marker="x", lw=0, markersize=4.5)
    axes.plot([], [], color="grey", marker="x", lw=0, label="the same, all bits counted")
    for name, mse in _TARGETS.items():
        axes.axhline(mse, color="grey", lw=1)
        axes.text(0.1, mse, f"{name} = {TARGET:g}", va="bottom", fontsize=8.5)
    axes.set_yscale("log")
    axes.set_xlim(0, max(p["bpw"] for p in points) + 0.5)
    axes.set_ylim(bottom=min([*_TARGETS.values(), *(p["mse"] for p in points)]) / 4)
    plain_ticks(axes.yaxis)
    axes.set_xlabel("bits per weight")
    axes.set_title("MSE over the rate", fontsize=11)
    axes.legend(fontsize=8.5, frameon=False)


STUDY = Study(
    name="overfit",
    title=STUDIES["overfit"],
    claim=('Trained on one "up" projection alone, the codec brings the reconstruction error below 1e-4.'),
    method=(
        "The up projection of the middle block, nothing else. First it is trained on, from the published "
        "start for the published number of epochs, with and without safeguards, and from ours. Then codebooks "
        "of many sizes are fitted, from one bit to more than ten. Beside each error stands the least that is "
        "possible for Gaussian rows of these scales at that rate. 1e-4 is read both as an MSE and as an RMSE: it "
        "is a figure in the weights' own units, so that what it asks for depends on how large the weights are."
    ),
    steps=steps,
    tables=tables,
    draw=draw,
    findings=findings,
)
