"""Which parameters hold the matrices of experts."""

from __future__ import annotations

import pytest
from torch import nn

from pocketllm.plan.stacked_experts import Experts, find_experts


class SomeExperts(nn.Module):
    num_experts = 3


@pytest.mark.parametrize("leaf", ["gate_up_proj", "w1"])
def test_a_matrix_for_each_expert(leaf: str) -> None:
    assert find_experts(SomeExperts(), f"layers.0.mlp.{leaf}", (3, 8, 6), 6) == Experts(3, 8, 6)


@pytest.mark.parametrize(
    ("leaf", "shape"), [("scale", (3, 1, 36)), ("scale", (3, 36, 1)), ("w1_bias", (3, 8, 64)), ("w1", (3,))]
)
def test_other_parameters_of_experts(leaf: str, shape: tuple[int, ...]) -> None:
    assert find_experts(SomeExperts(), f"layers.0.mlp.experts.{leaf}", shape, 36) is None
