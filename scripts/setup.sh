#!/usr/bin/env bash
# Prepares what building and the Python scripts need; instant when nothing is missing.
#
#     scripts/setup.sh            or, from another script:   source scripts/setup.sh
#
# Debian packages come from apt-get when this runs as root, otherwise the missing ones are named. LibTorch is what
# CMAKE_PREFIX_PATH or Torch_DIR offers, else the torch package in the virtual environment .venv. Sourced, it leaves
# the caller in the repository root and defines
#     venv_python              the Python of .venv
#     apt_install P...         installs Debian packages, as root
#     install_requirements F [D]   installs a requirements file into .venv, or without dependencies into its folder D; once
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

torch_version=2.13.0
cpu_index=https://download.pytorch.org/whl/cpu
venv_python=.venv/bin/python
debian_packages=(
  build-essential libeigen3-dev libfmt-dev libspdlog-dev libcli11-dev nlohmann-json3-dev libgtest-dev libutf8proc-dev
  libpcre2-dev zlib1g-dev pkg-config
)

fail() {
  echo "setup: $*" >&2
  exit 1
}

cmake_is_new_enough() {
  local version
  version=$(cmake --version 2>/dev/null | sed -n '1s/[^0-9]*\([0-9.]*\).*/\1/p') || return 1
  [[ -n $version && $(printf '%s\n' 3.25 "$version" | sort -V | head -n 1) == 3.25 ]]
}

python_is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
  local candidate
  for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
    if python_is_new_enough "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  fail "no Python 3.11 or newer on the path"
}

missing_packages() {
  local package
  for package in "${debian_packages[@]}"; do
    dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || echo "$package"
  done
  # These may come from anywhere on the path.
  cmake_is_new_enough || echo cmake
  command -v ninja >/dev/null || echo ninja-build
  python3 -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv
}

apt_install() {
  apt-get update --quiet=2 &&
    DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends --quiet=2 "$@" >/dev/null
}

install_packages() {
  if ! command -v dpkg-query >/dev/null; then
    echo "setup: no Debian system; install what your distribution calls ${debian_packages[*]} if the build misses it" >&2
    return
  fi
  local missing
  mapfile -t missing < <(missing_packages)
  [[ ${#missing[@]} -eq 0 ]] && return
  if [[ $(id -u) -ne 0 ]] || ! command -v apt-get >/dev/null; then
    fail "these packages are missing; install them and run this again:
    sudo apt-get install --yes --no-install-recommends ${missing[*]}"
  fi
  echo "setup: installing ${missing[*]}"
  apt_install "${missing[@]}"
  hash -r
}

make_venv() {
  # A virtual environment whose interpreter is gone, too old or without pip is made anew.
  if ! python_is_new_enough $venv_python || ! $venv_python -c 'import pip' 2>/dev/null; then
    local python
    python=$(find_python)
    echo "setup: making .venv"
    "$python" -m venv --clear .venv
  fi
}

install_requirements() {
  local stamp target=()
  stamp=.venv/${2:+$2/}installed-$(sha256sum "$1" | cut -c1-16)
  if [[ ! -e $stamp ]]; then
    echo "setup: installing $1"
    # pip does not replace what is in a target folder. Compiling all of it takes longer than what is used of it.
    [[ -n ${2:-} ]] && rm -rf ".venv/$2" && target=(--no-deps --no-compile --target ".venv/$2")
    $venv_python -m pip install --quiet --disable-pip-version-check "${target[@]}" --requirement "$1"
    touch "$stamp"
  fi
}

install_torch() {
  if ! compgen -G '.venv/lib*/python3*/site-packages/torch/share/cmake/Torch/TorchConfig.cmake' >/dev/null; then
    echo "setup: installing torch $torch_version"
    # Without nvcc the build for CUDA, which is PyPI's for x86-64, is of no use; pip prefers $torch_version+cpu to it.
    local index=()
    has_nvcc || index=(--extra-index-url "$cpu_index")
    $venv_python -m pip install --quiet --disable-pip-version-check "${index[@]}" "torch==$torch_version"
  fi
  check_nvcc
}

has_nvcc() { command -v nvcc >/dev/null || [[ -x ${CUDA_HOME:-${CUDA_PATH:-/usr/local/cuda}}/bin/nvcc ]]; }

# What a LibTorch for CUDA is built against with, cmake/FindLibTorch.cmake says the same.
check_nvcc() {
  if compgen -G '.venv/lib*/python3*/site-packages/torch/lib/libtorch_cuda.so' >/dev/null && ! has_nvcc; then
    fail "the torch in .venv is built for CUDA, which needs the CUDA toolkit to build against, and there is no nvcc.
Either install torch for the CPU,
    $venv_python -m pip install --force-reinstall torch==$torch_version --index-url $cpu_index
or install the CUDA toolkit of torch's version and set CUDA_HOME to its folder, then run this again."
  fi
}

torch_is_offered() {
  local prefix
  [[ -n ${Torch_DIR:-} && -e $Torch_DIR/TorchConfig.cmake ]] && return 0
  local -a prefixes
  IFS=':;' read -ra prefixes <<<"${CMAKE_PREFIX_PATH:-}"
  for prefix in "${prefixes[@]}"; do
    [[ -e $prefix/Torch/TorchConfig.cmake || -e $prefix/share/cmake/Torch/TorchConfig.cmake ]] && return 0
  done
  return 1
}

install_packages
cmake_is_new_enough || fail "CMake 3.25 or newer is needed, found $(cmake --version 2>/dev/null | head -n 1)"
make_venv
torch_is_offered || install_torch
