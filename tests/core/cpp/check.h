// What the C++ tests check with: a failure is printed and counted, and main() returns exit_code().
#pragma once

#include <iostream>

inline int failures = 0;

template <typename... Parts>
void check(bool holds, const Parts&... what) {
  if (holds) return;
  ++failures;
  std::cerr << "FAILED: ";
  (std::cerr << ... << what) << '\n';
}

inline int exit_code() {
  if (failures > 0) std::cerr << failures << " checks failed\n";
  return failures > 0 ? 1 : 0;
}
