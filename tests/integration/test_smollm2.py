"""The real model: every codeword is used, and both loading modes agree."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import pocketllm
from pocketllm.errors import SourceError
from pocketllm.format.checkpoint import folder_bytes, verify
from pocketllm.source import builtin

NAME = "builtin:smollm2-135m"


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> tuple[pocketllm.Report, Path]:
    try:
        builtin.fetch(NAME)
    except SourceError as error:
        pytest.skip(str(error))
    codec = dataclasses.replace(pocketllm.CodecConfig(), epochs=1, kmeans_iterations=4, max_sample=1 << 17)
    config = pocketllm.CompressConfig(
        codec=codec, vector_len=2, codebook_size=256, codebook_scope="model", decoder_scope="kind"
    )
    output = tmp_path_factory.mktemp("smollm2") / "out"
    planned = pocketllm.dry_run(NAME, config)
    report = pocketllm.compress(NAME, config, output)
    assert report.bytes_on_disk == planned.bytes_on_disk == folder_bytes(output)
    return report, output


def test_report(compressed: tuple[pocketllm.Report, Path]) -> None:
    report, _ = compressed
    assert len(report.matrices) == 211
    assert min(m.codebook_utilization for m in report.matrices) >= 0.99
    assert max(m.nmse for m in report.matrices) < 0.02
    assert 4.0 < report.bpw_matrices < 4.1
    assert report.ratio_files_bf16 > 3.7


def test_both_modes_agree(compressed: tuple[pocketllm.Report, Path]) -> None:
    from pocketllm.evaluate.generate import generate

    _, folder = compressed
    verify(folder)
    texts, logits = [], []
    for mode in ("dense", "packed"):
        model, tokenizer = pocketllm.load(folder, mode=mode, dtype=torch.float32)
        texts.append(generate(model, tokenizer, "The capital of France is", 3).text)
        with torch.inference_mode():
            logits.append(model(torch.arange(100, 130)[None]).logits)
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=2e-3)
    assert texts[0] == texts[1] and texts[0].startswith("The capital of France is")
