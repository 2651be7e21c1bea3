"""The method on tensors alone: cut, normalize, encode, look up, decode, pack.

Public is what `__all__` names (docs/api.md says what each is): the codec of one matrix (`MatrixCodec`), its
training (`fit`), and the parts they are made of. The modules within may change without notice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pocketllm.lazy import exports

if TYPE_CHECKING:
    from pocketllm.codec.codebook import (
        Searcher,
        centroids,
        codebook_perplexity,
        codebook_utilization,
        kmeans_codebook,
        nearest,
        normal_codebook,
        seeded_codebook,
        straight_through,
    )
    from pocketllm.codec.feedback import HessianFactor, assign, factorize
    from pocketllm.codec.indices import IndexForm
    from pocketllm.codec.matrix_codec import EncodedMatrix, MatrixCodec
    from pocketllm.codec.metanet import MetaDecoder, MetaEncoder
    from pocketllm.codec.normalization import (
        best_row_scale,
        divide_rows,
        reshaped_layer_norm,
        row_rms,
        subvector_layer_norm,
    )
    from pocketllm.codec.packing import index_width, pack, unpack
    from pocketllm.codec.rotation import rotate, rotate_hessian, rotate_matrix, unrotate, unrotate_matrix
    from pocketllm.codec.subvectors import cut, join, subvectors_per_row
    from pocketllm.codec.training import FitResult, TrainingStep, fit, fit_on_trellis
    from pocketllm.codec.trellis import Trellis

__all__ = [
    "EncodedMatrix",
    "FitResult",
    "HessianFactor",
    "IndexForm",
    "MatrixCodec",
    "MetaDecoder",
    "MetaEncoder",
    "Searcher",
    "TrainingStep",
    "Trellis",
    "assign",
    "best_row_scale",
    "centroids",
    "codebook_perplexity",
    "codebook_utilization",
    "cut",
    "divide_rows",
    "factorize",
    "fit",
    "fit_on_trellis",
    "index_width",
    "join",
    "kmeans_codebook",
    "nearest",
    "normal_codebook",
    "pack",
    "reshaped_layer_norm",
    "rotate",
    "rotate_hessian",
    "rotate_matrix",
    "row_rms",
    "seeded_codebook",
    "straight_through",
    "subvector_layer_norm",
    "subvectors_per_row",
    "unpack",
    "unrotate",
    "unrotate_matrix",
]

if not TYPE_CHECKING:
    __getattr__, __dir__ = exports(
        __name__,
        {
            ".codebook": [
                "Searcher",
                "centroids",
                "codebook_perplexity",
                "codebook_utilization",
                "kmeans_codebook",
                "nearest",
                "normal_codebook",
                "seeded_codebook",
                "straight_through",
            ],
            ".feedback": ["HessianFactor", "assign", "factorize"],
            ".indices": ["IndexForm"],
            ".matrix_codec": ["EncodedMatrix", "MatrixCodec"],
            ".metanet": ["MetaDecoder", "MetaEncoder"],
            ".normalization": [
                "best_row_scale",
                "divide_rows",
                "reshaped_layer_norm",
                "row_rms",
                "subvector_layer_norm",
            ],
            ".packing": ["index_width", "pack", "unpack"],
            ".rotation": ["rotate", "rotate_hessian", "rotate_matrix", "unrotate", "unrotate_matrix"],
            ".subvectors": ["cut", "join", "subvectors_per_row"],
            ".training": ["FitResult", "TrainingStep", "fit", "fit_on_trellis"],
            ".trellis": ["Trellis"],
        },
    )
