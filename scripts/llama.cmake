# Read by CMake at the beginning of llama-cpp-python's project (scripts/llama-wheel says so). That project forces
# llama.cpp's library of chat templates, downloads and option parsing into the build; nothing in the wheel calls it,
# and it is 45 % of the work. A variable of this scope outranks the cache entry that forces it.
set(LLAMA_BUILD_COMMON OFF)

# A wheel has no links: libraries with a version in their name, in two folders, would be there six times.
set(CMAKE_PLATFORM_NO_VERSIONED_SONAME ON)
set(CMAKE_INSTALL_LIBDIR llama_cpp/lib)
set(CMAKE_INSTALL_BINDIR llama_cpp/lib)
set(CMAKE_INSTALL_RPATH "$ORIGIN")

# gcc before 14 does not know SME, for which two kinds of ARM kernels are compiled: these become like the kind before.
function(leave_out_unknown_sme)
  include(CheckCXXCompilerFlag)
  foreach(kernels ggml-cpu-armv9.2_1 ggml-cpu-armv9.2_2)
    if(TARGET ${kernels})
      check_cxx_compiler_flag(-march=armv9.2-a+sme COMPILER_KNOWS_SME)
      if(NOT COMPILER_KNOWS_SME)
        get_target_property(options ${kernels} COMPILE_OPTIONS)
        string(REPLACE armv9.2-a armv8.6-a options "${options}")
        string(REPLACE +sme "" options "${options}")
        set_target_properties(${kernels} PROPERTIES COMPILE_OPTIONS "${options}")
      endif()
    endif()
  endforeach()
endfunction()
cmake_language(DEFER CALL leave_out_unknown_sme)
