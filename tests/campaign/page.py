"""The page of a campaign: docs/reliability.md, made from its result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_INTRO = """# Reliability

Tiny models are compressed, damaged, interrupted and starved at random, and every command is run on what is left.
Each of these must end in the right result or in an error of PocketLLM that names the file: no traceback, no
hang, no crash, no model that loads and computes something else. The counts are those of one run, of version
{version}{commit}:

```
{command} --json benchmarks/results/reliability.json
python -m tests.campaign --json benchmarks/results/reliability.json --page docs/reliability.md
```

The defaults of the command are 200 kills, 10,000 mutations and 150 faults (`--processes 2` uses two cores; the
same command resumes a run that was stopped). A small fixed part runs with the tests.
"""
_AGAIN = """
{count} of the runs ended in a traceback. After the fix they were made again (commit {commit}) and are counted by
how they ended then:

{runs}"""
_MUTATIONS = """
## Damaged folders

{count} times a compressed model, an adapter or a dense model is damaged in one way (a bit flipped, a file
truncated, a JSON value replaced, checksums made to fit by whoever changed it, a file added that nobody listed, a
FIFO, a device or a link in place of a file), and a command is run on it under limits of time and memory.

| end | runs |
|---|---|
"""
_KILLS = """
## Kills

{count} runs were killed (SIGKILL) one to three times at random moments, and then run again without a kill.
{good} of them ended in the bytes of an unbroken run and left nothing beside them.

| command | runs |
|---|---|
"""
_FAULTS = """
## A system that refuses

{count} runs met a limit on the size of files, an output folder without permission, or too little memory. Where a
full disk stopped a run, the same command was run again with room, and finished.

| fault and end | runs |
|---|---|
"""
_ENDS = {
    "refused": "refused with an error of PocketLLM",
    "right": "ended well, with the right result",
    "described": "ended well (commands whose result depends on what the files say)",
}


def text(result: Mapping[str, Any]) -> str:
    """The page."""
    parts = result["parts"]
    kills = parts["kills"]
    good = kills["count"] - len(kills["bad"])
    commit = f" (commit {result['commit']})" if result.get("commit") else ""
    found = _INTRO.format(command=result["command"], version=result["version"], commit=commit)
    if "again" in result:
        count, again = len(result["again"]["runs"]), result["again"]["commit"]
        found += _AGAIN.format(count=count, commit=again, runs=_runs(result["again"]["runs"]))
    found += _MUTATIONS.format(count=f"{parts['mutations']['count']:,}") + _rows(parts["mutations"]["ends"])
    found += _KILLS.format(count=kills["count"], good=good) + _rows(kills["jobs"])
    found += _FAULTS.format(count=parts["faults"]["count"]) + _rows(parts["faults"]["ends"])
    bad = [(name, entry) for name, part in parts.items() for entry in part["bad"]]
    found += "\n## What failed\n\n" + ("" if bad else "Nothing.\n")
    for name, entry in bad:
        facts = ", ".join(
            str(entry[key]) for key in ("what", "job", "damage", "fault", "kind") if key in entry
        )
        found += f"- {name} {entry['number']}: {facts}\n"
    return found


def summary(result: Mapping[str, Any]) -> str:
    """One line for each part."""
    return "\n".join(
        f"{name}: {part['count']} runs, {len(part['bad'])} failed" for name, part in result["parts"].items()
    )


def _runs(entries: Sequence[Mapping[str, Any]]) -> str:
    return "".join(
        f"- {run['part']} {run['number']}: {run['what']}, `{run['damage']}`: {run['after']}\n"
        for run in entries
    )


def _rows(counts: Mapping[str, int]) -> str:
    return "".join(f"| {_ENDS.get(name, name)} | {count:,} |\n" for name, count in sorted(counts.items()))
