"""Every stage keeps its tensors on the device it was given; checked where there is no GPU, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import pocketllm
from tests import tiny
from tests.pretend import OnGpu, pretend_gpu


def test_pretended_tensors_refuse_others(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretend_gpu(monkeypatch):
        there, here = torch.ones(3, device="cuda"), torch.ones(3)
        assert isinstance(there + 1, OnGpu) and (there + 1).device.type == "cuda"
        assert here.to("cuda").device == there.device and there.cpu().device.type == "cpu"
        assert not isinstance(there.to("cpu"), OnGpu) and isinstance(there.to(torch.float64), OnGpu)
        for wrong in (lambda: there + here, lambda: here @ there, lambda: torch.cat([here, there])):
            with pytest.raises(RuntimeError, match="on a GPU and on the CPU"):
                wrong()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()


@pytest.mark.parametrize(
    ("architecture", "calibration"),
    [
        ("mixtral", {"refine_epochs": 1}),
        ("gemma3", {"sequential": False, "two_sided": False, "passes": 1}),
        ("gpt2", {"rotate": False}),
    ],
)
def test_the_calibrated_path(
    architecture: str, calibration: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same plan, sizes and errors; a tensor made on the wrong device would raise."""
    # Small, since searching paths in torch on a CPU is slow.
    sizes = {"hidden_size": 12, "intermediate_size": 16, "head_dim": 6, "vocab_size": 100}
    source = tiny.save(
        tmp_path / "dense", architecture, **(sizes if architecture != "gpt2" else {"n_embd": 12})
    )
    calibration = {"tokens": 128, "sensitivity_tokens": 64, **calibration}
    config = tiny.on_trellis(6.0, decoder_scope="model", calibration=calibration)
    with pretend_gpu(monkeypatch):
        there = pocketllm.compress(
            source, config, tmp_path / "there", device="cuda", calibration_folder=tmp_path / "measured"
        )
    here = pocketllm.compress(source, config, tmp_path / "here", calibration_folder=tmp_path / "measured")
    assert there.bytes_on_disk == here.bytes_on_disk and there.peak_gpu_memory_bytes == 1
    for one, other in zip(there.matrices, here.matrices, strict=True):
        assert (one.name, one.vector_len, one.stride) == (other.name, other.vector_len, other.stride)
        assert one.proxy_error == pytest.approx(other.proxy_error, rel=0.05)
