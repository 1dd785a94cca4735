// Paged attention of one tile: query vectors of one sequence that share a KV head.
//
// The order of every sum is fixed by absolute key positions: partitions of 1,024 keys; in one, steps of 64 keys, after
// each of which the running maximum, sum and accumulator move on; in one, keys in order. A product q.k is four sums, of
// the words (32 bits of q and k) whose number leaves 0, 1, 2 and 3 when divided by 4, put together as (0 + 1) + (2 + 3):
// so few queries can meet keys as they lie in memory, and many the same keys transposed. A vector that shares a tile
// computes more than it would alone, but only products with a weight of exactly 0, which change no bit (but a zero's
// sign: see `finish`). So its result is the same in any tile.
#pragma once

#include <cmath>

#include "attention_scratch.h"
#include "dot.h"
#include "kernels.h"
#include "variants.h"

namespace headrace {
namespace {

template <class E, class A = Standard>
class TileAttention {
  using Element = typename E::Element;
  static constexpr int kWidth = E::kWidth;

 public:
  TileAttention(const Attention& call, const Tile& tile)
      : call_(call),
        tile_(tile),
        vectors_(tile.end - tile.begin),
        dim_(call.dim),
        words_(call.dim / kWidth),
        segment_((words_ + 15) / 16 * 4) {
    for (int v = 0; v < vectors_; ++v) {
      int position = call.positions[token(v)];
      s_.first[v] = A::first(call, position);
      s_.last[v] = position;
    }
  }

  // Start on a head. `next_head` is prefetched when this one ends; -1: none.
  void begin(int head, int next_head) {
    head_ = head;
    next_head_ = next_head;
    for (int v = 0; v < vectors_; ++v) {
      auto* q = static_cast<const Element*>(call_.q) + token(v) * call_.q_stride + head_in_all(v) * dim_;
      if (few()) {
        E::operand(q, dim_, s_.q + v * dim_);
        continue;
      }
      typename E::Operand natural[kDimMax];
      E::operand(q, dim_, natural);
      for (int w = 0; w < words_; ++w)  // the words of each of the four sums side by side
        memcpy(s_.q + v * dim_ + (w % 4 * (words_ / 4) + w / 4) * kWidth, natural + w * kWidth, sizeof(natural[0]) * kWidth);
    }
  }

  // The same where nothing is attended any more, only put together.
  void place(int head) { head_ = head; }

  const Partial& attend_partition(int partition) {
    Partial& p = s_.partial;
    clear(p);
    int low = greatest(tile_.low, partition * kPartition);
    int high = least(tile_.high, partition * kPartition + kPartition - 1);
    for (int base = low / kStep * kStep; base <= high; base += kStep) step(base);
    return p;
  }

  void attend() {
    int begin = tile_.partition_begin(), end = tile_.partition_end();
    if (end - begin == 1) return finish(attend_partition(begin));
    clear(s_.total);
    for (int p = begin; p < end; ++p) {
      const Partial& part = attend_partition(p);
      for (int v = 0; v < vectors_; ++v) merge(v, part.sum + v * dim_, part.weight + v * 16, part.max[v]);
    }
    finish(s_.total);
  }

  // As much of that as the tile's range says, into the output or as states for `merge_all`.
  void attend_chunk(const Saved& to) {
    const int begin = tile_.partition_begin(), end = tile_.partition_end();
    if (!to.folds) {
      for (int p = begin; p < end; ++p) save(attend_partition(p), to, to.index + p - begin);
      return;
    }
    const Partial* folded = &s_.total;
    if (end - begin == 1) {
      folded = &attend_partition(begin);
    } else {
      clear(s_.total);
      for (int p = begin; p < end; ++p) {
        const Partial& part = attend_partition(p);
        for (int v = 0; v < vectors_; ++v) merge(v, part.sum + v * dim_, part.weight + v * 16, part.max[v]);
      }
    }
    if (to.states) return save(*folded, to, to.index);
    finish(*folded);
  }

  void save(const Partial& p, const Saved& to, int index) const {
    const ptrdiff_t heads = call_.kv_heads * call_.group, floats = dim_ + kPartialTail;
    for (int v = 0; v < vectors_; ++v) {
      float* state = to.states + ((to.slots[token(v)] + index) * heads + head_in_all(v)) * floats;
      memcpy(state, p.sum + v * dim_, sizeof(float) * dim_);
      memcpy(state + dim_, p.weight + v * 16, sizeof(float) * 16);
      state[dim_ + 16] = p.max[v];
    }
  }

