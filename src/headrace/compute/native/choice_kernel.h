// The passes over all words of a vocabulary that drawing one takes.
#pragma once

#include <cmath>
#include <initializer_list>

#include "kernels.h"
#include "vec.h"

namespace headrace {
namespace {

// The first index of the greatest logit, or of the first NaN.
int greatest_logit(const float* logits, int count) {
  constexpr int kRun = 1024;
  float greatest = -INFINITY;
  int run = 0;
  for (int begin = 0; begin < count; begin += kRun) {
    const int end = begin + kRun < count ? begin + kRun : count;
    V most = splat(-INFINITY), odd = zero();
    float last = -INFINITY;
    int i = begin;
    for (; i + 16 <= end; i += 16) {
      V x = load(logits + i);
      most = where_less(most, x, x, most);
      odd = fma(x, zero(), odd);  // NaN from there on, if x is not finite
    }
    bool finite = hsum(odd) == 0.0f;
    for (; i < end; ++i) {
      finite &= std::isfinite(logits[i]);
      if (logits[i] > last) last = logits[i];
    }
    if (!finite)
      for (i = begin; i < end; ++i)
        if (std::isnan(logits[i])) return i;
    float here = hmax(most) > last ? hmax(most) : last;
    if (here > greatest) {
      greatest = here;
      run = begin;
    }
  }
  while (run < count && logits[run] != greatest) ++run;
  return run < count ? run : 0;  // 0: all are -inf
}

// Weights 2^((logit - greatest) * factor), rounded to multiples of 2^-35: sums of up to 2^18 of them are exact in f64,
// whatever their order. Multiplications and additions only, each rounded for itself: the same bits on any instruction set,
// and in numpy (compute/draw.py). Of each 128 words, the sum and the greatest.
void weigh(const float* logits, int count, float greatest, float factor, float* weights, double* sums, float* most) {
  auto weight = [&](V x) {
    x = max(splat(-60.0f), mul(add(x, splat(-greatest)), splat(factor)));
    V n = round(x), f = add(x, mul(n, splat(-1.0f)));
    V p = splat(1.535336188319500e-4f);
    for (float c : {1.339887440266574e-3f, 9.618437357674640e-3f, 5.550332471162809e-2f, 2.402264791363012e-1f,
                    6.931472028550421e-1f, 1.0f})
      p = add(mul(p, f), splat(c));
    V w = ldexp(p, n);
    const V step = splat(0x1p-12f);
    return where_less(w, step, add(add(w, step), splat(-0x1p-12f)), w);
  };
  for (int begin = 0; begin < count; begin += kWordBlock) {
    float* out = weights + begin;  // a multiple of a block long
    V greater = zero();
    for (int i = 0; i < kWordBlock; i += 16) {
      V x = splat(-INFINITY);
      if (begin + i + 16 <= count) {
        x = load(logits + begin + i);
      } else if (begin + i < count) {
        float padded[16];
        store(padded, x);
        memcpy(padded, logits + begin + i, sizeof(float) * (count - begin - i));
        x = load(padded);
      }
      V w = weight(x);
      store(out + i, w);
      greater = max(greater, w);
    }
    double sum[8] = {};
    for (int i = 0; i < kWordBlock; i += 8)
      for (int j = 0; j < 8; ++j) sum[j] += out[i + j];
    sums[begin / kWordBlock] = ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
    most[begin / kWordBlock] = hmax(greater);
  }
}

}  // namespace
}  // namespace headrace
