"""Fit codecs: end-to-end training of encoder, codebook and decoder on a sample of rows.

loss = reconstruction + vq_weight * |q - sg[z]|^2 + commitment_weight * |sg[q] - z|^2,
Adam with a cosine schedule (arXiv 2511.17637, section "Method" and "Implementation details").

Codecs that share a codebook are trained together, each on its own rows: `fit` takes one sample per decoder.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pocketllm.codec import codebook as cb
from pocketllm.codec.codebook import FittedCodebook
from pocketllm.codec.index_form import IndexForm
from pocketllm.codec.matrix_codec import MatrixCodec
from pocketllm.codec.normalization import divide_rows, row_rms
from pocketllm.codec.subvectors import cut
from pocketllm.config import CodecConfig, Safeguards

Progress = Callable[[float], None]
"""Called with the finished share, 0 to 1."""


@dataclass(frozen=True)
class TrainingStep:
    """One step of training, as passed to an observer.

    reconstruction: error of the batch over its energy, by the nearest latent. loss: sum of all terms.
    grad_norm: of all parameters together, before clipping. counts: [K] index counts of the batch.
    """

    epoch: int
    reconstruction: float
    loss: float
    grad_norm: float
    counts: Tensor


Observer = Callable[[TrainingStep], None]


@dataclass(frozen=True)
class FitResult:
    """Fitted codecs by decoder key, and how the fit went.

    start_nmse, final_nmse: of the unit-RMS sample rows per key, before training and of the kept state.
    utilization: share of codewords the sample uses at the end. curve: pooled nmse after each epoch.
    revived: dead codewords moved during training.
    """

    codecs: dict[str, MatrixCodec]
    start_nmse: dict[str, float]
    final_nmse: dict[str, float]
    utilization: float
    curve: list[float]
    revived: int

    def facts(self) -> dict[str, Any]:
        """Everything except the codecs, as plain JSON types."""
        return {
            "start_nmse": self.start_nmse,
            "final_nmse": self.final_nmse,
            "sample_utilization": self.utilization,
            "curve": self.curve,
            "revived": self.revived,
        }


def fit(
    samples: Mapping[str, list[Tensor]],
    config: CodecConfig,
    form: IndexForm,
    seed: int,
    *,
    keys: list[str] | None = None,
    progress: Progress = lambda share: None,
    safeguards: Safeguards | None = None,
    observer: Observer | None = None,
) -> FitResult:
    """Fit one codebook and one encoder/decoder pair per key of `samples`.

    With a form that trains no networks (the trellis) only the codebook is fitted, to all samples together, and
    encoders and decoders stay the identity.

    Args:
        samples: key -> list of row blocks [rows_i, columns_i]; blocks may differ in `columns`.
        config: the codec's settings.
        form: of the indices; its K is that of the codebook.
        seed: of every random choice.
        keys: all codecs to create, if there are more than keys of samples; for a form that trains no networks.
        progress: called with the finished share.
        safeguards: None takes the defaults.
        observer: called at every step.

    Returns:
        The best state reached (by sample nmse, including the initial state), so training never makes it worse. If
        the loss is no longer finite, training ends and `curve` is shorter than the number of epochs.
    """
    if not form.trains_networks:
        return _fit_codebook_alone(samples, keys or list(samples), config, form, seed)
    safeguards = safeguards or Safeguards()
    generator = torch.Generator().manual_seed(seed)
    rows = {key: [_unit_rows(block, config) for block in blocks] for key, blocks in samples.items()}
    codecs = _start(rows, config, form, seed, generator)
    batches = [
        (key, part)
        for key, blocks in rows.items()
        for block in blocks
        for part in block.split(max(1, config.batch_size // block.shape[1]))
    ]
    parameters = list(nn.ModuleList(codecs.values()).parameters())
    optimizer = torch.optim.Adam(parameters, lr=config.learning_rate)
    steps = max(1, config.epochs * len(batches))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    start = best = _nmse(codecs, rows)
    kept, revived = copy.deepcopy(codecs), 0
    curve: list[float] = []
    for epoch in range(config.epochs):
        counts = torch.zeros(form.codebook_size, dtype=torch.int64, device=parameters[0].device)
        for number, position in enumerate(torch.randperm(len(batches), generator=generator).tolist()):
            key, batch = batches[position]
            step = _step(codecs[key], batch, optimizer, safeguards.max_grad_norm)
            if step is None:
                return FitResult(kept, start, best, _utilization(kept, rows), curve, revived)
            counts += step.counts
            if observer is not None:
                observer(step.summary(epoch, batch))
            schedule.step()
            progress((epoch + (number + 1) / len(batches)) / config.epochs)
        revived += _revive(codecs, rows, counts, generator) if safeguards.revive else 0
        now = _nmse(codecs, rows)
        curve.append(_pooled(now, rows))
        if all(now[key] <= best[key] for key in now):
            best, kept = now, copy.deepcopy(codecs)
    return FitResult(kept, start, best, _utilization(kept, rows), curve, revived)


def _fit_codebook_alone(
    samples: Mapping[str, list[Tensor]], keys: list[str], config: CodecConfig, form: IndexForm, seed: int
) -> FitResult:
    """Fit the codebook of a form whose networks stay the identity; see `fit`."""
    generator = torch.Generator().manual_seed(seed)
    rows = {key: [_unit_rows(block, config) for block in blocks] for key, blocks in samples.items()}
    points = torch.cat([block.reshape(-1, config.vector_len) for blocks in rows.values() for block in blocks])
    points = points[torch.randperm(len(points), generator=generator)[: config.max_sample].to(points.device)]
    if config.codebook_source == "seed":
        drawn = cb.seeded_codebook(form.codebook_size, config.vector_len, seed)
        fitted = FittedCodebook(drawn.float().to(points.device), errors=(0.0,))
    else:
        fitted = form.fit_codebook(points, config.kmeans_iterations, seed)
    codebook = nn.Parameter(fitted.table)
    codecs = {key: MatrixCodec(config, codebook) for key in keys}
    for codec in codecs.values():
        for net in (codec.encoder, codec.decoder):
            net.reset("identity", generator)
            net.to(points.device)
    start, end = dict.fromkeys(keys, fitted.errors[0]), dict.fromkeys(keys, fitted.errors[-1])
    return FitResult(codecs, start, end, fitted.utilization, list(fitted.errors), 0)


@dataclass(frozen=True)
class _Step:
    """The values of a step, still on their device."""

    reconstruction: Tensor
    loss: Tensor
    grad_norm: Tensor
    counts: Tensor

    def summary(self, epoch: int, batch: Tensor) -> TrainingStep:
        energy = float(batch.square().mean())
        share = float(self.reconstruction) / max(energy, 1e-30)
        return TrainingStep(epoch, share, float(self.loss), float(self.grad_norm), self.counts)


def _step(
    codec: MatrixCodec, batch: Tensor, optimizer: torch.optim.Optimizer, max_grad_norm: float
) -> _Step | None:
    """One step of training on whole rows [rows, n, d]; None where the loss is not finite."""
    loss, error, indices = codec.loss(batch)
    if not torch.isfinite(loss):
        return None
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], max_grad_norm)
    optimizer.step()
    counts = torch.bincount(indices, minlength=codec.codebook.shape[0])
    return _Step(error.detach(), loss.detach(), norm.detach(), counts)


def _unit_rows(block: Tensor, config: CodecConfig) -> Tensor:
    """[rows, columns] -> [rows, n, d] float32, divided by the row scale if one is stored."""
    unit = divide_rows(block, row_rms(block)) if config.row_scale else block.float()
    return cut(unit, config.vector_len)


def _start(
    rows: Mapping[str, list[Tensor]],
    config: CodecConfig,
    form: IndexForm,
    seed: int,
    generator: torch.Generator,
) -> dict[str, MatrixCodec]:
    """Initial codecs: random networks and codebook as published, or identity networks and k-means."""
    d = config.vector_len
    device = next(iter(rows.values()))[0].device
    codebook = nn.Parameter(torch.empty(form.codebook_size, d, device=device))
    codecs = {}
    for key in rows:
        codecs[key] = MatrixCodec(config, codebook)
        for net in (codecs[key].encoder, codecs[key].decoder):
            net.reset("identity" if config.init == "kmeans" else "random", generator)
            net.to(device)
    with torch.no_grad():
        if config.init == "normal":
            codebook.copy_(cb.normal_codebook(form.codebook_size, d, generator))
        else:
            # Of the subvectors, not of the latents, which have lost the means of their rows: the networks
            # start as the identity, so this is what codewords have to decode to.
            points = torch.cat([block.reshape(-1, d) for blocks in rows.values() for block in blocks])
            codebook.copy_(form.fit_codebook(points, config.kmeans_iterations, seed).table)
    return codecs


@torch.no_grad()
def _revive(
    codecs: Mapping[str, MatrixCodec],
    rows: Mapping[str, list[Tensor]],
    counts: Tensor,
    generator: torch.Generator,
) -> int:
    """Move codewords that the epoch never used onto random latents; returns how many."""
    dead = (counts == 0).nonzero()[:, 0]
    if len(dead):
        key = list(rows)[int(torch.randint(len(rows), (1,), generator=generator))]
        block = rows[key][int(torch.randint(len(rows[key]), (1,), generator=generator))]
        latents = codecs[key].encoder(block).reshape(-1, block.shape[-1])
        chosen = torch.randint(len(latents), (len(dead),), generator=generator)
        codecs[key].codebook[dead] = latents[chosen.to(latents.device)]
    return len(dead)


@torch.no_grad()
def _reconstruct(codec: MatrixCodec, block: Tensor) -> tuple[Tensor, Tensor]:
    """[rows, n, d] -> (the same encoded and decoded, [rows * n] indices), as `encode` chooses them."""
    indices = codec.choose(block)
    table = codec.decoded_codebook() if codec.is_lookup else None
    return codec.decode_unit(indices, table), indices.reshape(-1)


def _nmse(codecs: Mapping[str, MatrixCodec], rows: Mapping[str, list[Tensor]]) -> dict[str, float]:
    """nmse of the sample rows per key."""
    result = {}
    for key, blocks in rows.items():
        error = sum(float((_reconstruct(codecs[key], b)[0] - b).square().sum()) for b in blocks)
        result[key] = error / max(_energy(blocks), 1e-30)
    return result


def _energy(blocks: list[Tensor]) -> float:
    return sum(float(b.square().sum()) for b in blocks)


def _pooled(nmse: Mapping[str, float], rows: Mapping[str, list[Tensor]]) -> float:
    energy = {key: _energy(blocks) for key, blocks in rows.items()}
    return sum(nmse[key] * energy[key] for key in rows) / max(sum(energy.values()), 1e-30)


def _utilization(codecs: Mapping[str, MatrixCodec], rows: Mapping[str, list[Tensor]]) -> float:
    counts = torch.zeros(next(iter(codecs.values())).codebook.shape[0], dtype=torch.int64)
    for key, blocks in rows.items():
        for block in blocks:
            counts += torch.bincount(_reconstruct(codecs[key], block)[1].cpu(), minlength=len(counts))
    return cb.codebook_utilization(counts)
