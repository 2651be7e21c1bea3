"""Seconds to code one block of Llama-2-7B's shape at 2 and 3 bits per weight. Writes results/block_time.json.

    python benchmarks/block_time.py [--device cuda] [--scale 8] [--bpw 2 --bpw 3] [--tokens N] [--small]

Random weights with outliers; Hessians of random correlated inputs and of random correlated gradients at outputs
(a power law of directions, mixed), as many tokens as the default preset takes. Timed are the steps that the
calibrated path takes for every block: passes of the block (its inputs and its outputs, and forward twice and backward
for the gradients), Hessians from inputs and gradients, their rotation and factors, and for each matrix its rotation,
its indices (several matrices at once, as there) and what they decode to. Refinement is not among them. `--scale`
divides all sizes, to try it out, and `--small` is a scale and a number of tokens for any processor; only the full size
is written down. (Runs that were written down without `passes` are older, with one matrix at a time.)
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Annotated, Any

import torch
import typer
from common import RESULTS
from torch import Tensor

import pocketllm
from pocketllm.calibrate.autocast import autocast
from pocketllm.calibrate.sensitivity import OUTPUT_DAMPING, strips_for
from pocketllm.codec.codebook import seeded_codebook
from pocketllm.codec.feedback import assign
from pocketllm.codec.hessian import HessianFactor, factorize
from pocketllm.codec.index_form import Trellis
from pocketllm.codec.kernels.select import add_square
from pocketllm.codec.normalization import row_rms
from pocketllm.codec.rotation import rotate, rotate_hessian, rotate_matrix, unrotate_matrix
from pocketllm.compression.matrix_jobs import run_parallel
from pocketllm.config import DEFAULT_PRESET
from pocketllm.format.report import peak_memory_bytes
from pocketllm.machine import machine

HIDDEN, INTERMEDIATE, BLOCKS = 4096, 11008, 32
HEADS, WINDOW = 32, 512
VECTOR_LEN = 2
_CHUNK = 4096  # tokens


@dataclass(frozen=True)
class Setting:
    """device: cpu or cuda. scale: divides the sizes. bpw: of the indices. tokens: of each Hessian of inputs.
    gradients: of each of outputs.
    """

    device: str
    scale: int
    bpw: int
    tokens: int
    gradients: int

    def groups(self) -> dict[int, list[tuple[str, int]]]:
        """Columns (inputs) -> (name, rows) of the matrices that share them; keys are the inputs' numbers."""
        hidden, wide = HIDDEN // self.scale, INTERMEDIATE // self.scale
        attention = [("q_proj", hidden), ("k_proj", hidden), ("v_proj", hidden)]
        return {
            0: attention,
            1: [("o_proj", hidden)],
            2: [("gate_proj", wide), ("up_proj", wide)],
            3: [("down_proj", hidden)],
        }

    def columns(self, group: int) -> int:
        return (INTERMEDIATE if group == 3 else HIDDEN) // self.scale


@dataclass
class Clock:
    """Seconds by step; waits for the device before it reads the time."""

    device: str
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def now(self) -> float:
        if self.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        started = self.now()
        yield
        self.seconds[name] += self.now() - started


