#!/usr/bin/env bash
# One command of at most ten minutes for a lent GPU: gpu_visit.sh PARTS, say "ab", "cd", "e", "fg", "hi".
# Needs python3 with torch, triton and pytest, and torchao for part h; writes its report and its log into $OUT (default: here).
set -uo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
parts="${1:-abcdefghi}"
out="${OUT:-.}"
nvidia-smi --query-gpu=name,driver_version,clocks.sm,memory.used --format=csv,noheader || true
python3 -c "import torch, triton; print('torch', torch.__version__, 'triton', triton.__version__)"
timeout 590 python3 -m tests.benchmarks.gpu_visit --parts "$parts" --out "$out" 2>&1 | tee "$out/visit-$parts.log"
