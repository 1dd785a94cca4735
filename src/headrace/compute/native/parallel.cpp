#include "parallel.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#define RELAX() _mm_pause()
#else
#define RELAX() std::this_thread::yield()
#endif

namespace headrace {
namespace {

constexpr int kSpins = 1000;  // looks for the next call before a member sleeps: about 20 us, the gap inside a layer
constexpr int kItemsMax = 1 << 24;  // leaves room for void claims in the 26 bits that hold the next item
constexpr int kThreadsMax = 1024;

// Threads that help with a call's items. Whoever comes late finds nothing left to do and is not waited for. An OpenMP
// team would be: its barrier waits until the kernel has run every member, and where workers share cores that takes
// milliseconds. Members sleep between steps, so that an idle server uses no CPU. torch keeps an OpenMP team beside this
// one; start the process with OMP_WAIT_POLICY=PASSIVE, or torch's threads spin for milliseconds after each of its
// parallel operations, on the cores that this team wants next.
//
// Life of a call:
// 1. The caller publishes `work_` and then `state_` = (threads, count, next = 0), and wakes whoever sleeps.
// 2. Caller and members claim items by adding 1 to `state_`: one atomic word, so that a claim and the count that it is
//    measured by cannot come from two calls. A claim beyond `count` is void.
// 3. A valid claim holds the call open: `done_` reaches `count` only after its item, so `work_` is still there.
// 4. The caller returns when `done_` equals `count`. Members that never woke in between are not missed.
class Team {
 public:
  void run(int threads, int count, const std::function<void(int)>& work) {
    std::unique_lock<std::mutex> call(call_, std::try_to_lock);
    if (!call.owns_lock()) {  // another Python thread has the team
      for (int i = 0; i < count; ++i) work(i);
      return;
    }
    for (; members_ < threads - 1; ++members_) std::thread(&Team::member, this, members_).detach();
    work_ = &work;
    done_.store(0, std::memory_order_relaxed);
    state_.store(pack(threads, count));
    if (sleeping_.load()) {
      std::lock_guard<std::mutex> lock(sleep_);
      wake_.notify_all();
    }
    while (claim()) {
    }
    for (int spins = 0; done_.load(std::memory_order_acquire) != count; ++spins) {
      if (spins < kSpins) RELAX();
      else std::this_thread::yield();
    }
  }

 private:
  static constexpr int kBits = 26;
  static constexpr uint64_t kMask = (1u << kBits) - 1;
  static uint64_t pack(uint64_t threads, uint64_t count) { return threads << 2 * kBits | count << kBits; }
  static bool left(uint64_t state) { return (state & kMask) < (state >> kBits & kMask); }

  bool claim() {
    uint64_t state = state_.fetch_add(1, std::memory_order_acq_rel);
    if (!left(state)) return false;
    (*work_)(static_cast<int>(state & kMask));
    done_.fetch_add(1, std::memory_order_release);
    return true;
  }

  bool wanted(int member) const {
    uint64_t state = state_.load();
    return left(state) && static_cast<uint64_t>(member) + 1 < state >> 2 * kBits;
  }

  void member(int index) {
    for (;;) {
      for (int spins = 0; spins < kSpins && !wanted(index); ++spins) RELAX();
      if (!wanted(index)) {
        std::unique_lock<std::mutex> lock(sleep_);
        ++sleeping_;
        wake_.wait(lock, [&] { return wanted(index); });
        --sleeping_;
      }
      while (claim()) {
      }
    }
  }

  std::mutex call_;  // held by the one call under way
  int members_ = 0;
  const std::function<void(int)>* work_ = nullptr;
  alignas(64) std::atomic<uint64_t> state_{0};
  alignas(64) std::atomic<int> done_{0};
  std::mutex sleep_;
  std::condition_variable wake_;
  std::atomic<int> sleeping_{0};
};

// Never destroyed: its members may wait on it until the process ends. A forked child has no members, and gets a new one.
Team*& team() {
  static Team* current = [] {
    pthread_atfork(nullptr, nullptr, [] { team() = new Team; });
    return new Team;
  }();
  return current;
}

}  // namespace

void parallel_for(int threads, int count, const std::function<void(int)>& work) {
  threads = std::min({threads, count, kThreadsMax});
  if (threads > 1 && count <= kItemsMax) return team()->run(threads, count, work);
  for (int i = 0; i < count; ++i) work(i);
}

}  // namespace headrace
