// Kernels of low_bit.h. Few rows: codes are decoded in registers, straight into the products. Many rows: a slice of a panel
// is decoded into the first-level cache and multiplied from there, so that there never is a second copy of the weights.
//
// Either way an output is the sum, over its groups in order, of scale * (one accumulator over the group's inputs in order,
// less zero point * sum of x). Codes stand for values that are exact in bf16. So both ways give the same bits.
#pragma once

#include "low_bit.h"
#include "vec.h"

namespace headrace {
namespace {

constexpr int kPairs = kTile / 2;         // pairs of inputs in a tile: word rows of B
constexpr int kBlocks = kPanel / 16;      // column blocks of a panel
constexpr int kLanes = 32;                // of a column block: 16 outputs, 2 inputs each

// Multiplies a pair of x, held in f32, by the pair in each word.
struct F32Pairs {
  using Operand = float;
  struct Pair {
    V first, second;
  };
  static INLINE Pair from(Bits words) { return {low_half(words), high_half(words)}; }
  static INLINE Pair splat_x(const float* x) { return {splat(x[0]), splat(x[1])}; }
  static INLINE V dot(V sum, Pair x, Pair w) { return fma(x.second, w.second, fma(x.first, w.first, sum)); }
};

#if defined(__AVX512BF16__)
struct Bf16Pairs {
  using Operand = uint16_t;
  static INLINE __m512bh from(Bits words) { return (__m512bh)words; }
  static INLINE __m512bh splat_x(const uint16_t* x) {
    uint32_t pair;
    memcpy(&pair, x, sizeof pair);
    return (__m512bh)splat_bits(pair);
  }
  static INLINE V dot(V sum, __m512bh x, __m512bh w) { return _mm512_dpbf16_ps(sum, w, x); }
};
#else
using Bf16Pairs = F32Pairs;
#endif

#if defined(__AVX512F__)
// The values of 32 codes at once, from the low bits of 16-bit lanes; bits above the code may be anything.
template <int kBits>
struct Table {
  static constexpr int kRegisters = kBits <= 5 ? 1 : 1 << (kBits - 5);
  Bits part[kRegisters];

  explicit Table(const uint16_t* values) {
    for (int i = 0; i < kRegisters; ++i) part[i] = _mm512_loadu_si512(values + 32 * i);
  }
  INLINE Bits operator()(Bits codes) const {
    if constexpr (kRegisters == 1) {
      return _mm512_permutexvar_epi16(codes, part[0]);
    } else if constexpr (kRegisters == 2) {
      return _mm512_permutex2var_epi16(part[0], codes, part[1]);
    } else {
      __mmask32 second = _mm512_test_epi16_mask(codes, _mm512_set1_epi16(64));
      Bits low = _mm512_mask_blend_epi16(second, pick(codes, 0), pick(codes, 2));
      if constexpr (kRegisters == 4) return low;
      else {
        Bits high = _mm512_mask_blend_epi16(second, pick(codes, 4), pick(codes, 6));
        return _mm512_mask_blend_epi16(_mm512_test_epi16_mask(codes, _mm512_set1_epi16(128)), low, high);
      }
    }
  }

 private:
  INLINE Bits pick(Bits codes, int i) const { return _mm512_permutex2var_epi16(part[i], codes, part[i + 1]); }
};

// The j-th pairs of one column block's tile, decoded from its streams.
template <int kBits>
INLINE Bits decode(const Table<kBits>& table, const uint16_t* words, int j) {
  const int bit = j * kBits, word = bit / 16, shift = bit % 16;
  Bits codes = _mm512_loadu_si512(words + word * kLanes);
  if (shift) codes = _mm512_srli_epi16(codes, shift);
  if (shift + kBits > 16) {
    Bits next = _mm512_loadu_si512(words + (word + 1) * kLanes);
    codes = _mm512_or_si512(codes, _mm512_slli_epi16(next, 16 - shift));
  }
  return table(codes);
}

// Where the word rows of B come from: the streams themselves ...
template <int kBits>
struct Streams {
  Table<kBits> table;
  const uint16_t* words;  // of the panel
  const char* last;       // line that may be asked for ahead of need
  // After how many pairs the streams stand at the border of a word again.
  static constexpr int kPeriod = kBits % 2 ? 16 : kBits % 4 ? 8 : kBits % 8 ? 4 : 2;

