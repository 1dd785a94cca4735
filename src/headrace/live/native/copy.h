#pragma once

#include <cstddef>
#include <cstdint>

namespace headrace {

// One row of `live.transfer.pieces.Pieces`.
struct Piece {
  int64_t source, target, nbytes;
};

// Copies every piece from `source` to `target` (their offsets are relative to these). Stores of pieces of at least
// `streaming_min` bytes bypass the caches.
void copy(const char* source, char* target, const Piece* pieces, size_t count, size_t streaming_min);

}  // namespace headrace
