#!/usr/bin/env bash
# The benchmarks on a GPU in one command: every question of gpu.py, then the training benchmark where the hippocampus
# is given: 5 minutes for each algorithm, GPU use, peak memory, Dice.
#
#   bash benchmarks/gpu.sh [--out OUT] [DATA/hippocampus]
#   bash benchmarks/gpu.sh --dry [--out OUT]      # on a CPU, small: to see that all of it works, in minutes
#
# Takes the Python of $PYTHON (default python3) where that has torch and autoseg's dependencies, else makes .venv-gpu
# here. What is done is not done again. Result: OUT/*.json, OUT/gpu/*.json and tables.
set -euo pipefail
dry='' data='' out=gpu_results
while (($#)); do
    case $1 in
        --dry) dry=1 ;;
        --out) out=${2:?--out wants a folder}; shift ;;
        -*) echo "unknown: $1" >&2; exit 2 ;;
        *) data=$(realpath "$1") ;;
    esac
    shift
done
mkdir -p "$out"
out=$(realpath "$out")
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
ready='import torch, monai, pydantic, nibabel, cc3d, fire, optuna, sklearn, einops, jinja2'
if [[ -z $dry ]]; then ready+='; assert torch.cuda.is_available()'; fi
if ! "$python" -c "$ready" 2>/dev/null; then
    test -x .venv-gpu/bin/python || "$python" -m venv .venv-gpu
    python=.venv-gpu/bin/python
    # The version that constraints.txt pins; pip takes the index's usual build of it, on Linux that for CUDA.
    "$python" -m pip install -q "$(sed -n 's/^\(torch==[0-9.]*\).*/\1/p' constraints.txt)"
    "$python" -m pip install -q -e .
    "$python" -c "$ready" || { echo "torch finds no GPU here: $("$python" -c 'import torch; print(torch.__version__)')" >&2; exit 1; }
fi
failed=0
if [[ -n $dry ]]; then
    "$python" benchmarks/gpu.py --output "$out" --device cpu --small ${PARTS:+--part $PARTS} ${ALGOS:+--algos $ALGOS} || failed=$?
    exit "$failed"
fi
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader || true
"$python" benchmarks/gpu.py --output "$out" ${PARTS:+--part $PARTS} ${ALGOS:+--algos $ALGOS} || failed=$?
if [[ -n $data ]]; then
    "$python" benchmarks/train.py throughput --hippocampus "$data" --output "$out" || failed=$?
    "$python" benchmarks/train.py gpu --hippocampus "$data" --output "$out" --seeds "${SEEDS:-0}" || failed=$?
fi
exit "$failed"
