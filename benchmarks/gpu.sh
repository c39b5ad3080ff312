#!/usr/bin/env bash
# Checks and times the CUDA kernels, then times a training step, and fails where it waits for the device; one table.
#
#   benchmarks/gpu.sh                        on a machine with CUDA
#   benchmarks/gpu.sh --device cpu --quick   a smoke test
#
# Needs Python 3.11 or newer with torch 2.11 or newer and the triton that came with it; PYTHON names another
# interpreter than python3. The training step also needs pydantic, safetensors and rich: what is missing is fetched into
# .cache/gpu, and where that cannot be, the kernels are measured without it.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}:.cache/gpu" PYTHONUNBUFFERED=1

can_train() { "$PYTHON" -c 'import lm_saes; lm_saes.Trainer, lm_saes.SparseAutoEncoder' 2>/dev/null; }

on_cuda=true
[[ " $* " != *" --device cpu "* ]] || on_cuda=false
if $on_cuda && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "no CUDA device: run it on a machine with one, or try 'benchmarks/gpu.sh --device cpu --quick'" >&2
    exit 1
fi

failed=0
"$PYTHON" benchmarks/gpu_kernels.py "$@" || failed=$?

can_train || "$PYTHON" -m pip install -qq --target .cache/gpu pydantic safetensors rich >/dev/null 2>&1 || true
if can_train; then
    "$PYTHON" benchmarks/gpu_step.py --no-header "$@" || failed=$?
else
    echo "step: not measured, because pydantic, safetensors or rich is missing here and could not be installed"
fi

if $on_cuda && "$PYTHON" -c 'import pytest' 2>/dev/null; then
    echo "odd shapes, against the plain twins:"
    "$PYTHON" -m pytest -c /dev/null --rootdir . --noconftest -q -p no:cacheprovider \
        tests/unit/latents/kernels/twins.py || failed=$?
elif $on_cuda; then
    echo "odd shapes: not checked, because pytest is missing here"
fi
exit "$failed"
