# Text files that are compiled into the library, from which a change makes the build configure itself again:
# the Python model that quantized checkpoints carry, and the recipes of configs/.
foreach(group methods export ablation)  # as they are listed
  file(GLOB recipes CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/configs/${group}/*.json)
  list(APPEND baseq_recipes ${recipes})
endforeach()
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS src/formats/native/modeling_baseq.py ${baseq_recipes})

file(READ src/formats/native/modeling_baseq.py BASEQ_MODELING)
configure_file(src/formats/native/modeling_source.cpp.in modeling_source.cpp @ONLY)

foreach(recipe ${baseq_recipes})
  file(READ ${recipe} text)
  cmake_path(GET recipe STEM LAST_ONLY name)
  cmake_path(GET recipe PARENT_PATH folder)
  cmake_path(GET folder FILENAME group)
  string(APPEND BASEQ_RECIPES "    {\"${name}\", \"${group}\", R\"json(${text})json\"},\n")
endforeach()
configure_file(src/pipeline/built_in_recipes.cpp.in built_in_recipes.cpp @ONLY)

set(baseq_embedded_sources ${CMAKE_CURRENT_BINARY_DIR}/modeling_source.cpp ${CMAKE_CURRENT_BINARY_DIR}/built_in_recipes.cpp)
