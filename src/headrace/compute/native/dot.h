// The one inner loop: C[rows][columns] (+)= A[rows][k] * B[k][columns], each output one accumulator over k in order.
//
// How many rows and columns are computed together changes which registers hold the accumulators and nothing else, so an
// output's bits depend on its row of A and its column of B alone. B is packed in words of 32 bits, so that a row of B is
// one load per 16 columns: f32 one k to a word, bf16 two neighbouring k to a word ("width").
#pragma once

#include "vec.h"

namespace headrace {
namespace {

// Elements of A and B, and how to multiply them. Operand is the type that A is held in.
// load_b reads 16 columns of one packed word row, gather_b of the `width` rows that would be packed into it.
struct F32 {
  using Element = float;
  using Operand = float;
  static constexpr int kWidth = 1;

  static INLINE V load_b(const uint32_t* p) { return load(reinterpret_cast<const float*>(p)); }
  static INLINE V gather_b(const float* const* rows, int column) { return load(rows[0] + column); }
  static INLINE V splat_a(const float* a) { return splat(*a); }
  static INLINE V dot(V sum, V a, V b) { return fma(a, b, sum); }
#if defined(__AVX512F__)
  static constexpr bool kQuarters = true;  // a few rows of A can meet rows of B as they lie, four words at a time
  static INLINE V quarters_b(const uint32_t* p, ptrdiff_t pitch) { return as_floats(quarters(p, pitch)); }
  static INLINE V quarter_a(const uint32_t* p) { return as_floats(splat_quarter(p)); }
#else
  static constexpr bool kQuarters = false;
#endif

  static void operand(const float* from, int count, float* to) { memcpy(to, from, count * sizeof(float)); }
  static INLINE V put(float* to, V v) {
    store(to, v);
    return v;
  }
  static INLINE void output(float* to, V v) { store(to, v); }
  static INLINE V input(const float* from) { return load(from); }
  static INLINE V nearest(V v) { return v; }  // Element, as f32
};

#if defined(__AVX512BF16__)
// Pairs multiplied by vdpbf16ps: exact products, two to an f32 accumulator.
struct Bf16 {
  using Element = uint16_t;
  using Operand = uint16_t;
  static constexpr int kWidth = 2;

  static INLINE __m512bh load_b(const uint32_t* p) { return (__m512bh)load_bits(p); }
  static INLINE __m512bh gather_b(const uint16_t* const* rows, int column) {
    return (__m512bh)interleaved(rows[0] + column, rows[1] + column);
  }
  static INLINE __m512bh splat_a(const uint16_t* a) {
    uint32_t pair;
    memcpy(&pair, a, sizeof pair);
    return (__m512bh)splat_bits(pair);
  }
  static INLINE V dot(V sum, __m512bh a, __m512bh b) { return _mm512_dpbf16_ps(sum, a, b); }
  static constexpr bool kQuarters = true;
  static INLINE __m512bh quarters_b(const uint32_t* p, ptrdiff_t pitch) { return (__m512bh)quarters(p, pitch); }
  static INLINE __m512bh quarter_a(const uint32_t* p) { return (__m512bh)splat_quarter(p); }

  static void operand(const uint16_t* from, int count, uint16_t* to) { memcpy(to, from, count * sizeof(uint16_t)); }
  static INLINE V put(uint16_t* to, V v) {
    narrow(to, v);
    return widen(to);
  }
  static INLINE void output(uint16_t* to, V v) { narrow(to, v); }
  static INLINE V input(const uint16_t* from) { return widen(from); }
  static INLINE V nearest(V v) { return rounded(v); }
};
#else
// Without vdpbf16ps A is held in f32 (attention weights are not rounded), and B is widened in registers.
struct Bf16 {
  using Element = uint16_t;
  using Operand = float;
  static constexpr int kWidth = 2;
  struct Pair {
    V first, second;
  };

  static INLINE Pair load_b(const uint32_t* p) {
    Bits words = load_bits(p);
    return {low_half(words), high_half(words)};
  }
  static INLINE Pair gather_b(const uint16_t* const* rows, int column) { return {widen(rows[0] + column), widen(rows[1] + column)}; }
  static INLINE Pair splat_a(const float* a) { return {splat(a[0]), splat(a[1])}; }
  static constexpr bool kQuarters = false;
  static INLINE V dot(V sum, Pair a, Pair b) { return fma(a.second, b.second, fma(a.first, b.first, sum)); }

  static void operand(const uint16_t* from, int count, float* to) {
    for (int i = 0; i < count; ++i) {
      uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
      memcpy(to + i, &bits, sizeof bits);
    }
  }
  static INLINE V put(float* to, V v) {
    store(to, v);
    return v;
  }
  static INLINE void output(uint16_t* to, V v) { narrow(to, v); }
  static INLINE V input(const uint16_t* from) { return widen(from); }
  static INLINE V nearest(V v) { return rounded(v); }
};
#endif

// B, packed: [k / width][columns] words.
template <class E>
struct Packed {
  const uint32_t* words;
  size_t pitch;

  Packed from(int k) const { return {words + k * pitch, pitch}; }

  INLINE auto at(int k, int column) const { return E::load_b(words + k * pitch + column); }
};

// R rows and 16 * C columns from `column` on. `factor`: what the old C is multiplied by first, per row; null: C is 0.
template <class E, int R, int C, class B>
INLINE void multiply_block(const typename E::Operand* a, size_t lda, const B& b, int column, int words,
                           const float* factor, float* c, size_t ldc) {
  V sum[R][C];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < C; ++j) sum[r][j] = factor ? mul(load(c + r * ldc + 16 * j), splat(factor[r])) : zero();
  for (int k = 0; k < words; ++k) {
    decltype(b.at(0, 0)) y[C];
    for (int j = 0; j < C; ++j) y[j] = b.at(k, column + 16 * j);
    for (int r = 0; r < R; ++r) {
      auto x = E::splat_a(a + r * lda + k * E::kWidth);
      for (int j = 0; j < C; ++j) sum[r][j] = E::dot(sum[r][j], x, y[j]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < C; ++j) store(c + r * ldc + 16 * j, sum[r][j]);
}

// At most R rows.
template <class E, int R, int C, class B>
inline void multiply_columns(int rows, const typename E::Operand* a, size_t lda, const B& b, int column, int words,
                             const float* factor, float* c, size_t ldc) {
  if (rows == R) return multiply_block<E, R, C>(a, lda, b, column, words, factor, c, ldc);
  if constexpr (R > 1) multiply_columns<E, R - 1, C>(rows, a, lda, b, column, words, factor, c, ldc);
}

// At most kRows rows; a multiple of 16 columns.
template <class E, class B>
inline void multiply(int rows, int columns, const typename E::Operand* a, size_t lda, const B& b, int words,
                     const float* factor, float* c, size_t ldc) {
  int j = 0;
  if (rows <= 3)  // rows of B are then read in one sweep: each is two lines or more, of memory that may be far
    for (; j + 128 <= columns && kColumns == 4; j += 128)
      multiply_columns<E, 3, 8>(rows, a, lda, b, j, words, factor, c + j, ldc);
  for (; j + 64 <= columns && kColumns == 4; j += 64)
    multiply_columns<E, kRows, 4>(rows, a, lda, b, j, words, factor, c + j, ldc);
  for (; j + 32 <= columns; j += 32) multiply_columns<E, kRows, 2>(rows, a, lda, b, j, words, factor, c + j, ldc);
  if (j < columns) multiply_columns<E, kRows, 1>(rows, a, lda, b, j, words, factor, c + j, ldc);
}

}  // namespace
}  // namespace headrace
