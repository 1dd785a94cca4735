// Compiled once per instruction set, with its flags and HEADRACE_LOW_BIT naming its table.
#include "low_bit_kernel.h"

namespace headrace {

const LowBitKernels HEADRACE_LOW_BIT = {
    {low_bit_panels<F32Pairs, false>, low_bit_panels<Bf16Pairs, true>},
    sizeof(Bf16Pairs::Operand) == sizeof(float),
};

}  // namespace headrace
