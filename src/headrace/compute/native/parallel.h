#pragma once

#include <functional>

namespace headrace {

// Call work(0) ... work(count - 1), each once, on up to `threads` threads; in order of claim, so put long items first.
// `work` must not throw.
void parallel_for(int threads, int count, const std::function<void(int)>& work);

}  // namespace headrace
