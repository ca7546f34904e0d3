#!/usr/bin/env bash
# One command of at most ten minutes for a lent GPU: gpu_visit.sh PARTS [SECONDS], say "srqb", "ce", "fd", "g", "hi".
# First everything once, side by side on all cores, for at most WARM seconds (default 150): compiling takes longer than
# measuring. The kernels' tests are among it where PARTS has an "a", and a real run of recipes/124m.yaml on the texts in
# .gpudata, and a word with what came of it, where it has a "p". Then each part by itself.
# Needs python3 with torch, triton and pytest; wheels of rivals and of torchao are taken from .whl where there are some, and
# kernels that gpu_cache.sh has compiled from .tc: then training, decoding and growth need no warming.
# Its report and its logs go into $OUT (default: here).
set -uo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
parts="${1:?letters of the parts}" limit="${2:-590}" warm="${WARM:-150}" out="${OUT:-.}" logs="$(mktemp -d)"
if compgen -G ".whl/*.whl" >/dev/null; then
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$logs/site" .whl/*.whl
  export PYTHONPATH="$logs/site:$PYTHONPATH"
fi
if [[ -f .tc/kernels.tar.xz ]]; then # of gpu_cache.sh
  export TRITON_CACHE_DIR=/tmp/mm-kernels TORCHINDUCTOR_CACHE_DIR=/tmp/mm-kernels/inductor
  mkdir -p "$TRITON_CACHE_DIR" && tar xJf .tc/kernels.tar.xz -C "$TRITON_CACHE_DIR"
fi
nvidia-smi --query-gpu=name,driver_version,clocks.sm,memory.used --format=csv,noheader || true
python3 -c "import torch, triton; print('torch', torch.__version__, 'triton', triton.__version__)"

once() { # once PART i/n: untimed, its log beside the others
  timeout -s INT -k 5 "$warm" python3 -m tests.benchmarks.gpu_visit --warm --parts "$1" --share "$2" --out "$logs" \
    >"$logs/warm-$1-${2%/*}.log" 2>&1 &
}
if [[ "$parts" == *a* ]]; then
  OMP_NUM_THREADS=1 MM_AUTOTUNE=0 nice timeout -s INT -k 10 "$warm" python3 -W ignore -m pytest ${TESTS:-tests/kernels tests/model/test_graphed.py tests/generation/test_real_models.py} \
    -k "triton or on_a_gpu" -p tests.helpers.failures_at_once -q --tb=no -n "${TESTERS:-8}" >"$out/tests.log" 2>&1 &
fi
if [[ "$parts" == *p* ]]; then
  (
    timeout "$((warm + 20))" python3 -m mmcli pretrain recipes/124m.yaml --overwrite --set name=visit \
      --set 'data.sources=[{path: .gpudata}]' --set tokenizer.train_megabytes=3 --set training.batch_size=16 \
      --set training.tokens=1e7 --set training.warmup_steps=20 >"$out/pretrain.log" 2>&1
    cp runs/visit/metrics.jsonl "$out/pretrain-metrics.jsonl"
    echo "Once upon a time there was" | timeout 60 python3 -m mmcli chat runs/visit --max-new-tokens 60 >"$out/chat.log" 2>&1
  ) &
fi
parts="${parts//[ap]/}"
for ((n = 0; n < ${#parts}; n++)); do
  part="${parts:n:1}"
  case "$part" in
    [srq]) for i in 0 1 2; do once "$part" "$i/3"; done ;;
    [efghij]) [[ -f .tc/kernels.tar.xz ]] || once "$part" 0/1 ;;
    *) once "$part" 0/1 ;;
  esac
done
wait
echo "== side by side: $SECONDS s"
grep -E "error|Error" "$logs"/warm-*.log | sort | uniq -c | sort -rn | head -20
cat "$logs"/warm-*.log >"$out/warm.log"
tail -c 4000 "$out/tests.log" 2>/dev/null
timeout -s INT -k 10 "$((limit - SECONDS))" python3 -m tests.benchmarks.gpu_visit --parts "$parts" --out "$out" 2>&1 |
  tee "$out/visit-$parts.log"
