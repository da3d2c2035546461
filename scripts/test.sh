#!/usr/bin/env bash
# Everything that has to pass before a change is merged.
#
#     scripts/test.sh              build, layers, formatting, aarch64, C++ tests, Python tests, use of an installed copy
#     scripts/test.sh --sanitize   C++ tests without the slow ones, under AddressSanitizer and UBSan
#     scripts/test.sh --sanitize=thread   C++ tests of what runs on several threads, under ThreadSanitizer
#
# A failing build ends the run; the checks behind it all run, and the exit status tells whether one failed.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

failed=()

# stage NAME COMMAND... prints the name, runs the command, and remembers whether it failed.
stage() {
  local name=$1
  shift
  echo "== $name"
  "$@" || failed+=("$name")
}

finish() {
  if [[ ${#failed[@]} -gt 0 ]]; then
    printf 'FAILED: %s\n' "${failed[@]}"
    exit 1
  fi
  echo "== all passed"
}

# in_two_shards TESTS... runs halves of the tests side by side, for a process for each test spends its time on starting.
# Threads that wait must not spin: there are more of them than cores.
in_two_shards() {
  local -x OMP_WAIT_POLICY=passive GTEST_TOTAL_SHARDS=2
  local log failed=0
  log=$(mktemp)
  GTEST_SHARD_INDEX=0 "$@" >"$log" 2>&1 &
  GTEST_SHARD_INDEX=1 "$@" || failed=1
  wait $! || failed=1
  cat "$log"
  rm "$log"
  return "$failed"
}

# The files of tests/python in two processes, which spend their time on starting programs of one thread.
python_tests() {
  local -x OMP_WAIT_POLICY=passive BASEQ_BINARY="$PWD/build/baseq"
  $venv_python -m pytest -q -n 2 --dist loadfile --durations=10 tests/python
}

check_aarch64() {
  if ! command -v aarch64-linux-gnu-g++ >/dev/null; then
    echo "test: NOT CHECKED whether the kernels compile for aarch64: install g++-aarch64-linux-gnu" >&2
    return
  fi
  scripts/check_aarch64.sh
}

check_format() {
  local folder folders=()
  for folder in include src tests tools benchmarks examples; do
    [[ -d $folder ]] && folders+=("$folder")
  done
  find "${folders[@]}" -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' |
    sort | xargs .venv/bin/clang-format --dry-run --Werror
}

if [[ ${1:-} == --sanitize ]]; then
  stage configure cmake --preset asan
  stage build cmake --build build-sanitize
  [[ ${#failed[@]} -eq 0 ]] || finish
  stage "C++ tests, sanitized" in_two_shards build-sanitize/tests/baseq_tests --gtest_filter='-*Slow'
  finish
elif [[ ${1:-} == --sanitize=thread ]]; then
  stage configure cmake --preset tsan
  stage build cmake --build build-tsan --target baseq_tests
  [[ ${#failed[@]} -eq 0 ]] || finish
  # What calls at::parallel_for, and the tests that start threads.
  threaded='*Conv*:CalibrateLayers*:Int8Weights*:PreparedL*:*/PreparedLayer*:FloatLinear*:Attention.*:Rows.*:IntegerKernels*'
  threaded+=':Hadamard*:Pack*:Quant*:SearchQparams*:Gptq.*:InputFactor*:AllFinite*:Fbquant*:MachineLimits*:Tokenizer.*:SessionTest*'
  # In a process with the sanitizer the threads of MKL's factorizations return wrong pivots; MKL is not ours to test.
  stage "C++ tests on four threads" env OMP_NUM_THREADS=4 MKL_NUM_THREADS=1 TSAN_OPTIONS=halt_on_error=1 \
    build-tsan/tests/baseq_tests --gtest_brief=1 --gtest_filter="$threaded-*Slow"
  finish
elif [[ $# -gt 0 ]]; then
  echo "usage: scripts/test.sh [--sanitize | --sanitize=thread]" >&2
  exit 2
fi

# How a report looks is tested where there is a browser, that the kernels compile for aarch64 where there is a compiler
# for it, runs of several processes where there is MPI, and completions where there are zsh and fish; all say so when there
# is none.
install_programs() {
  local packages=()
  command -v chromium >/dev/null || packages+=(chromium fonts-liberation)
  command -v aarch64-linux-gnu-g++ >/dev/null || packages+=(g++-aarch64-linux-gnu)
  command -v qemu-aarch64 >/dev/null || packages+=(qemu-user)
  command -v zsh >/dev/null || packages+=(zsh)
  command -v fish >/dev/null || packages+=(fish)
  command -v mpicxx >/dev/null || packages+=(libopenmpi-dev openmpi-bin)
  if [[ ${#packages[@]} -gt 0 && $(id -u) -eq 0 ]] && command -v apt-get >/dev/null; then
    apt_install "${packages[@]}" || echo "test: ${packages[*]} could not be installed" >&2
  fi
}

echo "== test environment"
install_torch  # before what depends on it
install_requirements tests/requirements.txt
install_requirements tests/newest-transformers.txt transformers-newest
install_programs

stage configure cmake --preset dev "-DBASEQ_MPI=$(command -v mpicxx >/dev/null && echo ON || echo OFF)"
stage build cmake --build build
[[ ${#failed[@]} -eq 0 ]] || finish
stage layers $venv_python scripts/check_layers.py
stage format check_format
stage aarch64 check_aarch64
stage "C++ tests" in_two_shards build/tests/baseq_tests
stage "C++ tests on a device of their own" in_two_shards build/tests/baseq_device_tests
stage "Python tests" python_tests
stage "installed copy" scripts/test_consumer.sh build
finish
