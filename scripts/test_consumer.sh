#!/usr/bin/env bash
# Installs a build into a temporary folder, then builds and runs tests/consumer against what was installed.
#
#     scripts/test_consumer.sh [BUILD]       BUILD: a finished build directory, default build
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

build=${1:-build}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The same LibTorch that the library was built with.
torch_dir=$(sed -n 's/^Torch_DIR:[A-Z]*=//p' "$build/CMakeCache.txt")
cmake --install "$build" --prefix "$work/prefix" >/dev/null
"$work/prefix/bin/baseq" --version
cmake -S tests/consumer -B "$work/build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_PREFIX_PATH="$work/prefix" \
  -DTorch_DIR="$torch_dir" >/dev/null
cmake --build "$work/build"
"$work/build/consumer"
