"""The Hessians of the matrices of a block, ready for encoding: what is shared is factorized once."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import torch

from pocketllm.calibrate.input_hessians import Inputs
from pocketllm.calibrate.output_hessians import output_hessians
from pocketllm.codec.hessian import Hessian
from pocketllm.config.constants import OUTPUT_DAMPING
from pocketllm.plan.matrices import Matrix, Plan


def hessians_of_outputs(
    folder: Path | None, path: str, device: str, matrices: list[Matrix], plan: Plan
) -> dict[str, Hessian]:
    """The Hessian of each matrix's outputs, for those that have one.

    Args:
        folder, path, device: see `output_hessians`.

    On a CPU each is factorized when its matrix is encoded, so that few factors are in memory at a time.
    """
    found = output_hessians(folder, path, device, [m.name for m in matrices])
    made = {name: Hessian(value, OUTPUT_DAMPING) for name, value in found.items()}
    if made and torch.device(device).type == "cuda":
        seed = plan.rotation(next(m for m in matrices if m.name in made))[0]  # that of all in blocks
        Hessian.factorize_together(list(made.values()), seed, 1)
    return made


def hessians_of_inputs(matrices: list[Matrix], inputs: Inputs, plan: Plan) -> dict[str, Hessian]:
    """The Hessian of each matrix's inputs, one for all that share them.

    They are factorized here, before matrices are encoded in parallel: with all threads, and in a fixed order.
    """
    settings, shared = plan.config.calibration, dict[int, Hessian]()
    assert settings is not None
    wanted = defaultdict[tuple[int | None, int], list[Hessian]](list)
    for matrix in matrices:
        hessian = inputs.hessians[matrix.name]
        made = shared.setdefault(id(hessian), Hessian(hessian, settings.damping))
        key = plan.rotation(matrix)[1], plan.specs[matrix.name].vector_len
        if made not in wanted[key]:
            wanted[key].append(made)
    for (seed, vector_len), found in wanted.items():
        if found[0].matrix.is_cuda:
            Hessian.factorize_together(found, seed, vector_len)
        for made in found:
            made.factor(seed, vector_len)
    return {m.name: shared[id(inputs.hessians[m.name])] for m in matrices}
