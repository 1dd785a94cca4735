// The Python face of the kernels. Tensors arrive as addresses and strides that the callers in ops/ have checked: taking
// them through DLPack would cost several microseconds each, on calls that last tens.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>

#include <array>
#include <stdexcept>
#include <vector>

#include "attention.h"
#include "choice.h"
#include "linear.h"
#include "planned.h"
#include "rows.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace headrace {

void define_low_bit(nb::module_& m);  // low_bit_module.cpp

namespace {

enum Isa { kBaseline, kAvx2, kAvx512, kAvx512Bf16 };

int detect() {
#if defined(HEADRACE_X86)
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return kAvx512Bf16;
  if (avx512) return kAvx512;
  if (avx2) return kAvx2;
#endif
  return kBaseline;
}

const Kernels& kernels(int isa) {
  switch (isa) {
    case kBaseline: return kernels_baseline;
#if defined(HEADRACE_X86)
    case kAvx2: return kernels_avx2;
    case kAvx512: return kernels_avx512;
    case kAvx512Bf16: return kernels_avx512_bf16;
#endif
    default: throw std::invalid_argument("no such instruction set in this build");
  }
}

const Variant* variants(int isa) {
  switch (isa) {
    case kBaseline: return variants_baseline;
#if defined(HEADRACE_X86)
    case kAvx2: return variants_avx2;
    case kAvx512: return variants_avx512;
    case kAvx512Bf16: return variants_avx512_bf16;
#endif
    default: throw std::invalid_argument("no such instruction set in this build");
  }
}

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void py_paged_attention(int isa, bool bf16, uintptr_t q, ptrdiff_t q_stride, uintptr_t out, uintptr_t kv,
                        ptrdiff_t block_stride, ptrdiff_t plane_stride, ptrdiff_t head_stride, ptrdiff_t token_stride,
                        uintptr_t tables, int sequences, int table_width, uintptr_t rows, uintptr_t positions, int tokens, int blocks,
                        int block_size, int kv_heads, int group, int dim, int window, float scale, int threads) {
  Attention call{at<void>(q), q_stride, at<void>(out), at<void>(kv), block_stride, plane_stride, head_stride,
                 token_stride, at<int32_t>(tables), at<int32_t>(positions), table_width, block_size, kv_heads, group, dim, window,
                 scale};
  if (dim % 16 || dim > kDimMax || block_size % kChunk) throw std::invalid_argument("dim or block size not supported");
  nb::gil_scoped_release release;
  paged_attention(kernels(isa), bf16 ? kBf16 : kF32, call, at<int32_t>(rows), tokens, sequences, blocks, threads);
}

// Addresses of the int32 arrays of a plan, in the order of `Work`, and its counts.
using Arrays = std::array<uintptr_t, 13>;
using Counts = std::array<int, 5>;

void py_planned_attention(int isa, int variant, bool bf16, uintptr_t q, ptrdiff_t q_stride, uintptr_t out, uintptr_t kv,
                          ptrdiff_t block_stride, ptrdiff_t plane_stride, ptrdiff_t head_stride, ptrdiff_t token_stride,
                          uintptr_t positions, int block_size, int kv_heads, int group, int dim, int window, float scale,
                          uintptr_t by_head, uintptr_t mask, ptrdiff_t mask_stride, float constant, const Arrays& a,
                          const Counts& n, uintptr_t states, int threads) {
  Attention call{at<void>(q), q_stride, at<void>(out), at<void>(kv), block_stride, plane_stride, head_stride,
                 token_stride, nullptr, at<int32_t>(positions), 0, block_size, kv_heads, group, dim, window,
                 scale, at<float>(by_head), at<uint8_t>(mask), mask_stride, constant};
  if (dim % 16 || dim > kDimMax || block_size % kChunk) throw std::invalid_argument("dim or block size not supported");
  if (variant < 0 || variant >= kVariants) throw std::invalid_argument("no such variant of attention in this build");
  auto ints = [&](int i) { return at<const int32_t>(a[i]); };
  Work work{ints(0), ints(1), ints(2), ints(3), ints(4), ints(5), ints(6), ints(7), ints(8), ints(9), ints(10), ints(11),
            ints(12), n[0], n[1], n[2], n[3], n[4], at<float>(states)};
  nb::gil_scoped_release release;
  planned_attention(variants(isa)[variant], bf16 ? kBf16 : kF32, call, work, threads);
}

void py_partial_attention(int isa, bool bf16, uintptr_t q, ptrdiff_t q_stride, uintptr_t kv, ptrdiff_t block_stride,
                          ptrdiff_t plane_stride, ptrdiff_t head_stride, ptrdiff_t token_stride,
                          uintptr_t tables, int sequences, int table_width, uintptr_t rows, uintptr_t positions, uintptr_t begins, uintptr_t ends, uintptr_t bases,
                          int tokens, int blocks, int block_size, int kv_heads, int group, int dim, float scale,
                          uintptr_t out, int slots, int threads) {
  Attention call{at<void>(q), q_stride, nullptr, at<void>(kv), block_stride, plane_stride, head_stride, token_stride,
                 at<int32_t>(tables), at<int32_t>(positions), table_width, block_size, kv_heads, group, dim, 0, scale};
  if (dim % 16 || dim > kDimMax || block_size % kChunk) throw std::invalid_argument("dim or block size not supported");
  Partials wanted{at<int32_t>(begins), at<int32_t>(ends), at<int32_t>(bases), slots, at<float>(out)};
  nb::gil_scoped_release release;
  partial_attention(kernels(isa), bf16 ? kBf16 : kF32, call, wanted, at<int32_t>(rows), tokens, sequences, blocks,
                    threads);
}

void py_combine_partials(int isa, bool bf16, uintptr_t partials, uintptr_t counts, uintptr_t positions, int tokens,
                         int slots, int kv_heads, int group, int dim, uintptr_t out, int threads) {
  Attention call{nullptr, 0, at<void>(out), nullptr, 0, 0, 0, 0, nullptr, at<int32_t>(positions), 0, kChunk, kv_heads,
                 group, dim, 0, 1.0f};
  nb::gil_scoped_release release;
  combine_partials(kernels(isa), bf16 ? kBf16 : kF32, call, at<float>(partials), at<int32_t>(counts), tokens, slots,
                   threads);
}

void py_write_kv(uintptr_t k, ptrdiff_t k_stride, uintptr_t v, ptrdiff_t v_stride, uintptr_t kv,
                 ptrdiff_t block_stride, ptrdiff_t plane_stride, ptrdiff_t head_stride, ptrdiff_t token_stride,
                 ptrdiff_t token_bytes,
                 uintptr_t blocks, uintptr_t offsets, int tokens, int kv_heads, int block_count, int block_size) {
  Write call{at<void>(k), at<void>(v), k_stride, v_stride, at<void>(kv), block_stride, plane_stride, head_stride,
             token_stride, token_bytes, at<int32_t>(blocks), at<int32_t>(offsets), tokens, kv_heads, block_count, block_size};
  nb::gil_scoped_release release;
  write_kv(call);
}

void py_linear(int isa, bool bf16, uintptr_t x, uintptr_t weight, uintptr_t out, int rows, int n, int k, bool out_f32,
               int threads) {
  Linear call{at<void>(x), at<uint32_t>(weight), at<void>(out), rows, n, k, out_f32};
  nb::gil_scoped_release release;
  linear(kernels(isa), bf16 ? kBf16 : kF32, call, threads);
}

void py_norm(int isa, bool bf16, uintptr_t x, uintptr_t delta, uintptr_t weight, uintptr_t out, int rows, int dim,
             float eps, int threads) {
  Norm call{at<void>(x), at<void>(delta), at<void>(weight), at<void>(out), dim, eps};
  nb::gil_scoped_release release;
  norm(kernels(isa), bf16 ? kBf16 : kF32, call, rows, threads);
}

void py_gate(int isa, bool bf16, uintptr_t x, uintptr_t out, int rows, int width, bool gelu, int threads) {
  Gate call{at<void>(x), at<void>(out), width, gelu};
  nb::gil_scoped_release release;
  gate(kernels(isa), bf16 ? kBf16 : kF32, call, rows, threads);
}

void py_choose(int isa, uintptr_t logits, uintptr_t factor, uintptr_t min_p, uintptr_t top_p, uintptr_t u,
               uintptr_t top_k, int rows, int words, uintptr_t chosen, int threads) {
  std::vector<Choice> choices(rows);
  for (int i = 0; i < rows; ++i)
    choices[i] = {at<float>(at<uintptr_t>(logits)[i]), at<float>(factor)[i], at<float>(min_p)[i],
                  at<double>(top_p)[i],                at<double>(u)[i],     at<int32_t>(top_k)[i]};
  nb::gil_scoped_release release;
  choose(kernels(isa), choices.data(), rows, words, at<int32_t>(chosen), threads);
}

void py_turn(int isa, bool bf16, uintptr_t qkv, uintptr_t cos, uintptr_t sin, uintptr_t weight, float eps, uintptr_t kv,
             ptrdiff_t block_stride, ptrdiff_t plane_stride, ptrdiff_t head_stride, ptrdiff_t token_stride,
             uintptr_t blocks, uintptr_t offsets, int tokens, int heads, int kv_heads, int dim, int block_count,
             int block_size, int threads) {
  Turn call{at<void>(qkv), at<void>(cos), at<void>(sin), at<void>(weight), eps, at<void>(kv), block_stride,
            plane_stride, head_stride, token_stride, at<int32_t>(blocks), at<int32_t>(offsets), heads, kv_heads, dim};
  if (dim % 2 || dim > kDimMax) throw std::invalid_argument("dim not supported");
  nb::gil_scoped_release release;
  turn(kernels(isa), bf16 ? kBf16 : kF32, call, tokens, block_count, block_size, threads);
}

}  // namespace
}  // namespace headrace

