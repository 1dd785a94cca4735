#pragma once

#include <functional>

namespace headrace {

// Call work(0) ... work(count - 1), each once, on up to `threads` threads, the caller one of them. Items are claimed in
// order, so put long ones first. `work` must neither throw nor come here again. One call at a time has the team; a second
// one, from another thread, does its own work alone.
void parallel_for(int threads, int count, const std::function<void(int)>& work);

}  // namespace headrace
