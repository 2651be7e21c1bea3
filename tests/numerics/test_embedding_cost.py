"""What errors in embedding and head cost: gradients through scaled embeddings, and rows that the text never shows."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import pocketllm
from pocketllm.calibrate.blocks import BlockStream
from pocketllm.calibrate.embedding_cost import expected_costs
from pocketllm.calibrate.gradients import Head
from pocketllm.codec.index_form import Independent, Trellis
from pocketllm.compression import matrix_encoder
from pocketllm.format.checkpoint import folder_bytes
from pocketllm.plan.matrices import Matrix
from pocketllm.plan.selection import classify
from pocketllm.source.dense_checkpoint import open_dense
from pocketllm.source.folder import load_dense
from tests import tiny
from tests.commands import contents


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_gradient_of_looked_up_rows(architecture: str, tmp_path: Path) -> None:
    """Against autograd through the model up to its first block; Gemma scales its embeddings, GPT-2 adds positions."""
    folder = tiny.save(tmp_path / "dense", architecture)
    ids = torch.tensor([[5, 7, 5, 1, 2, 9]])
    stream = BlockStream(open_dense(folder), ids)
    gradient = torch.randn(1, 6, 36)
    found = stream.embedding_gradient(ids, gradient)
    scale = 36**0.5 if architecture == "gemma3" else 1.0
    torch.testing.assert_close(found, gradient[0] * scale)
    again = BlockStream(open_dense(folder), ids)  # the embedding is as it was
    embedding = stream.model.get_input_embeddings()
    assert torch.equal(embedding.weight, again.model.get_input_embeddings().weight)
    assert embedding.padding_idx == again.model.get_input_embeddings().padding_idx


def test_a_large_vocabulary_is_not_in_memory_in_float32(tmp_path: Path) -> None:
    """The rows of the embedding that the text uses are loaded; the head is as it is stored, and dropped at the end."""
    model = tiny.model(vocab_size=1000).bfloat16()
    model.save_pretrained(tmp_path / "dense")
    ids = torch.tensor([[5, 700, 5, 1, 2, 999]])
    stream = BlockStream(open_dense(tmp_path / "dense"), ids)
    embedding, head = stream.model.get_input_embeddings(), stream.model.get_output_embeddings()
    assert embedding.weight.shape == (5, 36) and head.weight.is_meta
    assert torch.equal(embedding(ids), model.model.embed_tokens.weight[ids].float())
    stream.load_head()
    assert head.weight.dtype == torch.bfloat16
    assert torch.equal(head.weight, model.model.embed_tokens.weight)
    stream.drop_head()
    assert head.weight.is_meta


def test_fisher_information_of_the_rows_of_the_head(tmp_path: Path) -> None:
    """Against the mean over drawn tokens of the squared gradient of the loss."""
    folder = tiny.save(tmp_path / "dense", "qwen3")
    ids = torch.arange(3, 19)[None]
    stream = BlockStream(open_dense(folder), ids, batch=1)
    for _, block in stream:
        stream.hidden = stream.run(block, stream.hidden)
    head = Head(stream, 0)
    head.backward(0)
    model = load_dense(folder, torch.float32)
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state[0]
        p = model.lm_head(hidden).softmax(dim=-1)
    expected = torch.zeros(len(head.rows))
    for token in range(p.shape[1]):  # the exact mean: every token, weighted by its probability
        delta = p.clone()
        delta[:, token] -= 1
        expected += (p[:, token, None] * delta.square() * hidden.square().sum(dim=1, keepdim=True)).sum(dim=0)
    torch.testing.assert_close(
        head.rows, expected, rtol=0.02, atol=1e-4
    )  # the stream may compute in bfloat16


def test_rows_that_the_text_never_shows_still_count() -> None:
    costs = torch.tensor([8.0, 2.0, 0.0, 0.0, 0.0])
    seen = torch.tensor([4, 1, 0, 0, 0])
    counts = torch.tensor([40, 10, 5, 1, 0])
    found = expected_costs(costs, seen, counts)
    assert float(found.sum()) == pytest.approx(10.0)
    assert bool((found[:-1] >= found[1:]).all()) and float(found[-1]) > 0
    # A token of the larger text that the windows lack has the mean cost of an occurrence, at its own frequency.
    discount, total = 1.0, 56.0  # one token occurs once, none twice
    shares = (torch.tensor([40, 10, 5, 1, 0]) - discount).clamp(min=0) + 4 * discount / 5
    one = torch.tensor([(8 + 4 * 2.0) / 8, (2 + 4 * 2.0) / 5, 2.0, 2.0, 2.0])
    wanted = shares / total * one
    torch.testing.assert_close(found, wanted * (10 / wanted.sum()))


def test_an_empty_measurement_costs_nothing() -> None:
    assert torch.equal(
        expected_costs(torch.zeros(3), torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)),
        torch.zeros(3),
    )


def test_rows_encoded_in_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips do not depend on each other: a large embedding is encoded some strips at a time, with the same bytes."""
    folder = tiny.save(tmp_path / "dense", vocab_size=1030, hidden_size=16, head_dim=8, intermediate_size=16)
    config = tiny.on_trellis(4.0)
    groups: list[int] = []
    for name, most in (("one", 1 << 25), ("some", 2 * 258 * 16)):
        monkeypatch.setattr(matrix_encoder, "LARGE_WEIGHTS", most)
        monkeypatch.setattr(matrix_encoder, "GROUP_WEIGHTS", most)
        report = pocketllm.compress(folder, config, tmp_path / name)
        (matrix,) = [m for m in classify(open_dense(folder), config)[0] if not m.in_blocks]
        groups.append(len(matrix_encoder.row_groups(matrix, Trellis(6, 2))))
        assert report.bytes_on_disk == folder_bytes(tmp_path / name)
    assert groups == [1, 2] and matrix.rows % 256 != 0
    assert contents(tmp_path / "one")["model.safetensors"] == contents(tmp_path / "some")["model.safetensors"]


def test_independent_indices_in_groups_that_end_on_a_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Strips of 251 rows of 12 indices: an odd number of bits."""
    folder = tiny.save(tmp_path / "dense", vocab_size=1003)
    config = dataclasses.replace(tiny.target(3.0), vector_len=3)
    for name, most in (("one", 1 << 25), ("some", 1 << 12)):
        monkeypatch.setattr(matrix_encoder, "LARGE_WEIGHTS", most)
        monkeypatch.setattr(matrix_encoder, "GROUP_WEIGHTS", most)
        pocketllm.compress(folder, config, tmp_path / name)
    (matrix,) = [m for m in classify(open_dense(folder), config)[0] if not m.in_blocks]
    groups = matrix_encoder.row_groups(matrix, Independent(32))
    assert [group.stop for group in groups] == [248, 496, 752, 1003]
    assert contents(tmp_path / "one")["model.safetensors"] == contents(tmp_path / "some")["model.safetensors"]


def test_rows_that_depend_on_each_other_stay_together() -> None:
    matrix, form = Matrix("m", (1024, 64), 1024, 64, "m", True, strip_rows=256), Trellis(6, 2)
    assert matrix_encoder.row_groups(matrix, form) == [slice(0, 1024)]
    large = dataclasses.replace(matrix, rows=1 << 20)
    assert len(matrix_encoder.row_groups(large, form)) == 8
    assert matrix_encoder.row_groups(large, form, is_whole=True) == [slice(0, 1 << 20)]
