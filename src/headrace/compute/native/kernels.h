// What a kernel is asked to do, and the table of kernels that each instruction set fills in.
#pragma once

#include <cstddef>
#include <cstdint>

namespace headrace {

enum Dtype { kF32 = 0, kBf16 = 1 };

constexpr int kChunk = 16;           // keys of one block, one stride apart, for certain: block sizes are multiples of it
constexpr int kStep = 64;            // keys that share one update of the running maximum
constexpr int kPartition = 1024;     // keys that share one accumulator; borders where a sum may be split and merged
constexpr int kVectors = 48;         // query vectors (token x head) that share one reading of K and V
constexpr int kDimMax = 256;
constexpr int kPanel = 64;           // outputs whose weights are packed together
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
  const int32_t* positions;
  int table_width, block_size, kv_heads, group, dim;  // group: query heads that share a KV head
  int window;                                         // 0: none
  float scale;

  // Keys that the query at `position` attends: first(position)..position.
  int first(int position) const { return window && position >= window ? position - window + 1 : 0; }
};

// Query vectors begin..end - 1 (token * group + head in group) of one sequence, and the keys any of them attends.
struct Tile {
  int begin, end;
  int sequence;
  int low, high;

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

  Attend attend[2];  // by Dtype
  AttendPartition attend_partition[2];
  Combine combine[2];
  Merge merge[2];
  LinearPanel linear[2];
  bool widens_bf16;  // the bf16 linear wants x in f32
};

extern const Kernels kernels_baseline, kernels_avx2, kernels_avx512, kernels_avx512_bf16;

}  // namespace headrace
