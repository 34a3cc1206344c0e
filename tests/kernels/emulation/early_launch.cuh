// Stands in for the file of this name.
#pragma once
#include <type_traits>

#include "common.cuh"

namespace mamba {
inline void let_next_start() {}
inline void wait_for_previous() {}
inline void prefetch_line(const void*) {}
inline uint4 load_state_16(const void* p) { return *static_cast<const uint4*>(p); }
inline void store_state_16(void* p, uint4 v) { *static_cast<uint4*>(p) = v; }
inline void store_16(void* p, uint4 v) { *static_cast<uint4*>(p) = v; }
inline void store_8(void* p, uint2 v) { *static_cast<uint2*>(p) = v; }
template <typename T> T load_early(const T* p) { return *p; }

template <typename... P> int launch_early(void (*kernel)(P...), dim3 grid, dim3 block, cudaStream_t, std::type_identity_t<P>... arguments) {
  emulation::run(grid, block, EMULATION_SHUFFLES, [&] { kernel(arguments...); });
  return MAMBA_OK;
}
}  // namespace mamba
