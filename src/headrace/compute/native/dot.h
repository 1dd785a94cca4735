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

  INLINE V load_b(const uint32_t* p) { return load(reinterpret_cast<const float*>(p)); }
  INLINE V gather_b(const float* const* rows, int column) { return load(rows[0] + column); }
  INLINE V splat_a(const float* a) { return splat(*a); }
  INLINE V dot(V sum, V a, V b) { return fma(a, b, sum); }

  static void operand(const float* from, int count, float* to) { memcpy(to, from, count * sizeof(float)); }
  INLINE V put(float* to, V v) {
    store(to, v);
    return v;
  }
  INLINE void output(float* to, V v) { store(to, v); }
};

#if defined(__AVX512BF16__)
// Pairs multiplied by vdpbf16ps: exact products, two to an f32 accumulator.
struct Bf16 {
  using Element = uint16_t;
  using Operand = uint16_t;
  static constexpr int kWidth = 2;

  INLINE __m512bh load_b(const uint32_t* p) { return (__m512bh)load_bits(p); }
  INLINE __m512bh gather_b(const uint16_t* const* rows, int column) {
    return (__m512bh)interleaved(rows[0] + column, rows[1] + column);
  }
  INLINE __m512bh splat_a(const uint16_t* a) {
    uint32_t pair;
    memcpy(&pair, a, sizeof pair);
    return (__m512bh)splat_bits(pair);
  }
  INLINE V dot(V sum, __m512bh a, __m512bh b) { return _mm512_dpbf16_ps(sum, a, b); }

  static void operand(const uint16_t* from, int count, uint16_t* to) { memcpy(to, from, count * sizeof(uint16_t)); }
  INLINE V put(uint16_t* to, V v) {
    narrow(to, v);
    return widen(to);
  }
  INLINE void output(uint16_t* to, V v) { narrow(to, v); }
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

  INLINE Pair load_b(const uint32_t* p) {
    Bits words = load_bits(p);
    return {low_half(words), high_half(words)};
  }
  INLINE Pair gather_b(const uint16_t* const* rows, int column) { return {widen(rows[0] + column), widen(rows[1] + column)}; }
  INLINE Pair splat_a(const float* a) { return {splat(a[0]), splat(a[1])}; }
  INLINE V dot(V sum, Pair a, Pair b) { return fma(a.second, b.second, fma(a.first, b.first, sum)); }

  static void operand(const uint16_t* from, int count, float* to) {
    for (int i = 0; i < count; ++i) {
      uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
      memcpy(to + i, &bits, sizeof bits);
    }
  }
  INLINE V put(float* to, V v) {
    store(to, v);
    return v;
  }
  INLINE void output(uint16_t* to, V v) { narrow(to, v); }
};
#endif

// B, packed: [k / width][columns] words.
template <class E>
struct Packed {
  const uint32_t* words;
  size_t pitch;

  inline auto at(int k, int column) const { return E::load_b(words + k * pitch + column); }
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

// Any number of rows, in blocks of R, then R - 1, ...
template <class E, int R, int C, class B>
inline void multiply_rows(int rows, const typename E::Operand* a, size_t lda, const B& b, int column, int words,
                          const float* factor, float* c, size_t ldc) {
  int r = 0;
  for (; r + R <= rows; r += R)
    multiply_block<E, R, C>(a + r * lda, lda, b, column, words, factor ? factor + r : nullptr, c + r * ldc, ldc);
  if constexpr (R > 1)
    if (r < rows)
      multiply_rows<E, R - 1, C>(rows - r, a + r * lda, lda, b, column, words, factor ? factor + r : nullptr,
                                 c + r * ldc, ldc);
}

// Any number of rows and of columns, the latter a multiple of 32.
template <class E, class B>
inline void multiply(int rows, int columns, const typename E::Operand* a, size_t lda, const B& b, int words,
                     const float* factor, float* c, size_t ldc) {
  int j = 0;
  for (; j + 16 * kColumns <= columns; j += 16 * kColumns)
    multiply_rows<E, kAccumulators / kColumns, kColumns>(rows, a, lda, b, j, words, factor, c + j, ldc);
  if constexpr (kColumns > 2)
    for (; j < columns; j += 32)
      multiply_rows<E, kAccumulators / 2, 2>(rows, a, lda, b, j, words, factor, c + j, ldc);
}

}  // namespace
}  // namespace headrace
