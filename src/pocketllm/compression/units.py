"""File names of the finished units in the workspace."""

from __future__ import annotations

from pocketllm.plan.matrices import Matrix, Plan


def matrix_unit(plan: Plan, matrix: Matrix) -> str:
    """File name of an encoded matrix in the workspace."""
    return f"matrix-{plan.matrices.index(matrix):05d}.safetensors"


def refined_unit(number: int) -> str:
    """File name of a block's refined tensors in the workspace."""
    return f"refined-{number:05d}.safetensors"


def codebook_unit(number: int) -> str:
    """File name of a fitted codebook with its networks in the workspace."""
    return f"codebook-{number:05d}.safetensors"
