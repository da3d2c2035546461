#!/usr/bin/env bash
# Compiles for aarch64, without linking, what could be tied to x86-64, and runs the integer kernels in an emulator.
#
#     scripts/check_aarch64.sh         the files that name an instruction set, some seconds each
#     scripts/check_aarch64.sh --all   the library, the program and the benchmarks
#
# Needs Debian's g++-aarch64-linux-gnu, qemu-user for the kernels, and what a build needs: headers, those of LibTorch too, do not depend on the
# processor.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folders=(src tools benchmarks)
if [[ ${1:-} == --all ]]; then
  mapfile -t sources < <(find "${folders[@]}" -name '*.cpp' | sort)
else
  mapfile -t sources < <(grep -lrE 'target_clones|target\(|__x86_64__|__aarch64__' --include='*.cpp' "${folders[@]}" | sort)
fi

build=build-aarch64
# The libraries are those of this machine and stay unlinked; its headers come after those of the cross compiler.
cmake -B $build -G Ninja --log-level=ERROR -DCMAKE_BUILD_TYPE=Unoptimized -DBASEQ_WERROR=ON \
  -DBASEQ_BUILD_BENCHMARKS=ON -DBASEQ_BUILD_TESTS=OFF -DBASEQ_BUILD_EXAMPLES=OFF \
  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
  -DCMAKE_TRY_COMPILE_TARGET_TYPE=STATIC_LIBRARY -DCMAKE_DISABLE_PRECOMPILE_HEADERS=ON -DCMAKE_UNITY_BUILD=OFF \
  -DCMAKE_LIBRARY_ARCHITECTURE="$(gcc -print-multiarch)" -DCMAKE_CXX_FLAGS="-idirafter /usr/include"
objects=("${sources[@]/#/$PWD/}")
cmake --build $build -- --quiet "${objects[@]/%/^}"  # "source^" is ninja's name for its object
echo "compiled for aarch64: ${#sources[@]} files"

# The integer kernels need no LibTorch, so they run as well.
if command -v qemu-aarch64 >/dev/null; then
  aarch64-linux-gnu-g++ -std=c++20 -O2 -ffp-contract=off -Isrc tests/integer/compare_kernels.cpp \
    src/integer/{integer,scalar,neon}_kernels.cpp src/integer/portable_rows.cpp -o $build/compare_kernels
  qemu-aarch64 -cpu max -L /usr/aarch64-linux-gnu $build/compare_kernels 300
else
  echo "check_aarch64: NOT RUN: the integer kernels need qemu-aarch64; install qemu-user" >&2
fi
