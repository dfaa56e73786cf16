#include "raster.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <cstring>

namespace co2s {
namespace {

constexpr int64_t kBlockRows = 64;
// Less work than this is not worth waking a thread for; tiles are cut in threads of their own.
constexpr int64_t kThreadPixels = 1 << 20;
constexpr uint32_t kEmpty = 0xffffffffu;

// Open addressing, at most half full: one multiplication and mostly one comparison a lookup.
class ColorTable {
public:
  explicit ColorTable(const Palette& palette) : unknown_(palette.unknown) {
    while ((size_t(1) << bits_) < 2 * palette.colors.size()) ++bits_;
    keys_.assign(size_t(1) << bits_, kEmpty);
    values_.assign(size_t(1) << bits_, unknown_);
    for (size_t i = 0; i < palette.colors.size(); ++i) {
      const size_t at = find(palette.colors[i]);
      if (keys_[at] != kEmpty) continue; // declared twice: the first counts
      keys_[at] = palette.colors[i];
      values_[at] = palette.values[i];
    }
  }

  // Where the colour is, or the empty place where it would be.
  size_t find(uint32_t color) const {
    size_t at = (color * 2654435769u) >> (32 - bits_);
    while (keys_[at] != color && keys_[at] != kEmpty) at = (at + 1) & (keys_.size() - 1);
    return at;
  }
  bool known(size_t at) const { return keys_[at] != kEmpty; }
  uint8_t value(size_t at) const { return values_[at]; }

private:
  int bits_ = 4;
  uint8_t unknown_;
  std::vector<uint32_t> keys_;
  std::vector<uint8_t> values_;
};

void record(Undeclared& undeclared, int64_t value, int64_t pixels, int64_t limit) {
  const auto found = undeclared.find(value);
  if (found != undeclared.end()) {
    found->second += pixels;
  } else if (static_cast<int64_t>(undeclared.size()) < limit) {
    undeclared.emplace(value, pixels);
  }
}

// Runs body(first pixel, end, undeclared) on blocks of rows; blocks are joined in their order.
template <class F>
Undeclared by_blocks(int64_t height, int64_t width, int64_t limit, const F& body) {
  const int64_t blocks = (height + kBlockRows - 1) / kBlockRows;
  const int64_t block_pixels = kBlockRows * std::max<int64_t>(1, width);
  const int64_t least = std::max<int64_t>(1, kThreadPixels / block_pixels);
  std::vector<Undeclared> parts(blocks);
  at::parallel_for(0, blocks, least, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t last = std::min(height, (block + 1) * kBlockRows);
      body(block * kBlockRows * width, last * width, parts[block]);
    }
  });
  Undeclared all;
  for (const Undeclared& part : parts) {
    for (const auto& [value, pixels] : part) record(all, value, pixels, limit);
  }
  return all;
}

inline uint32_t color_at(const uint8_t* rgb) {
  return uint32_t(rgb[0]) << 16 | uint32_t(rgb[1]) << 8 | rgb[2];
}

// The end of the run of equal pixels that starts at `i`; three vectors of 16 bytes hold 16 pixels.
int64_t end_of_run(const uint8_t* rgb, int64_t i, int64_t end) {
  std::array<uint8_t, 48> pattern;
  for (int j = 0; j < 48; ++j) pattern[j] = rgb[3 * i + j % 3];
  int64_t next = i + 1;
  while (next + 16 <= end && std::memcmp(rgb + 3 * next, pattern.data(), 48) == 0) next += 16;
  while (next < end && std::memcmp(rgb + 3 * next, pattern.data(), 3) == 0) ++next;
  return next;
}

} // namespace

Undeclared decode_palette(const uint8_t* rgb, int64_t height, int64_t width, const Palette& palette,
                          int64_t limit, uint8_t* labels) {
  const ColorTable table(palette);
  return by_blocks(height, width, limit, [&](int64_t begin, int64_t end, Undeclared& undeclared) {
    for (int64_t i = begin; i < end;) {
      const uint32_t color = color_at(rgb + 3 * i);
      // Masks are made of runs: the next pixel tells whether it is worth looking for the end.
      const bool lonely = i + 1 >= end || color_at(rgb + 3 * i + 3) != color;
      const int64_t next = lonely ? i + 1 : end_of_run(rgb, i, end);
      const size_t at = table.find(color);
      std::memset(labels + i, table.value(at), next - i);
      if (!table.known(at)) record(undeclared, color, next - i, limit);
      i = next;
    }
  });
}

template <class S>
Undeclared remap_labels(const S* input, int64_t height, int64_t width, const LabelTable& table,
                        int64_t limit, uint8_t* labels) {
  // Every 8- and 16-bit value gets an entry, so that the loop needs no range check for them.
  constexpr int64_t kEntries = sizeof(S) <= 2 ? int64_t(1) << (8 * sizeof(S)) : 0;
  const auto declared_size = static_cast<int64_t>(table.values.size());
  const int64_t entries = std::max(kEntries, declared_size);
  std::vector<uint8_t> value(entries, table.unknown);
  std::vector<uint8_t> bad(entries, 1);
  for (int64_t i = 0; i < declared_size; ++i) {
    if (!table.declared[i]) continue;
    value[i] = table.values[i];
    bad[i] = 0;
  }
  return by_blocks(height, width, limit, [&](int64_t begin, int64_t end, Undeclared& undeclared) {
    uint8_t any_bad = 0;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t x = input[i];
      const bool inside = sizeof(S) <= 2 || (x >= 0 && x < entries);
      labels[i] = inside ? value[x] : table.unknown;
      any_bad |= inside ? bad[x] : uint8_t(1);
    }
    if (!any_bad) return;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t x = input[i];
      if (x < 0 || x >= entries || bad[x]) record(undeclared, x, 1, limit);
    }
  });
}

template Undeclared remap_labels(const uint8_t*, int64_t, int64_t, const LabelTable&, int64_t,
                                 uint8_t*);
template Undeclared remap_labels(const uint16_t*, int64_t, int64_t, const LabelTable&, int64_t,
                                 uint8_t*);
template Undeclared remap_labels(const int32_t*, int64_t, int64_t, const LabelTable&, int64_t,
                                 uint8_t*);

} // namespace co2s
