#!/bin/sh
# Runs a benchmark as a processor with AVX2 and nothing newer would: tests/benchmarks/without_avx512.sh python -m tests.benchmarks...
# Ours is compiled for Haswell by $CC (or gcc), and the libraries of the others are told the same (torch.compile vectorizes for AVX2, and
# g++ still has -march=native there). Both sides keep this processor's clock, ports and caches. Its JSON says "instructions": "AVX2".
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
real=$(command -v "${CC:-gcc}" || command -v cc)
printf '#!/bin/sh\n[ "$1" = --version ] && exec %s --version\nexec %s "$@" -march=haswell\n' "$real" "$real" > "$folder/cc"
chmod +x "$folder/cc"
export CC="$folder/cc" MM_CACHE="$folder/cache" TORCHINDUCTOR_CACHE_DIR="$folder/inductor"
export ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2
"$@"
