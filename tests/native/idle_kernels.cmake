# Of a build under a sanitizer the kernels for AVX-512 take a third. Where the machine cannot run them a stand-in does.
execute_process(COMMAND grep -qw avx512f /proc/cpuinfo RESULT_VARIABLE found ERROR_QUIET)
if(found EQUAL 1)
  get_target_property(kernel_sources fastvq_kernels SOURCES)
  list(REMOVE_ITEM kernel_sources csrc/cpu/kernels_avx512.cpp)
  set_target_properties(fastvq_kernels PROPERTIES SOURCES "${kernel_sources}")
  target_sources(fastvq_kernels PRIVATE ${CMAKE_CURRENT_LIST_DIR}/idle_kernels.cpp)
endif()
