#pragma once

#include "kernels.h"

namespace headrace {

void linear(const Kernels& kernels, Dtype dtype, const Linear& call, int threads);

}  // namespace headrace
