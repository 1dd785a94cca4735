// The Python face of what moves bytes. Memory comes as addresses and arrays of offsets that the callers have checked.
#include <nanobind/nanobind.h>

#include "copy.h"
#include "stream.h"

namespace nb = nanobind;

namespace headrace {
namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void py_copy(uintptr_t source, uintptr_t target, uintptr_t pieces, size_t count, size_t streaming_min) {
  nb::gil_scoped_release release;
  copy(at<const char>(source), at<char>(target), at<const Piece>(pieces), count, streaming_min);
}

int64_t py_send(int fd, uintptr_t base, uintptr_t runs, int64_t count, uintptr_t cursor, int64_t nbytes_max) {
  nb::gil_scoped_release release;
  return send_runs(fd, at<char>(base), at<const Run>(runs), count, at<Cursor>(cursor), nbytes_max);
}

int64_t py_receive(int fd, uintptr_t base, uintptr_t runs, int64_t count, uintptr_t cursor, int64_t nbytes_max,
                   uintptr_t stop) {
  nb::gil_scoped_release release;
  return receive_runs(fd, at<char>(base), at<const Run>(runs), count, at<Cursor>(cursor), nbytes_max,
                      at<const volatile uint8_t>(stop));
}

}  // namespace
}  // namespace headrace

NB_MODULE(_native, m) {
  m.doc() = "Moves bytes for headrace.live.transfer; call it through copying and channels there, which check.";
  m.attr("ENDED") = headrace::kEnded;
  m.def("copy", &headrace::py_copy);
  m.def("send", &headrace::py_send);
  m.def("receive", &headrace::py_receive);
}
