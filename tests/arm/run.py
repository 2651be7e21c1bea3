"""The kernels of packed products on ARM: compile them for it, and compare what they compute in an emulator.

    python tests/arm/run.py 'python -m ziglang c++' [qemu-aarch64]

The first argument is a C++ compiler that knows `-target aarch64-linux-musl` (`pip install ziglang`, in an environment
of its own), the second an emulator (Debian: `apt-get install qemu-user`); without it nothing is run. Prints the number
of multiply-add instructions of NEON, and the relative error of each form.
"""

from __future__ import annotations

import re
import shlex
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from pocketllm.codec.kernels.build_kernels import FOLDER, RECIPES
from pocketllm.codec.kernels.library import Isa
from pocketllm.codec.kernels.packed_cpu import Prepared
from pocketllm.codec.kernels.packed_op import check_weights, packed_matmul_reference

FLAGS = ("-target", "aarch64-linux-musl", "-O3", "-std=c++17", "-w")
TOLERANCE = 1e-5  # of float32 products


def compiled(compiler: list[str], folder: Path) -> Path:
    """The program of product.cpp; prints how many instructions of NEON multiply and add vectors."""
    sources = [str(FOLDER / name) for name in RECIPES["packed"].sources]
    assembly, found = folder / "assembly.s", 0
    for source in sources:
        subprocess.run([*compiler, *FLAGS, "-S", source, "-o", str(assembly)], check=True)
        found += len(re.findall(r"\bfmla\s+v\d+\.(?:4s|2d)", assembly.read_text()))
    print(f"{len(sources)} files compile for aarch64, with {found} multiply-add instructions on vectors")
    if not found:
        sys.exit("no NEON instructions")
    program = folder / "product"
    own = str(Path(__file__).with_name("product.cpp"))
    subprocess.run([*compiler, *FLAGS, "-static", *sources, own, "-o", str(program)], check=True)
    return program


def fields(prepared: Prepared, x: Tensor) -> bytes:
    """A case of product.cpp."""
    kept = [*prepared.kept, *list(prepared.matrix)[len(prepared.kept) :], x, len(x), len(x) * prepared.rows]
    parts = []
    for value in kept:
        if isinstance(value, Tensor):
            data = value.contiguous().numpy().tobytes()
            parts.append(struct.pack("<qq", 1, len(data)) + data)
        else:
            parts.append(struct.pack("<q", 2) if value is None else struct.pack("<qq", 0, value))
    return b"".join(parts)


def main() -> None:
    """Compile, run, compare."""
    compiler, emulator = shlex.split(sys.argv[1]), sys.argv[2:3]
    with tempfile.TemporaryDirectory() as scratch:
        program = compiled(compiler, Path(scratch))
        for number, weight in enumerate(check_weights(torch.device("cpu")) if emulator else ()):
            plain = weight.in_stream_order()
            for rows in (1, 2):
                x = torch.randn(rows, plain.sizes.columns, generator=torch.Generator().manual_seed(number))
                case, output = Path(scratch, "case"), Path(scratch, "output")
                case.write_bytes(fields(Prepared(plain, Isa.PLAIN), x))
                subprocess.run([*emulator, str(program), str(case), str(output)], check=True)
                found = torch.frombuffer(bytearray(output.read_bytes()), dtype=torch.float32).view(rows, -1)
                wanted = packed_matmul_reference(x, weight)
                error = float((found - wanted).norm() / wanted.norm())
                print(f"form {number}, {rows} row(s) of x: relative error {error:.1e}")
                if not error < TOLERANCE:
                    sys.exit("differs from the reference")


if __name__ == "__main__":
    main()