def correlated(tokens: int, columns: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Chunks of correlated vectors [tokens, columns] float32."""
    loud = torch.arange(1, columns + 1, device=generator.device).float() ** -0.5
    for begin in range(0, tokens, _CHUNK):
        count = min(_CHUNK, tokens - begin)
        noise = torch.randn(count, columns, generator=generator, device=generator.device)
        yield rotate(noise * loud, seed=99)


def measured(clock: Clock, tokens: int, size: int, generator: torch.Generator) -> Tensor:
    """The Hessian [size, size] of random vectors, rotated."""
    hessian = torch.zeros(size, size, device=generator.device)
    for x in correlated(tokens, size, generator):
        with clock.step("hessians"):
            add_square(hessian, x)
    with clock.step("factors"):
        return rotate_hessian(hessian / tokens, 1)


def run_block(setting: Setting, clock: Clock, generator: torch.Generator) -> None:
    """Time the passes of a block with random weights."""
    from transformers import LlamaConfig, LlamaModel

    sizes = {"hidden_size": HIDDEN // setting.scale, "intermediate_size": INTERMEDIATE // setting.scale}
    heads = {"num_attention_heads": max(1, HEADS // setting.scale), "num_hidden_layers": 1, "vocab_size": 8}
    with torch.device(setting.device):
        model = LlamaModel(LlamaConfig(**sizes, **heads, pad_token_id=0)).eval()

    def forward(count: int) -> Tensor:
        shape = (-(-count // WINDOW), min(count, WINDOW), HIDDEN // setting.scale)
        hidden = torch.randn(shape, generator=generator, device=setting.device)
        with clock.step("passes"), autocast(setting.device):
            return model(inputs_embeds=hidden, use_cache=False).last_hidden_state

    with torch.no_grad():
        for begin in range(0, setting.tokens, _CHUNK):
            for _ in ("inputs", "outputs"):
                forward(min(_CHUNK, setting.tokens - begin))
        for begin in range(0, setting.gradients, WINDOW):
            forward(min(WINDOW, setting.gradients - begin))
    for begin in range(0, setting.gradients, WINDOW):
        out = forward(min(WINDOW, setting.gradients - begin))
        with clock.step("passes"):
            out.float().square().sum().backward()


@dataclass(frozen=True)
class Job:
    """A rotated matrix to be coded for its inputs and outputs."""

    name: str
    weight: Tensor
    factor: HessianFactor
    outputs: HessianFactor


def jobs(setting: Setting, clock: Clock, generator: torch.Generator) -> Iterator[Job]:
    """The matrices of a block with their Hessians."""
    calibration = pocketllm.preset(DEFAULT_PRESET).calibration
    assert calibration is not None
    for group, matrices in setting.groups().items():
        columns = setting.columns(group)
        hessian = measured(clock, setting.tokens, columns, generator)
        with clock.step("factors"):
            factor = factorize(hessian, VECTOR_LEN, calibration.damping)
        for name, rows in matrices:
            weight = torch.randn(rows, columns, generator=generator, device=setting.device)
            weight[:: max(1, rows // 8), 0] *= 30
            with clock.step("rotation"):
                weight = rotate_matrix(weight, (0, 1))
            hessian = measured(clock, setting.gradients, rows, generator)
            with clock.step("factors"):
                outputs = factorize(hessian, 1, OUTPUT_DAMPING)
            yield Job(name, weight, factor, outputs)


def code_block(setting: Setting) -> dict[str, Any]:
    """Code every matrix of a block; seconds by step and proxy error by matrix."""
    width, generator = pocketllm.preset(DEFAULT_PRESET).codec.trellis_width, torch.Generator(setting.device)
    assert width is not None
    generator.manual_seed(0)
    table = seeded_codebook(1 << width, VECTOR_LEN, 0).float().to(setting.device)
    clock, errors, coded = Clock(setting.device), {}, dict[str, tuple[Tensor, Tensor]]()
    run_block(setting, clock, generator)
    waiting = list(jobs(setting, clock, generator))

    def code(job: Job) -> None:
        trellis = Trellis(width, setting.bpw * VECTOR_LEN, strips_for(job.outputs)[0])
        start = row_rms(job.weight)
        coded[job.name] = assign(job.weight, job.factor, table, start, trellis, outputs=job.outputs)

    with clock.step("indices"):
        list(run_parallel([partial(code, job) for job in waiting], setting.device))
    for job in waiting:
        (rows, columns), (indices, scale) = job.weight.shape, coded[job.name]
        with clock.step("decoding"):
            unit = table[indices].reshape(rows, -1)[:, :columns] * scale[:, None]
            unrotate_matrix(unit, (0, 1))
        kept = job.factor.hessian[:columns, :columns]
        loss, energy = (float(((e @ kept) * e).sum()) for e in (job.weight - unit, job.weight))
        errors[job.name] = loss / energy
    total = sum(clock.seconds.values())
    resident, on_gpu = peak_memory_bytes(setting.device)
    return {
        **asdict(setting),
        "seconds_by_step": dict(clock.seconds),
        "seconds_per_block": total,
        "seconds_for_all_blocks": BLOCKS * total,
        "proxy_error": errors,
        "peak_memory_bytes": resident,
        "peak_gpu_memory_bytes": on_gpu,
    }


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    scale: Annotated[int, typer.Option(min=1, help="Divides all sizes.")] = 1,
    bpw: Annotated[list[int] | None, typer.Option(help="Bits per weight; repeatable.")] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of each Hessian; by default the preset's.")
    ] = None,
    small: Annotated[bool, typer.Option("--small", help="Sizes / 32, 512 tokens, to try it out.")] = False,
) -> None:
    """Measure, print, and write down what was measured at full size."""
    import json

    path = RESULTS / "block_time.json"
    kept = json.loads(path.read_text())["runs"] if path.is_file() else {}
    calibration = pocketllm.preset(DEFAULT_PRESET).calibration
    assert calibration is not None
    scale, tokens = (32, 512) if small else (scale, tokens)
    for bits in bpw or [2, 3]:
        setting = Setting(
            *(device, scale, bits, tokens or calibration.tokens, tokens or calibration.sensitivity_tokens)
        )
        found = code_block(setting)
        facts = machine(device)
        name = facts.get("gpu", facts["processor"])
        print(
            f"{name}: {bits} bits per weight, sizes / {scale}: {found['seconds_per_block']:.1f} s a block, "
            f"{found['seconds_for_all_blocks'] / 60:.1f} min for {BLOCKS} blocks; by step "
            + ", ".join(f"{step} {seconds:.1f}" for step, seconds in found["seconds_by_step"].items())
        )
        if scale == 1:
            kept[f"{name}, {bits} bits"] = {**found, "machine": facts}
            body = {"command": "python benchmarks/block_time.py", "blocks": BLOCKS, "runs": kept}
            RESULTS.mkdir(exist_ok=True)
            path.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
