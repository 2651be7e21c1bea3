"""The campaign: `python -m tests.campaign --kills 200 --mutations 10000 --faults 150 --seed 0 --json out.json`.

Exits with 1 if anything ended as it must not. `--page` writes docs/reliability.md from a result.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.campaign import page


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__)
    numbers = {"kills": 200, "mutations": 10_000, "faults": 150, "seed": 0, "processes": 1}
    for name, number in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument(
        "--json",
        type=Path,
        help="write the result there; finished runs are kept beside it until all are done",
    )
    parser.add_argument(
        "--page", type=Path, help="write the page of the result in --json there, and run nothing"
    )
    given = parser.parse_args()
    if given.page is not None:
        result = json.loads(given.json.read_text(encoding="utf-8"))
        given.page.write_text(page.text(result), encoding="utf-8")
        return 0
    counts = {name: getattr(given, name) for name in ("kills", "mutations", "faults")}
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "runs"
        if given.json is not None:
            record = given.json.with_name(f"{given.json.name}.runs")
        result = run(counts, given.seed, given.processes, record)
        record.unlink()
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    if given.json is not None:
        given.json.write_text(text, encoding="utf-8")
    print(text if given.json is None else page.summary(result))
    return int(any(part["bad"] for part in result["parts"].values()))


def run(counts: dict[str, int], seed: int, processes: int, record: Path) -> dict[str, Any]:
    """All parts of the campaign; models and work lie in a temporary folder.

    Args:
        counts: part -> number of runs. record: of finished runs; those of the same command are not made again.
    """
    with tempfile.TemporaryDirectory(prefix="campaign-") as name:
        root = Path(name)
        root.chmod(0o755)
        os.environ["POCKETLLM_CACHE"] = str(root / "cache")
        os.environ["HF_HUB_OFFLINE"] = "1"
        import peft  # noqa: F401 - so that children need not import it
        import torch

        import pocketllm
        import pocketllm.cli.app
        from pocketllm.cli.process import setup_process
        from pocketllm.machine import machine
        from tests.campaign import faults, kills, models, mutations
        from tests.campaign.runs import Plan, entries

        setup_process(threads=1)
        torch.set_num_threads(1)
        asked = " ".join(f"--{part} {count}" for part, count in counts.items())
        facts = {"command": f"python -m tests.campaign {asked} --seed {seed}"}
        facts |= {"version": pocketllm.__version__, "commit": _commit()}
        if entries(record)[:1] != [facts]:
            record.write_text(json.dumps(facts) + "\n", encoding="utf-8")
        (root / "models").mkdir()
        made = models.make(root / "models")
        parts = {}
        for part, module in {"kills": kills, "faults": faults, "mutations": mutations}.items():
            (root / part).mkdir()
            plan = Plan(part, counts[part], seed, processes, record)
            parts[part] = module.campaign(made, root / part, plan)  # type: ignore[attr-defined]
        return {**facts, "machine": machine("cpu"), "parts": parts}


def _commit() -> str:
    """The commit of this checkout; empty where git does not know."""
    asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=10", "HEAD"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


if __name__ == "__main__":
    sys.exit(main())
