"""The model card: README.md of a compressed model's folder, as the Hub shows it.

It describes the files and has no checksum in the report, so that it can be edited. It names no size that includes its
own, so that its text follows from the plan.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import count
from pathlib import Path
from string import Template
from typing import Any

from pocketllm.config import command_for
from pocketllm.format.report import rounded
from pocketllm.source.builtin import BUILTIN_PREFIX, UPSTREAM
from pocketllm.source.hub import split_hub_id

CARD_NAME, DENSE_CARD_NAME = "README.md", "README.base.md"
PLACEHOLDER = "OWNER/NAME"
_CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag")
_TAGS = ["compression", "pocketllm", "quantization"]
_PARTS = {
    "indices": "indices",
    "row_scales": "row scales",
    "codebooks": "codebooks",
    "decoders": "decoders",
    "dense": "tensors left dense",
}
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Figure:
    """A measured value on the card. what: as in the table. dense: the same of the dense model, if measured.

    metric, dataset: names for the card's metadata.
    """

    what: str
    value: float
    dense: float | None
    metric: str
    dataset: str


def stored_names(names: Iterable[str]) -> dict[str, str]:
    """Name of each file of the dense model's folder -> its stored name: the dense model's card makes room.

    Example:
        >>> stored_names(["README.md", "tokenizer.json"])
        {'README.md': 'README.base.md', 'tokenizer.json': 'tokenizer.json'}
    """
    names = list(names)
    free = (name for name in _dense_card_names() if name.lower() not in {n.lower() for n in names})
    return {name: next(free) if name.lower() == CARD_NAME.lower() else name for name in names}


def _dense_card_names() -> Iterable[str]:
    yield DENSE_CARD_NAME
    yield from (f"README.base-{number}.md" for number in count(2))


def dense_card_name(names: Iterable[str]) -> str | None:
    """The dense model's card among the stored files; the last one where that model was made of another."""
    found = [name for name in names if re.fullmatch(r"README\.base(-\d+)?\.md", name)]
    return max(found, key=lambda name: (len(name), name), default=None)


def dense_card(folder: Path, report: Mapping[str, Any]) -> Path | None:
    """The dense model's card in a compressed model's folder."""
    name = dense_card_name(report["files"])
    return None if name is None else folder / name


def card_text(
    report: Mapping[str, Any],
    dense: Path | None = None,
    *,
    base_model: str | None = None,
    figures: Sequence[Figure] = (),
) -> str:
    """The model card.

    Args:
        report: as stored in `pocketllm.json`; values that depend on the result of a fit are not used.
        dense: file with the dense model's card, whose licence and language are carried over.
        base_model: Hub id of the dense model; None takes the report's, if that is one.
        figures: measured values.
    """
    from huggingface_hub import ModelCardData

    named, licence = UPSTREAM.get(str(report["model"]), (_hub_id(str(report["model"])), None))
    base = base_model or named
    carried = {"license": licence, "pipeline_tag": "text-generation", **_carried(dense)}
    name = (base or Path(str(report["model"]).removeprefix(BUILTIN_PREFIX)).name).rpartition("/")[2]
    metadata: dict[str, Any] = {
        "base_model": base,
        "base_model_relation": "quantized" if base else None,
        **carried,
        "library_name": "transformers",
        "tags": _TAGS,
        "model_name": name if figures else None,
        "eval_results": [_result(figure) for figure in figures] or None,
        "pocketllm": _settings(report),
    }
    template = Template(resources.files("pocketllm.format").joinpath("model_card.md").read_text("utf-8"))
    body = template.substitute(
        title=f"# {name}, {report['bpw_matrices']:.2f} bits per weight",
        about=_about(report, f"[{base}](https://huggingface.co/{base})" if base else name),
        sizes=_sizes(report),
        bits=_bits(report),
        quality=_quality(figures),
        recipe=_recipe(report),
        licence=_licence(carried, dense_card_name(report["files"])),
    )
    return f"---\n{ModelCardData(**metadata).to_yaml()}\n---\n\n{body}"


def _hub_id(model: str) -> str | None:
    found = split_hub_id(model)
    return None if found is None else found[0]


def _carried(dense: Path | None) -> dict[str, Any]:
    """Licence, language and task in the metadata of the dense model's card."""
    from huggingface_hub.repocard import metadata_load

    try:
        found = {} if dense is None else metadata_load(dense) or {}
    except Exception as error:  # whatever a YAML parser makes of a text by hand
        logger.warning("%s: its metadata cannot be read (%s); the model card has no licence", dense, error)
        found = {}
    return {key: found[key] for key in _CARRIED if _is_text(found.get(key))}


