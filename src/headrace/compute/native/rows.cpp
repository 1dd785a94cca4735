// Cuts the operations between projections into items of some rows each.
#include "rows.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "parallel.h"

namespace headrace {
namespace {

constexpr int64_t kItem = 32'768;  // values of one item: about 10 us, below which waking a second thread does not pay

template <class Work>
void by_rows(int rows, int64_t values, int threads, const Work& work) {
  int each = static_cast<int>(std::max<int64_t>(1, kItem / std::max<int64_t>(1, values)));
  parallel_for(threads, (rows + each - 1) / each,
               [&](int i) { work(i * each, std::min(rows, i * each + each)); });
}

}  // namespace

void norm(const Kernels& kernels, Dtype dtype, const Norm& call, int rows, int threads) {
  by_rows(rows, call.dim, threads, [&](int begin, int end) { kernels.norm[dtype](call, begin, end); });
}

void gate(const Kernels& kernels, Dtype dtype, const Gate& call, int rows, int threads) {
  by_rows(rows, call.width * int64_t{4}, threads, [&](int begin, int end) { kernels.gate[dtype](call, begin, end); });
}

void turn(const Kernels& kernels, Dtype dtype, const Turn& call, int tokens, int block_count, int block_size,
          int threads) {
  for (int i = 0; i < tokens; ++i)
    if (call.blocks[i] < 0 || call.blocks[i] >= block_count || call.offsets[i] < 0 || call.offsets[i] >= block_size)
      throw std::invalid_argument("token " + std::to_string(i) + " has no slot in the pool");
  by_rows(tokens, (call.heads + 2 * call.kv_heads) * int64_t{call.dim}, threads,
          [&](int begin, int end) { kernels.turn[dtype](call, begin, end); });
}

}  // namespace headrace
