// Compiled once per instruction set, with its flags and HEADRACE_TABLE naming its table.
#include "attention_kernel.h"
#include "choice_kernel.h"
#include "linear_kernel.h"
#include "rows_kernel.h"

namespace headrace {

const Kernels HEADRACE_TABLE = {
    {attend<F32>, attend<Bf16>},
    {attend_partition<F32>, attend_partition<Bf16>},
    {combine<F32>, combine<Bf16>},
    {merge<F32>, merge<Bf16>},
    {linear_panel<F32>, linear_panel<Bf16>},
    {norm_rows<F32>, norm_rows<Bf16>},
    {gate_rows<F32>, gate_rows<Bf16>},
    {turn_rows<F32>, turn_rows<Bf16>},
    greatest_logit,
    weigh,
    sizeof(Bf16::Operand) == sizeof(float),
};

}  // namespace headrace
