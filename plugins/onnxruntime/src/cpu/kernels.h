// The CPU kernels behind the ops, without any instruction set: arguments, and a table of functions for each set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mamba {

enum class Type { f32, f16, bf16 };

// A scan of either model over channels = segments x rows. Mamba-1: segments are the groups of B and C. Mamba-2:
// segments are the heads, rows the dimensions of a head, and Δ and A belong to the head (`per_segment`).
struct Scan {
  Type type;
  const void *x, *dt, *B, *C, *z;  // [b, L, channels], dt [b, L, channels or segments], [b, L, groups, N]; z may be 0
  const float *A, *D, *dt_bias;    // [channels, N] or [segments]; D [channels] or [segments]
  const float* state;              // [b, channels, N]
  const int32_t* seq_lens;         // [b] or 0
  void* y;
  float* present;
  int64_t batch, length, segments, rows, groups, d_state;
  bool per_segment, D_per_segment, softplus, reverse;
  float dt_min, dt_max;
};

struct Conv {
  Type type;
  const void *x, *weight, *bias, *state;  // [b, L, C], [C, K], [C], [b, C, K - 1]
  const int32_t* seq_lens;                // [b] or 0
  void *y, *present;
  int64_t batch, length, channels, kernel;
  bool silu;
};

// One op for one instruction set: the work is cut into `tasks` that may run in any order on any threads.
template <class Arguments>
struct Kernel {
  int64_t (*tasks)(const Arguments&);
  std::size_t (*scratch)(const Arguments&);  // floats that a task needs, aligned to 64 bytes
  void (*run)(const Arguments&, int64_t task, float* scratch);
};

struct Kernels {
  const char* name;
  Kernel<Scan> scan;    // any length
  Kernel<Scan> update;  // length 1, without seq_lens
  Kernel<Conv> conv;
};

// The widest that this processor runs; MAMBA_ORT_ISA=avx2 and the like in the environment choose a narrower one.
const Kernels& kernels();

}  // namespace mamba
