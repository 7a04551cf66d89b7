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

# What this machine cannot run is only linked: sanitized it would take minutes to compile.
if(EXISTS /proc/cpuinfo)
  file(STRINGS /proc/cpuinfo avx512 REGEX "^flags.* avx512f " LIMIT_COUNT 1)
  if(NOT avx512)
    set(linked_only ${sources})
    list(FILTER linked_only INCLUDE REGEX "avx512")
    set_property(SOURCE ${linked_only} APPEND PROPERTY COMPILE_OPTIONS -g0 -fno-sanitize=all)
  endif()
endif()

# One run per instruction set; one that this machine lacks is reported as skipped.
foreach(isa IN ITEMS avx512_bf16 avx512 avx2 portable)
  add_test(NAME native_${isa} COMMAND native_tests ${isa})
  set_tests_properties(native_${isa} PROPERTIES SKIP_RETURN_CODE 77 TIMEOUT 300)
endforeach()
