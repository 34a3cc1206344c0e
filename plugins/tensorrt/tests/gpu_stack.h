// MambaDecodeStack on a GPU: part of plugin_gpu_host.
#ifndef MAMBA_PLUGIN_TESTS_GPU_STACK_H_
#define MAMBA_PLUGIN_TESTS_GPU_STACK_H_

#include "library.h"

namespace plugin_tests {

// Both families, all types and tactics against the reference; `quick`: small models alone.
void walk_stacks(const Library& library, bool quick);
// Milliseconds a token of a model of mamba-130m's shape, float16, each tactic as a CUDA graph.
void time_stack(const Library& library);

}  // namespace plugin_tests
#endif  // MAMBA_PLUGIN_TESTS_GPU_STACK_H_