def _is_text(value: Any) -> bool:
    """A text, or a list of some."""
    return isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(item, str) for item in value)
    )


def _weight_bytes(report: Mapping[str, Any]) -> int:
    return sum(facts["bytes"] for name, facts in report["files"].items() if name.endswith(".safetensors"))


def _settings(report: Mapping[str, Any]) -> dict[str, Any]:
    """What the metadata says about the stored form."""
    versions, command = report.get("versions") or {}, _command(report)
    return {
        "version": versions.get("pocketllm-codec", "unknown"),
        "bits_per_weight": report["bpw_matrices"],
        "bits_per_weight_blocks": report["bpw_blocks"],
        "bits_per_weight_all": report["bpw_all"],
        "weight_bytes": _weight_bytes(report),
        "weight_bytes_bf16": report["dense_model_bytes_bf16"],
        **({} if command is None else {"command": command}),
    }


def _result(figure: Figure) -> Any:
    from huggingface_hub import EvalResult

    return EvalResult(
        task_type="text-generation",
        dataset_type=figure.dataset,
        dataset_name=figure.dataset,
        metric_type=figure.metric,
        metric_name=figure.what,
        metric_value=rounded(figure.value),
    )


def _about(report: Mapping[str, Any], base: str) -> str:
    nbytes, dense = _weight_bytes(report), report["dense_model_bytes_bf16"]
    return (
        f"{base}, compressed with PocketLLM ([arXiv 2511.17637](https://arxiv.org/abs/2511.17637)) to "
        f"{report['bpw_matrices']:.2f} bits per weight of its {len(report['matrices'])} compressed matrices, "
        f"everything counted. The weight files have {nbytes:,} bytes, {dense / nbytes:.2f} times fewer than in "
        "bfloat16."
    )


def _sizes(report: Mapping[str, Any]) -> str:
    parts = [(title, report["bytes_by_part"].get(part, 0)) for part, title in _PARTS.items()]
    rows = [(title, nbytes) for title, nbytes in parts if nbytes]
    rows += [("**weight files**", _weight_bytes(report))]
    rows += [("dense model in bfloat16", report["dense_model_bytes_bf16"])]
    return "\n".join(["| | bytes |", "|---|---|", *(f"| {title} | {nbytes:,} |" for title, nbytes in rows)])


def _bits(report: Mapping[str, Any]) -> str:
    return (
        f"Bits per weight: {report['bpw_matrices']:.3f} of the compressed matrices, {report['bpw_blocks']:.3f} of the "
        f"linear weights of the blocks, {report['bpw_all']:.3f} of all parameters. `pocketllm.json` has the errors of "
        "every matrix and all settings."
    )


def _quality(figures: Sequence[Figure]) -> str:
    """The section of measured values; empty without any."""
    if not figures:
        return ""
    rows = [f"| {f.what} | {f.value:.4g} | {'' if f.dense is None else f'{f.dense:.4g}'} |" for f in figures]
    table = "\n".join(["| | this model | dense |", "|---|---|---|", *rows])
    return f"## Quality\n\n{table}\n\nMeasured by `pocketllm eval`.\n\n"


def _command(report: Mapping[str, Any]) -> str | None:
    """The command that makes the model again; None if the settings are those of another version."""
    model = str(report["model"])
    is_folder = _hub_id(model) is None and not model.startswith(BUILTIN_PREFIX)
    return (
        command_for(f"./{Path(model).name}" if is_folder else model, "small", report["config"]).text or None
    )


def _recipe(report: Mapping[str, Any]) -> str:
    versions, recover, command = report.get("versions") or {}, report.get("recover"), _command(report)
    lines = [] if command is None else [f"```\n{command}\n```"]
    if isinstance(recover, Mapping):
        lines.append(
            f"Then tuned towards the dense model in {recover.get('steps', 'some')} steps of `pocketllm finetune`, "
            "which adds no bytes."
        )
    lines.append(", ".join(f"{package} {version}" for package, version in sorted(versions.items())))
    return "\n\n".join(line for line in lines if line)


def _licence(carried: Mapping[str, Any], card: str | None) -> str:
    terms = carried.get("license_name") or carried.get("license")
    said = (
        f"That of the dense model: {terms}." if terms else "That of the dense model, whose card names none."
    )
    return said if card is None else f"{said} Its card is kept beside this one: [{card}]({card})."
