// A few lines instead of a test framework: CHECK counts failures and says where.
#pragma once

#include <cmath>
#include <cstdio>

namespace co2s_test {
inline int failures = 0;

inline void report(bool good, const char* file, int line, const char* text) {
  if (good) return;
  ++failures;
  std::printf("%s:%d: failed: %s\n", file, line, text);
}

inline void report_near(double found, double expected, double tolerance, const char* file, int line,
                        const char* text) {
  const bool good = std::fabs(found - expected) <= tolerance; // false for NaN
  if (good) return;
  ++failures;
  std::printf("%s:%d: failed: %s: found %.17g, expected %.17g +- %g\n", file, line, text, found,
              expected, tolerance);
}

inline int finish(const char* name) {
  std::printf("%s: %s\n", name, failures == 0 ? "passed" : "FAILED");
  return failures == 0 ? 0 : 1;
}
} // namespace co2s_test

#define CHECK(condition) co2s_test::report((condition), __FILE__, __LINE__, #condition)
#define CHECK_NEAR(found, expected, tolerance)                                                     \
  co2s_test::report_near((found), (expected), (tolerance), __FILE__, __LINE__, #found)
