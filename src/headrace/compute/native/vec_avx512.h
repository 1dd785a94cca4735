// vec.h for AVX-512 (F, BW, DQ, VL).
#pragma once

namespace headrace {
namespace {

using V = __m512;
using Bits = __m512i;

// Accumulators of 6 rows and 4 x 16 columns fill 24 of 32 registers; the others hold a row of B and an element of A.
constexpr int kRows = 6;
constexpr int kColumns = 4;

INLINE V zero() { return _mm512_setzero_ps(); }
INLINE V splat(float x) { return _mm512_set1_ps(x); }
INLINE V load(const float* p) { return _mm512_loadu_ps(p); }
INLINE void store(float* p, V v) { _mm512_storeu_ps(p, v); }
INLINE V add(V a, V b) { return _mm512_add_ps(a, b); }
INLINE V mul(V a, V b) { return _mm512_mul_ps(a, b); }
INLINE V div(V a, V b) { return _mm512_div_ps(a, b); }
INLINE V max(V a, V b) { return _mm512_max_ps(a, b); }
INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
// a < b ? x : y, lane by lane; y where either is NaN.
INLINE V where_less(V a, V b, V x, V y) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x); }
INLINE V round(V v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE V ldexp(V x, V n) { return _mm512_scalef_ps(x, n); }
INLINE V where(uint16_t mask, V a, V b) { return _mm512_mask_blend_ps(mask, b, a); }
INLINE float hmax(V v) { return _mm512_reduce_max_ps(v); }
INLINE float hsum(V v) { return _mm512_reduce_add_ps(v); }

INLINE Bits load_bits(const uint32_t* p) { return _mm512_loadu_si512(p); }
INLINE Bits splat_bits(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
INLINE V low_half(Bits x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }
INLINE V high_half(Bits x) { return _mm512_castsi512_ps(_mm512_and_si512(x, splat_bits(0xffff0000u))); }

INLINE V widen(const uint16_t* p) {
  Bits wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

INLINE __m256i narrowed(V v) {
#if defined(__AVX512BF16__)
  return (__m256i)_mm512_cvtneps_pbh(v);
#else
  Bits x = _mm512_castps_si512(v);  // round to nearest even: add 0x7fff and the last bit that stays; a NaN stays one
  Bits odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), splat_bits(1));
  Bits up = _mm512_add_epi32(x, _mm512_add_epi32(odd, splat_bits(0x7fff)));
  up = _mm512_mask_or_epi32(up, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), x, splat_bits(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16));
#endif
}
INLINE void narrow(uint16_t* p, V v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrowed(v)); }
// The nearest bf16.
INLINE V rounded(V v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrowed(v)), 16)); }

// a[0] b[0] a[1] b[1] ... of 16 bf16 each.
INLINE Bits interleaved(const uint16_t* a, const uint16_t* b) {
  const Bits order = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5,
                                      36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  Bits x = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a)));
  Bits y = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)));
  return _mm512_permutex2var_epi16(x, order, y);
}
INLINE void store_bits(uint32_t* p, Bits x) { _mm512_storeu_si512(p, x); }

// Four words of each of four places, one after the other.
INLINE Bits quarters(const uint32_t* p, ptrdiff_t pitch) {
  auto at = [&](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i * pitch)); };
  Bits x = _mm512_castsi128_si512(at(0));
  x = _mm512_mask_broadcast_i32x4(x, 0x00f0, at(1));
  x = _mm512_mask_broadcast_i32x4(x, 0x0f00, at(2));
  return _mm512_mask_broadcast_i32x4(x, 0xf000, at(3));
}
INLINE Bits splat_quarter(const uint32_t* p) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
INLINE V as_floats(Bits x) { return _mm512_castsi512_ps(x); }

// out[4 * q + g] = (v[g][4 * q] + v[g][4 * q + 1]) + (v[g][4 * q + 2] + v[g][4 * q + 3]).
INLINE V sum_quarters(const V* v) {
  __m512d low01 = _mm512_castps_pd(_mm512_unpacklo_ps(v[0], v[1])), high01 = _mm512_castps_pd(_mm512_unpackhi_ps(v[0], v[1]));
  __m512d low23 = _mm512_castps_pd(_mm512_unpacklo_ps(v[2], v[3])), high23 = _mm512_castps_pd(_mm512_unpackhi_ps(v[2], v[3]));
  V first = _mm512_castpd_ps(_mm512_unpacklo_pd(low01, low23)), second = _mm512_castpd_ps(_mm512_unpackhi_pd(low01, low23));
  V third = _mm512_castpd_ps(_mm512_unpacklo_pd(high01, high23)), fourth = _mm512_castpd_ps(_mm512_unpackhi_pd(high01, high23));
  return add(add(first, second), add(third, fourth));
}

// in[t][d] for 16 x 16 words, to out + t, four words d of a quad `word` apart and quads `quad` apart.
INLINE void transpose(const uint32_t* in, ptrdiff_t in_pitch, uint32_t* out, ptrdiff_t quad, ptrdiff_t word) {
  Bits a[16], b[16];
  // Quarter rows straight into place: register 4 * j + r holds, in lane q, words 4j..4j+3 of row 4q + r. Masked
  // broadcasts are loads and blends, which leaves the shuffle port, the bottleneck of a transpose, alone.
  for (int j = 0; j < 4; ++j)
    for (int r = 0; r < 4; ++r) a[4 * j + r] = quarters(in + r * in_pitch + 4 * j, 4 * in_pitch);
  for (int j = 0; j < 4; ++j) {
    Bits* x = a + 4 * j;
    b[0] = _mm512_unpacklo_epi32(x[0], x[1]);
    b[1] = _mm512_unpackhi_epi32(x[0], x[1]);
    b[2] = _mm512_unpacklo_epi32(x[2], x[3]);
    b[3] = _mm512_unpackhi_epi32(x[2], x[3]);
    uint32_t* o = out + j * quad;
    _mm512_storeu_si512(o, _mm512_unpacklo_epi64(b[0], b[2]));
    _mm512_storeu_si512(o + word, _mm512_unpackhi_epi64(b[0], b[2]));
    _mm512_storeu_si512(o + 2 * word, _mm512_unpacklo_epi64(b[1], b[3]));
    _mm512_storeu_si512(o + 3 * word, _mm512_unpackhi_epi64(b[1], b[3]));
  }
}

}  // namespace
}  // namespace headrace