NB_MODULE(_native, m) {
  m.doc() = "CPU kernels of headrace.compute.ops; call them through there, which checks shapes and strides.";
  m.attr("DIM_MAX") = headrace::kDimMax;
  m.attr("PANEL") = headrace::kPanel;
  m.def("detect", &headrace::detect, "Best instruction set of this CPU, as an index into ops.backend.ISAS.");
  m.def("paged_attention", &headrace::py_paged_attention);
  m.def("planned_attention", &headrace::py_planned_attention);
  m.attr("VECTORS") = headrace::kVectors;
  nb::list variants;
#define NAME(A) variants.append(#A);
  HEADRACE_VARIANTS(NAME)
#undef NAME
  m.attr("VARIANTS") = variants;
  m.attr("PARTITION") = headrace::kPartition;
  m.attr("PARTIAL_TAIL") = headrace::kPartialTail;
  m.def("partial_attention", &headrace::py_partial_attention);
  m.def("combine_partials", &headrace::py_combine_partials);
  m.def("write_kv", &headrace::py_write_kv);
  m.def("linear", &headrace::py_linear);
  m.def("norm", &headrace::py_norm);
  m.def("gate", &headrace::py_gate);
  m.def("choose", &headrace::py_choose);
  m.def("turn", &headrace::py_turn);
  headrace::define_low_bit(m);
}
