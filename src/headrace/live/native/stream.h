#pragma once

#include <cstddef>
#include <cstdint>

namespace headrace {

// Bytes of one side of a write: an offset into its region, and how many.
struct Run {
  int64_t offset, nbytes;
};

// How far a list of runs has been moved.
struct Cursor {
  int64_t run, offset;
};

// Each moves at most `nbytes_max` bytes from `cursor` on, which it advances, by as many calls into the system as that
// takes. Returns how many were moved; less only at the end of the runs, or
// when a socket with a time limit took no more. Negative: -errno, or kEnded.
constexpr int64_t kEnded = -100000;

// From memory to a blocking socket.
int64_t send_runs(int fd, char* base, const Run* runs, int64_t count, Cursor* cursor, int64_t nbytes_max);
// From a blocking socket to memory. Between calls into the system it looks at `*stop`, and ends if that is not 0.
int64_t receive_runs(int fd, char* base, const Run* runs, int64_t count, Cursor* cursor, int64_t nbytes_max,
                     const volatile uint8_t* stop);

}  // namespace headrace