  INLINE void ready(int tile) const {
    const char* p = reinterpret_cast<const char*>(words + static_cast<size_t>(tile) * kBlocks * kBits * kLanes) + kAhead;
    for (int i = 0; i < kBlocks * kBits; ++i, p += 64) prefetch(p < last ? p : last);
  }
  INLINE Bits at(int tile, int period, int j, int block) const {
    const uint16_t* from = words + (static_cast<size_t>(tile) * kBlocks + block) * kBits * kLanes;
    return decode<kBits>(table, from + period * (kPeriod * kBits / 16) * kLanes, j);
  }
};
#endif

// ... or a decoded slice, [pairs][64].
struct Slice {
  const uint32_t* words;
  static constexpr int kPeriod = 4;

  INLINE void ready(int) const {}
  INLINE Bits at(int tile, int period, int j, int block) const {
    return load_bits(words + (static_cast<size_t>(tile) * kPairs + period * kPeriod + j) * kPanel + 16 * block);
  }
};

// sum[R][C] += x[tiles][R][32] * the C column blocks from `block` on. `pitch`: operands from tile to tile of x.
template <class E, int R, int C, class Source>
INLINE void accumulate(V (&sum)[R][C], const typename E::Operand* x, int pitch, const Source& source, int block, int begin,
                       int end) {
  for (int tile = begin; tile < end; ++tile, x += pitch) {
    if (!block) source.ready(tile);
    for (int period = 0; period < kPairs / Source::kPeriod; ++period) {
      const typename E::Operand* pairs = x + 2 * period * Source::kPeriod;
#pragma GCC unroll 16
      for (int j = 0; j < Source::kPeriod; ++j) {
        decltype(E::from(Bits())) w[C];
        for (int c = 0; c < C; ++c) w[c] = E::from(source.at(tile, period, j, block + c));
        for (int r = 0; r < R; ++r) {
          auto pair = E::splat_x(pairs + r * kTile + 2 * j);
          for (int c = 0; c < C; ++c) sum[r][c] = E::dot(sum[r][c], pair, w[c]);
        }
      }
    }
  }
}

INLINE V scales_at(const LowBit& call, size_t at) {
  if (call.scales_bf16) return widen(static_cast<const uint16_t*>(call.scales) + at);
  return load(static_cast<const float*>(call.scales) + at);
}

// A group is complete: its sum for 16 outputs of one row, less the zero points, scaled, is added to the total.
INLINE V add_group(const LowBit& call, V total, V sum, V scales, V zeros, int row, int group) {
  if (call.zeros) sum = fma(zeros, splat(-call.sums[static_cast<size_t>(row) * call.groups + group]), sum);
  return fma(sum, scales, total);
}

INLINE V zeros_at(const LowBit& call, size_t at) {
  if (!call.zeros) return zero();
  float wide[16];
  for (int i = 0; i < 16; ++i) wide[i] = static_cast<float>(call.zeros[at + i]) - call.middle;
  return load(wide);
}

// Rows row..row + rows - 1 of 16 outputs: as many as there are.
INLINE void put(const LowBit& call, int row, int column, V v, bool bf16) {
  const int columns = call.n - column;
  if (row >= call.rows || columns <= 0) return;
  const size_t at = static_cast<size_t>(row) * call.n + column;
  if (bf16 && !call.out_f32) {
    uint16_t* to = static_cast<uint16_t*>(call.out) + at;
    if (columns >= 16) return narrow(to, v);
    alignas(64) uint16_t some[16];
    narrow(some, v);
    memcpy(to, some, sizeof(some[0]) * columns);
  } else {
    float* to = static_cast<float*>(call.out) + at;
    if (columns >= 16) return store(to, v);
    alignas(64) float some[16];
    store(some, v);
    memcpy(to, some, sizeof(some[0]) * columns);
  }
}

// Where the inputs of a row begin, and how far it is from tile to tile.
template <class Operand>
INLINE const Operand* inputs(const LowBit& call, int row, int tile) {
  const size_t block = row / call.block, in_block = row % call.block;
  return static_cast<const Operand*>(call.x) +
         ((block * call.tiles + tile) * call.block + in_block) * static_cast<size_t>(kTile);
}

template <int kBits>
INLINE const uint16_t* panel_words(const LowBit& call, int panel) {
  return call.words + static_cast<size_t>(panel) * call.tiles * kBlocks * kBits * kLanes;
}

#if defined(__AVX512F__)
// R rows from `row` on, all in one block of x, and the whole panel, C column blocks at a time.
template <class E, int kBits, int R, int C, bool kBf16Out>
void narrow_rows(const LowBit& call, int row, int panel, const char* last) {
  const Streams<kBits> streams{Table<kBits>(call.table), panel_words<kBits>(call, panel), last};
  const int pitch = call.block * kTile, group_tiles = call.group_tiles();
  for (int block = 0; block < kBlocks; block += C) {
    if (panel * kPanel + 16 * block >= call.n) break;
    alignas(64) float totals[R * C * 16] = {};
    for (int group = 0; group < call.groups; ++group) {
      V sum[R][C];
      for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) sum[r][c] = zero();
      const int begin = group * group_tiles;
      accumulate<E, R, C>(sum, inputs<typename E::Operand>(call, row, begin), pitch, streams, block, begin,
                          begin + group_tiles);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        const size_t at = (static_cast<size_t>(panel) * call.groups + group) * kPanel + 16 * (block + c);
        const V scales = scales_at(call, at), zeros = zeros_at(call, at);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          float* total = totals + (r * C + c) * 16;
          store(total, add_group(call, load(total), sum[r][c], scales, zeros, row + r, group));
        }
      }
    }
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c)
        put(call, row + r, panel * kPanel + 16 * (block + c), load(totals + (r * C + c) * 16), kBf16Out);
  }
}

