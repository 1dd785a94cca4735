// vec.h for AVX2 with FMA: two registers of eight.
#pragma once

namespace headrace {
namespace {

struct V {
  __m256 low, high;
};
struct Bits {
  __m256i low, high;
};

// Accumulators of 3 rows and 2 x 16 columns fill 12 of 16 registers.
constexpr int kRows = 3;
constexpr int kColumns = 2;

INLINE V zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
INLINE V splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE V load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void store(float* p, V v) {
  _mm256_storeu_ps(p, v.low);
  _mm256_storeu_ps(p + 8, v.high);
}
INLINE V add(V a, V b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
INLINE V mul(V a, V b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
INLINE V div(V a, V b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
INLINE V max(V a, V b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
INLINE V fma(V a, V b, V c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
// a < b ? x : y, lane by lane; y where either is NaN.
INLINE V where_less(V a, V b, V x, V y) {
  return {_mm256_blendv_ps(y.low, x.low, _mm256_cmp_ps(a.low, b.low, _CMP_LT_OQ)),
          _mm256_blendv_ps(y.high, x.high, _mm256_cmp_ps(a.high, b.high, _CMP_LT_OQ))};
}
INLINE V round(V v) {
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(v.low, nearest), _mm256_round_ps(v.high, nearest)};
}

INLINE __m256 power_of_two(__m256 n) {  // n in -126..127
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
INLINE V ldexp(V x, V n) { return mul(x, {power_of_two(n.low), power_of_two(n.high)}); }

INLINE __m256 lanes(uint16_t mask) {  // bit i of the low eight -> all bits of lane i
  const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(mask), bits), bits));
}
INLINE V where(uint16_t mask, V a, V b) {
  return {_mm256_blendv_ps(b.low, a.low, lanes(mask)),
          _mm256_blendv_ps(b.high, a.high, lanes(static_cast<uint16_t>(mask >> 8)))};
}

INLINE float hmax(V v) {
  __m256 x = _mm256_max_ps(v.low, v.high);
  __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}
INLINE float hsum(V v) {
  __m256 x = _mm256_add_ps(v.low, v.high);
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}

INLINE __m256i load_256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
INLINE void store_256(void* p, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
INLINE __m128i load_128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

INLINE Bits load_bits(const uint32_t* p) { return {load_256(p), load_256(p + 8)}; }
INLINE Bits splat_bits(uint32_t x) {
  return {_mm256_set1_epi32(static_cast<int>(x)), _mm256_set1_epi32(static_cast<int>(x))};
}
INLINE V low_half(Bits x) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(x.low, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(x.high, 16))};
}
INLINE V high_half(Bits x) {
  const __m256i top = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  return {_mm256_castsi256_ps(_mm256_and_si256(x.low, top)), _mm256_castsi256_ps(_mm256_and_si256(x.high, top))};
}

INLINE V widen(const uint16_t* p) {
  return low_half({_mm256_cvtepu16_epi32(load_128(p)), _mm256_cvtepu16_epi32(load_128(p + 8))});
}

INLINE __m256i narrowed(__m256 v) {  // bf16, nearest even, in the low half of each word; a NaN stays one
  __m256i x = _mm256_castps_si256(v);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(x, 16), _mm256_set1_epi32(1));
  __m256i up = _mm256_add_epi32(x, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  __m256i quiet = _mm256_or_si256(x, _mm256_set1_epi32(0x400000));
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(up, quiet, nan), 16);
}
INLINE void narrow(uint16_t* p, V v) {
  __m256i packed = _mm256_packus_epi32(narrowed(v.low), narrowed(v.high));
  store_256(p, _mm256_permute4x64_epi64(packed, 0xd8));  // the pack works inside 128-bit halves: put them in order
}
// The nearest bf16.
INLINE V rounded(V v) { return low_half({narrowed(v.low), narrowed(v.high)}); }

INLINE __m256i interleaved8(const uint16_t* a, const uint16_t* b) {
  return _mm256_or_si256(_mm256_cvtepu16_epi32(load_128(a)), _mm256_slli_epi32(_mm256_cvtepu16_epi32(load_128(b)), 16));
}
INLINE Bits interleaved(const uint16_t* a, const uint16_t* b) {
  return {interleaved8(a, b), interleaved8(a + 8, b + 8)};
}
INLINE void store_bits(uint32_t* p, Bits x) {
  store_256(p, x.low);
  store_256(p + 8, x.high);
}

INLINE void transpose8(const uint32_t* in, ptrdiff_t in_pitch, uint32_t* out, ptrdiff_t quad, ptrdiff_t word) {
  __m256i a[8], b[4];
  for (int j = 0; j < 2; ++j)  // register 4 * j + r: words 4j..4j+3 of rows r and r + 4
    for (int r = 0; r < 4; ++r) {
      const uint32_t* p = in + r * in_pitch + 4 * j;
      a[4 * j + r] = _mm256_inserti128_si256(_mm256_castsi128_si256(load_128(p)), load_128(p + 4 * in_pitch), 1);
    }
  for (int j = 0; j < 2; ++j) {
    __m256i* x = a + 4 * j;
    b[0] = _mm256_unpacklo_epi32(x[0], x[1]);
    b[1] = _mm256_unpackhi_epi32(x[0], x[1]);
    b[2] = _mm256_unpacklo_epi32(x[2], x[3]);
    b[3] = _mm256_unpackhi_epi32(x[2], x[3]);
    uint32_t* o = out + j * quad;
    store_256(o, _mm256_unpacklo_epi64(b[0], b[2]));
    store_256(o + word, _mm256_unpackhi_epi64(b[0], b[2]));
    store_256(o + 2 * word, _mm256_unpacklo_epi64(b[1], b[3]));
    store_256(o + 3 * word, _mm256_unpackhi_epi64(b[1], b[3]));
  }
}

// in[t][d] for 16 x 16 words, to out + t, four words d of a quad `word` apart and quads `quad` apart.
INLINE void transpose(const uint32_t* in, ptrdiff_t in_pitch, uint32_t* out, ptrdiff_t quad, ptrdiff_t word) {
  for (int i = 0; i < 16; i += 8)
    for (int j = 0; j < 16; j += 8) transpose8(in + i * in_pitch + j, in_pitch, out + j / 4 * quad + i, quad, word);
}

}  // namespace
}  // namespace headrace
