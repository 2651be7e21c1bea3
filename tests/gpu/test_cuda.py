"""On a GPU: the same plan and sizes, indices up to rounding, and equal logits of both modes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import pocketllm
from pocketllm.codec.codebook import nearest
from pocketllm.codec.kernels import reference, select
from pocketllm.codec.kernels.packed_op import check_weights, packed_matmul, packed_matmul_reference
from pocketllm.evaluate.kl import text_divergence
from pocketllm.evaluate.perplexity import perplexity
from pocketllm.runtime.layers import packed_matrices
from pocketllm.studies.measure import probe
from tests import tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


def test_nearest_codeword() -> None:
    points, codebook = torch.randn(5000, 8), torch.randn(4096, 8)
    found = nearest(points.cuda(), codebook.cuda()).cpu()
    assert (found == reference.nearest(points, codebook)).float().mean() > 0.999


def test_paths_in_triton() -> None:
    """Triton comes with torch's CUDA builds: it is used, and finds what torch finds."""
    device = torch.device("cuda")
    kernel = select._triton(device)
    assert kernel is not None and select.paths_differ(kernel.cheapest_paths, device) == ""
    lengths, lookahead = [64] * 9 + [63], [4] * 10
    points, tables = torch.randn(sum(lengths) + sum(lookahead), 2).cuda(), torch.randn(10, 2, 4096).cuda()
    which = torch.arange(10).cuda()
    problem = reference.PathProblem(
        points=points,
        weights=points.square().sum(dim=1),
        tables=tables,
        halves=tables.square().sum(dim=1) / 2,
        which=which,
        after=which.flip(0),
        start=torch.zeros_like(which),
        stop=torch.full_like(which, -1),
        lengths=lengths,
        lookahead=lookahead,
        width=12,
        stride=4,
    )
    expected = reference.cheapest_paths(problem)
    assert torch.equal(kernel.cheapest_paths(problem), expected)
    assert torch.equal(select.cheapest_paths(problem), expected)


def test_packed_products_in_triton() -> None:
    """Every form, on either side of the number of tokens from which a matrix is decoded."""
    device = torch.device("cuda")
    assert select.packed_gpu(device) is not None
    for weight in check_weights(device):
        for count in (0, 1, 3, 17, 200):
            x = torch.randn(count, weight.sizes.columns, device=device, requires_grad=True)
            wanted, found = packed_matmul_reference(x, weight), packed_matmul(x, weight)
            assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-3)
            (ours,), (theirs,) = (torch.autograd.grad(out.sum(), x) for out in (found, wanted))
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-3)
            half = packed_matmul(x.detach().bfloat16(), weight)
            assert float((half - wanted).norm()) <= 2e-2 * float(wanted.norm())


def test_auto_stays_packed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pocketllm.compress(tiny.save(tmp_path / "dense"), tiny.on_trellis(), tmp_path / "c")
    model, _ = pocketllm.load(tmp_path / "c", device_map="cuda")
    assert packed_matrices(model) and "decoded at load" not in caplog.text


def test_compress_and_load(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "dense")
    reports = [
        pocketllm.compress(source, tiny.settings(), tmp_path / device, device=device)
        for device in ("cpu", "cuda")
    ]
    assert reports[0].bytes_on_disk == reports[1].bytes_on_disk
    for one, other in zip(reports[0].matrices, reports[1].matrices, strict=True):
        assert one.nmse == pytest.approx(other.nmse, rel=0.1)
    tokens = torch.arange(3, 40)[None].cuda()
    logits = []
    for mode in ("dense", "packed"):
        model, _ = pocketllm.load(tmp_path / "cuda", mode=mode, device_map="cuda", dtype=torch.float32)
        with torch.inference_mode():
            logits.append(model(tokens).logits)
    assert torch.allclose(logits[0], logits[1], atol=1e-5)