  void save(const Partial& p, float* to) const {
    for (int v = 0; v < vectors_; ++v, to += kPartialFloats) {
      memcpy(to, p.sum + v * dim_, sizeof(float) * dim_);
      memcpy(to + kDimMax, p.weight + v * 16, sizeof(float) * 16);
      to[kDimMax + 16] = p.max[v];
    }
  }

  void combine(const float* from) {
    clear(s_.total);
    for (int p = tile_.partition_begin(); p < tile_.partition_end(); ++p)
      for (int v = 0; v < vectors_; ++v, from += kPartialFloats)
        merge(v, from, from + kDimMax, from[kDimMax + 16]);
    finish(s_.total);
  }

  // As `combine`, from partials without padding: [count][vectors][dim + kPartialTail], `stride` floats from one to the next.
  void merge_all(const float* from, int count, ptrdiff_t stride) {
    clear(s_.total);
    for (int p = 0; p < count; ++p, from += stride)
      for (int v = 0; v < vectors_; ++v) {
        const float* part = from + static_cast<ptrdiff_t>(v) * (dim_ + kPartialTail);
        merge(v, part, part + dim_, part[dim_ + 16]);
      }
    finish(s_.total);
  }

 private:
  void clear(Partial& p) const {
    memset(p.sum, 0, sizeof(float) * vectors_ * dim_);
    memset(p.weight, 0, sizeof(float) * vectors_ * 16);
    for (int v = 0; v < vectors_; ++v) p.max[v] = -INFINITY;
  }

  // Are there so few vectors that transposing keys for them does not pay?
  bool few() const { return E::kQuarters && vectors_ <= kRows; }

  static int least(int a, int b) { return a < b ? a : b; }
  static int greatest(int a, int b) { return a > b ? a : b; }
  int token(int v) const { return tile_.token(tile_.begin + v, call_.group); }
  int head_in_all(int v) const { return head_ * call_.group + (tile_.begin + v) % call_.group; }

  // K of the 16 keys from `position` on, token_stride apart; V lies plane_stride after it.
  const Element* chunk(int head, int position) const {
    int block = tile_.blocks[position / call_.block_size];
    return static_cast<const Element*>(call_.kv) + block * call_.block_stride + head * call_.head_stride +
           position % call_.block_size * call_.token_stride;
  }

  // Where the chunk lies that stands at `position`'s place in the step to come; where none does, some chunk.
  const Element* upcoming(int position) const {
    int head = head_, next = position + kStep;
    if (next > tile_.high && next_head_ >= 0) {
      head = next_head_;
      next = tile_.low / kStep * kStep + position % kStep;
    }
    return chunk(head, next <= tile_.high && next + kChunk > tile_.low ? next : position);
  }

  // Vectors that are multiplied together, and the keys of a step that any of them attends, in whole chunks.
  struct Block {
    int begin, count;
    int key_begin, key_end;
    bool exact;  // every vector attends every one of those keys that is not read as zeros
  };

  Block block(int begin, int base, int low, int high) const {
    int count = least(kRows, vectors_ - begin), first = kStep, last = -1;
    bool same = true;
    for (int v = begin; v < begin + count; ++v) {
      int v_first = greatest(s_.first[v], low) - base, v_last = least(s_.last[v], high) - base;
      if (v > begin) same &= v_first == first && v_last == last;
      first = least(first, v_first);
      last = greatest(last, v_last);
    }
    if (first > last) return {begin, count, 0, 0, true};
    int key_begin = first / kChunk * kChunk, key_end = last / kChunk * kChunk + kChunk;
    same &= first == greatest(key_begin, low - base) && last == least(key_end - 1, high - base);
    return {begin, count, key_begin, key_end, same && !A::kMasks};
  }

  void step(int base) {
    int low = greatest(tile_.low, base), high = least(tile_.high, base + kStep - 1);
    if (!few()) pack_keys(base, low, high);
    Block blocks[(kVectors + kRows - 1) / kRows];
    int count = 0;
    bool exact = true;
    for (int v = 0; v < vectors_; v += kRows) {
      Block b = block(v, base, low, high);
      if (b.key_begin == b.key_end) continue;
      blocks[count++] = b;
      exact &= b.exact;
      if constexpr (E::kQuarters) {
        if (few()) meet_rows<kRows>(b, base);
      }
      if (!few()) meet_packed(b);
      for (int i = 0; i < b.count; ++i) softmax(v + i, i * kStep, base);
    }
    find_values(base, low, high);
    if (count == 1 && exact) return accumulate(blocks[0], Found{s_.rows, s_.rows_ahead, call_.token_stride});
    int begin = (low - base) / kChunk * kChunk, end = (high - base) / kChunk * kChunk + kChunk;
    pack_values(begin, end);
    exact = exact || finite(begin, end);
    for (int i = 0; i < count; ++i) {
      if (exact || blocks[i].exact)
        accumulate(blocks[i], Packed<E>{s_.values, static_cast<size_t>(dim_)});
      else
        accumulate_singly(blocks[i], base, low, high);
    }
  }

