"""Tests of Triton kernels on the CPU: Triton runs them in its interpreter where TRITON_INTERPRET=1 is set.

That has to be set before Triton is imported, so these tests run in a process of their own, which
tests/numerics/test_triton.py starts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]


@pytest.fixture(autouse=True)
def _products_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The interpreter keeps bfloat16 as integers and multiplies them as such; here they are floats."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    multiply = InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *more: Any) -> Any:
        halves = a.dtype.scalar == b.dtype.scalar == tl.bfloat16
        a, b = (self.create_fp_ext(factor, tl.float32) if halves else factor for factor in (a, b))
        return multiply(self, a, b, *more)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    yield
