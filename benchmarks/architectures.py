"""Compress and load a tiny random model of every causal language model type of the installed transformers.

Each type is compressed without and with calibration, and loaded in both modes; the logits must be those of the dense
model with the decoded weights. Types that are there are taken up again, so that an interrupted sweep goes on.

python benchmarks/architectures.py                   # all, into results/architectures.json
python benchmarks/architectures.py llama mamba       # some, shown; the others keep their results
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
import tempfile
import threading
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, TimeoutError, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from common import RESULTS, quiet, save

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SECONDS = 900  # for one type, on a busy machine
MODES = ("packed", "dense")
_ROUNDING = 1e-4  # of the largest logit


@dataclass
class Outcome:
    """What became of a type.

    not_built: why transformers itself cannot build, run or store the model. results: by calibration (`without`,
    `with`) and mode: `works`, `refused: REASON` or `fails: REASON`. matrices: share of the weights that was compressed.
    """

    kind: str
    cls: str
    not_built: str = ""
    results: dict[str, dict[str, str]] = field(default_factory=dict)
    compressed: dict[str, float] = field(default_factory=dict)


def reason(error: BaseException) -> str:
    """Type and first line of an error's message, without an announcement of what follows in the next line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[-1] if type(error).__name__.startswith("Strict") else (lines or [""])[0]
    return f"{type(error).__name__}: {re.sub(r'[.] [^.]*:$', '', text)}"


