"""Constants that change stored bytes and are not settings: each was measured, none is worth an option."""

from __future__ import annotations

STRIP_ROWS = 256
"""Approximate rows of a strip if strips only serve parallel search."""
LOOKAHEAD_ROWS = 4
"""Rows of the next column of subvectors that the search for a path on the trellis looks ahead to."""
SHORTEST_STRIPS = (16, 32, 64, 128, 256)
"""Candidate numbers of rows of a strip if rows compensate for those above them."""
STRIP_START_LOSS = 1.5
"""A strip of r rows has about 1 + 1.5 / r times the error of an infinite one (measured)."""
OUTPUT_DAMPING = 0.3
"""Damping of the Hessian of a layer's outputs, which is noisy with few tokens; share of its mean diagonal."""
LOUDEST_GRADIENT = 3.0
"""Largest gradient of a token in the Hessian of outputs, in medians over tokens; larger ones are scaled down."""
UNEVEN_GRADIENTS = 5.0
"""A layer's input tokens are weighted if the mean squared gradient exceeds this many squared medians."""
LARGEST_TOKEN_WEIGHT = 30.0
"""The largest weight of an input token, in medians of the gradient."""
UNSEEN_ROW_SHARE = 0.25
"""Importance added to every row of embedding and head, as a share of the mean, for tokens absent from the text."""
LOUDEST_POSITION = 10.0
"""Largest gradient at a position in the cost of embedding rows, in medians of its window: the loss that the few above
would predict is far beyond what coarse errors there cost (Gemma 3 270M, nmse 0.02: 2.2 times without, 0.96 with)."""
OCCURRENCE_PRIOR = 4.0
"""Occurrences that the mean cost of an error in an embedding row counts for, beside those of the row's token."""
SAMPLED_MATRICES = 4
"""Number of rotated matrices of each kind that a shared codebook is fitted to."""
VECTOR_LENS = (2, 3, 4, 5, 6, 8)
"""Values of d that a plan with independent indices chooses from."""
TRELLIS_STEPS = (
    *((4, stride) for stride in (2, 3, 4, 5)),
    *((2, stride) for stride in (3, 4, 5, 6, 7, 8)),
    *((1, stride) for stride in (5, 6, 7, 8)),
)
"""(d, bits that an index adds) that a plan on a trellis chooses from: 0.5 to 8 bits per weight."""
HASHED_NMSE = {
    (2, 1): 0.53,
    (2, 2): 0.2776,
    (2, 3): 0.1447,
    (2, 4): 0.0759,
    (2, 5): 0.04025,
    (1, 3): 0.0202,
    (2, 7): 0.012,
    (1, 4): 0.00556,
    (1, 5): 0.00164,
    (1, 6): 0.00053,
    (1, 7): 0.00031,
    (1, 8): 0.00016,
}
"""(d, bits that an index adds) that a plan on a hashed trellis chooses from: 0.5 to 8 bits per weight, with the error
on a unit Gaussian, measured with windows of 12 bits (tests/numerics/test_hashed_trellis.py)."""
DEAR_CODEBOOKS = 0.02
"""Share of the stored bits from which on a plan tries fewer codebooks."""
BUDGET_LEFT = 0.005
"""Share of the bit budget that a plan may leave unused."""
SIZE_LEFT = 0.003
"""Share of a target for the output folder that may be left over."""
SIZE_ROUNDS = 8
"""Plans that are tried to meet a target for the output folder."""
RELIABLE_STRIP_WEIGHTS = 4096
"""Weights of a strip from which on its mean error is reliable."""
GAUSSIAN_KURTOSIS = 2.5, 4.0
"""Kurtosis of rows that count as Gaussian (3)."""
EVEN_COSTS = 8.0
"""Largest cost of an input or a row over the mean, up to which costs count as even."""
STRIP_LAG = 2
"""Columns between a strip and the next: one to be encoded after the other, one to look ahead."""
FEEDBACK_GROUP = 128
"""Columns whose feedback is applied to the rest of the row at once."""
