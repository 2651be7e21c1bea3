"""plan -> fit -> encode -> pack -> write, one group of matrices at a time, resumable.

Work lies in `OUTPUT.partial` until it is whole: a file per fitted codebook, a file per coded matrix, each
written to a temporary name and renamed. A run that is killed loses at most the unit it was working on;
every unit has its own seed, so the bytes are those of an unbroken run. At the end the checkpoint is put
together in `OUTPUT.partial/final` and renamed to OUTPUT.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import pocketllm
from pocketllm.codec import codebook as cb
from pocketllm.codec.matrix_codec import MatrixCodec
from pocketllm.codec.packing import index_width, pack
from pocketllm.codec.training import fit
from pocketllm.config import CompressConfig
from pocketllm.errors import OutputError, ResumeError
from pocketllm.model import checkpoint as ckpt
from pocketllm.model.layers import fold
from pocketllm.model.plan import Matrix, Plan, make_plan
from pocketllm.model.report import MatrixReport, Report, versions
from pocketllm.model.source import DenseCheckpoint, open_dense, resolve

_COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py", "LICENSE*", "README*")
_NOT_COPIED = {"config.json", "model.safetensors.index.json", ckpt.REPORT_NAME}


@dataclass(frozen=True)
class Event:
    """Progress: a stage (`fetch`, `fit`, `encode`, `write`), the finished share of it, and what is at work."""

    stage: str
    share: float
    detail: str


ProgressCallback = Callable[[Event], None]


def compress(
    model: str | Path,
    config: CompressConfig,
    output: str | Path,
    *,
    progress: ProgressCallback = lambda event: None,
    device: str = "cpu",
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Report:
    """Compress a causal language model.

    Args:
        model: local folder, hub id, or `builtin:smollm2-135m`.
        config: what to do; see `pocketllm.preset`.
        output: folder to make. A half-done one of the same arguments is continued.
        progress: called often, from this thread.
        device: where codecs are fitted and matrices encoded, `cpu` or `cuda`.
        overwrite: replace an earlier compressed model at `output`.
        trust_remote_code: let transformers run code that the model folder contains.

    Returns:
        Sizes, ratios and errors; the same as `info` shows later.

    Raises:
        SourceError, WeightError, ConfigError, OutputError, ResumeError: nothing half-written is left under
            `output`; what was finished stays in `output.partial` for the next run.

    Example:
        >>> report = pocketllm.compress("builtin:smollm2-135m", pocketllm.preset("lookup-8x"), "out")
    """
    started = time.monotonic()
    output = Path(output)
    check_output(output, overwrite)
    folder = resolve(str(model), lambda message: progress(Event("fetch", 0.0, message)))
    source = open_dense(folder, trust_remote_code)
    plan = make_plan(source, config)
    if output.resolve() == folder.resolve():
        raise OutputError(f"{output}: is the model itself; choose another output folder")
    try:
        work = _Workspace.open(output, source, config, str(model), device)
        fits = _fit_and_encode(work, source, plan, device, progress)
        progress(Event("write", 0.0, "writing the checkpoint"))
        report = _write(work, source, plan, fits, str(model), time.monotonic() - started)
        work.publish(output)
    except OSError as error:
        raise _output_error(output, error) from error
    progress(Event("write", 1.0, str(output)))
    return report


def dry_run(model: str | Path, config: CompressConfig, trust_remote_code: bool = False) -> Report:
    """The plan and the sizes in bytes without fitting anything; errors are the predicted ones."""
    source = open_dense(resolve(str(model)), trust_remote_code)
    plan = make_plan(source, config)
    matrices = [
        _matrix_report(plan, m, plan.specs[m.name].nmse, float("nan"), float("nan")) for m in plan.matrices
    ]
    sizes = _tensor_sizes(plan, source)
    header = ckpt_header_bytes(sizes)
    tensors = sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in sizes.values())
    other = sum(path.stat().st_size for path in _copied_files(source.folder))
    total = tensors + header + other
    return _report(plan, source, matrices, str(model), total, header, other)


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse an output that would destroy something.

    Raises:
        OutputError: it exists and is not ours, or is ours and `overwrite` is not set, or cannot be made.
    """
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output}: exists and is a file; choose another output folder")
    if output.is_dir() and any(output.iterdir()):
        if not (output / ckpt.REPORT_NAME).is_file():
            raise OutputError(f"{output}: exists and is not a compressed model; choose another output folder")
        if not overwrite:
            raise OutputError(f"{output}: a compressed model is there already; pass --overwrite to replace it")
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{parent}: no permission to write here; choose another output folder")


