"""The campaign: `python -m tests.campaign --kills 200 --mutations 10000 --faults 150 --seed 0 --json out.json`.

Exits with 1 if anything ended as it must not. `--page` writes docs/reliability.md from a result.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.campaign import page


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__)
    for name, count in (("kills", 200), ("mutations", 10_000), ("faults", 150), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument(
        "--page", type=Path, help="write the page of the result in --json there, and run nothing"
    )
    given = parser.parse_args()
    if given.page is not None:
        result = json.loads(given.json.read_text(encoding="utf-8"))
        given.page.write_text(page.text(result), encoding="utf-8")
        return 0
    result = run(given.kills, given.mutations, given.faults, given.seed)
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    if given.json is not None:
        given.json.write_text(text, encoding="utf-8")
    print(text if given.json is None else page.summary(result))
    return int(any(part["bad"] for part in result["parts"].values()))


def run(kills: int, mutations: int, faults: int, seed: int) -> dict[str, Any]:
    """All parts of the campaign; models and work lie in a temporary folder."""
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
        from tests.campaign import faults as system, kills as killed, models, mutations as damaged

        setup_process(threads=1)
        torch.set_num_threads(1)
        (root / "models").mkdir()
        made = models.make(root / "models")
        places = [root / part for part in ("mutations", "kills", "faults")]
        for place in places:
            place.mkdir()
        parts = {
            "mutations": damaged.campaign(made, places[0], mutations, seed),
            "kills": killed.campaign(made, places[1], kills, seed),
            "faults": system.campaign(made, places[2], faults, seed),
        }
        asked = f"--kills {kills} --mutations {mutations} --faults {faults} --seed {seed}"
        return {
            "command": f"python -m tests.campaign {asked}",
            "version": pocketllm.__version__,
            "machine": machine("cpu"),
            "parts": parts,
        }


if __name__ == "__main__":
    sys.exit(main())
