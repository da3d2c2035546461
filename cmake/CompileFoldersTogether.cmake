# baseq_compile_folders_together(TARGET) compiles the sources of a folder six at a time.
#
# ATen's headers, precompiled or not, leave 4 s of template instantiations to every source that includes them, more than
# most sources take themselves. While working on a few files, -DCMAKE_UNITY_BUILD=OFF compiles each alone.
function(baseq_compile_folders_together target)
  if(DEFINED CMAKE_UNITY_BUILD)
    return()
  endif()
  get_target_property(sources ${target} SOURCES)
  foreach(source IN LISTS sources)
    cmake_path(ABSOLUTE_PATH source)
    # A kernel is compiled alone: what the compiler inlines into it, and with that the last bits of its results, must not
    # depend on its neighbours.
    file(STRINGS ${source} kernel REGEX "target_clones|__attribute__\\(\\(target" LIMIT_COUNT 1)
    if(kernel)
      continue()
    endif()
    cmake_path(GET source PARENT_PATH folder)
    string(MAKE_C_IDENTIFIER "${folder}" folder)
    if(NOT DEFINED count_${folder})
      set(count_${folder} 0)
    endif()
    math(EXPR group "${count_${folder}} / 6")
    set_source_files_properties(${source} PROPERTIES UNITY_GROUP "${folder}_${group}")
    math(EXPR count_${folder} "${count_${folder}} + 1")
  endforeach()
  set_target_properties(${target} PROPERTIES UNITY_BUILD ON UNITY_BUILD_MODE GROUP)
  # GCC takes a source that another one includes for a header, where a type of an unnamed namespace would be a mistake.
  target_compile_options(${target} PRIVATE $<$<CXX_COMPILER_ID:GNU>:-Wno-subobject-linkage>)
endfunction()
