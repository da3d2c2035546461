#!/usr/bin/env bash
set -euo pipefail
cmake -S . -B build-conda -G Ninja ${CMAKE_ARGS:-} -DCMAKE_BUILD_TYPE=Release -DCMAKE_INSTALL_PREFIX="$PREFIX" \
  -DCMAKE_INSTALL_LIBDIR=lib -DBUILD_SHARED_LIBS=ON -DBASEQ_BUILD_TESTS=OFF -DBASEQ_BUILD_EXAMPLES=OFF \
  -DBASEQ_TORCH_RUNPATH='$ORIGIN/../lib'
cmake --build build-conda
cmake --install build-conda
