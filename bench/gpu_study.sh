#!/bin/sh
# Starts on GSM8K on a machine with one GPU and no network: rates by a sweep, then seeds with graded answers.
# What is done within LIMIT seconds (default 440) is kept: $OUT/gpu_study.tar.gz holds the settings, results and graded
# answers of the runs, of which `python -m bench.gpu_study --only-page` writes the page.
#   MODEL=/tmp/smollm2.gguf DATA=.gpu/data OUT=results bench/gpu_study.sh --workers 8
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
RUNS=${RUNS:-runs/gpu_gsm8k}
PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}src:." HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1 \
    timeout -k 5 "${LIMIT:-440}" "$PYTHON" -W ignore -m bench.gpu_study --out "$RUNS" --model "${MODEL:-smollm2}" \
    ${DATA:+--data "$DATA"} --page "$RUNS/page" "$@"
code=$?
[ "$code" -eq 124 ] && echo "time is up: what is done is kept"
find "$RUNS" -name result.json -o -name run.json -o -name items.json -o -name '*.md' |
    grep -v -e /start/ -e /trained/ | tar -czf "${OUT:-.}/gpu_study.tar.gz" -T -
exit "$code"
