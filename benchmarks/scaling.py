"""Predict time, memory, disk and traffic of a compression on 1 to 64 GPUs from stage times measured on one.

The work of a stage is divided by windows (rounds), by units (greedy by cost, as `Ranks.split` does), or not at all. The
time of a stage on N ranks is that of a single one times the largest share. `--check` holds this against runs with 1, 2
and 4 processes (scaling_runs.py). The results say which rates were measured and which are assumed.

python benchmarks/scaling.py            # predictions, into results/scaling.json
python benchmarks/scaling.py --check    # against the runs in results/scaling_runs.json, shown
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from typing import Any

from common import RESULTS, save
from scaling_stages import MODELS, Model, Stage, factors, llama, rounds, undivided, units

from pocketllm.config import CalibrationConfig

RANKS = (1, 2, 4, 8, 16, 32, 64)
_BATCH = 4096  # tokens that run through a block at once


@dataclass(frozen=True)
class Rates:
    """What one rank does in a second: weights encoded; products of x^T x (multiplications); n^3 of factorizations;
    multiplications of the model; bytes read from disk, hashed, and exchanged with other ranks.
    """

    encode: float
    product: float
    factor: float
    forward: float
    disk: float
    hash: float
    network: float


def measured_rates() -> dict[str, Any]:
    """The rates of an H200 at 2 bits from results/block_time.json, and where each is from."""
    run = json.loads((RESULTS / "block_time.json").read_text())["runs"]["NVIDIA H200, 2 bits"]
    steps, hidden, inner = run["seconds_by_step"], 4096, 11008
    rows = [hidden] * 4 + [inner] * 2 + [hidden]
    products = run["tokens"] * (3 * hidden**2 + inner**2) + run["gradients"] * sum(r * r for r in rows)
    factors = sum(n**3 for n in (hidden, hidden, hidden, inner, *rows))
    weights = 4 * hidden**2 + 3 * hidden * inner
    rates = Rates(
        encode=weights / (steps["indices"] + steps["rotation"] + steps["decoding"]),
        product=products / steps["hessians"],
        factor=factors / steps["factors"],
        forward=1e14,
        disk=2e9,
        hash=1.5e9,
        network=5e9,
    )
    return {
        "rates": asdict(rates),
        "measured": {"encode": "block_time.json", "product": "block_time.json", "factor": "block_time.json"},
        "assumed": ["forward", "disk", "hash", "network"],
    }


def stages(model: Model, rates: Rates, settings: CalibrationConfig) -> list[Stage]:
    """What a run does, on one rank."""
    measured, tokens, count = settings.sensitivity_tokens, settings.tokens, model.blocks
    used, windows = sum(m.used for m in model.block), measured // settings.context
    inputs, dense = model.inputs(), 2 * model.weights
    square = [m.columns**2 * m.active for m in inputs]
    outputs = [m.rows**2 for m in model.block if m.experts == 1]
    cubes = [float(m.columns) ** 3 for m in inputs]
    ends = [float(model.hidden * model.vocabulary)] * 2
    block = [float(m.weights) for m in model.block]
    of_blocks = units([1.0] * count)  # blocks are spread: each rank has some to itself
    is_divided = settings.sequential
    every, batches = (units(block), rounds(tokens // _BATCH)) if is_divided else (of_blocks, undivided)
    products = units([*square, *outputs])
    cubes_of_outputs = [r**1.5 for r in outputs]
    measuring = count * measured * (sum(square) + sum(outputs)) / rates.product
    factoring = count * (sum(cubes) + sum(cubes_of_outputs)) / rates.factor
    return [
        Stage("read and check", dense / rates.disk, undivided),
        Stage("identify", dense / rates.hash, undivided),
        Stage("measure: load blocks", 2 * dense / rates.disk, undivided),
        Stage("measure: passes", count * 5 * measured * used / rates.forward, rounds(windows)),
        Stage("measure: products", measuring, products),
        Stage("measure: factors", factoring, units(cubes, cubes_of_outputs)),
        Stage("embedding and head", sum(ends) / rates.encode, units(ends)),
        Stage("load blocks", dense / rates.disk, undivided),
        Stage("run blocks", count * 2 * tokens * used / rates.forward, batches),
        Stage(
            "products",
            count * tokens * sum(square) / rates.product,
            units(square) if is_divided else of_blocks,
        ),
        Stage("factors", count * sum(cubes) / rates.factor, factors(model) if is_divided else of_blocks),
        Stage("encode", count * sum(block) / rates.encode, every),
        Stage("write", 2 * model.weights * 2 / 8 / rates.disk, undivided),
    ]


def traffic(model: Model, settings: CalibrationConfig, size: int) -> float:
    """Bytes that a rank sends or receives on average on a shared file system: inputs on their way to the rank that
    sums them up, and the sums on their way to all.
    """
    if size == 1:
        return 0.0
    passes = settings.sensitivity_tokens + (settings.tokens if settings.sequential else 0)
    sums = 2 if settings.sequential else 1
    inputs = model.inputs()
    values = passes * sum(m.columns * m.active for m in inputs)
    values += settings.sensitivity_tokens * sum(m.rows for m in model.block if m.experts == 1)
    sent = 2 * 4 * values * (size - 1) / size / size  # sent once, received once
    hessians = 4 * sum(m.columns**2 for m in inputs)
    tokens = settings.sensitivity_tokens
    stored = sum(m.rows * min(2 * m.rows, tokens) for m in model.block if m.experts == 1)
    return model.blocks * (sent + sums * hessians + 2 * stored / size)


def memory(model: Model, settings: CalibrationConfig, size: int) -> float:
    """Bytes on a rank at its peak, which is when a block is measured: its weights and their gradients in float32, the
    sums, activations of this rank's windows, and what lies outside of the blocks.
    """
    weights, inputs = sum(m.weights for m in model.block), model.inputs()
    sums = sum(m.columns**2 for m in inputs) + sum(m.rows**2 for m in model.block if m.experts == 1)
    rounds = -(-settings.tokens // _BATCH // size)
    own = rounds * _BATCH * model.hidden if settings.sequential else settings.tokens * model.hidden
    return 4.0 * (2 * weights + 2 * sums + 2 * own + 2 * model.hidden * model.vocabulary)


def disk(model: Model, settings: CalibrationConfig) -> dict[str, float]:
    """Bytes on disk while a run works, apart from the dense model; the activations are gone when the units come."""
    tokens = settings.sensitivity_tokens
    kept = [
        m.rows * min(2 * m.rows, tokens) for m in model.block if m.experts == 1
    ]  # G, or gradients in 8 bits
    outputs = float(model.blocks * sum(kept))
    spool = 4.0 * model.blocks * settings.sensitivity_tokens * model.hidden
    units = model.weights * 2 / 8
    return {"hessians of outputs": outputs, "activations": spool, "units and result": 2 * units}


def predict(model: Model, rates: Rates, settings: CalibrationConfig, size: int) -> dict[str, Any]:
    """Time by stage and in all, memory, disk and traffic of a rank."""
    seconds = {stage.name: stage.on(size) for stage in stages(model, rates, settings)}
    sent = traffic(model, settings, size)
    seconds["exchange"] = sent / rates.network
    return {
        "ranks": size,
        "hours": sum(seconds.values()) / 3600,
        "hours_by_stage": {name: value / 3600 for name, value in seconds.items()},
        "memory_bytes": memory(model, settings, size),
        "disk_bytes": disk(model, settings),
        "traffic_bytes": sent,
    }


def predictions() -> dict[str, Any]:
    """Every model on every number of GPUs, blocks after each other and apart."""
    import dataclasses

    known = measured_rates()
    rates, found = Rates(**known["rates"]), dict[str, Any]()
    for name, model in MODELS.items():
        for mode, is_sequential in (("sequential", True), ("dense inputs", False)):
            settings = dataclasses.replace(CalibrationConfig(), sequential=is_sequential)
            entries = [predict(model, rates, settings, size) for size in RANKS]
            found.setdefault(name, {})[mode] = entries
    return {**known, "bits": 2, "models": found}


def check() -> dict[str, Any]:
    """Predicted against measured: processor seconds of the busiest rank and bytes exchanged, by number of ranks."""
    import dataclasses

    runs = json.loads((RESULTS / "scaling_runs.json").read_text())
    shape, single = runs["model"], runs["runs"]["1"]["busiest_seconds"]
    hidden, key_value = shape["hidden_size"], shape["hidden_size"] // shape["num_attention_heads"]
    model = llama(
        *(shape["num_hidden_layers"], hidden, shape["intermediate_size"]),
        *(key_value * shape["num_key_value_heads"], shape["vocab_size"]),
    )
    settings = dataclasses.replace(CalibrationConfig(), **runs["settings"])
    square, rows = [float(m.columns**2) for m in model.inputs()], [float(m.rows) for m in model.block]
    block = [float(m.weights) for m in model.block]
    shares = {
        "passes": rounds(settings.tokens // _BATCH),
        "products": units(
            [settings.tokens * x for x in square],
            [settings.sensitivity_tokens * x for x in (*square, *(r * r for r in rows))],
        ),
        "factors of measuring": units([x**1.5 for x in square], [r**3 for r in rows]),
        "encode": units([float(hidden * shape["vocab_size"])] * 2, *[block] * model.blocks),
        "factors": factors(model),
    }
    found = {}
    for size in ("2", "4"):
        run = runs["runs"][size]
        entries = {
            name: {
                "predicted": Stage(name, single[name], share).on(int(size)),
                "measured": run["busiest_seconds"][name],
            }
            for name, share in shares.items()
        }
        sent = [rank["bytes_exchanged"] for rank in run["ranks"]]
        entries["all"] = {k: sum(e[k] for e in entries.values()) for k in ("predicted", "measured")}
        entries["bytes exchanged"] = {
            "predicted": traffic(model, settings, int(size)),
            "measured": sum(sent) / len(sent),
        }
        found[size] = entries
    return found


def main() -> None:
    if "--check" in sys.argv:
        print(json.dumps(check(), indent=1))
        return
    found = predictions()
    for name, modes in found["models"].items():
        for mode, entries in modes.items():
            hours = ", ".join(f"{e['ranks']}: {e['hours']:.2f} h" for e in entries)
            print(f"{name}, {mode}: {hours}; {entries[0]['memory_bytes'] / 1e9:.0f} GB a rank")
    save("scaling", "python benchmarks/scaling.py", found)


if __name__ == "__main__":
    main()
