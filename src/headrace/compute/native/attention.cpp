// Cuts a call of paged attention into items of work. No choice made here changes a bit of the result.
#include "attention.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "parallel.h"

namespace headrace {
namespace {

// A partition of a tile under one head, where that alone would keep a thread busy for too long.
struct Piece {
  int tile, head, partition;
  float* partial;
};

// Successive positions of one sequence share tiles; so the keys that a tile attends are one interval.
std::vector<Tile> cut(const Attention& call, const int32_t* rows, int tokens) {
  std::vector<Tile> tiles;
  for (int begin = 0, end; begin < tokens; begin = end) {
    auto follows = [&](int i) {
      return rows[i] == rows[begin] && call.positions[i] == call.positions[i - 1] + 1;
    };
    for (end = begin + 1; end < tokens && follows(end);) ++end;
    for (int v = begin * call.group; v < end * call.group; v += kVectors) {
      int v_end = std::min(v + kVectors, end * call.group);
      int first = call.positions[v / call.group], last = call.positions[(v_end - 1) / call.group];
      const int32_t* table = call.tables + static_cast<ptrdiff_t>(rows[begin]) * call.table_width;
      tiles.push_back({v, v_end, rows[begin], call.first(first), last, table});
    }
  }
  return tiles;
}

void check(const Attention& call, const int32_t* rows, int tokens, int sequences) {
  for (int i = 0; i < tokens; ++i) {
    int row = rows[i], position = call.positions[i];
    if (row < 0 || row >= sequences) throw std::invalid_argument("token " + std::to_string(i) + " has no table row");
    if (position < 0 || position / call.block_size >= call.table_width)
      throw std::invalid_argument("position " + std::to_string(position) + " lies outside its table");
  }
}

void check_blocks(const Attention& call, const Tile& tile, int blocks) {
  for (int i = tile.low / call.block_size; i <= tile.high / call.block_size; ++i)
    if (tile.blocks[i] < 0 || tile.blocks[i] >= blocks)
      throw std::invalid_argument("table row " + std::to_string(tile.sequence) +
                                  " names no block for a position it attends");
}

// Of one head, in time per dim: what packing a key costs, about that of 16 vectors, and the vectors.
int64_t cost(const Tile& tile) { return static_cast<int64_t>(tile.high - tile.low + 1) * (tile.end - tile.begin + 16); }

constexpr int64_t kCostAlone = 2'000'000;  // cost * dim below which (about 10 us) waking a second thread does not pay

}  // namespace

void paged_attention(const Kernels& kernels, Dtype dtype, const Attention& call, const int32_t* rows, int tokens,
                     int sequences, int blocks, int threads) {
  check(call, rows, tokens, sequences);
  std::vector<Tile> tiles = cut(call, rows, tokens);
  int64_t total = 0;
  for (const Tile& tile : tiles) {
    check_blocks(call, tile, blocks);
    total += cost(tile) * call.kv_heads;
  }
  if (total * call.dim < kCostAlone) threads = 1;
  std::stable_sort(tiles.begin(), tiles.end(), [](const Tile& a, const Tile& b) { return cost(a) > cost(b); });

  // Tiles longer than an eighth of a thread's share are split at partition borders; they come first.
  size_t split = 0, floats = 0;
  std::vector<Piece> pieces;
  if (threads > 1)
    for (; split < tiles.size() && cost(tiles[split]) * threads * 8 > total; ++split)
      if (tiles[split].partition_end() - tiles[split].partition_begin() == 1) break;
  for (size_t t = 0; t < split; ++t)
    floats += static_cast<size_t>(tiles[t].partition_end() - tiles[t].partition_begin()) * call.kv_heads *
              (tiles[t].end - tiles[t].begin) * kPartialFloats;
  std::unique_ptr<float[]> partials(new float[floats]);
  std::vector<const float*> firsts;  // of each (split tile, head): its first partial
  float* next = partials.get();
  for (size_t t = 0; t < split; ++t)
    for (int head = 0; head < call.kv_heads; ++head) {
      firsts.push_back(next);
      for (int p = tiles[t].partition_begin(); p < tiles[t].partition_end(); ++p) {
        pieces.push_back({static_cast<int>(t), head, p, next});
        next += static_cast<size_t>(tiles[t].end - tiles[t].begin) * kPartialFloats;
      }
    }

  // Whole tiles: as many heads to an item as leaves every thread a choice of items.
  int whole = static_cast<int>(tiles.size() - split), heads = call.kv_heads;
  while (heads > 1 && whole * (call.kv_heads / heads) < threads * 16) heads = (heads + 1) / 2;
  int spans = (call.kv_heads + heads - 1) / heads, pieces_count = static_cast<int>(pieces.size());
  parallel_for(threads, pieces_count + whole * spans, [&](int i) {
    if (i < pieces_count) {
      const Piece& p = pieces[i];
      return kernels.attend_partition[dtype](call, tiles[p.tile], p.head, p.partition, p.partial);
    }
    i -= pieces_count;
    int head = i % spans * heads;
    kernels.attend[dtype](call, tiles[split + i / spans], head, std::min(head + heads, call.kv_heads));
  });
  parallel_for(threads, static_cast<int>(firsts.size()), [&](int i) {
    kernels.combine[dtype](call, tiles[i / call.kv_heads], i % call.kv_heads, firsts[i]);
  });
}

void partial_attention(const Kernels& kernels, Dtype dtype, const Attention& call, const Partials& wanted,
                       const int32_t* rows, int tokens, int sequences, int blocks, int threads) {
  const int32_t *begins = wanted.begins, *ends = wanted.ends, *bases = wanted.bases;
  for (int i = 0; i < tokens; ++i) {
    if (rows[i] < 0 || rows[i] >= sequences) throw std::invalid_argument("token " + std::to_string(i) + " has no table row");
    int position = call.positions[i], last = std::min(position, ends[i] * kPartition - 1);
    if (begins[i] < 0 || ends[i] <= begins[i] || begins[i] < bases[i] || ends[i] - bases[i] > wanted.slots ||
        ends[i] - 1 > position / kPartition || last / call.block_size >= call.table_width)
      throw std::invalid_argument("token " + std::to_string(i) + " has no such partitions");
  }
  std::vector<Tile> tiles;
  for (int begin = 0, end; begin < tokens; begin = end) {
    auto alike = [&](int i) { return begins[i] == begins[begin] && ends[i] == ends[begin]; };
    for (end = begin + 1; end < tokens && alike(end);) ++end;
    // Cut where the partitions change; positions and rows are cut at as ever.
    Attention part = call;
    part.positions = call.positions + begin;
    for (Tile& tile : cut(part, rows + begin, end - begin)) {
      tile.begin += begin * call.group;
      tile.end += begin * call.group;
      tile.low = begins[begin] * kPartition;
      tile.high = std::min(tile.high, ends[begin] * kPartition - 1);
      check_blocks(call, tile, blocks);
      tiles.push_back(tile);
    }
  }
  struct Item {
    int tile, head, partition;
  };
  std::vector<Item> items;
  int64_t total = 0;
  for (size_t t = 0; t < tiles.size(); ++t) {
    total += cost(tiles[t]) * call.kv_heads;
    for (int head = 0; head < call.kv_heads; ++head)
      for (int p = tiles[t].partition_begin(); p < tiles[t].partition_end(); ++p)
        items.push_back({static_cast<int>(t), head, p});
  }
  if (total * call.dim < kCostAlone) threads = 1;
  const int heads = call.kv_heads * call.group, floats = call.dim + kPartialTail;
  parallel_for(threads, static_cast<int>(items.size()), [&](int i) {
    const Item& item = items[i];
    const Tile& tile = tiles[item.tile];
    std::unique_ptr<float[]> saved(new float[static_cast<size_t>(tile.end - tile.begin) * kPartialFloats]);
    kernels.attend_partition[dtype](call, tile, item.head, item.partition, saved.get());
    for (int v = tile.begin; v < tile.end; ++v) {
      int token = v / call.group, head = item.head * call.group + v % call.group;
      if (item.partition >= ends[token] || item.partition > call.positions[token] / kPartition) continue;
      const float* from = saved.get() + static_cast<ptrdiff_t>(v - tile.begin) * kPartialFloats;
      float* to =
          wanted.out + ((static_cast<ptrdiff_t>(token) * wanted.slots + item.partition - bases[token]) * heads + head) * floats;
      memcpy(to, from, sizeof(float) * call.dim);
      memcpy(to + call.dim, from + kDimMax, sizeof(float) * kPartialTail);
    }
  });
}

void combine_partials(const Kernels& kernels, Dtype dtype, const Attention& call, const float* partials,
                      const int32_t* counts, int tokens, int slots, int threads) {
  for (int i = 0; i < tokens; ++i)
    if (counts[i] < 1 || counts[i] > slots)
      throw std::invalid_argument("token " + std::to_string(i) + " has no such partials");
  const ptrdiff_t head_floats = call.dim + kPartialTail;
  const ptrdiff_t slot_floats = head_floats * call.kv_heads * call.group;
  if (static_cast<int64_t>(tokens) * slots * slot_floats < 100'000) threads = 1;
  parallel_for(threads, tokens * call.kv_heads, [&](int i) {
    int token = i / call.kv_heads, head = i % call.kv_heads;
    const float* from = partials + token * slots * slot_floats + head * call.group * head_floats;
    kernels.merge[dtype](call, token, head, from, counts[token], slot_floats);
  });
}

void write_kv(const Write& call) {
  for (int i = 0; i < call.tokens; ++i)
    if (call.blocks[i] < 0 || call.blocks[i] >= call.block_count || call.offsets[i] < 0 ||
        call.offsets[i] >= call.block_size)
      throw std::invalid_argument("token " + std::to_string(i) + " has no slot in the pool");
  for (int i = 0; i < call.tokens; ++i) {
    char* to = static_cast<char*>(call.kv) + call.blocks[i] * call.block_stride + call.offsets[i] * call.token_stride;
    const char* k = static_cast<const char*>(call.k) + i * call.k_stride;
    const char* v = static_cast<const char*>(call.v) + i * call.v_stride;
    for (int head = 0; head < call.kv_heads; ++head, to += call.head_stride) {
      memcpy(to, k + head * call.token_bytes, call.token_bytes);
      memcpy(to + call.plane_stride, v + head * call.token_bytes, call.token_bytes);
    }
  }
}

}  // namespace headrace