template <int kBits>
INLINE void decode_slice(const LowBit& call, int panel, int begin, int end, uint32_t* to) {
  const Table<kBits> table(call.table);
  const uint16_t* words = panel_words<kBits>(call, panel) + static_cast<size_t>(begin) * kBlocks * kBits * kLanes;
  for (int tile = begin; tile < end; ++tile, to += kPairs * kPanel)
    for (int block = 0; block < kBlocks; ++block, words += kBits * kLanes)
#pragma GCC unroll 16
      for (int j = 0; j < kPairs; ++j) store_bits(to + j * kPanel + 16 * block, decode<kBits>(table, words, j));
}
constexpr int kWideR = 6, kWideC = 4, kTailR = 2;
#else
template <int kBits>
inline void decode_slice(const LowBit& call, int panel, int begin, int end, uint32_t* to) {
  const uint16_t* words = panel_words<kBits>(call, panel) + static_cast<size_t>(begin) * kBlocks * kBits * kLanes;
  constexpr unsigned mask = (1u << kBits) - 1;
  for (int tile = begin; tile < end; ++tile, to += kPairs * kPanel)
    for (int block = 0; block < kBlocks; ++block, words += kBits * kLanes)
      for (int j = 0; j < kPairs; ++j) {
        const int bit = j * kBits, shift = bit % 16;
        const uint16_t* low = words + bit / 16 * kLanes;
        const uint16_t* high = shift + kBits > 16 ? low + kLanes : low;
        uint32_t* out = to + j * kPanel + 16 * block;
        for (int lane = 0; lane < kLanes; lane += 2) {
          unsigned even = (low[lane] | static_cast<unsigned>(high[lane]) << 16) >> shift & mask;
          unsigned odd = (low[lane + 1] | static_cast<unsigned>(high[lane + 1]) << 16) >> shift & mask;
          out[lane / 2] = call.table[even] | static_cast<uint32_t>(call.table[odd]) << 16;
        }
      }
}
#if defined(__AVX2__)
constexpr int kWideR = 2, kWideC = 2, kTailR = 1;
#else
constexpr int kWideR = 1, kWideC = 2, kTailR = 1;
#endif
#endif

// R rows from `row` on and a whole decoded slice. `sums`: accumulators of the group that began in an earlier slice;
// `totals`: of the complete groups. Both [rows][64], at this row.
template <class E, int R, int C>
void multiply_slice(const LowBit& call, int row, int panel, const uint32_t* slice, int begin, int end, float* sums,
                    float* totals) {
  const int group_tiles = call.group_tiles(), pitch = call.block * kTile;
  for (int block = 0; block < kBlocks; block += C)
    for (int tile = begin; tile < end;) {
      const int group = tile / group_tiles, stop = end < (group + 1) * group_tiles ? end : (group + 1) * group_tiles;
      V sum[R][C];
      for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) sum[r][c] = tile % group_tiles ? load(sums + r * kPanel + 16 * (block + c)) : zero();
      accumulate<E, R, C>(sum, inputs<typename E::Operand>(call, row, tile), pitch, Slice{slice}, block, tile - begin,
                          stop - begin);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        const size_t at = (static_cast<size_t>(panel) * call.groups + group) * kPanel + 16 * (block + c);
        const bool complete = stop % group_tiles == 0;
        const V scales = scales_at(call, at), zeros = zeros_at(call, at);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const int place = r * kPanel + 16 * (block + c);
          if (!complete) store(sums + place, sum[r][c]);
          else store(totals + place, add_group(call, load(totals + place), sum[r][c], scales, zeros, row + r, group));
        }
      }
      tile = stop;
    }
}

