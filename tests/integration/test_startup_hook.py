"""Programs that do not import pocketllm load compressed models right, wherever the package is installed."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import venv
from pathlib import Path
from typing import Any

import pytest
import torch

import pocketllm
import pocketllm_startup
from tests import tiny

ROOT = Path(__file__).parents[2]
TOKENS = list(range(3, 20))
LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.inference_mode():
    torch.save(model(torch.tensor([{tokens}])).logits, sys.argv[2])
"""
HAS_FORMAT = "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m; print('pocketllm' in m)"
TASK = """
task: words
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: loglikelihood
doc_to_text: "there were {{{{n}}}}"
doc_to_target: " {{{{text}}}}"
metric_list:
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
"""
MODULES = "import sys; print(*sys.modules)"


class Python:
    """An environment of its own that borrows every package of this one but pocketllm."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, symlinks=True)
        self.program = folder / "bin" / "python"
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        self.packages = folder / "lib" / version / "site-packages"
        # A folder that a .pth file names is searched, but its own .pth files are not read.
        borrowed = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
        (self.packages / "zz_borrowed.pth").write_text("\n".join(borrowed))

    def __call__(self, code: str, *arguments: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.run("-c", code, *arguments, **environment)

    def run(self, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.program, *arguments],
            capture_output=True,
            text=True,
            check=True,
            cwd=self.packages,
            env=self.environment(**environment),
        )

    def environment(self, **changes: str) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", pocketllm_startup.OFF)}
        return {**kept, **changes}


def install(python: Python, build: str, wheels: Path) -> None:
    """Build with this function of hatchling, and install as pip does."""
    pytest.importorskip("hatchling", reason="hatchling, of the extra `dev`, builds the package")
    code = f"import sys; from hatchling.build import {build} as build; build(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, wheels], check=True, cwd=ROOT, capture_output=True)
    command = [sys.executable, "-m", "pip", "--python", python.program, "install", "-q", "--no-deps"]
    subprocess.run([*command, "--no-index", *wheels.glob("*.whl")], check=True, capture_output=True)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Python:
    return Python(tmp_path_factory.mktemp("bare"))


@pytest.fixture(scope="module", params=["build_wheel", "build_editable"])
def installed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Python:
    python = Python(tmp_path_factory.mktemp("installed"))
    install(python, request.param, tmp_path_factory.mktemp("wheels"))
    return python


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hook")
    pocketllm.compress(tiny.save(folder / "dense"), tiny.settings(), folder / "out")
    return folder / "out"


def test_a_program_that_knows_nothing_of_it_gets_the_right_logits(
    installed: Python, compressed: Path, tmp_path: Path
) -> None:
    done = installed(LOAD.format(tokens=TOKENS) + HAS_FORMAT, compressed, tmp_path / "logits.pt")
    assert done.stdout.strip() == "True"
    model, _ = pocketllm.load(compressed)
    with torch.inference_mode():
        wanted = model(torch.tensor([TOKENS])).logits
    assert torch.allclose(torch.load(tmp_path / "logits.pt"), wanted, atol=1e-5), done.stderr


@pytest.mark.parametrize("installed", ["build_wheel"], indirect=True)
def test_lm_eval_measures_the_compressed_model(installed: Python, compressed: Path, tmp_path: Path) -> None:
    """Started as its users start it: the same perplexity as of the model that pocketllm.load returns."""
    data = tmp_path / "words.jsonl"
    rows = [{"n": n, "text": text} for n, text in enumerate(("a bright sun", "water", "stones", "no"))]
    data.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "words.yaml").write_text(TASK.format(data=data))
    arguments = f"--model hf --model_args pretrained={compressed},dtype=float32 --tasks words --device cpu"
    places = ["--include_path", tmp_path, "--output_path", tmp_path / "out"]
    cache = {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    installed.run("-m", "lm_eval", "run", *arguments.split(), *places, **cache)
    (written,) = (tmp_path / "out").glob("*/results_*.json")
    found = json.loads(written.read_text())["results"]["words"]["perplexity,none"]
    model, tokenizer = pocketllm.load(compressed, dtype=torch.float32)
    likelihoods = []
    for row in rows:
        context, whole = (
            tokenizer(f"there were {row['n']}{rest}").input_ids for rest in ("", f" {row['text']}")
        )
        with torch.inference_mode():
            log_p = model(torch.tensor([whole])).logits[0].log_softmax(dim=-1)
        likelihoods.append(sum(float(log_p[n - 1, whole[n]]) for n in range(len(context), len(whole))))
    assert found == pytest.approx(math.exp(-sum(likelihoods) / len(rows)), rel=1e-4)


@pytest.mark.parametrize("installed", ["build_wheel"], indirect=True)
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("fastapi", "uvicorn", "openai")),
    reason="transformers serve wants transformers[serving]",
)
def test_transformers_serve_runs_the_compressed_model(
    installed: Python, compressed: Path, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["-m", "transformers.cli.transformers", "serve", compressed, "--device", "cpu"]
    command += ["--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]
    body = {"model": str(compressed), "prompt": "hello world", "max_tokens": 12, "temperature": 0}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [installed.program, *command], stdout=log, stderr=log, env=installed.environment(), cwd=tmp_path
        )
        try:
            answer = ask(f"http://127.0.0.1:{port}/v1/completions", body)
        finally:
            server.terminate()
            server.wait(30)
    model, tokenizer = pocketllm.load(compressed, dtype=torch.float32)
    prompt = tokenizer("hello world", return_tensors="pt")
    with torch.inference_mode():
        ids = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    said = (tmp_path / "log").read_text()
    assert answer["choices"][0]["text"] == tokenizer.decode(ids, skip_special_tokens=True), said


def ask(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """The answer of a server that may still be starting."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    for _ in range(90):
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                found: dict[str, Any] = json.load(answer)
                return found
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ConnectionError):
                raise
            time.sleep(1)
    raise AssertionError(f"no server answered at {url}")