def _output_error(output: Path, error: OSError) -> OutputError:
    where = error.filename or output
    if error.errno == errno.ENOSPC:
        return OutputError(
            f"{where}: the disk is full; free some space and run the same command again, "
            f"what is done is kept in {output}.partial"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return OutputError(f"{where}: no permission to write; choose another output folder")
    return OutputError(f"{where}: cannot be written ({error.strerror or error})")


@dataclass(frozen=True)
class _Workspace:
    """The folder `OUTPUT.partial`."""

    folder: Path

    @classmethod
    def open(
        cls, output: Path, source: DenseCheckpoint, config: CompressConfig, model: str, device: str
    ) -> _Workspace:
        folder = output.with_name(output.name + ".partial")
        wanted = {
            "version": pocketllm.__version__,
            "format_version": ckpt.FORMAT_VERSION,
            "model": model,
            "weights": source.fingerprint(),
            "device": device,
            "threads": torch.get_num_threads(),
            **_flat(config.to_dict()),
        }
        state = folder / "state.json"
        if state.is_file():
            found = json.loads(state.read_text())
            differing = sorted(k for k in {*wanted, *found} if wanted.get(k) != found.get(k))
            if differing:
                facts = "; ".join(f"{k}: {found.get(k)!r} then, {wanted.get(k)!r} now" for k in differing)
                raise ResumeError(
                    f"{folder}: holds a half-done run with other arguments ({facts}); "
                    "run with the same arguments to go on, or delete that folder to start anew"
                )
        elif folder.exists() and any(folder.iterdir()):
            raise OutputError(f"{folder}: exists and is not ours; move it away")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            ckpt.write_json(state, wanted)
        return cls(folder)

    def save(self, name: str, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Keep one finished unit."""
        path = self.folder / name
        temporary = path.with_suffix(".tmp")
        metadata = {"facts": json.dumps(facts)}
        try:
            save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, str(temporary), metadata)
        except Exception as error:  # safetensors reports a full disk as its own error, not as OSError
            if "os error 28" in str(error) or "No space left" in str(error):
                raise OSError(errno.ENOSPC, "No space left on device", str(temporary)) from error
            raise
        temporary.replace(path)

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """A finished unit, or None."""
        path = self.folder / name
        if not path.is_file():
            return None
        with safe_open(str(path), framework="pt") as handle:
            tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
            return tensors, json.loads(handle.metadata()["facts"])

    def publish(self, output: Path) -> None:
        """Rename the finished checkpoint into place and drop the rest."""
        final = self.folder / "final"
        if output.is_dir():
            old = self.folder / "old"
            output.rename(old)
        final.rename(output)
        shutil.rmtree(self.folder)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def _fit_and_encode(
    work: _Workspace, source: DenseCheckpoint, plan: Plan, device: str, progress: ProgressCallback
) -> list[dict[str, Any]]:
    """Every codebook group in turn; returns the facts of the fits."""
    total = sum(m.weights for m in plan.matrices)
    done, facts = 0, []
    for number, (key, group) in enumerate(plan.groups().items()):
        weights = sum(m.weights for m in group)
        codecs, fit_facts = _fitted(work, source, plan, number, key, group, device, progress)
        facts.append(fit_facts)
        for matrix in group:
            progress(Event("encode", done / total, matrix.name))
            _encoded(work, source, plan, matrix, codecs[plan.decoder_key(matrix)], device)
            done += matrix.weights
        progress(Event("encode", done / total, f"codebook {number + 1}: {weights:,} weights"))
    return facts


def _fitted(
    work: _Workspace,
    source: DenseCheckpoint,
    plan: Plan,
    number: int,
    key: str,
    group: list[Matrix],
    device: str,
    progress: ProgressCallback,
) -> tuple[dict[str, MatrixCodec], dict[str, Any]]:
    """The group's codecs, rounded to what is stored; fitted now or by an earlier run."""
    spec = plan.specs[group[0].name]
    config = plan.config.codec_for(spec.vector_len)
    name = f"codebook-{number:05d}.safetensors"
    keys = list(dict.fromkeys(plan.decoder_key(m) for m in group))
    kept = work.load(name)
    if kept is None:
        seed = zlib.crc32(f"{plan.config.seed}|{key}".encode())
        samples = _samples(source, plan, group, seed, device)
        title = f"codebook {number + 1} of {len(plan.groups())} ({spec.codebook_size} x {spec.vector_len})"
        result = fit(
            samples,
            config,
            spec.codebook_size,
            seed,
            lambda share: progress(Event("fit", share, title)),
        )
        tensors = {"codebook": result.codecs[keys[0]].codebook.detach().half()}
        for position, decoder_key in enumerate(keys):
            blocks = list(result.codecs[decoder_key].decoder.blocks)
            tensors[f"{position}.up"] = torch.stack([b.up.detach() for b in blocks]).half()
            tensors[f"{position}.down"] = torch.stack([b.down.detach() for b in blocks]).half()
            for block_number, block in enumerate(result.codecs[decoder_key].encoder.blocks):
                tensors[f"{position}.encoder.{block_number}.up"] = block.up.detach()
                tensors[f"{position}.encoder.{block_number}.down"] = block.down.detach()
        facts = {
            "codebook": key,
            "start_nmse": result.start_nmse,
            "final_nmse": result.final_nmse,
            "sample_utilization": result.utilization,
            "curve": result.curve,
            "revived": result.revived,
        }
        work.save(name, tensors, facts)
        kept = work.load(name)
    assert kept is not None
    tensors, facts = kept
    codebook = nn.Parameter(tensors["codebook"].float().to(device), requires_grad=False)
    codecs = {}
    for position, decoder_key in enumerate(keys):
        codec = MatrixCodec(config, codebook)
        for block_number, block in enumerate(codec.decoder.blocks):
            block.up.data = tensors[f"{position}.up"][block_number].float()
            block.down.data = tensors[f"{position}.down"][block_number].float()
        for block_number, block in enumerate(codec.encoder.blocks):
            block.up.data = tensors[f"{position}.encoder.{block_number}.up"]
            block.down.data = tensors[f"{position}.encoder.{block_number}.down"]
        codecs[decoder_key] = codec.to(device)
    return codecs, facts


def _samples(
    source: DenseCheckpoint, plan: Plan, group: list[Matrix], seed: int, device: str
) -> dict[str, list[Tensor]]:
    """Random whole rows of the group's matrices, within the bounds on the sample."""
    spec = plan.specs[group[0].name]
    settings = plan.config.codec
    budget = min(settings.max_sample, settings.sample_per_codeword * spec.codebook_size)
    available = sum(m.subvectors(spec.vector_len) for m in group)
    share = min(1.0, budget / available)
    blocks: dict[tuple[str, int], list[Tensor]] = {}
    for matrix in group:
        generator = torch.Generator().manual_seed(zlib.crc32(matrix.name.encode(), seed))
        weight = fold(source.read(matrix.name), matrix.transposed)
        count = max(1, round(share * matrix.rows))
        rows = torch.randperm(matrix.rows, generator=generator)[:count].sort().values
        sample = weight[rows].float().to(device)
        blocks.setdefault((plan.decoder_key(matrix), matrix.columns), []).append(sample)
    samples: dict[str, list[Tensor]] = {}
    for (decoder_key, _), parts in blocks.items():
        samples.setdefault(decoder_key, []).append(torch.cat(parts))
    return samples


def _unit_name(plan: Plan, matrix: Matrix) -> str:
    return f"matrix-{plan.matrices.index(matrix):05d}.safetensors"


def _encoded(
    work: _Workspace, source: DenseCheckpoint, plan: Plan, matrix: Matrix, codec: MatrixCodec, device: str
) -> None:
    """Encode and pack one matrix, unless an earlier run did."""
    name = _unit_name(plan, matrix)
    if (work.folder / name).is_file():
        return
    spec = plan.specs[matrix.name]
    weight = fold(source.read(matrix.name), matrix.transposed).to(device)
    encoded = codec.encode(weight)
    decoded = codec.decode(encoded)
    energy = float(weight.double().square().sum())
    error = float((weight.double() - decoded.double()).square().sum())
    flat = encoded.indices.reshape(-1)
    tensors = {
        "indices": pack(flat, index_width(spec.codebook_size)),
        "row_scale": encoded.row_scale,
        "counts": torch.bincount(flat, minlength=spec.codebook_size).to(torch.int32),
    }
    if not plan.config.codec.row_scale:
        del tensors["row_scale"]
    work.save(name, tensors, {"nmse": error / energy if energy > 0 else 0.0})


def _tensor_sizes(
    plan: Plan, source: DenseCheckpoint
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Every stored tensor in writing order: dense ones, coded ones, codebooks, decoders."""
    sizes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for dense in plan.dense:
        sizes[dense.name] = source.dtype(dense.name), dense.shape
    for matrix in plan.matrices:
        bits = plan.own_bits(matrix) - (16 * matrix.rows if plan.config.codec.row_scale else 0)
        sizes[f"{matrix.name}.indices"] = torch.uint8, (bits // 8,)
        if plan.config.codec.row_scale:
            sizes[f"{matrix.name}.row_scale"] = torch.bfloat16, (matrix.rows,)
    for number, group in enumerate(plan.groups().values()):
        spec = plan.specs[group[0].name]
        shape = (spec.codebook_size, spec.vector_len)
        sizes[f"{ckpt.STORE}.codebooks.{number}.weight"] = torch.float16, shape
    for number, config in enumerate(_decoders(plan).values()):
        d, hidden, depth = config.vector_len, config.hidden, config.depth
        sizes[f"{ckpt.STORE}.decoders.{number}.up"] = torch.float16, (depth, d, hidden)
        sizes[f"{ckpt.STORE}.decoders.{number}.down"] = torch.float16, (depth, hidden, d)
    return sizes


def _decoders(plan: Plan) -> dict[str, Any]:
    """Decoder key -> codec settings, group by group: the order of the store."""
    return {
        plan.decoder_key(m): plan.config.codec_for(plan.specs[m.name].vector_len)
        for group in plan.groups().values()
        for m in group
    }


def ckpt_header_bytes(sizes: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> int:
    """Bytes a safetensors file of these tensors spends on its header (one shard)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in sizes.items():
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {
            "dtype": ckpt._DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, offset + nbytes],
        }
        offset += nbytes
    length = len(json.dumps(header, separators=(",", ":")).encode())
    return 8 + length + -length % 8


def _write(
    work: _Workspace,
    source: DenseCheckpoint,
    plan: Plan,
    fits: list[dict[str, Any]],
    model: str,
    seconds: float,
) -> Report:
    """Put the checkpoint together in `final`."""
    final = work.folder / "final"
    shutil.rmtree(final, ignore_errors=True)
    final.mkdir()
    groups = plan.groups()
    codebook_of = {m.name: n for n, group in enumerate(groups.values()) for m in group}
    decoder_of = {key: n for n, key in enumerate(_decoders(plan))}
    crcs: dict[str, int] = {}
    matrices = _matrix_reports(work, plan, groups)
    sizes = _tensor_sizes(plan, source)
    written = ckpt.write_safetensors(final, sizes, _stored_tensors(work, source, plan, groups, crcs))
    layout = ckpt.Layout(
        {
            m.name: ckpt.MatrixEntry(
                m.shape, m.transposed, codebook_of[m.name], decoder_of[plan.decoder_key(m)], crcs[m.name]
            )
            for m in plan.matrices
        },
        tuple(
            ckpt.CodebookEntry(*_codebook_shape(plan, group), crcs[f"codebook {n}"])
            for n, group in enumerate(groups.values())
        ),
        tuple(
            ckpt.DecoderEntry(config, crcs[f"decoder {n}"])
            for n, config in enumerate(_decoders(plan).values())
        ),
    )
    config = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {
        "quant_method": ckpt.STORE,
        "producer": f"pocketllm-codec {pocketllm.__version__}",
        "mode": "dense",
        **layout.to_dict(),
    }
    (final / "config.json").write_text(json.dumps(config, ensure_ascii=False) + "\n", encoding="utf-8")
    for path in _copied_files(source.folder):
        shutil.copyfile(path, final / path.name)
    names = [p.name for p in final.iterdir()]
    other = sum((final / p.name).stat().st_size for p in _copied_files(source.folder))
    headers = sum((final / name).stat().st_size for name in written) - _payload(sizes)
    headers += (final / "config.json").stat().st_size
    report = _report(plan, source, matrices, model, 0, headers, other)
    report = replace(report, fits=tuple(fits), versions=versions(), seconds=0.0)
    return _write_report(final, report, ckpt.file_facts(final, names), seconds)


def _write_report(final: Path, report: Report, files: dict[str, Any], seconds: float) -> Report:
    """Write the report, which counts its own bytes; the time taken is returned but not stored.

    Stored bytes must not depend on how long the run took, or on whether it was resumed.
    """
    weights = sum(facts["bytes"] for facts in files.values())
    dense_other = report.bytes_by_part["other_files"]
    total = weights
    while True:
        bf16 = report.bytes_by_part["dense_model_bf16"]
        stored = replace(
            report,
            bytes_on_disk=total,
            ratio_files_bf16=(bf16 + dense_other) / total,
            ratio_files_fp32=(2 * bf16 + dense_other) / total,
            bytes_by_part={**report.bytes_by_part, "headers": report.bytes_by_part["headers"] + total - weights},
        )
        body = {"format_version": ckpt.FORMAT_VERSION, **stored.to_dict(), "files": files}
        del body["seconds"]
        ckpt.write_json(final / ckpt.REPORT_NAME, body)
        size = ckpt.folder_bytes(final)
        if size == total:
            return replace(stored, seconds=seconds)
        total = size


def _payload(sizes: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> int:
    return sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in sizes.values())


def _codebook_shape(plan: Plan, group: list[Matrix]) -> tuple[int, int]:
    spec = plan.specs[group[0].name]
    return spec.codebook_size, spec.vector_len


def _stored_tensors(
    work: _Workspace,
    source: DenseCheckpoint,
    plan: Plan,
    groups: dict[str, list[Matrix]],
    crcs: dict[str, int],
) -> Iterator[Tensor]:
    """The tensors in the order of `_tensor_sizes`; fills `crcs` on the way."""
    for dense in plan.dense:
        yield source.read(dense.name)
    for matrix in plan.matrices:
        kept = work.load(_unit_name(plan, matrix))
        assert kept is not None
        stored = [kept[0][k] for k in ("indices", "row_scale") if k in kept[0]]
        crcs[matrix.name] = ckpt.checksum(*stored)
        yield from stored
    units = []
    for number in range(len(groups)):
        kept = work.load(f"codebook-{number:05d}.safetensors")
        assert kept is not None
        units.append(kept[0])
        crcs[f"codebook {number}"] = ckpt.checksum(kept[0]["codebook"])
        yield kept[0]["codebook"]
    decoder = 0
    for unit in units:
        for position in range(sum(1 for key in unit if key.count(".") == 1 and key.endswith(".up"))):
            up, down = unit[f"{position}.up"], unit[f"{position}.down"]
            crcs[f"decoder {decoder}"] = ckpt.checksum(up, down)
            decoder += 1
            yield up
            yield down


def _copied_files(folder: Path) -> list[Path]:
    """Tokenizer, generation settings, licence: small files that belong to the model."""
    found = {path for pattern in _COPIED for path in folder.glob(pattern) if path.is_file()}
    return sorted(path for path in found if path.name not in _NOT_COPIED)


def _matrix_reports(work: _Workspace, plan: Plan, groups: dict[str, list[Matrix]]) -> list[MatrixReport]:
    reports = {}
    for group in groups.values():
        units = [work.load(_unit_name(plan, m)) for m in group]
        counts = torch.stack([unit[0]["counts"].long() for unit in units if unit]).sum(dim=0)
        use, perplexity = cb.utilization(counts), cb.perplexity(counts)
        for matrix, unit in zip(group, units, strict=True):
            assert unit is not None
            reports[matrix.name] = _matrix_report(plan, matrix, unit[1]["nmse"], use, perplexity)
    return [reports[m.name] for m in plan.matrices]


def _matrix_report(plan: Plan, matrix: Matrix, nmse: float, use: float, perplexity: float) -> MatrixReport:
    spec = plan.specs[matrix.name]
    bpw = plan.matrix_bits()[matrix.name] / matrix.weights
    return MatrixReport(
        matrix.name, matrix.kind, matrix.shape, bpw, nmse, use, perplexity, spec.vector_len, spec.codebook_size
    )


def _report(
    plan: Plan,
    source: DenseCheckpoint,
    matrices: list[MatrixReport],
    model: str,
    total: int,
    headers: int,
    other: int,
) -> Report:
    bits = plan.bits_by_part()
    dense_bytes = sum(
        torch.Size(d.shape).numel() * source.dtype(d.name).itemsize for d in plan.dense
    )
    coded = sum(m.weights for m in plan.matrices)
    every = coded + sum(torch.Size(d.shape).numel() for d in plan.dense)
    matrix_bytes = sum(bits.values()) / 8
    in_blocks = {m.name for m in plan.matrices if m.in_blocks}
    block_weights = sum(m.weights for m in plan.matrices if m.in_blocks)
    per_matrix = plan.matrix_bits()
    block_bits = sum(b for name, b in per_matrix.items() if name in in_blocks)
    skipped = [asdict(d) for d in plan.dense]
    skipped += [
        {"name": name, "shape": [], "reason": f"tied to {target}, stored once"}
        for name, target in source.tied.items()
    ]
    skipped += [
        {"name": name, "shape": [], "reason": "the model class has no use for it"} for name in source.unused
    ]
    return Report(
        model=model,
        bytes_on_disk=total,
        ratio_files_bf16=(2 * every + other) / total if total else 0.0,
        ratio_files_fp32=(4 * every + other) / total if total else 0.0,
        ratio_matrices_bf16=2 * coded / matrix_bytes,
        ratio_matrices_fp32=4 * coded / matrix_bytes,
        bpw_blocks=block_bits / block_weights if block_weights else 0.0,
        bpw_matrices=plan.bpw,
        bpw_all=(sum(bits.values()) + 8 * dense_bytes) / every,
        bytes_by_part={
            **{part: value // 8 for part, value in bits.items()},
            "dense": dense_bytes,
            "other_files": other,
            "headers": headers,
            "dense_model_bf16": 2 * every,
        },
        matrices=tuple(matrices),
        skipped=tuple(skipped),
        codebook_scope=plan.codebook_scope,
        config=plan.config.to_dict(),
    )