  // Scores of a block of vectors with packed keys.
  void meet_packed(const Block& b) {
    const int sum = words_ / 4;
    for (int s = 0; s < 4; ++s)
      multiply<E>(b.count, b.key_end - b.key_begin, s_.q + b.begin * dim_ + s * sum * kWidth, dim_,
                  Packed<E>{s_.keys + s * segment_ * kStep + b.key_begin, kStep}, sum, nullptr,
                  s_.scores[s] + b.key_begin, kStep);
  }

  // The same with keys where they lie, of at most R vectors.
  template <int R>
  void meet_rows(const Block& b, int base) {
    if (b.count < R) {
      if constexpr (R > 1) meet_rows<R - 1>(b, base);
      return;
    }
    const ptrdiff_t pitch = call_.token_stride / kWidth;
    auto* q = reinterpret_cast<const uint32_t*>(s_.q + b.begin * dim_);
    for (int c = b.key_begin; c < b.key_end; c += kChunk) {
      auto* keys = reinterpret_cast<const uint32_t*>(chunk(head_, base + c));
      auto* next = reinterpret_cast<const uint32_t*>(upcoming(base + c));
      for (int t = 0; t < kChunk; ++t)
        for (int w = 0; w < words_; w += 16) prefetch(next + t * pitch + w);
      V sums[R][4];
      for (int r = 0; r < R; ++r)
        for (int g = 0; g < 4; ++g) sums[r][g] = zero();
      for (int w = 0; w < words_; w += 4) {
        decltype(E::quarters_b(keys, pitch)) k[4];
        for (int g = 0; g < 4; ++g) k[g] = E::quarters_b(keys + g * pitch + w, 4 * pitch);
        for (int r = 0; r < R; ++r) {
          auto x = E::quarter_a(q + r * words_ + w);
          for (int g = 0; g < 4; ++g) sums[r][g] = E::dot(sums[r][g], x, k[g]);
        }
      }
      for (int r = 0; r < R; ++r) store(s_.scores[0] + r * kStep + c, sum_quarters(sums[r]));
    }
  }

  // Add weight * V to a block of vectors.
  template <class B>
  void accumulate(const Block& b, const B& values) {
    multiply<E>(b.count, dim_, s_.weights + b.begin * kStep + b.key_begin, kStep, values.from(b.key_begin / kWidth),
                (b.key_end - b.key_begin) / kWidth, s_.rescale + b.begin, s_.partial.sum + b.begin * dim_, dim_);
  }

  // The same where some V is infinite or NaN: 0 * inf is not 0, so each vector gets only the values that it may see.
  void accumulate_singly(const Block& b, int base, int low, int high) {
    for (int v = b.begin; v < b.begin + b.count; ++v) {
      int first = greatest(s_.first[v], low), last = least(s_.last[v], high);
      if (first > last) continue;
      int begin = (first - base) / kChunk * kChunk, end = (last - base) / kChunk * kChunk + kChunk;
      find_values(base, first, last);
      if constexpr (A::kMasks) hide(v, base, begin, end);
      accumulate(Block{v, 1, begin, end, true}, Found{s_.rows, s_.rows_ahead, call_.token_stride});
    }
  }

  // Of the values found, those that a vector does not attend read as zeros, too.
  void hide(int v, int base, int begin, int end) {
    uint64_t seen = A(call_, head_in_all(v), token(v), s_.last[v]).seen(base);
    for (int t = begin; t < end; ++t)
      if (!(seen >> t & 1)) s_.rows[t] = none_;
  }

  void pack_keys(int base, int low, int high) {
    const ptrdiff_t pitch = call_.token_stride / kWidth;
    for (int c = (low - base) / kChunk * kChunk; base + c <= high; c += kChunk) {
      uint32_t* out = s_.keys + c;
      auto* in = reinterpret_cast<const uint32_t*>(chunk(head_, base + c));
      auto* next = reinterpret_cast<const uint32_t*>(upcoming(base + c));
      int d = 0;
      for (; d + 16 <= words_; d += 16) {
        for (int t = 0; t < kChunk; ++t) prefetch(next + t * pitch + d);  // in the order they will be read in
        transpose(in + d, pitch, out + d / 4 * kStep, kStep, segment_ * kStep);
      }
      if (d < words_) transpose_tail(in + d, pitch, words_ - d, out + d / 4 * kStep);
    }
  }

