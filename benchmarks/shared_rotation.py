"""What layers that share an input (q, k, v; gate, up) would save by sharing its rotation: an upper bound.

    python benchmarks/shared_rotation.py FOLDER

FOLDER is SmolLM2-135M compressed with a hashed trellis. The rotations that siblings repeat are counted, the time of
one is measured, for a token and for a prompt, as a share of the time of the model; what it takes to recognize an input
is left out. Writes results/shared_rotation.json.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from common import quiet, save

import pocketllm
from pocketllm.codec.kernels import library
from pocketllm.codec.kernels.packed_cpu import _mixer
from pocketllm.runtime.layers import packed_matrices

PROMPT, REPEATS, THREADS = 512, 7, 1
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def repeated(model: Any) -> tuple[Counter[int], Any]:
    """Columns -> rotations by the same signs that a sibling has made before, and the signs of one matrix."""
    found: Counter[int] = Counter()
    signs = None
    matrices = packed_matrices(model)
    for name, matrix in matrices.items():
        for first, *others in SIBLINGS:
            twin = matrices.get(name.replace(f".{first}.", f".{others[0]}."))
            if f".{first}." not in name or twin is None:
                continue
            weights = [m.product().weight for m in (matrix, twin)]
            assert torch.equal(weights[0].signs_in, weights[1].signs_in)
            found[matrix.entry.columns] += len(others)
            signs = weights[0].signs_in
    return found, signs


def best(run: Callable[[], Any]) -> float:
    """Seconds."""
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def main() -> None:
    """Measure and write."""
    quiet()
    torch.set_num_threads(THREADS)
    model, _ = pocketllm.load(sys.argv[1], mode="packed", dtype=torch.bfloat16)
    (counts, signs), ids = repeated(model), torch.arange(PROMPT)[None]
    ((columns, count),) = counts.items()
    mixer = _mixer(signs)
    assert mixer is not None
    x, many = torch.randn(PROMPT, columns), torch.randn(PROMPT, columns).bfloat16()
    integers, unit = torch.empty(PROMPT, columns, dtype=torch.int8), torch.empty(PROMPT)
    one = (PROMPT, columns, signs, mixer, len(mixer), 0, 1, 1)
    token_rotation = best(lambda: library.call("packed", "rotate_vectors", x, *one)) / PROMPT
    isa = int(library.best_isa())
    into = (integers, unit, PROMPT, columns, signs, mixer, isa, THREADS)
    prompt_rotation = best(lambda: library.call("packed", "packed_rotate_to_integers", many, *into))
    with torch.inference_mode():
        token, prompt = best(lambda: model(ids[:, :1])), best(lambda: model(ids, logits_to_keep=1))
    values = {
        "repeated_rotations": count,
        "columns": columns,
        "token": {"rotation_seconds": token_rotation, "share": count * token_rotation / token},
        "prompt": {"rotation_seconds": prompt_rotation, "share": count * prompt_rotation / prompt},
        "prompt_tokens": PROMPT,
    }
    print(values)
    save("shared_rotation", "python benchmarks/shared_rotation.py FOLDER", values)


if __name__ == "__main__":
    main()
