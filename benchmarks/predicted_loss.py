"""Predicted against measured loss of the parts of a compressed model: embedding and head, blocks.

The parts are put one by one into the dense model, and the KL divergence is measured on text that the calibration did
not see. Predicted is what the plan counted on: importance (nats per unit of nmse) times the nmse of the form of index.
(The nmse that is reached is larger, since error feedback shapes errors for the inputs, which the importance takes into
account.)

    POCKETLLM_DATA=... python benchmarks/predicted_loss.py [--model smollm2-135m]

Everything is compressed at 3 bits per weight, calibrated on WikiText-2's train text and measured on its raw test text.
Writes results/predicted_MODEL.json; exit code 1 if a part is off by more than WITHIN times.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import SMOLLM2, SUBJECTS, data_file, quiet, save

BPW, WITHIN = 3.0, 1.5
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
    """Compress, predict and measure."""
    quiet()
    import pocketllm
    from pocketllm.config import CompressOptions
    from pocketllm.source import resolve

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=SUBJECTS, default=SMOLLM2.name)
    name = SUBJECTS[parser.parse_args().model].source
    calibration = (str(data_file("wikitext2", "wiki.train.first_part.txt")),)
    config = CompressOptions(bpw=BPW, calibration=calibration).config()
    text = data_file(*TEXT).read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as scratch:
        out, cache = Path(scratch) / "out", Path(scratch) / "measured"
        report = pocketllm.compress(name, config, out, calibration_folder=cache)
        wanted, got = predicted(name, report.config, cache), measured(resolve(name), out, text)
    ratios = {part: got[part] / wanted[part] for part in wanted}
    values = {"model": name, "bpw": report.bpw_matrices, "predicted": wanted, "kl": got, "ratio": ratios}
    print(json.dumps(values, indent=1))
    short = name.rpartition(":")[2]
    save(f"predicted_{short}", f"python benchmarks/predicted_loss.py --model {short}", values)
    if off := [part for part, ratio in ratios.items() if not 1 / WITHIN < ratio < WITHIN]:
        sys.exit(f"predicted and measured loss differ by more than {WITHIN} times: {', '.join(off)}")


if __name__ == "__main__":
    main()
