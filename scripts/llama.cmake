# Read by CMake at the beginning of llama-cpp-python's project (scripts/llama-wheel says so). That project forces
# llama.cpp's library of chat templates, downloads and option parsing into the build; nothing in the wheel calls it,
# and it is 45 % of the work. A variable of this scope outranks the cache entry that forces it.
set(LLAMA_BUILD_COMMON OFF)
