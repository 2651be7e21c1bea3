"""`pocketllm bench`: what it measures, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

import pocketllm
from pocketllm import evaluate
from pocketllm.errors import ConfigError, LoadError
from pocketllm.evaluate import BenchConfig, BenchRun, bench
from tests import tiny
from tests.commands import Run
from tests.packed_weights import needs_compiler

SHORT = BenchConfig(prompt_tokens=8, new_tokens=3, threads=1, rounds=1)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A compressed model and the dense one."""
    folder = tmp_path_factory.mktemp("bench")
    dense = tiny.save(folder / "dense")
    pocketllm.compress(dense, tiny.on_trellis(), folder / "small")
    return str(folder / "small"), str(dense)


@needs_compiler
def test_every_mode_and_the_dense_model(
    models: tuple[str, str], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, dense = models
    said: list[tuple[float, str]] = []
    found = bench([small], ["auto", "dense"], SHORT, dense, lambda share, what: said.append((share, what)))
    assert [(r.model, r.mode) for r in found] == [
        (small, "packed"),
        (small, "dense"),
        (dense, "checkpoint"),
    ]
    assert said == [(0.0, f"{small}, auto"), (1 / 3, f"{small}, dense"), (2 / 3, f"{dense}, checkpoint")]
    for one in found:
        assert one.dtype == "bfloat16" and one.threads == 1
        assert min(one.load_seconds, one.prompt_tokens_per_second, one.tokens_per_second) > 0
    assert found[0].weights_bytes < found[2].weights_bytes == found[1].weights_bytes
    asked: list[object] = []
    monkeypatch.setattr(evaluate, "bench", lambda *given: asked.append(given[:4]) or found)
    options = ["--prompt-tokens", "8", "--new-tokens", "3", "--rounds", "1", "--threads", "1"]
    options += ["--mode", "auto,dense", "--against", dense]
    assert [BenchRun(**r) for r in run.json("bench", small, *options)["runs"]] == found
    assert asked == [([small], ["auto", "dense"], SHORT, dense)]
    code, out, _ = run("bench", small, *options)
    assert code == 0 and "packed" in out and "tokens/s" in out


def test_what_is_refused(models: tuple[str, str], tmp_path: Path) -> None:
    small, dense = models
    with pytest.raises(ConfigError, match="bench: got no model"):
        bench([], ["packed"], SHORT)
    with pytest.raises(ConfigError, match="mode: got fast, wanted one or more of packed, dense, auto"):
        bench([small], ["packed", "fast"], SHORT)
    with pytest.raises(ConfigError, match="mode: got none"):
        bench([small], [], SHORT)
    with pytest.raises(ConfigError, match="is not a compressed model; name a dense one with --against"):
        bench([dense], ["packed"], SHORT)
    with pytest.raises(ConfigError, match="with --against"):
        bench([small], ["packed"], SHORT, small)
    with pytest.raises(ConfigError, match="positions; lower it"):
        bench([small], ["packed"], BenchConfig(prompt_tokens=10**6))
    for field in ("prompt_tokens", "new_tokens", "rounds"):
        with pytest.raises(ConfigError, match=f"{field}: got 0, wanted 1 or more"):
            BenchConfig(**{field: 0})
    for threads in (-1, 10**6):
        with pytest.raises(ConfigError, match=rf"threads: got {threads}, wanted 0 \(all cores\) to 1024"):
            BenchConfig(threads=threads)
    with pytest.raises(ConfigError, match="dtype: got 'int8'"):
        BenchConfig(dtype="int8")


def test_a_process_that_fails_says_why(models: tuple[str, str], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in Path(models[0]).iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    tensors = bytearray((broken / "model.safetensors").read_bytes())
    tensors[-1] ^= 1
    (broken / "model.safetensors").write_bytes(tensors)
    with pytest.raises(LoadError, match=r"broken: cannot be run in mode dense \(.*model\.safetensors"):
        bench([str(broken)], ["dense"], SHORT)
