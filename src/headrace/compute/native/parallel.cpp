#include "parallel.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

namespace headrace {
namespace {

struct Job {
  const std::function<void(int)>& work;
  const int count;
  std::atomic<int> next{0};
};

void run(void* data) {
  Job& job = *static_cast<Job*>(data);
  for (int i; (i = job.next.fetch_add(1, std::memory_order_relaxed)) < job.count;) job.work(i);
}

// Entry of a parallel region in the OpenMP runtimes of GCC and LLVM (a stable ABI: compiled code calls it).
using GompParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

}  // namespace

// The team is borrowed from the OpenMP runtime that torch has loaded, found by name: torch's operations and these run in
// turn, and OpenMP threads spin for some milliseconds after a region, so a second team would fight the first for the
// cores. Without such a runtime threads are started for each call.
void parallel_for(int threads, int count, const std::function<void(int)>& work) {
  static const auto gomp_parallel = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  Job job{work, count};
  threads = std::min(threads, count);
  if (threads <= 1) return run(&job);
  if (gomp_parallel) return gomp_parallel(run, &job, static_cast<unsigned>(threads), 0);
  std::vector<std::thread> team;
  for (int i = 1; i < threads; ++i) team.emplace_back(run, &job);
  run(&job);
  for (std::thread& member : team) member.join();
}

}  // namespace headrace
