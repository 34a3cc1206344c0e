// The compiled tensor-core layouts of one d_state, and how the dispatcher finds them.
#pragma once

#include "mamba/common.h"
#include "ssd_chunk.cuh"

namespace mamba {
namespace ssd {

using Kernel = void (*)(ScanArgs);

// Lets a kernel have that much dynamic shared memory; asks the runtime once a kernel and device.
bool allow_shared(const void* kernel, int bytes);
template <typename... Args>
bool allow_shared(void (*kernel)(Args...), int bytes) {
  return allow_shared(reinterpret_cast<const void*>(kernel), bytes);
}

struct Plan {
  Kernel scan, stream, state;
  int heads, chunk, threads, resident;  // resident: blocks that registers allow a multiprocessor, at least
  int scan_shared, state_shared;
};

// False when there is no such layout. One file an instance of d_state, so that they compile side by side.
bool plan_n16(int dtype, int headdim, int layout, Plan* plan);
bool plan_n64(int dtype, int headdim, int layout, Plan* plan);
bool plan_n128(int dtype, int headdim, int layout, Plan* plan);
bool plan_n256(int dtype, int headdim, int layout, Plan* plan);
// Only in builds for Hopper (MAMBA_SM90A).
bool plan_hopper(int dtype, int headdim, int d_state, int layout, Plan* plan);  // layout 0

}  // namespace ssd
}  // namespace mamba