template <class E, int kBits, bool kBf16Out>
void wide_rows(const LowBit& call, int row_begin, int row_end, int panel) {
  alignas(64) uint32_t slice[kSlice * kPairs * kPanel];
  alignas(64) float sums[kWideRows * kPanel], totals[kWideRows * kPanel];
  const int rows = row_end - row_begin;
  memset(totals, 0, sizeof(float) * kPanel * ((rows + 1) / 2 * 2));
  for (int tile = 0; tile < call.tiles; tile += kSlice) {
    const int end = tile + kSlice < call.tiles ? tile + kSlice : call.tiles;
    decode_slice<kBits>(call, panel, tile, end, slice);
    int row = 0;
    for (; row + kWideR <= rows; row += kWideR)
      multiply_slice<E, kWideR, kWideC>(call, row_begin + row, panel, slice, tile, end, sums + row * kPanel,
                                        totals + row * kPanel);
    for (; row < rows; row += kTailR)
      multiply_slice<E, kTailR, kWideC>(call, row_begin + row, panel, slice, tile, end, sums + row * kPanel,
                                        totals + row * kPanel);
  }
  for (int row = 0; row < rows; ++row)
    for (int c = 0; c < kBlocks; ++c)
      put(call, row_begin + row, panel * kPanel + 16 * c, load(totals + row * kPanel + 16 * c), kBf16Out);
}

template <class E, int kBits, bool kBf16Out>
void rows_of_panels(const LowBit& call, int row_begin, int row_end, int begin, int end) {
#if defined(__AVX512F__)
  // Most rows for which decoding once for every 8 rows costs less than storing what was decoded, and loading it again.
  constexpr int most = kBits <= 6 ? 32 : kFewRows;
  if (call.rows <= most) {
    const char* last = reinterpret_cast<const char*>(panel_words<kBits>(call, end)) - 64;
    const char* first = reinterpret_cast<const char*>(panel_words<kBits>(call, begin));
    for (const char* p = first; p < first + kAhead; p += 64) prefetch(p < last ? p : last);
    for (int panel = begin; panel < end; ++panel)
      for (int row = row_begin; row < row_end; row += kFewRows) {
        if (call.block == 1) narrow_rows<E, kBits, 1, 4, kBf16Out>(call, row, panel, last);
        else if (call.block == 2) narrow_rows<E, kBits, 2, 4, kBf16Out>(call, row, panel, last);
        else if (call.block == 4) narrow_rows<E, kBits, 4, 4, kBf16Out>(call, row, panel, last);
        else narrow_rows<E, kBits, kFewRows, 2, kBf16Out>(call, row, panel, last);
      }
    return;
  }
#endif
  for (int panel = begin; panel < end; ++panel) wide_rows<E, kBits, kBf16Out>(call, row_begin, row_end, panel);
}

template <class E, bool kBf16Out>
void low_bit_panels(const LowBit& call, int row_begin, int row_end, int begin, int end) {
  FlushDenormals flush;
  using Rows = void (*)(const LowBit&, int, int, int, int);
  static constexpr Rows by_bits[] = {
      rows_of_panels<E, 1, kBf16Out>, rows_of_panels<E, 2, kBf16Out>, rows_of_panels<E, 3, kBf16Out>,
      rows_of_panels<E, 4, kBf16Out>, rows_of_panels<E, 5, kBf16Out>, rows_of_panels<E, 6, kBf16Out>,
      rows_of_panels<E, 7, kBf16Out>, rows_of_panels<E, 8, kBf16Out>};
  by_bits[call.bits - 1](call, row_begin, row_end, begin, end);
}

}  // namespace
}  // namespace headrace
