"""Write the tables of README.md and docs/*.md from the committed results.

python benchmarks/tables.py            # write
python benchmarks/tables.py --check    # fail if a table does not match the results
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

import recovery_table
from architecture_table import architectures, cost, large_models, peak_memory
from codec_tables import codec_floor, codec_speed, hashed, hessian_forms
from common import GEMMA
from compensate_table import compensate
from index_table import index_learning
from loading_tables import activation_types, compiled, load_time
from pages import RESULTS, ROOT, load_results, markdown_table, optional_results
from paper_table import paper
from peer_tables import headline, peer_bits, peers, peers_paired
from scaling_tables import compact_hessians, large_plan, scaling_predictions, scaling_runs, stage_time
from size_tables import ablations, calibrated, ours, presets
from speed_tables import runtime, serving
from task_tables import calibration_texts, tasks
from vllm_tables import rank_sizes, serving_vllm

PAGES = (
    "docs/calibration.md",
    "README.md",
    "docs/results.md",
    "docs/loading.md",
    "docs/evaluation.md",
    "docs/peers.md",
    "docs/finetuning.md",
    "docs/vllm.md",
    "docs/serving.md",
    "docs/models.md",
    "docs/scaling.md",
)


def rotation() -> str:
    """Proxy error without rotation, with the fast one, with a dense one."""
    found = load_results("rotation")
    names = {"none": "none", "fast": "Hadamard and Hartley (used)", "dense": "dense random orthogonal"}
    kinds = list(found["by_kind"]["fast"])
    rows = [
        [title, *(f"{found['by_kind'][name][kind]:.4f}" for kind in kinds), f"{found['mean'][name]:.4f}"]
        for name, title in names.items()
    ]
    head = ["rotation", *(f"`{kind.split('.')[-1]}`" for kind in kinds), "mean"]
    blocks = ", ".join(map(str, found["blocks"]))
    note = f"Proxy error at 2 bits per weight, blocks {blocks} of SmolLM2-135M. `{found['command']}`"
    return f"{markdown_table(head, rows)}\n\n{note}"


def _spread_of_bases(found: dict[str, Any]) -> float:
    """Largest relative difference in perplexity between a base of the recoveries and the same setting beside peers."""
    beside = {entry["named_bits"]: entry["perplexity"] for entry in ours()}
    bases = {float(name): base["perplexity"] for name, base in found["bases"].items()}
    return max(abs(bases[bits] / beside[bits] - 1) for bits in bases if bits in beside)


def recovery() -> str:
    """Distillation and LoRA at the same bases."""
    found, gemma = load_results("recovery"), optional_results(GEMMA.results("recovery"))
    note = (
        f"SmolLM2-135M; {found['text']}, context {found['context']}, first {found['windows']} windows, "
        f"evaluated in {found['dtype']}; trained on text other than the test text; MB are 10^6 bytes of all files, "
        "adapter included; runs shared the machine. The bases were compressed separately from the models in the table "
        "of quantizers, with sums in another order; the path search amplifies such differences, so perplexities differ "
        f"by up to {_spread_of_bases(found):.0%}. `{found['command']}`"
    )
    said = recovery_table.verdict(found)
    parts = [markdown_table(recovery_table.HEAD, recovery_table.rows(found)), said, note]
    if gemma is not None:
        table = markdown_table(recovery_table.HEAD, recovery_table.rows(gemma))
        parts += [f"{GEMMA.title}, first {gemma['windows']} windows:", table, f"`{gemma['command']}`"]
    return "\n\n".join(filter(None, parts))


TABLES: dict[str, Callable[[], str]] = {
    "presets": presets,
    "calibrated": calibrated,
    "ablations": ablations,
    "hashed": hashed,
    "hessian_forms": hessian_forms,
    "calibration_texts": calibration_texts,
    "compensate": compensate,
    "rotation": rotation,
    "codec_floor": codec_floor,
    "codec_speed": codec_speed,
    "runtime": runtime,
    "compiled": compiled,
    "load_time": load_time,
    "activation_types": activation_types,
    "serving": serving,
    "serving_vllm": serving_vllm,
    "rank_sizes": rank_sizes,
    "tasks": tasks,
    "peers": peers,
    "headline": headline,
    "peer_bits": peer_bits,
    "peers_paired": peers_paired,
    "recovery": recovery,
    "index_learning": index_learning,
    "paper": paper,
    "training_cost": recovery_table.training_cost,
    "architectures": architectures,
    "large_models": large_models,
    "cost": cost,
    "compact_hessians": compact_hessians,
    "peak_memory": peak_memory,
    "large_plan": large_plan,
    "scaling": scaling_predictions,
    "stage_time": stage_time,
    "scaling_runs": scaling_runs,
}


_SOURCES = {"ablations": "calibrated", "peer_bits": "peers", "headline": "peers", "cost": "peak_memory"}
"""Results of a table that has not their name."""


def filled(page: str) -> str:
    """The page with every `<!-- NAME:begin -->` ... `<!-- NAME:end -->` filled in."""
    for name, make in TABLES.items():
        pattern = re.compile(f"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
        source = {
            "ablations": "calibrated",
            "peer_bits": "peers",
            "headline": "peers",
            "cost": "peak_memory",
        }.get(name, name)
        if pattern.search(page) and (RESULTS / f"{source}.json").is_file():
            body = make()
            page = pattern.sub(lambda m, body=body: f"{m[1]}{body}\n{m[2]}", page)
    return page


def main() -> int:
    """Write, or with --check compare."""
    stale = []
    for name in PAGES:
        path = ROOT / name
        before = path.read_text(encoding="utf-8")
        after = filled(before)
        if after != before:
            stale.append(name)
            if "--check" not in sys.argv:
                path.write_text(after, encoding="utf-8")
    if "--check" in sys.argv and stale:
        print(f"tables differ from the results in {', '.join(stale)}; run python benchmarks/tables.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
