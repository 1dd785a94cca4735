// The Python face of low_bit.h; ops/low_bit.py checks what it passes.
#include <nanobind/nanobind.h>

#include <stdexcept>

#include "low_bit.h"

namespace nb = nanobind;

namespace headrace {
namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

const LowBitKernels& low_bit_kernels(int isa) {
#if defined(HEADRACE_X86)
  const LowBitKernels* tables[] = {&low_bit_baseline, &low_bit_avx2, &low_bit_avx512, &low_bit_avx512_bf16};
  if (isa >= 0 && isa < 4) return *tables[isa];
#else
  if (isa == 0) return low_bit_baseline;
#endif
  throw std::invalid_argument("no such instruction set");
}

void py_low_bit(int isa, bool bf16, uintptr_t x, uintptr_t gather, uintptr_t words, uintptr_t table, uintptr_t scales,
                bool scales_bf16, uintptr_t zeros, float middle, int bits, int tiles, int groups, uintptr_t out, int rows,
                int n, int k, bool out_f32, int threads) {
  if (bits < 1 || bits > 8 || groups < 1 || tiles % groups) throw std::invalid_argument("no such low-bit weight");
  LowBit weight{at<uint16_t>(words), at<uint16_t>(table), at<void>(scales), at<uint8_t>(zeros), scales_bf16, middle, bits,
                tiles, groups, n, nullptr, nullptr, 1, at<void>(out), rows, out_f32};
  LowBitCall call{weight, at<void>(x), at<int32_t>(gather), k};
  nb::gil_scoped_release release;
  low_bit(low_bit_kernels(isa), bf16 ? kBf16 : kF32, call, threads);
}

}  // namespace

void define_low_bit(nb::module_& m) {
  m.attr("TILE") = kTile;
  m.def("low_bit", &py_low_bit);
}

}  // namespace headrace
