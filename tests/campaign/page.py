"""The page of a campaign: docs/reliability.md, made from its result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_INTRO = """# Reliability

Tests with random faults: tiny compressed models are damaged, runs are killed, and commands are run without enough
disk space, memory or permission. Every command must end with the right result or with a PocketLLM error that names
the file: no traceback, no hang, no crash, and no model that loads but computes something else. The counts below are
from one run of version {version}{commit}:

<!-- not run: an hour; the test suite runs a small part -->
```
{command} --json benchmarks/results/reliability.json
python -m tests.campaign --json benchmarks/results/reliability.json --page docs/reliability.md
```

By default the command makes 200 kills, 10,000 mutations and 150 faults (`--processes 2` uses two cores; rerun the
command to resume). A small fixed part of it belongs to the test suite.
"""
_AGAIN = """
{count} of the runs ended in a traceback. After the fix they were made again (commit {commit}) and are counted by
how they ended then:

{runs}"""
_MUTATIONS = """
## Damaged folders

{count} times, a compressed model, an adapter or a dense model was damaged in one way, and a command was run on it
with limits on time and memory. Kinds of damage: a flipped bit, a truncated file, a replaced JSON value, a change with
matching new checksums, an extra file that the report does not list, and a FIFO, a device or a link in place of a file.

| outcome | runs |
|---|---|
"""
_KILLS = """
## Kills

{count} runs were killed (SIGKILL) one to three times at random moments, then rerun to the end. {good} of them wrote the
same bytes as an uninterrupted run and left no other files behind.

| command | runs |
|---|---|
"""
_FAULTS = """
## Full disk, no permission, little memory

{count} runs met a limit on the size of files, an output folder without write permission, or too little memory. Where a
full disk stopped a run, the same command was rerun with enough space, and completed.

| fault and outcome | runs |
|---|---|
"""
_ENDS = {
    "refused": "refused with a PocketLLM error",
    "right": "completed with the right result",
    "described": "completed; the result depends on the changed files and was not compared",
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
