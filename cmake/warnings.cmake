# co2s_flags: warnings, sanitizers and the floating-point rules, for our own targets only.
add_library(co2s_flags INTERFACE)
target_include_directories(co2s_flags INTERFACE ${PROJECT_SOURCE_DIR}/csrc)

if(NOT MSVC)
  # Never -ffast-math: a NaN has to stay a NaN. These two only say that nobody reads errno or the
  # floating-point exception flags, which is what lets loops with comparisons vectorise.
  target_compile_options(co2s_flags INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra
    -fno-math-errno -fno-trapping-math>)
  if(CO2S_WERROR)
    target_compile_options(co2s_flags INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Werror>)
  endif()
endif()

if(CO2S_SANITIZE)
  if(NOT CO2S_SANITIZE MATCHES "^(address|undefined|address,undefined)$")
    message(FATAL_ERROR
      "CO2S_SANITIZE=${CO2S_SANITIZE}: expected address, undefined or address,undefined")
  endif()
  target_compile_options(co2s_flags INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${CO2S_SANITIZE}
    -fno-omit-frame-pointer -fno-sanitize-recover=all -g>)
  target_link_options(co2s_flags INTERFACE -fsanitize=${CO2S_SANITIZE})
endif()
