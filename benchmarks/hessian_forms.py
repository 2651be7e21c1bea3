"""Other Hessians for error feedback, at equal bits: SmolLM2-135M at 2.05 bits per weight of the blocks.

    POCKETLLM_DATA=... python benchmarks/hessian_forms.py [NAME ...]

By default H is the mean of x x^T over 32,768 tokens, and G that of g g^T over 8,192 of them, which would be the best
factors if inputs x and gradients g of a token were independent. Here both are found together on the 8,192 tokens, each
weighted by the other (power iteration towards the nearest Kronecker product of the Fisher information,
arXiv 2505.22988): H = mean of (g^T G g) x x^T, G = mean of (x^T H x) g g^T. `inputs of the gradients' tokens` is the
control: the usual factors, with H of the same 8,192 tokens. Loud gradients are cut in all of them.

Each variant is compressed and evaluated in a process of its own; text and evaluation as in benchmarks/hashed.py, on
WikiText-2's validation text, since it decides. Writes results/hessian_forms.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from common import CONTEXT, SMOLLM2, data_file, quiet, rows_to_measure, save
from torch import Tensor, nn

BPW, WINDOWS, ROUNDS = 2.05, 16, 4
VARIANTS = {"default": None, "inputs of the gradients' tokens": 0, "both factors together": ROUNDS}


def install(rounds: int) -> None:
    """Let measurements keep inputs and gradients of every token, and find the factors by so many rounds."""
    from pocketllm.calibrate import gradients
    from pocketllm.config.constants import LOUDEST_GRADIENT

    inputs: dict[int, Tensor] = {}

    def note(module: nn.Module, given: tuple[Any, ...]) -> None:
        if isinstance(module, nn.Linear) and given:
            inputs[id(module.weight)] = given[0].detach()

    nn.modules.module.register_module_forward_pre_hook(note)
    backward = gradients.block_backward

    @dataclass
    class Together(gradients.OutputGradients):
        x: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
        g: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
        layers: dict[str, int] = field(default_factory=dict)

        def add(self, name: str, gradient: Tensor) -> None:
            super().add(name, gradient)
            flat = gradient.reshape(-1, gradient.shape[-1]).float()
            size = flat.norm(dim=1)
            cut = (LOUDEST_GRADIENT * size.median() / size.clamp(min=1e-30)).clamp(max=1)
            self.g[name].append(flat * cut[:, None])
            self.x[name].append(inputs[self.layers[name]].reshape(len(flat), -1).float())

        def token_weights(self, windows: int) -> dict[str, Tensor]:
            usual, found = super().token_weights(windows), {}
            for name, parts in self.g.items():
                x, g = torch.cat(self.x[name]), torch.cat(parts)
                of_x, of_g = torch.ones(len(x)), torch.ones(len(x))  # what each token counts in either factor
                for _ in range(rounds):
                    h = x.T @ (x * of_x[:, None])
                    of_g = ((x @ h) * x).sum(dim=1)
                    of_g /= of_g.mean()
                    gram = g.T @ (g * of_g[:, None])
                    of_x = ((g @ gram) * g).sum(dim=1)
                    of_x /= of_x.mean()
                if rounds:
                    self.sums.squares[name] = g.T @ (g * of_g[:, None])
                found[name] = of_x.sqrt().clamp(min=1e-3, max=200).reshape(windows, -1).half()
            return found if rounds else {**found, **usual}

    def noted(stream: Any, block: nn.Module, matrices: list[Any], *rest: Any) -> Any:
        gradients.OutputGradients = lambda sums: Together(  # type: ignore[misc, assignment]
            sums, layers={m.name: id(stream.model.get_parameter(m.name)) for m in matrices}
        )
        return backward(stream, block, matrices, *rest)

    from pocketllm.calibrate import sensitivity

    sensitivity.block_backward = noted  # type: ignore[assignment]


def child(name: str, folder: Path) -> None:
    """Compress and evaluate one variant; print facts as JSON."""
    quiet()
    import pocketllm
    from pocketllm.evaluate.kl import text_divergence
    from pocketllm.source.builtin import fetch
    from pocketllm.source.folder import load_dense
    from pocketllm.text.read import read_text

    rounds = VARIANTS[name]
    if rounds is not None:
        install(rounds)
    config = pocketllm.preset(pocketllm.config.DEFAULT_PRESET)
    assert config.calibration is not None
    texts = (str(data_file("wikitext2", "wiki.train.first_part.txt")),)
    config = replace(
        config, target_bpw=BPW, keep_embeddings=True, calibration=replace(config.calibration, texts=texts)
    )
    report = pocketllm.compress(
        SMOLLM2.source, config, folder / "out", calibration_folder=folder / "measured"
    )
    model, tokenizer = pocketllm.load(folder / "out", mode="dense", dtype=torch.bfloat16)
    reference = load_dense(fetch(SMOLLM2.source), torch.bfloat16)
    text = read_text(data_file("wikitext2", "wiki.valid.near_raw.txt"))
    found = text_divergence(model, reference, tokenizer, text, CONTEXT, WINDOWS)
    facts = {"bpw_blocks": report.bpw_blocks, "seconds": report.seconds}
    figures = {"perplexity": found.perplexity, "kl": found.kl, "kl_stderr": found.kl_stderr}
    print(json.dumps({**figures, "dense_perplexity": found.reference_perplexity, **facts}))


def main() -> None:
    """Measure the variants named on the command line, by default those without a result."""
    names, found = rows_to_measure(__doc__ or "", "hessian_forms", "variants", VARIANTS)
    for name in names:
        with tempfile.TemporaryDirectory() as scratch:
            command = [sys.executable, __file__, "child", name, scratch]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
        print(name, found[name], flush=True)
        values = {
            "model": SMOLLM2.source,
            "bpw": BPW,
            "context": CONTEXT,
            "windows": WINDOWS,
            "rounds": ROUNDS,
        }
        kept = {known: found[known] for known in VARIANTS if known in found}
        save("hessian_forms", "python benchmarks/hessian_forms.py", {**values, "variants": kept})


if __name__ == "__main__":
    child(sys.argv[2], Path(sys.argv[3])) if sys.argv[1:2] == ["child"] else main()
