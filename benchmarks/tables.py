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
from architecture_table import architectures, large_models
from codec_tables import codec_floor, codec_speed, hashed
from pages import RESULTS, ROOT, load_results, markdown_table
from paper_table import paper
from peer_tables import headline, peer_bits, peers, peers_paired
from peers.table import number
from scaling_tables import large_plan, scaling_predictions, scaling_runs
from speed_tables import runtime, serving
from vllm_tables import rank_sizes

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


def presets() -> str:
    """Size and perplexity of every preset beside the dense model."""
    found = load_results("presets")
    rows = [["dense (bf16)", "16", "", f"{found['dense']['bytes_on_disk'] / 1e6:.1f}", "1 / 2", "", ""]]
    rows[0][5] = f"{found['dense']['perplexity']:.2f}"
    for name, entry in found["presets"].items():
        rows.append(
            [
                f"`{name}`",
                f"{entry['bpw_matrices']:.2f}",
                f"{entry['nmse_blocks']:.4f}",
                f"{entry['bytes_on_disk'] / 1e6:.1f}",
                f"{entry['ratio_files_bf16']:.2f} / {entry['ratio_files_fp32']:.2f}",
                number(entry["perplexity"]),
                f"{entry['seconds']:.0f}",
            ]
        )
    head = [
        "preset",
        "bpw",
        "nmse (blocks)",
        "MB on disk",
        "files smaller, bf16 / fp32",
        "perplexity",
        "seconds",
    ]
    note = (
        f"SmolLM2-135M; {found['text']}, context {found['context']}, first {found['windows']} windows, "
        f"evaluated in {found['dtype']}; MB are 10^6 bytes of all files; {found['machine']['processor']}, "
        f"{found['machine']['threads']} threads. `{found['command']}`"
    )
    return f"{markdown_table(head, rows)}\n\n{note}"


_TASK_TITLES = {
    "winogrande": "WinoGrande",
    "piqa": "PIQA",
    "hellaswag": "HellaSwag",
    "arc_easy": "ARC-E",
    "arc_challenge": "ARC-C",
    "boolq": "BoolQ",
    "openbookqa": "OBQA",
    "lambada_openai": "LAMBADA",
}


def tasks() -> str:
    """Zero-shot accuracy of compressed models beside the dense one; the differences in brackets."""
    found = load_results("tasks")
    dense = found["dense"]
    names = [name for name in _TASK_TITLES if name in dense["tasks"]]
    names += [name for name in dense["tasks"] if name not in _TASK_TITLES]
    rows = [
        ["dense (bf16)", "16", f"{dense['bytes_on_disk'] / 1e6:.1f}", f"{dense['perplexity']:.2f}", "", ""]
    ]
    rows[0] += [f"{dense['tasks'][n]['acc']:.1%} ± {dense['tasks'][n]['acc_stderr']:.1%}" for n in names]
    rows[0] += [f"{dense['average']['all']['acc']:.1%} ± {dense['average']['all']['stderr']:.1%}", ""]
    for name, entry in found["models"].items():
        gaps = entry["difference"]
        mean = gaps["average"]["all"]
        kept = mean["margin_kept"]
        rows.append(
            [
                name,
                f"{entry['bpw_blocks']:.2f}",
                f"{entry['bytes_on_disk'] / 1e6:.1f}",
                number(entry["perplexity"]),
                f"{entry['kl']:.3f}",
                f"{entry['top1_agreement']:.1%}",
                *(_beside(entry["tasks"][n]["acc"], gaps["tasks"][n]["acc"]) for n in names),
                _beside(entry["average"]["all"]["acc"], mean),
                "" if kept is None else f"{kept:.0%}",
            ]
        )
    head = ["model", "bpw of blocks", "MB on disk", "perplexity", "KL, nats", "top-1 agreement"]
    head += [*(_TASK_TITLES.get(name, name) for name in names), "average", "margin over chance kept"]
    which = "all documents" if found["limit"] is None else f"the first {found['limit']} documents of each"
    version = dense["tasks"][names[0]]["versions"]["lm-eval"]
    seconds = sum(task["seconds"] for task in dense["tasks"].values())
    note = (
        f"SmolLM2-135M. Tasks: lm-eval {version}, zero-shot, acc, {which} ({seconds:.0f} seconds per model); "
        "in brackets the difference from dense with its standard error, paired by document. Perplexity and KL: "
        f"{found['text']}, context {found['context']}, first {found['windows']} windows. Evaluated in "
        f"{found['dtype'].removeprefix('torch.')}. `{found['command']}`"
    )
    return "\n\n".join(filter(None, [markdown_table(head, rows), _without_guessing(found), note]))


def _without_guessing(found: dict[str, Any]) -> str:
    """Tasks in which the dense model does no better than guessing say nothing; the means without them."""
    tasks = found["dense"]["tasks"]
    informative = [name for name, task in tasks.items() if task["acc"] - task["acc_stderr"] > task["chance"]]
    if len(informative) in (0, len(tasks)):
        return ""
    rest = ", ".join(_TASK_TITLES.get(name, name) for name in tasks if name not in informative)
    chance = sum(tasks[name]["chance"] for name in informative) / len(informative)
    models = {"dense": found["dense"], **found["models"]}
    means = {
        name: sum(m["tasks"][t]["acc"] for t in informative) / len(informative) for name, m in models.items()
    }
    margin = means["dense"] - chance
    parts = [
        f"{name} {mean:.1%} ({(mean - chance) / margin:.0%} of the margin)" for name, mean in means.items()
    ]
    return (
        f"The dense model is not above guessing by more than a standard error in {rest}: a change there says "
        f"nothing about quality. Mean of the others, where guessing scores {chance:.1%}: {'; '.join(parts)}."
    )


