# Finds LibTorch: what Torch_DIR or CMAKE_PREFIX_PATH offers, else the torch package of the virtual environment in .venv or
# of the python3 on the path, else what CMake finds.
string(REPLACE ":" ";" torch_prefixes "${CMAKE_PREFIX_PATH};${Torch_ROOT};$ENV{CMAKE_PREFIX_PATH};$ENV{Torch_ROOT}")
find_path(Torch_DIR TorchConfig.cmake PATHS $ENV{Torch_DIR} ${torch_prefixes} PATH_SUFFIXES Torch share/cmake/Torch
          NO_DEFAULT_PATH)
foreach(python ${CMAKE_CURRENT_LIST_DIR}/../.venv/bin/python python3)
  if(Torch_DIR)
    break()
  endif()
  execute_process(COMMAND ${python} -c "import torch; print(torch.utils.cmake_prefix_path)"
                  OUTPUT_VARIABLE torch_prefix OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE failed)
  if(NOT failed)
    set(Torch_DIR ${torch_prefix}/Torch CACHE PATH "The folder of TorchConfig.cmake" FORCE)
  endif()
endforeach()

# A LibTorch for CUDA sets up CUDA as a language and ends CMake when there is no compiler for it. Its own message names no
# way out.
if(EXISTS ${Torch_DIR}/../../../lib/libtorch_cuda.so AND NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  find_program(baseq_nvcc nvcc HINTS ${CUDA_TOOLKIT_ROOT_DIR} ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda
               PATH_SUFFIXES bin)
  if(NOT baseq_nvcc)
    message(FATAL_ERROR "The LibTorch in ${Torch_DIR} is built for CUDA, which needs the CUDA toolkit to build against, "
                        "and there is no nvcc. Either install torch for the CPU,\n"
                        "  .venv/bin/python -m pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cpu\n"
                        "or install the CUDA toolkit of torch's version and set CUDA_HOME to its folder.")
  endif()
  # CUDA_HOME, which PyTorch's own extensions follow, means nothing to CMake.
  set(CMAKE_CUDA_COMPILER ${baseq_nvcc} CACHE FILEPATH "CUDA compiler")
  cmake_path(GET baseq_nvcc PARENT_PATH nvcc_folder)
  cmake_path(GET nvcc_folder PARENT_PATH nvcc_prefix)
  set(CUDA_TOOLKIT_ROOT_DIR ${nvcc_prefix} CACHE PATH "CUDA toolkit")
endif()
# 2.5 is the first whose scaled_dot_product_attention repeats the heads of keys and values (enable_gqa).
find_package(Torch 2.5 REQUIRED)
