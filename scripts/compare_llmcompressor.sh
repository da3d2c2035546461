#!/usr/bin/env bash
# GPTQ (4 bits, groups of 64, 16 windows of 512 tokens) by llm-compressor 0.14 and by baseq, in turns on one core.
#
#     scripts/compare_llmcompressor.sh MODEL [WINDOWS] [DIRECTORY] [ROUNDS] [OPTION...]
#
# MODEL is a checkpoint such as SmolLM2-135M-Instruct, WINDOWS the token ids of calibration windows for its tokenizer
# (data/smollm2-calibration-16x512.safetensors). DIRECTORY (build/llmcompressor) gets a virtual environment of its own
# with llm-compressor, whose torch is that of .venv, and both results. Prints the seconds, those the core was busy with it,
# and the peak memory of each whole process: start, calibration, quantization and writing. Each OPTION is one more of
# `baseq quantize`, such as --set calibration.matmul_precision=medium.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
model=${1:?a checkpoint} windows=${2:-data/smollm2-calibration-16x512.safetensors}
directory=${3:-build/llmcompressor} rounds=${4:-2} options=("${@:5}")
baseq=${BASEQ_BINARY:-build/baseq}
mkdir -p "$directory"

python=$directory/venv/bin/python
if ! "$python" -c 'import llmcompressor' 2>/dev/null; then
  python3 -m venv "$directory/venv"
  site=$("$python" -c 'import site; print(site.getsitepackages()[0])')
  .venv/bin/python -c 'import site; print(site.getsitepackages()[0])' >"$site/torch_of_baseq.pth"
  "$python" -m pip install --quiet --disable-pip-version-check 'llmcompressor==0.14.*'
fi

cat >"$directory/quantize.py" <<'PYTHON'
import sys

import datasets
import safetensors.torch
import torch
import transformers
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier

model_path, windows_path, output = sys.argv[1:]
torch.set_num_threads(1)
model = transformers.AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
windows = safetensors.torch.load_file(windows_path)["input_ids"].tolist()
data = datasets.Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * len(w) for w in windows]})
weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
recipe = GPTQModifier(config_groups={"g": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"])
oneshot(model=model, dataset=data, recipe=recipe, max_seq_length=len(windows[0]), num_calibration_samples=len(windows))
model.save_pretrained(output, save_compressed=True)
PYTHON

# What a command takes, into FILE.
measure() {
  local file=$1
  shift
  rm -rf "$directory/out"
  OMP_NUM_THREADS=1 taskset -c 0 "$python" - "$@" >"$file" <<'PYTHON'
import resource, subprocess, sys, time

start = time.monotonic()
run = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
if run.returncode:
    sys.exit(run.stderr[-2000:])
seconds, used = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
print(f"{seconds:.1f} {used.ru_utime + used.ru_stime:.1f} {used.ru_maxrss / 1024:.0f}")
PYTHON
}

printf '%-16s %8s %8s %8s\n' "" seconds "of CPU" MiB
for ((round = 0; round < rounds; ++round)); do
  measure "$directory/theirs" "$python" "$directory/quantize.py" "$model" "$windows" "$directory/out"
  measure "$directory/ours" "$baseq" quantize "$model" --recipe gptq-w4a16-g64 --calibration "$windows" \
    --output "$directory/out" --threads 1 "${options[@]}"
  for who in theirs ours; do
    name=baseq
    [[ $who == theirs ]] && name=llm-compressor
    read -r seconds busy mebibytes <"$directory/$who"
    printf '%-16s %8s %8s %8s\n' "$name" "$seconds" "$busy" "$mebibytes"
  done
done
