# Finds LibTorch: what CMAKE_PREFIX_PATH offers, else the torch package of the virtual environment in .venv or of
# the python3 on the path.
if(NOT DEFINED Torch_DIR)
  find_package(Torch QUIET)
endif()
if(NOT Torch_FOUND)
  foreach(python ${CMAKE_CURRENT_SOURCE_DIR}/.venv/bin/python python3)
    execute_process(COMMAND ${python} -c "import torch; print(torch.utils.cmake_prefix_path)"
                    OUTPUT_VARIABLE torch_prefix OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE failed)
    if(NOT failed)
      list(APPEND CMAKE_PREFIX_PATH ${torch_prefix})
      break()
    endif()
  endforeach()
endif()
find_package(Torch 2.4 REQUIRED)
