"""Write the pages, the pictures and the index of docs/studies from the committed results.

python benchmarks/studies.py            # write
python benchmarks/studies.py --check    # fail if a page or the index does not match the results
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from pocketllm.studies import STUDIES, load
from pocketllm.studies.show.study_page import markdown, write

FOLDER = Path(__file__).parent.parent / "docs" / "studies"
INDEX = FOLDER / "README.md"


def results() -> dict[str, dict[str, Any]]:
    """Study -> its result, with the findings as the code has them now."""
    found = {}
    for name in STUDIES:
        path = FOLDER / name / "result.json"
        if path.is_file():
            result = json.loads(path.read_text(encoding="utf-8"))
            found[name] = {**result, "findings": load(name).findings(result["results"])}
    return found


def index(found: dict[str, dict[str, Any]]) -> str:
    """The index with its generated part renewed."""
    parts = [
        f"**[{name}]({name}/{name}.md)**: {load(name).title}. {result['findings'][0]}"
        for name, result in found.items()
    ]
    body = "\n\n".join(["<!-- studies:begin -->", *parts, "<!-- studies:end -->"])
    before = INDEX.read_text(encoding="utf-8")
    return re.sub("<!-- studies:begin -->.*<!-- studies:end -->", lambda _: body, before, flags=re.DOTALL)


def main() -> int:
    """The exit code."""
    found = results()
    wanted = {INDEX: index(found)}
    for name, result in found.items():
        wanted[FOLDER / name / f"{name}.md"] = markdown(load(name), result)
        wanted[FOLDER / name / "result.json"] = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    if "--check" in sys.argv[1:]:
        stale = [path for path, text in wanted.items() if path.read_text(encoding="utf-8") != text]
        for path in stale:
            print(f"{path}: does not match the results; run python benchmarks/studies.py")
        return bool(stale)
    for path, text in wanted.items():
        path.write_text(text, encoding="utf-8")
    for name, result in found.items():
        write(load(name), result, FOLDER / name)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
