"""Fit the codebook of a group of matrices and the networks of its codecs, to a sample of their rows."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pocketllm.codec.matrix_codec import MatrixCodec
from pocketllm.codec.rotation import Seeds, rotate_matrix
from pocketllm.codec.subvectors import fold
from pocketllm.codec.training import fit
from pocketllm.compression.matrix_encoder import codebook_unit
from pocketllm.config.constants import SAMPLED_MATRICES
from pocketllm.format.mapped_pages import drop_files
from pocketllm.format.workspace import Workspace
from pocketllm.plan.matrices import Matrix, Plan
from pocketllm.source.dense_checkpoint import DenseCheckpoint


def fitted_codecs(
    work: Workspace,
    source: DenseCheckpoint,
    plan: Plan,
    number: int,
    device: str,
    progress: Callable[[float], None],
) -> dict[str, MatrixCodec]:
    """The codecs of a codebook group by decoder key, fitted or read from an earlier run, rounded as stored."""
    key, group = list(plan.groups().items())[number]
    spec = plan.specs[group[0].name]
    config = plan.config.codec_for(spec.vector_len)
    keys = list(dict.fromkeys(plan.decoder_key(m) for m in group))
    name = codebook_unit(number)
    if not work.has(name):
        seed = zlib.crc32(f"{plan.config.seed}|{key}".encode())
        samples = _samples(source, plan, group, seed, device)
        # The seed of a codebook that is not stored is part of the stored form.
        drawn = plan.config.seed if config.codebook_source == "seed" else seed
        result = fit(samples, config, spec.form, drawn, keys=keys, progress=progress)
        work.save(name, _unit_tensors([result.codecs[k] for k in keys]), {"codebook": key, **result.facts()})
    tensors, _ = work.load(name)
    codebook = nn.Parameter(tensors["codebook"].float(), requires_grad=False)
    codecs = {}
    for position, decoder_key in enumerate(keys):
        codec = MatrixCodec(config, codebook)
        for net in ("encoder", "decoder"):
            codec.get_submodule(net).set_weights(  # type: ignore[operator]
                tensors[f"{net}.{position}.up"], tensors[f"{net}.{position}.down"]
            )
        codecs[decoder_key] = codec.to(device)
    return codecs


def _unit_tensors(codecs: list[MatrixCodec]) -> dict[str, Tensor]:
    """The tensors of fitted codecs: the stored part in float16, encoders (needed to encode) in float32."""
    tensors = {"codebook": codecs[0].codebook.detach().half()}
    for position, codec in enumerate(codecs):
        for net, dtype in ((codec.encoder, torch.float32), (codec.decoder, torch.float16)):
            kind = "encoder" if net is codec.encoder else "decoder"
            up, down = net.weights()
            tensors[f"{kind}.{position}.up"] = up.to(dtype)
            tensors[f"{kind}.{position}.down"] = down.to(dtype)
    return tensors


def _samples(
    source: DenseCheckpoint, plan: Plan, group: list[Matrix], seed: int, device: str
) -> dict[str, list[Tensor]]:
    """Random rows of the group's matrices, within the limits on the sample."""
    spec = plan.specs[group[0].name]
    settings = plan.config.codec
    # On a hashed trellis every window counts as a codeword: there are as many paths to learn from.
    budget = min(
        settings.max_sample, settings.sample_per_codeword * max(spec.codebook_size, 1 << spec.window)
    )
    same_distribution = plan.config.calibration is not None and plan.config.calibration.rotate
    if same_distribution and (not spec.form.trains_networks or plan.config.decoder_scope != "matrix"):
        group = _some(group)  # a few matrices represent all
    available = sum(m.subvectors(spec.vector_len) for m in group)
    share = min(1.0, budget / available)
    blocks: dict[tuple[str, int], list[Tensor]] = {}
    for matrix in group:
        generator = torch.Generator().manual_seed(zlib.crc32(matrix.name.encode(), seed))
        count = max(1, round(share * matrix.rows))
        rows = torch.randperm(matrix.rows, generator=generator)[:count].sort().values
        sample = _rotated_rows(fold(source.read(matrix.name), matrix.transposed), rows, plan.rotation(matrix))
        blocks.setdefault((plan.decoder_key(matrix), matrix.columns), []).append(sample.to(device))
        drop_files(source.files)
    samples: dict[str, list[Tensor]] = {}
    for (decoder_key, _), parts in blocks.items():
        samples.setdefault(decoder_key, []).append(torch.cat(parts))
    return samples


def _rotated_rows(weight: Tensor, rows: Tensor, rotation: Seeds) -> Tensor:
    """Rows of a rotated matrix, float32; only these are rotated if the columns are not."""
    return (
        rotate_matrix(weight[rows], rotation)
        if rotation[0] is None
        else rotate_matrix(weight, rotation)[rows]
    )


def _some(group: list[Matrix]) -> list[Matrix]:
    """At most `SAMPLED_MATRICES` matrices of each kind, spread over the model."""
    kinds: dict[str, list[Matrix]] = {}
    for matrix in group:
        kinds.setdefault(matrix.kind, []).append(matrix)
    return [m for kind in kinds.values() for m in kind[:: -(-len(kind) // SAMPLED_MATRICES)]]
