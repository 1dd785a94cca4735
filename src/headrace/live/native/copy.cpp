#include "copy.h"

#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace headrace {
namespace {

#if defined(__x86_64__)

constexpr size_t kLine = 64;
constexpr size_t kPrefetch = 4096;  // bytes ahead: a page, so that its address is looked up meanwhile, too

// Whole lines, past the caches: a line that is written whole need not be read first, which saves a third of the traffic.
__attribute__((target("avx512f"))) void lines_avx512(const char* from, char* to, size_t nbytes) {
  for (size_t at = 0; at < nbytes; at += kLine) {
    _mm_prefetch(from + at + kPrefetch, _MM_HINT_T0);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + at), _mm512_loadu_si512(from + at));
  }
}

__attribute__((target("avx2"))) void lines_avx2(const char* from, char* to, size_t nbytes) {
  for (size_t at = 0; at < nbytes; at += kLine) {
    _mm_prefetch(from + at + kPrefetch, _MM_HINT_T0);
    __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + at));
    __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + at + 32));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + at), low);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + at + 32), high);
  }
}

using Lines = void (*)(const char*, char*, size_t);

Lines choose() {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) return lines_avx512;
  if (__builtin_cpu_supports("avx2")) return lines_avx2;
  return nullptr;
}

void stream(Lines lines, const char* from, char* to, size_t nbytes) {
  size_t head = (kLine - reinterpret_cast<uintptr_t>(to) % kLine) % kLine;
  if (head > nbytes) head = nbytes;
  std::memcpy(to, from, head);
  size_t body = (nbytes - head) / kLine * kLine;
  lines(from + head, to + head, body);
  std::memcpy(to + head + body, from + head + body, nbytes - head - body);
}

#endif

}  // namespace

void copy(const char* source, char* target, const Piece* pieces, size_t count, size_t streaming_min) {
#if defined(__x86_64__)
  static const Lines lines = choose();
  for (const Piece* p = pieces; p < pieces + count; ++p) {
    size_t nbytes = static_cast<size_t>(p->nbytes);
    if (lines && nbytes >= streaming_min) stream(lines, source + p->source, target + p->target, nbytes);
    else std::memcpy(target + p->target, source + p->source, nbytes);
  }
  _mm_sfence();  // before anybody is told
#else
  (void)streaming_min;
  for (const Piece* p = pieces; p < pieces + count; ++p)
    std::memcpy(target + p->target, source + p->source, static_cast<size_t>(p->nbytes));
#endif
}

}  // namespace headrace
