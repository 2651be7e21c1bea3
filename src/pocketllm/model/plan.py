"""Which tensors are compressed, with which codec each, and what that costs in bits.

The error of a codec is predicted before anything is fitted: for a unit-variance Gaussian source a good
K-point quantizer in d dimensions has distortion

    D(d, K) = 2 pi G_d ((d + 2) / d)^((d + 2) / 2) K^(-2/d)

(Zador 1982; Gersho 1979), with the sphere bound G_d = Gamma(d/2 + 1)^(2/d) / ((d + 2) pi). Row-scaled weights
are close enough to Gaussian for that to order the choices.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from pocketllm.codec.packing import index_width, packed_bytes
from pocketllm.codec.rotation import Seeds
from pocketllm.codec.subvectors import subvectors_per_row
from pocketllm.config import SCOPES, CompressConfig
from pocketllm.errors import ConfigError
from pocketllm.model.source import DenseCheckpoint

ROW_SCALE_BITS = 16
CODEWORD_BITS = 16  # per component
_VECTOR_LENS = (2, 3, 4, 5, 6, 8)


def predicted_nmse(vector_len: int, index_bits: float) -> float:
    """D(d, 2^index_bits) for a unit-variance Gaussian; see the module's docstring."""
    d = vector_len
    sphere = math.gamma(d / 2 + 1) ** (2 / d) / ((d + 2) * math.pi)
    distortion = 2 * math.pi * sphere * ((d + 2) / d) ** ((d + 2) / 2) * 2.0 ** (-2 * index_bits / d)
    return min(1.0, distortion)


@dataclass(frozen=True)
class Matrix:
    """One tensor to compress, seen as a matrix.

    shape: as the model holds it. rows, columns: after transposing (Conv1D) or flattening (experts).
    kind: its name without the block number. in_blocks: False for embedding and head.
    """

    name: str
    shape: tuple[int, ...]
    rows: int
    columns: int
    kind: str
    in_blocks: bool
    transposed: bool = False

    @property
    def weights(self) -> int:
        return self.rows * self.columns

    def subvectors(self, vector_len: int) -> int:
        return self.rows * subvectors_per_row(self.columns, vector_len)

    def own_bits(self, spec: Spec, row_scale: bool) -> int:
        """Bits of packed indices (whole bytes, padding included) and row scales."""
        indices = 8 * packed_bytes(self.subvectors(spec.vector_len), index_width(spec.codebook_size))
        return indices + (ROW_SCALE_BITS * self.rows if row_scale else 0)


@dataclass(frozen=True, order=True)
class Spec:
    """Size of a codec: d and K."""

    vector_len: int
    codebook_size: int

    @property
    def nmse(self) -> float:
        return predicted_nmse(self.vector_len, math.log2(self.codebook_size))


