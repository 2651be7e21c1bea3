"""Distillation of matrices that are stored dense: embedding and head where they are kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import pocketllm
from pocketllm.format.rewrite import stored_sizes
from pocketllm.recover.distill import dry_run_distill
from tests import tiny
from tests.recovery import SENTENCE, config

EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dense model `m`, its compressed form `c` whose embedding is dense, and a text `t.txt`."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dense")
    source = tiny.save(folder / "m", tie_word_embeddings=request.param)
    pocketllm.compress(source, tiny.calibrated(tiny.settings(keep_embeddings=True)), folder / "c")
    (folder / "t.txt").write_text(SENTENCE * 40)
    return folder


def test_they_are_tuned_and_no_byte_is_added(made: Path, tmp_path: Path) -> None:
    with_it = pocketllm.distill(made / "c", tmp_path / "with", config(made, lr_dense=3e-2, lr_norm=1e-4))
    without = pocketllm.distill(made / "c", tmp_path / "without", config(made, lr_dense=0, lr_norm=1e-4))
    assert with_it.kl_stored < without.kl_stored < without.kl_before
    assert stored_sizes(tmp_path / "with")[0] == stored_sizes(made / "c")[0]
    before, tuned, still = (
        load_file(p / "model.safetensors") for p in (made / "c", tmp_path / "with", tmp_path / "without")
    )
    dense = [key for key, value in before.items() if value.ndim == 2 and not key.startswith("pocketllm.")]
    assert EMBEDDING in dense
    assert all(torch.equal(before[key], still[key]) for key in dense)
    assert not any(torch.equal(before[key], tuned[key]) for key in dense)


@pytest.mark.parametrize("lr_dense", [1e-3, 0.0])
def test_a_dry_run_counts_what_is_trained(lr_dense: float, made: Path, tmp_path: Path) -> None:
    done = pocketllm.distill(made / "c", tmp_path / "o", config(made, lr_dense=lr_dense))
    planned = dry_run_distill(made / "c", config(made, lr_dense=lr_dense))["trained_parameters"]
    assert planned == {name: count for name, count in done.trained_parameters.items() if count}
    assert ("dense matrices" in planned) == (lr_dense > 0)
