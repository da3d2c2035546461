#!/usr/bin/env bash
# What can only be seen on a GPU, in about ten minutes, without a network:
#
#     scripts/cuda_check.sh [DIRECTORY]     DIRECTORY: of the models and results, default cuda_check
#
# Needs a LibTorch for CUDA and nvcc (see README.md) and one GPU. Quantizes a tiny model and two layers of width 4096 with
# four recipes on the CPU and on the GPU, twice on the GPU, once killed and resumed, and prints a table: seconds,
# perplexity on both, whether two equal runs and the resumed one gave the same bytes. It fails where perplexities differ
# by more than 1e-3 (round to nearest) or 2 % (others), or bytes differ. It has not been run yet: docs/gpu.md.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
work=${1:-cuda_check}
mkdir -p "$work"

nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
cmake --preset dev >/dev/null
cmake --build build --target baseq_cli
baseq=$PWD/build/baseq
if ! readelf -d "$baseq" | grep -q torch_cuda; then
  echo "cuda_check: $baseq is not linked with torch_cuda: LibTorch is one for the CPU" >&2
  exit 1
fi
"$baseq" --version

failed=0
say() { printf '%-8s %-22s %-10s %s\n' "$@"; }
fail() { echo "FAILED: $*" >&2; failed=1; }

[[ -d $work/tiny ]] || cp -r tests/data/tiny_llama_base "$work/tiny"
[[ -d $work/wide ]] || $venv_python scripts/synthetic_checkpoint.py "$work/wide" --layers 2 --vocab 2048
$venv_python - "$work" <<'PYTHON'
import random
import sys

import torch
from safetensors.torch import save_file

random.seed(1)
for name, vocabulary, windows, tokens in (("tiny", 128, 8, 64), ("wide", 2048, 8, 512)):
    ids = [[random.randrange(vocabulary) for _ in range(tokens)] for _ in range(windows)]
    save_file({"input_ids": torch.tensor(ids)}, f"{sys.argv[1]}/{name}.safetensors")
PYTHON

quantize() {  # MODEL RECIPE OUTPUT OPTIONS...
  local model=$1 recipe=$2 output=$3
  shift 3
  rm -rf "$output"
  "$baseq" quantize "$work/$model" --recipe "$recipe" --calibration "$work/$model.safetensors" --output "$output" \
    --set calibration.num_samples=8 --set "calibration.seq_len=$([[ $model == tiny ]] && echo 64 || echo 512)" \
    $([[ $model == tiny && $recipe != *w4a4* ]] && echo "--set grids.weights.group_size=32") --quiet "$@" >/dev/null
}
perplexity() {
  "$baseq" eval "$1" --tokens "$work/$2.safetensors" --device cpu --quiet --json - |
    $venv_python -c 'import json, sys; print(json.load(sys.stdin)["perplexity"])'
}
same() { cmp -s "$1/model.safetensors" "$2/model.safetensors"; }

say model recipe seconds "perplexity cpu / cuda, twice, resumed"
for model in tiny wide; do
  for recipe in rtn-w4a16 gptq-w4a16-g64 baseq-w4a4kv4 fbquant-w3a16-g64-r16; do
    out=$work/out-$model-$recipe
    quantize $model $recipe "$out-cpu"
    start=$(date +%s.%N)
    quantize $model $recipe "$out-a" --device cuda
    seconds=$($venv_python -c "import time; print(f'{time.time() - $start:.1f}')")
    quantize $model $recipe "$out-b" --device cuda
    same "$out-a" "$out-b" && twice=same || { twice=differ; fail "$model $recipe: two runs differ"; }
    rm -rf "$out-work"
    resumed=-
    if [[ $recipe != rtn* ]]; then
      ( quantize $model $recipe "$out-c" --device cuda --work "$out-work" ) & pid=$!
      sleep "$($venv_python -c "print($seconds * 0.6)")"
      kill -INT -- $(pgrep -P $pid) $pid 2>/dev/null || true
      wait $pid || true
      [[ -d $out-c ]] || "$baseq" quantize --resume "$out-work" --quiet >/dev/null
      same "$out-a" "$out-c" && resumed=same || { resumed=differ; fail "$model $recipe: the resumed run differs"; }
    fi
    cpu=$(perplexity "$out-cpu" $model) cuda=$(perplexity "$out-a" $model)
    limit=$([[ $recipe == rtn* ]] && echo 1e-3 || echo 2e-2)
    $venv_python -c "exit(abs($cuda / $cpu - 1) > $limit)" || fail "$model $recipe: perplexity $cpu, on the GPU $cuda"
    say $model $recipe "$seconds" "$cpu / $cuda, $twice, $resumed"
  done
done
exit $failed
