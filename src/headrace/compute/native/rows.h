#pragma once

#include "kernels.h"

namespace headrace {

void norm(const Kernels& kernels, Dtype dtype, const Norm& call, int rows, int threads);

void gate(const Kernels& kernels, Dtype dtype, const Gate& call, int rows, int threads);

// Throws std::invalid_argument, before anything is written, if a block or an offset does not exist.
void turn(const Kernels& kernels, Dtype dtype, const Turn& call, int tokens, int block_count, int block_size,
          int threads);

}  // namespace headrace
