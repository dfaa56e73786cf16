// Raster helpers on plain memory: masks stored as colours or as other numbers, to class ids.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

namespace co2s {

// Values nobody declared, with the pixels that have them; at most `limit` distinct values.
using Undeclared = std::map<int64_t, int64_t>;

struct Palette {
  std::vector<uint32_t> colors; // r << 16 | g << 8 | b
  std::vector<uint8_t> values;  // what each becomes
  uint8_t unknown;              // what any other colour becomes
};

// rgb [height * width, 3] to labels [height * width]. The result does not depend on threads.
Undeclared decode_palette(const uint8_t* rgb, int64_t height, int64_t width, const Palette& palette,
                          int64_t limit, uint8_t* labels);

// labels[i] = table[input[i]]; outside the table, or where `declared` is false: `unknown`.
struct LabelTable {
  std::vector<uint8_t> values;
  std::vector<bool> declared;
  uint8_t unknown;
};

template <class S>
Undeclared remap_labels(const S* input, int64_t height, int64_t width, const LabelTable& table,
                        int64_t limit, uint8_t* labels);

} // namespace co2s
