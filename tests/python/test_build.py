"""How a build finds LibTorch, and what it says where it cannot use it."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def configure(tmp_path):
    """configure(torch, variables) -> the completed CMake with cmake/FindLibTorch.cmake and a `torch` that is a folder."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "CMakeLists.txt").write_text("cmake_minimum_required(VERSION 3.25)\nproject(test LANGUAGES NONE)\n"
                                           f"include({ROOT}/cmake/FindLibTorch.cmake)\n")
    toolkits = [folder for folder in (*os.environ["PATH"].split(os.pathsep), "/usr/local/cuda/bin")
                if (Path(folder) / "nvcc").exists()]

    def call(torch: Path, variables: dict | None = None) -> subprocess.CompletedProcess:
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("CUDA", "Torch"))}
        environment |= variables or {}
        command = ["cmake", "-B", tmp_path / "build", "-S", source, "-G", "Ninja", f"-DCMAKE_PREFIX_PATH={torch}",
                   f"-DCMAKE_IGNORE_PATH={';'.join(toolkits)}"]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    return call


def fake_torch(folder: Path, version: str, libraries: tuple = ()) -> Path:
    config = folder / "share" / "cmake" / "Torch"
    config.mkdir(parents=True)
    (config / "TorchConfig.cmake").write_text("set(TORCH_FOUND TRUE)\nmessage(STATUS found)\n")
    (config / "TorchConfigVersion.cmake").write_text(
        f"set(PACKAGE_VERSION {version})\nif(PACKAGE_VERSION VERSION_GREATER_EQUAL PACKAGE_FIND_VERSION)\n"
        "  set(PACKAGE_VERSION_COMPATIBLE TRUE)\nendif()\n")
    (folder / "lib").mkdir()
    for library in libraries:
        (folder / "lib" / library).touch()
    return folder


def test_torch_for_cuda_without_a_compiler_is_refused_with_a_way_out(configure, tmp_path):
    torch = fake_torch(tmp_path / "torch", "2.13.0", ("libtorch_cuda.so",))
    done = configure(torch)
    assert done.returncode != 0 and "found" not in done.stdout
    message = " ".join(done.stderr.split())
    assert "built for CUDA" in message and "https://download.pytorch.org/whl/cpu" in message and "CUDA_HOME" in message
    toolkit = tmp_path / "cuda" / "bin"
    toolkit.mkdir(parents=True)
    (toolkit / "nvcc").write_text("#!/bin/sh\n")
    (toolkit / "nvcc").chmod(0o755)
    done = configure(torch, {"CUDA_HOME": str(toolkit.parent)})
    assert done.returncode == 0 and "found" in done.stdout, done.stderr


def test_a_torch_that_is_too_old_is_refused(configure, tmp_path):
    assert configure(fake_torch(tmp_path / "new", "2.5.0")).returncode == 0
    shutil.rmtree(tmp_path / "build")
    done = configure(fake_torch(tmp_path / "old", "2.4.1"))
    assert done.returncode != 0 and "2.5" in done.stderr and "2.4.1" in done.stderr


def test_every_public_struct_is_one_that_the_consumer_fills():
    """tests/consumer/structs.cpp names one member of each, under -Wextra -Werror."""
    filled = (ROOT / "tests" / "consumer" / "structs.cpp").read_text()
    structs = set()
    for header in (ROOT / "include" / "baseq").rglob("*.h"):
        structs |= set(re.findall(r"^ *struct (\w+) \{", header.read_text(), re.MULTILINE))
    made_by_constructors = {"StoredModel", "Interrupted", "Reference"}  # and what holds a reference
    assert {name for name in structs - made_by_constructors if f"{name}{{" not in filled} == set()
