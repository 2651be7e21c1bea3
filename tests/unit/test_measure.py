"""What calibration measures and keeps: shared by several runs, left behind by killed ones."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from pocketllm.calibrate.calibration import _atomic_folder, calibrate, read_windows
from pocketllm.calibrate.input_hessians import Collector
from pocketllm.codec.hessian import factorize
from pocketllm.compression.pipeline import compress
from pocketllm.errors import ConfigError, OutputError, SourceError, WeightError
from pocketllm.format.output import check_not_nested
from pocketllm.plan.matrices import Matrix
from pocketllm.source.dense_checkpoint import open_dense
from pocketllm.text.read import read_calibration
from tests import tiny


def test_the_faster_of_two_runs_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "outputs"
    with _atomic_folder(folder) as slow:
        assert slow is not None
        (slow / "kept").write_text("slow")
        monkeypatch.setattr(os, "getpid", os.getppid)
        with _atomic_folder(folder) as fast:
            assert fast is not None
            (fast / "kept").write_text("fast")
        assert (slow / "kept").read_text() == "slow"
    assert (folder / "kept").read_text() == "fast"
    assert list(tmp_path.iterdir()) == [folder]


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "outputs.4194305.partial").mkdir()  # above the largest process number
    with _atomic_folder(tmp_path / "outputs"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]


def test_measured_again_where_a_part_is_gone(tmp_path: Path) -> None:
    source, config = open_dense(tiny.save(tmp_path / "dense")), tiny.on_trellis()
    text = read_windows(source, config)
    assert text is not None
    first = calibrate(source, text, config, "cpu", tmp_path / "kept")
    for path in (tmp_path / "kept").glob("sensitivity-*"):
        path.unlink()
    again = calibrate(source, text, config, "cpu", tmp_path / "kept")
    assert first.outputs == again.outputs
    assert first.sensitivity.importance == again.sensitivity.importance


def test_an_override_has_to_fit_a_matrix(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'\*norm\*': matches no matrix .* names look like 'model\."):
        compress(tiny.save(tmp_path / "m"), tiny.on_trellis(overrides=(("*norm*", 4.0),)), tmp_path / "out")


def test_an_output_inside_the_model_or_around_it(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "dense")
    before = sorted(folder.rglob("*"))
    with pytest.raises(OutputError, match=r"small: is inside .*dense, which must stay unchanged"):
        compress(folder, tiny.on_trellis(), folder / "small")
    with pytest.raises(
        OutputError, match=r": contains .*dense, which must stay unchanged; choose another output folder"
    ):
        check_not_nested(tmp_path, folder)  # to replace it would remove the model
    assert sorted(folder.rglob("*")) == before


def test_strings_of_json_lines_may_hold_any_separator(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one\u2028two\x85three"}\n', encoding="utf-8")
    assert read_calibration(path) == "one\u2028two\x85three"
    path.write_text('{"text": "one"}\n{"text": \n', encoding="utf-8")
    with pytest.raises(SourceError, match=r"rows\.jsonl: line 2 is not JSON"):
        read_calibration(path)


def test_a_text_without_a_name() -> None:
    with pytest.raises(SourceError, match="got an empty name"):
        read_calibration("")


def test_numbers_that_overflow() -> None:
    with pytest.raises(WeightError, match="NaN or Inf"):
        factorize(torch.full((4, 4), torch.inf), 2)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    matrix = Matrix("0.weight", (4, 4), 4, 4, "0", True)
    collector = Collector(model, [matrix])
    with collector.watching(), collector.batch({}):
        model(torch.full((1, 3, 4), 1e30))
    with pytest.raises(SourceError, match=r"0\.weight: the inputs of this layer overflow"):
        collector.inputs("cpu")
