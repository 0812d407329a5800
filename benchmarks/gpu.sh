#!/usr/bin/env bash
# The training benchmark on a GPU in one command: 5 minutes for each algorithm, GPU use, peak memory, Dice.
#
#   bash benchmarks/gpu.sh DATA/hippocampus [OUT]
#
# Takes the Python of $PYTHON (default python3) where that has torch with CUDA and autoseg's dependencies, else makes
# .venv-gpu here. What is done is not done again. Result: OUT/gpu/*.json and a table.
set -euo pipefail
cd "$(dirname "$0")/.."
data=$(realpath "${1:?give the folder of the hippocampus set}")
out=${2:-gpu_results}
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
ready='import torch, monai, pydantic, nibabel, cc3d, fire, optuna, sklearn, einops, jinja2; assert torch.cuda.is_available()'
if ! "$python" -c "$ready" 2>/dev/null; then
    test -x .venv-gpu/bin/python || "$python" -m venv .venv-gpu
    python=.venv-gpu/bin/python
    # The version that constraints.txt pins; pip takes the index's usual build of it, on Linux that for CUDA.
    "$python" -m pip install -q "$(sed -n 's/^\(torch==[0-9.]*\).*/\1/p' constraints.txt)"
    "$python" -m pip install -q -e .
    "$python" -c "$ready" || { echo "torch finds no GPU here: $("$python" -c 'import torch; print(torch.__version__)')" >&2; exit 1; }
fi
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader || true
"$python" benchmarks/train.py throughput --hippocampus "$data" --output "$out"
exec "$python" benchmarks/train.py gpu --hippocampus "$data" --output "$out" --seeds "${SEEDS:-0}"
