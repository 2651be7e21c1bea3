"""The bits of a plan while single matrices change their codec, against the bits counted anew."""

from __future__ import annotations

import random

import pytest

from pocketllm import CodecConfig, CompressConfig
from pocketllm.plan.bit_tally import BitTally
from pocketllm.plan.budget import stored_bits
from pocketllm.plan.matrices import Matrix, Plan, Spec

MATRICES = tuple(
    Matrix(f"layers.{block}.{kind}", (rows, 64), rows, 64, kind, in_blocks=True)
    for block in range(3)
    for kind, rows in (("q", 32), ("k", 48), ("up", 96))
)
SPECS = (Spec(1, 16), Spec(2, 16), Spec(2, 64, 2), Spec(4, 256), Spec(1, 256, 2, 12))


@pytest.mark.parametrize("codebooks", ["matrix", "kind", "model"])
@pytest.mark.parametrize("decoders", ["kind", "model"])
def test_changes_add_what_the_changed_plan_has_more(codebooks: str, decoders: str) -> None:
    config = CompressConfig(codec=CodecConfig(), decoder_scope=decoders)
    draw = random.Random(0)
    first = {m.name: draw.choice(SPECS) for m in MATRICES}
    tally = BitTally(Plan(MATRICES, first, (), codebooks, config))
    for _ in range(60):
        matrix = draw.choice(MATRICES)
        spec = draw.choice([other for other in SPECS if other != tally.specs[matrix.name]])
        bits, added = tally.bits, tally.added(matrix, spec)
        tally.change(matrix, spec)
        assert tally.bits == bits + added == stored_bits(Plan(MATRICES, tally.specs, (), codebooks, config))
    assert first != tally.specs
