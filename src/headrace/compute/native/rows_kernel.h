// What happens to rows between projections: norms, gates, and the turning of heads.
//
// Each value is rounded to the row's type wherever torch, doing one operation after the other, rounds it. Sums go by
// the place in the row alone, and no row sees another.
#pragma once

#include <cmath>

#include "dot.h"
#include "kernels.h"

namespace headrace {
namespace {

constexpr int kLanes = 16;

// Up to 16 values; those beyond `count` read as zeros, and are not written.
template <class E>
INLINE V take(const typename E::Element* from, int count) {
  if (count >= kLanes) return E::input(from);
  typename E::Element padded[kLanes] = {};
  memcpy(padded, from, sizeof(padded[0]) * count);
  return E::input(padded);
}

template <class E>
INLINE void give(typename E::Element* to, int count, V v) {
  if (count >= kLanes) return E::output(to, v);
  typename E::Element padded[kLanes];
  E::output(padded, v);
  memcpy(to, padded, sizeof(padded[0]) * count);
}

// 1 / sqrt(mean of squares + eps), the squares summed 64 apart.
class Root {
 public:
  INLINE void add(int i, V v) { sums_[i / kLanes % 4] = fma(v, v, sums_[i / kLanes % 4]); }
  float scale(int dim, float eps) const {
    V sum = headrace::add(headrace::add(sums_[0], sums_[1]), headrace::add(sums_[2], sums_[3]));
    return 1.0f / std::sqrt(hsum(sum) / static_cast<float>(dim) + eps);
  }

 private:
  V sums_[4] = {zero(), zero(), zero(), zero()};
};

template <class E>
void norm_rows(const Norm& call, int begin, int end) {
  using Element = typename E::Element;
  FlushDenormals flush;
  auto* weight = static_cast<const Element*>(call.weight);
  for (int row = begin; row < end; ++row) {
    ptrdiff_t at = static_cast<ptrdiff_t>(row) * call.dim;
    auto* x = static_cast<Element*>(call.x) + at;
    auto* delta = call.delta ? static_cast<const Element*>(call.delta) + at : nullptr;
    auto* out = static_cast<Element*>(call.out) + at;
    Root root;
    for (int i = 0; i < call.dim; i += kLanes) {
      V v = take<E>(x + i, call.dim - i);
      if (delta) {
        v = E::nearest(add(v, take<E>(delta + i, call.dim - i)));
        give<E>(x + i, call.dim - i, v);
      }
      root.add(i, v);
    }
    V scale = splat(root.scale(call.dim, call.eps));
    for (int i = 0; i < call.dim; i += kLanes) {
      V v = E::nearest(mul(take<E>(x + i, call.dim - i), scale));
      give<E>(out + i, call.dim - i, mul(v, take<E>(weight + i, call.dim - i)));
    }
  }
}

// x / (1 + e^-t): silu where t is x.
INLINE V damped(V x, V t) {
  V size = where_less(t, zero(), t, mul(t, splat(-1.0f)));  // -|t|
  V power = mul(size, splat(1.44269504f));
  V e = exp2(power);
  e = where_less(power, splat(-126.0f), zero(), e);
  return mul(x, div(where_less(t, zero(), e, splat(1.0f)), add(splat(1.0f), e)));
}

template <class E>
void gate_rows(const Gate& call, int begin, int end) {
  using Element = typename E::Element;
  FlushDenormals flush;
  for (int row = begin; row < end; ++row) {
    auto* gate = static_cast<const Element*>(call.x) + static_cast<ptrdiff_t>(row) * 2 * call.width;
    auto* up = gate + call.width;
    auto* out = static_cast<Element*>(call.out) + static_cast<ptrdiff_t>(row) * call.width;
    for (int i = 0; i < call.width; i += kLanes) {
      V x = take<E>(gate + i, call.width - i), t = x;
      if (call.gelu) {  // (1 + tanh(z)) / 2 = 1 / (1 + e^(-2 z))
        V cube = mul(mul(x, x), x);
        t = mul(fma(cube, splat(0.044715f), x), splat(2.0f * 0.7978845608f));
      }
      V v = E::nearest(damped(x, t));
      give<E>(out + i, call.width - i, mul(v, take<E>(up + i, call.width - i)));
    }
  }
}

// One head, normalised (if `weight`) and turned by its token's angles, from `from` to `to`.
template <class E>
INLINE void turn_head(const Turn& call, const typename E::Element* from, const typename E::Element* weight,
                      const typename E::Element* cos, const typename E::Element* sin, typename E::Element* to) {
  const int dim = call.dim, half = dim / 2;
  alignas(64) float x[kDimMax + kLanes];
  Root root;
  for (int i = 0; i < dim; i += kLanes) {
    V v = take<E>(from + i, dim - i);
    if (weight) root.add(i, v);
    store(x + i, v);
  }
  if (weight) {
    V scale = splat(root.scale(dim, call.eps));
    for (int i = 0; i < dim; i += kLanes) {
      V v = E::nearest(mul(load(x + i), scale));
      store(x + i, E::nearest(mul(v, take<E>(weight + i, dim - i))));
    }
  }
  for (int i = 0; i < half; i += kLanes) {
    int count = half - i;
    V low = load(x + i), high = load(x + half + i), c = take<E>(cos + i, count), s = take<E>(sin + i, count);
    V low_turned = add(E::nearest(mul(low, c)), E::nearest(mul(mul(high, s), splat(-1.0f))));
    V high_turned = add(E::nearest(mul(high, c)), E::nearest(mul(low, s)));
    give<E>(to + i, count, low_turned);
    give<E>(to + half + i, count, high_turned);
  }
}

template <class E>
void turn_rows(const Turn& call, int begin, int end) {
  using Element = typename E::Element;
  FlushDenormals flush;
  const int dim = call.dim, half = dim / 2;
  for (int token = begin; token < end; ++token) {
    auto* row = static_cast<Element*>(call.qkv) + static_cast<ptrdiff_t>(token) * (call.heads + 2 * call.kv_heads) * dim;
    auto* cos = static_cast<const Element*>(call.cos) + static_cast<ptrdiff_t>(token) * half;
    auto* sin = static_cast<const Element*>(call.sin) + static_cast<ptrdiff_t>(token) * half;
    auto* weight = static_cast<const Element*>(call.weight);
    auto* kv = static_cast<Element*>(call.kv) + call.blocks[token] * call.block_stride +
               call.offsets[token] * call.token_stride;
    for (int head = 0; head < call.heads + call.kv_heads; ++head) {
      auto* from = row + head * dim;
      auto* to = head < call.heads ? from : kv + (head - call.heads) * call.head_stride;
      turn_head<E>(call, from, weight ? weight + head * dim : nullptr, cos, sin, to);
    }
    auto* v = row + (call.heads + call.kv_heads) * dim;
    for (int head = 0; head < call.kv_heads; ++head)
      memcpy(kv + call.plane_stride + head * call.head_stride, v + head * dim, sizeof(Element) * dim);
  }
}

}  // namespace
}  // namespace headrace
