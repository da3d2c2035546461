#!/usr/bin/env bash
# Installs a build into a temporary folder, then builds and runs tests/consumer against what was installed, on a system
# that seems to have neither Eigen nor fmt, and looks at what projects are told where something is missing, and at what a
# shared library offers.
#
#     scripts/test_consumer.sh [BUILD]       BUILD: a finished build directory, default build
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

build=${1:-build}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

root=$PWD
# The same LibTorch that the library was built with.
torch_dir=$(sed -n 's/^Torch_DIR:[A-Z]*=//p' "$build/CMakeCache.txt")
cmake --install "$build" --prefix "$work/prefix" >/dev/null
baseq=$work/prefix/bin/baseq
mkdir "$work/empty"
if [[ -e $baseq ]]; then  # the build has the program
  "$baseq" --version
  # Recipes are found in any folder.
  (cd "$work/empty" && "$baseq" recipes >/dev/null &&
    "$baseq" quantize "$root/tests/data/tiny_llama_base" --recipe rtn-w8a8 --output out --quiet)
fi

# What a shared library offers is baseq's, besides what the standard library and LibTorch have in every user's program too.
for library in "$work"/prefix/lib/libbaseq*.so; do
  [[ -e $library ]] || continue
  readelf -d "$library" | grep -q 'SONAME.*\.so\.[0-9]*\.[0-9]*\]' || { echo "test_consumer: $library has no SONAME with its version"; exit 1; }
  nm -D --defined-only -C "$library" | cut -c20- >"$work/symbols"
  echo "${library##*/}: $(grep -c . "$work/symbols") symbols"
  if grep -vE '\b(baseq|std|c10|at|torch|__gnu_cxx)::' "$work/symbols"; then
    echo "test_consumer: $library offers what is not its own" >&2
    exit 1
  fi
done

# configure SOURCE BINARY OPTION...
configure() {
  cmake -S "$1" -B "$2" -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_PREFIX_PATH="$work/prefix" -DTorch_DIR="$torch_dir" \
    "${@:3}" 2>&1
}

configure tests/consumer "$work/build" -DCMAKE_DISABLE_FIND_PACKAGE_Eigen3=ON -DCMAKE_DISABLE_FIND_PACKAGE_fmt=ON -DCMAKE_DISABLE_FIND_PACKAGE_spdlog=ON >"$work/log" ||
  { cat "$work/log"; exit 1; }
cmake --build "$work/build"
# Also where the system has them, its headers do not come with those of baseq.
if ninja -C "$work/build" -t deps | grep -E '/(Eigen|fmt|spdlog)/'; then
  echo "test_consumer: a public header includes Eigen, fmt or spdlog" >&2
  exit 1
fi
cp -r tests/data/tiny_llama_base "$work/model"
cp tests/consumer/tokenizer.json "$work/model"
"$work/build/consumer" "$work/model" README.md "$work/quantized"

# The same program without CMake. The prefix has moved, and nothing in it may know where it was.
mv "$work/prefix" "$work/moved"
PKG_CONFIG_PATH=$work/moved/lib/pkgconfig pkg-config --cflags --libs baseq >"$work/flags"
"${CXX:-c++}" -std=c++20 tests/consumer/*.cpp -o "$work/by-hand" -Wl,-rpath,"$work/moved/lib" \
  @"$work/flags"
"$work/by-hand" "$work/model" README.md "$work/quantized by hand"
if [[ -e $work/moved/bin/baseq ]]; then
  "$work/moved/bin/baseq" --version >/dev/null
  # Its text for calibration moved with it.
  (cd "$work/empty" && "$work/moved/bin/baseq" quantize "$work/model" --set grids.weights.group_size=32 --set calibration.num_samples=2 \
    --set calibration.seq_len=32 --quiet && test -e model-w4-gptq/README.md)
  for file in share/man/man1/baseq-quantize.1 share/bash-completion/completions/baseq share/baseq/README.md; do test -s "$work/moved/$file"; done
fi
mv "$work/moved" "$work/prefix"

# expect TEXT NAME: an optional baseq is not found, for this reason, and CMake succeeds.
expect() {
  local text=$1 name=$2
  configure tests/consumer/optional "$work/$name" "${options[@]}" >"$work/log" && grep -q "baseq found: \(0\|FALSE\); .*$text" "$work/log" ||
    { echo "test_consumer: $name: expected \"$text\"" >&2; cat "$work/log" >&2; exit 1; }
}

options=(-DBASEQ_COMPONENTS="COMPONENTS;tokenizer")
expect "no components.*tokenizer" components
options=()
if [[ -e $work/prefix/lib/libbaseq.a ]]; then
  export PKG_CONFIG_LIBDIR=$work/empty
  expect "does not find utf8proc" pkg-config
  unset PKG_CONFIG_LIBDIR
fi
# A LibTorch for CUDA, of which CMake must not get to see the configuration without an nvcc.
torch=$work/cuda/share/cmake/Torch
mkdir -p "$work/cuda/lib" "$torch"
touch "$work/cuda/lib/libtorch_cuda.so"
echo 'message(FATAL_ERROR "no CUDA")' >"$torch/TorchConfig.cmake"
printf 'set(PACKAGE_VERSION 2.6)\nset(PACKAGE_VERSION_COMPATIBLE TRUE)\n' >"$torch/TorchConfigVersion.cmake"
options=(-DTorch_DIR="$torch")
if nvcc=$(command -v nvcc); then options+=(-DCMAKE_IGNORE_PATH="$(dirname "$nvcc")"); fi
expect "no nvcc is on the path" cuda