@dataclass(frozen=True)
class Dense:
    """A tensor that stays as it is, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Plan:
    """The outcome: a spec for every compressed matrix, the reason for every other tensor.

    codebook_scope is resolved (never `auto`). bits are exact: nothing is rounded or estimated.
    """

    matrices: tuple[Matrix, ...]
    specs: dict[str, Spec]
    dense: tuple[Dense, ...]
    codebook_scope: str
    config: CompressConfig

    def codebook_key(self, matrix: Matrix) -> str:
        """Matrices with the same key share a codebook."""
        return _codebook_key(matrix, self.specs[matrix.name], self.codebook_scope)

    def decoder_key(self, matrix: Matrix) -> str:
        """Matrices with the same key share a decoder (and a codebook)."""
        scope = {"matrix": matrix.name, "kind": matrix.kind, "model": ""}[self.config.decoder_scope]
        return f"{self.codebook_key(matrix)}|{scope}"

    def rotation(self, matrix: Matrix) -> Seeds:
        """Seeds of the rotations of a matrix; the same for all that have the same inputs.

        Embedding and head are rotated on one side only, since single rows of them are looked up; fused
        experts as well, since their rows belong to different experts.
        """
        calibration = self.config.calibration
        if calibration is None or not calibration.rotate:
            return None, None
        both = matrix.in_blocks and len(matrix.shape) == 2
        return (2 * self.config.seed if both else None), 2 * self.config.seed + 1

    def own_bits(self, matrix: Matrix) -> int:
        """Bits of indices and row scales of one matrix."""
        return matrix.own_bits(self.specs[matrix.name], self.config.codec.row_scale)

    def index_bytes(self, matrix: Matrix) -> int:
        """Bytes of the packed indices of one matrix."""
        spec = self.specs[matrix.name]
        return packed_bytes(matrix.subvectors(spec.vector_len), index_width(spec.codebook_size))

    @property
    def weights(self) -> int:
        """Compressed weights, all matrices."""
        return sum(m.weights for m in self.matrices)

    def groups(self) -> dict[str, list[Matrix]]:
        """Codebook key -> its matrices, in the model's order."""
        result: dict[str, list[Matrix]] = {}
        for matrix in self.matrices:
            result.setdefault(self.codebook_key(matrix), []).append(matrix)
        return result

    def bits_by_part(self) -> dict[str, int]:
        """Stored bits: indices, row_scales, codebooks, decoders."""
        row_scales = sum(ROW_SCALE_BITS * m.rows for m in self.matrices) if self.config.codec.row_scale else 0
        codebooks = {self.codebook_key(m): self.specs[m.name] for m in self.matrices}
        decoders = {self.decoder_key(m): self.specs[m.name] for m in self.matrices}
        return {
            "indices": sum(self.own_bits(m) for m in self.matrices) - row_scales,
            "row_scales": row_scales,
            "codebooks": sum(_codebook_bits(spec) for spec in codebooks.values()),
            "decoders": sum(
                self.config.codec_for(spec.vector_len).decoder_bits for spec in decoders.values()
            ),
        }

    def matrix_bits(self) -> dict[str, float]:
        """Bits of each matrix with its share (by weights) of the codebook and decoder it uses."""
        result = {m.name: float(self.own_bits(m)) for m in self.matrices}
        for key_of, bits_of in (
            (self.codebook_key, _codebook_bits),
            (self.decoder_key, lambda spec: self.config.codec_for(spec.vector_len).decoder_bits),
        ):
            sharing: dict[str, list[Matrix]] = {}
            for matrix in self.matrices:
                sharing.setdefault(key_of(matrix), []).append(matrix)
            for members in sharing.values():
                bits, total = bits_of(self.specs[members[0].name]), sum(m.weights for m in members)
                for matrix in members:
                    result[matrix.name] += bits * matrix.weights / total
        return result

    @property
    def bpw(self) -> float:
        """All stored bits of the compressed matrices per weight."""
        return sum(self.bits_by_part().values()) / self.weights


def make_plan(source: DenseCheckpoint, config: CompressConfig) -> Plan:
    """Decide for every tensor of the model.

    Raises:
        ConfigError: nothing to compress, the target cannot be met (the message names the smallest and
            largest possible), or a codebook larger than the number of subvectors that share it.
    """
    matrices, dense = classify(source, config)
    while True:
        if not matrices:
            raise ConfigError(
                "no tensor is left to compress; the model is too small for these settings, "
                "or too many blocks are left dense"
            )
        plan = _allocate(matrices, dense, config)
        useless = [m for m in matrices if plan.own_bits(m) >= 16 * m.weights]
        if not useless:
            return plan
        for matrix in useless:
            matrices.remove(matrix)
            dense.append(Dense(matrix.name, matrix.shape, "coding it would not make it smaller than 16 bit"))


_BLOCK = re.compile(r"^(?P<stem>.*?)\.(?P<number>\d+)\.(?P<rest>.+)$")


