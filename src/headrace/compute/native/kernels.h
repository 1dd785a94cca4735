// What a kernel is asked to do, and the table of kernels that each instruction set fills in.
#pragma once

#include <cstddef>
#include <cstdint>

namespace headrace {

enum Dtype { kF32 = 0, kBf16 = 1 };

constexpr int kChunk = 16;           // keys of one block, one stride apart, for certain: block sizes are multiples of it
constexpr int kStep = 64;            // keys that share one update of the running maximum
constexpr int kPartition = 1024;     // keys that share one accumulator; borders where a sum may be split and merged
constexpr int kVectors = 192;        // query vectors (token x head) that share one reading of K and V
constexpr int kDimMax = 256;
constexpr int kPanel = 64;           // outputs whose weights are packed together
constexpr int kWordBlock = 128;      // words whose weights are summed together
constexpr int kPartialTail = 17;     // of a vector's partial: 16 lanes of the sum of weights, and the greatest score
constexpr int kPartialFloats = kDimMax + kPartialTail;  // upper bound of floats a vector's partial takes

// One call of paged attention. Strides count elements.
struct Attention {
  const void* q;
  ptrdiff_t q_stride;  // token to token
  void* out;           // [tokens, heads, dim], contiguous
  const void* kv;      // the layer's first K
  ptrdiff_t block_stride, plane_stride, head_stride, token_stride;
  const int32_t* tables;
  const int32_t* positions;  // of tokens
  int table_width, block_size, kv_heads, group, dim;  // group: query heads that share a KV head
  int window;                                         // 0: none
  float scale;
  // What variants of attention need beside that, see variants.h; null or 0 where it has no use.
  const float* by_head = nullptr;       // [heads]
  const uint8_t* mask = nullptr;        // a bit for each key of each token, the lowest first; tokens `mask_stride` bytes apart
  ptrdiff_t mask_stride = 0;
  float constant = 0.0f;

  // Keys that the query at `position` attends: first(position)..position.
  int first(int position) const { return window && position >= window ? position - window + 1 : 0; }
};

// Query vectors begin..end - 1 (token * group + head in group) of one sequence, and the keys any of them attends.
struct Tile {
  int begin, end;
  int sequence;
  int low, high;
  const int32_t* blocks;           // of the sequence, from its first on
  const int32_t* order = nullptr;  // vector v is of token order[v / group]; null: v / group

  int token(int v, int group) const { return order ? order[v / group] : v / group; }
  int partition_begin() const { return low / kPartition; }
  int partition_end() const { return high / kPartition + 1; }
};

// One call of the fixed-order linear layer.
struct Linear {
  const void* x;  // [rows, k_padded], contiguous
  const uint32_t* weight;
  void* out;  // [rows, n], contiguous
  int rows, n, k;
  bool out_f32;
};

// Root mean square norm of rows, after adding to each. Strides count elements; rows are contiguous.
struct Norm {
  void* x;            // becomes x + delta, rounded
  const void* delta;  // null: nothing is added, x is left as it is
  const void* weight;
  void* out;
  int dim;
  float eps;
};

// activation(gate) * up, of rows that hold gate and then up.
struct Gate {
  const void* x;  // [rows, 2 * width]
  void* out;      // [rows, width]
  int width;
  bool gelu;  // by tanh; else silu
};

// Heads of Q, K and V as a projection left them: Q is normalised and turned in place, K on its way into the pool.
struct Turn {
  void* qkv;  // [tokens, heads + 2 * kv_heads, dim], contiguous
  const void *cos, *sin;  // [tokens, dim / 2]
  const void* weight;     // of the norm: [heads + kv_heads, dim]; null: none
  float eps;
  void* kv;  // the layer's first K
  ptrdiff_t block_stride, plane_stride, head_stride, token_stride;
  const int32_t *blocks, *offsets;
  int heads, kv_heads, dim;
};

struct Kernels {
  // Attend a tile's vectors under KV heads head_begin..head_end - 1, and write their output.
  using Attend = void (*)(const Attention&, const Tile&, int head_begin, int head_end);
  // One partition of that, into partial[vectors][kPartialFloats] ...
  using AttendPartition = void (*)(const Attention&, const Tile&, int head, int partition, float* partial);
  // ... and the partials of all partitions, left to right, into the output.
  using Combine = void (*)(const Attention&, const Tile&, int head, const float* partials);
  // The same, where partials come from anywhere: of one query token under one KV head, `count` of them, `stride` floats
  // apart, each [group][dim + kPartialTail].
  using Merge = void (*)(const Attention&, int token, int head, const float* partials, int count, ptrdiff_t stride);
  // Outputs of rows row_begin..row_end - 1 in one panel.
  using LinearPanel = void (*)(const Linear&, int row_begin, int row_end, int panel);

  // Rows begin..end - 1 of the operations between projections.
  using NormRows = void (*)(const Norm&, int begin, int end);
  using GateRows = void (*)(const Gate&, int begin, int end);
  using TurnRows = void (*)(const Turn&, int begin, int end);
  // See choice_kernel.h.
  using Greatest = int (*)(const float* logits, int count);
  using Weigh = void (*)(const float* logits, int count, float greatest, float factor, float* weights, double* sums,
                         float* most);

  Attend attend[2];  // by Dtype
  AttendPartition attend_partition[2];
  Combine combine[2];
  Merge merge[2];
  LinearPanel linear[2];
  NormRows norm[2];
  GateRows gate[2];
  TurnRows turn[2];
  Greatest greatest;
  Weigh weigh;
  bool widens_bf16;  // the bf16 linear wants x in f32
};

// Where a chunk of a tile's partitions leaves its partial states: [slots[token] + index][heads][dim + kPartialTail].
struct Saved {
  float* states;  // null: the chunk is all that its tokens attend; straight into the output
  const int32_t* slots;
  int index;
  bool folds;  // one state for all partitions of the chunk, merged left to right, else one for each
};

// A variant of attention: `variants.h` lists them.
struct Variant {
  // The tile's keys low..high, cut at partition borders, under KV heads head_begin..head_end - 1.
  using AttendChunk = void (*)(const Attention&, const Tile&, int head_begin, int head_end, const Saved&);

  AttendChunk attend_chunk[2];  // by Dtype
  Kernels::Merge merge[2];
};

#define HEADRACE_VARIANTS(X) X(Standard) X(SoftCap) X(Alibi) X(Sinks) X(Masked) X(Sigmoid)
#define HEADRACE_ONE_MORE(A) +1
constexpr int kVariants = HEADRACE_VARIANTS(HEADRACE_ONE_MORE);
#undef HEADRACE_ONE_MORE

extern const Variant variants_baseline[kVariants], variants_avx2[kVariants], variants_avx512[kVariants],
    variants_avx512_bf16[kVariants];

extern const Kernels kernels_baseline, kernels_avx2, kernels_avx512, kernels_avx512_bf16;

}  // namespace headrace
