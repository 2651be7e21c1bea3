"""The method on a whole model: open it, plan, read what compression made of it.

Public is what `__all__` names (docs/api.md says what each is); `compress`, `dry_run`, `export` and `Report` stand
in `pocketllm` itself. The modules within may change without notice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pocketllm.lazy import exports

if TYPE_CHECKING:
    from pocketllm.model.allocate import make_plan
    from pocketllm.model.checkpoint import (
        REPORT_NAME,
        folder_bytes,
        is_compressed,
        read_layout,
        read_report,
        verify,
    )
    from pocketllm.model.compress import Event
    from pocketllm.model.compute import fast_dtype
    from pocketllm.model.decode import Matrices
    from pocketllm.model.folder import load_dense, need_tokenizer
    from pocketllm.model.layers import fold, unfold
    from pocketllm.model.layout import Layout
    from pocketllm.model.limits import positions_of
    from pocketllm.model.plan import (
        CODEWORD_BITS,
        ROW_SCALE_BITS,
        Dense,
        Matrix,
        Plan,
        Spec,
        classify,
        predicted_nmse,
        trellis_nmse,
    )
    from pocketllm.model.report import MatrixReport, counting_adapter, weighted_mean
    from pocketllm.model.source import DenseCheckpoint, open_dense, resolve, resolve_local
    from pocketllm.model.target import possible_bpw
    from pocketllm.model.texts import calibration_windows, default_text, read_calibration

__all__ = [
    "CODEWORD_BITS",
    "REPORT_NAME",
    "ROW_SCALE_BITS",
    "Dense",
    "DenseCheckpoint",
    "Event",
    "Layout",
    "Matrices",
    "Matrix",
    "MatrixReport",
    "Plan",
    "Spec",
    "calibration_windows",
    "classify",
    "counting_adapter",
    "default_text",
    "fast_dtype",
    "fold",
    "folder_bytes",
    "is_compressed",
    "load_dense",
    "make_plan",
    "need_tokenizer",
    "open_dense",
    "positions_of",
    "possible_bpw",
    "predicted_nmse",
    "read_calibration",
    "read_layout",
    "read_report",
    "resolve",
    "resolve_local",
    "trellis_nmse",
    "unfold",
    "verify",
    "weighted_mean",
]

if not TYPE_CHECKING:
    __getattr__, __dir__ = exports(
        __name__,
        {
            ".allocate": ["make_plan"],
            ".checkpoint": [
                "REPORT_NAME",
                "folder_bytes",
                "is_compressed",
                "read_layout",
                "read_report",
                "verify",
            ],
            ".compress": ["Event"],
            ".compute": ["fast_dtype"],
            ".decode": ["Matrices"],
            ".folder": ["load_dense", "need_tokenizer"],
            ".layers": ["fold", "unfold"],
            ".layout": ["Layout"],
            ".limits": ["positions_of"],
            ".plan": [
                "CODEWORD_BITS",
                "Dense",
                "Matrix",
                "Plan",
                "ROW_SCALE_BITS",
                "Spec",
                "classify",
                "predicted_nmse",
                "trellis_nmse",
            ],
            ".report": ["MatrixReport", "counting_adapter", "weighted_mean"],
            ".source": ["DenseCheckpoint", "open_dense", "resolve", "resolve_local"],
            ".target": ["possible_bpw"],
            ".texts": ["calibration_windows", "default_text", "read_calibration"],
        },
    )
