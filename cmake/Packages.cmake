# Shared libraries that are installed with the program (BASEQ_BUNDLE), and packages:
#     cpack -G TGZ        a folder that runs where it is unpacked; configure with -DBASEQ_BUNDLE=ALL
#     cpack -G DEB        the same for Debian and Ubuntu, with LibTorch inside if BASEQ_BUNDLE is ALL
set_property(CACHE BASEQ_BUNDLE PROPERTY STRINGS "" SMALL ALL)
if(BASEQ_BUNDLE AND BASEQ_BUILD_TOOLS)
  # Of every system: the C and C++ libraries, which the compiler of the build decides.
  set(not_bundled "^ld-linux" "^linux-vdso" "^lib(c|m|dl|rt|pthread|util|stdc\\+\\+|gcc_s)\\.so")
  if(NOT BASEQ_BUNDLE STREQUAL ALL)
    # What the torch package brings, and what its libraries need.
    list(APPEND not_bundled "^libtorch" "^libc10" "^libgomp" "^libcuda" "^libcudart" "^libnv")
  endif()
  install(RUNTIME_DEPENDENCY_SET baseq_dependencies PRE_EXCLUDE_REGEXES ${not_bundled}
          DIRECTORIES ${TORCH_INSTALL_PREFIX}/lib LIBRARY DESTINATION ${baseq_bundle_folder}
          RUNTIME DESTINATION ${baseq_bundle_folder})
endif()

set(CPACK_PACKAGE_CONTACT "the authors of baseq")
set(CPACK_PACKAGE_VENDOR baseq)
set(CPACK_RESOURCE_FILE_LICENSE ${PROJECT_SOURCE_DIR}/LICENSE)
set(CPACK_STRIP_FILES ON)
set(CPACK_THREADS 0)
set(CPACK_GENERATOR TGZ DEB)
set(CPACK_DEBIAN_FILE_NAME DEB-DEFAULT)
set(CPACK_DEBIAN_PACKAGE_SECTION science)
set(CPACK_DEBIAN_COMPRESSION_TYPE zstd)
set(CPACK_DEBIAN_PACKAGE_DEPENDS "libc6 (>= 2.36), libstdc++6 (>= 12)")
if(NOT BASEQ_BUNDLE)
  string(APPEND CPACK_DEBIAN_PACKAGE_DEPENDS ", libgomp1, zlib1g, libutf8proc2, libpcre2-8-0")
endif()
include(CPack)