def outcome(kind: str) -> Outcome:
    """Measure one type."""
    import torch

    torch.set_num_threads(1)
    quiet()
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = Outcome(kind, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "dense"
        try:
            expected = _built(kind, source)
        except Exception as error:  # whatever transformers makes of its own class
            found.not_built = reason(error)
            return found
        for name in ("without", "with"):
            found.results[name] = _compressed(source, Path(place) / name, name, expected, found)
    return found


def _logits(model: Any) -> Any:
    import torch

    rows = model.config.num_codebooks if model.config.model_type.startswith("musicgen") else 1
    with torch.inference_mode():
        return model(torch.arange(3, 40).expand(rows, -1), use_cache=False).logits.float()


def _built(kind: str, folder: Path) -> Any:
    """Store a model of a type; its logits, which it also has when transformers loads it."""
    import torch
    from tests import tiny
    from tiny_configs import config_of

    from pocketllm.source.model_class import build

    torch.manual_seed(0)
    model = build(config_of(kind), trust_remote_code=False).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Some classes leave the memory of a parameter as it is.
            drawn = not parameter.numel() or (parameter.isfinite().all() and float(parameter.abs().max()) < 5)
            if parameter.numel() and (not drawn or parameter.ndim < 2):
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    logits = _logits(model)
    if not logits.isfinite().all():
        raise ValueError("logits are not finite")
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    again = _opened(folder)
    if not torch.allclose(_logits(again), logits, atol=_ROUNDING * float(logits.abs().max())):
        raise ValueError("transformers stores and loads another model")
    return logits


def _opened(folder: Path, **settings: Any) -> Any:
    """A stored model in float32, its configuration's quantization changed by `settings`."""
    import torch
    from transformers import AutoConfig

    from pocketllm.source.model_class import model_class

    config = AutoConfig.from_pretrained(folder)
    if settings:
        config.quantization_config |= settings
    return model_class(config).from_pretrained(folder, config=config, dtype=torch.float32).eval()


def _compressed(source: Path, output: Path, name: str, expected: Any, found: Outcome) -> dict[str, str]:
    """Results by mode."""
    from tests import tiny

    import pocketllm
    from pocketllm.errors import PocketError

    try:
        config = tiny.settings(codebook_scope="model") if name == "without" else _calibrated(output.parent)
        report = pocketllm.compress(source, config, output, calibration_folder=output.parent / "measured")
    except PocketError as error:
        text = str(error).replace(f"{source}: ", "").replace(str(source), "MODEL")
        return dict.fromkeys(MODES, f"refused: {text}")
    except Exception as error:  # what the sweep is for
        return dict.fromkeys(MODES, f"fails: compress: {reason(error)}")
    weights = sum(math.prod(m.shape) for m in report.matrices)
    found.compressed[name] = round(weights / (report.dense_model_bytes_bf16 / 2), 4)
    return {mode: _guarded(lambda mode=mode: _loaded(source, output, mode, expected)) for mode in MODES}


def _calibrated(folder: Path) -> Any:
    """The calibrated settings at a tiny scale, on a text of a few windows."""
    from tests import tiny

    text = folder / "text.txt"
    text.write_text("a text that is long enough for some windows, and no longer. " * 12, encoding="utf-8")
    config = tiny.on_trellis(
        5.0, calibration={"tokens": 256, "sensitivity_tokens": 64, "texts": (str(text),)}
    )
    return dataclasses.replace(config, codec=dataclasses.replace(config.codec, trellis_width=8))


def _guarded(run: Callable[[], str]) -> str:
    from pocketllm.errors import PocketError

    try:
        return run()
    except PocketError as error:
        return f"fails: load: {error}"
    except Exception as error:
        return f"fails: load: {reason(error)}"


def _loaded(source: Path, output: Path, mode: str, expected: Any) -> str:
    """Load a compressed model, and compare it with the dense one that holds the decoded weights."""
    import torch

    from pocketllm.runtime.layers import packed_matrices

    model = _opened(output, mode=mode)
    packed = packed_matrices(model if mode == "packed" else _opened(output, mode="packed"))
    reference = _opened(source)
    with torch.no_grad():
        for name, matrix in packed.items():
            reference.get_parameter(name).copy_(matrix())
    wanted, got = _logits(reference), _logits(model)
    if torch.equal(wanted, expected):
        return "fails: the compressed weights change no logit"
    off = float((got - wanted).abs().max() / wanted.abs().max())
    return "works" if off <= _ROUNDING else f"fails: logits differ by {off:.2g} of the largest"


class Worker(threading.local):
    """A process for every thread, which many types share until one of them breaks it or takes too long."""

    def __init__(self) -> None:
        self.pool = self._made()

    @staticmethod
    def _made() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"), max_tasks_per_child=12)

    def run(self, kind: str) -> Outcome:
        """The outcome of a type."""
        try:
            return self.pool.submit(outcome, kind).result(timeout=SECONDS)
        except (TimeoutError, BrokenProcessPool) as error:
            for process in list((self.pool._processes or {}).values()):
                process.kill()
            self.pool.shutdown(wait=False, cancel_futures=True)
            self.pool = self._made()
            failed = dict.fromkeys(MODES, f"fails: {reason(error)}")
            return Outcome(kind, "", results={"without": failed, "with": failed})


def sweep(kinds: list[str], tell: Callable[[Outcome], None], jobs: int) -> None:
    """Tell the outcome of every type, several at once."""
    worker = Worker()
    with ThreadPoolExecutor(jobs) as threads:
        for done in as_completed([threads.submit(worker.run, kind) for kind in kinds]):
            tell(done.result())


def main() -> None:
    from transformers import __version__
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="measure these only")
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    partial, path = RESULTS / ".architectures.partial.json", RESULTS / "architectures.json"
    known = json.loads(partial.read_text()) if partial.is_file() else {}
    if given.types:
        known = json.loads(path.read_text())["types"]

    def keep(result: Outcome) -> None:
        known[result.kind] = asdict(result)
        if not given.types:
            partial.write_text(json.dumps(known))
        print(result.kind, result.not_built or json.dumps(result.results), flush=True)

    every = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    sweep(given.types or [kind for kind in every if kind not in known], keep, given.jobs)
    found = {kind: known[kind] for kind in every}
    save("architectures", "python benchmarks/architectures.py", {"transformers": __version__, "types": found})
    if not given.types:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
