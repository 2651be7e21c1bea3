# What is public here and the module that defines it; __init__.py imports a name when it is used.
from .codebook import (
    Searcher as Searcher,
    centroids as centroids,
    codebook_perplexity as codebook_perplexity,
    codebook_utilization as codebook_utilization,
    kmeans_codebook as kmeans_codebook,
    nearest as nearest,
    normal_codebook as normal_codebook,
    seeded_codebook as seeded_codebook,
    straight_through as straight_through,
)
from .feedback import assign as assign
from .hessian import Hessian as Hessian, HessianFactor as HessianFactor, factorize as factorize
from .index_form import (
    Independent as Independent,
    Trellis as Trellis,
    predicted_nmse as predicted_nmse,
)
from .matrix_codec import EncodedMatrix as EncodedMatrix, MatrixCodec as MatrixCodec
from .metanet import MetaDecoder as MetaDecoder, MetaEncoder as MetaEncoder
from .normalization import (
    best_row_scale as best_row_scale,
    divide_rows as divide_rows,
    reshaped_layer_norm as reshaped_layer_norm,
    row_rms as row_rms,
    subvector_layer_norm as subvector_layer_norm,
)
from .packing import index_width as index_width, pack as pack, unpack as unpack
from .rotation import (
    rotate as rotate,
    rotate_hessian as rotate_hessian,
    rotate_matrix as rotate_matrix,
    unrotate as unrotate,
    unrotate_matrix as unrotate_matrix,
)
from .subvectors import (
    cut as cut,
    fold as fold,
    join as join,
    subvectors_per_row as subvectors_per_row,
    unfold as unfold,
)
from .training import (
    FitResult as FitResult,
    TrainingStep as TrainingStep,
    fit as fit,
)
