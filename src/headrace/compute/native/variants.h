// Variants of attention: what each does differently, as one small functor. `HEADRACE_VARIANTS` in kernels.h lists them, and
// variants.cpp compiles each for every instruction set ahead of time: a machine that serves needs no compiler, and one build
// has one set of bits. To add one: a functor here, its name in the list, and its class in ops/variants.py.
//
// A functor is made for one query vector at a time. What it does may depend on the vector's head, token and position and on a
// key's position, and on nothing else, so that a row has the same bits in any tile. Its hooks:
//
//   first(call, position)  the first key attended: a sliding window goes with every variant
//   score(s, key)          of the keys key..key + 15, from s = q.k * scale; both times log2(e)
//   kMasks, seen(key)      bits of the keys key..key + 63 (key a multiple of 64) that are attended
//   kSoftmax               weights are 2^(score - greatest), divided by their sum in the end; else
//   weight(score)          each is had from its score alone
//   share(sum, greatest)   what the output is multiplied by in the end
#pragma once

#include <cmath>

#include "kernels.h"
#include "vec.h"

namespace headrace {
namespace {

constexpr float kLog2E = 1.44269504f;

struct Standard {
  static constexpr bool kMasks = false, kSoftmax = true;
  static int first(const Attention& call, int position) { return call.first(position); }

  INLINE Standard(const Attention&, int /*head*/, int /*token*/, int /*position*/) {}
  INLINE V score(V s, int /*key*/) const { return s; }
  INLINE float share(float sum, float /*greatest*/) const { return 1.0f / sum; }
};

// cap * tanh(s / cap) (Gemma 2, arXiv 2408.00118, section 2). tanh(x) = (a - b) / (1 + 2^-|y|), y = 2 x log2(e), where of
// a = 2^min(y, 0) and b = 2^min(-y, 0) one is 1.
struct SoftCap : Standard {
  V up, down;

  INLINE SoftCap(const Attention& call, int head, int token, int position)
      : Standard(call, head, token, position), up(splat(call.constant * kLog2E)), down(splat(2.0f / call.constant)) {}
  INLINE V score(V s, int) const {
    V y = mul(s, down), minus = mul(y, splat(-1.0f));
    V a = exp2(mul(max(minus, zero()), splat(-1.0f))), b = exp2(mul(max(y, zero()), splat(-1.0f)));
    return mul(up, div(add(a, mul(b, splat(-1.0f))), add(splat(1.0f), exp2(mul(max(y, minus), splat(-1.0f))))));
  }
};

// A linear bias by distance, of a slope for each head (ALiBi, arXiv 2108.12409).
struct Alibi : Standard {
  V slope;
  int position;

  INLINE Alibi(const Attention& call, int head, int token, int position)
      : Standard(call, head, token, position), slope(splat(call.by_head[head] * kLog2E)), position(position) {}
  INLINE V score(V s, int key) const {
    static constexpr float kLanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return fma(slope, add(splat(static_cast<float>(key - position)), load(kLanes)), s);
  }
};

// A learned score for each head that takes part in the sum of weights and has no value (gpt-oss; StreamingLLM, arXiv 2309.17453).
struct Sinks : Standard {
  float sink;

  INLINE Sinks(const Attention& call, int head, int token, int position)
      : Standard(call, head, token, position), sink(call.by_head[head] * kLog2E) {}
  float share(float sum, float greatest) const {
    float now = sink > greatest ? sink : greatest;
    float keep = hmax(exp2(splat(greatest - now))), add = hmax(exp2(splat(sink - now)));
    return keep / (sum * keep + add);
  }
};

// Only keys whose bit is set. A row without any gives zeros.
struct Masked : Standard {
  static constexpr bool kMasks = true;
  const uint8_t* bits;

  INLINE Masked(const Attention& call, int head, int token, int position)
      : Standard(call, head, token, position), bits(call.mask + token * call.mask_stride) {}
  INLINE uint64_t seen(int key) const {
    uint64_t word;  // rows are padded to whole words; lowest first, as all machines here have them
    memcpy(&word, bits + key / 8, sizeof word);
    return word;
  }
  INLINE float share(float sum, float) const { return sum == 0.0f ? 0.0f : 1.0f / sum; }
};

// 1 / (1 + e^-(s + bias)) for each key, not divided by their sum (arXiv 2409.04431).
struct Sigmoid : Standard {
  static constexpr bool kSoftmax = false;
  V bias;

  INLINE Sigmoid(const Attention& call, int head, int token, int position)
      : Standard(call, head, token, position), bias(splat(call.constant * kLog2E)) {}
  INLINE V score(V s, int) const { return add(s, bias); }
  INLINE V weight(V s) const {
    V minus = mul(s, splat(-1.0f)), up = exp2(mul(max(minus, zero()), splat(-1.0f)));
    return div(up, add(splat(1.0f), exp2(mul(max(s, minus), splat(-1.0f)))));
  }
  INLINE float share(float, float) const { return 1.0f; }
};

}  // namespace
}  // namespace headrace
