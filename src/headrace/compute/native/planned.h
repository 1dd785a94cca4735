#pragma once

#include "kernels.h"

namespace headrace {

// A step's attention, as compute/plans makes it (`plans.plan.Plan` says what each array holds).
struct Work {
  const int32_t *order, *indices;
  const int32_t *tile_begin, *tile_end, *tile_blocks, *tile_low, *tile_high;  // [tiles]
  const int32_t *item_tile, *item_begin, *item_end, *item_state;              // [items]
  const int32_t* slots;                                                       // [tokens + 1]
  const int32_t* units;                                                       // [units]
  int tokens, tiles, items, unit_count, head_span;
  float* states;  // [slots[tokens]][heads][dim + kPartialTail]
};

// Attend what the plan says. The plan's arrays are trusted: whoever made them has checked them.
void planned_attention(const Variant& variant, Dtype dtype, const Attention& call, const Work& work, int threads);

}  // namespace headrace
