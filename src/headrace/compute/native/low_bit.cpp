// Prepares the inputs of a low-bit linear layer and cuts it into items of work. No choice made here changes a bit of the result.
#include "low_bit.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "parallel.h"

namespace headrace {
namespace {

constexpr int64_t kCostAlone = 500'000;  // products below which waking a second thread does not pay

constexpr int kItems = 8;  // of a thread, so that one that is held up leaves little

struct Scratch {
  std::vector<float> x, sums;  // kept between calls: a step allocates nothing
};

Scratch& scratch() {
  thread_local Scratch kept;
  return kept;
}

float as_float(float x) { return x; }
float as_float(uint16_t x) {
  uint32_t bits = static_cast<uint32_t>(x) << 16;
  float wide;
  memcpy(&wide, &bits, sizeof wide);
  return wide;
}

// The inputs from place `place` on, `count` of a tile's 32. `from`: the row.
template <class From, class To>
void put_tile(const LowBitCall& call, const From* from, int place, int count, To* to) {
  if (call.gather) {
    const int32_t* inputs = call.gather + place;
    for (int i = 0; i < kTile; ++i) {
      From x = inputs[i] < 0 ? From() : from[inputs[i]];
      if constexpr (sizeof(From) == sizeof(To)) to[i] = x;
      else to[i] = as_float(x);
    }
    return;
  }
  if constexpr (sizeof(From) == sizeof(To)) {
    memcpy(to, from + place, sizeof(From) * count);
  } else {
    for (int i = 0; i < count; ++i) to[i] = as_float(from[place + i]);
  }
  for (int i = count; i < kTile; ++i) to[i] = To();
}

// In 16 lanes, then over the lanes: an order that depends on nothing.
template <class To>
void sum_groups(const LowBit& weight, const To* x, float* sums) {
  for (int group = 0, tile = 0; group < weight.groups; ++group) {
    float lanes[16] = {};
    for (int end = tile + weight.group_tiles(); tile < end; ++tile)
      for (int i = 0; i < kTile; ++i) lanes[i % 16] += as_float(x[static_cast<size_t>(tile) * weight.block * kTile + i]);
    for (int width = 8; width; width /= 2)
      for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    sums[group] = lanes[0];
  }
}

template <class From, class To>
void prepare(const LowBitCall& call, To* x, float* sums, int threads) {
  const LowBit& weight = call.weight;
  const int blocks = (weight.rows + weight.block - 1) / weight.block;
  if (static_cast<int64_t>(weight.rows) * call.k < kCostAlone / 4) threads = 1;
  parallel_for(threads, blocks, [&](int block) {
    To* to = x + static_cast<size_t>(block) * weight.tiles * weight.block * kTile;
    for (int r = 0; r < weight.block; ++r) {
      const int row = block * weight.block + r;
      const From* from = static_cast<const From*>(call.x) + static_cast<size_t>(row) * call.k;
      for (int tile = 0; tile < weight.tiles; ++tile) {
        To* place = to + (static_cast<size_t>(tile) * weight.block + r) * kTile;
        if (row < weight.rows) put_tile(call, from, tile * kTile, std::min(kTile, call.k - tile * kTile), place);
        else std::fill(place, place + kTile, To());
      }
      if (sums) sum_groups(weight, to + r * kTile, sums + static_cast<size_t>(row) * weight.groups);
    }
  });
}

}  // namespace

void low_bit(const LowBitKernels& kernels, Dtype dtype, const LowBitCall& asked, int threads) {
  LowBitCall call = asked;
  LowBit& weight = call.weight;
  if (!weight.rows) return;
  weight.block = weight.rows <= 2 ? weight.rows : weight.rows <= 4 ? 4 : weight.rows <= kFewRows ? kFewRows : kRowBlock;
  const int rows = (weight.rows + weight.block - 1) / weight.block * weight.block;
  Scratch& mine = scratch();
  const bool halves = dtype == kBf16 && !kernels.widens_bf16;
  mine.x.resize(std::max(mine.x.size(), static_cast<size_t>(rows) * weight.tiles * kTile / (halves ? 2 : 1)));
  if (weight.zeros) mine.sums.resize(std::max(mine.sums.size(), static_cast<size_t>(rows) * weight.groups));
  float* sums = weight.zeros ? mine.sums.data() : nullptr;
  if (halves) prepare<uint16_t>(call, reinterpret_cast<uint16_t*>(mine.x.data()), sums, threads);
  else if (dtype == kBf16) prepare<uint16_t>(call, mine.x.data(), sums, threads);
  else prepare<float>(call, mine.x.data(), sums, threads);
  weight.x = mine.x.data();
  weight.sums = sums;

  const int panels = (weight.n + kPanel - 1) / kPanel, blocks = (weight.rows + kWideRows - 1) / kWideRows;
  if (static_cast<int64_t>(weight.n) * call.k * ((weight.rows + 3) / 4) < kCostAlone) threads = 1;
  // Where reading is what takes the time, an item is neighbouring panels, so that a thread reads on where it is.
  const int run = weight.rows > kRowBlock ? 1 : std::max(1, panels / (std::max(1, threads) * kItems)), runs = (panels + run - 1) / run;
  parallel_for(threads, blocks * runs, [&](int i) {
    const int row = i / runs * kWideRows, begin = i % runs * run;
    kernels.panels[dtype](weight, row, std::min(row + kWideRows, weight.rows), begin, std::min(begin + run, panels));
  });
}

}  // namespace headrace
