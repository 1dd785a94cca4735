// Cuts a call of the fixed-order linear layer into items of work. No choice made here changes a bit of the result.
#include "linear.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "parallel.h"

namespace headrace {
namespace {

constexpr int kBlock = 96;  // rows that share one reading of a panel: with 1,024 inputs they fill a fifth of 1 MiB of L2
constexpr int64_t kCostAlone = 250'000;  // weights below which (about 10 us to read) waking a second thread does not pay

std::unique_ptr<float[]> widened(const Linear& call) {
  size_t count = static_cast<size_t>(call.rows) * ((call.k + 1) / 2 * 2);
  std::unique_ptr<float[]> wide(new float[count]);
  auto* x = static_cast<const uint16_t*>(call.x);
  for (size_t i = 0; i < count; ++i) {
    uint32_t bits = static_cast<uint32_t>(x[i]) << 16;
    memcpy(&wide[i], &bits, sizeof bits);
  }
  return wide;
}

}  // namespace

void linear(const Kernels& kernels, Dtype dtype, const Linear& asked, int threads) {
  Linear call = asked;
  std::unique_ptr<float[]> wide;
  if (dtype == kBf16 && kernels.widens_bf16) {
    wide = widened(call);
    call.x = wide.get();
  }
  int panels = (call.n + kPanel - 1) / kPanel, blocks = (call.rows + kBlock - 1) / kBlock;
  if (static_cast<int64_t>(call.n) * call.k * blocks < kCostAlone) threads = 1;
  parallel_for(threads, blocks * panels, [&](int i) {
    int row = i / panels * kBlock;
    kernels.linear[dtype](call, row, std::min(row + kBlock, call.rows), i % panels);
  });
}

}  // namespace headrace
