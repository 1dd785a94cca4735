// Compiled once per instruction set, with its flags and HEADRACE_VARIANT_TABLE naming its table.
#include "variants.h"

#include "attention_kernel.h"

namespace headrace {

#define ENTRY(A) {{attend_chunk<F32, A>, attend_chunk<Bf16, A>}, {merge<F32, A>, merge<Bf16, A>}},
const Variant HEADRACE_VARIANT_TABLE[kVariants] = {HEADRACE_VARIANTS(ENTRY)};
#undef ENTRY

}  // namespace headrace
