#include "stream.h"

#include <errno.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>

namespace headrace {
namespace {

constexpr int kVectors = 256;  // of one call
constexpr int64_t kCallMax = 1 << 20;  // bytes of one call: how long a stop may take to be seen

int64_t fill(iovec* vectors, int* used, char* base, const Run* runs, int64_t count, const Cursor& from,
             int64_t nbytes_max) {
  int64_t filled = 0, skip = from.offset;
  *used = 0;
  for (int64_t i = from.run; i < count && *used < kVectors && filled < nbytes_max; ++i, skip = 0) {
    int64_t take = std::min(runs[i].nbytes - skip, nbytes_max - filled);
    if (!take) continue;
    vectors[(*used)++] = {base + runs[i].offset + skip, static_cast<size_t>(take)};
    filled += take;
  }
  return filled;
}

void advance(Cursor* cursor, const Run* runs, int64_t count, int64_t moved) {
  cursor->offset += moved;
  while (cursor->run < count && cursor->offset >= runs[cursor->run].nbytes) {
    cursor->offset -= runs[cursor->run].nbytes;
    ++cursor->run;
  }
}

template <class Call>
int64_t move(const Run* runs, int64_t count, Cursor* cursor, int64_t nbytes_max, char* base, Call call) {
  int64_t moved = 0;
  iovec vectors[kVectors];
  while (moved < nbytes_max) {
    msghdr message{};
    int used = 0;
    if (!fill(vectors, &used, base, runs, count, *cursor, std::min(nbytes_max - moved, kCallMax))) break;
    message.msg_iov = vectors;
    message.msg_iovlen = static_cast<size_t>(used);
    int64_t now = call(&message);
    if (now < 0 && errno == EINTR) continue;
    if (now < 0 && errno == EAGAIN && moved) return moved;
    if (now < 0) return -errno;
    if (now == 0) return kEnded;
    advance(cursor, runs, count, now);
    moved += now;
  }
  return moved;
}

}  // namespace

int64_t send_runs(int fd, char* base, const Run* runs, int64_t count, Cursor* cursor, int64_t nbytes_max) {
  return move(runs, count, cursor, nbytes_max, base,
              [fd](msghdr* message) { return sendmsg(fd, message, MSG_NOSIGNAL); });
}

int64_t receive_runs(int fd, char* base, const Run* runs, int64_t count, Cursor* cursor, int64_t nbytes_max,
                     const volatile uint8_t* stop) {
  return move(runs, count, cursor, nbytes_max, base, [fd, stop](msghdr* message) -> int64_t {
    return *stop ? 0 : recvmsg(fd, message, 0);
  });
}

}  // namespace headrace