def test_calibrated(tmp_path: Path) -> None:
    """Every stage of the calibrated path: the same plan and sizes, perplexity within 1 % of the CPU's."""
    source = tiny.save(tmp_path / "dense", "mixtral")
    config = tiny.on_trellis(calibration={"refine_epochs": 1})
    text, reports, found = "some text to measure on, the same on both. " * 40, [], []
    for device in ("cpu", "cuda"):
        reports.append(
            pocketllm.compress(
                source, config, tmp_path / device, device=device, calibration_folder=tmp_path / "measured"
            )
        )
        model, tokenizer = pocketllm.load(tmp_path / device, dtype=torch.float32)
        found.append(perplexity(model, tokenizer, text, 32).perplexity)
    plans = [[(m.name, m.vector_len, m.codebook_size, m.stride) for m in r.matrices] for r in reports]
    assert plans[0] == plans[1]
    assert reports[0].bytes_on_disk == reports[1].bytes_on_disk
    assert reports[1].peak_gpu_memory_bytes
    assert found[1] == pytest.approx(found[0], rel=0.01)
    for one, other in zip(reports[0].matrices, reports[1].matrices, strict=True):
        assert one.proxy_error == pytest.approx(other.proxy_error, rel=0.2)
        assert (one.input_tokens, one.unseen_experts) == (other.input_tokens, other.unseen_experts)


def test_dense_inputs_are_kept_on_a_gpu(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "dense", "gemma3")
    config = tiny.on_trellis(calibration={"sequential": False})
    for name in ("first", "again"):
        pocketllm.compress(
            source, config, tmp_path / name, device="cuda", calibration_folder=tmp_path / "measured"
        )
    weights = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("first", "again")]
    assert weights[0] == weights[1]


def test_divergence() -> None:
    text, found = "the same figures on both devices, within rounding. " * 8, []
    for device in ("cpu", "cuda"):
        other = tiny.model("qwen3")  # on the CPU: each model is asked where it is
        found.append(text_divergence(tiny.model().to(device), other, tiny.tokenizer(), text, 40, 3).kl)
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_tasks() -> None:
    pytest.importorskip("lm_eval")
    from pocketllm.evaluate.harness import PocketLM

    requests = [(("", ""), list(range(5, 5 + n)), list(range(40, 43 + n))) for n in (1, 4, 9)]
    scores = [
        PocketLM(tiny.model().to(device), tiny.tokenizer(), 64, 48)._loglikelihood_tokens(requests)
        for device in ("cpu", "cuda")
    ]
    for (one, _), (two, _) in zip(*scores, strict=True):
        assert one == pytest.approx(two, abs=1e-3)


def test_a_process_of_its_own_on_the_gpu(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "dense")
    pocketllm.compress(source, tiny.settings(), tmp_path / "c")
    for folder, mode in ((source, probe.DENSE), (tmp_path / "c", "packed")):
        found = probe.run(probe.Probe(str(folder), mode, "cuda", 1, 8, 40, 3, 5.0))
        assert found["peak_bytes"] >= found["loaded_bytes"] > 0


def test_recovery(tmp_path: Path) -> None:
    """Distillation, with the teacher in memory and on the disk, and LoRA reach what they reach on the CPU."""
    source = tiny.save(tmp_path / "dense")
    pocketllm.compress(source, tiny.calibrated(tiny.settings()), tmp_path / "c")
    (tmp_path / "t.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    common = {"texts": (str(tmp_path / "t.txt"),), "context": 24, "steps": 6}
    loop = pocketllm.LoopConfig(batch_size=4, dtype="float32", micro_batch=2, gradient_checkpointing=True)
    config = pocketllm.DistillConfig(**common, validation_windows=4, lr_codebook=1e-2, loop=loop)
    tuned = [
        pocketllm.distill(
            tmp_path / "c", tmp_path / f"o{n}", config, device=device, teacher_on_disk=on_disk
        ).kl_stored
        for n, (device, on_disk) in enumerate([("cpu", False), ("cuda", False), ("cuda", True)])
    ]
    assert tuned[1:] == pytest.approx([tuned[0]] * 2, rel=0.02)
    pytest.importorskip("peft")
    adapter = pocketllm.LoraTuneConfig(**common, rank=4, learning_rate=1e-2, loop=loop)
    losses = [
        pocketllm.lora(tmp_path / "c", tmp_path / f"a-{device}", adapter, device=device).loss_stored
        for device in ("cpu", "cuda")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
