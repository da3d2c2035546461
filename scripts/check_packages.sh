#!/usr/bin/env bash
# Makes the packages of a finished build and uses them as their users do.
#
#     scripts/check_packages.sh wheel [PYTHON]...   a wheel, installed into a fresh environment of each Python
#     scripts/check_packages.sh archive [BUILD]     the tarball and the .deb, unpacked into an empty folder
#
# Both keep their build: build-wheel, and BUILD (default build-release).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# use PROGRAM: what a user does first, in an empty folder and with nothing of this shell's environment but the path.
use() {
  local program=$1
  rm -rf "$work/empty" && mkdir "$work/empty"
  cp -r tests/data/tiny_llama_base "$work/empty/model"
  cp tests/consumer/tokenizer.json "$work/empty/model"
  (
    cd "$work/empty"
    clean() { env -i PATH=/usr/bin:/bin HOME="$work/empty" OMP_NUM_THREADS=1 "$program" "$@"; }
    clean --version
    clean quickstart
    clean quantize model --set grids.weights.group_size=32 --set calibration.num_samples=2 --set calibration.seq_len=32 \
      --quiet
    clean generate model-w4-gptq "the" --max-tokens 3 --quiet
    clean completions bash | bash -n
  )
}

# no_current_directory PROGRAM: its run path has no empty part, which would be the current directory.
no_current_directory() {
  if readelf -d "$1" | grep -E 'RUNPATH.*(\[:|::|:\])'; then
    echo "check_packages: $1 looks for libraries in the current directory" >&2
    exit 1
  fi
}

# expect FILE...: all of them exist.
expect() {
  local file
  for file in "$@"; do
    [[ -e $file ]] || { echo "check_packages: $file is missing" >&2; exit 1; }
  done
}

wheel() {
  .venv/bin/python -m pip wheel --no-deps --wheel-dir "$work/wheels" ${BASEQ_PIP_OPTIONS:-} .
  if unzip -l "$work"/wheels/*.whl | grep -E 'lib(torch|c10|gomp)[^/]*\.so'; then
    echo "check_packages: the wheel holds libraries of torch" >&2
    exit 1
  fi
  local python environment
  for python in "$@"; do
    environment=$work/$(basename "$python")
    "$python" -m venv "$environment"
    "$environment/bin/pip" install --quiet "$work"/wheels/*.whl
    use "$environment/bin/baseq"
    no_current_directory "$environment"/lib/python3*/site-packages/baseq/bin/baseq
    expect "$("$environment/bin/python" -c 'import baseq; print(baseq.prefix())')"/{include/baseq/baseq.h,lib/libbaseq.a,lib/cmake/baseq/baseqConfig.cmake}
  done
}

archive() {
  local build=${1:-build-release} folder
  [[ -e $build/build.ninja ]] || cmake --preset release -B "$build" -DBASEQ_BUNDLE=ALL
  cmake --build "$build"
  (cd "$build" && cpack -G TGZ -B "$work/packages" >/dev/null && cpack -G DEB -B "$work/packages" >/dev/null)
  mkdir "$work/unpacked" "$work/installed"
  tar -xzf "$work"/packages/*.tar.gz -C "$work/unpacked"
  folder=$(echo "$work"/unpacked/*)
  use "$folder/bin/baseq"
  no_current_directory "$folder/bin/baseq"
  if ldd "$folder/bin/baseq" | grep -F "$root"; then
    echo "check_packages: the program of the tarball uses libraries of this folder" >&2
    exit 1
  fi
  dpkg-deb --info "$work"/packages/*.deb
  dpkg-deb --extract "$work"/packages/*.deb "$work/installed"
  use "$work/installed/usr/bin/baseq"
  expect "$work"/installed/usr/share/{man/man1/baseq-quantize.1,bash-completion/completions/baseq,baseq/calibration.txt}
}

case ${1:-} in
  wheel) shift; [[ $# -gt 0 ]] || set -- python3; wheel "$@" ;;
  archive) archive "${2:-}" ;;
  *) echo "usage: scripts/check_packages.sh wheel [PYTHON]... | archive [BUILD]" >&2; exit 2 ;;
esac
