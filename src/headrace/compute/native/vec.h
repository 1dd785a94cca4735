// Sixteen lanes of 32 bits, whatever the instruction set: one implementation is chosen by the flags this file is compiled
// with. Every vec_*.h provides the same names (max gives its second operand where either is NaN):
//
//   V                    16 f32                          Bits                   16 x 32 bits
//   zero() splat(x)      load(p) store(p, v)             load_bits store_bits   splat_bits(x)
//   add mul div max      fma(a, b, c) = a * b + c        low_half high_half     the bf16 in each half, as f32
//   round(v) ldexp(x, n) nearest integer; x * 2^n        widen(p) narrow(p, v)  16 bf16 in memory <-> f32
//   where(mask, a, b)    lane i: mask bit i ? a : b      transpose(...)         16 x 16 words
//   hmax(v) hsum(v)      over the lanes, fixed tree      interleaved(a, b)      a0 b0 a1 b1 ... of 16 bf16 each
//
// Everything lies in an anonymous namespace, so that the linker can never hand one instruction set's copy of an inline
// function to another's caller.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__)
#include "vec_avx512.h"
#elif defined(__AVX2__)
#include "vec_avx2.h"
#else
#include "vec_baseline.h"
#endif

namespace headrace {
namespace {

// Inlined by force: GCC takes a function that only prefetches for one without effect, and drops the call.
INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// Denormals are flushed while a kernel runs. vdpbf16ps always does so; if the other instructions did not, adding a
// zero product could change a bit, and a row would depend on which chunks were computed for it only to be masked.
class FlushDenormals {
#if defined(__x86_64__)
 public:
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
 public:
  FlushDenormals() {}  // No other instruction set here treats denormals in two ways.
#endif
};

// 2^x for x <= 0, relative error about 2e-7 (polynomial of Cephes exp2f); x below -126 gives 2^-126, NaN stays NaN.
INLINE V exp2(V x) {
  x = max(splat(-126.0f), x);
  V n = round(x);
  V f = add(x, mul(n, splat(-1.0f)));
  V p = splat(1.535336188319500e-4f);
  p = fma(p, f, splat(1.339887440266574e-3f));
  p = fma(p, f, splat(9.618437357674640e-3f));
  p = fma(p, f, splat(5.550332471162809e-2f));
  p = fma(p, f, splat(2.402264791363012e-1f));
  p = fma(p, f, splat(6.931472028550421e-1f));
  p = fma(p, f, splat(1.0f));
  return ldexp(p, n);
}

}  // namespace
}  // namespace headrace