def classify(source: DenseCheckpoint, config: CompressConfig) -> tuple[list[Matrix], list[Dense]]:
    """Split the model's tensors into matrices to compress and dense ones with their reason."""
    numbers = [int(m["number"]) for n in source.names() if (m := _BLOCK.match(n))]
    blocks = max(numbers, default=-1) + 1
    if config.dense_first + config.dense_last >= blocks > 0:
        raise ConfigError(
            f"dense_first={config.dense_first} and dense_last={config.dense_last} leave none of the model's "
            f"{blocks} blocks to compress; lower them"
        )
    ends = _embedding_modules(source)
    matrices: list[Matrix] = []
    dense: list[Dense] = []
    for name in source.names():
        shape = source.shape(name)
        found = _matrix(source, name, shape, ends)
        if isinstance(found, str):
            dense.append(Dense(name, shape, found))
            continue
        match = _BLOCK.match(name)
        number = int(match["number"]) if match else -1
        if found.in_blocks and not config.dense_first <= number < blocks - config.dense_last:
            dense.append(Dense(name, shape, "in a block left dense by the settings"))
        elif not found.in_blocks and config.keep_embeddings:
            dense.append(Dense(name, shape, "embedding or head, kept by the settings"))
        else:
            matrices.append(found)
    return matrices, dense


def _embedding_modules(source: DenseCheckpoint) -> set[int]:
    model = source.model
    return {id(m) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}


