#!/usr/bin/env bash
# Makes the packages of a finished build and uses them as their users do.
#
#     scripts/check_packages.sh wheel [PYTHON]...   a wheel, installed into a fresh environment of each Python
#     scripts/check_packages.sh archive [BUILD]     the tarball and the .deb, unpacked into an empty folder; with
#                                                   mmdebstrap the .deb is also installed in a clean Debian
#
# Both keep their build: build-wheel, and BUILD (default build-release), which is configured with BASEQ_BUNDLE=ALL.
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

# install_deb PACKAGE: installs it in a clean Debian of the release of this system, and uses it there.
install_deb() {
  if ! command -v mmdebstrap >/dev/null || [[ $(id -u) -ne 0 ]]; then
    echo "check_packages: NOT CHECKED in a clean system: needs root and mmdebstrap" >&2
    return
  fi
  local release debian=$work/debian
  release=$(. /etc/os-release && echo "$VERSION_CODENAME")
  mmdebstrap --quiet --variant=minbase --include=bash "$release" "$debian"
  cp -r "$1" tests/data/tiny_llama_base "$debian/root"
  cp tests/consumer/tokenizer.json "$debian/root/tiny_llama_base"
  chroot "$debian" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root OMP_NUM_THREADS=1 DEBIAN_FRONTEND=noninteractive \
    bash -euo pipefail -c '
      cd
      apt-get install --yes --quiet ./*.deb
      baseq --version
      baseq quickstart
      baseq quantize tiny_llama_base --set grids.weights.group_size=32 --set calibration.num_samples=2 \
        --set calibration.seq_len=32 --quiet
      baseq generate tiny_llama_base-w4-gptq "the" --max-tokens 3 --quiet
      dpkg --verify baseq
      apt-get remove --yes --quiet baseq
      if ls /usr/lib/baseq /usr/share/baseq 2>/dev/null; then exit 1; fi
    '
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
  # A project that uses the library of the last one, as docs/install.md has it.
  cmake -S tests/consumer -B "$work/consumer" -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_PREFIX_PATH="$("$environment/bin/python" -c \
    'import baseq, torch; print(baseq.prefix(), torch.utils.cmake_prefix_path, sep=";")')" >/dev/null
  cmake --build "$work/consumer"
  "$work/consumer/consumer" "$work/empty/model" README.md "$work/quantized"
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
  expect "$work"/installed/usr/share/{man/man1/baseq-quantize.1,bash-completion/completions/baseq,zsh/vendor-completions/_baseq,baseq/calibration.txt}
  install_deb "$work"/packages/*.deb
}

case ${1:-} in
  wheel) shift; [[ $# -gt 0 ]] || set -- python3; wheel "$@" ;;
  archive) archive "${2:-}" ;;
  *) echo "usage: scripts/check_packages.sh wheel [PYTHON]... | archive [BUILD]" >&2; exit 2 ;;
esac
