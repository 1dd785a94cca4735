// The fixed-order linear layer over weights of 1 to 8 bits: what a call is, and the kernels that each instruction set has for it.
//
// Weights lie as quant/layout.py packs them: panels of 64 outputs; in a panel, tiles of 32 inputs; in a tile, four blocks of
// 16 outputs; in a block, 32 lanes (output, parity of the input), each a stream of 16 codes, least significant bit first,
// cut into 16-bit words: [panels][tiles][4][bits][32 lanes].
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace headrace {

constexpr int kTile = 32;          // inputs of a tile
constexpr int kSlice = 4;          // tiles that are decoded into the cache at once
constexpr int kFewRows = 8;        // rows of one pass that decodes in registers; their inputs lie together, [tile][row][32] ...
constexpr int kRowBlock = 24;      // ... as do those of so many rows where there are more
constexpr int kWideRows = 264;     // rows that share one decoding of a slice
constexpr int kAhead = 8192;       // bytes of weights asked for before they are needed: what memory delivers in its latency

struct LowBit {
  const uint16_t* words;
  const uint16_t* table;  // bf16 [max(32, 2^bits)]: the value of each code less `middle`; shorter tables repeat
  const void* scales;     // [panels][groups][64], bf16 or f32
  const uint8_t* zeros;   // [panels][groups][64], or null
  bool scales_bf16;
  float middle;           // of the codes, where there are zero points: what these count from
  int bits, tiles, groups, n;

  const void* x;      // prepared: [blocks][tiles][block][32]
  const float* sums;  // [rows, rounded up to blocks][groups]: of x over each group, where there are zero points
  int block;
  void* out;          // [rows, n]
  int rows;
  bool out_f32;

  int group_tiles() const { return tiles / groups; }
};

struct LowBitKernels {
  // Outputs of rows row_begin..row_end - 1 in panels begin..end - 1; row_begin is a multiple of the block. By Dtype.
  using Panels = void (*)(const LowBit&, int row_begin, int row_end, int begin, int end);
  Panels panels[2];
  bool widens_bf16;  // the bf16 kernel wants x in f32
};

extern const LowBitKernels low_bit_baseline, low_bit_avx2, low_bit_avx512, low_bit_avx512_bf16;

// One call, with x as it comes: [rows, k], contiguous. gather: i32 [tiles * 32], the input that stands at each place, -1 for
// none; null: input i at place i.
struct LowBitCall {
  LowBit weight;
  const void* x;
  const int32_t* gather;
  int k;
};

void low_bit(const LowBitKernels& kernels, Dtype dtype, const LowBitCall& call, int threads);

}  // namespace headrace