def test_what_python_loads_when_it_starts(installed: Python, bare: Python) -> None:
    """One small module more, and nothing that this one needs."""
    added = set(installed(MODULES).stdout.split()) - set(bare(MODULES).stdout.split())
    assert added == {"pocketllm_startup"}
    assert installed("import pocketllm_startup as s; print(s.started)").stdout.strip() == "True"


def test_it_can_be_switched_off(installed: Python) -> None:
    """Where it is not, the same line prints True (`test_a_program_that_knows_nothing_of_it_...`)."""
    assert installed(HAS_FORMAT, **{pocketllm_startup.OFF: "1"}).stdout.strip() == "False"


@pytest.mark.parametrize("installed", ["build_wheel"], indirect=True)
def test_the_import_works_where_it_is_switched_off(installed: Python) -> None:
    """And the module that was waited for is as it was: its loader is Python's own, and asking for its spec does not
    use up the hook.
    """
    code = (
        "import sys, importlib.util, pocketllm; name = 'transformers.quantizers.auto'\n"
        "importlib.util.find_spec(name)\n"
        f"{HAS_FORMAT}; print(type(sys.modules[name].__loader__).__name__, end=' ')\n"
        "print(type(sys.modules[name].__spec__.loader).__name__)"
    )
    done = installed(code, **{pocketllm_startup.OFF: "1"})
    assert done.stdout.split() == ["True", "SourceFileLoader", "SourceFileLoader"]


def test_python_starts_where_the_package_is_half_removed(tmp_path: Path) -> None:
    python = Python(tmp_path / "half")
    shutil.copy(ROOT / "src" / "pocketllm_startup.pth", python.packages)
    done = python("print('started')")
    assert (done.stdout.strip(), done.stderr) == ("started", "")
    (python.packages / "pocketllm_startup.py").write_text("raise OSError('damaged')")
    done = python("print('started')")
    assert (done.stdout.strip(), done.stderr) == ("started", "")
    shutil.copy(ROOT / "src" / "pocketllm_startup.py", python.packages)
    done = python(HAS_FORMAT)
    assert done.stdout.strip() == "False"
    assert "cannot load models compressed by pocketllm: ModuleNotFoundError" in done.stderr


def test_missing_modules_are_missing() -> None:
    finder = pocketllm_startup._Finder()
    assert finder.find_spec("json", None) is None
    assert finder.find_spec("transformers.quantizers.auto", []) is None
