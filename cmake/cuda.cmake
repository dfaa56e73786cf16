# co2s_add_cuda(<target>): compiles csrc/ops/cuda into a target. The toolkit is found through
# FindCUDAToolkit, which follows an nvcc on PATH that is only a wrapper script.
#
# Architectures: CO2S_CUDA_ARCHS ("86;90"), else the environment's CO2S_CUDA_ARCHS or torch's own
# TORCH_CUDA_ARCH_LIST ("8.6;9.0+PTX"), else 80, 86 and 90; machine code and PTX of each, which
# co2s_fast/ops/dispatch.py counts on when it compares them with the GPU.
if(NOT CO2S_WITH_CUDA)
  return()
endif()

if(CMAKE_VERSION VERSION_LESS 3.25.2)
  message(FATAL_ERROR "CO2S_WITH_CUDA: C++20 in CUDA needs CMake 3.25.2, found ${CMAKE_VERSION}; "
    "run: pip install cmake")
endif()
if(TORCH_CUDA STREQUAL "-")
  message(FATAL_ERROR "CO2S_WITH_CUDA=ON, but torch ${TORCH_VERSION} was built without CUDA")
endif()
find_package(CUDAToolkit REQUIRED)
string(REGEX MATCH "^[0-9]+" torch_cuda_major "${TORCH_CUDA}")
if(NOT torch_cuda_major EQUAL CUDAToolkit_VERSION_MAJOR)
  message(FATAL_ERROR "CO2S_WITH_CUDA: torch ${TORCH_VERSION} was built for CUDA ${TORCH_CUDA}, "
    "the toolkit is ${CUDAToolkit_VERSION}; their major versions have to agree")
endif()

if(NOT CO2S_CUDA_ARCHS) # not written to the cache: the environment may be another one next time
  set(CO2S_CUDA_ARCHS "80;86;90")
  foreach(name CO2S_CUDA_ARCHS TORCH_CUDA_ARCH_LIST)
    if(NOT "$ENV{${name}}" STREQUAL "")
      set(CO2S_CUDA_ARCHS "$ENV{${name}}")
      break()
    endif()
  endforeach()
endif()
string(REGEX REPLACE "[ ,;]+" ";" CO2S_CUDA_ARCHS "${CO2S_CUDA_ARCHS}")
list(TRANSFORM CO2S_CUDA_ARCHS REPLACE "\\+PTX$" "")
list(TRANSFORM CO2S_CUDA_ARCHS REPLACE "\\." "")
list(REMOVE_DUPLICATES CO2S_CUDA_ARCHS)
foreach(arch IN LISTS CO2S_CUDA_ARCHS)
  if(NOT arch MATCHES "^[0-9]+a?$")
    message(FATAL_ERROR "CO2S_CUDA_ARCHS: expected numbers such as 80;90, found ${arch}")
  endif()
endforeach()

if(NOT CMAKE_CUDA_COMPILER)
  set(CMAKE_CUDA_COMPILER ${CUDAToolkit_BIN_DIR}/nvcc)
endif()
set(CMAKE_CUDA_ARCHITECTURES ${CO2S_CUDA_ARCHS})
set(CMAKE_CUDA_RUNTIME_LIBRARY Shared) # torch's: two runtimes would not share streams
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
enable_language(CUDA) # at the top, outside of any function
message(STATUS "CUDA ${CUDAToolkit_VERSION} for ${CO2S_CUDA_ARCHS}")
unset(C10_CUDA_LIBRARY CACHE) # it may be another environment's
find_library(C10_CUDA_LIBRARY c10_cuda PATHS ${TORCH_DIR}/lib NO_DEFAULT_PATH REQUIRED)

function(co2s_add_cuda target)
  file(GLOB sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/ops/cuda/*.cu
    ${PROJECT_SOURCE_DIR}/csrc/ops/cuda/*.cpp)
  target_sources(${target} PRIVATE ${sources})
  # No contraction of a * b + c: forward and backward take the same decisions about a pixel, bit for
  # bit; the kernels ask for fused arithmetic where it pays. Never --use_fast_math: a NaN stays one.
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:CUDA>:-fmad=false -Xcompiler=-Wall,-Wextra>)
  if(CO2S_WERROR)
    target_compile_options(${target} PRIVATE
      $<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings -Xcompiler=-Werror>)
  endif()
  target_link_libraries(${target} PRIVATE ${C10_CUDA_LIBRARY} CUDA::cudart)
endfunction()
