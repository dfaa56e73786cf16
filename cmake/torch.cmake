# co2s_torch: torch's headers and CPU libraries, found through Python. TorchConfig.cmake is not
# used: with a CUDA build of torch it insists on a CUDA toolkit even for CPU-only code.
find_package(Python REQUIRED COMPONENTS Interpreter Development.Module)

function(co2s_ask_python variable code)
  execute_process(COMMAND "${Python_EXECUTABLE}" -c "${code}" OUTPUT_VARIABLE answer
    ERROR_VARIABLE complaint RESULT_VARIABLE status OUTPUT_STRIP_TRAILING_WHITESPACE)
  if(NOT status EQUAL 0)
    message(FATAL_ERROR "${Python_EXECUTABLE} could not answer `${code}`:\n${complaint}")
  endif()
  set(${variable} "${answer}" PARENT_SCOPE)
endfunction()

co2s_ask_python(torch_facts "import os, torch; print(os.path.dirname(torch.__file__), \
torch.__version__, int(torch._C._GLIBCXX_USE_CXX11_ABI), torch.version.cuda or '-', \
';'.join(a[3:] for a in torch._C._cuda_getArchFlags().split() if a.startswith('sm_')) \
if torch.version.cuda else '-', sep='|')")
string(REPLACE ";" "," torch_facts "${torch_facts}")
string(REPLACE "|" ";" torch_facts "${torch_facts}")
list(GET torch_facts 0 TORCH_DIR)
list(GET torch_facts 1 TORCH_VERSION)
list(GET torch_facts 2 TORCH_CXX11_ABI)
list(GET torch_facts 3 TORCH_CUDA)
list(GET torch_facts 4 TORCH_CUDA_ARCHS)
message(STATUS "torch ${TORCH_VERSION} in ${TORCH_DIR} (CUDA ${TORCH_CUDA})")

add_library(co2s_torch INTERFACE)
target_include_directories(co2s_torch SYSTEM INTERFACE
  ${TORCH_DIR}/include ${TORCH_DIR}/include/torch/csrc/api/include)
# The version is for nobody to read: with another torch in the same place, all is compiled again.
target_compile_definitions(co2s_torch INTERFACE _GLIBCXX_USE_CXX11_ABI=${TORCH_CXX11_ABI}
  CO2S_FOR_TORCH=${TORCH_VERSION})

# at::parallel_for is a header: it needs OpenMP switched on, and the OpenMP library that torch
# itself loaded (wheels carry their own), or torch.set_num_threads would not reach our loops.
file(GLOB torch_openmp ${TORCH_DIR}/lib/libgomp*.so* ${TORCH_DIR}/lib/libomp*.so*
  ${TORCH_DIR}/lib/libiomp*.so*)
include(CheckCXXCompilerFlag)
check_cxx_compiler_flag(-fopenmp CO2S_HAS_OPENMP)
if(CO2S_HAS_OPENMP AND CMAKE_CXX_COMPILER_ID MATCHES "Clang" AND torch_openmp MATCHES "libgomp")
  message(WARNING "torch brings GCC's OpenMP, which ${CMAKE_CXX_COMPILER_ID} cannot call: the CPU "
    "kernels will run on one thread; CXX=g++ in an empty build folder gives all of them")
  set(CO2S_HAS_OPENMP OFF)
endif()
if(CO2S_HAS_OPENMP)
  target_compile_options(co2s_torch INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-fopenmp>)
  target_link_libraries(co2s_torch INTERFACE ${torch_openmp})
  if(NOT torch_openmp)
    target_link_options(co2s_torch INTERFACE -fopenmp)
  endif()
endif()

unset(TORCH_CPU_LIBRARY CACHE) # the last configuration may have been for another environment
unset(C10_LIBRARY CACHE)
find_library(TORCH_CPU_LIBRARY torch_cpu PATHS ${TORCH_DIR}/lib NO_DEFAULT_PATH REQUIRED)
find_library(C10_LIBRARY c10 PATHS ${TORCH_DIR}/lib NO_DEFAULT_PATH REQUIRED)
target_link_libraries(co2s_torch INTERFACE ${TORCH_CPU_LIBRARY} ${C10_LIBRARY})
# torch is imported before _native, so its libraries are in the process already; unresolved
# symbols of their own dependencies (CUDA, cuDNN) are not ours to find at link time.
target_link_options(co2s_torch INTERFACE -Wl,--allow-shlib-undefined)

if(NOT pybind11_DIR)
  co2s_ask_python(pybind11_DIR "import pybind11; print(pybind11.get_cmake_dir())")
endif()
find_package(pybind11 CONFIG REQUIRED PATHS ${pybind11_DIR} NO_DEFAULT_PATH)

# Torch's headers are most of the time that files around ops take to compile: read them once a
# target. CMAKE_DISABLE_PRECOMPILE_HEADERS=ON does without.
function(co2s_precompile_torch target)
  cmake_parse_arguments(ARG "" "" "SKIP" ${ARGN})
  target_precompile_headers(${target} PRIVATE
    "$<$<COMPILE_LANGUAGE:CXX>:<torch/library.h$<ANGLE-R>>"
    "$<$<COMPILE_LANGUAGE:CXX>:<ATen/Functions.h$<ANGLE-R>>"
    "$<$<COMPILE_LANGUAGE:CXX>:<ATen/Parallel.h$<ANGLE-R>>")
  set_source_files_properties(${ARG_SKIP} PROPERTIES SKIP_PRECOMPILE_HEADERS ON)
endfunction()
