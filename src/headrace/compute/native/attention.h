#pragma once

#include "kernels.h"

namespace headrace {

// Attend `tokens` queries; rows[i] is query i's row of the tables, of which there are `sequences`, over `blocks` blocks.
// Throws std::invalid_argument, before anything is written, if a row, a position or an attended block does not exist.
void paged_attention(const Kernels& kernels, Dtype dtype, const Attention& call, const int32_t* rows, int tokens,
                     int sequences, int blocks, int threads);

// Which partitions of each token are wanted, begins[token]..ends[token] - 1; partition p goes into slot p - bases[token].
struct Partials {
  const int32_t *begins, *ends, *bases;
  int slots;   // to a token
  float* out;  // [token][slot][head][dim + kPartialTail]; slots that nothing goes into are left as they are
};

// The partial states of some partitions. call.out is not used. Throws as paged_attention does.
void partial_attention(const Kernels& kernels, Dtype dtype, const Attention& call, const Partials& wanted,
                       const int32_t* rows, int tokens, int sequences, int blocks, int threads);

// Put together, left to right, the first counts[token] slots of such partials into call.out. Of `call` only out, positions,
// kv_heads, group and dim matter.
void combine_partials(const Kernels& kernels, Dtype dtype, const Attention& call, const float* partials,
                      const int32_t* counts, int tokens, int slots, int threads);

// Where the K and V of each token go.
struct Write {
  const void *k, *v;
  ptrdiff_t k_stride, v_stride;  // token to token, in bytes, as all here
  void* kv;                      // the layer's first K
  ptrdiff_t block_stride, plane_stride, head_stride, token_stride, token_bytes;  // token_bytes: of one head
  const int32_t *blocks, *offsets;
  int tokens, kv_heads, block_count, block_size;
};

// Throws std::invalid_argument, before anything is written, if a block or an offset does not exist.
void write_kv(const Write& call);

}  // namespace headrace