  // The last words of 16 keys where there are fewer than 16, with zeros behind them.
  void transpose_tail(const uint32_t* in, ptrdiff_t pitch, int count, uint32_t* out) {
    uint32_t padded[16 * 16] = {};
    for (int t = 0; t < 16; ++t) memcpy(padded + 16 * t, in + t * pitch, sizeof(uint32_t) * count);
    transpose(padded, 16, out, kStep, segment_ * kStep);
  }

  // Find V of keys low..high; the other keys of their chunks read as zeros, since their slots may hold anything.
  void find_values(int base, int low, int high) {
    for (int c = (low - base) / kChunk * kChunk; base + c <= high; c += kChunk) {
      const Element* in = chunk(head_, base + c) + call_.plane_stride;
      s_.rows_ahead[c / kChunk] = upcoming(base + c) + call_.plane_stride;
      for (int t = c; t < c + kChunk; ++t, in += call_.token_stride)
        s_.rows[t] = base + t >= low && base + t <= high ? in : none_;
    }
  }

  // The values found of keys begin..end - 1 of the step, packed; they are read once for each six vectors.
  void pack_values(int begin, int end) {
    for (int t = begin; t < end; t += kWidth) {
      uint32_t* out = s_.values + t / kWidth * dim_;
      const Element* const* rows = s_.rows + t;
      const Element* ahead = s_.rows_ahead[t / kChunk] + t % kChunk * call_.token_stride;
      for (int d = 0; d < dim_ * kWidth; d += 64 / sizeof(Element)) prefetch(ahead + d);
      for (int d = 0; d < dim_; d += 16) {
        if constexpr (kWidth == 1)
          memcpy(out + d, rows[0] + d, 16 * sizeof(uint32_t));
        else
          store_bits(out + d, interleaved(rows[0] + d, rows[1] + d));
      }
    }
  }

  // The values found, as B, straight from the pool.
  struct Found {
    const Element* const* rows;
    const Element* const* ahead;
    ptrdiff_t stride;  // token to token
    int first = 0;  // row of B that k counts from

    Found from(int k) const { return {rows, ahead, stride, k}; }

    INLINE auto at(int k, int column) const {
      int t = (first + k) * kWidth;
      const Element* p = ahead[t / kChunk] + t % kChunk * stride + column * kWidth;
      if (column * kWidth * sizeof(Element) % 64 == 0) prefetch(p);
      return E::gather_b(rows + t, column);
    }
  };

  // Is every packed value of keys begin..end - 1 of the step finite (exponent bits not all ones)?
  bool finite(int begin, int end) const {
    constexpr uint32_t high = 0x7f800000u, low = kWidth == 2 ? 0x7f80u : 0xffffffffu;  // f32 has no low half: never
    uint32_t bad = 0;
    for (int i = begin / kWidth * dim_; i < end / kWidth * dim_; ++i)
      bad |= ((s_.values[i] & high) == high) | ((s_.values[i] & low) == low);
    return !bad;
  }

  // Scores of one vector, from `at` on, into weights; moves its maximum and its sum of weights on. Scores of chunks in which it attends
  // nothing were not computed, and are not looked at.
  void softmax(int v, int at, int base) {
    auto product = [&](int i) {
      V first = load(s_.scores[0] + at + 16 * i);
      if (few()) return first;
      return add(add(first, load(s_.scores[1] + at + 16 * i)),
                 add(load(s_.scores[2] + at + 16 * i), load(s_.scores[3] + at + 16 * i)));
    };
    Partial& p = s_.partial;
    int first = greatest(s_.first[v] - base, 0), last = least(s_.last[v] - base, kStep - 1);
    typename E::Operand* weights = s_.weights + v * kStep;
    s_.rescale[v] = 1.0f;
    if (first > last) {
      memset(weights, 0, sizeof(*weights) * kStep);
      return;
    }
    const A variant(call_, head_in_all(v), token(v), s_.last[v]);
    uint64_t mask = ~0ull << first & ~0ull >> (kStep - 1 - last);
    if constexpr (A::kMasks) {
      mask &= variant.seen(base);
      if (!mask) {
        memset(weights, 0, sizeof(*weights) * kStep);
        return;
      }
    }
    const V factor = splat(call_.scale * kLog2E);
    V score[4], weight[4];
    for (int i = 0; i < 4; ++i)
      score[i] = where(mask >> 16 * i, variant.score(mul(product(i), factor), base + 16 * i), splat(-INFINITY));
    if constexpr (!A::kSoftmax) {
      for (int i = 0; i < 4; ++i)
        weight[i] = E::put(weights + 16 * i, where(mask >> 16 * i, variant.weight(score[i]), zero()));
      V sum = add(add(weight[0], weight[1]), add(weight[2], weight[3]));
      store(p.weight + v * 16, add(load(p.weight + v * 16), sum));
      p.max[v] = 0.0f;  // nothing is relative to it
      return;
    }
    float now = hmax(max(max(score[0], score[1]), max(score[2], score[3])));
    if (now <= p.max[v]) now = p.max[v];
    for (int i = 0; i < 4; ++i)
      weight[i] = E::put(weights + 16 * i, where(mask >> 16 * i, exp2(add(score[i], splat(-now))), zero()));
    V sum = add(add(weight[0], weight[1]), add(weight[2], weight[3]));
    V rescale = exp2(splat(p.max[v] - now));
    store(p.weight + v * 16, fma(load(p.weight + v * 16), rescale, sum));
    s_.rescale[v] = hmax(rescale);
    p.max[v] = now;
  }

