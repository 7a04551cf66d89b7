# native_tests: all kernels but their bindings (which need Python), sanitized, with the tests of this folder.
get_target_property(sources sglang_er_cpu SOURCES)
list(FILTER sources EXCLUDE REGEX "binding")
file(GLOB tests CONFIGURE_DEPENDS "${CMAKE_CURRENT_LIST_DIR}/*.cpp")
add_executable(native_tests EXCLUDE_FROM_ALL ${sources} ${tests})
target_include_directories(native_tests PRIVATE csrc/include csrc/cpu)
get_target_property(options sglang_er_cpu COMPILE_OPTIONS)
list(REMOVE_ITEM options -O3)
set(sanitizers -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all)
target_compile_options(native_tests PRIVATE ${options} -O1 -g -fno-omit-frame-pointer ${sanitizers})
target_link_libraries(native_tests PRIVATE ${sanitizers} Threads::Threads)

# CUDA kernels, compiled as C++ for threads that take turns (simt/threads.h).
file(GLOB simt CONFIGURE_DEPENDS "${CMAKE_CURRENT_LIST_DIR}/simt/*.cpp")
target_sources(native_tests PRIVATE ${simt})
set_source_files_properties(${simt} PROPERTIES
  COMPILE_DEFINITIONS "SGLANG_ER_SIMT;SGLANG_ER_SHARED_KB=227" COMPILE_OPTIONS "-Wno-unknown-pragmas;-Wno-clobbered"
  INCLUDE_DIRECTORIES "${CMAKE_CURRENT_LIST_DIR}/simt;${CMAKE_CURRENT_LIST_DIR};${CMAKE_CURRENT_SOURCE_DIR}/csrc/cuda")

# What this machine cannot run is only linked: sanitized it would take minutes to compile.
if(EXISTS /proc/cpuinfo)
  file(STRINGS /proc/cpuinfo avx512 REGEX "^flags.* avx512f " LIMIT_COUNT 1)
  if(NOT avx512)
    set(linked_only ${sources})
    list(FILTER linked_only INCLUDE REGEX "avx512|amx")
    set_property(SOURCE ${linked_only} APPEND PROPERTY COMPILE_OPTIONS -g0 -fno-sanitize=all)
  endif()
endif()

add_test(NAME native_simt COMMAND native_tests simt)
set_tests_properties(native_simt PROPERTIES TIMEOUT 300)

# One run per instruction set; one that this machine lacks is reported as skipped.
foreach(isa IN ITEMS amx avx512_bf16 avx512 avx2 portable)
  add_test(NAME native_${isa} COMMAND native_tests ${isa})
  set_tests_properties(native_${isa} PROPERTIES SKIP_RETURN_CODE 77 TIMEOUT 300)
endforeach()
