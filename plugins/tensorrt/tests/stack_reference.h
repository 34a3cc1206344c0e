// decode_stack in double, written from its definition. Its pointers are those of the host here.
#ifndef MAMBA_PLUGIN_TESTS_STACK_REFERENCE_H_
#define MAMBA_PLUGIN_TESTS_STACK_REFERENCE_H_

#include <cstdint>
#include <vector>

#include "mamba/decode_stack.h"

namespace plugin_tests {

// Element `index` of memory of a mamba_dtype; a store rounds to the nearest.
double load(const void* memory, int32_t dtype, int64_t index);
void store(void* memory, int32_t dtype, int64_t index, double value);

// Rows of packed integers of `bits` whose values are of about the size of 1 / sqrt(width).
std::vector<char> random_packed(int bits, int64_t rows, int32_t width, int32_t scales, int32_t dtype, unsigned seed);

// One token a row: reads ids, states and weights, writes logits and states (in place too). Nothing between is rounded, but for
// the residual where it has the model's dtype. Packed integers have no zero points of their own.
void reference_stack(const mamba_decode_stack_params& p);

}  // namespace plugin_tests
#endif  // MAMBA_PLUGIN_TESTS_STACK_REFERENCE_H_
