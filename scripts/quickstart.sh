#!/usr/bin/env bash
# From a fresh clone to a table: builds baseq, makes a SmolLM2-135M-Instruct checkpoint, quantizes it with the recipes
# below, evaluates every result on WikiText-2 and prints one table. What runs/ already holds is not made again.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

recipes=(rtn-w4a4kv4 quarot-w4a4kv4 baseq-plus-w4a4kv4)
model=SmolLM2-135M-Instruct
calibration=data/smollm2-calibration-16x512.safetensors
# Five windows keep the whole script within a quarter of an hour on two cores; results worth quoting take 20.
evaluation=(--text data/wikitext2-test.txt --max-windows 5)

# make_json FILE COMMAND... runs COMMAND --json FILE unless FILE exists; a file that exists is complete.
make_json() {
  local file=$1
  shift
  [[ -e $file ]] && return
  "$@" --json "$file.partial"
  mv "$file.partial" "$file"
}

echo "== build"
cmake -B build -G Ninja -DCMAKE_BUILD_TYPE=Release >/dev/null
cmake --build build --target baseq_cli

echo "== checkpoint"
install_requirements scripts/requirements.txt
mkdir -p runs
[[ -d runs/$model ]] || $venv_python scripts/smollm2_checkpoint.py runs/$model
make_json runs/$model-eval.json build/baseq eval runs/$model "${evaluation[@]}"

for recipe in "${recipes[@]}"; do
  echo "== $recipe"
  # --force: a directory without its JSON file is left over from a run that was interrupted.
  make_json "runs/$recipe-quantize.json" build/baseq quantize runs/$model --recipe "$recipe" \
    --calibration $calibration --output "runs/$recipe" --force
  make_json "runs/$recipe-eval.json" build/baseq eval "runs/$recipe" "${evaluation[@]}" --reference runs/$model
done

echo "== results"
$venv_python scripts/results_table.py runs $model "${recipes[@]}"
