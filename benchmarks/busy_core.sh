#!/usr/bin/env bash
# How much longer a run takes beside one busy core: alone and beside a shell that counts, in turns.
#
#     benchmarks/busy_core.sh                       a run over a synthetic model, 5 rounds
#     ROUNDS=9 benchmarks/busy_core.sh COMMAND...   any other command
#
# For an idle machine. Prints the median of the times alone and beside the busy core and their ratio, and both again with
# threads that spin as libgomp lets them without the program's limit.
set -euo pipefail
export LC_ALL=C
cd "$(dirname "${BASH_SOURCE[0]}")/.."

rounds=${ROUNDS:-5}
folder=$(mktemp -d)
busy=
cleanup() {
  [[ -z $busy ]] || kill "$busy"
  rm -rf "$folder"
}
trap cleanup EXIT
command=("$@")
if [[ $# -eq 0 ]]; then
  .venv/bin/python scripts/synthetic_checkpoint.py "$folder/model" --layers 4 --hidden 768 --intermediate 2048 --heads 12 \
    --vocab 8192 >/dev/null
  command=(build/baseq quantize "$folder/model" --recipe baseq-plus-w4a4kv4 --calibration data/calibration.txt
    --set calibration.num_samples=4 --set calibration.seq_len=256 --output "$folder/out" --force --quiet)
fi

seconds() {  # of one run
  local start=$EPOCHREALTIME
  "$@" >/dev/null
  awk "BEGIN { print $EPOCHREALTIME - $start }"
}
median() { printf '%s\n' "$@" | sort -n | sed -n "$((($# + 1) / 2))p"; }

# measure NAME VARIABLE... : the runs in turns, so that what else happens on the machine hits both.
measure() {
  local name=$1 alone=() beside=()
  shift
  seconds env "$@" "${command[@]}" >/dev/null  # fills the caches
  for ((i = 0; i < rounds; ++i)); do
    alone+=("$(seconds env "$@" "${command[@]}")")
    while :; do :; done &
    busy=$!
    beside+=("$(seconds env "$@" "${command[@]}")")
    kill "$busy"
    wait "$busy" 2>/dev/null || true
    busy=
  done
  local a b
  a=$(median "${alone[@]}") b=$(median "${beside[@]}")
  printf '%-28s alone %7.2f s   beside a busy core %7.2f s   ratio %.2f\n' "$name" "$a" "$b" "$(awk "BEGIN { print $b / $a }")"
}

unset OMP_WAIT_POLICY GOMP_SPINCOUNT
echo "$(nproc) cores, load $(cut -d' ' -f1 /proc/loadavg): ${command[*]}"
measure "as the program runs"
measure "libgomp's default" GOMP_SPINCOUNT=300000
measure "OMP_WAIT_POLICY=passive" OMP_WAIT_POLICY=passive
