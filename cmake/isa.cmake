# co2s_isa_library(<target> SOURCES ...): compiles the sources once per instruction set, each time
# in its own namespace (CO2S_ISA), as one object library per set; CO2S_ISAS lists them.
set(CO2S_ISAS baseline)
if(CO2S_X86_VARIANTS AND CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$" AND NOT MSVC)
  list(APPEND CO2S_ISAS avx2 avx512)
  target_compile_definitions(co2s_flags INTERFACE CO2S_HAS_X86_VARIANTS)
  set(CO2S_FLAGS_avx2 -mavx2 -mfma -mf16c)
  set(CO2S_FLAGS_avx512 -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl
    -mprefer-vector-width=512
    -Wno-uninitialized -Wno-maybe-uninitialized) # GCC 12 warns about its own avx512fintrin.h
endif()

function(co2s_isa_library target)
  cmake_parse_arguments(ARG "" "" "SOURCES" ${ARGN})
  set(optimize -O3)
  if(CO2S_SANITIZE) # the same findings in much less time
    set(optimize -O1)
  endif()
  foreach(isa IN LISTS CO2S_ISAS)
    add_library(${target}_${isa} OBJECT ${ARG_SOURCES})
    target_link_libraries(${target}_${isa} PRIVATE co2s_flags)
    target_compile_definitions(${target}_${isa} PRIVATE CO2S_ISA=${isa}
      $<$<BOOL:${CO2S_FEW_VARIANTS}>:CO2S_FEW_VARIANTS>)
    target_compile_options(${target}_${isa} PRIVATE ${optimize} -fno-semantic-interposition
      ${CO2S_FLAGS_${isa}})
  endforeach()
endfunction()
