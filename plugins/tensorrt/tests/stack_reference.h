// decode_stack in double, written from its definition. Its pointers are those of the host here.
#ifndef MAMBA_PLUGIN_TESTS_STACK_REFERENCE_H_
#define MAMBA_PLUGIN_TESTS_STACK_REFERENCE_H_

#include <cstdint>

#include "mamba/decode_stack.h"

namespace plugin_tests {

// Element `index` of memory of a mamba_dtype; a store rounds to the nearest.
double load(const void* memory, int32_t dtype, int64_t index);
void store(void* memory, int32_t dtype, int64_t index, double value);

// One token a row: reads ids, states and weights, writes logits and states (in place too). Nothing between is rounded, but for
// the residual where it has the model's dtype. Packed integers have no zero points of their own.
void reference_stack(const mamba_decode_stack_params& p);

}  // namespace plugin_tests
#endif  // MAMBA_PLUGIN_TESTS_STACK_REFERENCE_H_
