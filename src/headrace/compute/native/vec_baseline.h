// vec.h in the compilers' vector extension: what every CPU of the architecture has (SSE2, NEON). No fused multiply-add.
#pragma once

namespace headrace {
namespace {

typedef float V __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));

// Accumulators of 1 row and 2 x 16 columns fill 8 of 16 registers (SSE2).
constexpr int kRows = 1;
constexpr int kColumns = 2;

INLINE V splat(float x) { return V{} + x; }
INLINE V zero() { return V{}; }
INLINE V load(const float* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
INLINE void store(float* p, V v) { memcpy(p, &v, sizeof v); }
INLINE V add(V a, V b) { return a + b; }
INLINE V mul(V a, V b) { return a * b; }
INLINE V div(V a, V b) { return a / b; }
INLINE V max(V a, V b) { return a > b ? a : b; }
INLINE V fma(V a, V b, V c) { return a * b + c; }
// a < b ? x : y, lane by lane; y where either is NaN.
INLINE V where_less(V a, V b, V x, V y) { return a < b ? x : y; }
INLINE V round(V v) {  // adding 1.5 * 2^23 leaves no room for a fraction; for |v| < 2^22
  const V big = splat(12582912.0f);
  return (v + big) - big;
}
INLINE V ldexp(V x, V n) {  // n in -126..127
  Ints exponent = (__builtin_convertvector(n, Ints) + 127) << 23;
  return x * (V)exponent;
}
INLINE V where(uint16_t mask, V a, V b) {
  Bits bit = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
  return (Ints)(bit & mask) != 0 ? a : b;
}
INLINE float hmax(V v) {
  for (int width = 8; width; width /= 2)
    for (int i = 0; i < width; ++i) v[i] = v[i] > v[i + width] ? v[i] : v[i + width];
  return v[0];
}
INLINE float hsum(V v) {
  for (int width = 8; width; width /= 2)
    for (int i = 0; i < width; ++i) v[i] += v[i + width];
  return v[0];
}

INLINE Bits splat_bits(uint32_t x) { return Bits{} + x; }
INLINE Bits load_bits(const uint32_t* p) {
  Bits x;
  memcpy(&x, p, sizeof x);
  return x;
}
INLINE V low_half(Bits x) { return (V)(x << 16); }
INLINE V high_half(Bits x) { return (V)(x & 0xffff0000u); }

INLINE V widen(const uint16_t* p) {
  uint32_t wide[16];
  for (int i = 0; i < 16; ++i) wide[i] = p[i];
  return low_half(load_bits(wide));
}
INLINE Bits narrowed(V v) {  // bf16, nearest even, in the low half of each word; a NaN stays one
  Bits x = (Bits)v;
  Bits up = x + (((x >> 16) & 1) + 0x7fff);
  return (v != v ? x | 0x400000 : up) >> 16;
}
INLINE void narrow(uint16_t* p, V v) {
  Bits half = narrowed(v);
  for (int i = 0; i < 16; ++i) p[i] = static_cast<uint16_t>(half[i]);
}
// The nearest bf16.
INLINE V rounded(V v) { return low_half(narrowed(v)); }
INLINE Bits interleaved(const uint16_t* a, const uint16_t* b) {
  Bits x = {};
  for (int i = 0; i < 16; ++i) x[i] = a[i] | static_cast<uint32_t>(b[i]) << 16;
  return x;
}
INLINE void store_bits(uint32_t* p, Bits x) { memcpy(p, &x, sizeof x); }

// in[t][d] for 16 x 16 words, to out + t, four words d of a quad `word` apart and quads `quad` apart.
INLINE void transpose(const uint32_t* in, ptrdiff_t in_pitch, uint32_t* out, ptrdiff_t quad, ptrdiff_t word) {
  for (int t = 0; t < 16; ++t)
    for (int d = 0; d < 16; ++d) out[d / 4 * quad + d % 4 * word + t] = in[t * in_pitch + d];
}

}  // namespace
}  // namespace headrace
