#!/usr/bin/env bash
# The Triton kernels of a card's tests and benchmarks, and what torch.compile makes for its training steps (PARTS, default
# "ejh"), compiled where there is no card: gpu_cache.sh PYTHON [FILE]. PYTHON has the card's versions of Python, torch, Triton
# and torchao. FILE (default: .tc/kernels.tar.xz, which gpu_visit.sh takes along where it lies) is unpacked at the same path
# there, for the cache holds paths. Twenty minutes of two cores; with TESTS=none five, for torch.compile's alone.
set -euo pipefail
cd "$(dirname "$0")/../.."
python="${1:?a python with the torch and triton of the card}" file="${2:-.tc/kernels.tar.xz}"
export PYTHONPATH="$PWD" TRITON_CACHE_DIR=/tmp/mm-kernels TORCHINDUCTOR_CACHE_DIR=/tmp/mm-kernels/inductor PYTHONWARNINGS=ignore
mkdir -p "$(dirname "$file")" "$TRITON_CACHE_DIR"
rm -rf "$TORCHINDUCTOR_CACHE_DIR"
if [[ "${TESTS:-}" != none ]]; then
  rm -rf "${TRITON_CACHE_DIR:?}"/*
  "$python" -m tests.benchmarks.compile_for_hopper --for-a-card
  PYTHONOPTIMIZE=1 MM_AUTOTUNE=0 "$python" -m pytest ${TESTS:-tests/kernels tests/model/test_graphed.py} -k "triton or on_a_gpu" \
    -p tests.helpers.no_card --assert=plain -q --tb=no -n 2 || true # results are no numbers: failures say nothing
fi
"$python" -m tests.benchmarks.compile_without_card --parts "${PARTS:-ejh}" || echo "torch.compile's part is incomplete" >&2
tar --exclude='*.llir' --exclude='*.ttir' --exclude='*.source' --exclude='*.ptx' --exclude='*.ttgir' \
  -C "$TRITON_CACHE_DIR" -cf - . | xz -T2 -6 >"$file"
ls -lh "$file"
