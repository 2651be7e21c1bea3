"""Predicted against measured loss of the parts of a compressed model: embedding and head, blocks.

The parts are put one by one into the dense model, and the KL divergence is measured on text that the calibration did
not see. Predicted is what the plan counted on: importance (nats per unit of nmse) times the nmse of the form of index.
(The nmse that is reached is larger, since error feedback shapes errors for the inputs, which the importance takes into
account.)

python benchmarks/predicted_loss.py MODEL COMPRESSED MEASURED    # MEASURED: folder of --calibration-cache
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from common import data_file, quiet, save

CONTEXT, WINDOWS = 512, 8
TEXT = ("wikitext2", "wiki.test.raw")


def predicted(name: str, settings: dict[str, Any], cache: Path) -> dict[str, float]:
    """Nats per token by part, of the plan for these settings."""
    import pocketllm
    from pocketllm.calibrate.sensitivity import Sensitivity

    plan = pocketllm.dry_run(name, pocketllm.CompressConfig.from_dict(settings), calibration_folder=cache)
    (path,) = cache.glob("sensitivity-*.safetensors")
    importance = Sensitivity.load(path).importance
    found = {"ends": 0.0, "blocks": 0.0}
    for matrix in plan.matrices:
        found[part_of(matrix.name)] += importance[matrix.name] * matrix.nmse
    return found


def part_of(name: str) -> str:
    """ends or blocks."""
    return "blocks" if any(piece.isdigit() for piece in name.split(".")) else "ends"


def measured(
    dense: Path, compressed: Path, text: str, context: int = CONTEXT, windows: int = WINDOWS
) -> dict[str, float]:
    """KL to the dense model by part, in nats per token."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    import pocketllm  # noqa: F401  # registers the format
    from pocketllm.evaluate import text_divergence
    from pocketllm.runtime.layers import packed_matrices
    from pocketllm.source import load_dense, need_tokenizer

    tokenizer, reference = need_tokenizer(dense), load_dense(dense, torch.float32)
    config = AutoConfig.from_pretrained(compressed)
    config.quantization_config["mode"] = "packed"
    packed = packed_matrices(
        AutoModelForCausalLM.from_pretrained(compressed, config=config, dtype=torch.float32)
    )
    found = {}
    for part in ("ends", "blocks", "all"):
        model = load_dense(dense, torch.float32)
        with torch.no_grad():
            for name, matrix in packed.items():
                if part in ("all", part_of(name)):
                    model.get_parameter(name).copy_(matrix())
        found[part] = text_divergence(model, reference, tokenizer, text, context, windows).kl
    return found


def main() -> None:
    quiet()
    from pocketllm.source import resolve

    name, compressed, cache = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    report = json.loads((compressed / "pocketllm.json").read_text())
    text = data_file(*TEXT).read_text(encoding="utf-8")
    wanted, got = predicted(name, report["config"], cache), measured(resolve(name), compressed, text)
    ratios = {part: got[part] / wanted[part] for part in wanted}
    values = {"model": name, "bpw": report["bpw_matrices"], "predicted": wanted, "kl": got, "ratio": ratios}
    print(json.dumps(values, indent=1))
    short = name.rpartition(":")[2].replace("/", "-")
    save(f"predicted_{short}", f"python benchmarks/predicted_loss.py {name} COMPRESSED MEASURED", values)


if __name__ == "__main__":
    main()