def _beside(value: float, gap: dict[str, float]) -> str:
    return f"{value:.1%} ({gap['difference'] * 100:+.1f} ± {gap['stderr'] * 100:.1f})"


_CALIBRATED_HEAD = [
    "setting",
    "bpw of blocks",
    "MB on disk",
    "files smaller, bf16 / fp32",
    "perplexity",
    "proxy error",
    "seconds",
    "peak GB",
]


def _calibrated_row(name: str, entry: dict[str, Any]) -> list[str]:
    return [
        name,
        f"{entry['bpw_blocks']:.2f}",
        f"{entry['bytes_on_disk'] / 1e6:.1f}",
        f"{entry['ratio_files_bf16']:.2f} / {entry['ratio_files_fp32']:.2f}",
        number(entry["perplexity"]),
        f"{entry['proxy_error_blocks']:.4f}",
        f"{entry['seconds']:.0f}",
        f"{entry['peak_memory_bytes'] / 1e9:.1f}",
    ]


def calibrated() -> str:
    """Calibrated compression at several targets."""
    found = load_results("calibrated")
    rows = [["dense (bf16)", "16", "272.6", "1 / 2", f"{found['dense_perplexity']:.2f}", "", "", ""]]
    rows += [_calibrated_row(f"blocks at {e['named_bits']}", _beside_peers(e)) for e in _ours()]
    rows += [_calibrated_row(n, e) for n, e in found["settings"].items() if n.startswith("everything")]
    note = (
        "SmolLM2-135M; 'blocks': embedding and head left in bf16; 'everything': compressed as well. "
        f"{found['text']}, context {found['context']}, first {found['windows']} windows, evaluated in "
        f"{found['dtype']}; calibrated on {found['calibration']}; {found['machine']['processor']}, "
        f"{found['machine']['cores']} cores, shared with other work, so seconds cannot be compared between "
        f"rows. `{found['command']}`; blocks: "
        "`python benchmarks/peers/run.py`"
    )
    return f"{markdown_table(_CALIBRATED_HEAD, rows)}\n\n{note}"


def _ours() -> list[dict[str, Any]]:
    """Our settings among the peers'."""
    return [
        e
        for e in load_results("peers")["settings"].values()
        if e["peer"] == "pocketllm" and "failure" not in e
    ]


def _beside_peers(entry: dict[str, Any]) -> dict[str, Any]:
    """A setting that ran beside the peers, as `_calibrated_row` wants it."""
    peak = entry["peak_mib"] * 2**20
    return {**entry, **entry["as_run"], "bpw_blocks": entry["bpw"], "peak_memory_bytes": peak}


def ablations() -> str:
    """One choice changed at a time, at 2.05 and 3.05 bits per weight of the blocks."""
    found = load_results("calibrated")["settings"]
    rows = []
    for bits in (2.05, 3.05):
        default = [_beside_peers(e) for e in _ours() if e["named_bits"] == bits]
        rows += [_calibrated_row(f"{bits}, default", entry) for entry in default]
        rows += [_calibrated_row(n, e) for n, e in found.items() if n.startswith(f"{bits}, ")]
    shown = len(_CALIBRATED_HEAD) - 2  # not seconds and memory: these ran beside other work
    note = "`python benchmarks/calibrated.py`; the default: `python benchmarks/peers/run.py`"
    return f"{markdown_table(_CALIBRATED_HEAD[:shown], [row[:shown] for row in rows])}\n\n{note}"


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
    ours = {entry["named_bits"]: entry["perplexity"] for entry in _ours()}
    bases = {float(name): base["perplexity"] for name, base in found["bases"].items()}
    return max(abs(bases[bits] / ours[bits] - 1) for bits in bases if bits in ours)


def recovery() -> str:
    """Distillation and LoRA at the same bases."""
    found = load_results("recovery")
    note = (
        f"SmolLM2-135M; {found['text']}, context {found['context']}, first {found['windows']} windows, "
        f"evaluated in {found['dtype']}; trained on text other than the test text; MB are 10^6 bytes of all files, "
        "adapter included; runs shared the machine. The bases were compressed separately from the models in the table "
        "of quantizers, with sums in another order; the path search amplifies such differences, so perplexities differ "
        f"by up to {_spread_of_bases(found):.0%}. `{found['command']}`"
    )
    said = recovery_table.verdict(found)
    return "\n\n".join(
        filter(None, [markdown_table(recovery_table.HEAD, recovery_table.rows(found)), said, note])
    )


TABLES: dict[str, Callable[[], str]] = {
    "presets": presets,
    "calibrated": calibrated,
    "ablations": ablations,
    "hashed": hashed,
    "rotation": rotation,
    "codec_floor": codec_floor,
    "codec_speed": codec_speed,
    "runtime": runtime,
    "serving": serving,
    "rank_sizes": rank_sizes,
    "tasks": tasks,
    "peers": peers,
    "headline": headline,
    "peer_bits": peer_bits,
    "peers_paired": peers_paired,
    "recovery": recovery,
    "paper": paper,
    "training_cost": recovery_table.training_cost,
    "architectures": architectures,
    "large_models": large_models,
    "large_plan": large_plan,
    "scaling": scaling_predictions,
    "scaling_runs": scaling_runs,
}


def filled(page: str) -> str:
    """The page with every `<!-- NAME:begin -->` ... `<!-- NAME:end -->` filled in."""
    for name, make in TABLES.items():
        pattern = re.compile(f"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
        source = {"ablations": "calibrated", "peer_bits": "peers", "headline": "peers"}.get(name, name)
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