  // Add one partition's partial to vector v of the total.
  void merge(int v, const float* sum, const float* weight, float max) {
    if (hsum(load(weight)) == 0.0f) return;  // attends nothing here: alone, the vector would not have come by
    Partial& t = s_.total;
    float now = max <= t.max[v] ? t.max[v] : max;
    V keep = exp2(splat(t.max[v] - now)), take = exp2(splat(max - now));
    float* total = t.sum + v * dim_;
    for (int d = 0; d < dim_; d += 16) store(total + d, fma(load(total + d), keep, mul(load(sum + d), take)));
    store(t.weight + v * 16, fma(load(t.weight + v * 16), keep, mul(load(weight), take)));
    t.max[v] = now;
  }

  void finish(const Partial& p) const {
    for (int v = 0; v < vectors_; ++v) {
      const A variant(call_, head_in_all(v), token(v), 0);
      V scale = splat(variant.share(hsum(load(p.weight + v * 16)), p.max[v]));
      auto* out = static_cast<Element*>(call_.out) +
                  (static_cast<ptrdiff_t>(token(v)) * call_.kv_heads * call_.group + head_in_all(v)) * dim_;
      // Masked keys may have turned a -0 into a +0; adding +0 makes both the same.
      for (int d = 0; d < dim_; d += 16) E::output(out + d, add(mul(load(p.sum + v * dim_ + d), scale), zero()));
    }
  }

  alignas(64) static constexpr Element none_[kDimMax] = {};
  const Attention& call_;
  const Tile& tile_;
  const int vectors_;
  const int dim_;
  const int words_;    // of a key
  const int segment_;  // rows of packed keys for each of the four sums
  int head_ = 0, next_head_ = -1;
  Scratch<E> s_;
};

template <class E>
void attend(const Attention& call, const Tile& tile, int head_begin, int head_end) {
  FlushDenormals flush;
  TileAttention<E> work(call, tile);
  for (int head = head_begin; head < head_end; ++head) {
    work.begin(head, head + 1 < head_end ? head + 1 : -1);
    work.attend();
  }
}

template <class E>
void attend_partition(const Attention& call, const Tile& tile, int head, int partition, float* partial) {
  FlushDenormals flush;
  TileAttention<E> work(call, tile);
  work.begin(head, -1);
  work.save(work.attend_partition(partition), partial);
}

template <class E, class A>
void attend_chunk(const Attention& call, const Tile& tile, int head_begin, int head_end, const Saved& to) {
  FlushDenormals flush;
  TileAttention<E, A> work(call, tile);
  for (int head = head_begin; head < head_end; ++head) {
    work.begin(head, head + 1 < head_end ? head + 1 : -1);
    work.attend_chunk(to);
  }
}

template <class E, class A = Standard>
void merge(const Attention& call, int token, int head, const float* partials, int count, ptrdiff_t stride) {
  FlushDenormals flush;
  for (int begin = 0; begin < call.group; begin += kVectors) {
    int end = begin + kVectors < call.group ? begin + kVectors : call.group, at = token * call.group;
    Tile tile{at + begin, at + end, 0, 0, call.positions[token], nullptr};
    TileAttention<E, A> work(call, tile);
    work.place(head);
    work.merge_all(partials + static_cast<ptrdiff_t>(begin) * (call.dim + kPartialTail), count, stride);
  }
}

template <class E>
void combine(const Attention& call, const Tile& tile, int head, const float* partials) {
  FlushDenormals flush;
  TileAttention<E> work(call, tile);
  work.begin(head, -1);
  work.combine(partials);
}

}  // namespace
}  // namespace headrace
