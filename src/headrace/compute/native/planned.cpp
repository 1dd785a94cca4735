// Carries out a step's attention plan: its units in their order, then the merges. Which thread takes what changes no bit.
#include "planned.h"

#include <algorithm>

#include "parallel.h"

namespace headrace {

void planned_attention(const Variant& variant, Dtype dtype, const Attention& call, const Work& work, int threads) {
  const int spans = (call.kv_heads + work.head_span - 1) / work.head_span;
  // Threads claim units in the plan's order, dearest first: the plan's own greedy rule, by the time that each really takes.
  parallel_for(threads, work.unit_count, [&](int i) {
    const int item = work.units[i] / spans, head = work.units[i] % spans * work.head_span, t = work.item_tile[item];
    const int low = std::max(work.tile_low[t], work.item_begin[item] * kPartition);
    const int high = std::min(work.tile_high[t], work.item_end[item] * kPartition - 1);
    Tile tile{work.tile_begin[t], work.tile_end[t], 0, low, high, work.indices + work.tile_blocks[t], work.order};
    const int state = work.item_state[item], token = tile.token(tile.begin, call.group);
    const bool direct = work.slots[token] == work.slots[token + 1];
    Saved saved{direct ? nullptr : work.states, work.slots, state, state == 0};
    variant.attend_chunk[dtype](call, tile, head, std::min(head + work.head_span, call.kv_heads), saved);
  });
  const int slots = work.slots[work.tokens];
  if (!slots) return;
  const ptrdiff_t head_floats = call.dim + kPartialTail, slot_floats = head_floats * call.kv_heads * call.group;
  if (slots * slot_floats < 100'000) threads = 1;  // about 10 us: waking a second thread does not pay
  parallel_for(threads, work.tokens * call.kv_heads, [&](int i) {
    const int token = i / call.kv_heads, head = i % call.kv_heads;
    const int first = work.slots[token], count = work.slots[token + 1] - first;
    if (!count) return;
    const float* from = work.states + first * slot_floats + head * call.group * head_floats;
    variant.merge[dtype](call, token, head, from, count, slot_floats);
  });
}

}  // namespace headrace
