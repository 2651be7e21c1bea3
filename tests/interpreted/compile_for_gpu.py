"""Compile the kernels for GPUs that are not there: the interpreter takes more than the compiler does.

python -m tests.interpreted.compile_for_gpu
"""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pocketllm.codec.kernels import packed_triton, triton as path_search

TARGET = GPUTarget("cuda", 80, 32)
HASHED = {"width": 12, "stride": 2, "d": 1, "hashed": True, "group": 8}
FULL = {"width": 12, "stride": 4, "d": 2, "hashed": False, "group": 4}
INDEPENDENT = {"width": 8, "stride": 0, "d": 4, "hashed": False, "group": 1}
ONE = {"block_tokens": 1, "block_columns": 8, "block_rows": 256}
SEVERAL = {"block_tokens": 16, "block_columns": 32, "block_rows": 64}
POINTERS = {"stream": "u8", "table": "fp32", "scale": "fp32", "blocks": "i64"}
PATHS = {
    **{
        "points": "fp32",
        "weights": "fp32",
        "tables": "fp32",
        "halves": "fp32",
        "which": "i64",
        "after": "i64",
    },
    **{"start": "i64", "stop": "i64", "lengths": "i64", "lookahead": "i64", "firsts": "i64", "outs": "i64"},
    **{"back": "u8", "out": "i64"},
}


def compiled(kernel: Any, pointers: dict[str, str], constants: dict[str, Any]) -> None:
    """Compile a kernel to machine code; arguments that are neither pointers nor constants are int32."""
    types = dict.fromkeys(kernel.arg_names, "i32")
    types |= {name: f"*{kind}" for name, kind in pointers.items()} | dict.fromkeys(constants, "constexpr")
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    found = triton.compile(ASTSource(kernel, types, values), target=TARGET)
    assert found.asm["cubin"], kernel


def main() -> None:
    """Every kernel, with both kinds of table and of activations."""
    entries = POINTERS | {"table": "i8", "out": "fp32"}
    compiled(packed_triton.multiply, entries | {"x": "fp32"}, HASHED | ONE)
    compiled(packed_triton.multiply, entries | {"x": "bf16"}, HASHED | SEVERAL)
    compiled(packed_triton.multiply, POINTERS | {"out": "fp32", "x": "bf16"}, FULL | SEVERAL)
    blocks = {"block_columns": 128, "block_rows": 16}
    without_scale = {name: kind for name, kind in POINTERS.items() if name != "scale"}
    compiled(packed_triton.decode, without_scale | {"out": "bf16"}, INDEPENDENT | blocks)
    compiled(path_search._paths, PATHS, {"kept": 8, "stride": 4, "d": 2})


if __name__ == "__main__":
    main()
