"""Choose the codec of every matrix: the least predicted loss within a budget of bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pocketllm.codec.index_form import form_of
from pocketllm.config import CompressConfig
from pocketllm.errors import ConfigError
from pocketllm.plan.matrices import Dense, Plan
from pocketllm.plan.mixed_rates import MixedRates
from pocketllm.plan.selection import classify
from pocketllm.plan.uniform_rates import UniformRates
from pocketllm.source.dense_checkpoint import DenseCheckpoint


def make_plan(
    source: DenseCheckpoint,
    config: CompressConfig,
    importance: Mapping[str, float] | None = None,
    strip_rows: Mapping[str, int] | None = None,
) -> Plan:
    """Decide for every tensor of the model.

    Args:
        importance: loss that a matrix causes per unit of its nmse, by name, as measured by calibration. Where
            matrices have bits of their own, they go where they reduce the total loss most; without it all weights
            count equally.
        strip_rows: rows of the strips of a matrix, by name, if not the default.

    Returns:
        A spec for every matrix, a reason for every other tensor.

    Raises:
        ConfigError: nothing to compress, the target cannot be met (the message names the smallest and
            largest possible), a codebook larger than the number of subvectors that share it, or a vector_len
            that the form of index does not offer.
    """
    allocate = MixedRates if form_of(config.codec).mixes_rates else UniformRates
    matrices, dense = classify(source, config)
    if strip_rows:
        matrices = [replace(m, strip_rows=strip_rows.get(m.name, m.strip_rows)) for m in matrices]
    while True:
        if not matrices:
            raise ConfigError(
                "no tensor is left to compress; the model is too small for these settings, "
                "or too many blocks or matrices are left dense"
            )
        plan = allocate(tuple(matrices), tuple(dense), config, importance).best()
        useless = [m for m in matrices if plan.own_bits(m) >= 16 * m.weights]
        if not useless:
            return plan
        for matrix in useless:
            matrices.remove(matrix)
            dense.append(Dense(matrix.name, matrix.shape, "coding it would not make it smaller than 16 bit"))
