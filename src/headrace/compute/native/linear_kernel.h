// The fixed-order linear layer: one panel of 64 outputs for some rows.
#pragma once

#include "dot.h"
#include "kernels.h"

namespace headrace {
namespace {

// A panel that is read once: 8 KiB ahead of where it is multiplied, two pages of memory or more are under way.
template <class E>
struct ReadOnce {
  static constexpr int kAhead = 32 * kPanel;

  const uint32_t* words;

  INLINE auto at(int k, int column) const {
    const uint32_t* p = words + k * kPanel + column;
    prefetch(p + kAhead);
    return E::load_b(p);
  }
};

template <class E>
void linear_panel(const Linear& call, int row_begin, int row_end, int panel) {
  FlushDenormals flush;
  alignas(64) float sums[kRows * kPanel];
  const int words = (call.k + E::kWidth - 1) / E::kWidth, pitch = words * E::kWidth;
  const uint32_t* weight = call.weight + static_cast<size_t>(panel) * words * kPanel;
  const int column = panel * kPanel, columns = call.n - column < kPanel ? call.n - column : kPanel;
  for (int row = row_begin; row < row_end; row += kRows) {
    int rows = row_end - row < kRows ? row_end - row : kRows;
    auto* x = static_cast<const typename E::Operand*>(call.x) + static_cast<size_t>(row) * pitch;
    if (row_end - row_begin <= kRows)
      multiply<E>(rows, kPanel, x, pitch, ReadOnce<E>{weight}, words, nullptr, sums, kPanel);
    else
      multiply<E>(rows, kPanel, x, pitch, Packed<E>{weight, kPanel}, words, nullptr, sums, kPanel);
    for (int r = 0; r < rows; ++r) {
      size_t at = static_cast<size_t>(row + r) * call.n + column;
      if (call.out_f32) {
        memcpy(static_cast<float*>(call.out) + at, sums + r * kPanel, sizeof(float) * columns);
      } else {
        alignas(64) typename E::Element narrowed[kPanel];
        for (int i = 0; i < kPanel; i += 16) E::output(narrowed + i, load(sums + r * kPanel + i));
        memcpy(static_cast<typename E::Element*>(call.out) + at, narrowed, sizeof(narrowed[0]) * columns);
      }
    }
  }
}

}  // namespace
}  // namespace headrace
