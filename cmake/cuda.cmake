# co2s_add_cuda(<target>): compiles csrc/ops/cuda into a target. The toolkit is found through
# FindCUDAToolkit, which follows an nvcc on PATH that is only a wrapper script.
if(CO2S_WITH_CUDA) # a language has to be switched on at the top, outside of any function
  if(TORCH_CUDA STREQUAL "-")
    message(FATAL_ERROR "CO2S_WITH_CUDA=ON, but torch ${TORCH_VERSION} was built without CUDA")
  endif()
  find_package(CUDAToolkit REQUIRED)
  if(NOT CMAKE_CUDA_COMPILER)
    set(CMAKE_CUDA_COMPILER ${CUDAToolkit_BIN_DIR}/nvcc)
  endif()
  if(NOT CO2S_CUDA_ARCHS)
    set(CO2S_CUDA_ARCHS 86 90)
  endif()
  set(CMAKE_CUDA_ARCHITECTURES ${CO2S_CUDA_ARCHS})
  set(CMAKE_CUDA_RUNTIME_LIBRARY Shared)
  set(CMAKE_CUDA_STANDARD 17) # see the flag below
  enable_language(CUDA)
  message(STATUS "CUDA ${CUDAToolkit_VERSION} for ${CO2S_CUDA_ARCHS}")
endif()

function(co2s_add_cuda target)
  file(GLOB sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/ops/cuda/*.cu
    ${PROJECT_SOURCE_DIR}/csrc/ops/cuda/*.cpp)
  find_library(TORCH_CUDA_LIBRARY torch_cuda PATHS ${TORCH_DIR}/lib NO_DEFAULT_PATH REQUIRED)
  find_library(C10_CUDA_LIBRARY c10_cuda PATHS ${TORCH_DIR}/lib NO_DEFAULT_PATH REQUIRED)
  target_sources(${target} PRIVATE ${sources})
  # No contraction and never --use_fast_math: a NaN stays a NaN, and thresholds are met as on the
  # CPU. The dialect as a flag: older CMake does not know that nvcc has C++20.
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:CUDA>:-std=c++20 -fmad=false --expt-relaxed-constexpr>)
  target_link_libraries(${target} PRIVATE ${TORCH_CUDA_LIBRARY} ${C10_CUDA_LIBRARY} CUDA::cudart)
endfunction()
