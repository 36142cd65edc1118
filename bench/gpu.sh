#!/bin/sh
# Measures starts and training steps on a machine with one GPU and writes docs/results/gpu.md (and a copy to $OUT where that is set).
# Needs a Python with torch for that GPU; the other requirements are installed where they are missing.
#   bench/gpu.sh                                   all sections, in at most 400 s
#   bench/gpu.sh --sections pairs --seconds 120    starts against PEFT's own alone
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
"$PYTHON" -c "import torch, sys; sys.exit(not torch.cuda.is_available())" 2>/dev/null || {
    echo "no GPU, or no torch that sees one, in $PYTHON: nothing is measured" >&2
    exit 1
}
"$PYTHON" -c "import peft, transformers, accelerate, rich, typer, psutil" 2>/dev/null ||
    "$PYTHON" -m pip install --quiet peft transformers accelerate safetensors psutil rich typer
PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}src:." HF_HUB_OFFLINE=1 "$PYTHON" -W ignore -m bench.gpu "$@"
if [ -n "${OUT:-}" ]; then
    cp docs/results/gpu.md "$OUT/"
fi
