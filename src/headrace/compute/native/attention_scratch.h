// What attention of one tile keeps while it works.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace headrace {
namespace {

// A softmax-weighted sum under way: what was accumulated so far, relative to the greatest score seen.
struct Partial {
  alignas(64) float sum[kVectors * kDimMax];   // of weight * V
  alignas(64) float weight[kVectors * 16];     // of weights, in 16 lanes
  float max[kVectors];                         // greatest score * scale * log2(e); -inf: no key yet
};

template <class E>
struct Scratch {
  using Operand = typename E::Operand;
  using Element = typename E::Element;
  alignas(64) uint32_t keys[kDimMax / E::kWidth * kStep];    // [4 sums][words of a key, every fourth][64 keys]
  alignas(64) uint32_t values[kStep / E::kWidth * kDimMax];  // [64 keys / width][dim]
  alignas(64) Operand q[kVectors * kDimMax];
  alignas(64) float scores[4][kRows * kStep] = {};  // of one block of vectors: four sums, or all in the first
  alignas(64) Operand weights[kVectors * kStep];
  const Element* rows[kStep];  // V of each key of the step; a row of zeros for a key that nobody attends
  const Element* rows_ahead[kStep / kChunk];  // V of each chunk of the step to come, to be prefetched
  float rescale[kVectors];
  int first[kVectors], last[kVectors];  // keys that each vector attends
  Partial partial, total;
};

}  // namespace
}  // namespace headrace
