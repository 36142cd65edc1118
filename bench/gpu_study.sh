#!/bin/sh
# Starts on GSM8K on a machine with one GPU and no network: rates by a sweep, then seeds with graded answers.
# What is done within LIMIT seconds (default 440) is kept: $OUT/gpu_study.tar.gz holds the settings, results, graded
# answers and pages of both studies, of which `headstart report` makes the pages anew.
#   MODEL=smollm2.gguf DATA=.gpu/data OUT=results bench/gpu_study.sh --workers 8
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
RUNS=${RUNS:-runs/gpu_gsm8k}
# Several runs on one GPU take turns, kernel by kernel, unless NVIDIA's multi-process service lets them in together.
if command -v nvidia-cuda-mps-control >/dev/null; then
    CUDA_MPS_PIPE_DIRECTORY=$(mktemp -d)
    CUDA_MPS_LOG_DIRECTORY=$CUDA_MPS_PIPE_DIRECTORY
    export CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
    if nvidia-cuda-mps-control -d; then
        trap 'echo quit | nvidia-cuda-mps-control' EXIT
    else
        unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
    fi
fi
PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}src:." HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1 \
    timeout -k 5 "${LIMIT:-440}" "$PYTHON" -W ignore -m bench.gpu_study --out "$RUNS" --model "${MODEL:-smollm2}" \
    --seconds "$((${LIMIT:-440} - 40))" ${DATA:+--data "$DATA"} "$@"
code=$?
[ "$code" -eq 124 ] && echo "time is up: what is done is kept"
find "$RUNS" \( -name '*.json' -o -name 'report.*' \) | grep -v -e /start/ -e /starts/ -e /trained/ -e /trainer/ |
    tar -czf "${OUT:-.}/gpu_study.tar.gz" -T -
exit "$code"