def _matrix(source: DenseCheckpoint, name: str, shape: tuple[int, ...], ends: set[int]) -> Matrix | str:
    """The tensor as a matrix, or the reason why it is not compressed."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    parent, _, leaf = name.rpartition(".")
    module = source.model.get_submodule(parent)
    match = _BLOCK.match(name)
    kind = match["rest"] if match else name
    kind = re.sub(r"\.\d+\.", ".*.", kind).removesuffix(".weight")
    if len(shape) == 3 and match and "expert" in name:
        return Matrix(name, shape, shape[0] * shape[1], shape[2], kind, True)
    if len(shape) != 2:
        return "norm, bias or other small tensor" if len(shape) < 2 else f"a {len(shape)}-D tensor"
    if leaf == "weight" and isinstance(module, nn.Embedding | nn.Linear | Conv1D):
        if id(module) in ends:
            return Matrix(name, shape, *shape, kind, False)
        if isinstance(module, nn.Embedding):
            return "an embedding other than the token embedding"
        if not match:
            return "a linear layer outside the blocks"
        if isinstance(module, Conv1D):
            return Matrix(name, shape, shape[1], shape[0], kind, True, transposed=True)
        return Matrix(name, shape, *shape, kind, True)
    return f"a parameter of {type(module).__name__} (router or similar)"


def _codebook_bits(spec: Spec) -> int:
    return CODEWORD_BITS * spec.codebook_size * spec.vector_len


def _codebook_key(matrix: Matrix, spec: Spec, scope: str) -> str:
    shared = {"matrix": matrix.name, "kind": matrix.kind, "model": ""}[scope]
    return f"{spec.vector_len}x{spec.codebook_size}|{shared}"


def _allocate(matrices: list[Matrix], dense: list[Dense], config: CompressConfig) -> Plan:
    def plan(specs: dict[str, Spec], scope: str) -> Plan:
        return Plan(tuple(matrices), specs, tuple(dense), scope, config)

    scopes = SCOPES if config.codebook_scope == "auto" else (config.codebook_scope,)
    if config.codebook_size is not None:
        assert config.vector_len is not None
        spec = Spec(config.vector_len, config.codebook_size)
        fixed = [plan({m.name: spec for m in matrices}, scope) for scope in scopes]
        usable = [candidate for candidate in fixed if _fits_samples(candidate)]
        if not usable:
            most = max(min(_subvectors(group, spec) for group in p.groups().values()) for p in fixed)
            raise ConfigError(
                f"codebook_size: got {spec.codebook_size}, but only {most} subvectors share the smallest "
                f"codebook (scope {fixed[-1].codebook_scope}); lower it or widen the scope"
            )
        return min(usable, key=lambda candidate: candidate.bpw)
    assert config.target_bpw is not None
    best: tuple[float, Plan] | None = None
    reached: list[float] = []
    for scope in scopes:
        for blocks, ends in _uniform_specs(matrices, config):
            candidate = plan({m.name: blocks if m.in_blocks else ends for m in matrices}, scope)
            if not _fits_samples(candidate):
                continue
            reached.append(candidate.bpw)
            if candidate.bpw <= config.target_bpw:
                loss = _predicted_loss(candidate)
                if best is None or loss < best[0]:
                    best = loss, candidate
    if best is None:
        raise ConfigError(_unreachable(config.target_bpw, reached))
    filled = _fill(best[1])
    if config.target_bpw > 1.5 * max(reached, default=0.0):
        raise ConfigError(_unreachable(config.target_bpw, reached))
    return filled


def _unreachable(target: float, reached: list[float]) -> str:
    if not reached or min(reached) >= 16:
        return "the model is too small for any codec (fewer subvectors than codewords); nothing to compress"
    return (
        f"target_bpw: {target} cannot be met with these settings; "
        f"possible are {min(reached):.3f} to {max(reached):.3f} bits per weight"
    )


def _uniform_specs(matrices: list[Matrix], config: CompressConfig) -> Iterable[tuple[Spec, Spec]]:
    """Pairs (spec of the blocks, spec of embedding and head) worth comparing."""
    widths = range(1, config.max_index_bits + 1)
    lens = _VECTOR_LENS if config.vector_len is None else (config.vector_len,)
    ends_lens = sorted({*_VECTOR_LENS, *lens})
    has_ends = any(not m.in_blocks for m in matrices)
    has_blocks = any(m.in_blocks for m in matrices)
    for d in lens:
        for width in widths:
            spec = Spec(d, 1 << width)
            if not has_ends or not has_blocks:
                yield spec, spec
                continue
            # Embedding and head: the finest codec that is about `embedding_extra_bits` finer.
            wanted = spec.nmse * 4.0**-config.embedding_extra_bits
            options = [Spec(e, 1 << w) for e in ends_lens for w in widths]
            close = [o for o in options if o.nmse <= wanted * 1.05]
            rate = [(math.log2(o.codebook_size) / o.vector_len, o.codebook_size, o) for o in close]
            if rate:
                yield spec, min(rate)[2]


def _subvectors(group: list[Matrix], spec: Spec) -> int:
    return sum(m.subvectors(spec.vector_len) for m in group)


def _fits_samples(plan: Plan) -> bool:
    """Every codebook is at most as large as the number of subvectors that share it."""
    return all(
        plan.specs[group[0].name].codebook_size <= _subvectors(group, plan.specs[group[0].name])
        for group in plan.groups().values()
    )


def _predicted_loss(plan: Plan) -> float:
    """Predicted nmse summed over weights; embedding and head count more by the extra bits asked for."""
    weight = 4.0**plan.config.embedding_extra_bits
    return sum(m.weights * plan.specs[m.name].nmse * (1.0 if m.in_blocks else weight) for m in plan.matrices)


def _fill(plan: Plan) -> Plan:
    """Spend what is left of the budget: matrices take a codebook of twice the size while it fits."""
    target = plan.config.target_bpw
    assert target is not None
    budget = target * plan.weights

    def upgraded(count: int) -> Plan:
        chosen = {m.name for m in order[:count]}
        specs = {
            name: Spec(spec.vector_len, 2 * spec.codebook_size) if name in chosen else spec
            for name, spec in plan.specs.items()
        }
        return Plan(plan.matrices, specs, plan.dense, plan.codebook_scope, plan.config)

    def fits(candidate: Plan) -> bool:
        return sum(candidate.bits_by_part().values()) <= budget and _fits_samples(candidate)

    blocks = [m for m in plan.matrices if m.in_blocks] or list(plan.matrices)
    if 2 * plan.specs[blocks[0].name].codebook_size > 1 << (plan.config.max_index_bits + 1):
        return plan
    # Kinds in turn, then single matrices: the largest prefix of that order that fits (bisection).
    order = sorted(blocks, key=lambda m: m.kind)
    low, high = 0, len(blocks)
    while low < high:
        middle = (low + high + 1) // 2
        if fits(upgraded(middle)):
            low = middle
        else:
            high = middle - 1
    candidate = upgraded(low)
    return candidate if low and _predicted_loss(candidate) < _predicted_loss(plan) else plan
